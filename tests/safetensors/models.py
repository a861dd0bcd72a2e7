"""Files and tensors for the tests: made with the package safetensors, or by hand where it refuses."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch
from hypothesis import strategies as st

from azstoragetorch.safetensors._dtypes import TORCH

DTYPES = sorted(TORCH.values(), key=str)


def raw(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    """A file with *header*, as bytes or as what is encoded as JSON, and *data*."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def entry(dtype: str, shape: list[int], start: int, stop: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


def filled(dtype: torch.dtype, shape: tuple[int, ...], seed: int = 0) -> torch.Tensor:
    """A tensor of random bits, which make any NaN there is; booleans are 0 or 1."""
    count = torch.Size(shape).numel()
    generator = torch.Generator().manual_seed(seed)
    bits = torch.randint(0, 256, (count * dtype.itemsize,), dtype=torch.uint8, generator=generator)
    if dtype == torch.bool:
        bits &= 1
    return bits.view(dtype).reshape(shape) if count else torch.empty(shape, dtype=dtype)


def bits(tensor: torch.Tensor) -> bytes:
    """The elements of *tensor* as bytes."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return bytes(flat.view(torch.uint8).numpy()) if flat.numel() else b""


def same(ours: Mapping[str, torch.Tensor], theirs: Mapping[str, torch.Tensor]) -> None:
    """Both have the same tensors, bit for bit."""
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert (ours[name].dtype, ours[name].shape) == (tensor.dtype, tensor.shape), name
        assert bits(ours[name]) == bits(tensor), name


shapes = st.lists(st.integers(0, 6), max_size=4).map(tuple)
names = st.text(st.characters(exclude_categories=["Cs"]), max_size=12).filter(lambda name: name != "__metadata__")


@st.composite
def models(draw: st.DrawFn) -> dict[str, torch.Tensor]:
    """Any few tensors of any type."""
    found = {}
    for name in draw(st.lists(names, max_size=6, unique=True)):
        dtype = draw(st.sampled_from(DTYPES))
        shape = draw(shapes)
        if dtype == getattr(torch, "float4_e2m1fn_x2", None) and not shape:
            shape = (1,)
        found[name] = filled(dtype, shape, draw(st.integers(0, 99)))
    return found
