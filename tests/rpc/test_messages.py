"""Converters: every default filled in, every field checked, nothing lost on the way back."""

from __future__ import annotations

from dataclasses import fields
from typing import TYPE_CHECKING, Any

import pytest
from google.protobuf.duration_pb2 import Duration

from rnn_engine import OPTIMIZERS, AdamW
from service.domain.errors import InvalidArgument
from service.domain.rules import InputRules, check_id, check_request_id
from service.domain.types import (
    OnExists,
    Reduction,
    ReturnHs,
    Selector,
    Version,
    Waiting,
    WaitingTape,
)
from service.rpc.fields import selectors_from_proto, ttl_from_proto
from service.rpc.model_messages import (
    initial_weights_from_proto,
    optimizer_from_proto,
    optimizer_to_proto,
    spec_from_proto,
    weights_parts,
)
from service.rpc.server_info import limits_to_proto
from service.rpc.session_messages import (
    fork_session_from_proto,
    new_epoch_from_proto,
    open_session_from_proto,
)
from service.rpc.time_rnn_messages import OperationReader, waiting_to_proto
from service.settings import Limits
from timernn.v1 import model_service_pb2 as model_pb
from timernn.v1 import session_service_pb2 as session_pb
from timernn.v1 import time_rnn_service_pb2 as pb
from timernn.v1.tensor_pb2 import D_TYPE_FLOAT32, Tensor, WeightsVersion

if TYPE_CHECKING:
    from collections.abc import Callable

    from rnn_engine import Optimizer

LIMITS = Limits()
RULES = InputRules(LIMITS)
READER = OperationReader(RULES)
TOKEN = b"t" * 16


def refusal(function: Callable[..., Any], *arguments: Any) -> str:
    """Return the message of what must be refused as BAD_FIELD."""
    with pytest.raises(InvalidArgument) as caught:
        function(*arguments)
    assert caught.value.reason == "BAD_FIELD"
    assert caught.value.message.startswith(caught.value.field)
    return caught.value.message


def checked_forward(request: pb.ForwardRequest) -> None:
    """Read a Forward, and check it as its use case does."""
    RULES.check_forward(READER.forward(request))


def checked_backward(request: pb.BackwardRequest) -> None:
    """The same for a Backward."""
    RULES.check_backward(READER.backward(request))


def checked_update(request: pb.UpdateRequest) -> None:
    """The same for an Update."""
    RULES.check_update(READER.update(request))


def checked_opening(request: session_pb.OpenSessionRequest) -> None:
    """The same for an OpenSession."""
    RULES.check_open(open_session_from_proto(request, RULES))


def checked_fork(request: session_pb.ForkSessionRequest) -> None:
    """The same for a ForkSession."""
    RULES.check_fork(fork_session_from_proto(request, RULES))


def checked_spec(message: model_pb.ModelSpec) -> None:
    """The same for a new model's specification."""
    RULES.check_spec(spec_from_proto(message))


def checked_weights(request: model_pb.CreateModelRequest) -> None:
    """The same for a new model's weights."""
    RULES.check_initial_weights(initial_weights_from_proto(request, RULES))


@pytest.mark.parametrize(
    "name",
    ["a", "0", "A.b_c~d-e", "x" * 128, "7b1de9d2-3c5d-4f6e-8a51-0c5ab8a0f0e3"],
)
def test_a_good_name_passes(name: str) -> None:
    """Letters, digits, dots, underscores, tildes and dashes, up to 128."""
    check_id("session_id", name)


@pytest.mark.parametrize(
    "name",
    ["", "x" * 129, "..", "a/../b", "../../etc/passwd", "/x", "x/", " a", "a ", "a\x00", "{}", "*",
     "a\nb", "\u0430bc", "-a", "_a", "a\n"],
)  # fmt: skip
def test_a_bad_name_is_refused_without_being_echoed_raw(name: str) -> None:
    """No slash, brace, star, control character or look-alike letter, and no long echo."""
    text = refusal(check_id, "session_id", name)
    assert len(text) < 200
    assert text.isascii()
    assert text.isprintable()


