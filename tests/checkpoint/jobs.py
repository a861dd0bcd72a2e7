"""The functions that ranks run in the tests of several ranks."""

from __future__ import annotations

import copy
import threading
import time
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint import _async_process_executor as executor
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor, zeros
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

from azstoragetorch import join_url, metrics
from azstoragetorch.checkpoint import BlobStorageReader, BlobStorageWriter, _unchanged, enable_urls
from tests.checkpoint.states import same

LAYOUTS: dict[str, tuple[tuple[int, ...], tuple[Any, ...]]] = {
    "rows": ((-1,), (Shard(0),)),
    "columns": ((-1,), (Shard(1),)),
    "replicated": ((-1,), (Replicate(),)),
    "2d": ((2, -1), (Shard(0), Shard(1))),
    "hybrid": ((2, -1), (Replicate(), Shard(0))),
    "2d rows": ((2, -1), (Shard(0), Shard(0))),
}


def whole(step: int = 0) -> dict[str, torch.Tensor]:
    """The tensors before they are sharded: even and uneven, small and larger."""
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
    """Save in every layout and load in every layout, with the same ranks."""
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
    """use_collectives=False: every rank saves a separate checkpoint in the same folder, twice."""
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
    except Exception as error:  # noqa: BLE001 - checked by the test
        dist.barrier()
        return str(error)
    return ""


class FailingPlanner(dcp.DefaultSavePlanner):
    """Fails on one rank after a part of its data."""

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


class UnevenPlanner(dcp.DefaultSavePlanner):
    """On rank 0 all items are slow, on rank 1 the first one fails."""

    resolved = 0

    def resolve_data(self, write_item: Any) -> Any:
        if dist.get_rank() == 1:
            raise RuntimeError("the disk of the mind is full")
        self.resolved += 1
        time.sleep(0.5)
        return super().resolve_data(write_item)


def fail_while_others_are_slow(rank: int, url: str, credential: Any, repeats: int = 1) -> tuple[str, int]:
    """The error of the last of *repeats* saves with plans cached by torch, and the number of items it resolved."""
    state = {f"rank{rank}.item{n}": torch.ones(3) for n in range(100)}
    told, planner = "", UnevenPlanner(enable_plan_caching=True)
    for _ in range(repeats):
        planner = UnevenPlanner(enable_plan_caching=True)
        try:
            dcp.save(dict(state), storage_writer=BlobStorageWriter(url, credential=credential), planner=planner)
        except dcp.CheckpointException as error:
            told = str(error)
    return told, planner.resolved


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
        # The state at the time of the call is saved.
        for value in state["model"].values():
            value.to_local().zero_()
        future.result()
        load(rank, url, credential, ["columns"], step)


def save_to_a_url(rank: int, url: str, credential: Any, kind: str) -> None:
    """By URLs alone."""
    checkpointer = getattr(dcp.state_dict_saver.AsyncCheckpointerType, kind)
    group = dist.new_group(backend="gloo")
    enable_urls(credential=credential)
    for step, name in enumerate(("one", "two")):
        place = join_url(url, name)
        state = sharded("rows", step)
        dcp.async_save(state, checkpoint_id=place, process_group=group, async_checkpointer_type=checkpointer).result()
        found = empty("columns")
        dcp.load(found, checkpoint_id=place)
        check(found, step)


def overlapping_saves_by_a_process(rank: int, url: str, credential: Any) -> None:
    """Saves that torch's background process has in its queue at the same time: one writer or two, one folder or two."""
    group = dist.new_group(backend="gloo")
    first = BlobStorageWriter(url, credential=credential)
    process = dcp.state_dict_saver.AsyncCheckpointerType.PROCESS

    def begin(step: int, place: str, writer: BlobStorageWriter) -> Any:
        return dcp.async_save(
            {"x": torch.full((1000,), float(step)), "step": step},
            checkpoint_id=place,
            storage_writer=writer,
            process_group=group,
            async_checkpointer_type=process,
        )

    def loaded(place: str) -> int:
        state = {"x": torch.zeros(1000), "step": -1}
        dcp.load(state, storage_reader=BlobStorageReader(place, credential=credential))
        assert state["x"].unique().tolist() == [float(state["step"])]  # type: ignore[attr-defined, arg-type]
        return int(state["step"])

    # torch's threads for two saves share one pipe to its process, and may receive parts of each other's responses.
    one_at_a_time, request = threading.Lock(), executor._AsyncCheckpointProcess.save

    def request_alone(*arguments: Any, **options: Any) -> Any:
        with one_at_a_time:
            return request(*arguments, **options)

    executor._AsyncCheckpointProcess.save = request_alone  # type: ignore[method-assign]
    begin(0, f"{url}/0", first).result()  # starts the process, which two threads at once would start twice
    step = 0
    for second in (first, BlobStorageWriter(url, credential=credential)):
        for places in ((f"{url}/a", f"{url}/b"), (f"{url}/c", f"{url}/c")):
            steps = step + 1, step + 2
            step += 2
            futures = [begin(*each) for each in zip(steps, places, (first, second), strict=True)]
            for future in futures:
                future.result()
            found = [loaded(place) for place in places]
            assert set(found) <= set(steps)
            assert places[0] == places[1] or found == list(steps)


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
    """Return the number of bytes that this rank received."""
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
    """Rank 1 requests *odd* in another type, which is an error on the others only if *odd* is there."""
    state = unloaded()
    if rank == 1:
        state[odd] = state[odd].double()
    reader = BlobStorageReader(url, credential=credential, load_once_per="world")
    try:
        dcp.load(state, storage_reader=reader)
    except dcp.CheckpointException as error:
        return str(error)
    return "no error"


