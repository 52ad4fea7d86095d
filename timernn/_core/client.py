"""What a client can ask that is not one session's, and what its sessions share."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from timernn import errors
from timernn._core import arguments, contract
from timernn._core.arguments import checked, checked_with
from timernn._core.context import ClientContext
from timernn._core.convert import (
    array_from_caller,
    duration_to_proto,
    join_steps,
    reduction_to_proto,
    selectors_to_proto,
    server_info_from_proto,
    session_from_proto,
    tensor_from_proto,
    tensor_to_proto,
    update_from_proto,
    version_to_proto,
)
from timernn._core.effects import RpcCall
from timernn._core.frame import Frames
from timernn._core.healing import Healing, Scope
from timernn._core.ids import new_request_id, new_session_id
from timernn._core.models import ModelsCore, given, note_made, optional
from timernn._core.recovery import Recovery
from timernn._core.requests import RETURN_HS
from timernn._core.session import SessionCore
from timernn._core.splitting import split_steps
from timernn._core.updates import Updates
from timernn.types import (
    Contributions,
    Discarded,
    Ping,
    Step,
)
from timernn.v1 import model_service_pb2 as model_pb
from timernn.v1 import session_service_pb2 as session_pb
from timernn.v1 import time_rnn_service_pb2 as rnn_pb

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from datetime import timedelta

    import numpy.typing as npt

    from timernn._core.effects import Op
    from timernn._core.options import Options
    from timernn._core.views import SessionView
    from timernn.types import (
        Array,
        OnExists,
        Reduction,
        ReturnHs,
        ServerInfo,
        SessionInfo,
        UpdateResult,
        Version,
    )

_ON_EXISTS = {
    "resume": session_pb.ON_EXISTS_RESUME,
    "fail": session_pb.ON_EXISTS_FAIL,
    "reset": session_pb.ON_EXISTS_RESET,
    "must_exist": session_pb.ON_EXISTS_MUST_EXIST,
}


class ClientCore:
    """One client: every call that is not one session's, and the making of sessions.

    Args:
        addresses: Targets by name.
        options: The arguments of `connect`.
        new_lock: Makes a lock of the kind that the frontend waits for.

    Attributes:
        context: What its sessions and calls share.
        models: The calls about models.
        frames: Chunks of many sessions in one message.
    """

    def __init__(
        self, addresses: list[str], options: Options, new_lock: Callable[[], object]
    ) -> None:
        self.context = context = ClientContext(addresses, options, new_lock)
        self.models = ModelsCore(context)
        self._recovery = Recovery(context)
        self.frames = Frames(context, self._recovery)
        self._updates: dict[str, Updates] = {}

    def own(self, name: str, sessions: Iterable[SessionView]) -> list[Any]:
        """Return sessions as a list; before their locks are taken, which differ between frontends.

        Raises:
            BadField: If one is no session, or of another client: two would use its numbers.
        """
        items = arguments.sessions(name, sessions)
        for index, session in enumerate(items):
            if session._core.context is not self.context:  # noqa: SLF001  # one package
                raise arguments.refusal(f"{name}[{index}]", "a session of this client", session)
        return items

    def _updates_of(self, model_id: str) -> Updates:
        """Return what makes a model's steps; its sessions share one."""
        known = self._updates.get(model_id)
        if known is None:  # another thread may make it as well: the first one counts
            made = Updates(self.context, self._recovery, model_id)
            known = self._updates.setdefault(model_id, made)
        return known

    # -- sessions ----------------------------------------------------------------------------------

    @checked
    def open_session(
        self,
        model_id: str,
        session_id: str | None = None,
        *,
        batch_size: int = 1,
        train: bool = False,
        initial_state: npt.ArrayLike | None = None,
        ttl: float | timedelta | None = None,
        on_exists: OnExists = "resume",
        must_exist: bool = False,
    ) -> Op[SessionCore]:
        """Open a session, or go on with a live one; `resumed` says which it was. See `timernn.Client.session`."""
        wanted = _wanted(on_exists, session_id, must_exist=must_exist)
        context = self.context
        bounds = yield from context.bounds()
        model = yield from context.model(model_id)
        request = session_pb.OpenSessionRequest(
            model_id=model_id,
            session_id=new_session_id() if session_id is None else session_id,
            batch_size=batch_size,
            ttl=None if ttl is None else duration_to_proto(ttl),
            on_exists=wanted,
            request_id=new_request_id(),
        )
        if initial_state is not None:
            shape = (batch_size, model.hidden_size)
            request.initial_state.CopyFrom(
                given(initial_state, "initial_state", dtype=model.dtype, shape=shape)
            )
        try:
            answer = yield from context.caller.call(contract.OPEN_SESSION, request)
        except errors.NotFound:
            context.known.forget(model_id)
            raise
        updates = self._updates_of(model_id)
        state = updates.model.new_session(model, bounds, train=train)
        state.begin(answer.session, answer.state, resumed=answer.resumed)
        return SessionCore(context, self._recovery, updates=updates, state=state)

    @checked
    def get_session(self, session_id: str) -> Op[SessionInfo]:
        """Return one session as it stands, without opening it."""
        request = session_pb.GetSessionRequest(session_id=session_id)
        answer = yield from self.context.caller.call(contract.GET_SESSION, request)
        return session_from_proto(answer.session)

    @checked
    def get_state(self, session_id: str) -> Op[tuple[SessionInfo, Array]]:
        """Return one session as it stands and its hidden state, shape (N, H), without opening it.

        Its time to live does not start again.
        """
        request = session_pb.GetStateRequest(session_id=session_id)
        answer = yield from self.context.caller.call(contract.GET_STATE, request)
        return session_from_proto(answer.session), tensor_from_proto(answer.state)

    @checked_with(model_id=arguments.optional(arguments.CHECKS["model_id"]))
    def sessions_page(
        self, model_id: str | None, page_size: int, page_token: str
    ) -> Op[tuple[list[SessionInfo], str]]:
        """Return a page of live sessions and the token of the next."""
        request = session_pb.ListSessionsRequest(
            model_id=model_id or "", page_size=page_size, page_token=page_token
        )
        answer = yield from self.context.caller.call(contract.LIST_SESSIONS, request)
        return [session_from_proto(session) for session in answer.sessions], answer.next_page_token

    @checked
    def close_session(self, session_id: str) -> Op[bool]:
        """End a session by name; returns whether this call ended it."""
        request = session_pb.CloseSessionRequest(session_id=session_id)
        answer = yield from self.context.caller.call(contract.CLOSE_SESSION, request)
        return answer.closed

    # -- training over several sessions ------------------------------------------------------------

    @checked
    def update(
        self,
        model_id: str,
        contributions: Iterable[Contributions | str] | None = None,
        *,
        sessions: Sequence[SessionView] | None = None,
        lr: float | None = None,
        clip_norm: float = 0.0,
        reduction: Reduction = "sum",
        expected_version: Version | None = None,
        take_waiting: bool = False,
    ) -> Op[UpdateResult]:
        """Make one optimizer step over the contributions of many sessions. See `timernn.Client.update`."""
        step = Step(lr, clip_norm, reduction)
        if sessions is None:
            return (
                yield from self._update_waiting(
                    model_id, contributions, step, expected_version=expected_version
                )
            )
        cores = [session._core for session in sessions]  # noqa: SLF001  # one package
        for core in cores:
            core.state.require_idle()
            if core.state.model.model_id != model_id:
                raise errors.BadField(f"sessions: {core.state.session_id!r} runs another model")
        if expected_version is not None:
            self.context.known.set_version(model_id, expected_version)
        doubts = [core.doubts for core in cores]
        return (
            yield from self._updates_of(model_id).update(
                doubts, step, expect_known=True, take_waiting=take_waiting
            )
        )

    def _update_waiting(
        self,
        model_id: str,
        contributions: Iterable[Contributions | str] | None,
        step: Step,
        *,
        expected_version: Version | None,
    ) -> Op[UpdateResult]:
        named = _named(contributions)
        if named is not None and not named:
            raise errors.NoGradients("contributions: expected at least one; None takes all")
        request = rnn_pb.UpdateRequest(
            model_id=model_id,
            contributions=selectors_to_proto(named or ()),
            reduction=reduction_to_proto(step.reduction),
            learning_rate=step.lr,
            clip_norm=step.clip_norm,
            expected_version=optional(expected_version),
            request_id=new_request_id(),
        )
        deadline = self.context.caller.deadline()
        updates = self._updates_of(model_id)

        def make_step() -> Op[UpdateResult]:
            answer = yield from self.context.caller.call(contract.UPDATE, request, deadline)
            updates.model.consume(named)
            note_made(self.context.known, model_id, answer.version)
            return update_from_proto(answer)

        return (yield from updates.in_turn(make_step(), deadline))

    @checked
    def discard_gradients(
        self, model_id: str, contributions: Iterable[Contributions | str] | None = None
    ) -> Op[Discarded]:
        """Drop contributions that wait; those named by session lose their tapes too.

        Args:
            model_id: The model.
            contributions: Which, or session names; None: all that wait.
        """
        named = _named(contributions)
        if named is not None and not named:
            return Discarded(0, 0)  # naming none on the wire would drop all
        request = rnn_pb.DiscardGradientsRequest(
            model_id=model_id, contributions=selectors_to_proto(named or ())
        )
        answer = yield from self.context.caller.call(contract.DISCARD_GRADIENTS, request)
        self._updates_of(model_id).model.consume(named)
        return Discarded(answer.contribution_count, answer.tape_count)

    def frame(
        self,
        chunks: Iterable[tuple[SessionView, npt.ArrayLike]],
        *,
        return_hs: ReturnHs = "all",
        train: bool = False,
    ) -> Op[list[Array | errors.Error]]:
        """Apply chunks of many sessions in one message of one stream. See `timernn.Client.frame`."""
        cores = ((view._core, xs) for view, xs in chunks)  # noqa: SLF001  # one package
        return (yield from self.frames.forward(cores, return_hs, train=train))

    # -- without a session -------------------------------------------------------------------------

    @checked
    def forward(
        self,
        model_id: str,
        xs: npt.ArrayLike,
        h0: npt.ArrayLike | None = None,
        *,
        version: Version | None = None,
        return_hs: ReturnHs = "all",
    ) -> Op[Array]:
        """Run a sequence without a session; nothing is left on the server.

        Args:
            model_id: The model.
            xs: Inputs, shape (N, T, D), cast to the model's dtype.
            h0: The first hidden state, shape (N, H); None: zero.
            version: The weights to use; None: the head.
            return_hs: "all" hidden states, the "last" alone, or "none".

        Returns:
            The hidden states, shape (N, T, H), (N, 1, H) or (N, 0, H).
        """
        context = self.context
        bounds = yield from context.bounds()
        model = yield from context.model(model_id)
        array = array_from_caller(xs, "xs", dtype=model.dtype, shape=(None, None, model.input_size))
        rows, H = array.shape[0], model.hidden_size
        first = None if h0 is None else given(h0, "h0", dtype=model.dtype, shape=(rows, H))
        row_bytes = rows * array.itemsize
        pieces = split_steps(
            array.shape[1],
            bounds,
            step_bytes=row_bytes * max(model.input_size, H),
            state_bytes=row_bytes * H,
        )
        hs, state, pinned = [], first, optional(version)
        for cut in pieces:
            is_kept = return_hs == "all" or cut is pieces[-1]
            request = rnn_pb.ForwardRequest(
                model_id=model_id,
                xs=tensor_to_proto(array[:, cut]),
                h0=state,
                pinned_version=pinned,
                return_hs=RETURN_HS[return_hs if is_kept else "none"],
            )
            known = self.context.known.version(model_id)
            if pinned is None and known is not None:
                request.minimum_version.CopyFrom(version_to_proto(known))
            answer = yield from self._stateless(request)
            # All pieces of one sequence run on the same weights.
            state, pinned = answer.h, answer.weights_version
            if answer.HasField("hs"):
                hs.append(tensor_from_proto(answer.hs))
        return join_steps(hs, (rows, 0, H), model.dtype)

    def _stateless(self, request: rnn_pb.ForwardRequest) -> Op[rnn_pb.ForwardResponse]:
        model_id = request.model_id
        caller = self.context.caller
        scope = Scope(model_id, (self._updates_of(model_id).model.journal,))
        healing, deadline = Healing(caller, scope), caller.deadline()
        while True:
            try:
                return (yield from caller.call(contract.FORWARD, request, deadline))
            except errors.Error as error:
                yield from self._recovery.heal(healing, error, deadline=deadline)

    # -- the server --------------------------------------------------------------------------------

    def server_info(self) -> Op[ServerInfo]:
        """Return limits, build and replica of the server in use."""
        answer = yield from self.context.caller.call(
            contract.GET_SERVER_INFO, model_pb.GetServerInfoRequest()
        )
        return server_info_from_proto(answer)

    def ping(self) -> Op[Ping]:
        """Ask the server in use for its health, and measure how long it takes."""
        caller, started = self.context.caller, 0.0
        clock = caller.clock

        def timed(address: int, timeout_s: float) -> RpcCall:
            nonlocal started
            started = clock()
            return RpcCall(contract.HEALTH, None, address, timeout_s)

        serving = yield from caller.attempts(timed)
        address = caller.addresses[caller.address]
        return Ping(serving=serving, latency_s=clock() - started, address=address)


def _wanted(
    on_exists: OnExists, session_id: str | None, *, must_exist: bool
) -> session_pb.OnExists.ValueType:
    """Check what to do with a session that is live, or is not."""
    if must_exist and on_exists not in {"resume", "must_exist"}:
        raise errors.BadField(
            f"on_exists: expected 'must_exist' or none beside must_exist=True, got {on_exists!r}"
        )
    wanted = "must_exist" if must_exist else on_exists
    if wanted == "must_exist" and session_id is None:
        raise errors.BadField(
            "session_id: expected the name of a session that must exist, got None"
        )
    return _ON_EXISTS[wanted]


def _named(contributions: Iterable[Contributions | str] | None) -> list[Contributions] | None:
    if contributions is None:
        return None
    return [Contributions(name) if isinstance(name, str) else name for name in contributions]
