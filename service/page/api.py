"""The JSON behind the page and `timernn top`; docs/operations.md describes it.

Everything in it is read by the bounds of the operations that RPCs have: a page of a listing, the length of a
tenant's list, the beats of the replicas. A caller sees one tenant. Figures of the whole server are for those who
may read /metrics.
"""

from __future__ import annotations

import json
import math
import time
from typing import TYPE_CHECKING, Any, Final

from aiohttp import web

from service.domain.errors import (
    InvalidArgument,
    NotFound,
    ResourceExhausted,
    Unavailable,
    bad_field,
)
from service.metrics.figures import joined
from service.metrics.http import (
    FORWARDED_FOR,
    FORWARDED_NAMES,
    FORWARDED_PROTO,
    bearer,
    certificate_names_of,
    peer_of,
)
from service.page import logins
from service.page.logins import Login
from service.rpc.auth import DEFAULT_TENANT, Principal
from service.rpc.errors import PermissionDenied, Unauthenticated, refusal_of
from service.rpc.logins import ALTERNATIVE_NAMES, LoginThrottle
from service.rpc.permissions import FIGURES_ROLES
from service.security.roles import TENANT_KEY, Role

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence

    from service.domain.errors import DomainError
    from service.domain.ports import ReplicaBeat, ReplicaStore, SessionStore
    from service.domain.types import ModelView, SessionView
    from service.domain.use_cases import UseCases
    from service.rpc.logins import TokenLogin

    Answer = Callable[[web.Request, Principal], Awaitable[dict[str, Any]]]

PAGE_SIZE: Final = 50
MOST_TENANTS: Final = 1000

_LIST_MODELS: Final = "/timernn.v1.ModelService/ListModels"
_LIST_SESSIONS: Final = "/timernn.v1.SessionService/ListSessions"
_STATUS: Final[dict[type[DomainError], int]] = {
    InvalidArgument: 400,
    Unauthenticated: 401,
    PermissionDenied: 403,
    NotFound: 404,
    ResourceExhausted: 429,
    Unavailable: 503,
}
_REPLICA_FIELDS: Final = ("version", "host", "worker", "start_time_ms")


