"""Every public argument of the library is checked at the door, with an error that names it."""

from __future__ import annotations

import inspect
import io
import uuid
from decimal import Decimal
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pytest

import timernn

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

XS = np.ones((1, 4, 3), "f4")
NOT_ARGUMENTS = {"self", "kind", "error", "traceback"}
# What is wrong for every parameter: of a type, a size or a content that none of them takes.
WRONG = (
    object(),
    2**80,
    -(2**80),
    float("nan"),
    uuid.UUID(int=7),
    Decimal("NaN"),
    np.datetime64("2020-01-01"),
    [object()],
)
# What is wrong where a value of the same type may be right.
WRONG_BY_TYPE: dict[str, tuple[Any, ...]] = {
    "str": ("lone \ud800 surrogate", b"bytes"),
    "int": (-1, True, 1.5, "3"),
    "float": (-1.0, float("inf"), "1", None),
    "bool": (0, 1, "yes", None),
}
# Good values of the parameters that have no default.
GOOD: dict[str, Any] = {
    "model_id": "m",
    "session_id": "s",
    "checkpoint_id": "c",
    "input_size": 3,
    "hidden_size": 2,
    "xs": np.zeros((1, 2, 3)),
    "dhs": np.zeros((1, 2, 2)),
    "h": np.zeros((1, 2)),
    "Wx": np.zeros((3, 2)),
    "Wh": np.zeros((2, 2)),
    "b": np.zeros(2),
    "source": "no.safetensors",
    "target": "no.safetensors",
    "chunks": [],
}
# A good model's weights are given together.
TOGETHER = {"Wx", "Wh", "b"}


class Parameter(NamedTuple):
    """One parameter of one public method."""

    owner: str
    method: str
    name: str
    annotation: str


def parameters(module: Any) -> Iterator[Parameter]:
    """Go through the parameters of everything that a user may call on a client and a session."""
    for owner in ("Client", "Session"):
        for method, function in inspect.getmembers(getattr(module, owner), inspect.isfunction):
            if method.startswith("_"):
                continue
            for name, each in inspect.signature(function).parameters.items():
                if name not in NOT_ARGUMENTS:
                    yield Parameter(owner, method, name, str(each.annotation))


def wrong_values(parameter: Parameter) -> list[Any]:
    """Return what a parameter must refuse."""
    kinds = parameter.annotation.replace(" | None", "").split(" | ")
    is_optional = "None" in parameter.annotation
    wrong = [*WRONG]
    for kind in kinds:
        wrong += [v for v in WRONG_BY_TYPE.get(kind, ()) if not (v is None and is_optional)]
    if "float" in kinds:  # the server bounds a rate
        wrong.remove(2**80)
    if parameter.name == "deadline":  # a time on a clock, which may be long past
        wrong = [value for value in wrong if not isinstance(value, int | float)]
    if parameter.name == "chunks" and parameter.method == "stream":
        wrong.remove(WRONG[-1])  # an iterable: its items are checked when their turn comes
    return wrong


def arguments(function: Callable[..., Any], parameter: Parameter, value: Any) -> dict[str, Any]:
    """Return good arguments with one wrong one among them."""
    names = {
        name
        for name, each in inspect.signature(function).parameters.items()
        if each.default is inspect.Parameter.empty
    }
    if parameter.name in TOGETHER:
        names |= TOGETHER
    return {name: GOOD[name] for name in names} | {parameter.name: value}


def check_refusal(parameter: Parameter, error: timernn.Error) -> None:
    """The error is one of a bad argument, and its text begins with the argument's name."""
    assert isinstance(error, timernn.InvalidArgument), error
    assert str(error.message).startswith(parameter.name), error


@pytest.mark.parametrize("parameter", list(parameters(timernn)), ids=lambda p: ".".join(p[:3]))
def test_a_wrong_argument_is_refused_by_name(
    parameter: Parameter, client: timernn.Client, stand_in: Any
) -> None:
    """Nothing is sent, and the error says which argument was expected to be what."""
    session = client.session("m", train=True)
    session.forward(GOOD["xs"])
    sent = {method: len(requests) for method, requests in stand_in.requests.items()}
    function = getattr(client if parameter.owner == "Client" else session, parameter.method)

    def call(value: Any) -> None:
        result = function(**arguments(function, parameter, value))
        if hasattr(result, "__next__"):
            next(result)

    for value in wrong_values(parameter):
        with pytest.raises(timernn.Error) as caught:
            call(value)
        check_refusal(parameter, caught.value)
    assert {m: len(requests) for m, requests in stand_in.requests.items()} == sent


@pytest.mark.parametrize("parameter", list(parameters(timernn.aio)), ids=lambda p: ".".join(p[:3]))
async def test_a_wrong_argument_of_the_asyncio_frontend_is_refused_by_name(
    parameter: Parameter, stand_in: Any
) -> None:
    """The asyncio frontend refuses the same in the same words."""
    async with timernn.aio.connect(stand_in.address) as client:
        session = await client.session("m", train=True)
        await session.forward(GOOD["xs"])
        sent = {method: len(requests) for method, requests in stand_in.requests.items()}
        function = getattr(client if parameter.owner == "Client" else session, parameter.method)

        async def call(value: Any) -> None:
            result = function(**arguments(function, parameter, value))
            await (anext(result) if hasattr(result, "__anext__") else result)

        for value in wrong_values(parameter):
            with pytest.raises(timernn.Error) as caught:
                await call(value)
            check_refusal(parameter, caught.value)
        assert {m: len(requests) for m, requests in stand_in.requests.items()} == sent


