"""What the sessions and calls of one client share, handed to each at its construction."""

from __future__ import annotations

from typing import TYPE_CHECKING

from timernn._core.ages import Ages
from timernn._core.contract import GET_MODEL, GET_SERVER_INFO
from timernn._core.convert import model_from_proto
from timernn._core.credentials import Credentials
from timernn._core.journal import LogBudget
from timernn._core.known import KnownModels
from timernn._core.retry import Caller
from timernn._core.splitting import Bounds
from timernn.v1 import model_service_pb2 as model_pb

if TYPE_CHECKING:
    from collections.abc import Callable

    from timernn._core.effects import Op
    from timernn._core.journal import Journal
    from timernn._core.options import Options
    from timernn.types import ModelInfo


class ClientContext:
    """How a client calls, what it knows of server and models, and where it logs.

    It knows nothing of the sessions and calls that use it.

    Attributes:
        options: The arguments of `connect`.
        new_lock: Makes a lock of the kind that the frontend waits for.
        caller: Makes calls, with retries over the addresses.
        ages: Reads how long ago an answer came.
        known: The models and versions that answers named.
        logs: Bounds the journals of all sessions together.
    """

    def __init__(
        self, addresses: list[str], options: Options, new_lock: Callable[[], object]
    ) -> None:
        self.options, self.new_lock = options, new_lock
        self.caller = Caller(
            addresses,
            options.retry,
            timeout_s=options.timeout_s,
            connect_timeout_s=options.connect_timeout_s,
            credentials=Credentials(options.token, options.metadata),
        )
        self.ages = Ages()
        self.known = KnownModels()
        self.logs = LogBudget(options.log_total_bytes)
        self._bounds: Bounds | None = None

    def new_journal(self) -> Journal:
        """Make a journal with the bounds that `connect` was given."""
        return self.logs.new_journal(self.options.log_limit, self.options.log_bytes)

    def bounds(self) -> Op[Bounds]:
        """Return the server's limits; asked for once."""
        if self._bounds is None:
            request = model_pb.GetServerInfoRequest()
            answer = yield from self.caller.call(GET_SERVER_INFO, request)
            self._bounds = Bounds.from_limits(answer.limits, self.options.max_message_bytes)
        return self._bounds

    def model(self, model_id: str) -> Op[ModelInfo]:
        """Return a model's sizes and dtype; asked for once."""
        known = self.known.model(model_id)
        return (yield from self.read_model(model_id)) if known is None else known

    def read_model(self, model_id: str) -> Op[ModelInfo]:
        """Read a model as it stands, and note it."""
        request = model_pb.GetModelRequest(model_id=model_id)
        answer = yield from self.caller.call(GET_MODEL, request)
        model = model_from_proto(answer.model)
        self.known.note_model(model)
        return model
