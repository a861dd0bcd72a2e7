"""Load a model into memory that is there: the parameters of a module, or a state dict."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from azstoragetorch._blob.credentials import Credential
from azstoragetorch._engine.config import TransferConfig
from azstoragetorch._tensors.planning import Box
from azstoragetorch._tensors.progress import ProgressCallback
from azstoragetorch.exceptions import SafetensorsError
from azstoragetorch.safetensors._fetch import fetch
from azstoragetorch.safetensors._folder import open_model
from azstoragetorch.safetensors._model import Model, Stored, reads_of
from azstoragetorch.safetensors._parts import Sharding, sharding
from azstoragetorch.safetensors._slices import box_of_shard, check_shard


class LoadedKeys(NamedTuple):
    """What `load_into` did not load. Both lists are empty if it was called with ``strict=True``."""

    missing_keys: list[str]
    """Names that the model in the blobs lacks."""
    unexpected_keys: list[str]
    """Names that only the model in the blobs has."""


def load_into(
    target: torch.nn.Module | Mapping[str, Any],
    url: str,
    strict: bool = True,
    *,
    cast: bool = False,
    shard: Sharding = None,
    credential: Credential = None,
    transfer: TransferConfig | None = None,
    progress: ProgressCallback | None = None,
) -> LoadedKeys:
    """Load a safetensors file, or a folder of them, into the memory of *target*.

    Everything is checked before the first byte is written: names, shapes, and types. Contiguous tensors on the CPU are
    received into directly; nothing is allocated for them. A load that fails may have written to some tensors.

    Args:
        target: A module, whose parameters and persistent buffers are loaded, or tensors by name. Tensors on the meta
            device have no memory: call ``module.to_empty(device=...)`` first.
        url: URL of a file, which ends in ``.safetensors``, of a folder, or of an index in it.
        strict: Raise an error if names are missing or unexpected. Tied tensors, which share memory, need only one of
            their names.
        cast: Convert elements to the types of *target*. Otherwise a type that differs is an error.
        shard: Same as for `load_file`: *target* has only this part of each tensor.
        credential: Same as for :class:`~azstoragetorch.io.BlobIO`.
        transfer: Transfer settings; see :class:`azstoragetorch.TransferConfig`.
        progress: Same as for `load_file`.

    Returns:
        The names that were not loaded; both lists are empty if *strict*.

    Raises:
        SafetensorsError: a name is missing or unexpected, a shape or type differs, or a tensor of *target* has no
            memory that can be loaded into. Nothing was written.
        BlobChangedError: a file was overwritten while it was read. Tensors may have been written to.
    """
    parts = sharding(shard)
    state = target.state_dict(keep_vars=True) if isinstance(target, torch.nn.Module) else target
    tensors = {name: value for name, value in state.items() if isinstance(value, torch.Tensor)}
    model = open_model(url, credential, transfer)
    keys = _compare(tensors, model)
    if strict and (keys.missing_keys or keys.unexpected_keys):
        raise SafetensorsError(f"{model.url}: {_described(keys)}; pass strict=False to load the others", url=model.url)
    reads = []
    found = {name: tensor for name, tensor in tensors.items() if name in model.tensors}
    for name, tensor in _once(found).items():
        stored = model.tensors[name]
        box = box_of_shard(check_shard(parts(name)), stored.shape)
        _check(model, stored, box, tensor, cast=cast)
        reads += reads_of(stored, box, tensor.detach())
    fetch(reads, model.transfer, progress=progress)
    return keys


def _compare(tensors: Mapping[str, torch.Tensor], model: Model) -> LoadedKeys:
    loaded = {_memory(tensor) for name, tensor in tensors.items() if name in model.tensors}
    missing = [name for name, tensor in tensors.items() if name not in model.tensors and _memory(tensor) not in loaded]
    return LoadedKeys(missing, [name for name in model.tensors if name not in tensors])


def _once(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """*tensors* without those that have the same memory as a later one, which would be written to at the same time."""
    last = {_memory(tensor): name for name, tensor in tensors.items()}
    return {name: tensor for name, tensor in tensors.items() if last[_memory(tensor)] == name or not tensor.numel()}


def _memory(tensor: torch.Tensor) -> Any:
    """The same for tensors with the same elements in the same memory."""
    if tensor.layout != torch.strided or tensor.device.type == "meta" or not tensor.numel():
        return id(tensor)
    return tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()


def _described(keys: LoadedKeys) -> str:
    said = []
    for what, names in (("missing", keys.missing_keys), ("unexpected", keys.unexpected_keys)):
        if names:
            more = f" and {len(names) - 3:,} more" if len(names) > 3 else ""
            said.append(
                f"{what} in {'the blobs' if what == 'missing' else 'the target'}: "
                f"{', '.join(f'{name!r:.200}' for name in names[:3])}{more}"
            )
    return "; ".join(said)


def _check(model: Model, stored: Stored, box: Box, tensor: torch.Tensor, *, cast: bool) -> None:
    """Raise unless *box* of *stored* can be loaded into *tensor*."""
    what = None
    if type(tensor) not in (torch.Tensor, torch.nn.Parameter):
        what = f"the target is a {type(tensor).__name__}; load it with HuggingFaceBlobReader and torch's DCP"
    elif tensor.device.type == "meta":
        what = "the target is on the meta device and has no memory; call to_empty(device=...) first"
    elif tensor.layout != torch.strided or tensor.is_quantized or tensor.is_conj() or tensor.is_neg():
        what = f"the target is not a dense tensor ({tensor.layout})"
    elif tuple(tensor.shape) != box.lengths:
        part = "" if box == stored.whole else f", of which this shard is {list(box.lengths)}"
        what = f"it has the shape {list(stored.shape)}{part}, and the target {list(tensor.shape)}"
    elif tensor.dtype != stored.dtype and not cast:
        what = f"it has the type {stored.dtype}, and the target {tensor.dtype}; pass cast=True to convert it"
    elif not torch.can_cast(stored.dtype, tensor.dtype):
        what = f"it has the type {stored.dtype}, which {tensor.dtype} of the target cannot take"
    if what is not None:
        raise SafetensorsError(
            f"{model.url}: {stored.name!r:.200} cannot be loaded: {what}. Nothing was written",
            url=model.url,
            tensor=stored.name,
        )
