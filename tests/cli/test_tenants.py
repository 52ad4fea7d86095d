"""`timernn tenants purge`: erases through the store's URL, and only with the option that confirms it."""

from __future__ import annotations

import json
import uuid

import pytest
from redis import Redis

from service.cli import main
from service.store import keys


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


def test_purge_says_which_url_is_no_url(capsys: pytest.CaptureFixture[str]) -> None:
    """A wrong URL is one line that names the option."""
    assert main(["tenants", "purge", "acme", "--redis-url", "http://x", "--yes"]) == 2
    assert "--redis-url: " in capsys.readouterr().err


@pytest.mark.parametrize("tenant", ["", "acme ", "*", "\udcff"])
def test_purge_refuses_what_cannot_be_a_tenant(
    store_url: str, capsys: pytest.CaptureFixture[str], tenant: str
) -> None:
    """A name that no tenant can have is one line and exit code 2, not a purge of nothing."""
    assert main(["tenants", "purge", tenant, "--redis-url", store_url, "--yes"]) == 2
    failed = capsys.readouterr()
    assert "tenant: expected 1 to 63" in failed.err
    assert failed.out == ""