class PageApi:
    """Answers /api."""

    def __init__(
        self,
        use_cases: UseCases,
        sessions: SessionStore,
        replicas: ReplicaStore,
        *,
        secret: Callable[[], bytes],
        login: TokenLogin | None,
        tenants: Callable[[], Iterable[str]],
        is_relayed: bool = False,
    ) -> None:
        """Keep what to ask.

        Args:
            use_cases: Models and sessions.
            sessions: Counts a tenant's.
            replicas: Who runs.
            secret: Returns what signs logins now.
            login: Knows tokens; None: everybody is the default tenant.
            tenants: Returns those that an operator may choose from.
            is_relayed: Whether the supervisor relays requests, and says from whom they are.
        """
        self._use_cases, self._sessions, self._replicas = use_cases, sessions, replicas
        self._secret, self._login, self._tenants = secret, login, tenants
        self._is_relayed = is_relayed
        self._throttle = LoginThrottle()

    def routes(self) -> list[web.RouteDef]:
        """Return what serves /api."""
        return [
            web.post("/api/login", self._answered(self._log_in)),
            web.post("/api/logout", self._answered(self._log_out)),
            web.get("/api/now", self._answered(self._checked(self._now, _LIST_SESSIONS))),
            web.get("/api/models", self._answered(self._checked(self._models, _LIST_MODELS))),
            web.get("/api/sessions", self._answered(self._checked(self._listed, _LIST_SESSIONS))),
        ]

    # --- who asks ---------------------------------------------------------------------------------

    async def _log_in(self, request: web.Request) -> web.Response:
        principal = Principal(DEFAULT_TENANT)
        token = await _token_of(request)
        if self._login is not None:
            principal = self._login.authenticate(_Caller(request, self._peer(request), token=token))
        response = web.json_response(self._about(principal))
        if self._login is not None:
            token_id = principal.credential_id
            login = Login(token_id, await self._replicas.count_ended_logins(token_id))
            response.set_cookie(
                logins.COOKIE,
                logins.signed(login, time.time(), self._secret()),
                httponly=True,
                samesite="Strict",
                secure=self._scheme(request) == "https",
                path="/api",
            )
        return response

    async def _log_out(self, request: web.Request) -> web.Response:
        if (login := self._login_of(request)) is not None:
            await self._replicas.end_logins(*login, ttl_ms=1000 * logins.LOGIN_S)
        response = web.json_response({})
        response.del_cookie(logins.COOKIE, path="/api", httponly=True, samesite="Strict")
        return response

    def _login_of(self, request: web.Request) -> Login | None:
        cookie = request.cookies.get(logins.COOKIE, "")
        return logins.verified(cookie, time.time(), self._secret())

    async def _principal(self, request: web.Request) -> Principal:
        """Return who asks: by the token in its header, as programs send it, by its login, or by its certificate."""
        if self._login is None:
            return Principal(DEFAULT_TENANT)
        token, names = bearer(request.headers.get("Authorization")), self._names(request)
        caller = _Caller(request, self._peer(request), token=token, names=names)
        login = None if token else self._login_of(request)
        if login is None:
            if not (token or names):
                raise Unauthenticated("NO_CREDENTIALS", "a token is needed")
            return self._login.authenticate(caller)
        principal = self._login.resume(login.token_id, caller)
        if await self._replicas.count_ended_logins(login.token_id) > login.ended_before:
            raise Unauthenticated("BAD_CREDENTIALS", "the login was ended")
        return principal

    def _checked(
        self, answer: Answer, method: str
    ) -> Callable[[web.Request], Awaitable[web.Response]]:
        """Let those ask who may call an RPC that answers the same."""

        async def checked(request: web.Request) -> web.Response:
            principal = await self._principal(request)
            if self._login is not None:
                self._login.authorise(principal, method)
            return web.json_response(await answer(request, principal))

        return checked

    def _answered(
        self, handler: Callable[[web.Request], Awaitable[web.Response]]
    ) -> Callable[[web.Request], Awaitable[web.Response]]:
        """Turn refusals into JSON, and hold back those who try tokens."""

        async def answered(request: web.Request) -> web.Response:
            try:
                return await handler(request)
            except (web.HTTPException, web.RequestPayloadError):
                raise
            except Exception as error:  # noqa: BLE001 - each becomes a status, as in the gate
                refusal = refusal_of(error, request.path)
                if refusal.reason == "BAD_CREDENTIALS":
                    await self._throttle.hold(self._peer(request))
                return _refused(refusal)

        return answered

    def _peer(self, request: web.Request) -> str:
        if self._is_relayed and FORWARDED_FOR in request.headers:
            return request.headers[FORWARDED_FOR]
        return peer_of(request)

    def _names(self, request: web.Request) -> list[str]:
        if self._is_relayed and FORWARDED_NAMES in request.headers:
            found: list[str] = json.loads(request.headers[FORWARDED_NAMES])
            return found
        return certificate_names_of(request)

    def _scheme(self, request: web.Request) -> str:
        if self._is_relayed:
            return request.headers.get(FORWARDED_PROTO, "http")
        return request.scheme

    # --- what is answered -------------------------------------------------------------------------

    def _about(self, principal: Principal) -> dict[str, Any]:
        sees_all = self._login is not None and Role.OPERATOR in principal.roles
        tenants = sorted({*self._tenants(), principal.tenant}) if sees_all else [principal.tenant]
        return {
            "tenant": principal.tenant,
            "tenants": tenants[:MOST_TENANTS],
            "login": principal.name,
            "needs_login": self._login is not None,
        }

    async def _now(self, _request: web.Request, principal: Principal) -> dict[str, Any]:
        answer: dict[str, Any] = {
            "time_ms": int(time.time() * 1000),
            **self._about(principal),
            "sessions": await self._sessions.count_sessions(principal.tenant),
            "figures": None,
            "replicas": None,
        }
        if principal.roles & FIGURES_ROLES:
            beats = await self._replicas.list_replicas()
            answer["figures"] = joined([beat.figures for beat in beats if beat.figures])
            answer["replicas"] = [_replica(beat) for beat in beats]
        return answer

    async def _models(self, request: web.Request, principal: Principal) -> dict[str, Any]:
        views, next_token = await self._use_cases.models.list_page(
            principal.tenant, PAGE_SIZE, request.query.get("page_token", "")
        )
        steps = _steps_of(principal.tenant, await self._replicas.list_replicas())
        return {
            "tenant": principal.tenant,
            "models": [_model(view, steps.get(view.spec.model_id)) for view in views],
            "next_page_token": next_token,
        }

    async def _listed(self, request: web.Request, principal: Principal) -> dict[str, Any]:
        views, next_token = await self._use_cases.sessions.list_page(
            principal.tenant,
            PAGE_SIZE,
            request.query.get("page_token", ""),
            model_id=request.query.get("model", ""),
        )
        now_ms = int(time.time() * 1000)
        return {
            "tenant": principal.tenant,
            "sessions": [_session(view, now_ms) for view in views],
            "next_page_token": next_token,
        }


