"""Every method and every kind of credential: who is let in, and how the others are refused."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import grpc
import grpc.aio
import pytest
from google.protobuf.message_factory import GetMessageClass

from service.logs import FIELDS
from service.rpc import permissions
from service.rpc.auth import Principal
from service.rpc.errors import PermissionDenied, Unauthenticated
from service.rpc.logins import LoginThrottle, TokenLogin
from service.rpc.permissions import PUBLIC, ROLES, check_complete
from service.rpc.server import SERVICES, rpc_types
from service.security.roles import GRANTED, Role
from service.security.tokens import TokenSet, create_token, read_tokens

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from pathlib import Path

    Serve = Callable[..., Awaitable[Any]]

METHODS = sorted(rpc_types())
SERVED: dict[str, Any] = {
    f"/{service.full_name}/{method.name}": method
    for service in SERVICES
    for method in service.methods
}


class Credentials:
    """A token of each role, and those that are not valid."""

    def __init__(self, folder: Path) -> None:
        """Make them."""
        file = folder / "tokens.toml"
        past = datetime.now(UTC) - timedelta(seconds=1)
        self.of = {
            role: create_token(file, role, "acme", name=role.value, expires=None)[0]
            for role in Role
        }
        gone, _ = create_token(file, Role.ADMIN, "acme", name="expired", expires=past)
        self.bad = {
            "expired": gone,
            "unknown": "timernn_0123456789ab_" + "x" * 43,
            "wrong": self.of[Role.ADMIN][:-43] + "y" * 43,
            "nonsense": "x" * 4000,
        }
        self.tokens = read_tokens(file)
        self.logins: list[str] = []

    def authenticator(self) -> TokenLogin:
        """Return what knows them."""
        return TokenLogin(lambda: self.tokens, self.logins.append)


@pytest.fixture
def credentials(tmp_path: Path) -> Credentials:
    """Return a token of each role."""
    return Credentials(tmp_path)


async def outcome(channel: grpc.aio.Channel, path: str, token: str | None) -> tuple[str, str]:
    """Call a method with empty messages; return its status and the text."""
    method = SERVED[path]
    metadata = [] if token is None else [("authorization", f"Bearer {token}")]
    request = GetMessageClass(method.input_type)()
    options = {
        "request_serializer": lambda message: message.SerializeToString(),
        "response_deserializer": GetMessageClass(method.output_type).FromString,
    }
    shape = {
        (False, False): "unary_unary",
        (True, False): "stream_unary",
        (False, True): "unary_stream",
        (True, True): "stream_stream",
    }[method.client_streaming, method.server_streaming]
    argument: Any = iter([request]) if method.client_streaming else request
    call = getattr(channel, shape)(path, **options)(argument, metadata=metadata, timeout=20)
    try:
        if method.server_streaming:
            await call.read()
            call.cancel()
        else:
            await call
    except grpc.aio.AioRpcError as error:
        return error.code().name, error.details() or ""
    return "OK", ""


@pytest.mark.parametrize("path", METHODS)
async def test_who_may_call_a_method(path: str, serve: Serve, credentials: Credentials) -> None:
    """Each role by the table; nobody without a token, but for health; all bad ones get one answer."""
    served = await serve(authenticator=credentials.authenticator())
    for role, token in credentials.of.items():
        code, text = await outcome(served.channel, path, token)
        is_allowed = path in PUBLIC or bool(ROLES[path] & GRANTED[role])
        if is_allowed:
            assert code not in {"UNAUTHENTICATED", "PERMISSION_DENIED"}, (role, text)
        else:
            name = path.rpartition("/")[2]
            assert (code, text) == ("PERMISSION_DENIED", f"role {role.value!r} may not call {name}")
    nobody = (await outcome(served.channel, path, None))[0]
    assert nobody == "OK" if path in PUBLIC else nobody == "UNAUTHENTICATED"


async def test_bad_credentials_get_the_same_bytes(serve: Serve, credentials: Credentials) -> None:
    """Unknown, wrong, expired and absurd: nobody learns which tokens there are."""
    served = await serve(authenticator=credentials.authenticator())
    path = "/timernn.v1.ModelService/GetServerInfo"
    answers = {await outcome(served.channel, path, token) for token in credentials.bad.values()}
    assert answers == {("UNAUTHENTICATED", "the credential is not valid, or not valid any more")}
    assert sorted(credentials.logins) == ["expired", "refused", "refused", "refused"]


async def test_a_revoked_token_is_refused_at_the_next_call(
    serve: Serve, credentials: Credentials
) -> None:
    """As soon as the set is another one; connections stay."""
    served = await serve(authenticator=credentials.authenticator())
    path = "/timernn.v1.ModelService/GetServerInfo"
    token = credentials.of[Role.INFER]
    assert (await outcome(served.channel, path, token))[0] == "OK"
    credentials.tokens = TokenSet()
    assert (await outcome(served.channel, path, token))[0] == "UNAUTHENTICATED"


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"role": Role.INFER}, PermissionDenied),
        ({"tenant": "other"}, Unauthenticated),
        ({"expires": datetime(2020, 1, 1, tzinfo=UTC)}, Unauthenticated),
    ],
)
def test_an_entry_that_is_changed_counts_for_open_streams(
    credentials: Credentials, changes: dict[str, Any], error: type[Exception]
) -> None:
    """Less of a role, another tenant, an earlier end: from the next operation on, without a new login."""
    login, update = credentials.authenticator(), "/timernn.v1.TimeRnnService/Update"
    entry = credentials.tokens.find(credentials.of[Role.TRAIN])
    assert entry is not None
    principal = Principal("acme", GRANTED[Role.TRAIN], "train", entry.id)
    login.authorise(principal, update)
    credentials.tokens = TokenSet({entry.id: replace(entry, **changes)})
    with pytest.raises(error):
        login.authorise(principal, update)


async def test_an_operator_names_a_tenant_by_its_name(
    serve: Serve, credentials: Credentials
) -> None:
    """What can be no tenant's name is a field at fault, not an empty list."""
    served = await serve(authenticator=credentials.authenticator())
    metadata = choosing(credentials.of[Role.OPERATOR], "x" * 500)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await served.channel.unary_unary("/timernn.v1.ModelService/ListModels")(
            b"", metadata=metadata
        )
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert str(caught.value.details()).startswith("timernn-tenant: expected a tenant's name, got")


