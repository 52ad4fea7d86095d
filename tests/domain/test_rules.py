"""Every use case refuses by itself what no request may say, before it asks the store for anything."""

from __future__ import annotations

import inspect
from dataclasses import fields, is_dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pytest

from rnn_engine import SGD, AdamW, Params, TanhNetwork
from service.compute.scheduler import Scheduler
from service.domain.backward import Backpropagation
from service.domain.errors import InvalidArgument
from service.domain.limits_policy import SameLimits
from service.domain.model_cache import ModelCache
from service.domain.models import Models
from service.domain.recurrence import Recurrence
from service.domain.rules import make_optimizer
from service.domain.session_cache import SessionCache
from service.domain.sessions import Sessions
from service.domain.tapes import TapeCache
from service.domain.types import (
    Backward,
    DiscardGradients,
    ForkSession,
    Forward,
    InitialWeights,
    ModelKey,
    ModelSpec,
    NewEpoch,
    OnExists,
    OpenSession,
    Reduction,
    Selector,
    SessionKey,
    Update,
    Version,
)
from service.domain.updates import Updates
from service.domain.use_cases import Caches, UseCases, build_use_cases
from service.domain.waiting import WaitingWork
from service.settings import Limits

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

LIMITS = Limits(
    batch_size=8, chunk_steps=9, input_size=10, hidden_size=11, contributions_per_model=5
)
TOKEN = b"t" * 16
NAN = float("nan")


def ones(*shape: int, value: float = 1.0) -> Any:
    """Make an array that is fine but for its value."""
    array = np.ones(shape, np.float32)
    array[(-1,) * len(shape)] = value
    return array


class Bad(NamedTuple):
    """A value that must be refused: by which reason, and naming which field of the contract."""

    value: Any
    field: str
    reason: str = "BAD_FIELD"


def bad_ids(name: str, *, is_required: bool = True) -> list[Bad]:
    """Names that are none."""
    values = ["a/b", "..", "x" * 129, "-a", "a\n", "\u0430"]
    return [Bad(value, name) for value in [*values, *([""] if is_required else [])]]


def bad_numbers(name: str, lowest: int = 0, highest: int = 2**53 - 1) -> list[Bad]:
    """Numbers just outside their range."""
    return [Bad(lowest - 1, name), Bad(highest + 1, name)]


def bad_versions(name: str) -> list[Bad]:
    """Names of versions that are none."""
    return [
        Bad(Version(0), f"{name}.number"),
        Bad(Version(2**53), f"{name}.number"),
        Bad(Version(1, b"short"), f"{name}.digest"),
    ]


def bad_tensors(name: str, limits: dict[int, int], good: tuple[int, ...]) -> list[Bad]:
    """Tensors of another rank, of a size out of range, or with a value that is not finite."""
    bad = [
        Bad(ones(*good, 1), f"{name}.shape", "BAD_TENSOR"),
        Bad(ones(*good[:-1]), f"{name}.shape", "BAD_TENSOR"),
        Bad(ones(*good, value=NAN), name, "NON_FINITE"),
        Bad(ones(*good, value=float("-inf")), name, "NON_FINITE"),
    ]
    for axis, limit in limits.items():
        for size in (0, limit + 1):
            shape = [*good]
            shape[axis] = size
            bad.append(Bad(np.zeros(shape, np.float32), f"{name}.shape[{axis}]", "BAD_TENSOR"))
    return bad


