"""Which tensors of a model are loaded, which part of each, and as which type."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch

from azstoragetorch._tensors.planning import Box
from azstoragetorch.safetensors._model import Model, Stored
from azstoragetorch.safetensors._slices import Shard, box_of_shard, check_shard

Sharding = Shard | Mapping[str, Shard | None] | Callable[[str], Shard | None] | None
"""Which part of each tensor to read: one part for all, or by the name of the tensor."""


def wanted_of(
    model: Model, names: Iterable[str] | None, parts: Callable[[str], Shard | None]
) -> dict[str, tuple[Stored, Box]]:
    """What to load of *model*, by name."""
    return {
        name: (stored, box_of_shard(check_shard(parts(name)), stored.shape))
        for name, stored in model.select(names).items()
    }


def converted(stored: torch.dtype, dtype: torch.dtype | None) -> torch.dtype:
    """The type of a loaded tensor: *dtype* in the place of floating-point types."""
    return dtype if dtype is not None and stored.is_floating_point else stored


def sharding(shard: Sharding) -> Callable[[str], Shard | None]:
    """*shard* as a function of the name.

    Raises:
        TypeError: it is not of one of the types.
        ValueError: there is no such part.
    """
    if callable(shard):
        return shard
    if isinstance(shard, Mapping):
        by_name: Mapping[str, Any] = shard
        return by_name.get
    part = check_shard(shard)
    return lambda _name: part
