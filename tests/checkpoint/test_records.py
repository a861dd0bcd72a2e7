"""Metadata is parsed, never executed: the result is always metadata or a CheckpointError, without delay."""

from __future__ import annotations

import itertools
import pathlib
import pickle
import struct
import time
import tracemalloc
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from azstoragetorch.checkpoint._format import Item, Payload, dump_metadata, load_metadata, read_item, storage_info
from azstoragetorch.exceptions import CheckpointError

from .watched import changes_since, snapshot

SECONDS = 5.0  # small inputs never take this long, even on a busy machine


def metadata(**changes: Any) -> Metadata:
    size = torch.Size([4, 6])
    halves = [ChunkStorageMetadata(torch.Size([at, 0]), torch.Size([2, 6])) for at in (0, 2)]
    payload = Payload(704, torch.float32, (2, 6), (6, 1))
    fields: dict[str, Any] = {
        "state_dict_metadata": {
            "a.b": TensorStorageMetadata(TensorProperties(torch.float32), size, halves),
            "c": TensorStorageMetadata(
                TensorProperties(torch.bfloat16, memory_format=torch.channels_last, requires_grad=True),
                torch.Size([]),
                [ChunkStorageMetadata(torch.Size([]), torch.Size([]))],
            ),
            "d": BytesStorageMetadata(),
        },
        "planner_data": {"a.b": ("a", "b"), "c": ("c",), "d": ("d", 0)},
        "storage_data": {
            MetadataIndex("a.b", torch.Size([0, 0]), 0): storage_info(Item("x", 0, 900, (), payload, '"0x8D"')),
            MetadataIndex("a.b", torch.Size([2, 0]), 1): storage_info(Item("x", 900, 900, (), payload, '"0x8D"')),
            MetadataIndex("c", torch.Size([])): _StorageInfo("y/__1_0.distcp", 0, 100),
            MetadataIndex("d"): _StorageInfo("x", 1 << 40, 1 << 20, ["stream.zstd/1"]),
        },
        "storage_meta": StorageMeta(checkpoint_id=pathlib.PurePosixPath("/tmp/x"), save_id="1", modules=["m"]),
        "version": "1.0.0",
    }
    return Metadata(**{**fields, **changes})


def with_info(info: Any) -> bytes:
    return pickle.dumps(metadata(storage_data={MetadataIndex("d"): info}), 4)


def with_attributes(**attributes: Any) -> bytes:
    info = _StorageInfo("x", 0, 1800)
    vars(info).update(attributes)
    return with_info(info)


def state_of(found: Metadata) -> Any:
    """The contents of *found* as plain objects."""
    storage = {(key.fqn, key.offset, key.index): read_item(info) for key, info in found.storage_data.items()}
    return found.state_dict_metadata, found.planner_data, storage, found.storage_meta, found.version


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_what_pickle_reads_is_read_alike(protocol: int) -> None:
    data = pickle.dumps(metadata(), protocol)
    found = load_metadata(data)
    assert state_of(found) == state_of(pickle.loads(data))
    first = next(iter(found.storage_data.values()))
    assert type(first) is _StorageInfo
    assert state_of(load_metadata(dump_metadata(found))) == state_of(found)


@pytest.mark.parametrize("entries", [1, 2, 1000, 1001, 2500])
@pytest.mark.parametrize("protocol", [2, 4])
def test_tables_of_any_length_are_read_alike(entries: int, protocol: int) -> None:
    """Pickles set items in batches of 1,000, and a single last one with another opcode."""
    names = [f"n{number}" for number in range(entries)]
    data = pickle.dumps(
        Metadata(
            OrderedDict((name, BytesStorageMetadata()) for name in names),
            None,
            {MetadataIndex(name): _StorageInfo("x", at, 1) for at, name in enumerate(names)},
        ),
        protocol,
    )
    assert state_of(load_metadata(data)) == state_of(pickle.loads(data))


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_tensors_in_very_many_small_shards_are_read(protocol: int) -> None:
    """No real metadata has more objects for each of its bytes, in any protocol."""
    shards = 12_000
    offsets = [torch.Size([at]) for at in range(shards)]
    tensor = TensorStorageMetadata(
        TensorProperties(torch.float32),
        torch.Size([shards]),
        [ChunkStorageMetadata(torch.Size([at]), torch.Size([1])) for at in range(shards)],
    )
    places = {MetadataIndex("t", offset, at): _StorageInfo("x", 4 * at, 4) for at, offset in enumerate(offsets)}
    found = load_metadata(pickle.dumps(Metadata({"t": tensor}, None, places), protocol))
    assert found.state_dict_metadata == {"t": tensor}
    assert found.storage_data == places