def test_a_request_id_is_counted_in_bytes() -> None:
    """128 bytes, not 128 letters."""
    check_request_id("request_id", "é" * 64)
    assert refusal(check_request_id, "request_id", "é" * 65).endswith("got 130")


@pytest.mark.parametrize(
    ("ttl", "expected_ms"),
    [(Duration(seconds=1), 1000), (Duration(seconds=2, nanos=5_000_000), 2005),
     (Duration(seconds=7 * 86400), 7 * 86_400_000)],
)  # fmt: skip
def test_a_ttl_within_the_limits_passes(ttl: Duration, expected_ms: int) -> None:
    """From one second to seven days."""
    assert ttl_from_proto("ttl", ttl, RULES) == expected_ms


@pytest.mark.parametrize(
    "ttl",
    [Duration(), Duration(nanos=999_999_999), Duration(seconds=-5), Duration(seconds=7 * 86400 + 1),
     Duration(seconds=2**62), Duration(seconds=5, nanos=2_000_000_000)],
)  # fmt: skip
def test_a_ttl_outside_the_limits_is_refused_with_the_range(ttl: Duration) -> None:
    """The range is named."""
    request = session_pb.ForkSessionRequest(session_id="s", ttl=ttl)
    assert "ttl: must be 1 s to 604800 s, got " in refusal(checked_fork, request)


def test_a_hyperparameter_that_is_set_leaves_the_others_at_their_defaults() -> None:
    """Each field is optional by itself."""
    adam_w = optimizer_from_proto(model_pb.Optimizer(adam_w=model_pb.AdamW(beta1=0.5)))
    assert adam_w == AdamW(1e-3, 0.5, 0.999, 1e-8, 0.01)


@pytest.mark.parametrize("kind", OPTIMIZERS, ids=lambda kind: kind.__name__)
def test_every_optimizer_of_the_engine_travels_there_and_back(kind: type[Optimizer]) -> None:
    """None is forgotten in the table, and no hyperparameter is lost."""
    optimizer = kind(**{field.name: 0.25 for field in fields(kind)})
    assert optimizer_from_proto(optimizer_to_proto(optimizer)) == optimizer


@pytest.mark.parametrize(
    ("optimizer", "text"),
    [
        (model_pb.Optimizer(sgd=model_pb.Sgd(lr=-1)), "optimizer.sgd.lr: must be 0 to 1000, got -1"),
        (model_pb.Optimizer(sgd=model_pb.Sgd(lr=float("nan"))), "optimizer.sgd.lr: must be 0 to 1000, got nan"),
        (model_pb.Optimizer(sgd=model_pb.Sgd(lr=1001)), "optimizer.sgd.lr: must be 0 to 1000, got 1001"),
        (model_pb.Optimizer(adam=model_pb.Adam(beta1=1)), "optimizer.adam.beta1: must be in [0, 1), got 1"),
        (model_pb.Optimizer(adam=model_pb.Adam(eps=0)), "optimizer.adam.eps: must be above 0, got 0"),
        (model_pb.Optimizer(adam_w=model_pb.AdamW(weight_decay=-1)), "optimizer.adam_w.weight_decay: must be 0 or more, got -1"),
        (model_pb.Optimizer(momentum=model_pb.Momentum(momentum=float("inf"))), "optimizer.momentum.momentum: must be in [0, 1), got inf"),
    ],
)  # fmt: skip
def test_a_hyperparameter_out_of_range_is_refused(optimizer: model_pb.Optimizer, text: str) -> None:
    """Each has its range, and the message names it."""
    assert refusal(optimizer_from_proto, optimizer) == text


def spec(**values: Any) -> model_pb.ModelSpec:
    """Make a good model's specification with some fields changed."""
    return model_pb.ModelSpec(**{"model_id": "m", "input_size": 2, "hidden_size": 3, **values})


