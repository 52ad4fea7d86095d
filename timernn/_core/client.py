"""What a client can ask that is not one session's, and what its sessions share."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from timernn import errors
from timernn._core import arguments, contract
from timernn._core.ages import Lifetime
from timernn._core.arguments import checked, checked_with
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
from timernn._core.effects import Call
from timernn._core.frame import Frames
from timernn._core.healing import Healing, Scope
from timernn._core.ids import new_request_id, new_session_id
from timernn._core.intents import Memory, wants_less
from timernn._core.journal import Shelf
from timernn._core.models import ModelsCore, given, optional
from timernn._core.refusals import Proof, proof_of
from timernn._core.session import RETURN_HS, SessionCore
from timernn._core.splitting import Bounds, split_steps
from timernn._core.training import Training
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
    from timernn._core.intents import Intent
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

MEMORY_OF_STEPS = 2  # a request id and a counted name are remembered for so many times tape_ttl

_ON_EXISTS = {
    "resume": session_pb.ON_EXISTS_RESUME,
    "fail": session_pb.ON_EXISTS_FAIL,
    "reset": session_pb.ON_EXISTS_RESET,
    "must_exist": session_pb.ON_EXISTS_MUST_EXIST,
}


class ClientCore(ModelsCore):
    """One client: its sessions, what they share, and every call that is not one session's."""

    def __init__(self, addresses: list[str], options: Options) -> None:
        super().__init__(addresses, options)
        self.frames = Frames(self)
        self.shelf = Shelf(options.log_total_bytes)
        self._trainings: dict[str, Training] = {}
        self._bounds: Bounds | None = None

    # -- what sessions share -----------------------------------------------------------------------

    def training(self, model_id: str) -> Training:
        """Return what the training sessions of a model share."""
        if model_id not in self._trainings:
            self._trainings[model_id] = Training(self, model_id)
        return self._trainings[model_id]

    def bounds(self) -> Op[Bounds]:
        """Return the server's limits; asked for once."""
        if self._bounds is None:
            answer = yield from self.caller.call(
                contract.GET_SERVER_INFO, model_pb.GetServerInfoRequest()
            )
            self._bounds = Bounds.from_limits(answer.limits, self.options.max_message_bytes)
        return self._bounds

    def own(self, name: str, sessions: Iterable[SessionView]) -> list[Any]:
        """Return sessions as a list; before their locks are taken, which differ from face to face.

        Raises:
            BadField: If one is no session, or of another client: two would use its numbers.
        """
        items = arguments.sessions(name, sessions)
        for index, session in enumerate(items):
            if session._core.client is not self:  # noqa: SLF001  # one package
                raise arguments.refusal(f"{name}[{index}]", "a session of this client", session)
        return items

    def carry_out(
        self, intent: Intent[Any, Any], scope_of: Callable[[], Scope], deadline: float
    ) -> Op[None]:
        """Send an intent's requests in order, healing what was lost on the way.

        Args:
            intent: What to send.
            scope_of: Returns what it depends on; asked only where something went wrong.
            deadline: When all has to be over, on the caller's clock.
        """
        healing: Healing | None = None
        intent.apply()  # of an answer that was noted when an interrupt came
        while not intent.is_done:
            if intent.step() is not None:
                yield from self._require_remembered(intent)
            request = intent.prepare()
            try:
                answer = yield from self.caller.call(intent.rpc, request, deadline)
            except errors.Error as error:
                # An attempt before the loss may have written to the other slot, and still count there.
                intent.may_be_applied |= error._had_unknown_attempt  # noqa: SLF001  # one package
                if proof_of(error) is Proof.REQUEST:
                    yield from self._require_remembered(intent)
                scope = scope_of()
                healing = healing or Healing(self.caller, scope)
                yield from self.heal(healing, error, scope, deadline, request)
            else:
                intent.accept(answer)

    def _require_remembered(self, intent: Intent[Any, Any]) -> Op[None]:
        """Refuse to ask for a step again of which the server may have forgotten that it was made.

        It would be refused, and taken for not made. While the head is the one from before it was first
        sent, it was not made, and asking is safe.

        Raises:
            OutcomeLost: If it is too late to find out.
        """
        step = intent.step()
        if step is None:
            return
        if intent.memory is None:
            bounds = yield from self.bounds()
            lifetime = Lifetime(self.ages, MEMORY_OF_STEPS * bounds.tape_ttl_s)
            intent.memory = Memory(lifetime, self.known(step.model_id))
        elif intent.may_be_applied and intent.memory.lifetime.is_over:
            head = (yield from self.get_model(step.model_id)).head
            if intent.memory.may_have_missed(head):
                raise errors.OutcomeLost(
                    f"model {step.model_id!r}: a step was sent {intent.memory.lifetime.age_s:.0f} s ago, its "
                    f"answer was lost, and the head is version {head.number} by now; whether this step is "
                    "one of those that led to it is not remembered any more. What still waits stands in "
                    "session.waiting",
                    metadata={"head": str(head.number)},
                )

    def heal(
        self,
        healing: Healing,
        error: errors.Error,
        scope: Scope,
        deadline: float,
        request: Any = None,
    ) -> Op[None]:
        """Make a request ready to be sent again: heal what an error is a sign of, or ask for less.

        Raises:
            Error: The given one, or what healing ended with, if nothing helps.
        """
        if wants_less(request, error):
            return
        try:
            yield from healing.after(error, deadline, request)
        except (errors.VersionGone, errors.WeightsForked):
            # Told once. Asking for a version that nobody can bring back would fail for ever.
            self._known.pop(scope.model_id, None)
            raise

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
        """Open a session, or go on with a live one; `resumed` tells which it was. See `timernn.Client.session`."""
        wanted = _wanted(on_exists, session_id, must_exist=must_exist)
        bounds = yield from self.bounds()
        model = yield from self.model(model_id)
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
                given(initial_state, "initial_state", model.dtype, shape)
            )
        try:
            answer = yield from self.caller.call(contract.OPEN_SESSION, request)
        except errors.NotFound:
            self.forget(model_id)
            raise
        session = SessionCore(self, model, bounds, train=train)
        session.begin(answer.session, answer.state)
        session.resumed = answer.resumed
        return session

    @checked
    def get_session(self, session_id: str) -> Op[SessionInfo]:
        """Return one session as it stands, without opening it."""
        request = session_pb.GetSessionRequest(session_id=session_id)
        answer = yield from self.caller.call(contract.GET_SESSION, request)
        return session_from_proto(answer.session)

    @checked_with(model_id=arguments.optional(arguments.CHECKS["model_id"]))
    def sessions_page(
        self, model_id: str | None, page_size: int, page_token: str
    ) -> Op[tuple[list[SessionInfo], str]]:
        """Return a page of live sessions and the token of the next."""
        request = session_pb.ListSessionsRequest(
            model_id=model_id or "", page_size=page_size, page_token=page_token
        )
        answer = yield from self.caller.call(contract.LIST_SESSIONS, request)
        return [session_from_proto(session) for session in answer.sessions], answer.next_page_token

    @checked
    def close_session(self, session_id: str) -> Op[bool]:
        """End a session by name; returns whether this call ended it."""
        request = session_pb.CloseSessionRequest(session_id=session_id)
        answer = yield from self.caller.call(contract.CLOSE_SESSION, request)
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
                yield from self._update_waiting(model_id, contributions, step, expected_version)
            )
        cores = [session._core for session in sessions]  # noqa: SLF001  # one package
        for core in cores:
            core.require_idle()
            if core.model.model_id != model_id:
                raise errors.BadField(f"sessions: {core.session_id!r} runs another model")
        if expected_version is not None:
            self.set_known(model_id, expected_version)
        training = self.training(model_id)
        return (
            yield from training.update(cores, step, expect_known=True, take_waiting=take_waiting)
        )

    def _update_waiting(
        self,
        model_id: str,
        contributions: Iterable[Contributions | str] | None,
        step: Step,
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
        answer = yield from self.caller.call(contract.UPDATE, request)
        self.training(model_id).consumed(named)
        self.made(model_id, answer.version)
        return update_from_proto(answer)

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
        answer = yield from self.caller.call(contract.DISCARD_GRADIENTS, request)
        self.training(model_id).consumed(named)
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
        bounds = yield from self.bounds()
        model = yield from self.model(model_id)
        array = array_from_caller(xs, "xs", model.dtype, (None, None, model.input_size))
        rows, H = array.shape[0], model.hidden_size
        first = None if h0 is None else given(h0, "h0", model.dtype, (rows, H))
        row_bytes = rows * array.itemsize
        pieces = split_steps(
            array.shape[1], row_bytes * max(model.input_size, H), row_bytes * H, bounds
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
            known = self.known(model_id)
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
        scope = Scope(model_id, (self.training(model_id).journal,))
        healing, deadline = Healing(self.caller, scope), self.caller.deadline()
        while True:
            try:
                return (yield from self.caller.call(contract.FORWARD, request, deadline))
            except errors.Error as error:
                yield from self.heal(healing, error, scope, deadline)

    # -- the server --------------------------------------------------------------------------------

    def server_info(self) -> Op[ServerInfo]:
        """Return limits, build and replica of the server in use."""
        answer = yield from self.caller.call(
            contract.GET_SERVER_INFO, model_pb.GetServerInfoRequest()
        )
        return server_info_from_proto(answer)

    def ping(self) -> Op[Ping]:
        """Ask the server in use for its health, and measure how long it takes."""
        clock, started = self.caller.clock, 0.0

        def timed(address: int, timeout_s: float) -> Call:
            nonlocal started
            started = clock()
            return Call(contract.HEALTH, None, address, timeout_s)

        serving = yield from self.caller.attempts(timed)
        address = self.caller.addresses[self.caller.address]
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
