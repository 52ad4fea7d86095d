"""The RPCs of the contract as typed values: one table for both kinds of channel."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, Literal, TypeAlias, TypeVar

from google.protobuf.message import DecodeError

from timernn import errors
from timernn.v1 import model_service_pb2 as model_pb
from timernn.v1 import session_service_pb2 as session_pb
from timernn.v1 import time_rnn_service_pb2 as rnn_pb

if TYPE_CHECKING:
    from collections.abc import Callable

Q = TypeVar("Q")
A = TypeVar("A")
Kind: TypeAlias = Literal["unary_unary", "unary_stream", "stream_unary", "stream_stream"]


@dataclass(frozen=True, slots=True, eq=False)
class Rpc(Generic[Q, A]):
    """One method: how it is reached, and how its two messages are written and read.

    Attributes:
        path: "/SERVICE/METHOD".
        serialize: Writes a request.
        deserialize: Reads an answer.
        kind: Which side sends several messages; gRPC's name of it.
    """

    path: str
    serialize: Callable[[Q], bytes]
    deserialize: Callable[[bytes], A]
    kind: Kind = "unary_unary"

    def read(self, answer: bytes) -> A:
        """Read an answer's message.

        Raises:
            Internal: If it is none.
        """
        try:
            return self.deserialize(answer)
        except DecodeError as error:
            raise errors.Internal(f"the answer of {self.path} cannot be read") from error


_KINDS: dict[tuple[bool, bool], Kind] = {  # by whether the client and the server send several
    (False, False): "unary_unary",
    (False, True): "unary_stream",
    (True, False): "stream_unary",
    (True, True): "stream_stream",
}


def _rpc(service: str, name: str, module: Any) -> Rpc[Any, Any]:
    request, answer = getattr(module, f"{name}Request"), getattr(module, f"{name}Response")
    method = module.DESCRIPTOR.services_by_name[service].methods_by_name[name]
    return Rpc(
        f"/timernn.v1.{service}/{name}",
        request.SerializeToString,
        answer.FromString,
        _KINDS[method.client_streaming, method.server_streaming],
    )


_MODEL, _SESSION, _RNN = "ModelService", "SessionService", "TimeRnnService"

CREATE_MODEL: Rpc[model_pb.CreateModelRequest, model_pb.CreateModelResponse]
CREATE_MODEL = _rpc(_MODEL, "CreateModel", model_pb)
IMPORT_MODEL: Rpc[model_pb.ImportModelRequest, model_pb.ImportModelResponse]
IMPORT_MODEL = _rpc(_MODEL, "ImportModel", model_pb)
GET_MODEL: Rpc[model_pb.GetModelRequest, model_pb.GetModelResponse]
GET_MODEL = _rpc(_MODEL, "GetModel", model_pb)
LIST_MODELS: Rpc[model_pb.ListModelsRequest, model_pb.ListModelsResponse]
LIST_MODELS = _rpc(_MODEL, "ListModels", model_pb)
DELETE_MODEL: Rpc[model_pb.DeleteModelRequest, model_pb.DeleteModelResponse]
DELETE_MODEL = _rpc(_MODEL, "DeleteModel", model_pb)
GET_WEIGHTS: Rpc[model_pb.GetWeightsRequest, model_pb.GetWeightsResponse]
GET_WEIGHTS = _rpc(_MODEL, "GetWeights", model_pb)
PUT_WEIGHTS: Rpc[model_pb.PutWeightsRequest, model_pb.PutWeightsResponse]
PUT_WEIGHTS = _rpc(_MODEL, "PutWeights", model_pb)
FIND_VERSIONS: Rpc[model_pb.FindVersionsRequest, model_pb.FindVersionsResponse]
FIND_VERSIONS = _rpc(_MODEL, "FindVersions", model_pb)
CREATE_CHECKPOINT: Rpc[model_pb.CreateCheckpointRequest, model_pb.CreateCheckpointResponse]
CREATE_CHECKPOINT = _rpc(_MODEL, "CreateCheckpoint", model_pb)
LIST_CHECKPOINTS: Rpc[model_pb.ListCheckpointsRequest, model_pb.ListCheckpointsResponse]
LIST_CHECKPOINTS = _rpc(_MODEL, "ListCheckpoints", model_pb)
RESTORE_CHECKPOINT: Rpc[model_pb.RestoreCheckpointRequest, model_pb.RestoreCheckpointResponse]
RESTORE_CHECKPOINT = _rpc(_MODEL, "RestoreCheckpoint", model_pb)
DELETE_CHECKPOINT: Rpc[model_pb.DeleteCheckpointRequest, model_pb.DeleteCheckpointResponse]
DELETE_CHECKPOINT = _rpc(_MODEL, "DeleteCheckpoint", model_pb)
GET_SERVER_INFO: Rpc[model_pb.GetServerInfoRequest, model_pb.GetServerInfoResponse]
GET_SERVER_INFO = _rpc(_MODEL, "GetServerInfo", model_pb)

OPEN_SESSION: Rpc[session_pb.OpenSessionRequest, session_pb.OpenSessionResponse]
OPEN_SESSION = _rpc(_SESSION, "OpenSession", session_pb)
GET_SESSION: Rpc[session_pb.GetSessionRequest, session_pb.GetSessionResponse]
GET_SESSION = _rpc(_SESSION, "GetSession", session_pb)
LIST_SESSIONS: Rpc[session_pb.ListSessionsRequest, session_pb.ListSessionsResponse]
LIST_SESSIONS = _rpc(_SESSION, "ListSessions", session_pb)
GET_STATE: Rpc[session_pb.GetStateRequest, session_pb.GetStateResponse]
GET_STATE = _rpc(_SESSION, "GetState", session_pb)
SET_STATE: Rpc[session_pb.SetStateRequest, session_pb.SetStateResponse]
SET_STATE = _rpc(_SESSION, "SetState", session_pb)
RESET_STATE: Rpc[session_pb.ResetStateRequest, session_pb.ResetStateResponse]
RESET_STATE = _rpc(_SESSION, "ResetState", session_pb)
FORK_SESSION: Rpc[session_pb.ForkSessionRequest, session_pb.ForkSessionResponse]
FORK_SESSION = _rpc(_SESSION, "ForkSession", session_pb)
CLOSE_SESSION: Rpc[session_pb.CloseSessionRequest, session_pb.CloseSessionResponse]
CLOSE_SESSION = _rpc(_SESSION, "CloseSession", session_pb)

FORWARD: Rpc[rnn_pb.ForwardRequest, rnn_pb.ForwardResponse]
FORWARD = _rpc(_RNN, "Forward", rnn_pb)
BACKWARD: Rpc[rnn_pb.BackwardRequest, rnn_pb.BackwardResponse]
BACKWARD = _rpc(_RNN, "Backward", rnn_pb)
UPDATE: Rpc[rnn_pb.UpdateRequest, rnn_pb.UpdateResponse]
UPDATE = _rpc(_RNN, "Update", rnn_pb)
DISCARD_GRADIENTS: Rpc[rnn_pb.DiscardGradientsRequest, rnn_pb.DiscardGradientsResponse]
DISCARD_GRADIENTS = _rpc(_RNN, "DiscardGradients", rnn_pb)
LIST_WAITING: Rpc[rnn_pb.ListWaitingRequest, rnn_pb.ListWaitingResponse]
LIST_WAITING = _rpc(_RNN, "ListWaiting", rnn_pb)
STREAM: Rpc[rnn_pb.StreamRequest, rnn_pb.StreamResponse]
STREAM = _rpc(_RNN, "Stream", rnn_pb)

_SERVING = b"\x08\x01"
# grpc.health.v1 with its messages written by hand (an empty request; field 1 = 1 says SERVING):
# two bytes do not deserve another dependency in every client.
HEALTH: Rpc[None, bool] = Rpc(
    "/grpc.health.v1.Health/Check", lambda _: b"", lambda answer: answer == _SERVING
)
