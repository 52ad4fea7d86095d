"""URLs of stores: read in one way for every form, and refused without a part of a secret."""

from __future__ import annotations

import traceback

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from instruments.redis_servers import SentinelGroup
from service.domain.errors import Unavailable
from service.settings import Settings
from service.store.addresses import FORMS, parse_store_url
from service.store.connect import open_store

HOSTED = [form for form in FORMS if form != "unix"]
PLACES = {form: "/mymaster" if form.endswith("sentinel") else "" for form in FORMS}


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("redis://h", "redis://h:6379"),
        ("redis://:pass@h:7/3", "redis://h:7/3"),
        ("rediss://user:pass@[::1]/0", "rediss://[::1]:6379"),
        ("unix:///run/a@b.sock?db=2", "unix:///run/a@b.sock"),
        ("unix://user:pass@/run/s.sock", "unix:///run/s.sock"),
        ("redis+sentinel://h,i:7/m/2?sentinel_password=pass", "redis+sentinel://h:26379,i:7/m/2"),
        ("redis+cluster://:pass@h:7,i", "redis+cluster://h:7,i:6379"),
    ],
)
def test_a_url_is_shown_without_its_secrets(url: str, shown: str) -> None:
    """As it stands in the log and in errors: hosts, name and database."""
    address = parse_store_url(url)
    assert str(address) == shown
    assert "pass" not in repr(address)


def test_credentials_are_read_from_both_places() -> None:
    """Before the hosts, percent-encoded, and as options, whatever the form."""
    for form in HOSTED:
        for url in (f"{form}://us%2Fer:p%40ss@h", f"{form}://h"):
            query = "" if "@" in url else "?username=us/er&password=p%40ss"
            address = parse_store_url(f"{url}{PLACES[form]}{query}")
            assert (address.username, address.password) == ("us/er", "p@ss")


@pytest.mark.parametrize("form", HOSTED)
@pytest.mark.parametrize("host", ["", ":6379", "h,,i", "user:pass@", "h:0", "h:65536", "h:x"])
def test_a_url_without_a_proper_host_says_what_is_expected(form: str, host: str) -> None:
    """No default stands in for a host that was forgotten."""
    with pytest.raises(ValueError, match="expected redis") as refused:
        parse_store_url(f"{form}://{host}{PLACES[form]}")
    assert FORMS[form] in str(refused.value)


@pytest.mark.parametrize(
    "url",
    ["redis://h/abc", "redis://h/1/2", "redis://h,i", "redis+cluster://h/1", "redis+sentinel://h",
     "redis+sentinel://h/m/x", "unix://", "unix://host/s", "unix:///s?db=x", "http://h", "h:6379", "",
     "redis://[]", "redis://[::1"],
)  # fmt: skip
def test_what_names_no_store_is_refused(url: str) -> None:
    """A database that is no number, two hosts of one server, a socket without a path."""
    with pytest.raises(ValueError, match=r"expected|the option db"):
        parse_store_url(url)


@pytest.mark.parametrize("form", FORMS)
def test_an_option_that_nobody_reads_is_refused(form: str) -> None:
    """A misspelt name would otherwise leave a check out in silence."""
    place = "/run/s" if form == "unix" else f"h{PLACES[form]}"
    with pytest.raises(ValueError, match="unknown option 'ssl_cacerts'"):
        parse_store_url(f"{form}://{place}?ssl_cacerts=x")
    if not form.startswith("rediss"):
        with pytest.raises(ValueError, match="ssl_ca_certs needs TLS"):
            parse_store_url(f"{form}://{place}?ssl_ca_certs=x")


@pytest.mark.parametrize("form", [form for form in FORMS if form.startswith("rediss")])
@pytest.mark.parametrize(
    "option",
    ["ssl_ca_certs=/no/such", "ssl_cert_reqs=maybe", "ssl_min_version=new", "ssl_certfile=/dev/null",
     "ssl_ciphers=none-such", f"ssl_ca_certs={__file__}", f"ssl_certfile={__file__}"],
)  # fmt: skip
def test_tls_options_are_checked_before_anything_is_sent(form: str, option: str) -> None:
    """A file that is not there or holds no certificate ends the start with its reason."""
    with pytest.raises(ValueError, match=r"option"):
        parse_store_url(f"{form}://h{PLACES[form]}?{option}")


@settings(deadline=None)
@given(
    form=st.sampled_from(HOSTED),
    secret=st.text("abXY19/?#@:%[]&=,", min_size=8, max_size=12),
    has_user=st.booleans(),
)
def test_no_error_holds_a_part_of_a_password(form: str, secret: str, *, has_user: bool) -> None:
    """An unquoted password splits a URL in the wrong places, and every part might be printed."""
    marked = "".join(f"q{letter}z" for letter in secret)
    user = "us" if has_user else ""
    try:
        text = str(parse_store_url(f"{form}://{user}:{marked}@h{PLACES[form]}"))
    except ValueError as error:
        text = "".join(traceback.format_exception_only(error))
    assert "q" not in text


async def unreachable(url: str) -> str:
    """Return the message about a store that cannot be reached."""
    opened = await open_store(url, Settings())
    try:
        with pytest.raises(Unavailable) as failed:
            await opened.check()
    finally:
        await opened.close()
    return str(failed.value.__cause__)


async def test_sentinels_that_do_not_answer_are_reported_by_their_addresses(
    nobody: list[str],
) -> None:
    """One sentence each, and no object of the client library."""
    text = await unreachable(f"redis+sentinel://:s3cret@{','.join(nobody)}/mymaster")
    for place in nobody:
        assert f"the sentinel at {place} does not answer: " in text
    assert "<" not in text
    assert "s3cret" not in text


async def test_a_master_that_no_sentinel_knows_is_reported_by_its_name() -> None:
    """The sentinels answer; the name is wrong."""
    with SentinelGroup(replicas=1) as group:
        text = await unreachable(f"redis+sentinel://{group.addresses[0]}/yourmaster")
    assert text == f"the sentinel at {group.addresses[0]} names no master 'yourmaster' that is up"


@pytest.fixture
def nobody() -> list[str]:
    """Addresses where nobody listens."""
    return ["127.0.0.1:1", "127.0.0.1:2"]
