"""Checks of single fields that need only the message and the limits."""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING, Final

from service.domain.errors import bad_field, quoted
from service.domain.types import DIGEST_BYTES, Selector, Version

if TYPE_CHECKING:
    from collections.abc import Sequence

    from google.protobuf.duration_pb2 import Duration

    from service.settings import Limits
    from timernn.v1 import time_rnn_service_pb2 as rnn_pb
    from timernn.v1.tensor_pb2 import WeightsVersion

ID_PATTERN: Final = r"[A-Za-z0-9][A-Za-z0-9._~-]{0,127}"
MAX_EPOCH: Final = 2**48  # in the year 10889: an epoch is a time in milliseconds or a little more
MAX_NUMBER: Final = 2**53 - 1  # what every language's numbers, JSON's too, hold exactly
MAX_REQUEST_ID_BYTES: Final = 128
MAX_PAGE_SIZE: Final = 1000
DEFAULT_PAGE_SIZE: Final = 100
MAX_PAGE_TOKEN_CHARS: Final = 1024
MAX_LEARNING_RATE: Final = 1e3

_is_id = re.compile(ID_PATTERN, re.ASCII).fullmatch


def check_id(name: str, value: str) -> str:
    """Return the name of a session, model or checkpoint, or refuse it."""
    if _is_id(value):
        return value
    if not value:
        raise bad_field(name, "required")
    got = f"length {len(value)}" if len(value) > 128 else quoted(value)
    raise bad_field(name, f"must match ^{ID_PATTERN}$, got {got}")


def check_optional_id(name: str, value: str) -> str:
    """Return a name that may be empty, or refuse it."""
    return check_id(name, value) if value else value


def check_number(name: str, value: int, lowest: int) -> int:
    """Return a whole number of lowest to 2^53 - 1, or refuse it."""
    if lowest <= value <= MAX_NUMBER:
        return value
    raise bad_field(name, f"must be {lowest} to 2^53-1, got {value}")


def check_restored_epoch(name: str, value: int) -> int:
    """Return an epoch that may be begun again, 0 for none, or refuse it: epochs are times in ms."""
    if 0 <= value <= MAX_EPOCH:
        return value
    raise bad_field(name, f"must be 0 to 2^48, got {value}")


def check_size(name: str, value: int, limit: int) -> int:
    """Return a size of 1 to limit, or refuse it."""
    if 1 <= value <= limit:
        return value
    raise bad_field(name, f"must be 1 to {limit}, got {value}")


def check_real(name: str, value: float, lowest: float, highest: float = math.inf) -> float:
    """Return a finite number of lowest to highest, or refuse it."""
    if math.isfinite(value) and lowest <= value <= highest:
        return value
    bound = f" to {highest:g}" if math.isfinite(highest) else " or more"
    raise bad_field(name, f"must be {lowest:g}{bound}, got {value:g}")


def check_factor(name: str, value: float) -> float:
    """Return a number in [0, 1), or refuse it."""
    if 0.0 <= value < 1.0:
        return value
    raise bad_field(name, f"must be in [0, 1), got {value:g}")


def check_positive(name: str, value: float) -> float:
    """Return a finite number above 0, or refuse it."""
    if math.isfinite(value) and value > 0.0:
        return value
    raise bad_field(name, f"must be above 0, got {value:g}")


def check_request_id(name: str, value: str, *, required: bool = False) -> str:
    """Return a request id of at most 128 bytes, or refuse it."""
    if required and not value:
        raise bad_field(name, "required: without it a retry cannot be safe")
    size = len(value.encode())
    if size > MAX_REQUEST_ID_BYTES:
        raise bad_field(name, f"must be at most {MAX_REQUEST_ID_BYTES} bytes, got {size}")
    return value


def check_token(name: str, value: bytes, *, required: bool = False) -> bytes:
    """Return a state token of 16 bytes, or an empty one where it may be left out."""
    if len(value) == DIGEST_BYTES or (not value and not required):
        return value
    expected = f"{DIGEST_BYTES} bytes" if required else f"0 or {DIGEST_BYTES} bytes"
    raise bad_field(name, f"must be {expected}, got {len(value)}")


def check_page(page_size: int, page_token: str) -> tuple[int, str]:
    """Return size, with its default, and token of a page, or refuse them."""
    if not 0 <= page_size <= MAX_PAGE_SIZE:
        raise bad_field("page_size", f"must be 1 to {MAX_PAGE_SIZE}, got {page_size}")
    if len(page_token) > MAX_PAGE_TOKEN_CHARS:
        raise bad_field("page_token", "must be a next_page_token of the page before")
    return page_size or DEFAULT_PAGE_SIZE, page_token


def ttl_from_proto(name: str, ttl: Duration, limits: Limits) -> int:
    """Return a time to live in ms within the limits, or refuse it."""
    ms = ttl.seconds * 1000 + ttl.nanos // 1_000_000
    if abs(ttl.nanos) < 10**9 and limits.min_ttl_ms <= ms <= limits.max_ttl_ms:
        return ms
    low, high = limits.min_ttl_ms / 1000, limits.max_ttl_ms / 1000
    got = f"{ttl.seconds} s {ttl.nanos} ns"
    raise bad_field(name, f"must be {low:g} s to {high:g} s, got {got}")


def version_from_proto(name: str, version: WeightsVersion) -> Version:
    """Return the name of a weights version, or refuse it."""
    number, digest = version.number, version.digest
    check_number(f"{name}.number", number, 1)
    if len(digest) not in (0, DIGEST_BYTES):
        raise bad_field(f"{name}.digest", f"must be 0 or {DIGEST_BYTES} bytes, got {len(digest)}")
    return Version(number, digest)


def selectors_from_proto(
    selectors: Sequence[rnn_pb.ContributionSelector], limits: Limits
) -> tuple[Selector, ...]:
    """Return the contributions that a request names, or refuse them."""
    limit = limits.contributions_per_model
    count = len(selectors)
    if count <= limit:
        count = sum(max(1, len(selector.chunk_seqs)) for selector in selectors)
    if count > limit:
        raise bad_field("contributions", f"must name at most {limit}, got {count}")
    return tuple(_selector_from_proto(index, each) for index, each in enumerate(selectors))


def _selector_from_proto(index: int, selector: rnn_pb.ContributionSelector) -> Selector:
    name = f"contributions[{index}]"
    chunk_seqs = tuple(selector.chunk_seqs)
    check_id(f"{name}.session_id", selector.session_id)
    check_number(f"{name}.epoch", selector.epoch, 1 if chunk_seqs else 0)
    for seq in chunk_seqs:
        check_number(f"{name}.chunk_seqs", seq, 1)
    if len(set(chunk_seqs)) != len(chunk_seqs):
        raise bad_field(f"{name}.chunk_seqs", "must name each chunk once")
    return Selector(selector.session_id, selector.epoch, chunk_seqs)
