"""Between TimeRnnService's messages and the domain's values.

A chunk passes here on every step of every stream, so these functions read each field once.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from service.domain.errors import bad_field
from service.domain.types import (
    Backward,
    DiscardGradients,
    Forward,
    Reduction,
    ReturnHs,
    Update,
)
from service.rpc.fields import (
    MAX_LEARNING_RATE,
    check_id,
    check_number,
    check_optional_id,
    check_real,
    check_request_id,
    check_token,
    selectors_from_proto,
    version_from_proto,
)
from service.rpc.tensors import TensorRule, fill_tensor, required_tensor, tensor_from_proto
from timernn.v1 import time_rnn_service_pb2 as pb

if TYPE_CHECKING:
    from rnn_engine import Array, Grads
    from service.domain.types import (
        BackwardResult,
        DiscardResult,
        ForwardResult,
        UpdateResult,
        Version,
        Waiting,
    )
    from service.settings import Limits

_IS_TRAIN: Final[dict[int, bool]] = {
    pb.FORWARD_MODE_UNSPECIFIED: False,
    pb.FORWARD_MODE_INFER: False,
    pb.FORWARD_MODE_TRAIN: True,
}
_RETURN_HS: Final[dict[int, ReturnHs]] = {
    pb.RETURN_HS_UNSPECIFIED: ReturnHs.ALL,
    pb.RETURN_HS_ALL: ReturnHs.ALL,
    pb.RETURN_HS_LAST: ReturnHs.LAST,
    pb.RETURN_HS_NONE: ReturnHs.NONE,
}
_REDUCTIONS: Final[dict[int, Reduction]] = {
    pb.REDUCTION_UNSPECIFIED: Reduction.SUM,
    pb.REDUCTION_SUM: Reduction.SUM,
    pb.REDUCTION_MEAN: Reduction.MEAN,
}


class OperationReader:
    """Turns messages into the domain's operations, within the limits."""

    def __init__(self, limits: Limits) -> None:
        n, t = limits.batch_size, limits.chunk_steps
        d, h = limits.input_size, limits.hidden_size
        self._limits = limits
        self._xs = TensorRule("NTD", n, t, d)
        self._dhs = TensorRule("NTH", n, t, h)
        self._h = TensorRule("NH", n, h)

    def forward(self, request: pb.ForwardRequest, previous_token: bytes = b"") -> Forward:
        """Return what a Forward asks for, or refuse it.

        Args:
            request: The message.
            previous_token: What stands in for an empty previous_token.
        """
        session_id = request.session_id
        if not session_id:
            return self._stateless_forward(request)
        check_id("session_id", session_id)
        if request.HasField("h0"):
            raise bad_field("h0", "only without a session; SetState replaces a session's state")
        if request.model_id:
            raise bad_field("model_id", "only without a session; a session has its model")
        return Forward(
            session_id,
            check_number("epoch", request.epoch, 1),
            check_number("chunk_seq", request.chunk_seq, 1),
            check_token("previous_token", request.previous_token) or previous_token,
            self._inputs(request),
            _is_train(request.mode),
            _version(request, "pinned_version"),
            _version(request, "minimum_version"),
            _return_hs(request.return_hs),
            check_number("acknowledged_seq", request.acknowledged_seq, 0),
        )

    def backward(self, request: pb.BackwardRequest) -> Backward:
        """Return what a Backward asks for, or refuse it."""
        dhs = request.dhs if request.HasField("dhs") else None
        return Backward(
            session_id=check_id("session_id", request.session_id),
            epoch=check_number("epoch", request.epoch, 1),
            chunk_seq=check_number("chunk_seq", request.chunk_seq, 1),
            token=check_token("state_token", request.state_token, required=True),
            dhs=required_tensor("dhs", dhs, self._dhs),
            dh_next=self._dh_next(request),
            return_dxs=request.return_dxs,
            return_gradients=request.return_gradients,
            update=self._inline_update(request),
            resent=request.resent,
        )

    def update(self, request: pb.UpdateRequest, *, is_inline: bool = False) -> Update:
        """Return what an Update asks for, or refuse it; an inline one may leave out the model."""
        check_model = check_optional_id if is_inline else check_id
        return Update(
            model_id=check_model("model_id", request.model_id),
            selectors=selectors_from_proto(request.contributions, self._limits),
            reduction=_reduction(request.reduction),
            learning_rate=_learning_rate(request),
            clip_norm=check_real("clip_norm", request.clip_norm, 0.0),
            expected=_version(request, "expected_version"),
            request_id=check_request_id("request_id", request.request_id, required=True),
        )

    def discard(self, request: pb.DiscardGradientsRequest) -> DiscardGradients:
        """Return what a DiscardGradients asks for, or refuse it."""
        return DiscardGradients(
            check_id("model_id", request.model_id),
            selectors_from_proto(request.contributions, self._limits),
        )

    def _stateless_forward(self, request: pb.ForwardRequest) -> Forward:
        for name in ("epoch", "chunk_seq", "previous_token", "acknowledged_seq"):
            if getattr(request, name):
                raise bad_field("session_id", f"required where {name} is set")
        if _is_train(request.mode):
            raise bad_field("mode", "TRAIN needs a session: its tape is kept there")
        return Forward(
            session_id="",
            epoch=0,
            chunk_seq=0,
            previous_token=b"",
            xs=self._inputs(request),
            pinned=_version(request, "pinned_version"),
            minimum=_version(request, "minimum_version"),
            return_hs=_return_hs(request.return_hs),
            model_id=check_id("model_id", request.model_id),
            h0=self._h0(request),
        )

    def _inputs(self, request: pb.ForwardRequest) -> Array:
        if not request.HasField("xs"):
            raise bad_field("xs", "required")
        return tensor_from_proto("xs", request.xs, self._xs)

    def _h0(self, request: pb.ForwardRequest) -> Array | None:
        if not request.HasField("h0"):
            return None
        h0 = tensor_from_proto("h0", request.h0, self._h)
        rows = request.xs.shape[0]
        if len(h0) != rows:
            raise bad_field("h0", f"has {h0.shape[0]} rows, but xs has {rows}")
        return h0

    def _dh_next(self, request: pb.BackwardRequest) -> Array | None:
        if not request.HasField("dh_next"):
            return None
        return tensor_from_proto("dh_next", request.dh_next, self._h)

    def _inline_update(self, request: pb.BackwardRequest) -> Update | None:
        if not request.HasField("update"):
            return None
        return self.update(request.update, is_inline=True)


