"""The concurrent actors: operations of the package on folders of one container."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import torch
from torch.distributed.checkpoint import DefaultLoadPlanner, DefaultSavePlanner, Metadata, SavePlan

from azstoragetorch import TransferConfig
from azstoragetorch._blob import upload
from azstoragetorch.checkpoint import (
    BlobStorageReader,
    BlobStorageWriter,
    _cleaning,
    _fence,
    _folder,
    _unchanged,
    clean,
    delete_checkpoint,
    keep_last,
)
from azstoragetorch.checkpoint._format import names

from .explorer import Actor, Program, begin, current_actor
from .memory import Memory

BASE = "http://127.0.0.1:1/devstoreaccount1/c/run"
# One request of an actor at a time, and no pause between two attempts.
SERIAL = TransferConfig(max_connections=1, max_concurrency=1, max_backoff=0, max_attempts=4)
OPTIONS: dict[str, Any] = {"credential": False, "transfer": SERIAL}
KEYS = ("x", "y")


def _planned() -> tuple[SavePlan, Metadata]:
    planner = DefaultSavePlanner()
    planner.set_up_planner({key: torch.zeros(2) for key in KEYS}, None, True)
    plans, metadata = planner.create_global_plan([planner.create_local_plan()])
    return planner.finish_plan(plans[0]), metadata


PLAN, METADATA = _planned()


class Values:
    """The part of a planner that `write_data` needs: every tensor is full of *step*, or ``x`` is *frozen*."""

    def __init__(self, step: int, frozen: int | None = None) -> None:
        self._step = step
        self._frozen = frozen

    def resolve_data(self, item: Any) -> torch.Tensor:
        is_frozen = self._frozen is not None and item.index.fqn == "x"
        return torch.full((2,), float(self._frozen if is_frozen else self._step))  # type: ignore[arg-type]


def save(
    folder: str, step: int, writer: BlobStorageWriter | None = None, frozen: int | None = None, **options: Any
) -> str:
    """Save two data blobs, as torch does; return the id of the save."""
    url = f"{BASE}/{folder}"
    writer = BlobStorageWriter(url, blobs_per_rank=2, **OPTIONS) if writer is None else writer
    writer.reset(url)
    save_id = writer.storage_meta().save_id
    writer.set_up_storage_writer(True, rank=0, **options)
    (plan,) = writer.prepare_global_plan([writer.prepare_local_plan(PLAN)])
    written = writer.write_data(plan, Values(step, frozen)).value()  # type: ignore[arg-type]
    writer.finish(replace(METADATA), [written])
    assert save_id is not None
    return save_id


def save_by_two_ranks(folder: str, step: int) -> str:
    """Save one data blob on each of two ranks, the coordinator last, as torch does; return the id of the save."""
    url = f"{BASE}/{folder}"
    writers = [BlobStorageWriter(url, blobs_per_rank=1, **OPTIONS) for _ in range(2)]
    for writer in writers:
        writer.reset(url)
    save_id = writers[0].storage_meta().save_id
    for rank, writer in enumerate(writers):
        writer.set_up_storage_writer(rank == 0, rank=rank)
    plans = [replace(PLAN, items=PLAN.items[rank :: len(writers)]) for rank in range(len(writers))]
    plans = writers[0].prepare_global_plan(plans)
    written = [writers[rank].write_data(plans[rank], Values(step)).value() for rank in (1, 0)]  # type: ignore[arg-type]
    writers[0].finish(replace(METADATA), written)
    assert save_id is not None
    return save_id


def load(folder: str) -> int:
    """Load with two ranks, as torch does; return the step, which must be the same everywhere."""
    states = [{key: torch.zeros(2) for key in KEYS} for _ in range(2)]
    readers = [BlobStorageReader(f"{BASE}/{folder}", **OPTIONS) for _ in states]
    planners = [DefaultLoadPlanner() for _ in states]
    plans = []
    for rank, (state, reader, planner) in enumerate(zip(states, readers, planners, strict=True)):
        metadata = reader.read_metadata()
        planner.set_up_planner(state, metadata, rank == 0)
        reader.set_up_storage_reader(metadata, rank == 0, rank=rank)
        plans.append(reader.prepare_local_plan(planner.create_local_plan()))
    plans = readers[0].prepare_global_plan(planners[0].create_global_plan(plans))
    for reader, planner, plan in zip(readers, planners, plans, strict=True):
        reader.read_data(planner.finish_plan(plan), planner).wait()
    values = {key: {value for state in states for value in state[key].tolist()} for key in KEYS}
    assert all(len(found) == 1 for found in values.values()), f"the ranks have loaded {values}"
    frozen, step = (found.pop() for found in values.values())
    assert frozen in (step, FROZEN), f"of two saves: {frozen}, {step}"
    return int(step)


@dataclass(frozen=True)
class Kind:
    """A kind of actor: its name in the table, and its operation on *folder* as actor *number*."""

    name: str
    work: Callable[[str, int, BlobStorageWriter], Any]
    saves: bool = False
    loads: bool = False
    deletes: bool = False  # the checkpoint, on purpose
    sweeps: bool = False  # data of saves in progress
    same_writer: bool = False


FROZEN = 5


def delta(folder: str, step: int, base: str = "latest") -> str:
    """Save ``x`` as the base has it, and ``y`` with another value."""
    writer = BlobStorageWriter(f"{BASE}/{folder}", blobs_per_rank=2, base=base, **OPTIONS)
    return save(folder, step, writer, FROZEN)


def _keep(folder: str, number: int, writer: BlobStorageWriter) -> list[str]:
    return keep_last(BASE, 1, **OPTIONS)


SAVE = Kind("save", lambda folder, number, writer: save(folder, 10 + number), saves=True)
RANKS = Kind("save by two ranks", lambda folder, number, writer: save_by_two_ranks(folder, 10 + number), saves=True)
ASYNC = Kind(
    "async_save, one writer",
    lambda folder, number, writer: save(folder, 10 + number, writer),
    saves=True,
    same_writer=True,
)
OWN = Kind(
    "save without collectives",
    lambda folder, number, writer: save(folder, 10 + number, use_collectives=False),
    saves=True,
)
LOAD = Kind("load by two ranks", lambda folder, number, writer: load(folder), loads=True)
CLEAN = Kind("clean", lambda folder, number, writer: clean(f"{BASE}/{folder}", **OPTIONS))
CLEAN_ALL = Kind(
    "clean, min_age=0", lambda folder, number, writer: clean(f"{BASE}/{folder}", min_age=0, **OPTIONS), sweeps=True
)
KEEP = Kind("keep_last", _keep, deletes=True, sweeps=True)
DELETE = Kind(
    "delete_checkpoint",
    lambda folder, number, writer: delete_checkpoint(f"{BASE}/{folder}", **OPTIONS),
    deletes=True,
    sweeps=True,
)
KINDS = (SAVE, ASYNC, OWN, LOAD, CLEAN, CLEAN_ALL, KEEP, DELETE)


DELTA = Kind("save with a base", lambda folder, number, writer: delta(folder, 10 + number), saves=True)
OF_BASE = f"{BASE}/step-1"
"""The folder of the base, where the save with it is to another one."""
DELTA_OF = Kind(
    "save with another base", lambda folder, number, writer: delta(folder, 10 + number, OF_BASE), saves=True
)
SAVE_BASE = Kind("save over the base", lambda folder, number, writer: save("step-1", 10 + number))
CLEAN_BASE = Kind("clean the base, min_age=0", lambda folder, number, writer: clean(OF_BASE, min_age=0, **OPTIONS))
KEEP_ONE = Kind("keep_last(1), base and all", _keep)
DELETE_BASE = Kind("delete the base", lambda folder, number, writer: delete_checkpoint(OF_BASE, **OPTIONS))

NOW = 1_790_000_000  # seconds since 1970; the clocks of all actors agree and stand still


class Programs:
    """A cache of programs, so that what was found about one is used by all combinations with it."""

    def __init__(self) -> None:
        self._made: dict[object, Program] = {}

    def of(self, kinds: tuple[Kind, ...], folder: str) -> list[Program]:
        """The programs for *kinds* in *folder*: one each, except that savers with the same writer share one."""
        together = tuple((number, kind) for number, kind in enumerate(kinds) if kind.same_writer)
        apart = [((number, kind),) for number, kind in enumerate(kinds) if not kind.same_writer]
        return [self._get(members, folder) for members in ([together] if together else []) + apart]

    def _get(self, members: tuple[tuple[int, Kind], ...], folder: str) -> Program:
        key = (members, folder)
        if key not in self._made:
            self._made[key] = Program(lambda: _actors(members, folder), _known)
        return self._made[key]


def _actors(members: tuple[tuple[int, Kind], ...], folder: str) -> list[Actor]:
    """The actors of a new process."""
    _folder._known.forget()
    writer = BlobStorageWriter(f"{BASE}/{folder}", blobs_per_rank=2, **OPTIONS)
    return [
        Actor(number, lambda kind=kind, number=number: kind.work(folder, number, writer))  # type: ignore[misc]
        for number, kind in members
    ]


def _known() -> object:
    """The state that the actors of the last process share."""
    known = _folder._known.get()
    return tuple(known.metadata), tuple(known.paths), tuple(known.digests)


def _random_bytes(size: int) -> bytes:
    actor = current_actor()
    actor.ids += 1
    return ((actor.number + 1) * 1000 + actor.ids).to_bytes(size, "big")


@contextmanager
def predictable() -> Iterator[None]:
    """Make ids count up for each actor, and stop the clocks."""
    randomness = SimpleNamespace(urandom=_random_bytes)
    clock = SimpleNamespace(time=lambda: float(NOW), gmtime=lambda: time.gmtime(NOW), strftime=time.strftime)
    replaced = {
        (names, "os"): randomness,
        (_fence, "os"): randomness,
        (names, "time"): clock,
        (_cleaning, "time"): clock,
        (upload, "os"): randomness,
        (_unchanged, "LEAST"): 1,
    }
    real = {place: getattr(*place) for place in replaced}
    for place, value in replaced.items():
        setattr(*place, value)
    try:
        yield
    finally:
        for place, value in real.items():
            setattr(*place, value)
        _folder._known.forget()


OLD = "__0_0.20200101000000-0123456789abcdef.distcp"


def started(name: str) -> Memory:
    """The initial blobs: none, a checkpoint, a newer one in another folder, or leftovers of killed saves."""
    memory = Memory()
    if name in ("a checkpoint", "a checkpoint and leftovers"):
        memory = _run_alone(memory, 7, lambda: save("step-1", 1))
    if name in ("leftovers", "a checkpoint and leftovers"):
        memory = _run_alone(memory, 8, lambda: _put(f"step-1/{OLD}"))
    if name in ("a checkpoint with digests", "a base", "a base and leftovers"):
        memory = _run_alone(memory, 7, lambda: delta("step-1", 1))
    if name == "a base and leftovers":
        memory = _run_alone(memory, 8, lambda: _put(f"step-2/{OLD}"))
    if name == "two checkpoints":
        memory = _run_alone(memory, 7, lambda: save("step-1", 1))
        memory = _run_alone(memory, 8, lambda: save("step-2", 2))
    return memory


def _run_alone(memory: Memory, number: int, work: Callable[[], Any]) -> Memory:
    _folder._known.forget()
    state = begin([Program(lambda: [Actor(number, work)], _known)], memory)
    while state.enabled:
        state = state.step(0, number)
    error = state.outcomes[number].error
    if error is not None:
        raise error
    return state.memory


def _put(name: str) -> None:
    _folder.Folder(BASE, False, SERIAL).blob(name).put(b"of an interrupted save")
