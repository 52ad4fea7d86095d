"""Weights, moments and gradients as bytes: the stored form, and safetensors for clients.

The stored form of weights and gradients is Wx, Wh, b, one after another, little-endian, in C order;
of moments: the number of steps (8 bytes), then the slots' arrays in the optimizer's order.
A specification is stored as JSON. Its layout governs everything else that is stored of its model.
"""

from __future__ import annotations

import json
import struct
from dataclasses import asdict, fields
from functools import lru_cache
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from rnn_engine import (
    OPTIMIZERS,
    Params,
    TanhNetwork,
    init_moments,
    moments_from_arrays,
    moments_to_arrays,
)
from service.domain.blob import blob_of_arrays
from service.domain.digests import content_digest
from service.domain.errors import InvalidArgument, quoted
from service.domain.finite import check_finite
from service.domain.refusals import unsupported_layout
from service.domain.types import ModelSpec

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from rnn_engine import (
        Array,
        Grads,
        Moments,
    )
    from service.domain.blob import Blob
    from service.domain.ports import Bytes

SPEC_LAYOUT = 1
_CELL = "tanh"
_DTYPES = ("float32", "float64")
HEADER_BYTES = 64 * 1024  # of a safetensors file; ours need a few hundred
_STEP = struct.Struct(">Q")
_NAMES = ("Wx", "Wh", "b")
_SPEC = "the model's specification"
_SPEC_FIELDS = frozenset(
    ("layout", "cell", "model_id", "input_size", "hidden_size", "dtype", "optimizer")
)
_OPTIMIZERS = {kind.__name__: kind for kind in OPTIMIZERS}


def spec_to_bytes(spec: ModelSpec) -> bytes:
    """Return a specification as the store keeps it."""
    optimizer = {"kind": type(spec.optimizer).__name__, **asdict(cast("Any", spec.optimizer))}
    facts = {
        "layout": SPEC_LAYOUT,
        "cell": _CELL,
        "model_id": spec.model_id,
        "input_size": spec.input_size,
        "hidden_size": spec.hidden_size,
        "dtype": spec.dtype,
        "optimizer": optimizer,
    }
    return json.dumps(facts, sort_keys=True).encode()


@lru_cache(maxsize=4096)
def spec_from_bytes(data: bytes) -> ModelSpec:
    """Read a specification from the store.

    Raises:
        UnsupportedLayout: If it has a layout, a cell, a field or a value of one that this release does not
            know, or lacks a field: its numbers would mean something else here.
    """
    facts = _json_object(data)
    _check_known("layout", facts.get("layout"), (SPEC_LAYOUT,))
    _check_known("cell", facts.get("cell"), (_CELL,))
    _check_fields("", facts, _SPEC_FIELDS)
    _check_known("dtype", facts["dtype"], _DTYPES)
    optimizer = facts["optimizer"]
    _check_known("optimizer", optimizer.get("kind"), tuple(_OPTIMIZERS))
    kind = _OPTIMIZERS[optimizer.pop("kind")]
    _check_fields("optimizer ", optimizer, {field.name for field in fields(kind)})
    return ModelSpec(
        facts["model_id"],
        facts["input_size"],
        facts["hidden_size"],
        facts["dtype"],
        kind(**optimizer),
    )


def _json_object(data: bytes) -> dict[str, Any]:
    try:
        facts = json.loads(data)
    except ValueError:
        facts = None
    if not isinstance(facts, dict) or not isinstance(facts.get("optimizer", {}), dict):
        raise unsupported_layout(_SPEC, f"{len(data)} bytes", "a JSON object")
    return facts


def _check_known(name: str, found: object, known: tuple[object, ...]) -> None:
    if found not in known or isinstance(found, bool):
        shown = ", ".join(str(one) for one in known)
        raise unsupported_layout(_SPEC, f"{name} {quoted(str(found))}", f"{name} {shown}")


def _check_fields(of: str, found: Collection[str], known: Collection[str]) -> None:
    extra, missing = sorted(set(found) - set(known)), sorted(set(known) - set(found))
    if extra or missing:
        shown = [quoted(name) for name in extra] + [f"no {name}" for name in missing]
        named = f"{of}field {', '.join(shown[:4])}"
        raise unsupported_layout(_SPEC, named, f"{of}fields {', '.join(sorted(known))}")


def draw_params(spec: ModelSpec, seed: int) -> Params:
    """Draw first weights: normal, scaled by 1/sqrt(D) and 1/sqrt(H); b is zero."""
    network = TanhNetwork(spec.input_size, spec.hidden_size)
    return network.init(np.random.default_rng(seed), spec.dtype)


def params_to_blob(params: Params) -> Blob:
    """Return weights as the store keeps them."""
    return blob_of_arrays((params.Wx, params.Wh, params.b))


def params_from_bytes(spec: ModelSpec, data: Bytes) -> Params:
    """Read weights from the store; the arrays are read-only views."""
    return Params(*_split(spec, data))


def grads_to_blob(grads: Grads) -> Blob:
    """Return gradients as the store keeps them."""
    return blob_of_arrays(grads)


def grads_from_bytes(spec: ModelSpec, data: Bytes) -> Grads:
    """Read gradients from the store."""
    return TanhNetwork(spec.input_size, spec.hidden_size).weight_spec.pack(_split(spec, data))


def moments_to_blob(moments: Moments) -> Blob:
    """Return moments as the store keeps them."""
    return blob_of_arrays(moments_to_arrays(moments).values(), head=_STEP.pack(moments.step))