@pytest.mark.parametrize("connect", [timernn.connect, timernn.aio.connect])
@pytest.mark.parametrize(
    "name", [name for name in inspect.signature(timernn.connect).parameters if name != "target"]
)
def test_a_wrong_argument_of_connect_is_refused_by_name(
    connect: Callable[..., Any], name: str
) -> None:
    """A client that could not work is not made."""
    for value in (object(), -1, float("nan"), uuid.UUID(int=7), "soon", [1]):
        if name == "token" and value == "soon":
            continue  # a server's tokens may look like that
        with pytest.raises(timernn.InvalidArgument, match=name):
            connect("localhost:50051", **{name: value})


@pytest.mark.parametrize("target", [None, 50051, "", [], [""], ["localhost:1", 7], object()])
@pytest.mark.parametrize("connect", [timernn.connect, timernn.aio.connect])
def test_a_target_that_is_no_address_is_refused(connect: Callable[..., Any], target: Any) -> None:
    """The text shows what an address looks like."""
    with pytest.raises(timernn.BadField, match="target: expected an address such as"):
        connect(target)


@pytest.mark.parametrize(
    ("policy", "name"),
    [({"budget_per_s": 0}, "budget_per_s"), ({"max_backoff_s": -1}, "max_backoff_s"),
     ({"attempt_timeout_s": None}, "attempt_timeout_s"), ({"jitter": 2}, "jitter")],
)  # fmt: skip
def test_a_retry_policy_that_cannot_wait_is_refused(policy: dict[str, Any], name: str) -> None:
    """A wait is a number of at least 0, a rate one above it."""
    with pytest.raises(timernn.BadField, match=name):
        timernn.RetryPolicy(**policy)


@pytest.mark.parametrize(
    ("optimizer", "text"),
    [("adam", r"optimizer: expected an optimizer such as timernn.Adam\(lr=1e-3\), got 'adam'"),
     (timernn.Adam, "optimizer: expected an optimizer"),
     (timernn.Adam(lr="fast"), "optimizer.adam.lr: expected a number of at least 0, got 'fast'"),  # type: ignore[arg-type]
     (timernn.SGD(lr=float("inf")), "optimizer.sgd.lr: expected a number of at least 0, got inf")],
)  # fmt: skip
def test_an_optimizer_is_one_of_the_librarys_with_numbers(
    client: timernn.Client, optimizer: Any, text: str
) -> None:
    """A name or a class is not an optimizer; the text shows what is."""
    with pytest.raises(timernn.BadField, match=text):
        client.create_model("m", input_size=1, hidden_size=1, optimizer=optimizer)


def test_numbers_of_numpy_are_numbers(client: timernn.Client, stand_in: Any) -> None:
    """What is read out of an array needs no conversion by the caller."""
    client.session("m", batch_size=np.int64(3), ttl=np.float32(2.5), train=np.bool_(True))  # type: ignore[arg-type]
    (sent,) = stand_in.requests["OpenSession"]
    assert (sent.batch_size, sent.ttl.ToMilliseconds()) == (3, 2500)


def test_a_masked_array_is_refused(client: timernn.Client) -> None:
    """NumPy would drop the mask, and what lies under it would become data."""
    masked: Any = np.ma.masked_invalid([[[1.0, 2.0, np.nan]]])
    session = client.session("m")
    everywhere: list[Any] = [masked, [masked[0]], [[[1.0, 2.0, np.ma.masked]]]]
    for xs in everywhere:
        with pytest.raises(timernn.BadTensor, match="xs: expected every element, got a masked"):
            session.forward(xs)


def test_a_masked_array_that_masks_nothing_is_data(client: timernn.Client) -> None:
    """Such arrays come out of readers that mask only what is missing."""
    hs = client.session("m").forward(np.ma.masked_invalid(np.ones((1, 2, 3))))
    assert hs.shape == (1, 2, 2)


async def test_a_session_of_another_client_is_refused(stand_in: Any) -> None:
    """Two clients would number its chunks; the other frontend's has another kind of lock, too."""
    with timernn.connect(stand_in.address) as one, timernn.connect(stand_in.address) as two:
        async with timernn.aio.connect(stand_in.address) as three, three.session("m") as aio:
            session = two.session("m")
            for foreign in (session, aio):
                with pytest.raises(
                    timernn.BadField, match=r"chunks\[1\]: expected a session of this"
                ):
                    one.frame([(one.session("m"), XS), (foreign, XS)])  # type: ignore[list-item]
                with pytest.raises(
                    timernn.BadField, match=r"sessions\[0\]: expected a session of this"
                ):
                    one.update("m", sessions=[foreign])  # type: ignore[list-item]
            with pytest.raises(timernn.BadField, match=r"chunks\[0\]"):
                await three.frame([(session, XS)])  # type: ignore[list-item]
            with pytest.raises(timernn.BadField, match=r"sessions\[0\]"):
                await three.update("m", sessions=[session])  # type: ignore[list-item]
    assert stand_in.requests["Forward"] == []


def test_a_value_too_large_for_the_models_dtype_is_refused(client: timernn.Client) -> None:
    """A cast would make it infinite, with no more than a warning of NumPy's."""
    session = client.session("m")
    with pytest.raises(timernn.NonFinite, match="xs: holds a value that is too large for float32"):
        session.forward(np.full((1, 2, 3), 1e300))


def test_a_weights_file_is_open_for_bytes(client: timernn.Client) -> None:
    """One that is open for text would fail half way."""
    for method in (client.import_weights, client.export_weights):
        with pytest.raises(timernn.BadField, match="expected a file that is open for bytes"):
            method("m", io.StringIO())  # type: ignore[arg-type]
