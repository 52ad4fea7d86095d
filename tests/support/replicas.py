"""Stubs that call two replicas in turn, and tensors for their messages."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from timernn.v1 import model_service_pb2_grpc, session_service_pb2_grpc, time_rnn_service_pb2_grpc
from timernn.v1.tensor_pb2 import DType, Tensor

if TYPE_CHECKING:
    import grpc
    from numpy.typing import NDArray

_CODES = {"float32": "D_TYPE_FLOAT32", "float64": "D_TYPE_FLOAT64"}


@dataclass(frozen=True, slots=True)
class Stubs:
    """The stubs of one replica."""

    models: Any
    sessions: Any
    rnn: Any

    @classmethod
    def on(cls, channel: grpc.Channel) -> Stubs:
        """Make the stubs of a channel."""
        return cls(
            model_service_pb2_grpc.ModelServiceStub(channel),
            session_service_pb2_grpc.SessionServiceStub(channel),
            time_rnn_service_pb2_grpc.TimeRnnServiceStub(channel),
        )


class TwoReplicas:
    """Two replicas; each use of `next` gives the stubs of the other one."""

    def __init__(self, *channels: grpc.Channel) -> None:
        self._stubs = [Stubs.on(channel) for channel in channels]
        self._turn = 0

    @property
    def next(self) -> Stubs:
        """The replica whose turn it is."""
        self._turn += 1
        return self._stubs[self._turn % len(self._stubs)]


def to_tensor(array: NDArray[Any]) -> Tensor:
    """Make the message of an array."""
    return Tensor(
        dtype=DType.Value(_CODES[array.dtype.name]), shape=array.shape, data=array.tobytes()
    )


def to_array(tensor: Tensor) -> NDArray[Any]:
    """Read the array of a message."""
    names = {DType.Value(code): name for name, code in _CODES.items()}
    return np.frombuffer(tensor.data, names[tensor.dtype]).reshape(tuple(tensor.shape)).copy()