@pytest.mark.parametrize("kind", ["files", "fsspec"])
def test_what_torch_writes_is_read_alike(kind: str, tmp_path: pathlib.Path) -> None:
    state = {"a": torch.ones(3, 4), "b": {"c": [torch.zeros(2, dtype=torch.int8), 7]}, "s": torch.ones(3).to_sparse()}
    if kind == "files":
        writer: Any = dcp.FileSystemWriter(tmp_path)
    else:
        fsspec = pytest.importorskip("torch.distributed.checkpoint._fsspec_filesystem")
        writer = fsspec.FsspecWriter(str(tmp_path))
    state.pop("s")
    dcp.save(state, storage_writer=writer, no_dist=True)
    data = (tmp_path / ".metadata").read_bytes()
    found, expected = state_of(load_metadata(data)), state_of(pickle.loads(data))
    assert found[:3] == expected[:3]
    assert str(found[3].checkpoint_id) == str(expected[3].checkpoint_id)


def test_the_names_of_older_releases_are_read() -> None:
    """Until torch 2.2, TensorProperties was elsewhere; Python 3.11.0 pickled members of enums by name."""
    data = pickle.dumps(metadata(), 2)
    old = data.replace(
        b"ctorch.distributed.checkpoint.metadata\nTensorProperties\n",
        b"ctorch.distributed._shard.sharded_tensor.metadata\nTensorProperties\n",
    )
    assert old != data
    assert load_metadata(old).state_dict_metadata == metadata().state_dict_metadata


def test_what_other_planners_note_is_kept() -> None:
    noted = {"a": {"shape": (4, 6), "parts": [1, 2.5, None, True]}, "b": [torch.Size([3])]}
    found = load_metadata(pickle.dumps(metadata(planner_data=noted), 4))
    assert found.planner_data == noted
    more: Any = metadata()
    more.extra = noted
    assert vars(load_metadata(pickle.dumps(more, 4)))["extra"] == noted


# -- hostile ----------------------------------------------------------------------------------------------------------


def nested(levels: int, kind: type[Any] = list) -> Any:
    value = kind(["a" * 20])
    for _ in range(levels):
        value = kind([value, value])
    return value


def poison(place: bytes, what: bytes) -> bytes:
    """A pickle that sets the attribute ``_str`` of a class and is otherwise valid."""
    good = pickle.dumps(metadata(), 4)
    name = b"\x8c" + bytes([len(place)]) + place + b"\x8c" + bytes([len(what)]) + what + b"\x93"
    return good[:2] + name + b"N}\x8c\x04_strK\x01s\x86b0" + good[11:]


