"""State dicts of every kind, empty ones to load them into, and a strict comparison."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed.checkpoint as dcp


def rich_state() -> dict[str, Any]:
    """Every kind of value that torch itself can save and load."""
    generator = torch.Generator().manual_seed(1)
    matrix = torch.randn(300, 200, generator=generator)
    return {
        "model": {
            "weight": matrix,
            "layers": [{"bias": torch.randn(64, generator=generator)}, {"bias": torch.ones(3)}],
        },
        "parameter": torch.nn.Parameter(torch.randn(5, 5, generator=generator)),
        "scalar": torch.tensor(3.5),
        "empty": torch.empty(0, 4),
        "bf16": torch.randn(33, generator=generator).bfloat16(),
        "fp8": torch.randn(17, generator=generator).to(torch.float8_e4m3fn),
        "complex": torch.randn(9, dtype=torch.complex64, generator=generator),
        "bool": torch.tensor([True, False, True]),
        "int64": torch.arange(10),
        "transposed": matrix.t(),
        "strided": torch.arange(100.0).reshape(10, 10)[::2, 1::3],
        "view": torch.arange(1000.0)[100:110],
        "channels_last": torch.randn(2, 3, 8, 8, generator=generator).to(memory_format=torch.channels_last),
        "large": torch.randn(700_000, generator=generator),
        "step": 12,
        "name": "run",
        "optimizer": {"lr": 0.1, "betas": (0.9, 0.99), "rng": torch.get_rng_state()},
        "nothing": None,
    }


def blank(value: Any) -> Any:
    """The same structure with empty values, as in a resuming job before it loads."""
    if isinstance(value, dict):
        return {key: blank(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [blank(inner) for inner in value]
    if isinstance(value, torch.Tensor):
        return torch.zeros_like(value.resolve_conj().detach())
    return type(value)() if isinstance(value, (int, float, str)) else None


def same(one: Any, other: Any, path: str = "") -> None:
    """Fail unless both are bitwise equal."""
    if isinstance(one, dict):
        assert one.keys() == other.keys(), path
        for key in one:
            same(one[key], other[key], f"{path}.{key}")
    elif isinstance(one, list):
        assert len(one) == len(other), path
        for number, (a, b) in enumerate(zip(one, other, strict=True)):
            same(a, b, f"{path}.{number}")
    elif isinstance(one, torch.Tensor):
        assert (one.dtype, one.shape) == (other.dtype, other.shape), path
        if one.is_quantized or one.is_sparse:
            one, other = (t.dequantize() if t.is_quantized else t.to_dense() for t in (one, other))
        one, other = (t.detach().resolve_conj().contiguous().reshape(-1).view(torch.uint8) for t in (one, other))
        assert torch.equal(one, other), path
    else:
        assert one == other, path


@contextmanager
def alone() -> Iterator[None]:
    """Suppress torch's warning about a missing process group."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is")
        yield


def save(state: dict[str, Any], writer: Any, **options: Any) -> Any:
    with alone():
        return dcp.save(state, storage_writer=writer, **options)


def load(state: dict[str, Any], reader: Any, **options: Any) -> dict[str, Any]:
    with alone():
        dcp.load(state, storage_reader=reader, **options)
    return state


def reason(error: BaseException, rank: int = 0) -> BaseException:
    """The error of *rank* inside torch's CheckpointException."""
    assert isinstance(error, dcp.CheckpointException), error
    return error.failures[rank][0]
