"""The metadata: what torch's own FileSystemReader reads after a plain download, and FileSystemWriter writes.

It is a pickle that says where each item is. Ours adds facts to the stock entries, as attributes that
other readers ignore: where in an item the bare bytes of its tensor begin, of which type and shape they are, and the
ETag of the blob. The pickle comes from the network, so it is read by an unpickler that knows the names that metadata
consists of and no others.
"""

from __future__ import annotations

import functools
import gc
import io
import math
import pathlib
import pickle
import pickletools
import re
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.distributed.checkpoint import metadata as dcp
from torch.distributed.checkpoint.filesystem import _StorageInfo

from azstoragetorch.checkpoint._format.envelope import Item, Payload
from azstoragetorch.exceptions import CheckpointError

VERSION = "1.0.0"  # what FileSystemWriter writes into Metadata.version


def storage_info(item: Item) -> Any:
    """*item* as an entry of ``Metadata.storage_data``: the stock class, with what else is known as attributes."""
    info: Any = _StorageInfo(item.path, item.offset, item.length)
    if item.transforms:
        info.transform_descriptors = list(item.transforms)
    if item.payload is not None:
        info.payload = _facts(item.payload)
    if item.etag is not None:
        info.etag = item.etag
    return info


@functools.lru_cache(maxsize=16384)
def _facts(payload: Payload) -> tuple[int, torch.dtype, tuple[int, ...], tuple[int, ...]]:
    """*payload* as stock types; the same tuple for all that are equal, which a pickle then holds only once."""
    return (payload.offset, payload.dtype, payload.shape, payload.stride)


def read_item(info: Any) -> Item:
    """The item that an entry of ``Metadata.storage_data`` describes.

    Raises:
        CheckpointError: the entry is not one, or leads out of the checkpoint.
    """
    if not isinstance(info, _StorageInfo):
        raise CheckpointError(f"the checkpoint was not written in torch's file format: it has a {type(info).__name__}")
    path, offset, length = info.relative_path, info.offset, info.length
    _check_path(path)
    if not (_is_count(offset) and _is_count(length)):
        raise CheckpointError(f"the checkpoint places an item at {offset!r}, length {length!r}, of {path!r}")
    transforms = getattr(info, "transform_descriptors", None) or ()
    facts = getattr(info, "payload", None)
    payload = None
    if facts is not None:
        if not _is_payload(facts, length):
            raise CheckpointError(f"the checkpoint describes the item at {offset} of {path!r} as {facts!r:.200}")
        payload = Payload(*facts)
    etag = getattr(info, "etag", None)
    return Item(path, offset, length, tuple(map(str, transforms)), payload, etag if isinstance(etag, str) else None)


def _is_count(value: object) -> bool:
    return type(value) is int and 0 <= value < 1 << 63


def _is_payload(facts: object, length: int) -> bool:
    if not isinstance(facts, tuple) or len(facts) != 4:
        return False
    offset, dtype, shape, stride = facts
    if not (_is_count(offset) and isinstance(dtype, torch.dtype) and type(shape) is tuple and type(stride) is tuple):
        return False
    if len(shape) != len(stride) or not all(map(_is_count, shape + stride)):
        return False
    return int(offset) + math.prod(shape) * dtype.itemsize <= length


@functools.lru_cache(maxsize=1024)
def _check_path(path: object) -> None:
    """Let pass only names of blobs inside the checkpoint: a token must not follow a forged path."""
    is_inside = (
        isinstance(path, str)
        and 0 < len(path) <= 1024
        and not any(c < " " or c in "\\:\x7f" for c in path)
        and all(part not in ("", ".", "..") for part in path.split("/"))
    )
    if not is_inside:
        raise CheckpointError(f"the checkpoint refers to {path!r:.200}, which is not inside it; it is not followed")


