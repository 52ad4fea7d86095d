"""What a request may say: names, numbers, sizes, rates, tensors.

Each use case checks its own request here before it does anything else, so that no protocol by which requests come
can forget to. What is left to a protocol is its encoding: that a field is there, that an enumeration is known, that
the bytes of a tensor are as many as its shape needs.

A refusal names the field as the contract does, what was expected and what came.
"""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING, Final, TypeAlias

from rnn_engine import SGD, AdaGrad, Adam, AdamW, Momentum, Nesterov, RMSprop
from service.domain.errors import bad_field, bad_tensor, quoted
from service.domain.finite import check_finite
from service.domain.types import DIGEST_BYTES, OnExists

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from rnn_engine import Array, Optimizer
    from service.domain.errors import InvalidArgument
    from service.domain.types import (
        Backward,
        DiscardGradients,
        ForkSession,
        Forward,
        InitialWeights,
        ModelSpec,
        NewEpoch,
        OpenSession,
        Selector,
        Update,
        Version,
    )
    from service.settings import Limits

ID_PATTERN: Final = r"[A-Za-z0-9][A-Za-z0-9._~-]{0,127}"
MAX_EPOCH: Final = 2**48  # in the year 10889: an epoch is a time in milliseconds or a little more
MAX_NUMBER: Final = 2**53 - 1  # what every language's numbers, JSON's too, hold exactly
MAX_REQUEST_ID_BYTES: Final = 128
MAX_PAGE_SIZE: Final = 1000
DEFAULT_PAGE_SIZE: Final = 100
MAX_PAGE_TOKEN_CHARS: Final = 1024
MAX_LEARNING_RATE: Final = 1e3
MAX_NUMBERS: Final = 1000  # of versions that one call may ask for
DTYPES: Final = ("float32", "float64")

_is_id = re.compile(ID_PATTERN, re.ASCII).fullmatch


# --- single fields ------------------------------------------------------------------------------


def check_id(name: str, value: str) -> None:
    """Refuse what is no name of a session, model or checkpoint."""
    if _is_id(value):
        return
    if not value:
        raise bad_field(name, "required")
    got = f"length {len(value)}" if len(value) > 128 else quoted(value)
    raise bad_field(name, f"must match ^{ID_PATTERN}$, got {got}")


def check_optional_id(name: str, value: str) -> None:
    """Refuse what is neither empty nor a name."""
    if value:
        check_id(name, value)


def check_number(name: str, value: int, lowest: int) -> None:
    """Refuse a whole number outside lowest to 2^53 - 1."""
    if not lowest <= value <= MAX_NUMBER:
        raise bad_field(name, f"must be {lowest} to 2^53-1, got {value}")


def check_restored_epoch(name: str, value: int) -> None:
    """Refuse what is no epoch that may be begun again, nor 0 for none: epochs are times in ms."""
    if not 0 <= value <= MAX_EPOCH:
        raise bad_field(name, f"must be 0 to 2^48, got {value}")


def check_size(name: str, value: int, limit: int) -> None:
    """Refuse a size outside 1 to limit."""
    if not 1 <= value <= limit:
        raise bad_field(name, f"must be 1 to {limit}, got {value}")


def check_real(name: str, value: float, lowest: float, highest: float = math.inf) -> None:
    """Refuse what is not a finite number of lowest to highest."""
    if not (math.isfinite(value) and lowest <= value <= highest):
        bound = f" to {highest:g}" if math.isfinite(highest) else " or more"
        raise bad_field(name, f"must be {lowest:g}{bound}, got {value:g}")


def check_factor(name: str, value: float) -> None:
    """Refuse a number outside [0, 1)."""
    if not 0.0 <= value < 1.0:
        raise bad_field(name, f"must be in [0, 1), got {value:g}")


def check_positive(name: str, value: float) -> None:
    """Refuse what is not a finite number above 0."""
    if not (math.isfinite(value) and value > 0.0):
        raise bad_field(name, f"must be above 0, got {value:g}")


def check_learning_rate(name: str, value: float) -> None:
    """Refuse a learning rate that no training uses."""
    check_real(name, value, 0.0, MAX_LEARNING_RATE)


def check_request_id(name: str, value: str, *, required: bool = False) -> None:
    """Refuse a request id of more than 128 bytes, or none where it is needed."""
    if required and not value:
        raise bad_field(name, "required: without it a retry cannot be safe")
    size = len(value.encode())
    if size > MAX_REQUEST_ID_BYTES:
        raise bad_field(name, f"must be at most {MAX_REQUEST_ID_BYTES} bytes, got {size}")


