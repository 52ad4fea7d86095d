"""Every key that the service writes.

All keys of a session share one hash slot, and so do all keys of a model and all of a tenant. The
hash tag is made of a digest: no user text stands in a key, so none can move a key to another slot.
"""

from __future__ import annotations

import base64
from functools import lru_cache
from typing import TYPE_CHECKING, Final

from service.domain.digests import name_digest, session_digest

if TYPE_CHECKING:
    from service.domain.types import ModelKey, SessionKey


_REPLICAS: Final = b"r{replicas}"  # one slot for all: they are few, and read together


@lru_cache(maxsize=65536)
def session_tag(key: SessionKey) -> bytes:
    """Return the hash tag of a session's slot."""
    return b"s{" + _text(session_digest(key)) + b"}"


@lru_cache(maxsize=4096)
def model_tag(key: ModelKey) -> bytes:
    """Return the hash tag of a model's slot."""
    return b"m{" + _text(name_digest("model", *key)) + b"}"


@lru_cache(maxsize=4096)
def tenant_tag(tenant: str) -> bytes:
    """Return the hash tag of a tenant's slot."""
    return b"t{" + _text(name_digest("tenant", tenant)) + b"}"


def record_key(tag: bytes) -> bytes:
    """Return the key of a session's record: numbers, ring of states, hidden state."""
    return tag


def marker_key(tag: bytes) -> bytes:
    """Return the key of the marker that outlives a session."""
    return tag + b"e"


def tape_index_key(tag: bytes) -> bytes:
    """Return the key of the list of a session's tapes."""
    return tag + b"t"


def tape_key(tag: bytes, name: bytes) -> bytes:
    """Return the key of one tape; the scripts build it the same way."""
    return tag + b"t" + name


def staged_tape_key(tag: bytes, token: bytes) -> bytes:
    """Return the key under which a tape waits for its commit; the script builds it the same way."""
    return tag + b"u" + token


def model_key(tag: bytes) -> bytes:
    """Return the key of a model's head, specification and counters."""
    return tag


def versions_key(tag: bytes) -> bytes:
    """Return the key of a model's versions by number."""
    return tag + b"v"


def superseded_key(tag: bytes) -> bytes:
    """Return the key of the versions that age, by the time at which they were superseded."""
    return tag + b"a"


def checkpoints_key(tag: bytes) -> bytes:
    """Return the key of a model's checkpoints by name."""
    return tag + b"c"


def contributions_key(tag: bytes) -> bytes:
    """Return the key of a model's contributions, waiting and consumed, by name."""
    return tag + b"g"


def waiting_key(tag: bytes) -> bytes:
    """Return the key of the names of waiting contributions, in sorted order."""
    return tag + b"w"


def expiry_key(tag: bytes) -> bytes:
    """Return the key of the contributions by the time at which they can go."""
    return tag + b"x"


def requests_key(tag: bytes) -> bytes:
    """Return the key of a model's remembered requests by id."""
    return tag + b"r"


def request_times_key(tag: bytes) -> bytes:
    """Return the key of a model's remembered requests by age."""
    return tag + b"q"


def gradient_prefix(tag: bytes) -> bytes:
    """Return what the key of a waiting gradient begins with; its name follows."""
    return tag + b"d"


def weights_prefix(tag: bytes, incarnation: bytes) -> bytes:
    """Return what the keys of a version's weights begin with; version and part follow."""
    return tag + b"W" + incarnation


def moments_prefix(tag: bytes, incarnation: bytes) -> bytes:
    """Return what the keys of a version's moments begin with; version and part follow."""
    return tag + b"M" + incarnation


def tenant_sessions_key(tenant: str) -> bytes:
    """Return the key of a tenant's sessions by the time at which they expire."""
    return tenant_tag(tenant) + b"s"


def tenant_models_key(tenant: str) -> bytes:
    """Return the key of the names of a tenant's models."""
    return tenant_tag(tenant) + b"m"


def tape_sizes_keys(tenant: str) -> tuple[bytes, bytes]:
    """Return the keys of the bytes of a tenant's waiting tapes: by name, and the names by their ends."""
    tag = tenant_tag(tenant)
    return tag + b"t", tag + b"u"


def gradient_sizes_keys(tenant: str) -> tuple[bytes, bytes]:
    """Return the keys of the bytes of a tenant's waiting gradients, as of its tapes."""
    tag = tenant_tag(tenant)
    return tag + b"d", tag + b"x"


def replicas_key() -> bytes:
    """Return the key of the replicas by the time at which they lapse."""
    return _REPLICAS


def replica_prefix() -> bytes:
    """Return what the key of a replica's record begins with; its name follows."""
    return _REPLICAS + b"b"


def page_secret_key() -> bytes:
    """Return the key of the secret by which replicas know each other's logins on the page."""
    return _REPLICAS + b"k"


def ended_logins_key(token_id: str) -> bytes:
    """Return the key of how often the logins of a token on the page were ended."""
    return _REPLICAS + b"e" + token_id.encode()


def check_key(number: int) -> bytes:
    """Return a key for checking whether a store accepts writes; numbers spread over the slots."""
    return b"t{check%d}" % number


def _text(digest: bytes) -> bytes:
    return base64.urlsafe_b64encode(digest).rstrip(b"=")
