"""The metadata: what torch's own FileSystemReader reads after a plain download, and FileSystemWriter writes.

It is a pickle that says where each item is, and it comes from a network. ``interpreter`` parses it without executing
it; here every field of the records is checked, and torch's objects are made from what passed. What refers to something
that no metadata has is an error that says so, before any tensor is touched or any data blob is asked for.
"""

from __future__ import annotations

import gc
import math
import pathlib
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch.distributed.checkpoint import metadata as dcp
from torch.distributed.checkpoint.filesystem import _StorageInfo

from azstoragetorch.checkpoint._format import items, records
from azstoragetorch.checkpoint._format.interpreter import parse
from azstoragetorch.checkpoint._format.names import is_digests
from azstoragetorch.checkpoint._format.properties import read_properties, values_of
from azstoragetorch.checkpoint._format.records import LARGEST, Array, Call, Name, Table
from azstoragetorch.exceptions import CheckpointError

VERSION = "1.0.0"  # what FileSystemWriter writes into Metadata.version

_STEPS = 128  # of the path of an entry in the nested state dict
_NESTED = 16  # levels of what other planners than torch's note
_BYTES_PER_SHARD = 16  # a shard takes at least 20
_BYTES_PER_ENTRY = 40  # an entry with its index and place takes at least 55; without these, objects are much larger
_BYTES_PER_ITEM = 64  # an item takes at least 70 in large metadata
_ENTRIES = 4096  # in any case
_ROOM = 8  # bytes for each byte
_DIGESTS = "azstoragetorch_digests"  # a further attribute, which other readers ignore
_LONG = 4096  # characters of a field such as the id of a save


