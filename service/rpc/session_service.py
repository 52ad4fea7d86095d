"""timernn.v1.SessionService."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from service.domain.types import SessionKey
from service.rpc.fields import check_id, check_number, check_optional_id, check_page
from service.rpc.session_messages import (
    fork_session_from_proto,
    new_epoch_from_proto,
    open_session_from_proto,
    open_session_to_proto,
    session_to_proto,
)
from service.rpc.tensors import tensor_to_proto
from timernn.v1 import session_service_pb2 as pb

if TYPE_CHECKING:
    from service.domain.sessions import Sessions
    from service.settings import Limits


@dataclass(frozen=True, slots=True)
class SessionService:
    """Decodes, checks, calls `Sessions`, encodes."""

    sessions: Sessions
    limits: Limits

    async def open_session(
        self, tenant: str, request: pb.OpenSessionRequest
    ) -> pb.OpenSessionResponse:
        """Open, resume or reset a session."""
        wanted = open_session_from_proto(request, self.limits)
        return open_session_to_proto(await self.sessions.open(tenant, wanted))

    async def get_session(
        self, tenant: str, request: pb.GetSessionRequest
    ) -> pb.GetSessionResponse:
        """Return one session."""
        session_id = check_id("session_id", request.session_id)
        view = await self.sessions.get(SessionKey(tenant, session_id))
        return pb.GetSessionResponse(session=session_to_proto(view))

    async def list_sessions(
        self, tenant: str, request: pb.ListSessionsRequest
    ) -> pb.ListSessionsResponse:
        """Return a page of live sessions."""
        model_id = check_optional_id("model_id", request.model_id)
        page = check_page(request.page_size, request.page_token)
        views, next_token = await self.sessions.list_page(tenant, model_id, *page)
        return pb.ListSessionsResponse(
            sessions=map(session_to_proto, views), next_page_token=next_token
        )

    async def get_state(self, tenant: str, request: pb.GetStateRequest) -> pb.GetStateResponse:
        """Return a session's hidden state."""
        session_id = check_id("session_id", request.session_id)
        opened = await self.sessions.get_state(
            SessionKey(tenant, session_id), extend_ttl=request.extend_ttl
        )
        return pb.GetStateResponse(
            session=session_to_proto(opened.session), state=tensor_to_proto(opened.state)
        )

    async def set_state(self, tenant: str, request: pb.SetStateRequest) -> pb.SetStateResponse:
        """Replace a session's hidden state."""
        wanted = new_epoch_from_proto(request, self.limits)
        view, replayed = await self.sessions.begin_epoch(tenant, wanted)
        return pb.SetStateResponse(session=session_to_proto(view), replayed=replayed)

    async def reset_state(
        self, tenant: str, request: pb.ResetStateRequest
    ) -> pb.ResetStateResponse:
        """Set a session's hidden state to zero."""
        wanted = new_epoch_from_proto(request, self.limits)
        view, replayed = await self.sessions.begin_epoch(tenant, wanted)
        return pb.ResetStateResponse(session=session_to_proto(view), replayed=replayed)

    async def fork_session(
        self, tenant: str, request: pb.ForkSessionRequest
    ) -> pb.ForkSessionResponse:
        """Open another session from this one's state."""
        wanted = fork_session_from_proto(request, self.limits)
        opened = await self.sessions.fork(tenant, wanted)
        return pb.ForkSessionResponse(
            session=session_to_proto(opened.session),
            state=tensor_to_proto(opened.state),
            replayed=opened.replayed,
        )

    async def close_session(
        self, tenant: str, request: pb.CloseSessionRequest
    ) -> pb.CloseSessionResponse:
        """End a session."""
        session_id = check_id("session_id", request.session_id)
        expected_epoch = check_number("expected_epoch", request.expected_epoch, 0)
        closed = await self.sessions.close(SessionKey(tenant, session_id), expected_epoch)
        return pb.CloseSessionResponse(closed=closed)
