"""From what the caller gave to the requests of its chunks: checked, cast, cut along T."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from timernn import errors
from timernn._core.convert import array_from_caller, tensor_to_proto
from timernn._core.intents import ForwardIntent
from timernn._core.splitting import split_steps
from timernn.v1 import time_rnn_service_pb2 as rnn_pb

if TYPE_CHECKING:
    import numpy.typing as npt

    from timernn._core.session_state import SessionState, Taped
    from timernn.types import Array, ReturnHs

RETURN_HS: dict[str, rnn_pb.ReturnHs.ValueType] = {
    "all": rnn_pb.RETURN_HS_ALL,
    "last": rnn_pb.RETURN_HS_LAST,
    "none": rnn_pb.RETURN_HS_NONE,
}


def forward_intent(
    session: SessionState, xs: npt.ArrayLike, return_hs: ReturnHs, *, train: bool
) -> ForwardIntent:
    """Cut a sequence into the requests of its chunks, not numbered yet.

    Args:
        session: The session that it is for.
        xs: Inputs, shape (N, T, D).
        return_hs: What the whole returns.
        train: Whether a `backward` is to follow.

    Raises:
        BadField: If tapes are wanted of a session that was not opened to train.
        BadTensor: If xs is no array of the right shape.
        MessageTooLarge: If it cannot be cut small enough.
    """
    if train and not session.train:
        raise errors.BadField(
            f"train: session {session.session_id!r} was opened with train=False and keeps no tapes; "
            "open it with train=True"
        )
    model = session.model
    array = array_from_caller(
        xs, "xs", dtype=model.dtype, shape=(session.batch_size, None, model.input_size)
    )
    pieces = _cut(session, array)
    if train and len(pieces) > session.bounds.tapes_per_session:
        raise errors.MessageTooLarge(
            f"xs: {array.shape[1]} steps take {len(pieces)} messages, but the server keeps "
            f"{session.bounds.tapes_per_session} tapes of a session: use shorter chunks"
        )
    mode = rnn_pb.FORWARD_MODE_TRAIN if train else rnn_pb.FORWARD_MODE_INFER
    wanted = RETURN_HS[return_hs]
    if len(pieces) == 1:
        xs_only = tensor_to_proto(array)
        only = rnn_pb.ForwardRequest(xs=xs_only, mode=mode, return_hs=wanted)
        return ForwardIntent(session, [only])
    require_finite(array, "xs")  # else the pieces before it would be applied
    between = wanted if return_hs == "all" else rnn_pb.RETURN_HS_NONE
    returns = [between] * (len(pieces) - 1) + [wanted]
    requests = [
        rnn_pb.ForwardRequest(xs=tensor_to_proto(array[:, cut]), mode=mode, return_hs=returned)
        for cut, returned in zip(pieces, returns, strict=True)
    ]
    return ForwardIntent(session, requests)


def _cut(session: SessionState, array: Array) -> list[slice]:
    row_bytes = session.batch_size * array.itemsize
    H = session.model.hidden_size
    step_bytes = row_bytes * max(session.model.input_size, H)
    return split_steps(
        array.shape[1], session.bounds, step_bytes=step_bytes, state_bytes=row_bytes * H
    )


def backward_requests(
    session: SessionState, taped: Taped, dhs: npt.ArrayLike
) -> list[rnn_pb.BackwardRequest]:
    """Cut a gradient as its Forward was cut; the last piece in time comes first.

    Args:
        session: The session that it is for.
        taped: What the Forward left.
        dhs: Gradient of the hidden states, shape (N, T, H), or (N, 1, H) where only the last was
            returned.

    Raises:
        BadTensor: If dhs is no array of the right shape.
        NonFinite: If pieces would be applied before one that is refused.
    """
    array = _whole_dhs(session, taped, dhs)
    if len(taped.chunks) > 1:
        require_finite(array, "dhs")
    ends = np.cumsum([chunk.steps for chunk in taped.chunks])
    return [
        rnn_pb.BackwardRequest(
            session_id=session.session_id,
            epoch=chunk.epoch,
            chunk_seq=chunk.chunk_seq,
            state_token=chunk.token,
            dhs=tensor_to_proto(array[:, end - chunk.steps : end]),
        )
        for chunk, end in reversed(list(zip(taped.chunks, ends, strict=True)))
    ]


def _whole_dhs(session: SessionState, taped: Taped, dhs: npt.ArrayLike) -> Array:
    rows, model, steps = session.batch_size, session.model, taped.steps
    array = array_from_caller(dhs, "dhs", dtype=model.dtype, shape=(rows, None, model.hidden_size))
    if taped.has_last_only and array.shape[1] == 1 and steps > 1:
        whole = np.zeros((rows, steps, model.hidden_size), array.dtype)
        whole[:, -1] = array[:, 0]
        return whole
    return array_from_caller(array, "dhs", dtype=model.dtype, shape=(array.shape[0], steps, None))


def require_finite(array: Array, name: str) -> None:
    """Refuse NaN and infinity here, where the server would see only a piece of the array.

    Raises:
        NonFinite: If there is any; the first index is named.
    """
    finite = np.isfinite(array)
    if not finite.all():
        index = ",".join(map(str, np.argwhere(~finite)[0]))
        raise errors.NonFinite(f"{name}[{index}] is {array[tuple(np.argwhere(~finite)[0])]}")