@pytest.mark.parametrize(
    ("values", "field"),
    [({"model_id": ""}, "spec.model_id"), ({"input_size": 0}, "spec.input_size"),
     ({"hidden_size": 4097}, "spec.hidden_size"), ({"dtype": 9}, "spec.dtype")],
)  # fmt: skip
def test_a_bad_specification_names_its_field(values: dict[str, Any], field: str) -> None:
    """D and H within the limits, a known type, a name."""
    assert refusal(checked_spec, spec(**values)).startswith(f"{field}: ")


def test_given_weights_that_do_not_fit_each_other_are_refused(
    tensor: Callable[..., Tensor],
) -> None:
    """Wx names D and H, and the others must follow."""
    given = model_pb.GivenWeights(wx=tensor(2, 3), wh=tensor(4, 4), b=tensor(3))
    request = model_pb.CreateModelRequest(given=given)
    with pytest.raises(InvalidArgument) as caught:
        initial_weights_from_proto(request, RULES)
    assert caught.value.message == "given: Wh: expected shape (3, 3), got (4, 4)"


def test_a_file_is_cut_into_parts_and_only_the_first_names_it() -> None:
    """Joined, the parts are the file; a whole number of parts leaves no empty one."""
    parts = list(weights_parts(Version(2, TOKEN), b"x" * 10, 4))
    assert [len(part.data) for part in parts] == [4, 4, 2]
    assert [part.total_bytes for part in parts] == [10, 0, 0]
    assert [part.version.number for part in parts] == [2, 0, 0]
    assert len(list(weights_parts(Version(2, TOKEN), b"x" * 8, 4))) == 2


def test_every_limit_is_reported() -> None:
    """What bounds a request is a field of the contract, under the same name."""
    message = limits_to_proto(LIMITS)
    assert {field.name for field, _ in message.ListFields()} == {
        field.name.removesuffix("_ms") for field in fields(LIMITS)
    }
    assert message.default_ttl == Duration(seconds=3600)
    assert message.head_max_age == Duration(nanos=50_000_000)


def test_what_waits_is_written_as_an_update_takes_it() -> None:
    """Tapes with their tokens; contributions as the selectors of an Update."""
    waiting = Waiting((WaitingTape(7, 4, TOKEN),), (Selector("s", 7, (2, 3)),))
    message = waiting_to_proto(waiting)
    assert message.tapes[0] == pb.WaitingTape(epoch=7, chunk_seq=4, state_token=TOKEN)
    assert selectors_from_proto(message.contributions, RULES) == waiting.contributions


def test_opening_has_the_contracts_defaults() -> None:
    """One row, a zero state, the default time to live, FAIL."""
    wanted = open_session_from_proto(session_pb.OpenSessionRequest(model_id="m"), RULES)
    assert (wanted.batch_size, wanted.initial_state, wanted.ttl_ms) == (1, None, None)
    assert wanted.on_exists is OnExists.FAIL


@pytest.mark.parametrize(
    ("values", "field"),
    [({"model_id": "a/b"}, "model_id"), ({"session_id": "{x}"}, "session_id"), ({"batch_size": 1025}, "batch_size"),
     ({"batch_size": -1}, "batch_size"), ({"on_exists": 9}, "on_exists"), ({"restored_epoch": -1}, "restored_epoch"),
     ({"request_id": "x" * 129}, "request_id"), ({"ttl": Duration(seconds=0)}, "ttl"),
     ({"on_exists": session_pb.ON_EXISTS_MUST_EXIST}, "session_id")],
)  # fmt: skip
def test_a_bad_opening_names_its_field(values: dict[str, Any], field: str) -> None:
    """Names, sizes, enumerations and spans are checked before anything is asked."""
    request = session_pb.OpenSessionRequest(**{"model_id": "m", **values})
    assert refusal(checked_opening, request).startswith(f"{field}: ")


def test_an_initial_state_of_other_rows_is_refused(tensor: Callable[..., Tensor]) -> None:
    """A state is never broadcast."""
    request = session_pb.OpenSessionRequest(model_id="m", batch_size=2, initial_state=tensor(1, 3))
    text = refusal(checked_opening, request)
    assert text == "batch_size: is 2, but initial_state has N = 1"


