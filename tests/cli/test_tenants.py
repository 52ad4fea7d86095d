"""`timernn tenants purge`: erases through the store's URL, and only with the option that confirms it."""

from __future__ import annotations

import json
import uuid
from typing import TYPE_CHECKING, Any

import pytest
import trustme
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    PrivateFormat,
    load_pem_private_key,
)
from redis import Redis
from tls_front import Certificates, TlsFront

from instruments.redis_servers import RedisServer
from service.cli import main
from service.cli.output import counted
from service.store import keys

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


def test_purge_erases_only_with_the_option_that_confirms_it(
    store_url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without --yes it says what it would do and exits with 2; with it the tenant's lists are gone."""
    tenant = f"t{uuid.uuid4().hex}"
    listed = keys.tenant_models_key(tenant)
    with Redis.from_url(store_url) as raw:
        raw.zadd(listed, {"half": 0})
        assert main(["tenants", "purge", tenant, "--redis-url", store_url]) == 2
        assert "add --yes" in capsys.readouterr().err
        assert raw.exists(listed)
        assert main(["tenants", "purge", tenant, "--redis-url", store_url, "--yes", "--json"]) == 0
        assert json.loads(capsys.readouterr().out) == {"tenant": tenant, "models": 0, "sessions": 0}
        assert not raw.exists(listed)


def test_what_was_erased_is_counted_in_words(
    store_url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing is a plural, and one thing is none."""
    tenant = f"t{uuid.uuid4().hex}"
    assert main(["tenants", "purge", tenant, "--redis-url", store_url, "--yes"]) == 0
    assert capsys.readouterr().out == f"erased of {tenant}: 0 models, 0 sessions\n"
    assert [counted(count, "models") for count in range(3)] == ["0 models", "1 model", "2 models"]


def test_purge_says_which_url_is_no_url(capsys: pytest.CaptureFixture[str]) -> None:
    """A wrong URL is one line that names the option."""
    assert main(["tenants", "purge", "acme", "--redis-url", "http://x", "--yes"]) == 2
    assert "--redis-url: " in capsys.readouterr().err


def test_purge_without_a_store_is_one_line(bare: Callable[..., Any], nobody: str) -> None:
    """Of the process too: no line of a log stands beside it."""
    url = f"redis://{nobody}"
    done = bare("tenants", "purge", "acme", "--redis-url", url, "--yes")
    assert (done.code, done.out) == (1, "")
    why = f"the store at {url} cannot be reached: {nobody}: Connection refused"
    assert done.err == f"timernn: {why}; the same command goes on where it ended\n"


def test_purge_says_in_plain_words_why_a_store_s_certificate_is_not_accepted(
    bare: Callable[..., Any], tmp_path: Path
) -> None:
    """Not in those of Python or OpenSSL."""
    certificates = Certificates.issue(tmp_path)
    with RedisServer(append_only=False) as store, TlsFront(certificates, store.port) as front:
        place = f"127.0.0.1:{front.port}"
        url = f"rediss://{place}"
        done = bare("tenants", "purge", "acme", "--redis-url", url, "--yes")
    assert (done.code, done.out, done.err.count("\n")) == (1, "", 1)
    why = "its certificate is not signed by an authority that is trusted here"
    assert f"{url} cannot be reached: {place}: {why};" in done.err


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ("ssl_ca_certs={other}", "{other}: expected certificates in PEM"),
        ("ssl_certfile={other}", "{other}: expected certificates in PEM"),
        ("ssl_certfile={cert}&ssl_keyfile={other}", "{other}: expected a private key in PEM"),
        ("ssl_certfile={cert}&ssl_keyfile={locked}", "{locked}: expected a key without a password"),
        ("ssl_certfile={cert}&ssl_keyfile={locked}&ssl_password=no", "of this password"),
        ("ssl_certfile={cert}&ssl_keyfile={key}&ssl_password=no", "{key}: expected a key with a"),
        ("ssl_certfile={cert}&ssl_keyfile={foreign}", "{foreign} is not the key of the cert"),
        ("ssl_ca_certs={gone}", "{gone}: No such file or directory"),
    ],
)
def test_purge_names_the_file_of_tls_that_is_wrong(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: str, error: str
) -> None:
    """And says in plain words what was expected of it."""
    authority = trustme.CA()
    one, other = authority.issue_cert("a.example"), authority.issue_cert("b.example")
    names = ("cert", "key", "foreign", "locked", "other", "gone")
    files = {name: tmp_path / name for name in names}
    one.cert_chain_pems[0].write_to_path(files["cert"])
    one.private_key_pem.write_to_path(files["key"])
    other.private_key_pem.write_to_path(files["foreign"])
    key = load_pem_private_key(one.private_key_pem.bytes(), None)
    locked = key.private_bytes(
        Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(b"open sesame")
    )
    files["locked"].write_bytes(locked)
    files["other"].write_text("something else")
    url = f"rediss://127.0.0.1:1?{options.format(**files)}"
    assert main(["tenants", "purge", "acme", "--redis-url", url, "--yes"]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert error.format(**files) in err


@pytest.mark.parametrize("tenant", ["", "acme ", "*", "\udcff"])
def test_purge_refuses_what_cannot_be_a_tenant(
    store_url: str, capsys: pytest.CaptureFixture[str], tenant: str
) -> None:
    """A name that no tenant can have is one line and exit code 2, not a purge of nothing."""
    assert main(["tenants", "purge", tenant, "--redis-url", store_url, "--yes"]) == 2
    failed = capsys.readouterr()
    assert "tenant: expected 1 to 63" in failed.err
    assert failed.out == ""
