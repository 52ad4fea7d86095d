"""What can be done with one session."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

from timernn import errors
from timernn._core.arguments import checked
from timernn._core.contract import (
    CLOSE_SESSION,
    DISCARD_GRADIENTS,
    FORK_SESSION,
    GET_SESSION,
    GET_STATE,
)
from timernn._core.convert import (
    array_from_caller,
    duration_to_proto,
    session_from_proto,
    tensor_from_proto,
    tensor_to_proto,
)
from timernn._core.doubts import Doubts
from timernn._core.healing import Healing
from timernn._core.ids import new_request_id, new_session_id
from timernn._core.intents import BackwardIntent, EpochIntent
from timernn._core.requests import backward_requests, forward_intent
from timernn._core.updates import list_waiting
from timernn.types import Discarded, Step
from timernn.v1 import session_service_pb2 as session_pb
from timernn.v1 import time_rnn_service_pb2 as rnn_pb

if TYPE_CHECKING:
    from collections.abc import Callable
    from datetime import timedelta

    import numpy.typing as npt

    from timernn._core.context import ClientContext
    from timernn._core.effects import Op
    from timernn._core.intents import EpochRequest, Intent
    from timernn._core.recovery import Recovery
    from timernn._core.session_state import SessionState, Taped
    from timernn._core.updates import Updates
    from timernn.types import Array, ReturnHs, SessionInfo, Version, Waiting

AnyIntent = TypeVar("AnyIntent", bound="Intent[Any, Any]")


class SessionCore:
    """A session as this client sees it: each operation is a generator of effects.

    Args:
        context: How calls are made.
        recovery: Sends intents.
        updates: The model's steps.
        state: Where the session stands.

    Attributes:
        doubts: What it has begun and not handed out.
    """

    def __init__(
        self, context: ClientContext, recovery: Recovery, *, updates: Updates, state: SessionState
    ) -> None:
        self.context, self.recovery, self.updates, self.state = context, recovery, updates, state
        self.doubts = Doubts(state, updates.model, recovery=recovery, step=updates.in_doubt)

    @checked
    def forward(
        self,
        xs: npt.ArrayLike,
        *,
        return_hs: ReturnHs = "all",
        train: bool = True,
        chunk_seq: int | None = None,
    ) -> Op[Array]:
        """Apply the next time steps to the session's state.

        A sequence too long for one message is cut along T into several chunks, with the same
        result. A call whose outcome is unknown (time over, cancelled) is finished by calling
        again with the same data; with other data, the earlier chunk is applied first.

        Args:
            xs: Inputs, shape (N, T, D), of any real type; cast to the model's dtype.
            return_hs: "all" hidden states, the "last" alone, or "none".
            train: False: leave no tape for `backward`, on a session that was opened to train.
            chunk_seq: Its number; None: the next one. For a program that was killed: a chunk that has
                been applied under this number is answered again, and the session goes on from it.

        Returns:
            The hidden states, shape (N, T, H), (N, 1, H) or (N, 0, H), the caller's own memory.

        Raises:
            SeqGap: If chunk_seq is beyond the next.
            SeqReused: If other data was applied under chunk_seq.
            ReplayWindowPassed: If all of it is applied, but too long ago for its outputs to be had
                again, as after an answer that was lost; the next call goes on behind it.
        """
        if chunk_seq is not None:
            again = self.forward(xs, return_hs=return_hs, train=train)
            return (yield from self._standing_before(chunk_seq, again))
        state = self.state
        intent = yield from self._carry_out(
            lambda: forward_intent(state, xs, return_hs, train=state.train and train)
        )
        return intent.hs()

    def _standing_before(self, chunk_seq: int, forward: Op[Array]) -> Op[Array]:
        """Go back before a chunk and apply it, or have it answered again; refused, nothing has changed."""
        yield from self.settle()
        before = self.state.position()
        self.state.go_back(chunk_seq)
        try:
            return (yield from forward)
        except BaseException:
            first = self.doubts.first
            if first is not None and self.doubts.is_any:
                first.came_from = before  # should it turn out to be refused
            else:
                self.state.come_back(before)
            raise

    @checked
    def backward(
        self,
        dhs: npt.ArrayLike,
        dh_next: npt.ArrayLike | None = None,
        *,
        return_dxs: bool = True,
        return_gradients: bool = False,
        update: Step | None = None,
    ) -> Op[Array]:
        """Compute the gradients of the newest `forward` that has none yet.

        They are left on the server as a contribution for the next `update`. `dh` is the gradient
        of the state before the chunk afterwards, `gradient_norm` that of the weights' gradients.

        Args:
            dhs: Gradient of the loss with respect to hs, shape (N, T, H); shape (N, 1, H) after
                a forward with return_hs="last".
            dh_next: Gradient arriving at the last hidden state, shape (N, H): the `dh` of the
                chunk after this one for BPTT over chunks; None truncates.
            return_dxs: Return the gradient of the inputs.
            return_gradients: Fetch the weights' gradients too, into `gradients`.
            update: Make an optimizer step in the same call, over all that waits of this session.

        Returns:
            The gradient of the inputs, shape (N, T, D); (N, 0, D) when not asked for.

        Raises:
            TapeMissing: If no forward in training mode waits.
        """
        deadline = self.context.caller.deadline()
        carried_out = self._carry_out(
            lambda: self._backward_intent(
                dhs,
                dh_next=dh_next,
                step=update,
                return_dxs=return_dxs,
                return_gradients=return_gradients,
            ),
            deadline,
        )
        if update is not None:  # the head that it expects is the one that the step before has made
            carried_out = self.updates.in_turn(carried_out, deadline)
        intent = yield from carried_out
        return intent.dxs()

    def _backward_intent(
        self,
        dhs: npt.ArrayLike,
        *,
        dh_next: npt.ArrayLike | None,
        step: Step | None,
        return_dxs: bool,
        return_gradients: bool,
    ) -> BackwardIntent:
        state, model = self.state, self.state.model
        taped = self._next_tape()
        requests = backward_requests(state, taped, dhs)
        for request in requests:
            request.return_dxs, request.return_gradients = return_dxs, return_gradients
        if dh_next is not None:
            shape = (state.batch_size, model.hidden_size)
            arriving = array_from_caller(dh_next, "dh_next", dtype=model.dtype, shape=shape)
            requests[0].dh_next.CopyFrom(tensor_to_proto(arriving))
        if step is not None:  # over what waits and what this backward is about to contribute
            named = state.contributions(*taped.chunks)
            requests[-1].update.CopyFrom(self.updates.model.update_request(named, step))
        return BackwardIntent(state, taped, requests, model=self.updates.model, step=step)

    def _next_tape(self) -> Taped:
        """Return the newest tape, or the one of the backward that is in doubt."""
        doubt, state = self.doubts.first, self.state
        if isinstance(doubt, BackwardIntent):
            return doubt.taped
        if not state.tapes:
            raise errors.TapeMissing(
                f"session {state.session_id!r}: no forward in training mode waits for its backward"
                + ("" if state.train else "; open the session with train=True")
            )
        return state.tapes[-1]

    @checked
    def update(
        self,
        *,
        lr: float | None = None,
        clip_norm: float = 0.0,
        reduction: str = "sum",
        exclusive: bool = True,
        take_waiting: bool = False,
    ) -> Op[Version]:
        """Make an optimizer step of what this session contributed since the last one.

        Args:
            lr: Learning rate of this step only; None: the optimizer's.
            clip_norm: Scale the joined gradient down to this global norm; 0: off.
            reduction: "sum" or "mean" over the contributions.
            exclusive: Refuse with VersionConflict if anybody else has made a step meanwhile.
            take_waiting: Take what waits of this session on the server too, whichever program
                contributed it: what `waiting` lists.

        Returns:
            The new version; `last_update` has the rest.

        Raises:
            NoGradients: If nothing waits.
        """
        step = Step(lr, clip_norm, reduction)  # type: ignore[arg-type]  # checked where it is used
        self.state.require_idle()
        result = yield from self.updates.update(
            [self.doubts], step, expect_known=exclusive, take_waiting=take_waiting
        )
        return result.version

    def discard_gradients(self) -> Op[Discarded]:
        """Drop the contributions and tapes of this session that wait."""
        deadline = self.context.caller.deadline()
        yield from self.settle(deadline)
        request = rnn_pb.DiscardGradientsRequest(
            model_id=self.state.model.model_id,
            contributions=[rnn_pb.ContributionSelector(session_id=self.state.session_id)],
        )
        answer = yield from self.context.caller.call(DISCARD_GRADIENTS, request, deadline)
        self.state.discard()
        return Discarded(answer.contribution_count, answer.tape_count)

    def get_waiting(self) -> Op[list[Waiting]]:
        """List what waits of this session on the server, in order of its chunks.

        Tapes wait for `backward`, contributions for `update`, also those that a program before this
        one left. A tape is finished by sending its chunk's data again, `forward(xs, chunk_seq=...)`,
        and then `backward`; contributions by `update(take_waiting=True)`; `discard_gradients` drops
        both.
        """
        deadline = self.context.caller.deadline()
        if not self.state.is_streaming:
            yield from self.settle(deadline)
        yield from self._heal_if_behind(deadline)  # what a lost write has set back would be missing
        return (yield from list_waiting(self.context, self.state.session_id, deadline))

    @checked
    def get_state(self, *, extend_ttl: bool = False) -> Op[Array]:
        """Read the hidden state from the server, shape (N, H).

        Args:
            extend_ttl: Let the time to live start again.
        """
        deadline = self.context.caller.deadline()
        if not self.state.is_streaming:
            yield from self.settle(deadline)
        request = session_pb.GetStateRequest(
            session_id=self.state.session_id, extend_ttl=extend_ttl
        )
        answer = yield from self._read(GET_STATE, request, deadline)
        if extend_ttl:
            self.state.lifetime.renew()
        return tensor_from_proto(answer.state)

    def get_info(self) -> Op[SessionInfo]:
        """Read where the session stands on the server."""
        request = session_pb.GetSessionRequest(session_id=self.state.session_id)
        answer = yield from self.context.caller.call(GET_SESSION, request)
        return session_from_proto(answer.session)

    def set_state(self, h: npt.ArrayLike) -> Op[None]:
        """Replace the hidden state; a new epoch begins.

        Args:
            h: The new state, shape (N, H).
        """
        session_id, model = self.state.session_id, self.state.model
        shape = (self.state.batch_size, model.hidden_size)
        state = tensor_to_proto(array_from_caller(h, "h", dtype=model.dtype, shape=shape))
        yield from self._begin_epoch(
            lambda: session_pb.SetStateRequest(
                session_id=session_id, state=state, request_id=new_request_id()
            )
        )

    def reset_state(self) -> Op[None]:
        """Set the hidden state to zero; a new epoch begins."""
        yield from self._begin_epoch(
            lambda: session_pb.ResetStateRequest(
                session_id=self.state.session_id, request_id=new_request_id()
            )
        )

    def _begin_epoch(self, make: Callable[[], EpochRequest]) -> Op[None]:
        # An update may still need this epoch's chunks. Lost ones are healed first, for afterwards
        # they are fenced off; where that cannot be, the new state is set all the same.
        state = self.state
        if state.train:
            try:
                yield from self._carry_out(lambda: EpochIntent(state, make(), is_strict=True))
            except errors.HistoryLost:
                pass
            else:
                return
        yield from self._carry_out(lambda: EpochIntent(state, make()))

    @checked
    def fork(
        self, new_id: str | None = None, *, ttl: float | timedelta | None = None
    ) -> Op[SessionCore]:
        """Open another session from this one's present state. See `timernn.Session.fork`."""
        deadline, state = self.context.caller.deadline(), self.state
        yield from self.settle(deadline)
        yield from self._heal_if_behind(
            deadline
        )  # no state that a lost write has set back is copied
        request = session_pb.ForkSessionRequest(
            session_id=state.session_id,
            new_session_id=new_session_id() if new_id is None else new_id,
            ttl=None if ttl is None else duration_to_proto(ttl),
            request_id=new_request_id(),
        )
        answer = yield from self.context.caller.call(FORK_SESSION, request, deadline)
        forked = self.updates.model.new_session(state.model, state.bounds, train=state.train)
        forked.begin(answer.session, answer.state)
        return SessionCore(self.context, self.recovery, updates=self.updates, state=forked)

    def close(self) -> Op[bool]:
        """End the session on the server; closing again is no error.

        Returns:
            Whether this call ended it.
        """
        caller, epoch = self.context.caller, self.state.epoch
        self.state.require_idle()
        request = session_pb.CloseSessionRequest(
            session_id=self.state.session_id, expected_epoch=epoch
        )
        try:
            answer = yield from caller.call(CLOSE_SESSION, request)
        except errors.EpochFenced as error:
            if int(error.metadata.get("epoch", epoch)) >= epoch:
                raise
            # The store lost our epoch: what is left of the session is ours all the same.
            request.expected_epoch = 0
            answer = yield from caller.call(CLOSE_SESSION, request)
        except errors.SessionNotFound:
            self.doubts.clear()
            return False
        self.doubts.clear()
        self.updates.model.leave(self.state)
        return answer.closed

    @checked
    def settle(self, deadline: float | None = None) -> Op[None]:
        """Send again what is in doubt, so that its outcome is known; does nothing otherwise.

        Every other call does so by itself before it sends anything. To be called where the next chunk
        may by chance hold the same data as the one in doubt, and would be taken for it.

        Args:
            deadline: When to give up, on the client's clock; None: after the client's timeout.
        """
        until = self.context.caller.deadline() if deadline is None else deadline
        yield from self.doubts.settle(until)
        yield from self.updates.settle(until)

    # -- inner parts ---------------------------------------------------------------------------------

    def _carry_out(
        self, make: Callable[[], AnyIntent], deadline: float | None = None
    ) -> Op[AnyIntent]:
        """Carry out an intent; finish an earlier one first unless this is the same again."""
        self.state.require_idle()
        doubts = self.doubts
        deadline = self.context.caller.deadline() if deadline is None else deadline
        intent = self._unless_impossible(make) if doubts else None
        if intent is not None:
            intent = doubts.again(intent)
        if intent is None:
            if doubts or self.updates.is_in_doubt:
                yield from self.settle(deadline)
            intent = make()
        yield from doubts.finish(intent, deadline)
        return intent

    def _unless_impossible(self, make: Callable[[], AnyIntent]) -> AnyIntent | None:
        try:
            return make()
        except (errors.TapeMissing, errors.BadTensor):  # its forward may be what is in doubt
            return None

    def _heal_if_behind(self, deadline: float) -> Op[None]:
        """Read where the session stands on the server, and heal it if it has gone back."""
        request = session_pb.GetSessionRequest(session_id=self.state.session_id)
        yield from self._read(GET_SESSION, request, deadline)

    def _read(self, rpc: Any, request: Any, deadline: float) -> Op[Any]:
        """Make a call whose answer says where the session stands, and heal it if it has gone back."""
        caller = self.context.caller
        healing = Healing(caller, self.doubts.scope())
        while True:
            try:
                answer = yield from caller.call(rpc, request, deadline)
                self._require_in_step(answer.session)
            except errors.Error as error:
                yield from healing.after(error, deadline)
            else:
                return answer

    def _require_in_step(self, session: session_pb.Session) -> None:
        """Refuse a stored session that is behind this one, or that others have moved on.

        Raises:
            SeqGap: If it is behind.
            HistoryForked: If other chunks were applied.
        """
        state = self.state
        stored, mine = (session.epoch, session.chunk_seq), (state.epoch, state.chunk_seq)
        if stored < mine:
            raise errors.SeqGap(
                f"the store is at chunk {stored[1]} of epoch {stored[0]}, "
                f"this client at {mine[1]} of {mine[0]}",
                metadata={"epoch": str(stored[0]), "expected_seq": str(stored[1] + 1)},
            )
        if stored == mine and session.state_token != state.state_token:
            raise errors.HistoryForked(
                "another writer uses this session: it has applied other chunks"
            )
