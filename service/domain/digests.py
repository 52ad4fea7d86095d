"""Digests that name content: equal content has the same digest on every replica."""

from __future__ import annotations

import hashlib
import secrets
import struct
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np

from service.domain.blob import Blob
from service.domain.types import DIGEST_BYTES, ContributionKey, RequestDigest

if TYPE_CHECKING:
    from collections.abc import Iterable

    from rnn_engine import Array
    from service.domain.types import Backward, ChunkKey, SessionKey, Update, Version

_NUMBER = struct.Struct(">Q")
_SHAPE = struct.Struct(">cccQQQ")


def chunk_digest(xs: Array, *, train: bool) -> bytes:
    """Return the 16 bytes that stand for a chunk's content: mode, dtype, shape and elements."""
    head = _SHAPE.pack(b"T" if train else b"I", b"f", xs.dtype.char.encode(), *xs.shape)
    made = hashlib.sha256(head)
    made.update(xs.data if xs.flags.c_contiguous else xs.tobytes())
    return made.digest()[:DIGEST_BYTES]


def next_token(before: bytes, digest: bytes, version: Version) -> bytes:
    """Return the state token after a chunk: a hash chain over all that led to the state."""
    link = before + digest + _NUMBER.pack(version.number) + version.digest
    return hashlib.sha256(link).digest()[:DIGEST_BYTES]


def first_token(state: bytes) -> bytes:
    """Return the first token of an epoch's hash chain."""
    return hashlib.sha256(b"state" + state).digest()[:DIGEST_BYTES]


def request_name(request_id: str) -> bytes:
    """Return the 16 bytes that stand for a request id; without an id, 16 random bytes.

    With random bytes even a request without an id may be sent to the store twice: the store recognizes
    the second try.
    """
    if not request_id:
        return secrets.token_bytes(DIGEST_BYTES)
    return hashlib.sha256(b"request" + request_id.encode()).digest()[:DIGEST_BYTES]


def request_digest(request_id: str, *content: bytes | memoryview) -> RequestDigest:
    """Return what stands for a request id and for the content of its request."""
    return RequestDigest(request_name(request_id), content_digest(*content))


@lru_cache(maxsize=65536)
def session_digest(key: SessionKey) -> bytes:
    """Return the 16 bytes that stand for a session wherever its name is not needed."""
    return name_digest("session", *key)


def name_digest(*parts: str) -> bytes:
    """Return the 16 bytes that stand for a sequence of names."""
    joined = b"".join(len(part.encode()).to_bytes(4, "big") + part.encode() for part in parts)
    return hashlib.sha256(joined).digest()[:DIGEST_BYTES]


def contribution_key(chunk: ChunkKey) -> ContributionKey:
    """Return which contribution a chunk's is."""
    return ContributionKey(session_digest(chunk.session), chunk.epoch, chunk.chunk_seq)


def content_digest(*parts: bytes | memoryview | Blob) -> bytes:
    """Return the 16 bytes that stand for a sequence of byte strings."""
    made = hashlib.sha256()
    for part in parts:
        pieces = part.pieces if isinstance(part, Blob) else (part,)
        made.update(_NUMBER.pack(sum(map(len, pieces))))
        for piece in pieces:
            made.update(piece)
    return made.digest()[:DIGEST_BYTES]


def gradient_digest(op: Backward) -> bytes:
    """Return the 16 bytes that stand for the gradients that a Backward was given, and their chunk."""
    arriving = b"" if op.d_state is None else op.d_state.tobytes()
    return content_digest(op.token, np.ascontiguousarray(op.d_outputs).data.cast("B"), arriving)


def update_digest(op: Update) -> bytes:
    """Return the 16 bytes that stand for what an Update was asked to do."""
    expected = (op.expected.number, op.expected.digest) if op.expected else None
    selectors = sorted((s.session_id, s.epoch, s.chunk_seqs) for s in op.selectors)
    facts: Iterable[object] = (
        op.model_id,
        selectors,
        op.reduction.value,
        op.learning_rate,
        op.clip_norm,
        expected,
    )
    return content_digest(*(repr(fact).encode() for fact in facts))