def test_a_method_without_an_entry_does_not_start() -> None:
    """Whoever adds one has to say who may call it."""
    check_complete(METHODS)
    with pytest.raises(RuntimeError, match=r"says nothing of /timernn\.v1\.ModelService/Steal"):
        check_complete([*METHODS, "/timernn.v1.ModelService/Steal"])


def test_the_table_has_no_method_that_is_not_served() -> None:
    """An entry that is left over would look as if it protected something."""
    assert set(ROLES) | PUBLIC == set(METHODS)
    assert {name for name in METHODS if ".health." in name} == permissions.PUBLIC


def test_an_operator_changes_nothing() -> None:
    """What the role may call reads lists and what models are, never states or weights."""
    allowed = {name.rpartition("/")[2] for name, roles in ROLES.items() if Role.OPERATOR in roles}
    assert allowed == {
        "FindVersions",
        "GetModel",
        "GetServerInfo",
        "ListCheckpoints",
        "ListModels",
        "ListSessions",
        "ListWaiting",
        "ServerReflectionInfo",
    }


def choosing(token: str, tenant: str) -> list[tuple[str, str]]:
    """Return the metadata of a caller that names a tenant."""
    return [("authorization", f"Bearer {token}"), ("timernn-tenant", tenant)]


async def test_the_tenant_is_the_credential_s(serve: Serve, credentials: Credentials) -> None:
    """Only an operator names another one."""
    served = await serve(authenticator=credentials.authenticator())
    served.domain.answers["list_page"] = ([], "")
    list_models = served.channel.unary_unary("/timernn.v1.ModelService/ListModels")
    for role, tenant in ((Role.ADMIN, "acme"), (Role.OPERATOR, "acme"), (Role.OPERATOR, "other")):
        served.domain.asked.clear()
        await list_models(b"", metadata=choosing(credentials.of[role], tenant))
        assert served.domain.asked[0][0] == tenant


@pytest.mark.parametrize("role", [Role.INFER, Role.TRAIN, Role.ADMIN])
@pytest.mark.parametrize("tenant", ["other", "x" * 500, "../x"])
async def test_nobody_else_chooses_a_tenant(
    serve: Serve,
    credentials: Credentials,
    caplog: pytest.LogCaptureFixture,
    role: Role,
    tenant: str,
) -> None:
    """It is refused, whatever tenants there are: its own tenant's answer would pass for the other one's."""
    served = await serve(authenticator=credentials.authenticator())
    served.domain.answers["list_page"] = ([], "")
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await served.channel.unary_unary("/timernn.v1.ModelService/ListModels")(
            b"", metadata=choosing(credentials.of[role], tenant)
        )
    assert caught.value.code() is grpc.StatusCode.PERMISSION_DENIED
    assert caught.value.details() == f"role {role.value!r} may not choose a tenant"
    (line,) = [getattr(each, FIELDS) for each in caplog.records if each.name == "service.audit"]
    assert (line["outcome"], line["token"]) == ("refused", role.value)
    assert served.domain.asked == []


class Clock:
    """A clock that a test sets."""

    def __init__(self) -> None:
        """Start at zero."""
        self.now = 0.0

    def __call__(self) -> float:
        """Return the time."""
        return self.now


def test_failed_logins_wait_longer_each_time() -> None:
    """Five are free; then 0.1 s, doubled up to 2 s; a minute's pause forgets them."""
    clock = Clock()
    throttle = LoginThrottle(clock)
    waits = [throttle.note("ipv4:10.0.0.1:5000") for _ in range(12)]
    assert waits == [0, 0, 0, 0, 0, 0.1, 0.2, 0.4, 0.8, 1.6, 2.0, 2.0]
    assert throttle.note("ipv4:10.0.0.2:5000") == 0
    clock.now += 61
    assert throttle.note("ipv4:10.0.0.1:5001") == 0


def test_a_flood_of_addresses_is_bounded_in_memory() -> None:
    """The oldest are forgotten first."""
    throttle = LoginThrottle(Clock())
    for number in range(20_000):
        throttle.note(f"ipv4:10.{number >> 8}.{number & 255}.1:1")
    assert len(throttle._failures) == 10_000