@contextmanager
def many_objects() -> Iterator[None]:
    """Make very many objects without the garbage collector looking through them again and again.

    Reading the metadata of 100,000 items takes three times as long with it, and it would not find garbage.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def dump_metadata(metadata: dcp.Metadata, digests: str | None = None) -> bytes:
    """*metadata* as the content of the blob ``.metadata``; *digests* is the name of the side blob, if there is one."""
    with many_objects():
        whole = _with_equal_parts_once(metadata)
        if digests is not None:
            setattr(whole, _DIGESTS, digests)
        return pickle.dumps(whole, protocol=4)  # readable by every supported Python


def digests_of(metadata: dcp.Metadata) -> str | None:
    """The name of the side blob with the digests of the checkpoint that *metadata* describes; None without one."""
    name = getattr(metadata, _DIGESTS, None)
    return name if is_digests(name) else None


def _with_equal_parts_once(metadata: dcp.Metadata) -> dcp.Metadata:
    """*metadata* in which equal shapes, properties and names are one object, which a pickle then holds only once."""
    sizes: dict[Any, Any] = {}
    properties: dict[Any, Any] = {}
    steps: dict[Any, Any] = {}

    def once(size: Any) -> Any:
        return sizes.setdefault(size, size) if type(size) is torch.Size else size

    entries: Any = {}
    described: Any = metadata.state_dict_metadata
    for key, entry in described.items() if isinstance(described, dict) else ():
        if type(entry) is dcp.TensorStorageMetadata:
            made = entry.properties
            like = values_of(made)
            chunks = [dcp.ChunkStorageMetadata(once(chunk.offsets), once(chunk.sizes)) for chunk in entry.chunks]
            entry = dcp.TensorStorageMetadata(properties.setdefault(like, made), once(entry.size), chunks)
        entries[key] = entry
    storage: Any = metadata.storage_data
    if isinstance(storage, dict):
        storage = {_made_index(key.fqn, once(key.offset), key.index): info for key, info in storage.items()}
    paths: Any = metadata.planner_data
    if isinstance(paths, dict):
        paths = {
            key: tuple([steps.setdefault(step, step) if type(step) is str else step for step in path])
            if type(path) is tuple
            else path
            for key, path in paths.items()
        }
    if not isinstance(described, dict):
        entries = described
    return replace(metadata, state_dict_metadata=entries, planner_data=paths, storage_data=storage)


def _made_index(fqn: str, offset: Any, number: int | None) -> dcp.MetadataIndex:
    """As ``MetadataIndex(fqn, offset, number)``, whose own way takes four times as long."""
    index = object.__new__(dcp.MetadataIndex)
    state = vars(index)
    state["fqn"] = fqn
    state["index"] = number
    if offset is not None:
        state["offset"] = offset
    return index


def load_metadata(data: bytes) -> dcp.Metadata:
    """Read *data*, the content of a ``.metadata``, admitting nothing that metadata does not consist of.

    Raises:
        CheckpointError: it is broken, or it has a field that it should not have; the message names it.
    """
    return ParsedMetadata(data).make()


class ParsedMetadata:
    """Metadata as records, from which `make` makes objects again and again: each caller may change what it gets.

    Making takes less than half as long as parsing, and the records less memory than the objects.

    Raises:
        CheckpointError: *data* is broken.
    """

    def __init__(self, data: bytes) -> None:
        self._length = len(data)
        with many_objects():
            self._root = parse(data)

    def make(self) -> dcp.Metadata:
        """The metadata, made for this caller alone.

        Raises:
            CheckpointError: it has a field that it should not have; the message names it.
        """
        with many_objects():
            return _Maker(self._length).metadata(self._root)


class _Maker:
    """Makes torch's objects from the records of one metadata of *length* bytes."""

    def __init__(self, length: int) -> None:
        # Objects may be shared, so walking through them takes longer than reading them: this bounds it.
        self._visits = length + 1024
        self._room = _ROOM * length + (1 << 20)  # bytes of containers in what planners note
        self._length = length
        self._shards = length // _BYTES_PER_SHARD + 64
        self._facts: dict[int, Any] = {}
        self._paths: set[str] = set()
        self._tensors: dict[int, _Tensor] = {}  # by id of the record, which lives as long as this
        self._etags: set[str] = set()

    def metadata(self, root: Any) -> dcp.Metadata:
        """The whole."""
        if type(root) is not list or root[0] is not records.METADATA:
            raise CheckpointError(f"the metadata is {_kind(root)}, not torch's Metadata")
        fields = _fields(root)
        made = dcp.Metadata(
            self._entries(fields.pop("state_dict_metadata", None)),
            self._planner_data(fields.pop("planner_data", None)),
            self._storage(fields.pop("storage_data", None)),
            _storage_meta(fields.pop("storage_meta", None)),
            _text(fields.pop("version", None), "version"),
        )
        for name, value in fields.items():  # other planners than torch's add their own
            if not name.isidentifier() or name.startswith("_") or hasattr(dcp.Metadata, name):
                raise CheckpointError(f"the metadata has a field {name!r:.100}, which it cannot have")
            setattr(made, name, self._plain(value, name))
        return made

    def _counted(self, table: Any, name: str, each: int) -> Iterator[tuple[Any, Any]]:
        """The pairs of a dict that is much larger as an object: it takes at least *each* bytes of a pickle for each."""
        pairs = _pairs(table, name)
        if len(table) // 2 > self._length // each + _ENTRIES:
            raise CheckpointError(f"the metadata has more entries in {name!r} than fit into its size")
        return pairs

    # -- entries of the state dict ------------------------------------------------------------------------------------

    def _entries(self, table: Any) -> dict[str, Any]:
        entries: dict[str, Any] = {}
        for key, value in self._counted(table, "state_dict_metadata", _BYTES_PER_ENTRY):
            if type(key) is not str:
                raise CheckpointError(f"the metadata has an entry named {items.shown(key)}, which is not a string")
            if type(value) is list and value[0] is records.BYTES and len(value) == 1:
                entries[key] = dcp.BytesStorageMetadata()
                continue
            made = self._tensor(value)
            if made is None:
                raise CheckpointError(f"the metadata describes {key!r:.200} in a way that makes no sense", key=key)
            entries[key] = made
        if len(entries) != len(table) // 2:
            raise CheckpointError("the metadata describes an entry twice")
        return entries

    def _tensor(self, record: Any) -> Any:
        """The description of a tensor, for one key alone, or None if *record* is not one."""
        checked = self._tensors.get(id(record))
        if checked is None:
            checked = self._checked(record)
            if checked is None:
                return None
            self._tensors[id(record)] = checked
        properties, size, chunks = checked
        self._shards -= len(chunks)
        if self._shards < 0:
            raise CheckpointError("the metadata describes more shards than fit into its size")
        shards = [dcp.ChunkStorageMetadata(offsets, sizes) for offsets, sizes in chunks]
        return dcp.TensorStorageMetadata(dcp.TensorProperties(*properties), size, shards)

    def _checked(self, record: Any) -> _Tensor | None:
        """What *record* says of a tensor, or None if it does not describe one."""
        if type(record) is not list or record[0] is not records.TENSOR:
            return None
        properties, size, chunks = _values(record, _TENSOR_FIELDS)
        made = read_properties(properties)
        if type(size) is not torch.Size or type(chunks) is not Array or made is None:
            return None
        numel = math.prod(size) or math.prod(length or 1 for length in size)
        if numel > LARGEST:
            return None
        self._visits -= len(chunks)
        if self._visits < 0:
            raise CheckpointError("the metadata describes more shards than fit into its size")
        shards = [shard for chunk in chunks if (shard := _chunk(chunk, size)) is not None]
        return (made, size, shards) if len(shards) == len(chunks) else None

    # -- where they are stored ----------------------------------------------------------------------------------------

    def _storage(self, table: Any) -> dict[dcp.MetadataIndex, Any]:
        indices, infos, hashes = [], [], []
        for key, value in self._counted(table, "storage_data", _BYTES_PER_ITEM):
            if type(key) is not list or key[0] is not records.INDEX:
                raise CheckpointError(f"the metadata has {_kind(key)} in the place of an index")
            fqn, number, offset = _values(key, _INDEX_FIELDS)
            if not (
                type(fqn) is str
                and (offset is None or type(offset) is torch.Size)
                and (number is None or (type(number) is int and 0 <= number <= LARGEST))
            ):
                raise _no_index(fqn, offset, number)
            indices.append(_made_index(fqn, offset, number))
            hashes.append(hash((fqn, offset)))
            if type(value) is not list or value[0] is not records.INFO:
                raise CheckpointError(f"the checkpoint is not in torch's file format: it has {_kind(value)}", key=fqn)
            infos.append(self._info(fqn, value))
        # Equal hashes are of equal indices, or chosen to be equal, so that looking them up takes very long.
        if len(set(hashes)) != len(hashes):
            raise CheckpointError("the metadata says twice where an item is stored")
        return dict(zip(indices, infos, strict=True))

    def _info(self, fqn: str, record: list[Any]) -> Any:
        path, offset, length, facts, etag, transforms = _values(record, _INFO_FIELDS)
        try:
            is_placed = (
                type(path) is str
                and path in self._paths
                and type(offset) is type(length) is int
                and offset >= 0 <= length
                and offset + length <= LARGEST
            )
            if not is_placed:
                items.check_place(path, offset, length, fqn)
                self._paths.add(path)
            info: Any = _StorageInfo(path, offset, length)
            if facts is not None:
                if self._facts.get(id(facts)) != length:  # the record is alive, so no other has its id
                    items.check_facts(facts, length, path)
                    self._facts[id(facts)] = length
                info.payload = facts
            if etag is not None:
                if type(etag) is not str or etag not in self._etags:
                    items.check_etag(etag)
                    self._etags.add(etag)
                info.etag = etag
            if transforms is not None:
                info.transform_descriptors = list(items.check_transforms(transforms))
        except CheckpointError as error:
            raise CheckpointError(f"{error} ({fqn!r:.200})", key=fqn) from None
        return info

    # -- what planners note -------------------------------------------------------------------------------------------

    def _planner_data(self, value: Any) -> Any:
        if type(value) is not Table:
            return self._plain(value, "planner_data")
        paths = {}
        for key, path in self._counted(value, "planner_data", _BYTES_PER_ENTRY):
            if type(key) is not str:
                break
            if type(path) is not tuple or len(path) > _STEPS or not {*map(type, path)} <= {str, int}:
                break
            paths[key] = path
        else:
            if 2 * len(paths) != len(value):
                raise CheckpointError("the metadata says twice where an entry belongs")
            return paths
        return self._plain(value, "planner_data")

    def _plain(self, value: Any, name: str, depth: int = 0) -> Any:
        """*value* as plain objects of Python, which are not shared."""
        self._visits -= 1
        if type(value) in (tuple, Array, Table):
            self._room -= 200 + 50 * len(value) if type(value) is Table else 64 + 10 * len(value)
        if self._visits < 0 or self._room < 0 or depth > _NESTED:
            raise CheckpointError(f"the metadata has a field {name!r:.100} that is too large")
        if value is None or type(value) in (str, int, float, bool, torch.Size):
            return value
        if type(value) is tuple:
            return tuple(self._plain(part, name, depth + 1) for part in value)
        if type(value) is Array:
            return [self._plain(part, name, depth + 1) for part in value]
        if type(value) is Table and all(type(key) in (str, int) for key in value[::2]):
            return {key: self._plain(part, name, depth + 1) for key, part in _pairs(value, name)}
        raise CheckpointError(f"the metadata has {_kind(value)} in {name!r:.100}, which is not plain data")


