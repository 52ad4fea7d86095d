"""A head that is not the expected one: decided by the head that the refusal names."""

from __future__ import annotations

from typing import Any

import grpc
import numpy as np
import pytest

import timernn

XS = np.ones((1, 4, 3), "f4")
OURS = 2  # the version that the session has made, and expects


@pytest.fixture
def trainer(client: timernn.Client) -> timernn.Session:
    """A session that has made version 2 and contributed to the next."""
    session = client.session("m", train=True)
    session.backward(session.forward(XS))
    assert session.update().number == OURS
    session.backward(session.forward(XS))
    return session


def conflict(refusal: Any, stand_in: Any, head: int, *, inline: bool = False) -> Any:
    """Let every step be refused because of this head; the model names it too."""
    stand_in.version = max(head, OURS)
    metadata = {"head": str(head), "head_digest": b"theirs".hex()}
    status = refusal(grpc.StatusCode.ABORTED, "VERSION_CONFLICT", **metadata)
    stand_in.fail_next("Backward" if inline else "Update", *[status] * 50)
    stand_in.requests.clear()


def rounds(stand_in: Any) -> int:
    """Return how often the log was sent, by its first chunk."""
    return sum(request.chunk_seq == 1 for request in stand_in.requests["Forward"])


@pytest.mark.parametrize("inline", [False, True])
def test_a_head_above_a_version_that_is_kept_is_plain_truth(
    stand_in: Any, refusal: Any, trainer: timernn.Session, *, inline: bool
) -> None:
    """Another trainer's step is reported at once; nothing is sent again."""
    if inline:
        hs = trainer.forward(XS)
    conflict(refusal, stand_in, OURS + 3, inline=inline)
    stand_in.kept = {OURS}
    with pytest.raises(timernn.VersionConflict):
        trainer.backward(hs, update=timernn.Step()) if inline else trainer.update()
    assert stand_in.requests["Forward"] == []
    assert len(stand_in.requests["FindVersions"]) == 1


@pytest.mark.parametrize("kept", [set(), None])
def test_a_head_above_a_version_that_is_not_kept_is_worth_one_round(
    stand_in: Any, refusal: Any, trainer: timernn.Session, kept: set[int] | None
) -> None:
    """It may have been superseded or lost; so may one that an older replica cannot report."""
    conflict(refusal, stand_in, OURS + 3)
    stand_in.kept = kept
    with pytest.raises(timernn.VersionConflict):
        trainer.update()
    assert rounds(stand_in) == 1


@pytest.mark.parametrize("head", [OURS - 1, OURS])
def test_a_head_that_went_back_or_came_back_otherwise_is_a_loss(
    stand_in: Any, refusal: Any, trainer: timernn.Session, head: int
) -> None:
    """The log is sent, some rounds of it, before the error is raised."""
    conflict(refusal, stand_in, head)
    with pytest.raises(timernn.VersionConflict):
        trainer.update()
    assert rounds(stand_in) == 3
    assert stand_in.requests["FindVersions"] == []


def test_after_a_conflict_the_next_step_may_go_on_from_the_head(
    stand_in: Any, refusal: Any, trainer: timernn.Session
) -> None:
    """The refused step left its contributions where they were."""
    stand_in.kept = {OURS}
    metadata = {"head": "5", "head_digest": "00"}
    stand_in.fail_next("Update", refusal(grpc.StatusCode.ABORTED, "VERSION_CONFLICT", **metadata))
    with pytest.raises(timernn.VersionConflict):
        trainer.update()
    trainer.update(exclusive=False)
    named = stand_in.requests["Update"][-1].contributions
    assert [list(each.chunk_seqs) for each in named] == [[2]]
