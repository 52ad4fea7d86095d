"""What the package offers."""

from __future__ import annotations

import subprocess
import sys

import rnn_engine


def test_all_names_exist_and_are_sorted() -> None:
    """`__all__` lists the public names, in an order that diffs well."""
    assert all(hasattr(rnn_engine, name) for name in rnn_engine.__all__)
    assert len(set(rnn_engine.__all__)) == len(rnn_engine.__all__)


def test_the_engine_needs_only_numpy() -> None:
    """Importing it in a fresh interpreter brings in neither the service nor its libraries."""
    program = (
        "import sys, rnn_engine;"
        "print([m for m in ('grpc', 'redis', 'service', 'timernn', 'torch') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True)
    assert done.stdout.strip() == b"[]"