@contextmanager
def many_objects() -> Iterator[None]:
    """Make very many objects without the garbage collector looking through them again and again.

    Reading the metadata of 100,000 items takes three times as long with it, and there is no garbage to find.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def dump_metadata(metadata: dcp.Metadata) -> bytes:
    """*metadata* as the content of the blob ``.metadata``."""
    with many_objects():
        return pickle.dumps(metadata, protocol=4)  # readable by every supported Python


def load_metadata(data: bytes) -> dcp.Metadata:
    """Read *data*, the content of a ``.metadata``, admitting nothing that metadata does not consist of.

    Raises:
        CheckpointError: it is broken, or it refers to a global that it should not; the message names it.
    """
    with many_objects():
        return _load_metadata(data)


def _load_metadata(data: bytes) -> dcp.Metadata:
    before = [(value, dict(vars(value))) for value in _mutable_globals()]
    try:
        _check_memo(data)
        metadata: dcp.Metadata = _Unpickler(io.BytesIO(data)).load()
    except CheckpointError:
        raise
    except Exception as error:  # noqa: BLE001 - a pickle that is cut or forged fails in any way
        raise CheckpointError(f"the metadata is no intact pickle: {type(error).__name__}: {error!s:.300}") from None
    finally:
        forged = [value for value, members in before if _restore(value, members)]
    if forged:
        raise CheckpointError(f"the metadata tries to change {forged[0]!r}; it is hostile")
    try:
        _check_metadata(metadata)
    except (AttributeError, TypeError, ValueError) as error:
        raise CheckpointError(f"the metadata lacks what makes it one: {error!s:.300}") from None
    return metadata


_CLASSES = (
    dcp.Metadata,
    dcp.TensorStorageMetadata,
    dcp.BytesStorageMetadata,
    dcp.ChunkStorageMetadata,
    dcp.TensorProperties,
    dcp.MetadataIndex,
    dcp.StorageMeta,
    dcp._MEM_FORMAT_ENCODING,  # noqa: SLF001
    _StorageInfo,
)
_ADMITTED: dict[tuple[str, str], Any] = {(cls.__module__, cls.__qualname__): cls for cls in _CLASSES} | {
    ("torch", "Size"): torch.Size,
    ("torch", "device"): torch.device,
    ("collections", "OrderedDict"): OrderedDict,
    # Written by torch before 2.3.
    ("torch.distributed._shard.sharded_tensor.metadata", "TensorProperties"): dcp.TensorProperties,
    ("torch.distributed._shard.sharded_tensor.metadata", "MEM_FORMAT_ENCODING"): dcp._MEM_FORMAT_ENCODING,  # noqa: SLF001
}
_PATHS = {"PosixPath", "PurePosixPath", "WindowsPath", "PureWindowsPath"}
_BUILTINS = {"set": set, "frozenset": frozenset, "list": list, "dict": dict, "tuple": tuple, "int": int, "str": str}
_CONSTANTS = (torch.dtype, torch.layout, torch.memory_format)


def _mutable_globals() -> Iterable[Any]:
    """All admitted objects that a pickle could set attributes of."""
    return (*_CLASSES, *dcp._MEM_FORMAT_ENCODING)  # noqa: SLF001


def _restore(value: Any, members: dict[str, Any]) -> bool:
    """Give *value* its *members* again; whether they had been changed."""
    now = dict(vars(value))
    changed = {name for name in now.keys() | members.keys() if now.get(name, ...) is not members.get(name, ...)}
    for name in changed:
        if name in members:
            setattr(value, name, members[name])
        else:
            delattr(value, name)
    return bool(changed)


# How the opcodes of pickle are told apart: by the bytes that follow, a length before them, or lines.
_PREFIXES = {
    pickletools.TAKEN_FROM_ARGUMENT1: 1,
    pickletools.TAKEN_FROM_ARGUMENT4: 4,
    pickletools.TAKEN_FROM_ARGUMENT4U: 4,
    pickletools.TAKEN_FROM_ARGUMENT8U: 8,
}
_PREFIX = {op.code: _PREFIXES[op.arg.n] for op in pickletools.opcodes if op.arg and op.arg.n in _PREFIXES}
_LINES = {
    op.code: 2 if op.arg.name == "stringnl_noescape_pair" else 1
    for op in pickletools.opcodes
    if op.arg and op.arg.n == pickletools.UP_TO_NEWLINE
}
_FIXED = {op.code: op.arg.n if op.arg else 0 for op in pickletools.opcodes if op.code not in {*_PREFIX, *_LINES, "r"}}
_SHORT_TEXT = b"\x8c"  # by far the most frequent of those in _PREFIX, so that all its lengths are worth a pattern
_RUN = re.compile(  # of limited length, for the sake of the memory that matching takes
    b"(?:%s|%s(?:%s)){1,500}"
    % (
        b"|".join(
            b"[%s].{%d}" % (re.escape("".join(code for code in _FIXED if _FIXED[code] == n).encode("latin-1")), n)
            for n in sorted(set(_FIXED.values()))
        ),
        _SHORT_TEXT,
        b"|".join(re.escape(bytes([n])) + b".{%d}" % n for n in range(256)),
    ),
    re.DOTALL,
)


def _check_memo(data: bytes) -> None:
    """Raise if *data*, a pickle, numbers an object higher than it has bytes: memory is taken for all numbers below."""
    at = 0
    while at < len(data):
        run = _RUN.match(data, at)
        if run is not None:
            at = run.end()
            continue
        code, begin, number = chr(data[at]), at + 1, 0
        if code in _PREFIX:
            at = begin + _PREFIX[code]
            at += int.from_bytes(data[begin:at], "little")
        elif code == "r":  # LONG_BINPUT
            at = begin + 4
            number = int.from_bytes(data[begin:at], "little")
        elif code in _LINES:
            for _ in range(_LINES[code]):
                at = data.find(b"\n", at) + 1 or len(data)
            number = int(data[begin:at]) if code == "p" else 0  # PUT
        else:
            return  # unpickling ends here, too
        if number > len(data):
            raise pickle.UnpicklingError(f"it numbers an object {number}, which so few bytes cannot have")


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str, /) -> Any:
        admitted = _ADMITTED.get((module, name))
        if admitted is not None:
            return admitted
        if module == "torch" and isinstance(getattr(torch, name, None), _CONSTANTS):
            return getattr(torch, name)
        if (module, name) == ("torch.serialization", "_get_layout"):
            return _layout
        if module in ("pathlib", "pathlib._local") and name in _PATHS:
            return pathlib.PureWindowsPath if "Windows" in name else pathlib.PurePosixPath
        if module == "builtins" and name in _BUILTINS:
            return _BUILTINS[name]
        raise CheckpointError(
            f"the metadata refers to {module}.{name}, which no checkpoint needs; it was not loaded, since loading it "
            "may run foreign code"
        )

    def persistent_load(self, _pid: object, /) -> Any:
        raise CheckpointError("the metadata refers to objects outside itself; it was not loaded")


def _layout(name: object) -> Any:
    found = getattr(torch, str(name).removeprefix("torch."), None)
    if not isinstance(found, torch.layout):
        raise CheckpointError(f"the metadata names a layout {name!r:.100} that does not exist")
    return found


def _check_metadata(metadata: Any) -> None:
    """Raise unless *metadata* is what it says; a forged one may be of any shape."""
    if not isinstance(metadata, dcp.Metadata):
        raise CheckpointError(f"the metadata is a {type(metadata).__name__}, not torch's Metadata")
    entries: Any = metadata.state_dict_metadata
    storage: Any = metadata.storage_data
    if not isinstance(entries, dict) or not isinstance(storage, dict):
        raise CheckpointError("the metadata has no tables of entries and of where they are stored")
    for key, entry in entries.items():
        if not isinstance(key, str):
            raise CheckpointError(f"the metadata has an entry named {key!r:.100}, which is no text")
        if isinstance(entry, dcp.BytesStorageMetadata):
            continue
        if not isinstance(entry, dcp.TensorStorageMetadata) or not _is_tensor(entry):
            raise CheckpointError(f"the metadata describes {key!r} in a way that makes no sense", key=key)
    for index, info in storage.items():
        if not isinstance(index, dcp.MetadataIndex):
            raise CheckpointError(f"the metadata has a {type(index).__name__} where an index is due")
        if not isinstance(info, _StorageInfo):
            raise CheckpointError(f"the checkpoint is not in torch's file format: it has a {type(info).__name__}")
        _check_path(info.relative_path)
        if not (_is_count(info.offset) and _is_count(info.length)):
            raise CheckpointError(
                f"the metadata places {index.fqn!r} at {info.offset!r:.50}, length {info.length!r:.50}", key=index.fqn
            )


def _is_tensor(entry: Any) -> bool:
    size = entry.size
    if not isinstance(size, torch.Size) or not isinstance(entry.chunks, list) or any(n < 0 for n in size):
        return False
    if not isinstance(entry.properties, dcp.TensorProperties) or not isinstance(entry.properties.dtype, torch.dtype):
        return False
    for chunk in entry.chunks:
        if not isinstance(chunk, dcp.ChunkStorageMetadata):
            return False
        offsets, sizes = chunk.offsets, chunk.sizes
        if not len(offsets) == len(sizes) == len(size):
            return False
        for first, count, whole in zip(offsets, sizes, size, strict=True):
            if first < 0 or count < 0 or first + count > whole:
                return False
    return True