SELECTORS = [
    Bad((Selector("a/b"),), "contributions[0].session_id"),
    Bad((Selector("s"), Selector("")), "contributions[1].session_id"),
    Bad((Selector("s", -1),), "contributions[0].epoch"),
    Bad((Selector("s", 0, (1,)),), "contributions[0].epoch"),
    Bad((Selector("s", 1, (0,)),), "contributions[0].chunk_seqs"),
    Bad((Selector("s", 1, (2, 2)),), "contributions[0].chunk_seqs"),
    Bad((Selector("s", 1, tuple(range(1, 7))),), "contributions"),
    Bad((Selector("s"),) * 6, "contributions"),
]
REQUEST_ID = [Bad("x" * 129, "request_id"), Bad("é" * 65, "request_id")]
NO_REQUEST_ID = [*REQUEST_ID, Bad("", "request_id")]
TTL = [Bad(ttl, "ttl") for ttl in (0, -1, LIMITS.min_ttl_ms - 1, LIMITS.max_ttl_ms + 1)]
STATE = {0: LIMITS.batch_size, 1: LIMITS.hidden_size}
SPEC = ModelSpec("m", TanhNetwork(3, 4), "float32", SGD(lr=0.1))
UPDATE = Update("m", (), Reduction.SUM, None, 0.0, None, "r")
CHUNK = Forward("s", 1, 1, b"", ones(2, 3, 4))
STATELESS = Forward("", 0, 0, b"", ones(2, 3, 4), model_id="m", state=ones(2, 5))

# Of each request a good one, and for each of its fields what must be refused. A field of which everything
# is allowed has an empty list: whoever adds a field has to say which it is.
REQUESTS: dict[str, tuple[Any, dict[str, list[Bad]]]] = {
    "forward": (
        CHUNK,
        {
            "session_id": bad_ids("session_id", is_required=False),
            "epoch": bad_numbers("epoch", 1),
            "chunk_seq": bad_numbers("chunk_seq", 1),
            "previous_token": [Bad(b"short", "previous_token")],
            "xs": bad_tensors("xs", {0: 8, 1: 9, 2: 10}, (2, 3, 4)),
            "train": [],
            "pinned": bad_versions("pinned_version"),
            "minimum": bad_versions("minimum_version"),
            "return_hs": [],
            "acknowledged_seq": bad_numbers("acknowledged_seq"),
            "model_id": [Bad("m", "model_id")],
            "state": [Bad(ones(2, 5), "h0")],
        },
    ),
    "stateless forward": (
        STATELESS,
        {
            "session_id": [],
            "epoch": [Bad(1, "session_id")],
            "chunk_seq": [Bad(1, "session_id")],
            "previous_token": [Bad(TOKEN, "session_id")],
            "xs": bad_tensors("xs", {0: 8, 1: 9, 2: 10}, (2, 3, 4)),
            "train": [Bad(True, "mode")],
            "pinned": bad_versions("pinned_version"),
            "minimum": bad_versions("minimum_version"),
            "return_hs": [],
            "acknowledged_seq": [Bad(1, "session_id")],
            "model_id": bad_ids("model_id"),
            "state": [*bad_tensors("h0", STATE, (2, 5)), Bad(ones(1, 5), "h0")],
        },
    ),
    "backward": (
        Backward("s", 1, 1, TOKEN, ones(2, 3, 4)),
        {
            "session_id": bad_ids("session_id"),
            "epoch": bad_numbers("epoch", 1),
            "chunk_seq": bad_numbers("chunk_seq", 1),
            "token": [Bad(b"", "state_token"), Bad(b"short", "state_token")],
            "d_outputs": bad_tensors("dhs", {0: 8, 1: 9, 2: 11}, (2, 3, 4)),
            "d_state": bad_tensors("dh_next", STATE, (2, 5)),
            "return_d_inputs": [],
            "return_gradients": [],
            "update": [
                Bad(replace(UPDATE, request_id=""), "request_id"),
                Bad(replace(UPDATE, model_id="a/b"), "model_id"),
                Bad(replace(UPDATE, clip_norm=NAN), "clip_norm"),
            ],
            "resent": [],
        },
    ),
    "update": (
        UPDATE,
        {
            "model_id": bad_ids("model_id"),
            "selectors": SELECTORS,
            "reduction": [],
            "learning_rate": [Bad(lr, "learning_rate") for lr in (-0.1, 1001.0, NAN, float("inf"))],
            "clip_norm": [Bad(norm, "clip_norm") for norm in (-0.1, NAN, float("inf"))],
            "expected": bad_versions("expected_version"),
            "request_id": NO_REQUEST_ID,
        },
    ),
    "discard": (
        DiscardGradients("m", ()),
        {"model_id": bad_ids("model_id"), "selectors": SELECTORS},
    ),
    "open": (
        OpenSession("m", "s", 2, None, None, OnExists.FAIL, "", 0),
        {
            "model_id": bad_ids("model_id"),
            "session_id": bad_ids("session_id", is_required=False),
            "batch_size": bad_numbers("batch_size", 1, LIMITS.batch_size),
            "initial_state": [
                *bad_tensors("initial_state", STATE, (2, 4)),
                Bad(ones(1, 4), "batch_size"),
            ],
            "ttl_ms": TTL,
            "on_exists": [],
            "request_id": REQUEST_ID,
            "restored_epoch": bad_numbers("restored_epoch", 0, 2**48),
        },
    ),
    "open one that must exist": (
        OpenSession("m", "s", 2, None, None, OnExists.MUST_EXIST, "", 0),
        {"session_id": [Bad("", "session_id")]},
    ),
    "begin_epoch": (
        NewEpoch("s", None, 0, None, "", 0),
        {
            "session_id": bad_ids("session_id"),
            "state": bad_tensors("state", STATE, (2, 4)),
            "expected_epoch": bad_numbers("expected_epoch"),
            "expected_chunk_seq": bad_numbers("expected_chunk_seq"),
            "request_id": REQUEST_ID,
            "restored_epoch": bad_numbers("restored_epoch", 0, 2**48),
        },
    ),
    "fork": (
        ForkSession("s", "", None, ""),
        {
            "session_id": bad_ids("session_id"),
            "new_session_id": bad_ids("new_session_id", is_required=False),
            "ttl_ms": TTL,
            "request_id": REQUEST_ID,
        },
    ),
    "create": (
        SPEC,
        {
            "model_id": bad_ids("spec.model_id"),
            "network": [
                *(
                    Bad(TanhNetwork(bad.value, 4), bad.field)
                    for bad in bad_numbers("spec.input_size", 1, LIMITS.input_size)
                ),
                *(
                    Bad(TanhNetwork(3, bad.value), bad.field)
                    for bad in bad_numbers("spec.hidden_size", 1, LIMITS.hidden_size)
                ),
            ],
            "dtype": [Bad("float16", "spec.dtype"), Bad("", "spec.dtype")],
            "optimizer": [
                Bad(SGD(lr=1001.0), "optimizer.sgd.lr"),
                Bad(AdamW(lr=1001.0), "optimizer.adam_w.lr"),
            ],
        },
    ),
}
SPEC_METHODS = ("create", "import_model", "import_limit")
FIELD_CASES = [
    pytest.param(name, replace(good, **{field: bad.value}), bad, id=f"{name}-{field}-{number}")
    for name, (good, by_field) in REQUESTS.items()
    for field, some in by_field.items()
    for number, bad in enumerate(some)
]