def moments_from_bytes(spec: ModelSpec, params: Params, data: Bytes | None) -> Moments:
    """Read moments from the store; the initial ones if the store did not keep them."""
    if not data:
        return init_moments(spec.optimizer, params)
    slots = spec.optimizer.slot_names
    size = spec_bytes(spec)
    _check_size("moments of the model", data, _STEP.size + len(slots) * size)
    arrays: dict[str, Array] = {}
    for i, slot in enumerate(slots):
        start = _STEP.size + i * size
        three = _split(spec, data[start : start + size])
        arrays |= {f"{slot}.{name}": array for name, array in zip(_NAMES, three, strict=True)}
    (step,) = _STEP.unpack_from(data)
    return moments_from_arrays(spec.optimizer, step, arrays, params)


def version_digest(weights: Blob, moments: Blob) -> bytes:
    """Return the digest that names weights and moments."""
    return content_digest(weights, moments)


def spec_bytes(spec: ModelSpec) -> int:
    """Return the bytes of a specification's weights."""
    d, h = spec.input_size, spec.hidden_size
    return (d * h + h * h + h) * np.dtype(spec.dtype).itemsize


def file_bytes_limit(spec: ModelSpec) -> int:
    """Return the most bytes that a safetensors file for this specification can need."""
    return spec_bytes(spec) * (1 + len(spec.optimizer.slot_names)) + HEADER_BYTES + 8


def to_safetensors(params: Params, moments: Moments | None) -> bytes:
    """Return a safetensors file with Wx, Wh, b and, where given, the moments."""
    tensors: dict[str, Array] = {"Wx": params.Wx, "Wh": params.Wh, "b": params.b}
    metadata = {"format": "timernn"}
    if moments is not None:
        tensors |= moments_to_arrays(moments)
        metadata["step"] = str(moments.step)
    contiguous = {name: np.ascontiguousarray(array) for name, array in tensors.items()}
    return save(contiguous, metadata=metadata)


def from_safetensors(spec: ModelSpec, data: bytes) -> tuple[Params, Moments]:
    """Read a client's safetensors file.

    Raises:
        InvalidArgument: BAD_WEIGHTS if it is not such a file with exactly the tensors that the
            specification asks for; NON_FINITE if one holds NaN or Inf.
    """
    step = _check_header(data)
    try:
        tensors = load(data)
    except (SafetensorError, KeyError, ValueError, TypeError) as error:
        raise _bad_weights("the file is not valid safetensors") from error
    params = Params(*_take_three(spec, tensors, ""))
    slots = spec.optimizer.slot_names if step is not None else ()
    arrays: dict[str, Array] = {}
    for slot in slots:
        three = _take_three(spec, tensors, f"{slot}.")
        arrays |= {f"{slot}.{name}": array for name, array in zip(_NAMES, three, strict=True)}
    if tensors:
        raise _bad_weights(f"unexpected tensor {min(tensors)[:64]!r}")
    if step is None:
        return params, init_moments(spec.optimizer, params)
    return params, moments_from_arrays(spec.optimizer, step, arrays, params)


def _check_header(data: bytes) -> int | None:
    """Bound the header before anything parses it; return the step where moments are included."""
    if len(data) < 8:
        raise _bad_weights(f"expected a safetensors file, got {len(data)} bytes")
    length = int.from_bytes(data[:8], "little")
    if length > min(HEADER_BYTES, len(data) - 8):
        raise _bad_weights("expected a safetensors file: the header's length is wrong")
    try:
        metadata = json.loads(data[8 : 8 + length]).get("__metadata__", {})
        step = metadata.get("step")
        return None if step is None else _step_number(step)
    except (ValueError, AttributeError, RecursionError) as error:
        raise _bad_weights("expected a safetensors file: the header is not valid") from error


def _step_number(text: str) -> int:
    step = int(text)
    if not 0 <= step < 1 << 53:
        raise ValueError(text)
    return step


def _take_three(spec: ModelSpec, tensors: dict[str, Any], prefix: str) -> list[Array]:
    d, h = spec.input_size, spec.hidden_size
    taken = []
    for name, shape in zip(_NAMES, ((d, h), (h, h), (h,)), strict=True):
        array = tensors.pop(prefix + name, None)
        if array is None:
            raise _bad_weights(f"tensor {prefix}{name} is missing")
        if array.shape != shape or array.dtype != spec.dtype:
            text = f"{prefix}{name}: expected {spec.dtype} {shape}, got {array.dtype} {array.shape}"
            raise _bad_weights(text)
        check_finite(prefix + name, array)
        taken.append(array)
    return taken


def _bad_weights(message: str) -> InvalidArgument:
    return InvalidArgument("BAD_WEIGHTS", f"data: {message}", field="data")


def _check_size(what: str, data: Bytes, size: int) -> None:
    if len(data) != size:
        raise unsupported_layout(what, f"{len(data)} bytes", f"{size} bytes")


def _split(spec: ModelSpec, data: Bytes) -> Sequence[Array]:
    _check_size("weights or a gradient of the model", data, spec_bytes(spec))
    d, h = spec.input_size, spec.hidden_size
    flat: Array = np.frombuffer(data, spec.dtype)
    return (
        flat[: d * h].reshape(d, h),
        flat[d * h : d * h + h * h].reshape(h, h),
        flat[d * h + h * h :],
    )
