"""Train a character-level language model whose recurrent layer lives on a timernn server.

Run it with `python -m examples.charlm`; `--help` lists the options. In this order it

1. starts a server, with the embedded store, as a process of its own;
2. trains on the text of Python's help(): embedding and softmax here, the recurrent layer there;
3. kills the server half way with kill -9 and starts it again, while the training goes on;
4. checks that nothing was lost, and judges the model on text that it has not seen;
5. lets the model write 300 characters, one chunk at a time;
6. draws the loss curve and prints what was measured.
"""

from __future__ import annotations

import argparse
import signal
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import timernn
from examples.charlm import report, sampling, training
from examples.charlm.text import load_corpus
from examples.server_process import ServerError, ServerProcess

if TYPE_CHECKING:
    from collections.abc import Sequence

PATIENCE_S = 180.0  # for one call: a slow machine takes its time to start a server again
OUTPUT = Path(__file__).parents[1] / "output"


def run(options: argparse.Namespace) -> None:
    """Go through the six parts."""
    corpus = load_corpus()
    layers = training.ClientLayers.draw(len(corpus.alphabet))
    with (
        tempfile.TemporaryDirectory(prefix="timernn-demo-", ignore_cleanup_errors=True) as folder,
        ServerProcess(Path(folder)) as server,
        timernn.connect(server.address, timeout=PATIENCE_S) as client,
    ):
        print(f"A server with the embedded store serves on {server.address}, process {server.pid}.")
        client.create_model(
            training.MODEL,
            input_size=training.EMBEDDING_SIZE,
            hidden_size=training.HIDDEN_SIZE,
            seed=0,
            optimizer=timernn.Adam(),
        )
        before = training.perplexity(client, layers, corpus)
        print(
            f"Training on {len(corpus.train):,} characters of {len(corpus.alphabet)} kinds for about"
            f" {options.seconds:.0f} s. Perplexity on held-out text before: {before:.1f}"
        )
        budget = training.Budget(options.seconds, options.steps)
        with training.Crash(server) as crash:
            history = training.train(client, layers, corpus, budget, crash, options.lr)
        check_nothing_lost(history)
        after = training.perplexity(client, layers, corpus)
        print(f"Perplexity on held-out text: {before:.1f} before, {after:.2f} after. It writes:\n")
        latencies = sampling.write(client, layers, corpus, characters=options.characters)
        streamed = sampling.read(client, layers, corpus)
    options.output.mkdir(parents=True, exist_ok=True)
    picture = options.output / "charlm.png"
    report.draw_loss(history, picture)
    print("\nMeasured:\n" + report.table(measured(history, before, after, latencies, streamed)))
    print(f"\nThe loss curve: {picture}")


def check_nothing_lost(history: training.History) -> None:
    """Compare the server's own counts with the client's.

    Raises:
        RuntimeError: If a chunk or a step is missing, or was applied twice.
    """
    steps = len(history.losses)
    if history.chunk_seq != steps or history.versions != steps:
        raise RuntimeError(
            f"{steps} steps were made, but the server counts {history.chunk_seq} chunks and"
            f" {history.versions} versions of the weights"
        )
    print(
        f"Nothing was lost: {steps} steps here, {history.chunk_seq} chunks and {history.versions}"
        " new versions of the weights there."
    )


def measured(
    history: training.History,
    before: float,
    after: float,
    latencies: sampling.Latencies,
    streamed: float,
) -> list[tuple[str, str]]:
    """Return the rows of the closing table."""
    steps = len(history.losses)
    loss_before, loss_after = history.around_crash()
    return [
        (
            "training",
            f"{steps} steps in {history.seconds:.0f} s, {steps / history.seconds:.1f} steps/s",
        ),
        ("perplexity on held-out text", f"{before:.1f} before, {after:.2f} after"),
        (
            "server killed",
            f"after step {history.crash_step}, ready again after {history.down_s:.1f} s",
        ),
        ("loss around it", f"{loss_before:.3f} the 50 steps before, {loss_after:.3f} the 50 after"),
        ("one character a chunk", f"{latencies.chunks_per_s:.0f} chunks/s"),
        (
            "latency of such a chunk",
            f"p50 {latencies.percentile_ms(50):.2f} ms, p99 {latencies.percentile_ms(99):.2f} ms",
        ),
        ("pipelined, 16 characters a chunk", f"{streamed:.0f} chunks/s"),
    ]


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m examples.charlm",
        description="Train a language model through a timernn server that is killed half way.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--seconds", type=float, default=90.0, help="how long to train")
    parser.add_argument("--steps", type=int, help="train at most so many steps")
    parser.add_argument(
        "--lr", type=float, default=6e-3, help="first learning rate; it falls to 5 %%"
    )
    parser.add_argument("--characters", type=int, default=300, help="how many to write at the end")
    parser.add_argument("--output", type=Path, default=OUTPUT, help="folder for the picture")
    options = parser.parse_args(arguments)
    if options.seconds <= 0 or (options.steps is not None and options.steps < 2):
        parser.error("--seconds must be above 0 and --steps at least 2")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Run and return the exit code; whatever happens, the server is stopped."""
    options = parse(arguments)
    # Asked to end, end as after Ctrl-C: with the server stopped.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        run(options)
    except KeyboardInterrupt:
        print("\nStopped.", file=sys.stderr)
        return 130
    except (ServerError, timernn.Error, RuntimeError, OSError) as error:
        print(f"examples.charlm: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
