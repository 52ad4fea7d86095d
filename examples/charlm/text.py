"""The text: what CPython's own help() prints, as numbers in parallel streams."""

from __future__ import annotations

import pydoc_data.topics
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from collections.abc import Iterator

Ids = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Corpus:
    """A text as character numbers.

    Attributes:
        alphabet: Every character that occurs, in order; a character's number is its place, 0..V-1.
        train: The text to learn from, shape (characters,).
        held_out: The text to be judged on, never learned from, shape (characters,).
    """

    alphabet: str
    train: Ids
    held_out: Ids

    def encode(self, text: str) -> Ids:
        """Return the numbers of the characters of text, which must all be in the alphabet."""
        return np.array([self.alphabet.index(character) for character in text])

    def decode(self, ids: Ids) -> str:
        """Return the text that these numbers stand for."""
        return "".join(self.alphabet[i] for i in ids)


def load_corpus(held_out_share: float = 0.05) -> Corpus:
    """Read the help texts that every Python ships and set their end aside.

    Args:
        held_out_share: The part to be judged on, between 0 and 1.
    """
    text = "\n\n".join(pydoc_data.topics.topics.values())
    text = text.encode("ascii", errors="ignore").decode("ascii")  # some rare quotes and dashes go
    alphabet = "".join(sorted(set(text)))
    number = {character: i for i, character in enumerate(alphabet)}
    ids = np.array([number[character] for character in text])
    border = len(ids) - int(len(ids) * held_out_share)
    return Corpus(alphabet, ids[:border], ids[border:])


def parallel_streams(ids: Ids, streams: int) -> tuple[Ids, Ids]:
    """Cut one text into equal streams to be read side by side, row i going on where row i was.

    Args:
        ids: The text, shape (characters,).
        streams: N.

    Returns:
        Inputs and targets, each of shape (N, L): the target of a character is the one after it.
    """
    length = (len(ids) - 1) // streams
    inputs = ids[: streams * length].reshape(streams, length)
    targets = ids[1 : streams * length + 1].reshape(streams, length)
    return inputs, targets


def chunks(inputs: Ids, targets: Ids, steps: int) -> Iterator[tuple[Ids, Ids]]:
    """Yield the streams in chunks of T time steps, without the rest at the end.

    Args:
        inputs: Shape (N, L).
        targets: Shape (N, L).
        steps: T.

    Yields:
        Inputs and targets of the next T steps, each of shape (N, T).
    """
    for start in range(0, inputs.shape[1] - steps + 1, steps):
        yield inputs[:, start : start + steps], targets[:, start : start + steps]
