"""Between SessionService's messages and the domain's values."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from google.protobuf.duration_pb2 import Duration

from service.domain.errors import bad_field
from service.domain.types import ForkSession, NewEpoch, OnExists, OpenSession
from service.rpc.fields import ttl_from_proto
from service.rpc.model_messages import time_to_proto
from service.rpc.tensors import (
    optional_tensor,
    required_tensor,
    tensor_to_proto,
    version_to_proto,
)
from timernn.v1 import session_service_pb2 as pb

if TYPE_CHECKING:
    from rnn_engine import Array
    from service.domain.rules import InputRules
    from service.domain.types import OpenedSession, SessionView

_ON_EXISTS: Final[dict[int, OnExists]] = {
    pb.ON_EXISTS_UNSPECIFIED: OnExists.FAIL,
    pb.ON_EXISTS_FAIL: OnExists.FAIL,
    pb.ON_EXISTS_RESUME: OnExists.RESUME,
    pb.ON_EXISTS_RESET: OnExists.RESET,
    pb.ON_EXISTS_MUST_EXIST: OnExists.MUST_EXIST,
}


def open_session_from_proto(request: pb.OpenSessionRequest, rules: InputRules) -> OpenSession:
    """Return what OpenSession asks for."""
    state = request.initial_state if request.HasField("initial_state") else None
    return OpenSession(
        model_id=request.model_id,
        session_id=request.session_id,
        batch_size=request.batch_size or 1,
        initial_state=optional_tensor("initial_state", state, rules.state),
        ttl_ms=ttl_from_proto("ttl", request.ttl, rules) if request.HasField("ttl") else None,
        on_exists=_on_exists(request.on_exists),
        request_id=request.request_id,
        restored_epoch=request.restored_epoch,
    )


def new_epoch_from_proto(
    request: pb.SetStateRequest | pb.ResetStateRequest, rules: InputRules
) -> NewEpoch:
    """Return what SetState or ResetState asks for."""
    has_number = request.HasField("expected_chunk_seq")
    return NewEpoch(
        session_id=request.session_id,
        state=_new_state(request, rules),
        expected_epoch=request.expected_epoch,
        expected_chunk_seq=request.expected_chunk_seq if has_number else None,
        request_id=request.request_id,
        restored_epoch=request.restored_epoch,
    )


def fork_session_from_proto(request: pb.ForkSessionRequest, rules: InputRules) -> ForkSession:
    """Return what ForkSession asks for."""
    return ForkSession(
        session_id=request.session_id,
        new_session_id=request.new_session_id,
        ttl_ms=ttl_from_proto("ttl", request.ttl, rules) if request.HasField("ttl") else None,
        request_id=request.request_id,
    )


def session_to_proto(view: SessionView) -> pb.Session:
    """Return a session as a message."""
    return pb.Session(
        session_id=view.session_id,
        model_id=view.model_id,
        epoch=view.epoch,
        chunk_seq=view.chunk_seq,
        state_token=view.token,
        batch_size=view.batch_size,
        ttl=duration_to_proto(view.ttl_ms),
        expire_time=time_to_proto(view.expire_time_ms),
        weights_version=version_to_proto(view.version) if view.version else None,
    )


def open_session_to_proto(opened: OpenedSession) -> pb.OpenSessionResponse:
    """Return what opening gave as a message."""
    return pb.OpenSessionResponse(
        session=session_to_proto(opened.session),
        state=tensor_to_proto(opened.state),
        resumed=opened.resumed,
        replayed=opened.replayed,
    )


def duration_to_proto(span_ms: int) -> Duration:
    """Return a span in ms as a message."""
    return Duration(seconds=span_ms // 1000, nanos=span_ms % 1000 * 1_000_000)


def _new_state(
    request: pb.SetStateRequest | pb.ResetStateRequest, rules: InputRules
) -> Array | None:
    if isinstance(request, pb.ResetStateRequest):
        return None
    state = request.state if request.HasField("state") else None
    return required_tensor("state", state, rules.state)


def _on_exists(value: int) -> OnExists:
    try:
        return _ON_EXISTS[value]
    except KeyError:
        raise bad_field("on_exists", f"unknown value {value}") from None
