"""Weights, moments and gradients as bytes: the stored form, and safetensors for clients.

The stored form of weights and gradients is the arrays that the network's `weight_spec` names, in its order, for a tanh
layer Wx, Wh, b, one after another, little-endian, in C order; of moments: the number of steps (8 bytes), then
the slots' arrays in the optimizer's order. A specification is stored as JSON. Its layout governs everything else
that is stored of its model.
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
        Arrays,
        Grads,
        Moments,
        Network,
        Weights,
    )
    from service.domain.blob import Blob
    from service.domain.ports import Bytes

SPEC_LAYOUT = 1
CELLS: dict[str, type[Network]] = {"tanh": TanhNetwork}
"""The networks that a model may be, by the name under which a specification is stored."""
_DTYPES = ("float32", "float64")
HEADER_BYTES = 64 * 1024  # of a safetensors file; ours need a few hundred
_STEP = struct.Struct(">Q")
_SPEC = "the model's specification"
_SPEC_FIELDS = frozenset(("layout", "cell", "model_id", "dtype", "optimizer"))
_OPTIMIZERS = {kind.__name__: kind for kind in OPTIMIZERS}


def spec_to_bytes(spec: ModelSpec) -> bytes:
    """Return a specification as the store keeps it."""
    optimizer = {"kind": type(spec.optimizer).__name__, **asdict(cast("Any", spec.optimizer))}
    facts = {
        "layout": SPEC_LAYOUT,
        "model_id": spec.model_id,
        **network_facts(spec.network),
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
    _check_known("cell", facts.get("cell"), tuple(CELLS))
    cell = CELLS[facts["cell"]]
    sizes = _size_names(cell)
    _check_fields("", facts, _SPEC_FIELDS.union(sizes))
    _check_known("dtype", facts["dtype"], _DTYPES)
    optimizer = facts["optimizer"]
    _check_known("optimizer", optimizer.get("kind"), tuple(_OPTIMIZERS))
    kind = _OPTIMIZERS[optimizer.pop("kind")]
    _check_fields("optimizer ", optimizer, {field.name for field in fields(kind)})
    network = cell(**{name: facts[name] for name in sizes})
    return ModelSpec(facts["model_id"], network, facts["dtype"], kind(**optimizer))


def spec_facts(spec: ModelSpec) -> dict[str, Any]:
    """Return what a specification says beside the model's name, by name."""
    return {**network_facts(spec.network), "dtype": spec.dtype, "optimizer": spec.optimizer}


def network_facts(network: Network) -> dict[str, Any]:
    """Return what a network is by name: its cell, and the sizes that it is made from."""
    cell = next(name for name, kind in CELLS.items() if kind is type(network))
    return {"cell": cell, **{name: getattr(network, name) for name in _size_names(type(network))}}


def _size_names(cell: type[Any]) -> tuple[str, ...]:
    return tuple(one.name for one in fields(cell) if one.init)


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


def draw_weights(spec: ModelSpec, seed: int) -> Weights:
    """Draw first weights, as the network does."""
    return spec.network.init(np.random.default_rng(seed), spec.dtype)


def weights_to_blob(weights: Weights) -> Blob:
    """Return weights as the store keeps them."""
    return blob_of_arrays(weights)


def weights_from_bytes(spec: ModelSpec, data: Bytes) -> Weights:
    """Read weights from the store."""
    return _arrays_from_bytes(spec, data)


def grads_to_blob(grads: Grads) -> Blob:
    """Return gradients as the store keeps them."""
    return blob_of_arrays(grads)


def grads_from_bytes(spec: ModelSpec, data: Bytes) -> Grads:
    """Read gradients from the store."""
    return _arrays_from_bytes(spec, data)


def moments_to_blob(moments: Moments) -> Blob:
    """Return moments as the store keeps them."""
    return blob_of_arrays(moments_to_arrays(moments).values(), head=_STEP.pack(moments.step))


def moments_from_bytes(spec: ModelSpec, weights: Weights, data: Bytes | None) -> Moments:
    """Read moments from the store; where they were not kept the optimizer starts anew."""
    if not data:
        return init_moments(spec.optimizer, weights)
    slots = spec.optimizer.slot_names
    size = spec_bytes(spec)
    _check_size("moments of the model", data, _STEP.size + len(slots) * size)
    arrays: dict[str, Array] = {}
    for i, slot in enumerate(slots):
        start = _STEP.size + i * size
        arrays |= _named(spec, f"{slot}.", _split(spec, data[start : start + size]))
    (step,) = _STEP.unpack_from(data)
    return moments_from_arrays(spec.optimizer, step, arrays, weights)


def version_digest(weights: Blob, moments: Blob) -> bytes:
    """Return the digest that names weights and moments."""
    return content_digest(weights, moments)


def spec_bytes(spec: ModelSpec) -> int:
    """Return the bytes of a specification's weights."""
    return spec.network.weight_spec.size * np.dtype(spec.dtype).itemsize


def file_bytes_limit(spec: ModelSpec) -> int:
    """Return the most bytes that a safetensors file for this specification can need."""
    return spec_bytes(spec) * (1 + len(spec.optimizer.slot_names)) + HEADER_BYTES + 8


def to_safetensors(weights: Weights, moments: Moments | None) -> bytes:
    """Return a safetensors file with the weights by name and, where given, the moments."""
    tensors = weights.named()
    metadata = {"format": "timernn"}
    if moments is not None:
        tensors |= moments_to_arrays(moments)
        metadata["step"] = str(moments.step)
    contiguous = {name: np.ascontiguousarray(array) for name, array in tensors.items()}
    return save(contiguous, metadata=metadata)


def from_safetensors(spec: ModelSpec, data: bytes) -> tuple[Weights, Moments]:
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
    weights = spec.network.weight_spec.pack(_take_arrays(spec, tensors, ""))
    slots = spec.optimizer.slot_names if step is not None else ()
    arrays: dict[str, Array] = {}
    for slot in slots:
        arrays |= _named(spec, f"{slot}.", _take_arrays(spec, tensors, f"{slot}."))
    if tensors:
        raise _bad_weights(f"unexpected tensor {min(tensors)[:64]!r}")
    if step is None:
        return weights, init_moments(spec.optimizer, weights)
    return weights, moments_from_arrays(spec.optimizer, step, arrays, weights)


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


def _step_number(text: object) -> int:
    # A safetensors file's metadata is text alone; int() would raise other errors for a list or an infinity.
    if not isinstance(text, str):
        raise ValueError(text)  # noqa: TRY004 - a wrong file, not a wrong call
    step = int(text)
    if not 0 <= step < 1 << 53:
        raise ValueError(text)
    return step


def _take_arrays(spec: ModelSpec, tensors: dict[str, Any], prefix: str) -> list[Array]:
    taken = []
    for name, shape in spec.network.weight_spec.arrays:
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


def _named(spec: ModelSpec, prefix: str, arrays: Sequence[Array]) -> dict[str, Array]:
    names = spec.network.weight_spec.names
    return {prefix + name: array for name, array in zip(names, arrays, strict=True)}


def _arrays_from_bytes(spec: ModelSpec, data: Bytes) -> Arrays:
    return spec.network.weight_spec.pack(_split(spec, data))


def _split(spec: ModelSpec, data: Bytes) -> Sequence[Array]:
    _check_size("weights or a gradient of the model", data, spec_bytes(spec))
    return spec.network.weight_spec.split(np.frombuffer(data, spec.dtype))
