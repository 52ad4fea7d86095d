"""What a client can ask that is not one session's, and what its sessions share."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from timernn import errors
from timernn._core import contract
from timernn._core.convert import (
    array_from_caller,
    checkpoint_from_proto,
    duration_to_proto,
    join_steps,
    model_from_proto,
    reduction_to_proto,
    selectors_to_proto,
    server_info_from_proto,
    session_from_proto,
    tensor_from_proto,
    tensor_to_proto,
    update_from_proto,
    version_from_proto,
    version_to_proto,
)
from timernn._core.effects import Call, Download, Upload
from timernn._core.frame import Frames
from timernn._core.ids import new_request_id, new_session_id
from timernn._core.journal import Healing, Scope
from timernn._core.retry import Caller, RetryPolicy
from timernn._core.session import RETURN_HS, SessionCore
from timernn._core.splitting import Bounds, split_steps
from timernn._core.training import Training
from timernn._core.weights import (
    parts,
    read_file,
    weights_from_file,
    weights_to_file,
    write_file,
)
from timernn.optimizers import optimizer_to_proto
from timernn.types import (
    Contributions,
    Discarded,
    Ping,
    Step,
)
from timernn.v1 import model_service_pb2 as model_pb
from timernn.v1 import session_service_pb2 as session_pb
from timernn.v1 import tensor_pb2 as tensor_pb
from timernn.v1 import time_rnn_service_pb2 as rnn_pb

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from datetime import timedelta

    import numpy.typing as npt

    from timernn._core.convert import (
        DTypeName,
    )
    from timernn._core.effects import Op
    from timernn._core.intents import Intent
    from timernn._core.views import SessionView
    from timernn._core.weights import (
        WeightsFile,
    )
    from timernn.optimizers import Optimizer
    from timernn.types import (
        Array,
        CheckpointInfo,
        ModelInfo,
        OnExists,
        Reduction,
        ReturnHs,
        ServerInfo,
        SessionInfo,
        UpdateResult,
        Version,
        Weights,
    )

_ON_EXISTS = {
    "resume": session_pb.ON_EXISTS_RESUME,
    "fail": session_pb.ON_EXISTS_FAIL,
    "reset": session_pb.ON_EXISTS_RESET,
}
_DTYPES = {"float32": tensor_pb.D_TYPE_FLOAT32, "float64": tensor_pb.D_TYPE_FLOAT64}


@dataclass(frozen=True, slots=True)
class Options:
    """How a client behaves; the arguments of `connect`.

    Attributes:
        timeout_s: For one call with all its attempts.
        connect_timeout_s: The same until something has answered for the first time.
        retry: How failed calls are tried again.
        log_limit: Answered operations kept for healing, a session.
        log_bytes: Their bytes, a session; for training sessions, all of one model together.
        max_message_bytes: Largest message either way.
    """

    timeout_s: float = 60.0
    connect_timeout_s: float = 10.0
    retry: RetryPolicy = field(default_factory=RetryPolicy)
    log_limit: int = 64
    log_bytes: int = 16 << 20
    max_message_bytes: int = 16 << 20


class ClientCore:
    """One client: its addresses, what it knows of models, and every call that is not a session's."""

    def __init__(self, addresses: list[str], options: Options) -> None:
        self.options = options
        self.caller = Caller(addresses, options.timeout_s, options.connect_timeout_s, options.retry)
        self.frames = Frames(self)
        self._known: dict[str, Version] = {}
        self._trainings: dict[str, Training] = {}
        self._models: dict[str, ModelInfo] = {}
        self._bounds: Bounds | None = None

    # -- what sessions share -----------------------------------------------------------------------

    def known(self, model_id: str) -> Version | None:
        """Return the highest version of a model that this client has seen."""
        return self._known.get(model_id)

    def note_version(self, model_id: str, version: Version) -> None:
        """Note a version that an answer named."""
        known = self._known.get(model_id)
        if known is None or version.number > known.number:
            self._known[model_id] = version

    def set_known(self, model_id: str, version: Version) -> None:
        """Note a version that this client has just made."""
        self._known[model_id] = version

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

    def carry_out(self, intent: Intent[Any], scope: Scope, deadline: float) -> Op[None]:
        """Send an intent's requests in order, healing what was lost on the way."""
        healing = Healing(self.caller, scope)
        while intent.done < len(intent.requests):
            request = intent.prepare()
            try:
                answer = yield from self.caller.call(intent.rpc, request, deadline)
            except errors.Error as error:
                yield from self.heal(healing, error, scope, deadline)
            else:
                intent.accept(answer)

    def heal(
        self, healing: Healing, error: errors.Error, scope: Scope, deadline: float
    ) -> Op[None]:
        """Heal what an error is a sign of, or raise it."""
        try:
            yield from healing.after(error, deadline)
        except (errors.VersionGone, errors.WeightsForked):
            # Told once. Asking for a version that nobody can bring back would fail for ever.
            self._known.pop(scope.model_id, None)
            raise

    # -- models ------------------------------------------------------------------------------------

    def create_model(
        self,
        model_id: str,
        *,
        input_size: int,
        hidden_size: int,
        dtype: DTypeName = "float32",
        optimizer: Optimizer | None = None,
        seed: int | None = None,
        Wx: npt.ArrayLike | None = None,
        Wh: npt.ArrayLike | None = None,
        b: npt.ArrayLike | None = None,
    ) -> Op[ModelInfo]:
        """Create a model with weights drawn from a seed, or given.

        Args:
            model_id: Its name.
            input_size: D.
            hidden_size: H.
            dtype: Element type of weights, states and chunks.
            optimizer: What `update` applies; None: plain gradient descent.
            seed: Draw Wx and Wh from it, b is zero; None: 0, unless weights are given.
            Wx: Input weights, shape (D, H); all three or none.
            Wh: Recurrent weights, shape (H, H).
            b: Bias, shape (H,).
        """
        if dtype not in _DTYPES:
            raise errors.BadField(f"dtype: expected 'float32' or 'float64', got {dtype!r}")
        spec = model_pb.ModelSpec(
            model_id=model_id,
            input_size=input_size,
            hidden_size=hidden_size,
            dtype=_DTYPES[dtype],
            optimizer=None if optimizer is None else optimizer_to_proto(optimizer),
        )
        request = model_pb.CreateModelRequest(spec=spec, request_id=new_request_id())
        given = (Wx, Wh, b)
        if all(w is None for w in given):
            request.seed = 0 if seed is None else seed
        elif Wx is None or Wh is None or b is None or seed is not None:
            raise errors.BadField("weights: expected a seed alone, or all of Wx, Wh and b")
        else:
            D, H = input_size, hidden_size
            request.given.wx.CopyFrom(_given(Wx, "Wx", dtype, (D, H)))
            request.given.wh.CopyFrom(_given(Wh, "Wh", dtype, (H, H)))
            request.given.b.CopyFrom(_given(b, "b", dtype, (H,)))
        answer = yield from self.caller.call(contract.CREATE_MODEL, request)
        self._forget(model_id)
        return self._noted(answer.model)

    def get_model(self, model_id: str) -> Op[ModelInfo]:
        """Return one model as it stands."""
        request = model_pb.GetModelRequest(model_id=model_id)
        answer = yield from self.caller.call(contract.GET_MODEL, request)
        return self._noted(answer.model)

    def models_page(self, page_size: int, page_token: str) -> Op[tuple[list[ModelInfo], str]]:
        """Return a page of models and the token of the next."""
        request = model_pb.ListModelsRequest(page_size=page_size, page_token=page_token)
        answer = yield from self.caller.call(contract.LIST_MODELS, request)
        return [model_from_proto(model) for model in answer.models], answer.next_page_token

    def delete_model(self, model_id: str, *, missing_ok: bool = False) -> Op[bool]:
        """Delete a model with its versions and checkpoints; its sessions cannot go on.

        Args:
            model_id: Its name.
            missing_ok: No error if there is none.

        Returns:
            Whether this call deleted it.
        """
        request = model_pb.DeleteModelRequest(model_id=model_id, allow_missing=missing_ok)
        try:
            answer = yield from self.caller.call(contract.DELETE_MODEL, request)
        except errors.ModelNotFound as error:
            if not error.is_outcome_unknown:
                raise
            self._forget(model_id)
            return True  # an attempt whose answer was lost has done it
        self._forget(model_id)
        return answer.deleted

    # -- weights -----------------------------------------------------------------------------------

    def get_weights(
        self, model_id: str, version: Version | None = None, *, include_moments: bool = False
    ) -> Op[Weights]:
        """Fetch a version's weights.

        Args:
            model_id: The model.
            version: Which; None: the head.
            include_moments: The optimizer's state too; head and checkpoints have it.
        """
        data, got = yield from self._download(model_id, version, include_moments=include_moments)
        return weights_from_file(data, got)

    def put_weights(
        self,
        model_id: str,
        *,
        Wx: npt.ArrayLike,
        Wh: npt.ArrayLike,
        b: npt.ArrayLike,
        expected_version: Version | None = None,
    ) -> Op[Version]:
        """Make these weights the model's next version; the optimizer starts anew.

        Args:
            model_id: The model.
            Wx: Input weights, shape (D, H).
            Wh: Recurrent weights, shape (H, H).
            b: Bias, shape (H,).
            expected_version: Refuse with VersionConflict unless the head is this one.
        """
        model = yield from self.model(model_id)
        D, H, dtype = model.input_size, model.hidden_size, model.dtype
        data = weights_to_file(
            array_from_caller(Wx, "Wx", dtype, (D, H)),
            array_from_caller(Wh, "Wh", dtype, (H, H)),
            array_from_caller(b, "b", dtype, (H,)),
        )
        return (yield from self._upload(model_id, data, expected_version))

    def export_weights(
        self,
        model_id: str,
        target: WeightsFile,
        *,
        version: Version | None = None,
        include_moments: bool = False,
    ) -> Op[Version]:
        """Write a version's weights to a safetensors file.

        Args:
            model_id: The model.
            target: A path, or a file open for writing bytes.
            version: Which; None: the head.
            include_moments: The optimizer's state too.
        """
        data, got = yield from self._download(model_id, version, include_moments=include_moments)
        write_file(target, data)
        return got

    def import_weights(
        self, model_id: str, source: WeightsFile, *, expected_version: Version | None = None
    ) -> Op[Version]:
        """Make a safetensors file with Wx, Wh and b the model's next version.

        Args:
            model_id: The model.
            source: A path, or a file open for reading bytes.
            expected_version: Refuse with VersionConflict unless the head is this one.
        """
        return (yield from self._upload(model_id, read_file(source), expected_version))

    def create_checkpoint(
        self, model_id: str, checkpoint_id: str, *, version: Version | None = None
    ) -> Op[CheckpointInfo]:
        """Keep a version under a name; None: the head, with the optimizer's state."""
        request = model_pb.CreateCheckpointRequest(
            model_id=model_id, checkpoint_id=checkpoint_id, version=_optional(version)
        )
        answer = yield from self.caller.call(contract.CREATE_CHECKPOINT, request)
        return checkpoint_from_proto(answer.checkpoint)

    def list_checkpoints(self, model_id: str) -> Op[list[CheckpointInfo]]:
        """Return a model's checkpoints by name."""
        request = model_pb.ListCheckpointsRequest(model_id=model_id)
        answer = yield from self.caller.call(contract.LIST_CHECKPOINTS, request)
        return [checkpoint_from_proto(checkpoint) for checkpoint in answer.checkpoints]

    def restore_checkpoint(
        self, model_id: str, checkpoint_id: str, *, expected_version: Version | None = None
    ) -> Op[Version]:
        """Make a checkpoint's weights and moments the model's next version."""
        request = model_pb.RestoreCheckpointRequest(
            model_id=model_id,
            checkpoint_id=checkpoint_id,
            expected_version=_optional(expected_version),
            request_id=new_request_id(),
        )
        answer = yield from self.caller.call(contract.RESTORE_CHECKPOINT, request)
        return self._made(model_id, answer.version)

    def delete_checkpoint(
        self, model_id: str, checkpoint_id: str, *, missing_ok: bool = False
    ) -> Op[bool]:
        """Take a checkpoint's name away; returns whether this call did."""
        request = model_pb.DeleteCheckpointRequest(
            model_id=model_id, checkpoint_id=checkpoint_id, allow_missing=missing_ok
        )
        try:
            answer = yield from self.caller.call(contract.DELETE_CHECKPOINT, request)
        except errors.NotFound as error:
            if isinstance(error, errors.ModelNotFound) or not error.is_outcome_unknown:
                raise
            return True  # an attempt whose answer was lost has done it
        return answer.deleted

    # -- sessions ----------------------------------------------------------------------------------

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
    ) -> Op[SessionCore]:
        """Open a session, or go on with a live one.

        Args:
            model_id: The model to run.
            session_id: Its name; None: one of 128 random bits.
            batch_size: N.
            train: Let `forward` leave tapes for `backward`.
            initial_state: The first hidden state, shape (N, H); None: zero. Not used on resuming.
            ttl: Time to live after each operation, in seconds; None: the server's default.
            on_exists: What to do when it is live: "resume", "fail" or "reset".
        """
        if on_exists not in _ON_EXISTS:
            raise errors.BadField(
                f"on_exists: expected one of {list(_ON_EXISTS)}, got {on_exists!r}"
            )
        bounds = yield from self.bounds()
        model = yield from self.model(model_id)
        request = session_pb.OpenSessionRequest(
            model_id=model_id,
            session_id=new_session_id() if session_id is None else session_id,
            batch_size=batch_size,
            ttl=None if ttl is None else duration_to_proto(ttl),
            on_exists=_ON_EXISTS[on_exists],
            request_id=new_request_id(),
        )
        if initial_state is not None:
            shape = (batch_size, model.hidden_size)
            request.initial_state.CopyFrom(
                _given(initial_state, "initial_state", model.dtype, shape)
            )
        try:
            answer = yield from self.caller.call(contract.OPEN_SESSION, request)
        except errors.NotFound:
            self._forget(model_id)
            raise
        session = SessionCore(self, model, bounds, train=train)
        session.begin(answer.session, answer.state)
        return session

    def get_session(self, session_id: str) -> Op[SessionInfo]:
        """Return one session as it stands, without opening it."""
        request = session_pb.GetSessionRequest(session_id=session_id)
        answer = yield from self.caller.call(contract.GET_SESSION, request)
        return session_from_proto(answer.session)

    def sessions_page(
        self, model_id: str | None, page_size: int, page_token: str
    ) -> Op[tuple[list[SessionInfo], str]]:
        """Return a page of live sessions and the token of the next."""
        request = session_pb.ListSessionsRequest(
            model_id=model_id or "", page_size=page_size, page_token=page_token
        )
        answer = yield from self.caller.call(contract.LIST_SESSIONS, request)
        return [session_from_proto(session) for session in answer.sessions], answer.next_page_token

    def close_session(self, session_id: str) -> Op[bool]:
        """End a session by name; returns whether this call ended it."""
        request = session_pb.CloseSessionRequest(session_id=session_id)
        answer = yield from self.caller.call(contract.CLOSE_SESSION, request)
        return answer.closed

    # -- training over several sessions ------------------------------------------------------------

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
    ) -> Op[UpdateResult]:
        """Make one optimizer step over the contributions of many sessions.

        With `sessions` it takes exactly what these contributed since their last update, expects
        the head that this client has seen last, and can be healed after lost writes. Without, it
        takes what waits on the server, whoever contributed it.

        Args:
            model_id: The model.
            contributions: Which, or session names; None: all that wait.
            sessions: Open training sessions of this client; then `contributions` is not used.
            lr: Learning rate of this step only; None: the optimizer's.
            clip_norm: Scale the joined gradient down to this global norm; 0: off.
            reduction: "sum" or "mean" over the contributions.
            expected_version: Refuse with VersionConflict unless the head is this one.

        Raises:
            NoGradients: If nothing waits.
        """
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
        result = yield from self.training(model_id).update(cores, step, expect_known=True)
        for core in cores:
            core.last_update, core.version = result, result.version
        return result

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
            expected_version=_optional(expected_version),
            request_id=new_request_id(),
        )
        answer = yield from self.caller.call(contract.UPDATE, request)
        self.training(model_id).consumed(named)
        self._made(model_id, answer.version)
        return update_from_proto(answer)

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
    ) -> Op[list[Array | errors.Error]]:
        """Apply chunks of many sessions in one message of one stream.

        Args:
            chunks: Open sessions of this client, each with its inputs (N, T, D). The same session
                may come several times; its chunks are applied in this order.
            return_hs: "all" hidden states, the "last" alone, or "none".

        Returns:
            In the order given, the hidden states, or the error of a session that failed: it
            disturbs no other.
        """
        cores = ((view._core, xs) for view, xs in chunks)  # noqa: SLF001  # one package
        return (yield from self.frames.forward(cores, return_hs))

    # -- without a session -------------------------------------------------------------------------

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
        if return_hs not in RETURN_HS:
            raise errors.BadField(f"return_hs: expected 'all', 'last' or 'none', got {return_hs!r}")
        bounds = yield from self.bounds()
        model = yield from self.model(model_id)
        array = array_from_caller(xs, "xs", model.dtype, (None, None, model.input_size))
        rows, H = array.shape[0], model.hidden_size
        first = None if h0 is None else _given(h0, "h0", model.dtype, (rows, H))
        row_bytes = rows * array.itemsize
        pieces = split_steps(
            array.shape[1], row_bytes * max(model.input_size, H), row_bytes * H, bounds
        )
        hs, state, pinned = [], first, _optional(version)
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

    # -- inner parts -------------------------------------------------------------------------------

    def model(self, model_id: str) -> Op[ModelInfo]:
        """Return a model's sizes and dtype; asked for once."""
        if model_id not in self._models:
            yield from self.get_model(model_id)
        return self._models[model_id]

    def _stateless(self, request: rnn_pb.ForwardRequest) -> Op[rnn_pb.ForwardResponse]:
        model_id = request.model_id
        scope = Scope(model_id, (self.training(model_id).journal,))
        healing, deadline = Healing(self.caller, scope), self.caller.deadline()
        while True:
            try:
                return (yield from self.caller.call(contract.FORWARD, request, deadline))
            except errors.Error as error:
                yield from self.heal(healing, error, scope, deadline)

    def _noted(self, message: model_pb.Model) -> ModelInfo:
        model = model_from_proto(message)
        before = self._models.get(model.model_id)
        if before is not None and before.incarnation != model.incarnation:
            self._forget(model.model_id)
        self._models[model.model_id] = model
        self.note_version(model.model_id, model.head)
        return model

    def _forget(self, model_id: str) -> None:
        self._models.pop(model_id, None)
        self._known.pop(model_id, None)

    def _made(self, model_id: str, message: tensor_pb.WeightsVersion) -> Version:
        version = version_from_proto(message)
        self.set_known(model_id, version)
        return version

    def _download(
        self, model_id: str, version: Version | None, *, include_moments: bool
    ) -> Op[tuple[bytes, Version]]:
        request = model_pb.GetWeightsRequest(
            model_id=model_id, version=_optional(version), include_moments=include_moments
        )
        got = yield from self.caller.attempts(
            lambda address, timeout: Download(contract.GET_WEIGHTS, request, address, timeout)
        )
        data = b"".join(part.data for part in got)
        if not got or got[0].total_bytes != len(data):
            raise errors.Internal(f"the weights came incomplete: {len(data)} bytes")
        found = version_from_proto(got[0].version)
        if version is None:
            self.note_version(model_id, found)
        return data, found

    def _upload(self, model_id: str, data: bytes, expected: Version | None) -> Op[Version]:
        header = model_pb.PutWeightsHeader(
            model_id=model_id,
            expected_version=_optional(expected),
            request_id=new_request_id(),
            total_bytes=len(data),
        )
        requests = [model_pb.PutWeightsRequest(header=header)]
        requests += [model_pb.PutWeightsRequest(data=part) for part in parts(data)]
        answer: Any = yield from self.caller.attempts(
            lambda address, timeout: Upload(contract.PUT_WEIGHTS, requests, address, timeout)
        )
        return self._made(model_id, answer.version)


def _given(
    value: npt.ArrayLike, name: str, dtype: DTypeName, shape: tuple[int, ...]
) -> tensor_pb.Tensor:
    return tensor_to_proto(array_from_caller(value, name, dtype, shape))


def _optional(version: Version | None) -> tensor_pb.WeightsVersion | None:
    return None if version is None else version_to_proto(version)


def _named(contributions: Iterable[Contributions | str] | None) -> list[Contributions] | None:
    if contributions is None:
        return None
    return [Contributions(name) if isinstance(name, str) else name for name in contributions]