HOSTILE: dict[str, bytes] = {
    "hash of shared tuples": b"\x80\x04}(K\x01\x85" + b"2\x86" * 50 + b"Nu.",
    "hash of memoized tuples": b"\x80\x04}(K\x01\x85\x94"
    + b"".join(b"h" + bytes([n]) + b"h" + bytes([n]) + b"\x86\x94" for n in range(50))
    + b"Nu.",
    "nested tuples": b"\x80\x04}()" + b"\x85" * 1_000_000 + b"Nu.",
    "nested lists": b"\x80\x04" + b"]" * 1_000_000 + b"a" * 999_999 + b".",
    "nested lists, memoized": b"\x80\x04" + b"]\x94" * 1_000_000 + b"a" * 999_999 + b".",
    "nested marks": b"\x80\x04" + b"(" * 1_000_000 + b"t" * 1_000_000 + b".",
    "nested instances": b"\x80\x04" + b"(ctorch\nSize\n)\x81\x94}\x94(" * 100_000 + b"ub" * 100_000 + b".",
    "offset of shared lists": with_info(_StorageInfo("f", nested(36), 1)),
    "payload of shared tuples": with_attributes(payload=nested(36, tuple)),
    "planner data of shared lists": pickle.dumps(metadata(planner_data=nested(36)), 4),
    "planner data of shared tuples": pickle.dumps(metadata(planner_data={"a": nested(36, tuple)}), 4),
    "colliding numbers as keys": b"\x80\x04}("
    + b"".join(pickle.dumps(n * ((1 << 61) - 1), 2)[2:-1] + b"N" for n in range(1, 20_000))
    + b"u.",
    "a number of many digits": b"\x80\x04\x8b" + struct.pack("<i", 1 << 20) + b"\x7f" * (1 << 20) + b".",
    "a number of 200 bytes": b"\x80\x04\x8a\xc8" + b"\x7f" * 200 + b".",
    "a string longer than memory": b"\x80\x04\x8d\xff\xff\xff\xff\xff\xff\xff\x7f.",
    "bytes longer than memory": b"\x80\x05\x96\xff\xff\xff\xff\xff\xff\xff\x7f.",
    "a reference to nothing": b"\x80\x04h\x05.",
    "a far reference": b"\x80\x04j\xff\xff\xff\xff.",
    "an extension code": b"\x80\x04\x82\x01.",
    "a persistent id": b"\x80\x04K\x01Q.",
    "the state of a class": poison(b"pathlib", b"PurePosixPath"),
    "the state of Metadata": poison(b"torch.distributed.checkpoint.metadata", b"Metadata"),
    "a name twice": pickle.dumps(metadata(), 4)[:-1] + b"0",
    "an ETag with a line break": with_attributes(etag='"x"\r\nDELETE /other HTTP/1.1\r\n\r\n'),
    "an ETag without quotes": with_attributes(etag="x"),
    "an ETag with a NUL": with_attributes(etag='"\x00"'),
    "an ETag that is a number": with_attributes(etag=7),
    "metadata as data": with_info(_StorageInfo(".metadata", 0, 10)),
    "metadata of a rank as data": with_info(_StorageInfo("__3.metadata", 0, 10)),
    "metadata of another checkpoint as data": with_info(_StorageInfo("sub/.metadata", 0, 10)),
    "a lone surrogate in a name": with_info(_StorageInfo("a\ud800", 0, 10)),
    "a C1 control in a name": with_info(_StorageInfo("a\x85", 0, 10)),
    "an end that overflows": with_info(_StorageInfo("a", (1 << 63) - 5, 10)),
    "an unknown field": with_attributes(compression="lz4"),
    "many extensions": with_attributes(transform_descriptors=["x"] * 100),
    "a shape of too many elements": pickle.dumps(
        metadata(
            state_dict_metadata={
                "a": TensorStorageMetadata(TensorProperties(torch.int8), torch.Size([1 << 40, 1 << 40, 0]), [])
            }
        ),
        4,
    ),
    "a shape of too many dimensions": pickle.dumps(
        metadata(
            state_dict_metadata={"a": TensorStorageMetadata(TensorProperties(torch.int8), torch.Size([1] * 65), [])}
        ),
        4,
    ),
    "a shard outside of its tensor": pickle.dumps(
        metadata(
            state_dict_metadata={
                "a": TensorStorageMetadata(
                    TensorProperties(torch.int8),
                    torch.Size([4]),
                    [ChunkStorageMetadata(torch.Size([3]), torch.Size([2]))],
                )
            }
        ),
        4,
    ),
    "protocol 0": pickle.dumps(metadata(), 0),
}


HOSTILE["a description inside of a description, often"] = (
    b"\x80\x04ctorch.distributed.checkpoint.metadata\nTensorStorageMetadata\n\x94(K\x01h\x00"
    + b")\x81\x94}\x94(h\x00" * 40
    + b"ub" * 40
    + b"u."
)


def without_last_value() -> bytes:
    """Metadata whose first index has the names of all fields but lacks the last value."""
    good = pickle.dumps(metadata(), 4)
    name = b"\x8c\x06offset\x94"
    at = good.index(name, good.index(b"MetadataIndex")) + len(name)
    return good[:at] + good[good.index(b"ub", at) :]


HOSTILE["a field without a value"] = without_last_value()


@pytest.fixture(autouse=True)
def _nothing_changes() -> Iterator[None]:
    before = snapshot()
    yield
    assert changes_since(before) == []


@pytest.mark.parametrize("data", HOSTILE.values(), ids=HOSTILE.keys())
def test_hostile_metadata_is_an_error_at_once(data: bytes) -> None:
    begin = time.process_time()
    with pytest.raises(CheckpointError) as caught:
        load_metadata(data)
    assert time.process_time() - begin < SECONDS
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize("name", ["__class__", "_secret", "state_dict_metadata.x", "__dict__"])
def test_fields_that_metadata_cannot_have_are_refused(name: str) -> None:
    forged = metadata()
    data = pickle.dumps(forged, 4)
    entry = b"\x8c" + bytes([len(name)]) + name.encode() + b"K\x01"
    at = data.rindex(b"ub.")
    with pytest.raises(CheckpointError):
        load_metadata(data[:at] + entry + data[at:])


