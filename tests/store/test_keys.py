"""Keys: one slot for all that one script decides about, and no user text in any."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st
from redis.crc import key_slot

from service.domain.types import ModelKey, SessionKey
from service.store import keys

NAMES = st.text(max_size=128) | st.sampled_from(["{", "}", "{}", "{a}b", "a}{b", "ü{", "\0", "*"])
BYTES = st.binary(min_size=16, max_size=16)


@settings(max_examples=50, deadline=None)
@given(tenant=NAMES, session_id=NAMES, name=BYTES)
def test_a_sessions_keys_share_a_slot(tenant: str, session_id: str, name: bytes) -> None:
    """Whatever the ids and the tape's name are, braces included."""
    tag = keys.session_tag(SessionKey(tenant, session_id))
    made = [
        keys.record_key(tag),
        keys.marker_key(tag),
        keys.tape_index_key(tag),
        keys.tape_key(tag, name),
        keys.tape_index_key(tag) + b"{x}" + name,
    ]
    assert len({key_slot(key) for key in made}) == 1
    assert len(set(made)) == len(made)


@settings(max_examples=50, deadline=None)
@given(tenant=NAMES, model_id=NAMES, incarnation=BYTES, name=st.binary(min_size=32, max_size=32))
def test_a_models_keys_share_a_slot(
    tenant: str, model_id: str, incarnation: bytes, name: bytes
) -> None:
    """Head, versions, contributions, requests, and every blob."""
    tag = keys.model_tag(ModelKey(tenant, model_id))
    made = [
        keys.model_key(tag),
        keys.versions_key(tag),
        keys.superseded_key(tag),
        keys.checkpoints_key(tag),
        keys.contributions_key(tag),
        keys.waiting_key(tag),
        keys.expiry_key(tag),
        keys.requests_key(tag),
        keys.request_times_key(tag),
        keys.gradient_prefix(tag) + name,
        keys.weights_prefix(tag, incarnation) + name,
        keys.moments_prefix(tag, incarnation) + name,
    ]
    assert len({key_slot(key) for key in made}) == 1
    assert len(set(made)) == len(made)


@settings(max_examples=50, deadline=None)
@given(tenant=NAMES, name=NAMES)
def test_kinds_of_keys_never_meet(tenant: str, name: str) -> None:
    """A session, a model and a tenant's lists have different keys under equal names."""
    made = [
        keys.session_tag(SessionKey(tenant, name)),
        keys.model_tag(ModelKey(tenant, name)),
        keys.tenant_sessions_key(tenant),
        keys.tenant_models_key(tenant),
    ]
    assert len(set(made)) == len(made)
    assert key_slot(keys.tenant_sessions_key(tenant)) == key_slot(keys.tenant_models_key(tenant))


@settings(max_examples=50, deadline=None)
@given(pairs=st.tuples(NAMES, NAMES, NAMES, NAMES))
def test_tenants_and_names_cannot_be_shifted_into_each_other(
    pairs: tuple[str, str, str, str],
) -> None:
    """("ab", "c") and ("a", "bc") are two sessions."""
    a, b, c, d = pairs
    first, second = SessionKey(a, b), SessionKey(c, d)
    assert (keys.session_tag(first) == keys.session_tag(second)) == (first == second)
    left, right = SessionKey(a + b, c), SessionKey(a, b + c)
    assert keys.session_tag(left) != keys.session_tag(right) or not b


@settings(max_examples=50, deadline=None)
@given(tenant=st.just("tenant"), session_id=st.from_regex("[a-z]{8,20}", fullmatch=True))
def test_no_user_text_stands_in_a_key(tenant: str, session_id: str) -> None:
    """A key reveals neither tenant nor session."""
    tag = keys.session_tag(SessionKey(tenant, session_id))
    assert session_id.encode() not in tag
    assert tenant.encode() not in tag
    assert len(tag) == 25