def check_token(name: str, value: bytes, *, required: bool = False) -> None:
    """Refuse what is no state token of 16 bytes, nor empty where it may be left out."""
    if len(value) == DIGEST_BYTES or (not value and not required):
        return
    expected = f"{DIGEST_BYTES} bytes" if required else f"0 or {DIGEST_BYTES} bytes"
    raise bad_field(name, f"must be {expected}, got {len(value)}")


def check_version(name: str, version: Version | None) -> None:
    """Refuse what is no name of a weights version; none is named by None."""
    if version is None:
        return
    check_number(f"{name}.number", version.number, 1)
    size = len(version.digest)
    if size not in (0, DIGEST_BYTES):
        raise bad_field(f"{name}.digest", f"must be 0 or {DIGEST_BYTES} bytes, got {size}")


def checked_page_size(page_size: int, page_token: str) -> int:
    """Return the size of a page, 0 for the default; refuse a size or a token out of range."""
    if not 0 <= page_size <= MAX_PAGE_SIZE:
        raise bad_field("page_size", f"must be 1 to {MAX_PAGE_SIZE}, got {page_size}")
    if len(page_token) > MAX_PAGE_TOKEN_CHARS:
        raise bad_field("page_token", "must be a next_page_token of the page before")
    return page_size or DEFAULT_PAGE_SIZE


def check_version_numbers(numbers: Sequence[int]) -> None:
    """Refuse no numbers of versions, too many, or one that no version has."""
    if not 1 <= len(numbers) <= MAX_NUMBERS:
        raise bad_field("numbers", f"must be 1 to {MAX_NUMBERS} numbers, got {len(numbers)}")
    for number in numbers:
        check_number("numbers", number, 1)


class Axes:
    """The dimensions of one kind of tensor.

    Attributes:
        letters: One for each, such as "NTD".
        limits: The largest size of each.
    """

    __slots__ = ("letters", "limits", "rank")

    def __init__(self, letters: str, *limits: int) -> None:
        self.letters = letters
        self.limits = limits
        self.rank = len(limits)

    def check_shape(self, name: str, shape: Sequence[int]) -> None:
        """Refuse another number of dimensions, or a size outside 1 to its limit."""
        if len(shape) != self.rank:
            expected = f"{self.rank} dims ({','.join(self.letters)})"
            raise bad_tensor(f"{name}.shape", f"expected {expected}, got {len(shape)}")
        for size, limit in zip(shape, self.limits):  # noqa: B905 - compared just now, and this is per chunk
            if not 0 < size <= limit:
                raise self._bad_size(name, shape)

    def _bad_size(self, name: str, shape: Sequence[int]) -> InvalidArgument:
        sizes = zip(shape, self.limits, strict=True)
        axis = next(axis for axis, (size, limit) in enumerate(sizes) if not 0 < size <= limit)
        text = f"{self.letters[axis]} must be 1 to {self.limits[axis]}, got {shape[axis]}"
        return bad_tensor(f"{name}.shape[{axis}]", text)

    def check(self, name: str, array: Array) -> None:
        """Refuse an array by its shape, or because it holds NaN or infinity."""
        self.check_shape(name, array.shape)
        check_finite(name, array)


# --- requests -----------------------------------------------------------------------------------


