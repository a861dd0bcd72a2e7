"""What `torch.distributed.checkpoint` expects from a storage writer and reader. Every pair inherits this suite."""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable
from typing import Any, Protocol

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict_from_keys
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType

from tests.checkpoint import jobs
from tests.checkpoint.ranks import run_ranks
from tests.checkpoint.states import alone, blank, load, rich_state, same, save


class Place(Protocol):
    """The location of checkpoints. It can be pickled: ranks create their writers and readers with it."""

    def writer(self, folder: str = "run", **options: Any) -> Any:
        """A writer to *folder*."""
        ...

    def reader(self, folder: str = "run") -> Any:
        """A reader of *folder*."""
        ...

    def writer_id(self, folder: str) -> str:
        """The ``checkpoint_id`` of *folder* for writers."""
        ...

    def reader_id(self, folder: str) -> str:
        """The ``checkpoint_id`` of *folder* for readers."""
        ...


class Door(Protocol):
    """Access to the files of a checkpoint that bypasses the implementation."""

    def carry(self) -> None:
        """Copy what was written to where it is read, if that is another place."""
        ...

    def names(self, folder: str = "run") -> list[str]:
        """The names of the files in *folder*, as the reader finds them."""
        ...

    def get(self, name: str, folder: str = "run") -> bytes: ...

    def put(self, name: str, data: bytes, folder: str = "run") -> None: ...

    def remove(self, name: str, folder: str = "run") -> None: ...


def save_on_ranks(rank: int, place: Place, layout: str, step: int) -> None:
    dcp.save(jobs.sharded(layout, step), storage_writer=place.writer())


def load_on_ranks(rank: int, place: Place, layouts: list[str], step: int) -> None:
    for layout in layouts:
        state = jobs.empty(layout)
        dcp.load(state, storage_reader=place.reader())
        jobs.check(state, step)


def save_and_fail_on_ranks(rank: int, place: Place) -> list[int]:
    """The ranks that are reported as failed."""
    try:
        dcp.save(jobs.sharded("rows", 1), storage_writer=place.writer(), planner=jobs.FailingPlanner())
    except dcp.CheckpointException as error:
        return sorted(error.failures)
    return []


TENSORS: dict[str, Callable[[], torch.Tensor]] = {
    "scalar": lambda: torch.tensor(2.5),
    "empty": lambda: torch.empty(3, 0),
    "bool": lambda: torch.tensor([True, False]),
    "bfloat16": lambda: torch.arange(70.0).bfloat16(),
    "float8": lambda: torch.arange(70.0).to(torch.float8_e5m2),
    "complex": lambda: torch.complex(torch.arange(5.0), torch.ones(5)),
    "transposed": lambda: torch.arange(12.0).reshape(3, 4).t(),
    "channels last": lambda: torch.arange(96.0).reshape(2, 3, 4, 4).to(memory_format=torch.channels_last),
    "strided": lambda: torch.arange(100.0)[::7],
    "view of more": lambda: torch.arange(10_000.0)[50:60],
    "expanded": lambda: torch.arange(4.0).expand(3, 4),
    "requires grad": lambda: torch.ones(4, requires_grad=True),
    "quantised": lambda: torch.quantize_per_tensor(torch.arange(9.0), 0.1, 2, torch.qint8),
    "large": lambda: torch.arange(300_000.0).reshape(600, 500),
}

OBJECTS = [7, 1.5, True, None, "text", b"bytes", [], {}, {"a": [1, {"b": 2}]}, (1, 2), torch.float16, torch.Size([2])]


