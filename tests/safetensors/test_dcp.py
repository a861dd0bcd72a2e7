"""torch.distributed.checkpoint with safetensors files: as torch's own reader and writer for local folders, on ranks."""

from __future__ import annotations

import json
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import torch.distributed as dcp_dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from azstoragetorch.exceptions import BlobChangedError, SafetensorsError
from azstoragetorch.safetensors import HuggingFaceBlobReader, HuggingFaceBlobWriter, load_model_folder, save_folder
from tests.checkpoint.ranks import run_ranks
from tests.faults import FaultService
from tests.safetensors.models import bits, filled, same

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is")
STATE = {
    "a.weight": filled(torch.float32, (31, 20)),
    "a.bias": filled(torch.bfloat16, (31,), 1),
    "b.weight": filled(torch.float8_e4m3fn, (9, 4), 2),
    "step": torch.tensor(7),
}


def reader(url: str, **options: Any) -> HuggingFaceBlobReader:
    return HuggingFaceBlobReader(url, credential=False, **options)


def writer(url: str, **options: Any) -> HuggingFaceBlobWriter:
    return HuggingFaceBlobWriter(url, credential=False, **options)


def blank() -> dict[str, torch.Tensor]:
    return {name: torch.zeros_like(tensor) for name, tensor in STATE.items()}


def download(service: FaultService, folder: Path) -> None:
    for name in service.names("models"):
        path = folder / name.removeprefix("llm/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(service.get("models", name))


class TestOneRank:
    def test_saves_what_torch_loads_and_loads_what_torch_saves(
        self, service: FaultService, url: str, tmp_path: Path
    ) -> None:
        dcp.save(STATE, storage_writer=writer(url))
        same(load_model_folder(url, credential=False), STATE)
        download(service, tmp_path / "ours")
        state = blank()
        dcp.load(state, storage_reader=HuggingFaceStorageReader(str(tmp_path / "ours")))
        same(state, STATE)
        mapping = {name: 1 + (name == "step") for name in STATE}
        dcp.save(STATE, storage_writer=HuggingFaceStorageWriter(str(tmp_path / "theirs"), mapping))
        for path in (tmp_path / "theirs").iterdir():
            service.put("models", f"theirs/{path.name}", path.read_bytes())
        state = blank()
        dcp.load(state, storage_reader=reader(service.blob_url("models", "theirs")))
        same(state, STATE)

    def test_files_by_the_mapping(self, service: FaultService, url: str) -> None:
        mapping = {name: 1 + (name == "step") for name in STATE}
        dcp.save(STATE, storage_writer=writer(url, fqn_to_index_mapping=mapping))
        index = json.loads(service.get("models", "llm/model.safetensors.index.json"))
        assert index["weight_map"] == {name: f"model-0000{mapping[name]}-of-00002.safetensors" for name in STATE}
        assert safetensors.torch.load(service.get("models", "llm/model-00002-of-00002.safetensors")).keys() == {"step"}

    def test_replaces_a_model(self, service: FaultService, url: str) -> None:
        save_folder({"old": torch.zeros(100), "more": torch.zeros(1)}, url, max_shard_size=10, credential=False)
        dcp.save(STATE, storage_writer=writer(url))
        same(load_model_folder(url, credential=False), STATE)
        assert len(service.names("models")) == 2

    def test_entries_that_the_format_cannot_hold(self, service: FaultService, url: str) -> None:
        with pytest.raises((SafetensorsError, CheckpointException), match="'step' is not a tensor"):
            dcp.save({"step": 3}, storage_writer=writer(url))
        assert service.names("models") == []

    def test_a_folder_that_is_not_a_model(self, url: str) -> None:
        with pytest.raises((SafetensorsError, CheckpointException), match="neither an index nor a file"):
            dcp.load(blank(), storage_reader=reader(url))

    def test_an_overwritten_file(self, service: FaultService, url: str) -> None:
        large = {"x": filled(torch.float32, (300, 300))}
        save_folder(large, url, credential=False)

        class Slow(dcp.DefaultLoadPlanner):
            def finish_plan(self, plan: Any) -> Any:
                save_folder({"x": torch.zeros(300, 300)}, url, credential=False)
                return super().finish_plan(plan)

        state = {"x": torch.ones(300, 300)}
        with pytest.raises(CheckpointException) as caught:
            dcp.load(state, storage_reader=reader(url), planner=Slow())
        ((error, _),) = caught.value.failures.values()
        assert "overwritten while it was read; load again" in str(error)
        assert isinstance(error.__cause__, BlobChangedError)
        assert bits(state["x"]) == bits(torch.ones(300, 300))


def sharded(rank: int, world: int, *, is_blank: bool = False) -> dict[str, Any]:
    mesh = init_device_mesh("cpu", (world,))
    state: dict[str, Any] = {}
    for name, tensor in STATE.items():
        value = torch.zeros_like(tensor) if is_blank else tensor
        if name == "b.weight":
            state[name] = value  # torch cannot distribute tensors of narrow types
            continue
        state[name] = distribute_tensor(value, mesh, [Shard(0)]) if value.ndim else value
    return state


def save_on_rank(rank: int, url: str, world: int, options: dict[str, Any]) -> None:
    dcp.save(sharded(rank, world), storage_writer=writer(url, **options))


def load_on_rank(rank: int, url: str, world: int, options: dict[str, Any]) -> Any:
    state = sharded(rank, world, is_blank=True)
    dcp.load(state, storage_reader=reader(url, **options))
    for name, value in state.items():
        whole = STATE[name]
        if isinstance(value, DTensor):
            parts = whole.chunk(world)
            expected = parts[rank] if rank < len(parts) else whole[:0]
            value = value.to_local()
        else:
            expected = whole
        assert bits(value) == bits(expected), name
    dcp_dist.barrier()
    return True


class TestRanks:
    def test_parts_of_ranks(self, service: FaultService, url: str, tmp_path: Path) -> None:
        """Saved on 2 ranks, loaded on 3, on one, whole, and by torch."""
        run_ranks(2, save_on_rank, url, 2, {"save_distributed": True})
        assert all(re.fullmatch(r"llm/shard-0000[12]-.*", name) for name in service.names("models"))
        assert run_ranks(3, load_on_rank, url, 3, {"load_once_per": "world"}) == [True] * 3
        same(load_model_folder(url, credential=False), STATE)
        download(service, tmp_path)
        state = blank()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            dcp.load(state, storage_reader=HuggingFaceStorageReader(str(tmp_path)))
        same(state, STATE)
        service.delete("models", service.names("models")[0])
        with pytest.raises(SafetensorsError, match="1 of 2 files are here"):
            load_model_folder(url, credential=False)

    def test_parts_are_put_together(self, service: FaultService, url: str) -> None:
        run_ranks(2, save_on_rank, url, 2, {"enable_consolidation": True})
        assert service.names("models") == ["llm/model.safetensors"]
        same(safetensors.torch.load(service.get("models", "llm/model.safetensors")), STATE)

    def test_parts_without_saying_so_are_an_error(self, service: FaultService, url: str) -> None:
        with pytest.raises(CheckpointException, match="save_distributed=True"):
            run_ranks(2, save_on_rank, url, 2, {})
        assert service.names("models") == []
