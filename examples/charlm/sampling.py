"""Writing and measuring: one chunk at a time, and as fast as the stream goes."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from examples.charlm.training import MODEL

if TYPE_CHECKING:
    from collections.abc import Iterator

    import timernn
    from examples.charlm.layers import Floats
    from examples.charlm.text import Corpus
    from examples.charlm.training import ClientLayers


@dataclass(frozen=True)
class Latencies:
    """How long each chunk took from its request to its answer, in seconds."""

    seconds: list[float]

    def percentile_ms(self, percent: float) -> float:
        """Return the time, in milliseconds, within which this part of the chunks was answered."""
        return 1000.0 * float(np.percentile(self.seconds, percent))

    @property
    def chunks_per_s(self) -> float:
        """Chunks a second, one after the other."""
        return len(self.seconds) / sum(self.seconds)


def write(
    client: timernn.Client,
    layers: ClientLayers,
    corpus: Corpus,
    *,
    prompt: str = "The ",
    characters: int = 300,
    temperature: float = 0.6,
    seed: int = 0,
) -> Latencies:
    """Print text that the model makes up, each character as it comes.

    Every character is one chunk of one time step on one gRPC stream: the server keeps what was said
    so far in the session's hidden state, so nothing is ever sent twice.

    Args:
        client: The connection.
        layers: The client's part of the model.
        corpus: For its alphabet.
        prompt: What the text begins with.
        characters: How many to make up.
        temperature: Below 1 the likelier characters are preferred more than they should be.
        seed: Of the draws.

    Returns:
        The time of each chunk.
    """
    rng = np.random.default_rng(seed)
    said = corpus.encode(prompt)
    seconds: list[float] = []
    began = 0.0

    def chunks() -> Iterator[Floats]:
        """Yield the prompt, and then each character as soon as it is drawn."""
        nonlocal began
        while True:
            chunk = layers.embedding.forward(said[None])  # (1, T, D)
            began = time.perf_counter()
            yield chunk

    print(prompt, end="", flush=True)
    with client.session(MODEL) as session:
        # With one chunk in flight, the next is asked for when the last is answered.
        for hs in session.stream(chunks(), in_flight=1):  # (1, T, H)
            seconds.append(time.perf_counter() - began)
            if len(seconds) > characters:
                break
            scores = layers.head.log_probabilities(hs[:, -1:])[0] / temperature
            p = np.exp(scores - scores.max())
            said = rng.choice(len(p), size=1, p=p / p.sum())
            print(corpus.decode(said), end="", flush=True)
        session.close()
    print()
    return Latencies(seconds[1:])  # the prompt was longer than a character


def read(
    client: timernn.Client,
    layers: ClientLayers,
    corpus: Corpus,
    *,
    count: int = 500,
    steps: int = 16,
) -> float:
    """Stream known text, the next chunks under way before the last is answered.

    Args:
        client: The connection.
        layers: The client's part of the model.
        corpus: For its held-out text.
        count: How many chunks.
        steps: T, the characters of a chunk.

    Returns:
        Chunks a second.
    """
    ids = np.resize(corpus.held_out, (count, 1, steps))
    inputs = [layers.embedding.forward(chunk) for chunk in ids]
    with client.session(MODEL) as session:
        began = time.perf_counter()
        answered = sum(1 for _ in session.stream(inputs))
        seconds = time.perf_counter() - began
        session.close()
    return answered / seconds