WEIGHTS = Params(ones(3, 4), ones(4, 4), ones(4))
ARGUMENTS: dict[str, Any] = {
    "tenant": "t",
    "op": None,
    "spec": SPEC,
    "first": InitialWeights(),
    "model_id": "m",
    "checkpoint_id": "c",
    "request_id": "r",
    "data": b"",
    "expected": None,
    "version": None,
    "expected_epoch": 0,
    "page_size": 1,
    "page_token": "",
    "numbers": [1],
    "extend_ttl": False,
    "allow_missing": False,
    "include_moments": False,
}
BAD_ARGUMENTS: dict[str, list[Bad]] = {
    "session key": [Bad(SessionKey("t", one.value), one.field) for one in bad_ids("session_id")],
    "model key": [Bad(ModelKey("t", one.value), one.field) for one in bad_ids("model_id")],
    "first": [
        *(Bad(InitialWeights(seed=seed), "seed") for seed in (-1, 2**53)),
        Bad(
            InitialWeights(given=Params(ones(3, 4, value=NAN), ones(4, 4), ones(4))),
            "given.wx",
            "NON_FINITE",
        ),
        Bad(
            InitialWeights(given=Params(ones(11, 4), ones(4, 4), ones(4))),
            "given.wx.shape[0]",
            "BAD_TENSOR",
        ),
    ],
    "model_id": bad_ids("model_id", is_required=False),
    "checkpoint_id": bad_ids("checkpoint_id"),
    "request_id": REQUEST_ID,
    "expected": bad_versions("expected_version"),
    "version": bad_versions("version"),
    "expected_epoch": bad_numbers("expected_epoch"),
    "page_size": bad_numbers("page_size", 0, 1000),
    "page_token": [Bad("x" * 1025, "page_token")],
    "numbers": [Bad([], "numbers"), Bad([1] * 1001, "numbers"), Bad([0], "numbers")],
}
UNCHECKED = {"tenant", "op", "spec", "data", "extend_ttl", "allow_missing", "include_moments"}
NO_REQUEST = {"drain", "sizes", "step", "publish", "is_busy"}  # what other parts of the domain call


