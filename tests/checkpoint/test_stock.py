"""Metadata as releases of torch from 2.6 to 2.15 lay it out is read alike, and what a newer one adds is named."""

from __future__ import annotations

import pathlib
import pickle
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.metadata import MetadataIndex, TensorProperties, TensorStorageMetadata
from torch.distributed.checkpoint.planner import SavePlan, WriteItem, WriteItemType

from azstoragetorch.checkpoint._format import Item, dump_metadata, load_metadata, properties, read_item
from azstoragetorch.exceptions import CheckpointError

from .test_records import metadata, state_of, with_attributes

STOCK = pathlib.Path(__file__).parent / "stock"
RELEASES = ["2.6.0", "2.7.1", "2.9.1", "2.15.0"]


@pytest.mark.parametrize("release", RELEASES)
@pytest.mark.parametrize("writer", ["files", "fsspec"])
def test_what_any_release_writes_is_read_and_survives(writer: str, release: str) -> None:
    found = load_metadata((STOCK / f"{writer}-{release}").read_bytes())
    described = found.state_dict_metadata
    sharded, whole, scalar = described["sharded"], described["nested.whole"], described["scalar"]
    assert isinstance(sharded, TensorStorageMetadata)
    assert isinstance(whole, TensorStorageMetadata)
    assert isinstance(scalar, TensorStorageMetadata)
    assert (sharded.properties.dtype, sharded.size, len(sharded.chunks)) == (torch.float32, torch.Size([4, 6]), 2)
    assert sharded.chunks[1].offsets == torch.Size([2, 0])
    assert (whole.properties.dtype, whole.size) == (torch.bfloat16, torch.Size([6, 4]))
    assert scalar.properties.memory_format is torch.preserve_format
    assert found.planner_data["nested.bytes"] == ("nested", 0)
    items = {index: read_item(info) for index, info in found.storage_data.items()}
    transforms = () if release == "2.6.0" else ("stream.zstd/1",)
    assert items[MetadataIndex("sharded", [2, 0])] == Item("__1_0.distcp", 0, 1300)
    assert items[MetadataIndex("scalar", [])] == Item("__0_1.distcp", 0, 1200, transforms)
    assert items[MetadataIndex("nested.bytes")] == Item("__0_1.distcp", 1200, 60)
    assert found.storage_meta is not None
    assert (str(found.storage_meta.checkpoint_id), found.storage_meta.save_id) == ("/run/1", "save")
    assert getattr(found, "version", None) == ("1.0.0" if release in ("2.9.1", "2.15.0") else None)
    assert state_of(load_metadata(dump_metadata(found))) == state_of(found)


def with_properties(*more: Any) -> bytes:
    """Metadata whose first tensor has *more* in its properties than torch 2.6 notes."""

    class Properties(TensorProperties):
        def __getstate__(self) -> Any:
            return (*super().__getstate__()[:5], *more)

    made = metadata()
    first = made.state_dict_metadata["a.b"]
    assert isinstance(first, TensorStorageMetadata)
    first.properties = Properties(torch.float32)
    Properties.__module__, Properties.__qualname__ = TensorProperties.__module__, "TensorProperties"
    Properties.__name__ = "TensorProperties"
    import torch.distributed.checkpoint.metadata as place

    stock: Any = place.TensorProperties
    place.TensorProperties = Properties  # type: ignore[misc]  # so that pickle finds it under its name
    try:
        return pickle.dumps(place.Metadata(**{**vars(made), "state_dict_metadata": {"a.b": first}}), 4)
    finally:
        place.TensorProperties = stock  # type: ignore[misc]


@pytest.mark.parametrize("strides", [None, (6, 1), ()])
def test_strides_are_read_by_releases_that_know_them(strides: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    first = load_metadata(with_properties(strides)).state_dict_metadata["a.b"]
    assert isinstance(first, TensorStorageMetadata)
    assert first.properties.dtype is torch.float32
    record = [
        properties.records.PROPERTIES,
        (torch.float32, torch.strided, False, torch.contiguous_format, False, strides),
    ]
    state: Any = record[1]
    encoded = properties.Call((properties.records.MEMORY_FORMAT, (0,)))
    record[1] = (*state[:3], encoded, *state[4:])
    monkeypatch.setattr(properties, "_HAS_STRIDES", True)
    assert properties.read_properties(record) == state
    monkeypatch.setattr(properties, "_HAS_STRIDES", False)
    assert properties.read_properties(record) == state[:5]


@pytest.mark.parametrize("strides", ["x", (-1,), (1.5,), [6, 1], (1,) * 65])
def test_strides_that_cannot_be_are_refused(strides: Any) -> None:
    with pytest.raises(CheckpointError, match=r"describes 'a\.b'"):
        load_metadata(with_properties(strides))


def test_what_a_newer_release_may_add_is_named() -> None:
    with pytest.raises(CheckpointError, match=r"TensorProperties with 7 fields.*newer torch"):
        load_metadata(with_properties(None, "more"))
    with pytest.raises(CheckpointError, match="_StorageInfo with a field 'compression', which is not known"):
        load_metadata(with_attributes(compression="lz4"))
    data = pickle.dumps(metadata(), 4)
    with pytest.raises(CheckpointError, match=r"refers to torch\..*\.ByteStorageMetadatas, which"):
        load_metadata(data.replace(b"BytesStorageMetadata", b"ByteStorageMetadatas"))


@pytest.mark.parametrize("name", [b"torch._inductor", b"_inductor", b"nothing", b"torch.float32"])
def test_the_name_of_a_layout_imports_nothing(name: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch imports some of its modules when they are first asked for."""
    asked: list[str] = []
    monkeypatch.setattr(torch, "__getattr__", asked.append)
    data = pickle.dumps(metadata(), 4)
    layout = b"\x8c\x0dtorch.strided"
    assert layout in data
    with pytest.raises(CheckpointError, match=r"describes 'a\.b'"):
        load_metadata(data.replace(layout, b"\x8c" + bytes([len(name)]) + name))
    assert asked == []


def test_plans_in_the_metadata_are_refused_by_name_and_may_be_removed() -> None:
    """Megatron Core stores them; the guide says how to remove them."""
    found = pickle.loads(dump_metadata(metadata()))
    found.all_local_plans = [SavePlan([WriteItem(MetadataIndex("a"), WriteItemType.BYTE_IO)])]
    found.mcore_data = {"a": {"nd_reformulated_orig_global_shape": (4, 6)}}
    with pytest.raises(CheckpointError, match=r"planner\.(SavePlan|WriteItem)"):
        load_metadata(pickle.dumps(found))
    del found.all_local_plans
    loaded: Any = load_metadata(pickle.dumps(found))
    assert loaded.mcore_data == found.mcore_data
    assert loaded.state_dict_metadata == found.state_dict_metadata