def test_set_state_needs_a_state_and_reset_state_none() -> None:
    """An absent state would otherwise silently be zero."""
    request = session_pb.SetStateRequest(session_id="s")
    assert refusal(new_epoch_from_proto, request, RULES) == "state: required"
    reset = new_epoch_from_proto(session_pb.ResetStateRequest(session_id="s"), RULES)
    assert (reset.state, reset.expected_chunk_seq) == (None, None)


def test_an_expected_chunk_of_zero_is_not_an_absent_one() -> None:
    """0 means before the first chunk; not set means any."""
    request = session_pb.ResetStateRequest(session_id="s", expected_chunk_seq=0)
    assert new_epoch_from_proto(request, RULES).expected_chunk_seq == 0


@pytest.fixture
def forward(tensor: Callable[..., Tensor]) -> Callable[..., pb.ForwardRequest]:
    """Make a good Forward of a session with some fields changed."""

    def forward(**values: Any) -> pb.ForwardRequest:
        good = {"session_id": "s", "epoch": 1, "chunk_seq": 1, "xs": tensor(1, 2, 3)}
        return pb.ForwardRequest(**{**good, **values})

    return forward


def test_a_forward_has_the_contracts_defaults(forward: Callable[..., pb.ForwardRequest]) -> None:
    """INFER, all of hs, no version named."""
    wanted = READER.forward(forward())
    assert (wanted.train, wanted.return_hs) == (False, ReturnHs.ALL)
    assert (wanted.pinned, wanted.minimum, wanted.previous_token) == (None, None, b"")


def test_a_forward_says_what_it_was_asked(forward: Callable[..., pb.ForwardRequest]) -> None:
    """Every field reaches the domain."""
    request = forward(
        previous_token=TOKEN,
        mode=pb.FORWARD_MODE_TRAIN,
        pinned_version=WeightsVersion(number=3, digest=TOKEN),
        minimum_version=WeightsVersion(number=2),
        return_hs=pb.RETURN_HS_LAST,
        acknowledged_seq=5,
    )
    wanted = READER.forward(request)
    assert (wanted.train, wanted.return_hs) == (True, ReturnHs.LAST)
    assert (wanted.pinned, wanted.minimum) == (Version(3, TOKEN), Version(2))
    assert (wanted.previous_token, wanted.acknowledged_seq) == (TOKEN, 5)


BAD_FORWARDS: list[tuple[dict[str, Any], str]] = [
    ({"chunk_seq": 0}, "chunk_seq"),
    ({"chunk_seq": 2**53}, "chunk_seq"),
    ({"epoch": 0}, "epoch"),
    ({"epoch": -1}, "epoch"),
    ({"previous_token": b"short"}, "previous_token"),
    ({"mode": 9}, "mode"),
    ({"return_hs": 9}, "return_hs"),
    ({"acknowledged_seq": -1}, "acknowledged_seq"),
    ({"pinned_version": WeightsVersion()}, "pinned_version.number"),
    ({"minimum_version": WeightsVersion(number=1, digest=b"x")}, "minimum_version.digest"),
    ({"xs": None}, "xs"),
    ({"model_id": "m"}, "model_id"),
    ({"h0": Tensor(dtype=D_TYPE_FLOAT32, shape=[1, 1], data=bytes(4))}, "h0"),
    ({"session_id": "s" * 300}, "session_id"),
    ({"session_id": ""}, "session_id"),
]


@pytest.mark.parametrize(("values", "field"), BAD_FORWARDS, ids=lambda value: str(value)[:40])
def test_a_bad_forward_names_its_field(
    forward: Callable[..., pb.ForwardRequest], values: dict[str, Any], field: str
) -> None:
    """A chunk without number, epoch or session cannot be sent again safely, so it is refused."""
    assert refusal(checked_forward, forward(**values)).startswith(f"{field}: ")


