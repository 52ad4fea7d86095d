"""What each tenant may have: the file of --tenants, read again when it changes.

It is TOML: a table `[default]` for everybody and a table `[tenant.NAME]` each for those who differ, whose keys are the
fields of `TenantLimits` and `TenantRates`. What neither says is as in the server's own limits, or unbounded.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, Final

from service.domain.limits_policy import TenantLimits
from service.files import TomlError, parse_toml, read_file
from service.security.files import SecretFileError
from service.security.reload import Reloaded

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from service.settings import Limits

_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,62}")
MAX_QUOTA: Final = 2**53 - 1


@dataclass(frozen=True, slots=True)
class TenantRates:
    """How much work of one tenant a replica takes; None: as much as of everybody together.

    Attributes:
        operations_in_flight: Operations in work at once.
        request_bytes_in_flight: Bytes of their requests and answers.
        operations_per_second: Operations that begin in a second.
        bytes_per_second: Bytes of requests, uploads and downloads in a second.
    """

    operations_in_flight: int | None = None
    request_bytes_in_flight: int | None = None
    operations_per_second: int | None = None
    bytes_per_second: int | None = None


@dataclass(frozen=True, slots=True)
class TenantTerms:
    """Everything that may differ from tenant to tenant."""

    limits: TenantLimits
    rates: TenantRates

    def changed(self, given: Mapping[str, int]) -> TenantTerms:
        """Return these terms with other numbers by name."""
        limits = {name: given[name] for name in _names(TenantLimits) if name in given}
        rates = {name: given[name] for name in _names(TenantRates) if name in given}
        return TenantTerms(replace(self.limits, **limits), replace(self.rates, **rates))


class TenantTable:
    """The terms of every tenant at one moment."""

    def __init__(self, default: TenantTerms, tenants: Mapping[str, TenantTerms]) -> None:
        self._default = default
        self._tenants = tenants

    def terms_of(self, tenant: str) -> TenantTerms:
        """Return the terms of a tenant; those of the default if the file does not name it."""
        return self._tenants.get(tenant, self._default)


class Tenants:
    """The file of tenants, as a `LimitsPolicy` and as what admission asks.

    Attributes:
        file: The table, which is read again when the file changes.
    """

    def __init__(self, path: Path, limits: Limits) -> None:
        """Read the file.

        Raises:
            SecretFileError: If it cannot be used.
        """
        self.file = Reloaded("tenants", [path], lambda: read_tenants(path, limits))

    def of(self, tenant: str) -> TenantLimits:
        """Return what a tenant may leave in the store."""
        return self.file.value.terms_of(tenant).limits

    def rates_of(self, tenant: str) -> TenantRates:
        """Return how much work of a tenant this replica takes."""
        return self.file.value.terms_of(tenant).rates


def read_tenants(path: Path, limits: Limits) -> TenantTable:
    """Read a file of tenants.

    Args:
        path: Where it is.
        limits: What holds where the file says nothing.

    Raises:
        SecretFileError: If it cannot be read, or an entry is not valid.
    """
    source = f"--tenants {path}"
    try:
        document = parse_toml(read_file(path))
    except OSError as error:
        raise SecretFileError(f"{source}: {error.strerror}") from error
    except TomlError as error:
        raise SecretFileError(f"{source}: {error}") from error
    _check_known(document, ("default", "tenant"), source)
    usual = TenantTerms(TenantLimits.from_limits(limits), TenantRates())
    default = usual.changed(_numbers(document.get("default", {}), f"{source}: [default]"))
    tenants = {}
    for name, table in _table(document.get("tenant", {}), f"{source}: [tenant]").items():
        where = f"{source}: [tenant.{name}]"
        if not _NAME.fullmatch(name):
            raise SecretFileError(f"{where}: a name must match ^{_NAME.pattern}$")
        tenants[name] = default.changed(_numbers(table, where))
    return TenantTable(default, tenants)


def _numbers(table: object, where: str) -> dict[str, int]:
    found = _table(table, where)
    _check_known(found, (*_names(TenantLimits), *_names(TenantRates)), where)
    for name, value in found.items():
        # A bool is an int to Python.
        if type(value) is not int or not 1 <= value <= MAX_QUOTA:
            raise SecretFileError(f"{where}: {name}: expected 1 to 2^53-1, got {value!r}")
    return found


def _table(value: object, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise SecretFileError(f"{where}: expected a table, got {value!r}")
    return value


def _check_known(table: Mapping[str, object], known: tuple[str, ...], where: str) -> None:
    unknown = sorted(set(table) - set(known))
    if unknown:
        raise SecretFileError(f"{where}: {unknown[0]!r} is none of {', '.join(known)}")


def _names(kind: type[TenantLimits | TenantRates]) -> tuple[str, ...]:
    return tuple(field.name for field in fields(kind))