def kinds() -> Iterator[tuple[str, str, Callable[..., Any]]]:
    """Yield each operation of each use case: attribute of `UseCases`, name, function."""
    classes = {
        "models": Models,
        "sessions": Sessions,
        "recurrence": Recurrence,
        "backpropagation": Backpropagation,
        "updates": Updates,
        "waiting": WaitingWork,
    }
    # These take no request: the page reads the one, and the end of a server waits for the other.
    assert {*classes, "recent_steps", "carrier"} == {field.name for field in fields(UseCases)}
    for attribute, kind in classes.items():
        for name, function in inspect.getmembers(kind, inspect.isfunction):
            if not name.startswith("_") and name not in NO_REQUEST:
                yield attribute, name, function


def parameters(function: Callable[..., Any]) -> list[inspect.Parameter]:
    """Return what a method is given beside itself and a callback."""
    return [
        one
        for one in inspect.signature(function).parameters.values()
        if one.name not in ("self", "on_done")
    ]


def argument_kind(parameter: inspect.Parameter) -> str:
    """Return under which name a parameter's bad values are listed."""
    if parameter.name == "key":
        return "session key" if parameter.annotation == "SessionKey" else "model key"
    return parameter.name


ARGUMENT_CASES = [
    pytest.param(attribute, name, one.name, bad, id=f"{name}-{one.name}-{number}")
    for attribute, name, function in kinds()
    for one in parameters(function)
    if argument_kind(one) not in UNCHECKED
    for number, bad in enumerate(BAD_ARGUMENTS[argument_kind(one)])
]


class Untouched:
    """A store that nobody may ask."""

    def __getattr__(self, name: str) -> Any:
        """Fail the test."""
        raise AssertionError(f"the store was asked to {name}")


@pytest.fixture
def use_cases() -> Iterator[UseCases]:
    """The use cases over a store that nobody may ask."""
    store: Any = Untouched()
    scheduler = Scheduler(8)
    caches = Caches(ModelCache(store, 50, 1 << 20), SessionCache(1 << 20), TapeCache(1 << 20))
    policy = SameLimits(LIMITS)
    yield build_use_cases(store, store, caches, scheduler=scheduler, limits=LIMITS, policy=policy)
    scheduler.close()


async def refusal_of(call: Callable[[], Any]) -> InvalidArgument:
    """Call, wait if there is something to wait for, and return the refusal."""
    with pytest.raises(InvalidArgument) as caught:  # noqa: PT012 - only some are to be waited for
        answer = call()
        if inspect.isawaitable(answer):
            await answer
    assert caught.value.message.startswith((f"{caught.value.field}: ", f"{caught.value.field}["))
    return caught.value


