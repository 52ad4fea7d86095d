"""timernn.v1.SessionService."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from service.domain.types import SessionKey
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
    from service.domain.rules import InputRules
    from service.domain.sessions import Sessions


@dataclass(frozen=True, slots=True)
class SessionService:
    """Decodes, checks, calls `Sessions`, encodes."""

    sessions: Sessions
    rules: InputRules

    async def open_session(
        self, tenant: str, request: pb.OpenSessionRequest
    ) -> pb.OpenSessionResponse:
        """Open, resume or reset a session."""
        wanted = open_session_from_proto(request, self.rules)
        return open_session_to_proto(await self.sessions.open(tenant, wanted))

    async def get_session(
        self, tenant: str, request: pb.GetSessionRequest
    ) -> pb.GetSessionResponse:
        """Return one session."""
        view = await self.sessions.get(SessionKey(tenant, request.session_id))
        return pb.GetSessionResponse(session=session_to_proto(view))

    async def list_sessions(
        self, tenant: str, request: pb.ListSessionsRequest
    ) -> pb.ListSessionsResponse:
        """Return a page of live sessions."""
        views, next_token = await self.sessions.list_page(
            tenant, request.page_size, request.page_token, model_id=request.model_id
        )
        return pb.ListSessionsResponse(
            sessions=map(session_to_proto, views), next_page_token=next_token
        )

    async def get_state(self, tenant: str, request: pb.GetStateRequest) -> pb.GetStateResponse:
        """Return a session's hidden state."""
        opened = await self.sessions.get_state(
            SessionKey(tenant, request.session_id), extend_ttl=request.extend_ttl
        )
        return pb.GetStateResponse(
            session=session_to_proto(opened.session), state=tensor_to_proto(opened.state)
        )

    async def set_state(self, tenant: str, request: pb.SetStateRequest) -> pb.SetStateResponse:
        """Replace a session's hidden state."""
        wanted = new_epoch_from_proto(request, self.rules)
        view, replayed = await self.sessions.begin_epoch(tenant, wanted)
        return pb.SetStateResponse(session=session_to_proto(view), replayed=replayed)

    async def reset_state(
        self, tenant: str, request: pb.ResetStateRequest
    ) -> pb.ResetStateResponse:
        """Set a session's hidden state to zero."""
        wanted = new_epoch_from_proto(request, self.rules)
        view, replayed = await self.sessions.begin_epoch(tenant, wanted)
        return pb.ResetStateResponse(session=session_to_proto(view), replayed=replayed)

    async def fork_session(
        self, tenant: str, request: pb.ForkSessionRequest
    ) -> pb.ForkSessionResponse:
        """Open another session from this one's state."""
        wanted = fork_session_from_proto(request, self.rules)
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
        expected_epoch = request.expected_epoch
        closed = await self.sessions.close(SessionKey(tenant, request.session_id), expected_epoch)
        return pb.CloseSessionResponse(closed=closed)
