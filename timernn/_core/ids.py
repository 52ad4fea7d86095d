"""Names that the client makes: for sessions, and for requests that must not be done twice."""

from __future__ import annotations

import hashlib
import secrets
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from timernn.v1 import time_rnn_service_pb2 as rnn_pb


def new_session_id() -> str:
    """Make a session name of 128 random bits that begins with a letter or a digit."""
    # A name may not begin with one of "._~-", which token_urlsafe also draws.
    return "s" + secrets.token_urlsafe(16)


def update_request_id(request: rnn_pb.UpdateRequest) -> str:
    """Return the request id of an Update that names its contributions: a digest of what it asks.

    The same contributions are taken by one step only. So whoever asks for that step again, also a
    program that was killed and started again, asks under the same id and gets the same answer.
    """
    named = sorted((c.session_id, c.epoch, tuple(c.chunk_seqs)) for c in request.contributions)
    lr = request.learning_rate if request.HasField("learning_rate") else None
    expected = request.expected_version
    facts = (request.model_id, named, request.reduction, lr, request.clip_norm)
    asked = repr((*facts, expected.number, expected.digest))
    return "u" + hashlib.sha256(asked.encode()).hexdigest()[:32]


def new_request_id() -> str:
    """Make a request id of 128 random bits."""
    return secrets.token_urlsafe(16)