class CheckpointStorageSuite:
    """Inherit from this suite and provide the fixtures ``place`` and ``door``."""

    # -- what is saved is loaded

    def test_a_state_dict_of_all_kinds(self, place: Place, door: Door) -> None:
        save(rich_state(), place.writer())
        door.carry()
        same(rich_state(), load(blank(rich_state()), place.reader()))

    @pytest.mark.parametrize("kind", TENSORS)
    def test_a_tensor(self, place: Place, door: Door, kind: str) -> None:
        value = TENSORS[kind]()
        save({"x": value}, place.writer())
        door.carry()
        target = (
            torch.quantize_per_tensor(torch.zeros(9), 0.1, 2, torch.qint8)
            if value.is_quantized
            else torch.zeros(value.shape, dtype=value.dtype)
        )
        same({"x": value}, load({"x": target}, place.reader()))

    @pytest.mark.parametrize("value", OBJECTS, ids=repr)
    def test_an_object(self, place: Place, door: Door, value: Any) -> None:
        save({"x": value, "y": torch.ones(2)}, place.writer())
        door.carry()
        found = load({"x": value if isinstance(value, (dict, list, tuple)) else 0}, place.reader())["x"]
        assert found == value or found == list(value)  # torch's planner converts tuples to lists

    def test_targets_of_another_layout_or_type(self, place: Place, door: Door) -> None:
        values = torch.randn(30, 40)
        save({"x": values}, place.writer())
        door.carry()
        for target in (torch.zeros(40, 30).t(), torch.zeros(60, 40)[::2], torch.zeros(30, 41)[:, :40]):
            assert torch.equal(load({"x": target}, place.reader())["x"], values)
        half = torch.zeros(30, 40, dtype=torch.bfloat16)
        assert torch.equal(load({"x": half}, place.reader())["x"], values.bfloat16())

    def test_the_tensor_that_is_there_gets_the_values(self, place: Place, door: Door) -> None:
        save({"x": torch.arange(9.0)}, place.writer())
        door.carry()
        target = torch.zeros(9)
        alias = target.view(3, 3)
        state = load({"x": target}, place.reader())
        assert state["x"] is target
        assert alias[2, 2] == 8

    def test_some_keys_only(self, place: Place, door: Door) -> None:
        state = rich_state()
        save(state, place.writer())
        door.carry()
        some = {"large": blank(state["large"]), "step": 0}
        same({"large": state["large"], "step": 12}, load(some, place.reader()))
        with alone():
            found = _load_state_dict_from_keys({"optimizer", "bf16"}, storage_reader=place.reader())
        same({"bf16": state["bf16"], "optimizer": state["optimizer"]}, dict(sorted(found.items())))

    def test_an_empty_state_dict(self, place: Place, door: Door) -> None:
        save({}, place.writer())
        door.carry()
        assert load({}, place.reader()) == {}

    def test_flat_keys_with_dots_and_without_flattening(self, place: Place, door: Door) -> None:
        state = {"a.b": torch.ones(4), "ü/../c d": torch.zeros(2), "e": 7}
        save(state, place.writer(), planner=dcp.DefaultSavePlanner(flatten_state_dict=False))
        door.carry()
        planner = dcp.DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
        same(state, load(blank(state), place.reader(), planner=planner))

    # -- what torch relies on

    def test_the_metadata_describes_all_entries(self, place: Place, door: Door) -> None:
        returned = save(rich_state(), place.writer())
        door.carry()
        metadata = place.reader().read_metadata()
        assert metadata.state_dict_metadata.keys() == returned.state_dict_metadata.keys()
        weight = metadata.state_dict_metadata["model.weight"]
        assert isinstance(weight, TensorStorageMetadata)
        assert (weight.size, weight.properties.dtype) == (torch.Size([300, 200]), torch.float32)
        assert metadata.planner_data["model.layers.0.bias"] == ("model", "layers", 0, "bias")
        expected = set()
        for key, entry in metadata.state_dict_metadata.items():
            chunks = [None] if isinstance(entry, BytesStorageMetadata) else [chunk.offsets for chunk in entry.chunks]
            expected |= {MetadataIndex(key, offset) for offset in chunks}
        assert metadata.storage_data.keys() == expected

    def test_every_item_is_what_torch_save_writes(self, place: Place, door: Door) -> None:
        save(rich_state(), place.writer())
        door.carry()
        for index, info in place.reader().read_metadata().storage_data.items():
            data = door.get(info.relative_path)[info.offset : info.offset + info.length]
            value = torch.load(io.BytesIO(data), weights_only=True)
            assert isinstance(value, torch.Tensor) == (index.offset is not None)

    def test_checkpoint_id_names_another_folder_and_none_keeps_the_last(self, place: Place, door: Door) -> None:
        writer, reader = place.writer("0"), place.reader("0")
        for step in (1, 2):
            save({"x": torch.tensor(step)}, writer, checkpoint_id=place.writer_id(str(step)))
        save({"x": torch.tensor(3)}, writer)
        door.carry()
        for folder, value in (("1", 1), ("2", 3)):
            assert load({"x": torch.tensor(0)}, reader, checkpoint_id=place.reader_id(folder))["x"] == value
        assert load({"x": torch.tensor(0)}, reader)["x"] == 3
        assert reader.validate_checkpoint_id(place.reader_id("1"))
        assert writer.validate_checkpoint_id(place.writer_id("1"))

    def test_writer_and_reader_pickle_and_are_used_again(self, place: Place, door: Door) -> None:
        writer, reader = place.writer(), place.reader()
        for step in range(2):
            save({"x": torch.tensor(step)}, writer)
            door.carry()
            assert load({"x": torch.tensor(-1)}, reader)["x"] == step
            place = pickle.loads(pickle.dumps(place))
            writer = place.writer()

    def test_saving_again_replaces_all(self, place: Place, door: Door) -> None:
        for count in (5, 2):
            save({f"x{n}": torch.full((100,), float(count)) for n in range(count)}, place.writer())
            door.carry()
        found = load({f"x{n}": torch.zeros(100) for n in range(2)}, place.reader())
        assert all(value.unique().tolist() == [2.0] for value in found.values())
        with pytest.raises(dcp.CheckpointException, match="x4"):
            load({"x4": torch.zeros(100)}, place.reader())

    def test_overwrite_false_keeps_what_is_there(self, place: Place, door: Door) -> None:
        save({"x": torch.ones(3)}, place.writer(overwrite=False))
        with pytest.raises(dcp.CheckpointException):
            save({"x": torch.zeros(3)}, place.writer(overwrite=False))
        door.carry()
        assert load({"x": torch.zeros(3)}, place.reader())["x"].tolist() == [1, 1, 1]

    def test_plan_caching(self, place: Place, door: Door) -> None:
        writer = place.writer()
        for step, count in enumerate((2, 2, 3)):
            state = {f"x{n}": torch.full((1000,), float(step + n)) for n in range(count)} | {"step": step}
            save(state, writer, planner=dcp.DefaultSavePlanner(enable_plan_caching=True))
            door.carry()
            same(state, load(blank(state), place.reader()))

    def test_an_asynchronous_save_holds_what_was_there_at_the_call(self, place: Place, door: Door) -> None:
        value = torch.ones(200_000)
        with alone():
            future: Any = dcp.async_save(
                {"x": value, "step": 1},
                storage_writer=place.writer(),
                async_checkpointer_type=AsyncCheckpointerType.THREAD,
                no_dist=True,
            )
        value.zero_()
        future.result()
        door.carry()
        same({"x": torch.ones(200_000), "step": 1}, load({"x": torch.zeros(200_000), "step": 0}, place.reader()))

    # -- errors are reported

    def test_no_checkpoint(self, place: Place, door: Door) -> None:
        with pytest.raises(dcp.CheckpointException):
            load({"x": torch.zeros(3)}, place.reader())

    def test_an_unknown_key_or_another_shape(self, place: Place, door: Door) -> None:
        save({"x": torch.ones(3)}, place.writer())
        door.carry()
        for target in ({"unknown": torch.zeros(3)}, {"x": torch.zeros(4)}, {"x": torch.zeros(3, 1)}):
            with pytest.raises(dcp.CheckpointException, match=next(iter(target))):
                load(dict(target), place.reader())

    @pytest.mark.parametrize("damage", ["missing", "truncated", "rubbish metadata", "truncated metadata"])
    def test_a_damaged_checkpoint(self, place: Place, door: Door, damage: str) -> None:
        save({"x": torch.randn(50_000), "y": torch.randn(50_000)}, place.writer())
        door.carry()
        (data,) = [name for name in door.names() if name.endswith(".distcp")]
        match damage:
            case "missing":
                door.remove(data)
            case "truncated":
                door.put(data, door.get(data)[:200_000])
            case "rubbish metadata":
                door.put(".metadata", b"\x80\x04rubbish")
            case _:
                door.put(".metadata", door.get(".metadata")[:-20])
        with pytest.raises(dcp.CheckpointException):
            load({"x": torch.zeros(50_000), "y": torch.zeros(50_000)}, place.reader())

    # -- several ranks

    @pytest.mark.slow
    def test_ranks_reshard(self, place: Place, door: Door) -> None:
        for step, layout in enumerate(("rows", "columns", "replicated")):
            run_ranks(2, save_on_ranks, place, layout, step)
            door.carry()
            run_ranks(2, load_on_ranks, place, ["rows", "columns", "replicated"], step)
        run_ranks(1, load_on_ranks, place, ["rows"], 2)

    def test_an_error_of_one_rank_is_everybodys(self, place: Place, door: Door) -> None:
        assert run_ranks(2, save_and_fail_on_ranks, place) == [[1], [1]]
