"""The types of safetensors, by the names that headers use, and the types of torch that they are."""

from __future__ import annotations

import torch

_NAMES = {  # in the order in which files list tensors: wider elements first, so that all are aligned
    "U64": "uint64",
    "I64": "int64",
    "F64": "float64",
    "C64": "complex64",
    "F32": "float32",
    "U32": "uint32",
    "I32": "int32",
    "BF16": "bfloat16",
    "F16": "float16",
    "U16": "uint16",
    "I16": "int16",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E8M0": "float8_e8m0fnu",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "I8": "int8",
    "U8": "uint8",
    "F6_E3M2": "",
    "F6_E2M3": "",
    "F4": "float4_e2m1fn_x2",
    "BOOL": "bool",
}
_BITS = {"F6_E3M2": 6, "F6_E2M3": 6, "F4": 4, "BOOL": 8, "BF16": 16, "F8_E8M0": 8}

BITS = {name: _BITS.get(name) or int("".join(filter(str.isdigit, name.partition("_")[0]))) for name in _NAMES}
"""Bits of one element, by the name of its type."""

RANK = {name: place for place, name in enumerate(_NAMES)}
"""The place of a type in the order of a file."""

TORCH: dict[str, torch.dtype] = {
    name: getattr(torch, theirs) for name, theirs in _NAMES.items() if theirs and hasattr(torch, theirs)
}
"""The types that this torch has."""

FROM_TORCH = {dtype: name for name, dtype in TORCH.items()}
"""The name of each type of torch that a file can hold."""

PACKED = {"F4": 2}
"""Types of which an element of torch holds several: the last dimension is that much shorter in torch."""


def torch_shape(name: str, shape: tuple[int, ...]) -> tuple[int, ...] | None:
    """The shape in torch of a tensor that a header gives the type *name* and *shape*; None if torch cannot hold it."""
    packed = PACKED.get(name)
    if packed is None:
        return shape
    if not shape or shape[-1] % packed:
        return None
    return (*shape[:-1], shape[-1] // packed)


def header_shape(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape that a header gives a tensor of torch of the type *name* and *shape*."""
    packed = PACKED.get(name)
    return shape if packed is None or not shape else (*shape[:-1], shape[-1] * packed)
