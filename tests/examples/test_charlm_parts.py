"""The client's side of the language model, without a server."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from examples.adam import Adam
from examples.charlm.layers import Embedding, SoftmaxHead
from examples.charlm.report import draw_loss
from examples.charlm.sampling import Latencies
from examples.charlm.text import chunks, load_corpus, parallel_streams
from examples.charlm.training import Budget, History


def test_the_corpus_is_the_help_text_in_numbers() -> None:
    """What was encoded reads as Python's help texts when decoded."""
    corpus = load_corpus()
    assert len(corpus.train) > 300_000
    assert 'The "assert" statement' in corpus.decode(corpus.train[:200])


def test_held_out_text_is_the_end_and_not_trained_on() -> None:
    """The two parts are the whole text, cut once."""
    corpus = load_corpus(held_out_share=0.1)
    whole = len(corpus.train) + len(corpus.held_out)
    assert len(corpus.held_out) == int(0.1 * whole)


def test_encode_undoes_decode() -> None:
    """Text survives the way to numbers and back."""
    corpus = load_corpus()
    assert corpus.decode(corpus.encode("class C: pass")) == "class C: pass"


def test_a_stream_goes_on_where_its_last_chunk_ended() -> None:
    """Chunks of parallel streams, joined, are the streams; targets are one character ahead."""
    ids = np.arange(61)
    inputs, targets = parallel_streams(ids, 3)
    pieces = list(chunks(inputs, targets, 5))
    np.testing.assert_array_equal(np.hstack([a for a, _ in pieces]), inputs)
    np.testing.assert_array_equal(targets, inputs + 1)


def test_the_head_s_gradient_is_that_of_its_loss(rng: np.random.Generator) -> None:
    """It agrees with central differences of the loss."""
    head = SoftmaxHead(rng, H=4, V=5)
    hs: Any = rng.normal(size=(2, 3, 4))  # double, for the differences
    targets = rng.integers(0, 5, (2, 3))
    W, b = head.W.astype(np.float64), head.b.astype(np.float64)
    head.W, head.b = W, b  # type: ignore[assignment]
    step = np.zeros_like(hs)
    step[1, 2, 3] = 1e-6
    expected = (head.loss(hs + step, targets) - head.loss(hs - step, targets)) / 2e-6
    _, dhs = head.learn(hs, targets, lr=0.0)
    assert dhs[1, 2, 3] == pytest.approx(expected, rel=1e-5)


def test_only_rows_of_seen_characters_are_learned(rng: np.random.Generator) -> None:
    """The embedding of a character that did not occur stays as it is."""
    embedding = Embedding(rng, V=4, D=3)
    before = embedding.table.copy()
    embedding.learn(np.array([[1, 2, 1]]), np.ones((1, 3, 3), np.float32), lr=0.1)
    changed = (embedding.table != before).any(axis=1)
    assert changed.tolist() == [False, True, True, False]


def test_adam_s_first_step_has_the_size_of_the_learning_rate() -> None:
    """Whatever the gradient's size, the first step is lr against its sign."""
    weights = np.zeros(3, np.float32)
    Adam([weights]).update([np.array([5.0, -0.01, 300.0], np.float32)], lr=0.1)
    np.testing.assert_allclose(weights, [-0.1, 0.1, -0.1], rtol=1e-4)


def test_a_budget_is_used_up_by_steps_before_time() -> None:
    """The step limit counts where it is reached first."""
    budget = Budget(seconds=1e6, steps=10)
    assert budget.spent(5) == pytest.approx(0.5, abs=1e-3)
    assert budget.spent(10) == 1.0


def test_the_loss_around_a_crash_looks_both_ways() -> None:
    """Means are taken of the steps before and after, not across."""
    history = History(losses=[3.0] * 4 + [1.0] * 4, crash_step=4)
    assert history.around_crash(steps=2) == (3.0, 1.0)


def test_latencies_are_shown_in_milliseconds() -> None:
    """Percentiles come in ms, the rate from the sum of the times."""
    latencies = Latencies([0.001, 0.002, 0.003])
    assert latencies.percentile_ms(50) == pytest.approx(2.0)
    assert latencies.chunks_per_s == pytest.approx(500.0)


def test_a_loss_curve_of_a_short_run_is_drawn(tmp_path: Path) -> None:
    """Fewer steps than the smoothing window still give a picture."""
    picture = tmp_path / "loss.png"
    draw_loss(History(losses=[math.log(94), 3.0, 2.5], crash_step=1, down_s=0.5), picture)
    assert picture.read_bytes().startswith(b"\x89PNG")