def test_a_forward_without_a_session_needs_a_model(tensor: Callable[..., Tensor]) -> None:
    """There is nowhere else to take the weights from, and nowhere to keep a tape."""
    xs = tensor(2, 1, 1)
    assert refusal(checked_forward, pb.ForwardRequest(xs=xs)).startswith("model_id: ")
    train = pb.ForwardRequest(xs=xs, model_id="m", mode=pb.FORWARD_MODE_TRAIN)
    assert refusal(checked_forward, train).startswith("mode: ")
    rows = pb.ForwardRequest(xs=xs, model_id="m", h0=tensor(1, 3))
    assert refusal(checked_forward, rows) == "h0: has N = 1, but xs has N = 2"
    wanted = READER.forward(pb.ForwardRequest(xs=xs, model_id="m", h0=tensor(2, 3)))
    assert wanted.state is not None


@pytest.mark.parametrize(
    ("values", "field"),
    [({"session_id": ""}, "session_id"), ({"state_token": b""}, "state_token"), ({"epoch": 0}, "epoch"),
     ({"chunk_seq": 0}, "chunk_seq"), ({"dhs": None}, "dhs"), ({"update": pb.UpdateRequest()}, "request_id")],
)  # fmt: skip
def test_a_bad_backward_names_its_field(
    tensor: Callable[..., Tensor], values: dict[str, Any], field: str
) -> None:
    """The tape is named by session, epoch, chunk and token."""
    good = {
        "session_id": "s",
        "epoch": 1,
        "chunk_seq": 1,
        "state_token": TOKEN,
        "dhs": tensor(1, 2, 3),
    }
    request = pb.BackwardRequest(**{**good, **values})
    assert refusal(checked_backward, request).startswith(f"{field}: ")


@pytest.mark.parametrize(
    ("values", "field"),
    [({"model_id": ""}, "model_id"), ({"request_id": ""}, "request_id"), ({"reduction": 9}, "reduction"),
     ({"learning_rate": float("nan")}, "learning_rate"), ({"learning_rate": -0.1}, "learning_rate"),
     ({"learning_rate": 1e4}, "learning_rate"), ({"clip_norm": -1.0}, "clip_norm"),
     ({"clip_norm": float("inf")}, "clip_norm"), ({"expected_version": WeightsVersion(number=-1)}, "expected_version.number"),
     ({"contributions": [pb.ContributionSelector()]}, "contributions[0].session_id"),
     ({"contributions": [pb.ContributionSelector(session_id="s", chunk_seqs=[1])]}, "contributions[0].epoch"),
     ({"contributions": [pb.ContributionSelector(session_id="s", epoch=1, chunk_seqs=[0])]}, "contributions[0].chunk_seqs"),
     ({"contributions": [pb.ContributionSelector(session_id="s", epoch=1, chunk_seqs=[2, 2])]}, "contributions[0].chunk_seqs")],
)  # fmt: skip
def test_a_bad_update_names_its_field(values: dict[str, Any], field: str) -> None:
    """Rates and norms are finite and in range, contributions are named once."""
    request = pb.UpdateRequest(**{"model_id": "m", "request_id": "r", **values})
    assert refusal(checked_update, request).startswith(f"{field}: ")


def test_an_update_says_what_it_was_asked() -> None:
    """A learning rate of 0 is not an absent one."""
    request = pb.UpdateRequest(
        model_id="m",
        request_id="r",
        reduction=pb.REDUCTION_MEAN,
        learning_rate=0.0,
        contributions=[pb.ContributionSelector(session_id="s", epoch=2, chunk_seqs=[3, 1])],
    )
    wanted = READER.update(request)
    assert (wanted.reduction, wanted.learning_rate) == (Reduction.MEAN, 0.0)
    assert wanted.selectors == (Selector("s", 2, (3, 1)),)


def test_more_contributions_than_can_wait_are_refused() -> None:
    """A list longer than what a model may hold is refused before it is read."""
    selector = pb.ContributionSelector(session_id="s", epoch=1, chunk_seqs=range(1, 12))
    text = refusal(selectors_from_proto, [selector], InputRules(Limits(contributions_per_model=10)))
    assert text == "contributions: must name at most 10, got 11"


def test_a_negative_seed_is_refused() -> None:
    """The generator takes none; the refusal names the field."""
    request = model_pb.CreateModelRequest(seed=-1)
    assert refusal(checked_weights, request).startswith("seed: must be 0")