class _Caller:
    """A request as `TokenLogin` knows callers; an operator's choice of a tenant is in the query."""

    def __init__(
        self, request: web.Request, peer: str, *, token: str | None, names: Iterable[str] = ()
    ) -> None:
        self.token = token
        self._tenant = request.query.get("tenant", "")
        self._peer = peer
        self._names = names

    def invocation_metadata(self) -> Sequence[tuple[str, str]]:
        tenant = ((TENANT_KEY, self._tenant),) if self._tenant else ()
        bearer = (("authorization", f"Bearer {self.token}"),) if self.token else ()
        return (*bearer, *tenant)

    def peer(self) -> str:
        return self._peer

    def auth_context(self) -> Mapping[str, Any]:
        return {ALTERNATIVE_NAMES: [name.encode() for name in self._names]}


async def _token_of(request: web.Request) -> str:
    """Return the token in the body of a login; the type keeps out what forms of other pages can send."""
    if request.content_type != "application/json":
        raise bad_field("Content-Type", "expected application/json")
    try:
        body = await request.json()
    except (ValueError, RecursionError):
        body = None
    token = body.get("token") if isinstance(body, dict) else None
    if not isinstance(token, str) or not token.strip():
        raise bad_field("token", 'expected an object such as {"token": "TOKEN"}')
    return token.strip()


def _refused(refusal: DomainError) -> web.Response:
    status = next((code for kind, code in _STATUS.items() if isinstance(refusal, kind)), 500)
    body = {"error": {"reason": refusal.reason, "message": refusal.message}}
    return web.json_response(body, status=status)


def _replica(beat: ReplicaBeat) -> dict[str, Any]:
    figures = beat.figures or {}
    found: dict[str, Any] = {
        "replica_id": beat.replica_id,
        "age_ms": beat.age_ms,
        "is_known": beat.figures is not None,
        **{name: figures.get(name) for name in _REPLICA_FIELDS},
        "is_serving": None,
        "chunks_per_s": None,
        "operations_in_flight": None,
        "memory_bytes": None,
        "cpu_cores": None,
    }
    if beat.figures is not None:
        own = joined([beat.figures])
        found["is_serving"] = bool(figures["store_usable"])
        found |= {
            name: own[name]
            for name in ("chunks_per_s", "operations_in_flight", "memory_bytes", "cpu_cores")
        }
    return found


def _steps_of(tenant: str, beats: Iterable[ReplicaBeat]) -> dict[str, tuple[float, float, int]]:
    """Return by model of a tenant its steps a second, and norm and time of the last step anywhere."""
    found: dict[str, tuple[float, float, int]] = {}
    for figures in (beat.figures for beat in beats if beat.figures):
        for owner, model_id, count, norm, time_ms in figures["models"]:
            if owner == tenant:
                rate, last_norm, last_ms = found.get(model_id, (0.0, 0.0, 0))
                rate += count / max(figures["window_s"], 0.001)
                last = (norm, time_ms) if time_ms > last_ms else (last_norm, last_ms)
                found[model_id] = rate, *last
    return found


def _model(view: ModelView, stepped: tuple[float, float, int] | None) -> dict[str, Any]:
    rate, norm, time_ms = stepped or (0.0, None, None)
    network = view.spec.network
    return {
        "model_id": view.spec.model_id,
        "version": view.head.number,
        "input_size": network.input.size,
        "state_size": network.state_spec.size,
        "dtype": view.spec.dtype,
        "create_time_ms": view.create_time_ms,
        "waiting_contributions": view.waiting_count,
        "steps_per_s": round(rate, 3),
        "gradient_norm": norm if norm is not None and math.isfinite(norm) else None,
        "last_step_ms": time_ms,
    }


def _session(view: SessionView, now_ms: int) -> dict[str, Any]:
    return {
        "session_id": view.session_id,
        "model_id": view.model_id,
        "chunks": view.chunk_seq,
        "epoch": view.epoch,
        "batch_size": view.batch_size,
        "version": view.version.number if view.version else None,
        # An epoch is numbered by the store's clock in ms, and each chunk lets the time to live begin again.
        "age_ms": max(0, now_ms - view.epoch),
        "idle_ms": max(0, now_ms - (view.expire_time_ms - view.ttl_ms)),
        "expires_in_ms": max(0, view.expire_time_ms - now_ms),
    }
