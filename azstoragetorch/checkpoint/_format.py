"""The format: what torch's own FileSystemReader reads after a plain download, and FileSystemWriter writes.

A checkpoint is a folder: data blobs, in which items lie one after the other, each as `torch.save` writes it, and the
blob ``.metadata``, a pickle that says where each item is. Ours adds facts to the stock entries, as attributes that
other readers ignore: where in an item the bare bytes of its tensor begin, of which type and shape they are, and the
ETag of the blob. The pickle comes from the network, so it is read by an unpickler that knows the names that metadata
consists of and no others.
"""

from __future__ import annotations

import calendar
import functools
import gc
import io
import math
import os
import pathlib
import pickle
import pickletools
import re
import time
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch.distributed.checkpoint import metadata as dcp
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.serialization import skip_data

from azstoragetorch.checkpoint._planning import contiguous_strides
from azstoragetorch.exceptions import CheckpointError

METADATA = ".metadata"
VERSION = "1.0.0"  # what FileSystemWriter writes into Metadata.version
PROBE = 4096  # bytes at either end of an item that say what lies between

_DATA_NAME = re.compile(r"__(\d+)_(\d+)\.(\d{14})-[0-9a-f]{16}\.distcp")
_RANK_METADATA = re.compile(r"__(\d+)\.metadata")


def metadata_name(rank: int | None = None) -> str:
    """The blob with the metadata: of the whole checkpoint, or of *rank* where ranks do not coordinate."""
    return METADATA if rank is None else f"__{rank}{METADATA}"


def is_rank_metadata(name: str) -> bool:
    """Whether *name* is that of metadata of a single rank."""
    return _RANK_METADATA.fullmatch(name) is not None


def new_save_id() -> str:
    """What sets the data blobs of one save apart from those of all others: the time in UTC and 64 random bits."""
    return f"{time.strftime('%Y%m%d%H%M%S', time.gmtime())}-{os.urandom(8).hex()}"


def data_name(rank: int, number: int, save_id: str) -> str:
    """The name of a data blob of *rank*, which no other save uses."""
    return f"__{rank}_{number}.{save_id}.distcp"


def saved_at(name: str) -> float | None:
    """When the save began that wrote the data blob *name* (seconds since 1970); None for names that are not ours."""
    found = _DATA_NAME.fullmatch(name)
    if found is None:
        return None
    stamp = found.group(3)
    fields = (int(stamp[:4]), *(int(stamp[at : at + 2]) for at in range(4, 14, 2)))
    try:
        return float(calendar.timegm((*fields, 0, 0, 0)))
    except ValueError:
        return None


# -- items ------------------------------------------------------------------------------------------------------------


class Payload(NamedTuple):
    """The bare bytes of a dense tensor inside its item: where they begin, and what they are."""

    offset: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Length of a dense payload in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def is_contiguous(self) -> bool:
        """Whether the elements lie in the order of their indices."""
        return self.stride == contiguous_strides(self.shape) or math.prod(self.shape) == 0


class Item(NamedTuple):
    """Where one item is. ``payload`` is None where only decoding the whole item tells what it holds."""

    path: str
    offset: int
    length: int
    transforms: tuple[str, ...] = ()
    payload: Payload | None = None
    etag: str | None = None


@dataclass(frozen=True, slots=True)
class Envelope:
    """What `torch.save` writes before and after the payload of a contiguous tensor."""

    head: bytes
    tail: bytes


def has_payload(tensor: torch.Tensor) -> bool:
    """Whether *tensor* is saved as an envelope around its bare bytes; others are saved whole by `torch.save`."""
    return (
        type(tensor) in (torch.Tensor, torch.nn.Parameter)
        and tensor.layout == torch.strided
        and not tensor.is_quantized
        and not tensor.is_nested
        and tensor.device.type != "meta"
    )


@functools.lru_cache(maxsize=16384)
def envelope(dtype: torch.dtype, shape: torch.Size) -> Envelope:
    """The envelope of a contiguous tensor on the CPU; it depends on nothing but *dtype* and *shape*."""
    sink: Any = _EnvelopeSink()
    with skip_data():
        torch.save(torch.empty(shape, dtype=dtype, device="cpu"), sink)
    found: Envelope = sink.envelope()
    return found


class _EnvelopeSink(io.RawIOBase):
    """Takes what `torch.save` writes with `skip_data`: it seeks over the payload, once."""

    def __init__(self) -> None:
        self._parts: list[bytes] = []
        self._split: int | None = None
        self._position = 0

    def writable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def write(self, data: Any, /) -> int:
        self._parts.append(bytes(data))
        self._position += len(self._parts[-1])
        return len(self._parts[-1])

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        if whence != io.SEEK_CUR or offset < 0 or self._split is not None:
            raise io.UnsupportedOperation("torch.save no longer lays out a file as one payload between head and tail")
        self._split = len(self._parts)
        self._position += offset
        return self._position

    def envelope(self) -> Envelope:
        split = len(self._parts) if self._split is None else self._split
        return Envelope(b"".join(self._parts[:split]), b"".join(self._parts[split:]))


def probe(head: bytes, tail: bytes, length: int) -> Payload | None:
    """What the first and last bytes of an item of *length* bytes tell about a dense payload between them.

    None if the item has to be decoded whole: it is no single dense tensor, or says so elsewhere.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    try:
        with FakeTensorMode():
            source: Any = ItemFile(head, tail, length)
            tensor: Any = torch.load(source, map_location="cpu", weights_only=True)
        if not isinstance(tensor, torch.Tensor) or tensor.layout != torch.strided or tensor.is_quantized:
            return None
        if tensor.is_conj() or tensor.is_neg() or tensor.storage_offset() != 0:
            return None
        offset: Any = tensor.untyped_storage()._checkpoint_offset  # noqa: SLF001
        payload = Payload(
            offset,
            tensor.dtype,
            tuple(tensor.shape),
            tuple(tensor.stride()),
        )
    except Exception:  # noqa: BLE001 - whatever it is, decoding the whole item will tell, or fail with a reason
        return None
    fits = payload.nbytes and payload.is_contiguous and payload.offset + payload.nbytes <= length
    return payload if fits else None


class ItemFile(io.RawIOBase):
    """An item as a file, without a copy. Where only both ends of it are known, reading in between fails."""

    def __init__(self, head: bytes | memoryview, tail: bytes = b"", length: int | None = None) -> None:
        self._head, self._tail = head, tail
        self._length = len(head) if length is None else length
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._length}[whence]
        self._position = base + offset
        return self._position

    def readinto(self, buffer: Any, /) -> int:
        view = memoryview(buffer).cast("B")
        start, stop = self._position, min(self._position + view.nbytes, self._length)
        if stop <= len(self._head):
            known: bytes | memoryview = self._head[start:stop]
        elif start >= self._length - len(self._tail):
            at = start - (self._length - len(self._tail))
            known = self._tail[at : at + stop - start]
        else:
            raise ValueError("these bytes are not known")
        view[: len(known)] = known
        self._position += len(known)
        return len(known)


# -- metadata ---------------------------------------------------------------------------------------------------------


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
