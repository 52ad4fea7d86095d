"""Between SessionService's messages and the domain's values."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from google.protobuf.duration_pb2 import Duration

from service.domain.errors import bad_field
from service.domain.types import ForkSession, NewEpoch, OnExists, OpenSession
from service.rpc.fields import (
    check_id,
    check_number,
    check_optional_id,
    check_request_id,
    check_restored_epoch,
    check_size,
    ttl_from_proto,
)
from service.rpc.model_messages import time_to_proto
from service.rpc.tensors import (
    TensorRule,
    required_tensor,
    tensor_from_proto,
    tensor_to_proto,
    version_to_proto,
)
from timernn.v1 import session_service_pb2 as pb

if TYPE_CHECKING:
    from rnn_engine import Array
    from service.domain.types import OpenedSession, SessionView
    from service.settings import Limits

_ON_EXISTS: Final[dict[int, OnExists]] = {
    pb.ON_EXISTS_UNSPECIFIED: OnExists.FAIL,
    pb.ON_EXISTS_FAIL: OnExists.FAIL,
    pb.ON_EXISTS_RESUME: OnExists.RESUME,
    pb.ON_EXISTS_RESET: OnExists.RESET,
    pb.ON_EXISTS_MUST_EXIST: OnExists.MUST_EXIST,
}


def state_rule(limits: Limits) -> TensorRule:
    """Return what a hidden state may look like: (N, H)."""
    return TensorRule("NH", limits.batch_size, limits.hidden_size)


def open_session_from_proto(request: pb.OpenSessionRequest, limits: Limits) -> OpenSession:
    """Return what OpenSession asks for, or refuse it."""
    batch_size, on_exists = request.batch_size or 1, _on_exists(request.on_exists)
    check_name = check_id if on_exists is OnExists.MUST_EXIST else check_optional_id
    return OpenSession(
        model_id=check_id("model_id", request.model_id),
        session_id=check_name("session_id", request.session_id),
        batch_size=check_size("batch_size", batch_size, limits.batch_size),
        initial_state=_initial_state(request, batch_size, limits),
        ttl_ms=ttl_from_proto("ttl", request.ttl, limits) if request.HasField("ttl") else None,
        on_exists=on_exists,
        request_id=check_request_id("request_id", request.request_id),
        restored_epoch=check_restored_epoch("restored_epoch", request.restored_epoch),
    )


def new_epoch_from_proto(
    request: pb.SetStateRequest | pb.ResetStateRequest, limits: Limits
) -> NewEpoch:
    """Return what SetState or ResetState asks for, or refuse it."""
    return NewEpoch(
        session_id=check_id("session_id", request.session_id),
        state=_new_state(request, limits),
        expected_epoch=check_number("expected_epoch", request.expected_epoch, 0),
        expected_chunk_seq=_expected_chunk_seq(request),
        request_id=check_request_id("request_id", request.request_id),
        restored_epoch=check_restored_epoch("restored_epoch", request.restored_epoch),
    )


def fork_session_from_proto(request: pb.ForkSessionRequest, limits: Limits) -> ForkSession:
    """Return what ForkSession asks for, or refuse it."""
    return ForkSession(
        session_id=check_id("session_id", request.session_id),
        new_session_id=check_optional_id("new_session_id", request.new_session_id),
        ttl_ms=ttl_from_proto("ttl", request.ttl, limits) if request.HasField("ttl") else None,
        request_id=check_request_id("request_id", request.request_id),
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


def _initial_state(request: pb.OpenSessionRequest, batch_size: int, limits: Limits) -> Array | None:
    if not request.HasField("initial_state"):
        return None
    state = tensor_from_proto("initial_state", request.initial_state, state_rule(limits))
    if len(state) != batch_size:
        got = state.shape[0]
        raise bad_field("batch_size", f"is {batch_size}, but initial_state has {got} rows")
    return state


def _new_state(request: pb.SetStateRequest | pb.ResetStateRequest, limits: Limits) -> Array | None:
    if isinstance(request, pb.ResetStateRequest):
        return None
    state = request.state if request.HasField("state") else None
    return required_tensor("state", state, state_rule(limits))


def _expected_chunk_seq(request: pb.SetStateRequest | pb.ResetStateRequest) -> int | None:
    if not request.HasField("expected_chunk_seq"):
        return None
    return check_number("expected_chunk_seq", request.expected_chunk_seq, 0)


def _on_exists(value: int) -> OnExists:
    try:
        return _ON_EXISTS[value]
    except KeyError:
        raise bad_field("on_exists", f"unknown value {value}") from None