_Tensor = tuple[tuple[Any, ...], torch.Size, list[tuple[torch.Size, torch.Size]]]  # properties, size, shards
_TENSOR_FIELDS = ["properties", "size", "chunks"]
_CHUNK_FIELDS = ["offsets", "sizes"]
_INDEX_FIELDS = ["fqn", "index", "offset"]
_STORAGE_META_FIELDS = ["checkpoint_id", "save_id", "load_id", "modules"]
_INFO_FIELDS = ["relative_path", "offset", "length", "payload", "etag", "transform_descriptors"]


def _pairs(table: Any, name: str) -> Iterator[tuple[Any, Any]]:
    if type(table) is not Table or len(table) % 2:
        raise CheckpointError(f"the metadata has {_kind(table)} as {name!r:.100}, which is to be a dict")
    return zip(table[::2], table[1::2], strict=True)


def _values(record: list[Any], names: list[str]) -> list[Any]:
    """The values of the fields *names* of an instance, None for those it does not have."""
    present, values = record[1::2], record[2::2]
    if len(values) == len(present) and present == names[: len(present)]:  # the last are missing if they are None
        return values + [None] * (len(names) - len(present)) if len(present) < len(names) else values
    fields = _fields(record)
    ordered = [fields.pop(name, None) for name in names]
    if fields:
        raise CheckpointError(f"the metadata has {_kind(record)} with a field {min(fields)!r:.100}, which is not known")
    return ordered


