"""Weights for an engine that serves a model: names and tensors in a stream, of the shards of this rank."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from azstoragetorch.safetensors import iter_tensors

# Layers of which ranks hold rows, and layers of which they hold columns, as engines divide transformers.
ROWS = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "embed_tokens", "lm_head")
COLUMNS = ("o_proj", "down_proj")


def shard_of(rank: int, world: int) -> Callable[[str], tuple[int, int, int] | None]:
    """Which part of the tensor of a name is that of *rank* of *world*."""

    def choose(name: str) -> tuple[int, int, int] | None:
        layer = name.split(".")[-2] if "." in name else name
        dim = 0 if layer in ROWS else 1 if layer in COLUMNS else None
        return None if dim is None else (dim, rank, world)

    return choose


def weights(url: str, *, rank: int = 0, world: int = 1, **options: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """The weights of the model in the folder *url*: what ``load_weights`` of an engine takes.

    They come in the order in which they arrive, and only requests in flight take memory.
    """
    return iter_tensors(url, shard=shard_of(rank, world), **options)


def load_weights(
    model: nn.Module, stream: Iterable[tuple[str, torch.Tensor]], renamed: Mapping[str, str] | None = None
) -> set[str]:
    """Copy the weights of *stream* into *model*, as engines do; returns the names of the parameters that were loaded.

    *renamed* has the name in the model of each name in the files that differs.
    """
    parameters = dict(model.named_parameters())
    loaded = set()
    with torch.no_grad():
        for name, tensor in stream:
            target = parameters[(renamed or {}).get(name, name)]
            target.copy_(tensor)
            loaded.add((renamed or {}).get(name, name))
    return loaded
