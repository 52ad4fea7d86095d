"""What can be done with one session."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from timernn import errors
from timernn._core.arguments import checked
from timernn._core.contract import (
    CLOSE_SESSION,
    DISCARD_GRADIENTS,
    FORK_SESSION,
    GET_SESSION,
    GET_STATE,
    LIST_WAITING,
)
from timernn._core.convert import (
    array_from_caller,
    duration_to_proto,
    session_from_proto,
    tensor_from_proto,
    tensor_to_proto,
    waiting_from_proto,
)
from timernn._core.healing import Healing, Scope
from timernn._core.ids import new_request_id, new_session_id
from timernn._core.intents import (
    BackwardIntent,
    EpochIntent,
    ForwardIntent,
    require_finite,
)
from timernn._core.moves import Move
from timernn._core.place import SessionPlace
from timernn._core.splitting import split_steps
from timernn.types import Discarded, Step
from timernn.v1 import session_service_pb2 as session_pb
from timernn.v1 import time_rnn_service_pb2 as rnn_pb

if TYPE_CHECKING:
    from collections.abc import Callable
    from datetime import timedelta

    import numpy.typing as npt

    from timernn._core.effects import Op
    from timernn._core.intents import (
        EpochRequest,
        Intent,
        Taped,
    )
    from timernn.types import (
        Array,
        ReturnHs,
        SessionInfo,
        Version,
        Waiting,
    )

_I = TypeVar("_I", bound="Intent[Any, Any]")

RETURN_HS: dict[str, rnn_pb.ReturnHs.ValueType] = {
    "all": rnn_pb.RETURN_HS_ALL,
    "last": rnn_pb.RETURN_HS_LAST,
    "none": rnn_pb.RETURN_HS_NONE,
}


class SessionCore(SessionPlace):
    """A session as this client sees it: its place, and the operations that move it."""

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
            return (yield from self._forward_as(chunk_seq, xs, return_hs, train=train))
        intent = yield from self._carry_out(
            lambda: self.forward_intent(xs, return_hs, train=self.train and train)
        )
        return intent.hs()

    def _forward_as(
        self, chunk_seq: int, xs: npt.ArrayLike, return_hs: ReturnHs, *, train: bool
    ) -> Op[Array]:
        """Apply a chunk under a number, or have it answered again; when refused, nothing has changed."""
        yield from self.settle()
        before = Move(
            chunk_seq=self.chunk_seq,
            state_token=self.state_token,
            _h=self._h,
            version=self.version,
            tapes=self.tapes,
        )
        self.go_back(chunk_seq)
        try:
            return (yield from self.forward(xs, return_hs=return_hs, train=train))
        except BaseException:
            if self.in_doubt:
                self.doubts[0].came_from = before  # should it turn out to be refused
            else:
                self.come_back(before)
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
        intent = yield from self._carry_out(
            lambda: self._backward_intent(
                dhs, dh_next, update, return_dxs=return_dxs, return_gradients=return_gradients
            )
        )
        return intent.dxs()

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
            The new version; `last_update` tells the rest.

        Raises:
            NoGradients: If nothing waits.
        """
        step = Step(lr, clip_norm, reduction)  # type: ignore[arg-type]  # checked where it is used
        self.require_idle()
        result = yield from self.training.update(
            [self], step, expect_known=exclusive, take_waiting=take_waiting
        )
        return result.version

    def discard_gradients(self) -> Op[Discarded]:
        """Drop the contributions and tapes of this session that wait."""
        deadline = self.client.caller.deadline()
        yield from self.settle(deadline)
        request = rnn_pb.DiscardGradientsRequest(
            model_id=self.model.model_id,
            contributions=[rnn_pb.ContributionSelector(session_id=self.session_id)],
        )
        answer = yield from self.client.caller.call(DISCARD_GRADIENTS, request, deadline)
        self.journal.drop_contributions(self.session_id, dict(self._waiting))
        self._waiting.clear()
        self.move(Move(tapes=[]))
        return Discarded(answer.contribution_count, answer.tape_count)

    def get_waiting(self) -> Op[list[Waiting]]:
        """List what waits of this session on the server, in order of its chunks.

        Tapes wait for `backward`, contributions for `update`, also those that a program before this
        one left. A tape is finished by sending its chunk's data again, `forward(xs, chunk_seq=...)`,
        and then `backward`; contributions by `update(take_waiting=True)`; `discard_gradients` drops
        both.
        """
        deadline = self.client.caller.deadline()
        if not self.is_streaming:
            yield from self.settle(deadline)
        # What a lost write has set back would be missing: look, and heal, first.
        look = session_pb.GetSessionRequest(session_id=self.session_id)
        yield from self._read(GET_SESSION, look, deadline)
        return (yield from self._list_waiting(deadline))

    def adopt_waiting(self, deadline: float) -> Op[None]:
        """Note the contributions that the server lists, as if this client had made them."""
        for one in (yield from self._list_waiting(deadline)):
            if one.kind == "contribution":
                self._waiting[one.epoch, one.chunk_seq] = None

    def _list_waiting(self, deadline: float) -> Op[list[Waiting]]:
        request = rnn_pb.ListWaitingRequest(session_id=self.session_id)
        answer = yield from self.client.caller.call(LIST_WAITING, request, deadline)
        return waiting_from_proto(answer)

    @checked
    def get_state(self, *, extend_ttl: bool = False) -> Op[Array]:
        """Read the hidden state from the server, shape (N, H).

        Args:
            extend_ttl: Let the time to live start again.
        """
        deadline = self.client.caller.deadline()
        if not self.is_streaming:
            yield from self.settle(deadline)
        request = session_pb.GetStateRequest(session_id=self.session_id, extend_ttl=extend_ttl)
        answer = yield from self._read(GET_STATE, request, deadline)
        if extend_ttl:
            self.lifetime.renew()
        return tensor_from_proto(answer.state)

    def get_info(self) -> Op[SessionInfo]:
        """Read where the session stands on the server."""
        request = session_pb.GetSessionRequest(session_id=self.session_id)
        answer = yield from self.client.caller.call(GET_SESSION, request)
        return session_from_proto(answer.session)

    def set_state(self, h: npt.ArrayLike) -> Op[None]:
        """Replace the hidden state; a new epoch begins.

        Args:
            h: The new state, shape (N, H).
        """
        shape = (self.batch_size, self.model.hidden_size)
        state = tensor_to_proto(array_from_caller(h, "h", self.model.dtype, shape))
        yield from self._begin_epoch(
            lambda: session_pb.SetStateRequest(
                session_id=self.session_id, state=state, request_id=new_request_id()
            )
        )

    def reset_state(self) -> Op[None]:
        """Set the hidden state to zero; a new epoch begins."""
        yield from self._begin_epoch(
            lambda: session_pb.ResetStateRequest(
                session_id=self.session_id, request_id=new_request_id()
            )
        )

    def _begin_epoch(self, make: Callable[[], EpochRequest]) -> Op[None]:
        # An update may still need this epoch's chunks. Lost ones are healed first, for afterwards
        # they are fenced off; where that cannot be, the new state is set all the same.
        if self.train:
            try:
                yield from self._carry_out(lambda: EpochIntent(self, make(), is_strict=True))
            except errors.HistoryLost:
                pass
            else:
                return
        yield from self._carry_out(lambda: EpochIntent(self, make()))

    @checked
    def fork(
        self, new_id: str | None = None, *, ttl: float | timedelta | None = None
    ) -> Op[SessionCore]:
        """Open another session from this one's present state. See `timernn.Session.fork`."""
        deadline = self.client.caller.deadline()
        yield from self.settle(deadline)
        # A state that a lost write has set back must not be copied: look, and heal, first.
        look = session_pb.GetSessionRequest(session_id=self.session_id)
        yield from self._read(GET_SESSION, look, deadline)
        request = session_pb.ForkSessionRequest(
            session_id=self.session_id,
            new_session_id=new_session_id() if new_id is None else new_id,
            ttl=None if ttl is None else duration_to_proto(ttl),
            request_id=new_request_id(),
        )
        answer = yield from self.client.caller.call(FORK_SESSION, request, deadline)
        fork = SessionCore(self.client, self.model, self.bounds, train=self.train)
        fork.begin(answer.session, answer.state)
        return fork

    def close(self) -> Op[bool]:
        """End the session on the server; closing again is no error.

        Returns:
            Whether this call ended it.
        """
        self.require_idle()
        request = session_pb.CloseSessionRequest(
            session_id=self.session_id, expected_epoch=self.epoch
        )
        try:
            answer = yield from self.client.caller.call(CLOSE_SESSION, request)
        except errors.EpochFenced as error:
            if int(error.metadata.get("epoch", self.epoch)) >= self.epoch:
                raise
            # The store lost our epoch: what is left of the session is ours all the same.
            request.expected_epoch = 0
            answer = yield from self.client.caller.call(CLOSE_SESSION, request)
        except errors.SessionNotFound:
            self.doubts.clear()
            return False
        self.doubts.clear()
        self.training.leave(self)
        return answer.closed

    @checked
    def settle(self, deadline: float | None = None) -> Op[None]:
        """Send again what is in doubt, so that its outcome is known; does nothing otherwise."""
        until = self.client.caller.deadline() if deadline is None else deadline
        yield from self.settle_own(until)
        yield from self.training.settle(until)

    def settle_own(self, deadline: float, *, kept: int = 0) -> Op[list[Intent[Any, Any]]]:
        """Send again what of this session alone is in doubt; an update may join several.

        Args:
            deadline: When to give up, on the client's clock.
            kept: The first ones are asked for by the call under way. They stay in doubt until its
                caller has their outputs, and are sent here only if others stand behind them.

        Returns:
            What is carried out now.
        """
        self.require_idle()
        position = 0
        settled: list[Intent[Any, Any]] = []
        while max(kept, position) < len(self.doubts):
            doubt = self.doubts[position]
            if doubt.is_refused:
                del self.doubts[position]
                continue
            doubt.may_be_applied = True
            yield from self._send(doubt, deadline)
            settled.append(doubt)
            if position < kept:
                position += 1
            else:
                del self.doubts[position]
        return settled

    # -- the making of requests --------------------------------------------------------------------

    def forward_intent(
        self, xs: npt.ArrayLike, return_hs: ReturnHs, *, train: bool
    ) -> ForwardIntent:
        """Cut a sequence into the requests of its chunks, not numbered yet.

        Raises:
            BadField: If tapes are wanted of a session that was not opened to train.
        """
        if train and not self.train:
            raise errors.BadField(
                f"train: session {self.session_id!r} was opened with train=False and keeps no tapes; "
                "open it with train=True"
            )
        model = self.model
        array = array_from_caller(xs, "xs", model.dtype, (self.batch_size, None, model.input_size))
        pieces = self._split(array)
        if train and len(pieces) > self.bounds.tapes_per_session:
            raise errors.MessageTooLarge(
                f"xs: {array.shape[1]} steps take {len(pieces)} messages, but the server keeps "
                f"{self.bounds.tapes_per_session} tapes of a session: use shorter chunks"
            )
        if len(pieces) > 1:
            require_finite(array, "xs")  # else the pieces before it would be applied
        wanted, mode = RETURN_HS[return_hs], rnn_pb.FORWARD_MODE_INFER
        if train:
            mode = rnn_pb.FORWARD_MODE_TRAIN
        between = wanted if return_hs == "all" else rnn_pb.RETURN_HS_NONE
        returns = [between] * (len(pieces) - 1) + [wanted]
        requests = [
            rnn_pb.ForwardRequest(xs=tensor_to_proto(array[:, cut]), mode=mode, return_hs=returned)
            for cut, returned in zip(pieces, returns, strict=True)
        ]
        return ForwardIntent(self, requests)

    def _split(self, array: Array) -> list[slice]:
        row_bytes = self.batch_size * array.itemsize
        widest = max(self.model.input_size, self.model.hidden_size)
        state_bytes = row_bytes * self.model.hidden_size
        return split_steps(array.shape[1], row_bytes * widest, state_bytes, self.bounds)

    def _backward_intent(
        self,
        dhs: npt.ArrayLike,
        dh_next: npt.ArrayLike | None,
        step: Step | None,
        *,
        return_dxs: bool,
        return_gradients: bool,
    ) -> BackwardIntent:
        taped = self._next_tape()
        array = self._whole_dhs(dhs, taped)
        if len(taped.chunks) > 1:
            require_finite(array, "dhs")
        ends = np.cumsum([chunk.steps for chunk in taped.chunks])
        requests = [
            rnn_pb.BackwardRequest(
                session_id=self.session_id,
                epoch=chunk.epoch,
                chunk_seq=chunk.chunk_seq,
                state_token=chunk.token,
                dhs=tensor_to_proto(array[:, end - chunk.steps : end]),
                return_dxs=return_dxs,
                return_gradients=return_gradients,
            )
            for chunk, end in reversed(list(zip(taped.chunks, ends, strict=True)))
        ]
        if dh_next is not None:
            shape = (self.batch_size, self.model.hidden_size)
            state = array_from_caller(dh_next, "dh_next", self.model.dtype, shape)
            requests[0].dh_next.CopyFrom(tensor_to_proto(state))
        if step is not None:
            requests[-1].update.CopyFrom(self._inline_update(taped, step))
        return BackwardIntent(self, taped, requests, step)

    def _next_tape(self) -> Taped:
        """Return the newest tape, or the one of the backward that is in doubt."""
        doubt = self.doubts[0] if self.doubts else None
        if isinstance(doubt, BackwardIntent):
            return doubt.taped
        if not self.tapes:
            raise errors.TapeMissing(
                f"session {self.session_id!r}: no forward in training mode waits for its backward"
                + ("" if self.train else "; open the session with train=True")
            )
        return self.tapes[-1]

    def _whole_dhs(self, dhs: npt.ArrayLike, taped: Taped) -> Array:
        model, steps = self.model, taped.steps
        array = array_from_caller(
            dhs, "dhs", model.dtype, (self.batch_size, None, model.hidden_size)
        )
        if taped.has_last_only and array.shape[1] == 1 and steps > 1:
            whole = np.zeros((self.batch_size, steps, model.hidden_size), array.dtype)
            whole[:, -1] = array[:, 0]
            return whole
        return array_from_caller(array, "dhs", model.dtype, (array.shape[0], steps, None))

    def _inline_update(self, taped: Taped, step: Step) -> rnn_pb.UpdateRequest:
        """Name what waits and what this backward is about to contribute."""
        return self.training.request(self.waiting(*taped.chunks), step)

    # -- the sending -------------------------------------------------------------------------------

    def require_idle(self) -> None:
        """Refuse while a stream uses the session's numbers.

        Raises:
            SessionBusy: If one does.
        """
        if self.is_streaming:
            raise errors.SessionBusy(
                f"session {self.session_id!r} is in use by a stream(); finish or close it first"
            )

    def scope(self) -> Scope:
        """Return what this session's operations depend on."""
        shared = self.training.journal
        journals = (shared,) if self.journal is shared else (shared, self.journal)
        return Scope(self.model.model_id, journals, self.epoch, self.lifetime)

    def _scope_of(self, intent: Intent[Any, Any]) -> Scope:
        """Return what an intent depends on: a new state only on the epoch that it ends.

        Such an epoch can be begun again however much the log has let go.
        """
        if intent.needs_history:
            return self.scope()
        model_id = self.model.model_id
        return Scope(model_id, (), self.epoch, self.lifetime, self.beginning())

    def _carry_out(self, make: Callable[[], _I]) -> Op[_I]:
        """Carry out an intent; finish an earlier one first unless this is the same again."""
        self.require_idle()
        deadline = self.client.caller.deadline()
        intent = self._unless_impossible(make) if self.doubts else None
        if intent is not None:
            intent = self.again(intent)
        if intent is None:
            if self.doubts or self.training.doubt is not None:
                yield from self.settle(deadline)
            intent = make()
        yield from self._finish(intent, deadline)
        return intent

    def _unless_impossible(self, make: Callable[[], _I]) -> _I | None:
        try:
            return make()
        except (errors.TapeMissing, errors.BadTensor):  # its forward may be what is in doubt
            return None

    def _finish(self, intent: Intent[Any, Any], deadline: float) -> Op[None]:
        """Carry out the first of what is in doubt, or what is to be the first."""
        self.doubted(intent)
        yield from self._send(intent, deadline)
        self.doubts.popleft()

    def _send(self, intent: Intent[Any, Any], deadline: float) -> Op[None]:
        """Carry out what is in doubt; it stays there unless it is refused."""
        try:
            yield from self.client.carry_out(intent, lambda: self._scope_of(intent), deadline)
        except errors.Error as error:
            self.failed(intent, error)
            raise

    def _read(self, rpc: Any, request: Any, deadline: float) -> Op[Any]:
        """Make a call that tells where the session stands, and heal it if it has gone back."""
        healing = Healing(self.client.caller, self.scope())
        while True:
            try:
                answer = yield from self.client.caller.call(rpc, request, deadline)
                self._check_place(answer.session)
            except errors.Error as error:
                yield from healing.after(error, deadline)
            else:
                return answer

    def _check_place(self, session: session_pb.Session) -> None:
        stored, mine = (session.epoch, session.chunk_seq), (self.epoch, self.chunk_seq)
        if stored < mine:
            raise errors.SeqGap(
                f"the store is at chunk {stored[1]} of epoch {stored[0]}, "
                f"this client at {mine[1]} of {mine[0]}",
                metadata={"epoch": str(stored[0]), "expected_seq": str(stored[1] + 1)},
            )
        if stored == mine and session.state_token != self.state_token:
            raise errors.HistoryForked(
                "another writer uses this session: it has applied other chunks"
            )
