"""Load tensors into new memory: of one file, or of a folder."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch

from azstoragetorch._blob.credentials import Credential
from azstoragetorch._engine.config import TransferConfig
from azstoragetorch._tensors.planning import Box
from azstoragetorch._tensors.progress import ProgressCallback
from azstoragetorch.safetensors._fetch import fetch
from azstoragetorch.safetensors._model import Model, Stored, reads_of
from azstoragetorch.safetensors._open import open_model_file
from azstoragetorch.safetensors._slices import Shard, box_of_shard, check_shard

Sharding = Shard | Mapping[str, Shard | None] | Callable[[str], Shard | None] | None
"""Which part of each tensor to read: one part for all, or by the name of the tensor."""


def load_file(
    url: str,
    device: str | int | torch.device = "cpu",
    names: Iterable[str] | None = None,
    *,
    dtype: torch.dtype | None = None,
    shard: Sharding = None,
    credential: Credential = None,
    transfer: TransferConfig | None = None,
    progress: ProgressCallback | None = None,
) -> dict[str, torch.Tensor]:
    """Load the tensors of a safetensors file in a blob, as ``safetensors.torch.load_file`` does for local files.

    Only the bytes that are needed are fetched, by several requests at once, straight into the tensors. All of them
    are of one version of the blob.

    Args:
        url: URL of the file, in any of the forms that :doc:`the guide </guide/urls>` lists.
        device: Where the tensors are created, as for `torch.device`.
        names: Load only these; None loads all.
        dtype: Convert tensors of floating-point types to this type; others keep theirs.
        shard: Load only a part of each tensor, for tensor parallelism: ``(dim, rank, world)`` is part *rank* of *world*
            parts of dimension *dim*, as `torch.chunk` divides it. A mapping or a function from the name of a tensor to
            such a tuple, or to None for all of it, chooses by name. Tensors without that dimension are loaded whole.
        credential: As for :class:`~azstoragetorch.io.BlobIO`.
        transfer: How to transfer; see :class:`azstoragetorch.TransferConfig`. ``memory_limit`` bounds the memory that
            is used in addition to the tensors.
        progress: Called with the bytes done and planned, from any thread but one call at a time.

    Returns:
        The tensors by name, in the order of their bytes.

    Raises:
        SafetensorsError: the blob is not a valid safetensors file, it does not have one of *names*, or torch does not
            have the type of a tensor.
        BlobChangedError: the file was overwritten while it was read.
        ResourceNotFoundError: the blob does not exist.
    """
    parts = sharding(shard)
    model = open_model_file(url, credential, transfer)
    return load_model(model, torch.device(device), names, dtype, parts, progress)


def load_model(
    model: Model,
    device: torch.device,
    names: Iterable[str] | None,
    dtype: torch.dtype | None,
    parts: Callable[[str], Shard | None],
    progress: ProgressCallback | None,
) -> dict[str, torch.Tensor]:
    """Those of *model* called *names* on *device*, of each the part that *parts* says."""
    tensors: dict[str, torch.Tensor] = {}
    reads = []
    for name, (stored, box) in wanted_of(model, names, parts).items():
        tensors[name] = stored.new(box, converted(stored.dtype, dtype), device)
        reads += reads_of(stored, box, tensors[name])
    fetch(reads, model.transfer, progress=progress)
    return tensors


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
