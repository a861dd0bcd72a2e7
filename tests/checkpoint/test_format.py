"""The format: the same bytes as torch.save, and metadata that runs no foreign code."""

from __future__ import annotations

import gc
import io
import os
import pathlib
import pickle
import pickletools
import sys
import time
from collections.abc import Callable
from functools import partial
from types import FrameType
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint import metadata as dcp_metadata
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

from azstoragetorch.checkpoint._format import (
    Item,
    Payload,
    data_name,
    dump_metadata,
    envelope,
    load_metadata,
    new_save_id,
    probe,
    read_item,
    saved_at,
    storage_info,
)
from azstoragetorch.exceptions import CheckpointError, CheckpointNotFoundError

DTYPES = [
    torch.float32,
    torch.float64,
    torch.float16,
    torch.bfloat16,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.complex64,
    torch.complex128,
    torch.int8,
    torch.uint8,
    torch.int16,
    torch.int64,
    torch.bool,
]


def saved(tensor: torch.Tensor) -> bytes:
    stream = io.BytesIO()
    torch.save(tensor, stream)
    return stream.getvalue()


@pytest.mark.parametrize("shape", [(), (1,), (0, 3), (7, 5), (3, 2, 4, 1), (100_000,)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_an_envelope_and_the_bare_bytes_are_what_torch_load_reads(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    tensor = torch.arange(max(1, torch.Size(shape).numel()) * dtype.itemsize).to(torch.uint8) % 2
    tensor = tensor.view(dtype)[: torch.Size(shape).numel()].reshape(shape).clone()
    around = envelope(dtype, torch.Size(shape))
    payload = bytes(tensor.reshape(-1).view(torch.uint8).tolist())
    item = around.head + payload + around.tail
    assert len(item) == len(saved(tensor))
    loaded = torch.load(io.BytesIO(item), weights_only=True)
    assert (loaded.dtype, loaded.shape) == (tensor.dtype, tensor.shape)
    assert torch.equal(loaded.reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64], ids=str)
def test_the_ends_of_an_item_tell_what_lies_between(dtype: torch.dtype) -> None:
    """Also of items from other versions of torch: only what torch.load reads is assumed."""
    tensor = torch.zeros(300, 400, dtype=dtype)
    item = saved(tensor)
    found = probe(item[:4096], item[-4096:], len(item))
    assert found is not None
    assert (found.dtype, found.shape, found.stride) == (dtype, (300, 400), (400, 1))
    assert len(item) > found.offset + found.nbytes
    assert item[found.offset : found.offset + found.nbytes] == bytes(found.nbytes)


@pytest.mark.parametrize(
    "value",
    [
        torch.zeros(300, 400).t(),  # stored in another order
        torch.zeros(300, 400).to_sparse(),
        torch.eye(700).to_sparse_csr(),
        torch.quantize_per_tensor(torch.zeros(90_000), 0.1, 0, torch.qint8),
        torch.zeros(100_000)[5_000:],  # a part of a storage
        [torch.zeros(90_000), torch.ones(3)],
        "x" * 100_000,
    ],
    ids=["transposed", "sparse", "csr", "quantized", "view", "list", "text"],
)
def test_what_is_not_a_plain_dense_tensor_is_decoded_whole(value: Any) -> None:
    item = saved(value)
    assert probe(item[:4096], item[-4096:], len(item)) is None


def test_probing_damaged_ends_finds_nothing() -> None:
    item = saved(torch.zeros(300, 400))
    assert probe(bytes(4096), item[-4096:], len(item)) is None
    assert probe(item[:4096], bytes(4096), len(item)) is None


# -- metadata ---------------------------------------------------------------------------------------------------------


def make_metadata(path: str = "__0_0.distcp", **changes: Any) -> Metadata:
    tensor = TensorStorageMetadata(
        TensorProperties(torch.float32), torch.Size([4]), [ChunkStorageMetadata(torch.Size([0]), torch.Size([4]))]
    )
    fields: dict[str, Any] = {
        "state_dict_metadata": {"a": tensor, "b": BytesStorageMetadata()},
        "planner_data": {"a": ("a",), "b": ("b", 0)},
        "storage_data": {
            MetadataIndex("a", torch.Size([0]), 0): storage_info(
                Item(path, 0, 1800, (), Payload(704, torch.float32, (4,), (1,)), '"etag"')
            ),
            MetadataIndex("b"): _StorageInfo(path, 1800, 10, ["stream.zstd/1"]),
        },
        "storage_meta": StorageMeta(checkpoint_id=pathlib.Path("/tmp/x"), save_id="1"),
        "version": "1.0.0",
    }
    return Metadata(**{**fields, **changes})


def test_metadata_survives_both_readers() -> None:
    for read in (load_metadata, pickle.loads):
        found = read(dump_metadata(make_metadata()))
        first, second = found.storage_data[MetadataIndex("a", [0])], found.storage_data[MetadataIndex("b")]
        assert read_item(first) == Item("__0_0.distcp", 0, 1800, (), Payload(704, torch.float32, (4,), (1,)), '"etag"')
        assert read_item(second) == Item("__0_0.distcp", 1800, 10, ("stream.zstd/1",))
        assert found.state_dict_metadata == make_metadata().state_dict_metadata


def test_the_entries_are_plain_instances_of_the_stock_class() -> None:
    info = make_metadata().storage_data[MetadataIndex("a", [0])]
    assert type(info) is _StorageInfo
    assert dump_metadata(make_metadata()).count(b"azstoragetorch") == 0


class Calls:
    """Pickles as a call of *function*."""

    def __init__(self, function: Any, *args: Any) -> None:
        self.call = function, args

    def __reduce__(self) -> Any:
        return self.call


@pytest.mark.parametrize(
    ("function", "named"),
    [
        (os.system, "system"),
        (eval, "builtins.eval"),
        (getattr, "builtins.getattr"),
        (pickle.loads, "loads"),
        (torch.load, "torch.serialization.load"),
        (torch.hub.load, "torch.hub.load"),
        (io.open, "open"),
    ],
)
@pytest.mark.parametrize("place", ["planner_data", "storage_meta", "storage_data", "state_dict_metadata"])
def test_a_pickle_that_calls_is_refused_by_name_and_not_run(
    function: Any, named: str, place: str, tmp_path: pathlib.Path
) -> None:
    witness = tmp_path / "ran"
    bad = Calls(function, f"touch {witness}" if function is os.system else str(witness))
    data = dump_metadata(make_metadata(**{place: bad}))
    with pytest.raises(CheckpointError, match=named):
        load_metadata(data)
    assert not witness.exists()


def test_a_dotted_global_does_not_reach_around_the_list() -> None:
    for name in (b"serialization.os.system", b"Size.__class__", b"nn.functional"):
        data = b"\x80\x04\x8c\x05torch\x8c" + bytes([len(name)]) + name + b"\x93."
        with pytest.raises(CheckpointError, match=r"torch\."):
            load_metadata(data)


def test_a_pickle_that_changes_admitted_classes_is_refused_and_undone() -> None:
    """The BUILD opcode sets attributes of anything on the stack, including classes."""
    before = dict(vars(Metadata))
    module, name = b"torch.distributed.checkpoint.metadata", b"Metadata"
    push = b"\x8c" + bytes([len(module)]) + module + b"\x8c" + bytes([len(name)]) + name + b"\x93"
    data = b"\x80\x04" + push + b"N}\x8c\x08__init__K\x01s\x86b."
    pickletools.dis(data, out=io.StringIO())
    with pytest.raises(CheckpointError, match="change"):
        load_metadata(data)
    assert dict(vars(Metadata)) == before


@pytest.mark.parametrize(
    "path",
    [
        "../other/x",
        "a/../../b",
        "/x",
        "//host/x",
        "http://evil/x",
        "https:x",
        "a\\b",
        "",
        ".",
        "a//b",
        "x\n",
        "a/./b",
        7,
    ],
)
def test_paths_out_of_the_checkpoint_are_refused(path: Any) -> None:
    with pytest.raises(CheckpointError, match="not inside"):
        load_metadata(pickle.dumps(make_metadata(path)))


def test_what_makes_no_sense_is_refused() -> None:
    tensor = make_metadata().state_dict_metadata["a"]
    assert isinstance(tensor, TensorStorageMetadata)
    properties, size = tensor.properties, torch.Size([4])
    forged: list[tuple[dict[str, Any], str]] = [
        ({"state_dict_metadata": {"a": TensorStorageMetadata(properties, torch.Size([-4]), [])}}, "'a' in a way"),
        ({"state_dict_metadata": {"a": TensorStorageMetadata(properties, size, [BytesStorageMetadata()])}}, "'a' in a"),  # type: ignore[list-item]
        ({"state_dict_metadata": {1: tensor}}, "named 1"),
        ({"storage_data": {MetadataIndex("a"): size}}, "not in torch's file format: it has a Size"),
        ({"storage_data": {MetadataIndex("a"): _StorageInfo("x", -1, 10)}}, "places 'a' at -1, length 10"),
        ({"storage_data": {"a": _StorageInfo("x", 0, 10)}}, "has a str in the place of an index"),
    ]
    for changes, words in forged:
        with pytest.raises(CheckpointError, match=words):
            load_metadata(pickle.dumps(make_metadata(**changes)))
    for info, words in ((7, "it has a int"), (_StorageInfo("x", 0, -1), "at 0, length -1, of 'x'")):
        with pytest.raises(CheckpointError, match=words):
            read_item(info)


@pytest.mark.parametrize("put", [b"r\xff\xff\xff\x7f", b"p2147483647\n"])
@pytest.mark.parametrize("protocol", [2, 4])
def test_no_memory_is_taken_for_objects_that_cannot_be(put: bytes, protocol: int) -> None:
    """A number in a pickle makes the unpickler allocate 16 bytes for each lower one."""
    data = pickle.dumps(make_metadata(), protocol)
    ops = [position for op, _, position in pickletools.genops(data) if op.name in ("EMPTY_DICT", "DICT")]
    with pytest.raises(CheckpointError, match=r"not an intact pickle.*numbers an object"):
        load_metadata(data[: ops[0] + 1] + put + data[ops[0] + 1 :])
    assert isinstance(load_metadata(data), Metadata)


@pytest.mark.parametrize("cut_at", [0, 1, 10, 100, -1])
def test_cut_metadata_is_an_error(cut_at: int) -> None:
    with pytest.raises(CheckpointError, match="not an intact pickle"):
        load_metadata(dump_metadata(make_metadata())[:cut_at])


def test_flipped_bits_are_an_error_or_harmless() -> None:
    """The result is metadata or a CheckpointError, and nothing changes in this process."""
    data = dump_metadata(make_metadata())
    for at in range(0, len(data), 3):
        damaged = bytearray(data)
        damaged[at] ^= 1 << (at % 8)
        try:
            found = load_metadata(bytes(damaged))
        except CheckpointError:
            continue
        assert isinstance(found, Metadata)


@pytest.mark.parametrize(
    "changes",
    [
        {"state_dict_metadata": None},
        {"state_dict_metadata": {1: BytesStorageMetadata()}},
        {"storage_data": []},
        {"storage_data": {"a": 1}},
        {"storage_data": {MetadataIndex("a"): StorageMeta()}},
        {"storage_data": {MetadataIndex("a"): _StorageInfo("x", -1, 5)}},
        {"storage_data": {MetadataIndex("a"): _StorageInfo("x", 0, 1 << 70)}},
        {"storage_data": {MetadataIndex("a"): _StorageInfo("x", 0.5, 1)}},  # type: ignore[arg-type]
        {
            "state_dict_metadata": {
                "a": TensorStorageMetadata(
                    TensorProperties(), torch.Size([4]), [ChunkStorageMetadata(torch.Size([2]), torch.Size([4]))]
                )
            }
        },
    ],
)
def test_metadata_that_makes_no_sense_is_an_error(changes: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError):
        load_metadata(pickle.dumps(make_metadata(**changes)))


@pytest.mark.parametrize(
    "facts",
    [
        (704, torch.float32, (1 << 40,), (1,)),
        (704, torch.float32, (-4,), (1,)),
        (-1, torch.float32, (4,), (1,)),
        (704, "float32", (4,), (1,)),
        (704, torch.float32, (4,), ()),
        7,
    ],
)
def test_a_forged_payload_is_an_error(facts: Any) -> None:
    info: Any = _StorageInfo("x", 0, 1800)
    info.payload = facts
    with pytest.raises(CheckpointError):
        read_item(info)


def test_something_else_than_metadata_is_an_error() -> None:
    for value in ({}, StorageMeta(), 7):
        with pytest.raises(CheckpointError, match="not torch's Metadata"):
            load_metadata(pickle.dumps(value))


def test_names_of_saves_tell_their_age_and_never_repeat() -> None:
    name = data_name(3, 1, new_save_id())
    begun = saved_at(name)
    assert begun is not None
    assert abs(begun - time.time()) < 5
    assert len({new_save_id() for _ in range(1000)}) == 1000
    assert saved_at("__0_0.distcp") is None
    assert saved_at(".metadata") is None


def metadata_of(count: int) -> bytes:
    """Metadata of *count* tensors in one blob."""
    entries, storage = {}, {}
    for number in range(count):
        key = f"model.layers.{number}.weight"
        size = torch.Size([16, 16])
        chunk = ChunkStorageMetadata(torch.Size([0, 0]), size)
        entries[key] = TensorStorageMetadata(TensorProperties(torch.float32), size, [chunk])
        payload = Payload(704, torch.float32, (16, 16), (16, 1))
        storage[MetadataIndex(key, [0, 0], 0)] = storage_info(Item("__0_0.x.distcp", number * 2600, 2600, (), payload))
    return dump_metadata(Metadata(entries, storage_data=storage))


def lines_of(action: Callable[[], object]) -> int:
    """How many lines of Python *action* executes."""
    count = 0

    def trace(_frame: FrameType, event: str, _argument: Any) -> Any:
        nonlocal count
        count += event == "line"
        return trace

    before, was_enabled = sys.gettrace(), gc.isenabled()
    gc.disable()  # finalizers of other tests' objects would be counted
    sys.settrace(trace)
    try:
        action()
    finally:
        sys.settrace(before)
        if was_enabled:
            gc.enable()
    return count


@pytest.mark.untraced
def test_reading_is_linear_and_takes_little_for_each_item() -> None:
    """Counted, not timed: about 250 lines for an item, so that 100,000 items are read in seconds."""
    lines = [lines_of(partial(load_metadata, data)) for data in map(metadata_of, (500, 1000, 2000))]
    assert lines[2] - lines[1] < 1.01 * 2 * (lines[1] - lines[0])
    assert lines[2] < 400 * 2000


# -- private names of torch that cannot be avoided; see ALLOWED_PRIVATE in tests/test_architecture.py ------------


def test_torch_still_has_the_private_names_that_the_format_needs() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.distributed.checkpoint._extension import ExtensionRegistry

    assert {"relative_path", "offset", "length"} <= set(vars(_StorageInfo("x", 0, 1)))
    assert pickle.loads(pickle.dumps(_StorageInfo("x", 0, 1))) == _StorageInfo("x", 0, 1)
    assert list(dcp_metadata._MEM_FORMAT_ENCODING)
    assert callable(ExtensionRegistry().from_descriptor_list)
    item = saved(torch.zeros(10))
    with FakeTensorMode():
        assert torch.load(io.BytesIO(item)).untyped_storage()._checkpoint_offset == item.index(bytes(40), 600)


def test_errors_survive_pickling_with_all_they_say() -> None:
    error = CheckpointNotFoundError("why", checkpoint="http://x", key="k", rank=3, touched=frozenset({"a"}))
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is CheckpointNotFoundError
    assert (str(again), again.checkpoint, again.key, again.rank, again.touched) == ("why", "http://x", "k", 3, {"a"})
