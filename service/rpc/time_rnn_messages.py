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
from service.rpc.fields import selectors_from_proto, version_from_proto
from service.rpc.tensors import fill_tensor, required_tensor, tensor_from_proto
from timernn.v1 import time_rnn_service_pb2 as pb

if TYPE_CHECKING:
    from rnn_engine import Array, Grads
    from service.domain.rules import InputRules
    from service.domain.types import (
        BackwardResult,
        DiscardResult,
        ForwardResult,
        UpdateResult,
        Version,
        Waiting,
    )

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
    """Turns messages into the domain's operations, which the domain checks."""

    def __init__(self, rules: InputRules) -> None:
        self._rules = rules
        self._xs = rules.xs

    def forward(self, request: pb.ForwardRequest) -> Forward:
        """Return what a Forward asks for."""
        if not request.HasField("xs"):
            raise bad_field("xs", "required")
        return Forward(
            request.session_id,
            request.epoch,
            request.chunk_seq,
            request.previous_token,
            tensor_from_proto("xs", request.xs, self._xs),
            _is_train(request.mode),
            _version(request, "pinned_version"),
            _version(request, "minimum_version"),
            _return_hs(request.return_hs),
            request.acknowledged_seq,
            request.model_id,
            self._state(request, "h0") if request.HasField("h0") else None,
        )

    def backward(self, request: pb.BackwardRequest) -> Backward:
        """Return what a Backward asks for."""
        dhs = request.dhs if request.HasField("dhs") else None
        return Backward(
            session_id=request.session_id,
            epoch=request.epoch,
            chunk_seq=request.chunk_seq,
            token=request.state_token,
            d_outputs=required_tensor("dhs", dhs, self._rules.dhs),
            d_state=self._state(request, "dh_next") if request.HasField("dh_next") else None,
            return_d_inputs=request.return_dxs,
            return_gradients=request.return_gradients,
            update=self.update(request.update) if request.HasField("update") else None,
            resent=request.resent,
        )

    def update(self, request: pb.UpdateRequest) -> Update:
        """Return what an Update asks for."""
        has_rate = request.HasField("learning_rate")
        return Update(
            model_id=request.model_id,
            selectors=selectors_from_proto(request.contributions, self._rules),
            reduction=_reduction(request.reduction),
            learning_rate=request.learning_rate if has_rate else None,
            clip_norm=request.clip_norm,
            expected=_version(request, "expected_version"),
            request_id=request.request_id,
        )

    def discard(self, request: pb.DiscardGradientsRequest) -> DiscardGradients:
        """Return what a DiscardGradients asks for."""
        selectors = selectors_from_proto(request.contributions, self._rules)
        return DiscardGradients(request.model_id, selectors)

    def _state(self, request: pb.ForwardRequest | pb.BackwardRequest, name: str) -> Array:
        return tensor_from_proto(name, getattr(request, name), self._rules.state)


def fill_forward(message: pb.ForwardResponse, result: ForwardResult) -> pb.ForwardResponse:
    """Write a chunk's answer into an empty message."""
    if result.session_id:
        message.session_id = result.session_id
        message.epoch = result.epoch
        message.chunk_seq = result.chunk_seq
        message.state_token = result.token
    if result.outputs is not None:
        fill_tensor(message.hs, result.outputs)
    fill_tensor(message.h, result.state)
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
    if result.d_inputs is not None:
        fill_tensor(message.dxs, result.d_inputs)
    fill_tensor(message.dh0, result.d_state)
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


def _version(request: pb.ForwardRequest | pb.UpdateRequest, name: Any) -> Version | None:
    if not request.HasField(name):
        return None
    return version_from_proto(getattr(request, name))


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
