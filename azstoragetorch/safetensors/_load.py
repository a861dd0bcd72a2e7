"""Load tensors into new memory: of one file, or of a folder; alone, or together with other ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from azstoragetorch._blob.credentials import Credential
from azstoragetorch._engine.config import TransferConfig
from azstoragetorch._tensors.progress import ProgressCallback
from azstoragetorch.safetensors._fetch import fetch
from azstoragetorch.safetensors._folder import folder_at
from azstoragetorch.safetensors._model import Model, reads_of
from azstoragetorch.safetensors._open import open_model_file
from azstoragetorch.safetensors._parts import Sharding, converted, sharding, wanted_of
from azstoragetorch.safetensors._shared import SHARING, load_shared
from azstoragetorch.safetensors._slices import Shard


def load_file(
    url: str,
    device: str | int | torch.device = "cpu",
    names: Iterable[str] | None = None,
    *,
    dtype: torch.dtype | None = None,
    shard: Sharding = None,
    shared: str = "rank",
    process_group: Any = None,
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
        shared: ``"rank"``: this rank fetches what it needs. ``"node"`` or ``"world"``: all ranks of a node or of the
            process group call this function together. Each fetches about an equal part, which is sent to the others.
            Ranks may load different shards, but of the same tensors.
        process_group: The ranks that load together; by default, all of the job.
        credential: Same as for :class:`~azstoragetorch.io.BlobIO`.
        transfer: Transfer settings; see :class:`azstoragetorch.TransferConfig`. ``memory_limit`` bounds the memory that
            is used in addition to the tensors.
        progress: Called with the bytes done and planned, from any thread but one call at a time.

    Returns:
        The tensors by name, in the order of their bytes.

    Raises:
        SafetensorsError: the blob is not a valid safetensors file, it does not have one of *names*, or torch does not
            have the type of a tensor; or another rank of a shared load failed.
        BlobChangedError: the file was overwritten while it was read.
        ResourceNotFoundError: the blob does not exist.
    """
    open_it = partial(open_model_file, url, credential, transfer)
    return _load(open_it, device, names, dtype, shard, shared, process_group, progress)


def load_model_folder(
    url: str,
    device: str | int | torch.device = "cpu",
    names: Iterable[str] | None = None,
    *,
    dtype: torch.dtype | None = None,
    shard: Sharding = None,
    shared: str = "rank",
    process_group: Any = None,
    credential: Credential = None,
    transfer: TransferConfig | None = None,
    progress: ProgressCallback | None = None,
) -> dict[str, torch.Tensor]:
    """Load the tensors of a model that is saved as safetensors files in a folder.

    The files are those that the index ``model.safetensors.index.json`` names. Without an index it is the file
    ``model.safetensors``, or else all files ``*.safetensors`` in the folder itself. Parts of tensors that torch's
    ``HuggingFaceStorageWriter`` wrote on several ranks are put together. Only the files that have one of *names* are
    opened if there is an index.

    Args:
        url: URL of the folder, or of an index in it.
        device: Same as for `load_file`.
        names: Same as for `load_file`.
        dtype: Same as for `load_file`.
        shard: Same as for `load_file`.
        shared: Same as for `load_file`.
        process_group: Same as for `load_file`.
        credential: Same as for `load_file`.
        transfer: Same as for `load_file`.
        progress: Same as for `load_file`.

    Returns:
        The tensors by name.

    Raises:
        SafetensorsError: the folder has no model, or several indexes; a file or a tensor is missing; or a
            file is not valid.
        BlobChangedError: a file was overwritten while it was read.
    """
    wanted = None if names is None else [names] if isinstance(names, str) else list(names)
    open_it = partial(_open_folder, url, credential, transfer, wanted)
    return _load(open_it, device, wanted, dtype, shard, shared, process_group, progress)


def _open_folder(url: str, credential: Credential, transfer: TransferConfig | None, names: list[str] | None) -> Model:
    return folder_at(url, credential, transfer).open(names)


def _load(
    open_it: Callable[[], Model],
    device: str | int | torch.device,
    names: Iterable[str] | None,
    dtype: torch.dtype | None,
    shard: Sharding,
    shared: str,
    group: Any,
    progress: ProgressCallback | None,
) -> dict[str, torch.Tensor]:
    if shared not in SHARING:
        raise ValueError(f"shared must be one of {', '.join(map(repr, SHARING))}, not {shared!r}")
    parts, place = sharding(shard), torch.device(device)
    is_alone = not (dist.is_available() and dist.is_initialized()) or dist.get_world_size(group) == 1
    if shared == "rank" or is_alone:
        return load_model(open_it(), place, names, dtype, parts, progress)
    return load_shared(open_it, place, names, dtype, parts, per=shared, group=group, progress=progress)


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