def load_once_in_the_wrong_group(rank: int, url: str, credential: Any, per: str) -> str:
    """Ranks 0 and 1 load together, and rank 2 alone; their readers do not know these groups."""
    pair, single = dist.new_group([0, 1]), dist.new_group([2])
    reader = BlobStorageReader(url, credential=credential, load_once_per=per)
    try:
        dcp.load(unloaded(), storage_reader=reader, process_group=single if rank == 2 else pair)
    except dcp.CheckpointException as error:
        return str(error)
    return "no error"


def load_once_in_a_group_of_others(rank: int, url: str, credential: Any, per: str) -> str:
    """Two ranks load together, twice; the readers of all have a pair as well, of one rank of each."""
    loading = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    others = [dist.new_group([0, 2]), dist.new_group([1, 3])]
    reader = BlobStorageReader(url, credential=credential, load_once_per=per, process_group=others[rank % 2])
    try:
        dcp.load(unloaded(), storage_reader=reader, process_group=loading[rank // 2])
    except dcp.CheckpointException as error:
        return str(error)
    return "no error"


def save_replicated(rank: int, url: str, credential: Any) -> None:
    dcp.save(replicated(), storage_writer=BlobStorageWriter(url, credential=credential))


def keep_saving(rank: int, url: str, credential: Any, told: Any) -> None:
    """Save step after step until killed; *told* is called for each complete one."""
    for step in range(1, 1000):
        save(rank, url, credential, "rows", step)
        told.put((rank, step))


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 10))


