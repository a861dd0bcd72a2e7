"""What ranks do in the tests of several ranks. Runs in their processes."""

from __future__ import annotations

import threading
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor, zeros

from azstoragetorch.checkpoint import BlobStorageReader, BlobStorageWriter

LAYOUTS: dict[str, tuple[tuple[int, ...], tuple[Any, ...]]] = {
    "rows": ((-1,), (Shard(0),)),
    "columns": ((-1,), (Shard(1),)),
    "replicated": ((-1,), (Replicate(),)),
    "2d": ((2, -1), (Shard(0), Shard(1))),
    "hybrid": ((2, -1), (Replicate(), Shard(0))),
    "2d rows": ((2, -1), (Shard(0), Shard(0))),
}


def whole(step: int = 0) -> dict[str, torch.Tensor]:
    """The tensors before they are sharded: even and uneven, small and of some size."""
    generator = torch.Generator().manual_seed(step)
    return {
        "even": torch.randn(64, 32, generator=generator),
        "uneven": torch.randn(13, 7, generator=generator),
        "tall": torch.randn(3, 5, 4, generator=generator),
        "large": torch.randn(1031, 257, generator=generator),
    }


def mesh_of(layout: str) -> tuple[DeviceMesh, tuple[Any, ...]]:
    shape, placements = LAYOUTS[layout]
    world = dist.get_world_size()
    sizes = tuple(world // 2 if n == -1 and len(shape) == 2 else world if n == -1 else n for n in shape)
    return init_device_mesh("cpu", sizes), placements


def sharded(layout: str, step: int = 0) -> dict[str, Any]:
    mesh, placements = mesh_of(layout)
    state: dict[str, Any] = {key: distribute_tensor(value, mesh, placements) for key, value in whole(step).items()}
    return {"model": state, "plain": torch.full((50,), float(step)), "step": step, "rng": torch.arange(20)}


def empty(layout: str) -> dict[str, Any]:
    mesh, placements = mesh_of(layout)
    state: dict[str, Any] = {
        key: zeros(*value.shape, device_mesh=mesh, placements=placements) for key, value in whole().items()
    }
    return {"model": state, "plain": torch.zeros(50), "step": -1, "rng": torch.zeros(20, dtype=torch.int64)}


def check(state: dict[str, Any], step: int = 0) -> None:
    for key, value in whole(step).items():
        found = state["model"][key]
        assert torch.equal(found.full_tensor() if isinstance(found, DTensor) else found, value), key
    assert state["step"] == step
    assert state["plain"].tolist() == [float(step)] * 50
    assert torch.equal(state["rng"], torch.arange(20))


def save(rank: int, url: str, credential: Any, layout: str, step: int = 0, **options: Any) -> None:
    dcp.save(sharded(layout, step), storage_writer=BlobStorageWriter(url, credential=credential, **options))


def load(rank: int, url: str, credential: Any, layouts: list[str], step: int = 0, **options: Any) -> None:
    for layout in layouts:
        state = empty(layout)
        dcp.load(state, storage_reader=BlobStorageReader(url, credential=credential, **options))
        check(state, step)


def save_all_and_load_all(rank: int, base: str, credential: Any, layouts: list[str]) -> None:
    """Every layout to every layout, in the same world."""
    for layout in layouts:
        save(rank, f"{base}/{layout}", credential, layout)
        load(rank, f"{base}/{layout}", credential, layouts)


def save_for_others(rank: int, base: str, credential: Any, layouts: list[str]) -> None:
    for layout in layouts:
        save(rank, f"{base}/{layout}", credential, layout)


def load_from_others(rank: int, base: str, credential: Any, saved: list[str], layouts: list[str]) -> None:
    for layout in saved:
        load(rank, f"{base}/{layout}", credential, layouts)


def alone_together(rank: int, url: str, credential: Any) -> list[str]:
    """use_collectives=False: every rank its own checkpoint in the same folder, twice."""
    for step in range(2):
        state = {"x": torch.full((1000,), float(10 * step + rank)), "rank": rank}
        dcp.save(state, storage_writer=BlobStorageWriter(url, credential=credential), use_collectives=False)
        found = {"x": torch.zeros(1000), "rank": -1}
        dcp.load(found, storage_reader=BlobStorageReader(url, credential=credential))
        assert found["rank"] == rank
        assert found["x"].tolist() == [10.0 * step + rank] * 1000
    return []


def overwrite_with_collectives_off(rank: int, url: str, credential: Any) -> str:
    dcp.save({"x": torch.ones(3)}, storage_writer=BlobStorageWriter(url, credential=credential))
    try:
        dcp.save(
            {"x": torch.ones(3)}, storage_writer=BlobStorageWriter(url, credential=credential), use_collectives=False
        )
    except Exception as error:  # noqa: BLE001 - looked at by the test
        dist.barrier()
        return str(error)
    return ""


class FailingPlanner(dcp.DefaultSavePlanner):
    """Fails on one rank in the middle of its data."""

    def resolve_data(self, write_item: Any) -> Any:
        if dist.get_rank() == 1 and write_item.index.fqn == "model.uneven":
            raise RuntimeError("the disk of the mind is full")
        return super().resolve_data(write_item)


def fail_in_the_middle(rank: int, url: str, credential: Any) -> str:
    try:
        dcp.save(
            sharded("rows", 1),
            storage_writer=BlobStorageWriter(url, credential=credential),
            planner=FailingPlanner(),
        )
    except dcp.CheckpointException as error:
        return str(error)
    return "no error"


def fail_to_load(rank: int, url: str, credential: Any, **options: Any) -> str:
    try:
        dcp.load(empty("rows"), storage_reader=BlobStorageReader(url, credential=credential, **options))
    except dcp.CheckpointException as error:
        return str(error)
    return "no error"


def async_saves(rank: int, url: str, credential: Any, kind: str) -> None:
    checkpointer = getattr(dcp.state_dict_saver.AsyncCheckpointerType, kind)
    group = dist.new_group(backend="gloo")
    writer = BlobStorageWriter(url, credential=credential)
    for step in range(3):
        state = sharded("rows", step)
        future = dcp.async_save(state, storage_writer=writer, process_group=group, async_checkpointer_type=checkpointer)
        # What is saved is what was there at the call.
        for value in state["model"].values():
            value.to_local().zero_()
        future.result()
        load(rank, url, credential, ["columns"], step)


def replicated(step: int = 0) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(step)
    state: dict[str, Any] = {f"layer{n}": torch.randn(100, 10 * n + 1, generator=generator) for n in range(12)}
    return state | {
        "big": torch.randn(1_000_003, generator=generator),
        "half": torch.randn(33, generator=generator).bfloat16(),
        "scalar": torch.tensor(2.0),
        "strided": torch.randn(20, 30, generator=generator),
        "epoch": 7,
        "text": "x" * 1000,
    }


def unloaded() -> dict[str, Any]:
    return {key: torch.zeros_like(v) if isinstance(v, torch.Tensor) else None for key, v in replicated().items()}


def load_once(rank: int, url: str, credential: Any, per: str) -> int:
    """Returns the bytes that this rank received."""
    from azstoragetorch._blob import transport

    received = 0
    lock = threading.Lock()
    original = transport.Response.readinto

    def counted(self: Any, target: memoryview) -> int:
        nonlocal received
        count = original(self, target)
        with lock:
            received += count
        return count

    transport.Response.readinto = counted  # type: ignore[method-assign]
    state = unloaded()
    state["strided"] = torch.zeros(30, 20).t()
    dcp.load(state, storage_reader=BlobStorageReader(url, credential=credential, load_once_per=per))
    for key, value in replicated().items():
        found = state[key]
        assert torch.equal(found, value) if isinstance(value, torch.Tensor) else found == value, key
    return received


def load_once_and_fail(rank: int, url: str, credential: Any, odd: str) -> str:
    """Rank 1 wants *odd* in another type, which is the others' error only if that one is there."""
    state = unloaded()
    if rank == 1:
        state[odd] = state[odd].double()
    reader = BlobStorageReader(url, credential=credential, load_once_per="world")
    try:
        dcp.load(state, storage_reader=reader)
    except dcp.CheckpointException as error:
        return str(error)
    return "no error"


def save_replicated(rank: int, url: str, credential: Any) -> None:
    dcp.save(replicated(), storage_writer=BlobStorageWriter(url, credential=credential))


def keep_saving(rank: int, url: str, credential: Any, told: Any) -> None:
    """Save step after step until killed; *told* hears of each that is complete."""
    for step in range(1, 1000):
        save(rank, url, credential, "rows", step)
        told.put((rank, step))
