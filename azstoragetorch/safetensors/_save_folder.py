"""Save a model as a folder of safetensors files: files first, the index last.

A save into a folder with a model writes files of new names, replaces the index under the condition that it is the one
that was seen, and only then deletes the files that it has replaced. So a reader sees the old model or the new one: an
index names files that no later save changes, and a reader of the old model whose files are deleted gets an error. The
first save into a folder uses the common names, which must not exist. Without an index, readers accept numbered files
only if all of them are there.
"""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from azure.core.exceptions import AzureError, ResourceExistsError, ResourceNotFoundError

from azstoragetorch._blob.credentials import Credential
from azstoragetorch._engine.config import TransferConfig
from azstoragetorch._engine.scope import Scope
from azstoragetorch._engine.threads import engine_for
from azstoragetorch.exceptions import AZStorageTorchError, SafetensorsError
from azstoragetorch.safetensors._folder import INDEX, INDEX_SUFFIX, SINGLE, Folder, folder_at, numbered, of_a_save
from azstoragetorch.safetensors._header import Layout
from azstoragetorch.safetensors._save import kind_of, layout_of, write_file

log = logging.getLogger("azstoragetorch")

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_UNITS |= {"Ki": 1 << 10, "Mi": 1 << 20, "Gi": 1 << 30, "Ti": 1 << 40}
_SIZE = re.compile(r"(\d+(?:\.\d+)?) ?([KMGT]i?|)B")


class Before(NamedTuple):
    """What a save found in the folder: the index and its ETag, and the files of the model."""

    has_index: bool
    etag: str | None
    files: list[str]


def save_folder(
    tensors: Mapping[str, torch.Tensor] | torch.nn.Module,
    url: str,
    *,
    max_shard_size: int | str = "5GB",
    metadata: Mapping[str, str] | None = None,
    overwrite: bool = True,
    credential: Credential = None,
    transfer: TransferConfig | None = None,
) -> list[str]:
    """Save a model as safetensors files in a folder, with an index if there are several files.

    Names and index are those of Hugging Face's libraries.

    The files are written first and the index last, so a reader sees a whole model or none. If the folder has a model,
    the new files get new names, and the files of the old model are deleted after the index is replaced. Other blobs in
    the folder stay as they are.

    Args:
        tensors: Tensors by name, or a module, whose state dict is saved. Of tensors of a module that share memory,
            such as tied weights, only the first is saved; :func:`load_into` fills both.
        url: URL of the folder.
        max_shard_size: Maximum size of one file, such as ``"5GB"`` or ``"500MiB"``; a larger tensor is in a
            separate file.
        metadata: Strings by key, stored in the header of each file. ``{"format": "pt"}`` by default, which transformers
            expects.
        overwrite: Replace the model in the folder. If False, raise an error instead, before anything is uploaded.
        credential: Same as for :class:`~azstoragetorch.io.BlobIO`.
        transfer: Transfer settings; see :class:`azstoragetorch.TransferConfig`.

    Returns:
        The names of the files.

    Raises:
        SafetensorsError: a tensor cannot be stored; the folder has a model, and *overwrite* is False; or another save
            was committed while this one was in progress. The folder has the model that it had.
        FatalBlobIOWriteError, AzureError: a write failed. The folder has the model that it had, unless the message says
            that the outcome is not known.
        ValueError: *max_shard_size* is not a size, or *url* is not the URL of a folder.
    """
    limit = bytes_of_size(max_shard_size)
    state = _unshared(tensors.state_dict()) if isinstance(tensors, torch.nn.Module) else dict(tensors)
    folder = folder_at(url, credential, transfer)
    for name, tensor in state.items():
        kind_of(name, tensor, folder.url)
    metadata = {"format": "pt"} if metadata is None else metadata
    groups = split_by_size({name: tensor.nbytes for name, tensor in state.items()}, limit)
    layouts = [layout_of({name: state[name] for name in group}, metadata, folder.url) for group in groups]
    before = look(folder, overwrite=overwrite)
    names = names_of(len(groups), before)

    def write(numbered: tuple[int, str]) -> None:
        number, name = numbered
        layout = layouts[number]
        is_new = name not in before.files
        write_file(folder.blob(name), {key: state[key] for key in layout.names}, layout, create_only=is_new)

    write_all(folder, names, write)
    total = sum(tensor.nbytes for tensor in state.values())
    commit(folder, before, names, index_of(names, layouts, total))
    return names


def split_by_size(sizes: Mapping[str, int], limit: int) -> list[list[str]]:
    """The names of *sizes*, in order, in groups of at most *limit* bytes; there is one at least."""
    groups: list[list[str]] = [[]]
    held = 0
    for name, size in sizes.items():
        if groups[-1] and held + size > limit:
            groups.append([])
            held = 0
        groups[-1].append(name)
        held += size
    return groups