class InputRules:
    """The rules of whole requests, within the limits.

    Attributes:
        limits: The bounds on one request.
        xs: Inputs, (N, T, D).
        dhs: Gradients of the outputs, (N, T, H).
        state: A hidden state, (N, H).
        wx: Input weights, (D, H).
        wh: Recurrent weights, (H, H).
        b: The bias, (H,).
    """

    def __init__(self, limits: Limits) -> None:
        n, t = limits.batch_size, limits.chunk_steps
        d, h = limits.input_size, limits.hidden_size
        self.limits = limits
        self.xs = Axes("NTD", n, t, d)
        self.dhs = Axes("NTH", n, t, h)
        self.state = Axes("NH", n, h)
        self.wx = Axes("DH", d, h)
        self.wh = Axes("HH", h, h)
        self.b = Axes("H", h)

    def check_forward(self, op: Forward) -> None:
        """Refuse a chunk, or a Forward without a session, that says what it may not."""
        if not op.session_id:
            _check_stateless(op, self)
            return
        check_id("session_id", op.session_id)
        if op.state is not None:
            raise bad_field("h0", "only without a session; SetState replaces a session's state")
        if op.model_id:
            raise bad_field("model_id", "only without a session; a session has its model")
        check_number("epoch", op.epoch, 1)
        check_number("chunk_seq", op.chunk_seq, 1)
        check_token("previous_token", op.previous_token)
        self.xs.check("xs", op.xs)
        if op.pinned is not None or op.minimum is not None:
            _check_named_versions(op)
        check_number("acknowledged_seq", op.acknowledged_seq, 0)

    def check_backward(self, op: Backward) -> None:
        """Refuse a Backward that says what it may not."""
        check_id("session_id", op.session_id)
        check_number("epoch", op.epoch, 1)
        check_number("chunk_seq", op.chunk_seq, 1)
        check_token("state_token", op.token, required=True)
        self.dhs.check("dhs", op.d_outputs)
        if op.d_state is not None:
            self.state.check("dh_next", op.d_state)
        if op.update is not None:
            self.check_update(op.update, is_inline=True)

    def check_update(self, op: Update, *, is_inline: bool = False) -> None:
        """Refuse an Update that says what it may not; an inline one may leave out the model."""
        if is_inline:
            check_optional_id("model_id", op.model_id)
        else:
            check_id("model_id", op.model_id)
        self._check_selectors(op.selectors)
        if op.learning_rate is not None:
            check_learning_rate("learning_rate", op.learning_rate)
        check_real("clip_norm", op.clip_norm, 0.0)
        check_version("expected_version", op.expected)
        check_request_id("request_id", op.request_id, required=True)

    def check_discard(self, op: DiscardGradients) -> None:
        """Refuse a DiscardGradients that says what it may not."""
        check_id("model_id", op.model_id)
        self._check_selectors(op.selectors)

    def check_open(self, op: OpenSession) -> None:
        """Refuse an OpenSession that says what it may not."""
        check_id("model_id", op.model_id)
        if op.on_exists is OnExists.MUST_EXIST:
            check_id("session_id", op.session_id)
        else:
            check_optional_id("session_id", op.session_id)
        check_size("batch_size", op.batch_size, self.limits.batch_size)
        if op.initial_state is not None:
            self.state.check("initial_state", op.initial_state)
            if len(op.initial_state) != op.batch_size:
                rows = len(op.initial_state)
                raise bad_field(
                    "batch_size", f"is {op.batch_size}, but initial_state has N = {rows}"
                )
        self._check_ttl("ttl", op.ttl_ms)
        check_request_id("request_id", op.request_id)
        check_restored_epoch("restored_epoch", op.restored_epoch)

    def check_new_epoch(self, op: NewEpoch) -> None:
        """Refuse a SetState or ResetState that says what it may not."""
        check_id("session_id", op.session_id)
        if op.state is not None:
            self.state.check("state", op.state)
        check_number("expected_epoch", op.expected_epoch, 0)
        if op.expected_chunk_seq is not None:
            check_number("expected_chunk_seq", op.expected_chunk_seq, 0)
        check_request_id("request_id", op.request_id)
        check_restored_epoch("restored_epoch", op.restored_epoch)

    def check_fork(self, op: ForkSession) -> None:
        """Refuse a ForkSession that says what it may not."""
        check_id("session_id", op.session_id)
        check_optional_id("new_session_id", op.new_session_id)
        self._check_ttl("ttl", op.ttl_ms)
        check_request_id("request_id", op.request_id)

    def check_spec(self, spec: ModelSpec) -> None:
        """Refuse a new model's specification by its name, sizes, type or optimizer."""
        check_id("spec.model_id", spec.model_id)
        check_size("spec.input_size", spec.network.input.size, self.limits.input_size)
        check_size("spec.hidden_size", spec.network.output_size, self.limits.hidden_size)
        if spec.dtype not in DTYPES:
            expected = " or ".join(DTYPES)
            raise bad_field("spec.dtype", f"expected {expected}, got {quoted(spec.dtype)}")
        check_optimizer(spec.optimizer)

    def check_initial_weights(self, first: InitialWeights) -> None:
        """Refuse a seed, or the tensors of given weights each by itself."""
        check_number("seed", first.seed, 0)
        if first.given is not None:
            Wx, Wh, b = first.given
            self.wx.check("given.wx", Wx)
            self.wh.check("given.wh", Wh)
            self.b.check("given.b", b)

    def bad_ttl(self, name: str, got: str) -> InvalidArgument:
        """Make the refusal of a time to live."""
        low, high = self.limits.min_ttl_ms / 1000, self.limits.max_ttl_ms / 1000
        return bad_field(name, f"must be {low:g} s to {high:g} s, got {got}")

    def check_contribution_count(self, sizes: Sequence[int]) -> None:
        """Refuse selectors that name more contributions than can wait.

        Args:
            sizes: How many chunks each selector names; one that names none counts as one.
        """
        limit = self.limits.contributions_per_model
        count = len(sizes)
        if count <= limit:
            count = sum(max(1, size) for size in sizes)
        if count > limit:
            raise bad_field("contributions", f"must name at most {limit}, got {count}")

    def _check_ttl(self, name: str, ttl_ms: int | None) -> None:
        """Refuse a time to live outside the limits; None stands for a default."""
        if ttl_ms is None or self.limits.min_ttl_ms <= ttl_ms <= self.limits.max_ttl_ms:
            return
        whole_s, rest_ms = divmod(ttl_ms, 1000)
        raise self.bad_ttl(name, f"{whole_s} s {rest_ms * 1_000_000} ns")

    def _check_selectors(self, selectors: Sequence[Selector]) -> None:
        """Refuse more contributions than can wait, or one that is named badly or twice."""
        self.check_contribution_count([len(selector.chunk_seqs) for selector in selectors])
        for index, selector in enumerate(selectors):
            _check_selector(f"contributions[{index}]", selector)