def test_equal_descriptions_are_read_once_and_given_to_each_key_apart() -> None:
    """Changing the description of one tensor does not change that of another."""
    size = torch.Size([4, 6])
    entries = {
        f"t{number}": TensorStorageMetadata(
            TensorProperties(torch.float32), torch.Size([4, 6]), [ChunkStorageMetadata(torch.Size([0, 0]), size)]
        )
        for number in range(3)
    }
    data = pickle.dumps(metadata(state_dict_metadata=entries), 4)
    found = load_metadata(data).state_dict_metadata
    assert found == pickle.loads(data).state_dict_metadata
    first, second = found["t1"], found["t2"]
    assert isinstance(first, TensorStorageMetadata)
    assert isinstance(second, TensorStorageMetadata)
    assert first is not second
    assert first.properties is not second.properties
    assert first.chunks is not second.chunks
    assert first.chunks[0] is not second.chunks[0]


def text(value: str) -> bytes:
    return b"\x8c" + bytes([len(value)]) + value.encode()


def large(described: bytes = b"", planned: bytes = b"N", stored: bytes = b"") -> bytes:
    """The code of metadata in whose tables a memo may be used, which has these:

    0 the class Metadata, 1 what describes an entry, 2 the class of an index, 3 a place, 4 "fqn", 5 "index", 6 a list
    """
    place = text("relative_path") + text("x") + text("offset") + b"K\x00" + text("length") + b"K\x01"
    module = b"ctorch.distributed.checkpoint."
    memo = (
        module + b"metadata\nMetadata\n\x94" + module + b"metadata\nBytesStorageMetadata\n)\x81\x94"
        + module + b"metadata\nMetadataIndex\n\x94" + module + b"filesystem\n_StorageInfo\n)\x81\x94}(" + place + b"ub"
        + text("fqn") + b"\x94" + text("index") + b"\x94]\x94"
    )  # fmt: skip
    tables = text("state_dict_metadata") + b"}" + described + text("planner_data") + planned
    tables += text("storage_data") + b"}" + stored
    return module + b"metadata\nMetadata\n)\x81}(" + text("noted") + b"(" + memo + b"t" + tables + b"ub."


def in_batches(entries: Iterator[bytes]) -> bytes:
    return b"".join(b"(" + b"".join(batch) + b"u" for batch in iter(lambda: [*itertools.islice(entries, 1000)], []))


CROWDED = {
    "entries": large(in_batches(text(f"{n:06x}") + b"h\x01" for n in range(10_000))),
    "items": large(
        stored=in_batches(b"h\x02)\x81\x94}\x94(h\x04" + text(f"{n:06x}") + b"h\x05Nubh\x03" for n in range(10_000))
    ),
    "one list many times": large(planned=b"]" + (b"(" + b"h\x06" * 1000 + b"e") * 40),
}


@pytest.mark.parametrize("code", CROWDED.values(), ids=CROWDED.keys())
def test_objects_that_are_many_times_as_large_as_the_file_are_not_made(code: bytes) -> None:
    """Each would take 25 to 40 times the memory of its pickle."""
    with pytest.raises(CheckpointError, match=r"than fit into its size|is too large"):
        load_metadata(b"\x80\x04" + code)


MEMORY = {
    "lists": b"(" + b"]NaNNNNN" * (1 << 20) + b"t.",
    "dicts": b"(" + b"}NNsNNNNNNNN" * (1 << 20) + b"t.",
    "strings": b"(" + "\u0100\u0101".encode().join([b"\x8c\x02"] * (1 << 21)) + b"t.",
    "constants": b"(" + b"N" * (10 << 20) + b"t.",
    "constants as a state": b"ctorch\nSize\n)\x81\x94}\x94(" + b"N" * (10 << 20) + b"ub.",
}


@pytest.mark.parametrize("code", MEMORY.values(), ids=MEMORY.keys())
def test_hostile_metadata_takes_memory_in_proportion(code: bytes) -> None:
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError):
            load_metadata(b"\x80\x04" + code)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 20 * len(code) + (64 << 20)


def test_equal_keys_are_refused() -> None:
    """With two entries for one item, neither can be trusted."""
    data = dump_metadata(
        metadata(
            storage_data={MetadataIndex("dd"): _StorageInfo("x", 0, 1), MetadataIndex("ee"): _StorageInfo("x", 1, 1)}
        )
    )
    with pytest.raises(CheckpointError, match="twice"):
        load_metadata(data.replace(b"ee", b"dd"))


def test_the_error_says_which_entry() -> None:
    with pytest.raises(CheckpointError, match="'d'") as caught:
        load_metadata(with_attributes(etag="x"))
    assert caught.value.key == "d"