def parallel(kind: str) -> tuple[nn.Module, torch.optim.Optimizer]:
    """A model and its optimizer, parallelized as *kind*, after a training step."""
    torch.manual_seed(0)
    model: nn.Module = network()
    world = dist.get_world_size()
    if "tensor" in kind:
        names = ("data", "tensor") if kind == "tensor and fully sharded" else ("tensor",)
        mesh = init_device_mesh("cpu", (world // 2, 2) if len(names) == 2 else (world,), mesh_dim_names=names)
        parallelize_module(model, mesh["tensor"], {"0": ColwiseParallel(), "2": RowwiseParallel()})
        if len(names) == 2:
            fully_shard(model, mesh=mesh["data"])
    elif kind == "fully sharded":
        fully_shard(model, mesh=init_device_mesh("cpu", (world,)))
    elif kind == "hybrid sharded":
        fully_shard(model, mesh=init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("replicate", "shard")))
    elif kind == "data parallel":
        model = DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model(torch.ones(4, 16)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    return model, optimizer


def everything_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The whole state, gathered."""
    found = get_state_dict(model, optimizer, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    return {"model": found[0], "optimizer": found[1]}


def save_parallel(rank: int, url: str, credential: Any, kind: str) -> dict[str, Any]:
    model, optimizer = parallel(kind)
    state = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))
    dcp.save(state, storage_writer=BlobStorageWriter(url, credential=credential))
    return everything_of(model, optimizer)


def save_parallel_asynchronously(rank: int, url: str, credential: Any, kind: str) -> dict[str, Any]:
    """What is saved is what was there at the call, though training continues."""
    model, optimizer = parallel(kind)
    expected = copy.deepcopy(everything_of(model, optimizer))  # some of it is the optimizer's own memory
    state = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))
    group = dist.new_group(backend="gloo")
    future = dcp.async_save(state, storage_writer=BlobStorageWriter(url, credential=credential), process_group=group)
    model(torch.ones(4, 16)).sum().backward()
    optimizer.step()
    getattr(future, "upload_completion", future).result()
    return expected


def load_parallel(rank: int, url: str, credential: Any, kind: str) -> dict[str, Any]:
    model, optimizer = parallel(kind)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    state = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))
    dcp.load(state, storage_reader=BlobStorageReader(url, credential=credential))
    set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    return everything_of(model, optimizer)


def save_with_cached_plans(rank: int, url: str, credential: Any) -> None:
    """torch sends plans once and then only changed ones; on one rank a plan changes."""
    writer = BlobStorageWriter(url, credential=credential)
    for step in range(4):
        state = sharded("rows", step) | ({"extra": torch.full((9,), float(step))} if rank == 1 and step == 2 else {})
        dcp.save(state, storage_writer=writer, planner=dcp.DefaultSavePlanner(enable_plan_caching=True))
        load(rank, url, credential, ["columns"], step)


class PickyPlanner(dcp.DefaultLoadPlanner):
    """Fails on rank 1, in the method *what*."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self._what = what

    def _fail(self, what: str, item: Any) -> None:
        if dist.get_rank() == 1 and self._what == what and item.dest_index.fqn in ("layer3", "text"):
            raise ValueError(f"no {what} today")

    def resolve_tensor(self, read_item: Any) -> torch.Tensor:
        self._fail("resolve_tensor", read_item)
        return super().resolve_tensor(read_item)

    def load_bytes(self, read_item: Any, value: Any) -> None:
        self._fail("load_bytes", read_item)
        super().load_bytes(read_item, value)

    def commit_tensor(self, read_item: Any, tensor: torch.Tensor) -> None:
        self._fail("commit_tensor", read_item)
        super().commit_tensor(read_item, tensor)


def load_once_with_a_picky_planner(rank: int, url: str, credential: Any, what: str) -> str:
    reader = BlobStorageReader(url, credential=credential, load_once_per="world")
    try:
        dcp.load(unloaded(), storage_reader=reader, planner=PickyPlanner(what))
    except dcp.CheckpointException as error:
        return str(error)
    return "no error"


class EarlyFailure(dcp.DefaultLoadPlanner):
    """Fails on some *ranks* in the method *where*, before the reader is asked for data."""

    def __init__(self, ranks: tuple[int, ...], where: str, how: str) -> None:
        super().__init__()
        self._where = where if dist.get_rank() in ranks else ""
        self._how = how

    def create_local_plan(self) -> Any:
        if self._where == "create_local_plan":
            raise ValueError("no create_local_plan today")
        return super().create_local_plan()

    def finish_plan(self, central_plan: Any) -> Any:
        if self._where != "finish_plan":
            return super().finish_plan(central_plan)
        if self._how == "forgets":
            return dcp.LoadPlan(central_plan.items)
        raise (KeyboardInterrupt if self._how == "interrupt" else ValueError)("no finish_plan today")


def load_once_and_fail_early(
    rank: int, url: str, credential: Any, ranks: tuple[int, ...], where: str, how: str
) -> dict[int, str]:
    """The errors that torch raised on this rank, by rank; then a load by the same ranks, which must work."""
    reader = BlobStorageReader(url, credential=credential, load_once_per="world")
    try:
        dcp.load(unloaded(), storage_reader=reader, planner=EarlyFailure(ranks, where, how))
    except dcp.CheckpointException as error:
        told = {rank: str(failure) for rank, (failure, _) in error.failures.items()}
    else:
        told = {}
    state = unloaded()
    dcp.load(state, storage_reader=reader)
    same(replicated(), state)
    return told


def load_once_in_every_layout(rank: int, url: str, credential: Any) -> None:
    """Tensors that are not sent as bare elements, and targets with another memory layout than is sent."""

    def state(make: Any) -> dict[str, torch.Tensor]:
        return {
            "sparse": make(torch.eye(6)).to_sparse(),
            "quantised": torch.quantize_per_tensor(make(torch.arange(60.0)), 0.1, 3, torch.qint8),
            "odd": make(torch.arange(3.0)).to(torch.uint8),
            "complex": torch.complex(make(torch.ones(5)), make(torch.arange(5.0))),
            "scalar": make(torch.tensor(7.0)),
            "empty": make(torch.ones(0, 3)),
            "large": make(torch.arange(10_000_000.0).reshape(2500, 4000)),
        }

    dcp.save(state(lambda value: value), storage_writer=BlobStorageWriter(url, credential=credential))
    target = state(torch.zeros_like)
    target["large"] = torch.zeros(4000, 2500).t() if rank else target["large"]
    dcp.load(target, storage_reader=BlobStorageReader(url, credential=credential, load_once_per="world"))
    same(state(lambda value: value), target)


def save_with_a_base(rank: int, base: str, credential: Any) -> tuple[int, int]:
    """Save the same twice; return the bytes that this rank sent and had copied for the second one."""
    _unchanged.LEAST = 1
    for step in (1, 2):
        before = metrics()
        writer = BlobStorageWriter(f"{base}/{step}", credential=credential, base="latest")
        dcp.save(sharded("rows"), storage_writer=writer)
    after = metrics() - before
    return after.bytes_sent, after.bytes_copied


def load_verified(rank: int, base: str, credential: Any) -> None:
    for layout in ("rows", "columns"):
        state = empty(layout)
        dcp.load(state, storage_reader=BlobStorageReader(f"{base}/2", credential=credential, verify=True))
        check(state)