@pytest.mark.parametrize(("name", "request_value", "bad"), FIELD_CASES)
async def test_a_bad_field_is_refused_by_the_use_case(
    use_cases: UseCases, name: str, request_value: Any, bad: Bad
) -> None:
    """The refusal names the contract's field; the store is not asked, whoever calls."""
    methods = [
        (getattr(use_cases, attribute), method)
        for attribute, method, function in kinds()
        if _takes(function, method, name, request_value)
    ]
    assert methods
    for owner, method in methods:
        arguments = {
            one.name: ARGUMENTS.get(one.name) for one in parameters(getattr(type(owner), method))
        }
        arguments["spec" if "spec" in arguments else "op"] = request_value
        if method == "begin_forward":
            arguments["on_done"] = pytest.fail
        refused = await refusal_of(lambda: getattr(owner, method)(**arguments))  # noqa: B023
        assert (refused.field, refused.reason) == (bad.field, bad.reason), method


@pytest.mark.parametrize(("attribute", "method", "parameter", "bad"), ARGUMENT_CASES)
async def test_a_bad_argument_is_refused_by_the_use_case(
    use_cases: UseCases, attribute: str, method: str, parameter: str, bad: Bad
) -> None:
    """What a use case takes by itself, without a request around it, is checked as well."""
    owner = getattr(use_cases, attribute)
    arguments = {}
    for one in parameters(getattr(type(owner), method)):
        key = SessionKey("t", "s") if one.annotation == "SessionKey" else ModelKey("t", "m")
        arguments[one.name] = key if one.name == "key" else ARGUMENTS[one.name]
    arguments[parameter] = bad.value
    refused = await refusal_of(lambda: getattr(owner, method)(**arguments))
    assert (refused.field, refused.reason) == (bad.field, bad.reason)


@pytest.mark.parametrize(
    ("kind", "given", "field"),
    [
        ("sgd", {"lr": -1.0}, "optimizer.sgd.lr"),
        ("sgd", {"lr": NAN}, "optimizer.sgd.lr"),
        ("momentum", {"momentum": 1.0}, "optimizer.momentum.momentum"),
        ("adam", {"beta1": 1.0}, "optimizer.adam.beta1"),
        ("adam", {"eps": 0.0}, "optimizer.adam.eps"),
        ("adam_w", {"weight_decay": -1.0}, "optimizer.adam_w.weight_decay"),
    ],
)
def test_an_optimizer_is_made_of_hyperparameters_in_range(
    kind: str, given: dict[str, float], field: str
) -> None:
    """What the engine would not even construct is refused under the contract's name."""
    with pytest.raises(InvalidArgument) as caught:
        make_optimizer(kind, given)
    assert caught.value.field == field


def test_every_field_of_every_request_is_listed() -> None:
    """A field that is added to a request has to be given its bad values here, or none."""
    for name, (good, by_field) in REQUESTS.items():
        if name != "open one that must exist":
            assert set(by_field) == {field.name for field in fields(good)}, name


def test_every_request_of_a_use_case_is_listed() -> None:
    """An operation that is added has to be given a good request here."""
    taken = {
        one.annotation
        for _, _, function in kinds()
        for one in parameters(function)
        if one.name in ("op", "spec")
    }
    assert taken == {type(good).__name__ for good, _ in REQUESTS.values()}
    assert all(is_dataclass(good) for good, _ in REQUESTS.values())


@pytest.mark.parametrize("method", ["import_model", "import_limit", "put_weights", "upload_limit"])
async def test_what_could_not_be_repeated_safely_needs_a_request_id(
    use_cases: UseCases, method: str
) -> None:
    """An upload without a request id is refused before a byte of it is taken."""
    function = getattr(Models, method)
    arguments = {
        one.name: ARGUMENTS.get(one.name, ModelKey("t", "m")) for one in parameters(function)
    }
    arguments["request_id"] = ""
    refused = await refusal_of(lambda: getattr(use_cases.models, method)(**arguments))
    assert refused.field == "request_id"


def _takes(function: Callable[..., Any], method: str, name: str, request_value: Any) -> bool:
    annotations = {one.name: one.annotation for one in parameters(function)}
    if name == "create":
        return method in SPEC_METHODS
    return annotations.get("op") == type(request_value).__name__
