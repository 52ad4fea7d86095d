"""The file of --tenants: what it says, what it may not say, and that a change counts."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from service.domain.limits_policy import TenantLimits
from service.security.files import SecretFileError
from service.settings import Limits
from service.tenants import TenantRates, Tenants

if TYPE_CHECKING:
    from pathlib import Path

USUAL = TenantLimits.from_limits(Limits())


def tenants_of(path: Path, text: str) -> Tenants:
    """Write a file and read it."""
    path.write_text(text)
    return Tenants(path, Limits())


def test_a_tenant_has_what_its_table_says_then_the_default_then_the_server(tmp_path: Path) -> None:
    """Each number is looked for in this order by itself."""
    tenants = tenants_of(
        tmp_path / "tenants.toml",
        """
        [default]
        sessions_per_tenant = 10
        operations_per_second = 100

        [tenant.acme]
        sessions_per_tenant = 20
        bytes_per_second = 1000
        """,
    )
    acme, other = tenants.of("acme"), tenants.of("other")
    assert (acme.sessions_per_tenant, other.sessions_per_tenant) == (20, 10)
    assert acme.models_per_tenant == other.models_per_tenant == USUAL.models_per_tenant
    assert tenants.rates_of("acme") == TenantRates(None, None, 100, 1000)
    assert tenants.rates_of("other") == TenantRates(None, None, 100, None)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[tenants.acme]", "'tenants' is none of default, tenant"),
        ("[tenant.acme]\nsessions = 1", "[tenant.acme]: 'sessions' is none of sessions_per_tenant"),
        ("[default]\nsessions_per_tenant = 0", "expected 1 to 2^53-1, got 0"),
        ("[default]\nsessions_per_tenant = true", "expected 1 to 2^53-1, got True"),
        ("[default]\nsessions_per_tenant = 1.5", "expected 1 to 2^53-1, got 1.5"),
        ("default = 1", "[default]: expected a table, got 1"),
        ("[tenant]\nacme = 1", "[tenant.acme]: expected a table, got 1"),
        ('[tenant."a/b"]', "a name must match"),
        ("[tenant", "not valid TOML"),
        ("a = " + "[" * 5000, "not valid TOML"),
    ],
)
def test_a_file_that_says_something_else_is_refused(tmp_path: Path, text: str, says: str) -> None:
    """The refusal names the file, the table and the field, what was expected and what came."""
    path = tmp_path / "tenants.toml"
    with pytest.raises(SecretFileError) as caught:
        tenants_of(path, text)
    assert str(caught.value).startswith(f"--tenants {path}: ")
    assert says in str(caught.value)


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    """A server does not start without the limits that it was to keep."""
    with pytest.raises(SecretFileError, match="No such file"):
        Tenants(tmp_path / "none.toml", Limits())


def test_a_change_counts_and_a_broken_one_does_not(tmp_path: Path) -> None:
    """The last good table stays in use while the file cannot be read."""
    path = tmp_path / "tenants.toml"
    tenants = tenants_of(path, "[default]\nsessions_per_tenant = 1")
    path.write_text("[default]\nsessions_per_tenant = 22")
    assert tenants.file.check()
    assert tenants.of("anyone").sessions_per_tenant == 22
    path.write_text("[default]\nsessions_per_tenant = 'many'")
    assert not tenants.file.check()
    assert tenants.of("anyone").sessions_per_tenant == 22