def check_optimizer(optimizer: Optimizer) -> None:
    """Refuse a hyperparameter out of its range."""
    kind = optimizer_kind(optimizer)
    for name, check in OPTIMIZERS[kind][1].items():
        check(f"optimizer.{kind}.{name}", getattr(optimizer, name))


def _check_named_versions(op: Forward) -> None:
    check_version("pinned_version", op.pinned)
    check_version("minimum_version", op.minimum)


def _check_stateless(op: Forward, rules: InputRules) -> None:
    for name in ("epoch", "chunk_seq", "previous_token", "acknowledged_seq"):
        if getattr(op, name):
            raise bad_field("session_id", f"required where {name} is set")
    if op.train:
        raise bad_field("mode", "TRAIN needs a session: its tape is kept there")
    rules.xs.check("xs", op.xs)
    _check_named_versions(op)
    check_id("model_id", op.model_id)
    if op.state is not None:
        rules.state.check("h0", op.state)
        if len(op.state) != len(op.xs):
            raise bad_field("h0", f"has N = {len(op.state)}, but xs has N = {len(op.xs)}")


def _check_selector(name: str, selector: Selector) -> None:
    chunk_seqs = selector.chunk_seqs
    check_id(f"{name}.session_id", selector.session_id)
    check_number(f"{name}.epoch", selector.epoch, 1 if chunk_seqs else 0)
    for seq in chunk_seqs:
        check_number(f"{name}.chunk_seqs", seq, 1)
    if len(set(chunk_seqs)) != len(chunk_seqs):
        raise bad_field(f"{name}.chunk_seqs", "must name each chunk once")


def _check_decay(name: str, value: float) -> None:
    check_real(name, value, 0.0)


_Checks: TypeAlias = "Mapping[str, Callable[[str, float], None]]"

_ADAM: Final[_Checks] = {
    "lr": check_learning_rate,
    "beta1": check_factor,
    "beta2": check_factor,
    "eps": check_positive,
}
_MOMENTUM: Final[_Checks] = {"lr": check_learning_rate, "momentum": check_factor}

OPTIMIZERS: Final[Mapping[str, tuple[type[Optimizer], _Checks]]] = {
    "sgd": (SGD, {"lr": check_learning_rate}),
    "momentum": (Momentum, _MOMENTUM),
    "nesterov": (Nesterov, _MOMENTUM),
    "ada_grad": (AdaGrad, {"lr": check_learning_rate, "eps": check_positive}),
    "rms_prop": (
        RMSprop,
        {"lr": check_learning_rate, "alpha": check_factor, "eps": check_positive},
    ),
    "adam": (Adam, _ADAM),
    "adam_w": (AdamW, {**_ADAM, "weight_decay": _check_decay}),
}
"""Each kind of optimizer by its name in the contract: the class, and the check of each hyperparameter."""


def make_optimizer(kind: str, given: Mapping[str, float]) -> Optimizer:
    """Make an optimizer, or refuse its hyperparameters; what is not given has the class's default."""
    optimizer_class, checks = OPTIMIZERS[kind]
    for name, value in given.items():
        checks[name](f"optimizer.{kind}.{name}", value)
    return optimizer_class(**given)


def optimizer_kind(optimizer: Optimizer) -> str:
    """Return the name that a kind of optimizer has in the contract."""
    return next(kind for kind, (each, _) in OPTIMIZERS.items() if each is type(optimizer))