def _fields(record: list[Any]) -> dict[str, Any]:
    names, values = record[1::2], record[2::2]
    if len(names) != len(values) or any(type(name) is not str for name in names):
        raise CheckpointError(f"the metadata has {_kind(record)} whose fields have no names")
    fields = dict(zip(names, values, strict=True))
    if len(fields) != len(names):
        raise CheckpointError(f"the metadata has {_kind(record)} with a field twice")
    return fields


def _no_index(fqn: Any, offset: Any, number: Any) -> CheckpointError:
    """Why these cannot be the fields of an index."""
    if type(fqn) is not str:
        return CheckpointError(f"the metadata has an index of {items.shown(fqn)}, which is not a string")
    if offset is not None and type(offset) is not torch.Size:
        return CheckpointError(f"the metadata has an index of {fqn!r:.200} at {_kind(offset)}", key=fqn)
    return CheckpointError(f"the metadata has an index of {fqn!r:.200} with the hint {items.shown(number)}", key=fqn)


def _chunk(record: Any, size: torch.Size) -> tuple[torch.Size, torch.Size] | None:
    """The offsets and sizes of a shard, or None if *record* is not one of a tensor of *size*."""
    if type(record) is not list or record[0] is not records.CHUNK:
        return None
    offsets, sizes = _values(record, _CHUNK_FIELDS)
    if not (type(offsets) is type(sizes) is torch.Size and len(offsets) == len(sizes) == len(size)):
        return None
    for first, count, whole in zip(offsets, sizes, size, strict=True):
        if first + count > whole:
            return None
    return offsets, sizes


def _storage_meta(record: Any) -> dcp.StorageMeta | None:
    if record is None:
        return None
    if type(record) is not list or record[0] is not records.STORAGE_META:
        raise CheckpointError(f"the metadata has {_kind(record)} as storage_meta")
    where, save, load, modules = _values(record, _STORAGE_META_FIELDS)
    if modules is not None and not (type(modules) is Array and all(type(name) is str for name in modules)):
        raise CheckpointError(f"the metadata has {_kind(modules)} as the modules of storage_meta")
    return dcp.StorageMeta(_where(where), _text(save, "save_id"), _text(load, "load_id"), [*(modules or ())])


def _where(value: Any) -> Any:
    """The id of a checkpoint: a string, or the path that it was saved to."""
    if type(value) is not Call:
        return _text(value, "checkpoint_id")
    kind, parts = value
    is_path = type(kind) is Name and kind.module.startswith("pathlib") and type(parts) is tuple
    if not is_path or len(parts) > _LONG or any(type(part) is not str or len(part) > _LONG for part in parts):
        raise CheckpointError(f"the metadata has {_kind(value)} as checkpoint_id")
    return (pathlib.PureWindowsPath if "Windows" in kind.name else pathlib.PurePosixPath)(*parts)


def _text(value: Any, name: str) -> str | None:
    if value is None or (type(value) is str and len(value) <= _LONG):
        return value
    raise CheckpointError(f"the metadata has {items.shown(value)} as {name}, which is to be a short string")


def _kind(value: Any) -> str:
    """What *value*, a record, stands for, in a few words."""
    if type(value) is list and type(value[0]) is Name:
        return f"a {value[0].name}"
    if type(value) is Call and type(value[0]) is Name:
        return f"a call of {value[0]}"
    names: dict[type[Any], str] = {Table: "a dict", Array: "a list", list: "an instance"}
    return names.get(type(value)) or f"a {type(value).__name__}"