def look(folder: Folder, *, overwrite: bool) -> Before:
    """What is in *folder*.

    Raises:
        SafetensorsError: it has a model, which must not be replaced, or several indexes.
    """
    names = folder.names()
    indexes = [name for name in names if name.endswith(INDEX_SUFFIX)]
    files = of_a_save(names)
    if (indexes or files) and not overwrite:
        raise SafetensorsError(f"{folder.url}: there is a model, and overwrite=False; it is unchanged", url=folder.url)
    if any(name != INDEX for name in indexes):
        raise SafetensorsError(
            f"{folder.url}: there is the index {next(name for name in indexes if name != INDEX)}, and a folder has one "
            "model only; save to another folder",
            url=folder.url,
        )
    if not indexes:
        return Before(False, None, files)
    version, content = folder.read_small(INDEX)
    try:
        named = [path for path in json.loads(content)["weight_map"].values() if path in names]
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        named = []
    return Before(True, version.etag, sorted({*files, *named}))


def names_of(count: int, before: Before) -> list[str]:
    """The names of the *count* files of a save into a folder that has what is *before*."""
    if not before.files and not before.has_index:
        return [SINGLE] if count == 1 else [numbered(number, count) for number in range(1, count + 1)]
    if count == 1 and not before.has_index and before.files == [SINGLE]:
        return [SINGLE]  # replaced by one request
    save = f"-{os.urandom(8).hex()}"
    return [numbered(number, count, save) for number in range(1, count + 1)]


def write_all(folder: Folder, names: Sequence[str], write: Callable[[tuple[int, str]], None]) -> None:
    """Call *write* with each of the numbered *names*, one after the other.

    Raises:
        SafetensorsError: a file exists that was not there before; those that this save wrote are deleted.
    """
    done: list[str] = []
    try:
        for numbered_name in enumerate(names):
            write(numbered_name)
            done.append(numbered_name[1])
    except BaseException as error:
        if len(names) > 1:
            delete(folder, done)
        if isinstance(error, ResourceExistsError):
            raise _conflict(folder) from error
        raise


def index_of(names: Sequence[str], layouts: Sequence[Layout], total: int) -> bytes:
    """The index of files with *names* and *layouts*, in the form of Hugging Face's libraries."""
    placed = {key: name for name, layout in zip(names, layouts, strict=True) for key in layout.names}
    return encode_index(placed, total)


def encode_index(placed: Mapping[str, str], total: int) -> bytes:
    """The index that places tensors in files."""
    content = {"metadata": {"total_size": total}, "weight_map": dict(sorted(placed.items()))}
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()


def commit(folder: Folder, before: Before, names: Sequence[str], index: bytes) -> None:
    """Make the files *names* the model of *folder*, and delete those that they replace.

    Raises:
        SafetensorsError: another save was committed in the meantime; this one has no effect.
        AzureError: the service refused the index, or could not be reached; this save has no effect.
        FatalBlobIOWriteError: the service did not confirm whether the index was replaced.
    """
    if list(names) != [SINGLE]:
        try:
            is_ours, _ = folder.blob(INDEX).replace(index, etag=before.etag)
        except AzureError:  # the index is unchanged; after a FatalBlobIOWriteError it may refer to the new files
            delete(folder, names)
            raise
        if not is_ours:
            delete(folder, names)
            raise _conflict(folder)
    delete(folder, set(before.files) - set(names))


def delete(folder: Folder, names: Iterable[str]) -> None:
    """Delete the files *names*, as far as that is possible; they are not part of a model any more."""

    def remove(name: str, _scope: Scope) -> None:
        try:
            folder.blob(name).delete()
        except ResourceNotFoundError:
            pass
        except (AzureError, AZStorageTorchError) as error:
            log.warning("%s: the file %s, which is not used any more, was not deleted: %s", folder.url, name, error)

    engine_for(folder.transfer).map(remove, sorted(names), folder.transfer.max_connections)


def _conflict(folder: Folder) -> SafetensorsError:
    return SafetensorsError(
        f"{folder.url}: another save was committed, or is in progress. This save has no effect. Save again; jobs that "
        "save at the same time need separate folders",
        url=folder.url,
    )


def _unshared(state: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """The tensors of *state*, without those that are another one: the same elements of the same memory."""
    seen: set[Any] = set()
    kept: dict[str, torch.Tensor] = {}
    for name, tensor in state.items():
        if not isinstance(tensor, torch.Tensor):
            continue
        if tensor.layout == torch.strided and tensor.device.type != "meta" and tensor.numel():
            key = tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()
            if key in seen:
                continue
            seen.add(key)
        kept[name] = tensor
    return kept


def bytes_of_size(size: int | str) -> int:
    """*size* as a number of bytes."""
    found = _SIZE.fullmatch(size) if isinstance(size, str) else None
    number = int(float(found[1]) * _UNITS[found[2]]) if found is not None else size
    if isinstance(number, bool) or not isinstance(number, int):
        raise ValueError(f"max_shard_size must be a number of bytes, or a string such as '5GB', not {size!r:.100}")
    if number < 1:
        raise ValueError(f"max_shard_size must be at least 1 byte, not {size!r}")
    return number