def fill_forward(message: pb.ForwardResponse, result: ForwardResult) -> pb.ForwardResponse:
    """Write a chunk's answer into an empty message."""
    if result.session_id:
        message.session_id = result.session_id
        message.epoch = result.epoch
        message.chunk_seq = result.chunk_seq
        message.state_token = result.token
    if result.hs is not None:
        fill_tensor(message.hs, result.hs)
    fill_tensor(message.h, result.h)
    version = message.weights_version
    version.number = result.version.number
    version.digest = result.version.digest
    if result.replayed:
        message.replayed = True
    return message


def fill_backward(message: pb.BackwardResponse, result: BackwardResult) -> pb.BackwardResponse:
    """Write a Backward's answer into an empty message."""
    message.session_id = result.session_id
    message.epoch = result.epoch
    message.chunk_seq = result.chunk_seq
    if result.dxs is not None:
        fill_tensor(message.dxs, result.dxs)
    fill_tensor(message.dh0, result.dh0)
    if result.grads is not None:
        _fill_gradients(message.gradients, result.grads)
    message.gradient_norm = result.gradient_norm
    message.weights_version.number = result.version.number
    message.weights_version.digest = result.version.digest
    message.replayed = result.replayed
    if result.update is not None:
        fill_update(message.update, result.update)
    return message


def fill_update(message: pb.UpdateResponse, result: UpdateResult) -> pb.UpdateResponse:
    """Write an optimizer step's answer into an empty message."""
    message.model_id = result.model_id
    message.version.number = result.version.number
    message.version.digest = result.version.digest
    message.gradient_norm = result.gradient_norm
    message.clipped = result.clipped
    message.contribution_count = result.contribution_count
    message.replayed = result.replayed
    return message


def fill_discard(
    message: pb.DiscardGradientsResponse, result: DiscardResult
) -> pb.DiscardGradientsResponse:
    """Write what was dropped into an empty message."""
    # An empty message inside a oneof is not there until something is written into it.
    message.SetInParent()
    message.contribution_count = result.contribution_count
    message.tape_count = result.tape_count
    return message


def waiting_to_proto(waiting: Waiting) -> pb.ListWaitingResponse:
    """Return what waits of a session as a message."""
    return pb.ListWaitingResponse(
        tapes=[
            pb.WaitingTape(epoch=tape.epoch, chunk_seq=tape.chunk_seq, state_token=tape.token)
            for tape in waiting.tapes
        ],
        contributions=[
            pb.ContributionSelector(
                session_id=named.session_id, epoch=named.epoch, chunk_seqs=named.chunk_seqs
            )
            for named in waiting.contributions
        ],
    )


def _fill_gradients(message: pb.Gradients, grads: Grads) -> None:
    dWx, dWh, db = grads
    fill_tensor(message.dwx, dWx)
    fill_tensor(message.dwh, dWh)
    fill_tensor(message.db, db)


def _learning_rate(request: pb.UpdateRequest) -> float | None:
    if not request.HasField("learning_rate"):
        return None
    return check_real("learning_rate", request.learning_rate, 0.0, MAX_LEARNING_RATE)


def _version(request: pb.ForwardRequest | pb.UpdateRequest, name: Any) -> Version | None:
    if not request.HasField(name):
        return None
    return version_from_proto(name, getattr(request, name))


def _is_train(mode: int) -> bool:
    try:
        return _IS_TRAIN[mode]
    except KeyError:
        raise bad_field("mode", f"unknown value {mode}") from None


def _return_hs(value: int) -> ReturnHs:
    try:
        return _RETURN_HS[value]
    except KeyError:
        raise bad_field("return_hs", f"unknown value {value}") from None


def _reduction(value: int) -> Reduction:
    try:
        return _REDUCTIONS[value]
    except KeyError:
        raise bad_field("reduction", f"unknown value {value}") from None
