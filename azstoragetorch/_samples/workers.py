"""The shard of this process (DataLoader worker x distributed rank), and data shared with the other workers.

A worker of spawn or forkserver has no process group. So the parent adds rank and world size to an object when it
pickles the object for a child process. Other pickles, which can be loaded anywhere, do not contain them.
"""

from __future__ import annotations

import mmap
import os
import warnings
from dataclasses import dataclass
from multiprocessing.reduction import ForkingPickler
from typing import Any, Literal, TypeAlias

import torch.distributed
import torch.utils.data

ShardBy: TypeAlias = Literal["worker", "rank_and_worker", "none"]
_MOST_WORKERS = 1023  # of one DataLoader, for each of which 8 bytes are shared
_EPOCH, _LOAD, _TIMES_SET, _ENDED, _WARNED_OF_RANKS, _WARNED_OF_EPOCH, _FIRST_WORKER = range(7)  # cells of `Shared`

SHARD_BY: tuple[ShardBy, ...] = ("worker", "rank_and_worker", "none")


@dataclass(frozen=True, slots=True)
class Place:
    """One of ``shards`` readers: worker *worker* of *workers* on rank *rank* of *world_size*."""

    rank: int = 0
    world_size: int = 1
    worker: int = 0
    workers: int = 1

    @property
    def shard(self) -> int:
        """The number that DataLoader itself gives this reader."""
        return self.worker * self.world_size + self.rank

    @property
    def shards(self) -> int:
        """Readers in all."""
        return self.workers * self.world_size


class Placement:
    """Finds the `Place` of the process that asks.

    Args:
        by: ``"worker"`` ignores ranks, ``"rank_and_worker"`` counts both, ``"none"`` is one shard everywhere.
        rank: Instead of torch.distributed's; needs *world_size*.
        world_size: Instead of torch.distributed's; needs *rank*.

    Raises:
        ValueError: an argument is out of range, or one of *rank* and *world_size* is missing.
        TypeError: *rank* or *world_size* is not an integer.
    """

    def __init__(self, by: ShardBy = "worker", rank: int | None = None, world_size: int | None = None) -> None:
        if by not in SHARD_BY:
            raise ValueError(f"shard_by must be one of {', '.join(map(repr, SHARD_BY))}, not {by!r}")
        if (rank is None) != (world_size is None):
            raise ValueError("rank= and world_size= go together: pass both, or neither to take torch.distributed's")
        if rank is not None and world_size is not None:
            for name, value in (("rank", rank), ("world_size", world_size)):
                if isinstance(value, bool) or not isinstance(value, int):
                    raise TypeError(f"{name} must be an int, not {type(value).__name__}")
            if by != "rank_and_worker":
                raise ValueError(f"rank= and world_size= need shard_by='rank_and_worker', not {by!r}")
            if not 0 <= rank < world_size:
                raise ValueError(f"rank must be between 0 and world_size - 1 = {world_size - 1}, not {rank}")
            self._explicit: tuple[int, int] | None = (rank, world_size)
        else:
            self._explicit = None
        self._by = by
        self._parents: tuple[int, int] | None = None  # rank and world size of the process that started this one

    @property
    def by(self) -> ShardBy:
        """What is counted."""
        return self._by

    def ranks(self) -> int:
        """The number of ranks of torch.distributed, here or in the process that started this one; 1 without."""
        known = _of_process_group() or self._parents
        return 1 if known is None else known[1]

    def here(self) -> Place:
        """The place of this process; see `of_worker`."""
        info = torch.utils.data.get_worker_info()
        return self.of_worker(info.id, info.num_workers) if info is not None else self.of_worker(0, 1)

    def of_worker(self, worker: int, workers: int) -> Place:
        """The place of one of the *workers* of this process's rank.

        Raises:
            ValueError: the job has several ranks, and there is no way to know which one this is.
        """
        if self._by == "none":
            return Place()
        if self._by == "worker":
            return Place(0, 1, worker, workers)
        known = self._explicit or _of_process_group() or self._parents
        if known is None:
            launched = os.environ.get("WORLD_SIZE", "1")
            if launched != "1":
                raise ValueError(
                    f"shard_by='rank_and_worker': the environment says WORLD_SIZE={launched}, but torch.distributed is "
                    "not initialised: call init_process_group first, or pass rank= and world_size="
                )
            known = 0, 1
        return Place(*known, worker, workers)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_parents": None}


class Shared:
    """What the parent sets and workers that live on see: the epoch, a state loaded there, and who has begun from it.

    Lies in shared memory, which forked, spawned and forkserver workers see alike. A plain pickle or a copy gets
    separate memory.
    """

    def __init__(self) -> None:
        self._cells = _shared([0] * (_FIRST_WORKER + _MOST_WORKERS))
        self._known_load = 0

    @property
    def epoch(self) -> int:
        """The epoch that iterations begin with."""
        return int(self._cells[_EPOCH])

    @epoch.setter
    def epoch(self, value: int) -> None:
        self._cells[_EPOCH] = value
        self._cells[_TIMES_SET] += 1

    def note_end(self, epoch: int) -> None:
        """An iteration of *epoch* has come to its end."""
        if epoch == self.epoch and _speaks_for_all():
            self._cells[_ENDED] = self._cells[_TIMES_SET] + 1

    def warn_of_repeated_epoch(self, subject: str) -> None:
        """Warn once, at the start of an iteration, if another one has ended since the epoch was set."""
        is_repeated = int(self._cells[_ENDED]) == int(self._cells[_TIMES_SET]) + 1
        if is_repeated and self.is_first_warning("epoch"):
            warnings.warn(
                f"{subject}: epoch {self.epoch} begins a second time, in the same order. Call "
                "dataset.set_epoch(epoch) before each epoch",
                UserWarning,
                stacklevel=4,
            )

    def is_first_warning(self, of: Literal["ranks", "epoch"]) -> bool:
        """Whether nobody has warned of this yet; now this process does. One of several workers is asked."""
        cell = _WARNED_OF_RANKS if of == "ranks" else _WARNED_OF_EPOCH
        if self._cells[cell] or not _speaks_for_all():
            return False
        self._cells[cell] = 1
        return True

    def number_load(self) -> int:
        """A number for the state that is loaded now, for `is_first_use`; 0 if a worker loads it for itself."""
        if torch.utils.data.get_worker_info() is not None:
            return 0
        self._known_load = 1 + int.from_bytes(os.urandom(7), "big")
        self._cells[_LOAD] = self._known_load
        return self._known_load

    def forget_load(self) -> None:
        """Nobody is to take up the state that was loaded last."""
        self._cells[_LOAD] = 0

    @property
    def has_missed_load(self) -> bool:
        """Whether a state that is to be taken up was loaded after this worker had begun."""
        return int(self._cells[_LOAD]) not in (0, self._known_load)

    def is_first_use(self, load: int) -> bool:
        """Whether this worker takes up the parent's *load*-th state for the first time; now it has.

        Workers that end with their epoch are followed by new ones with the same numbers, to which the parent's
        state, already consumed, looks new.
        """
        info = torch.utils.data.get_worker_info()
        if info is None:
            is_first = load not in self._cells[_FIRST_WORKER:].tolist()
            self.forget_load()
            return is_first
        if info.id >= _MOST_WORKERS:
            raise ValueError(f"a dataset supports {_MOST_WORKERS} workers; this is number {info.id}")
        is_first = int(self._cells[_FIRST_WORKER + info.id]) != load
        self._cells[_FIRST_WORKER + info.id] = load
        if is_first:
            self.forget_load()
        return is_first

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if not self._cells.is_shared():  # type: ignore[no-untyped-call]
            self._cells = _shared(self._cells.tolist())


def _shared(values: list[int]) -> torch.Tensor:
    """A tensor of *values* in memory that this process shares with its workers."""
    with torch.inference_mode(False):  # a tensor made in that mode could not be written to without it
        cells = torch.tensor(values, dtype=torch.int64, device="cpu")
        try:
            return cells.share_memory_()  # type: ignore[no-any-return, no-untyped-call]
        except RuntimeError:
            # /dev/shm is full or read-only, so only forked workers can be started, and they see this memory as well.
            memory = torch.frombuffer(mmap.mmap(-1, cells.nbytes), dtype=torch.int64)
            return memory.copy_(cells)


def _speaks_for_all() -> bool:
    info = torch.utils.data.get_worker_info()
    return info is None or info.id == 0


def _of_process_group() -> tuple[int, int] | None:
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return None


def _to_other_process(placement: Placement) -> tuple[Any, ...]:
    return _restore, ({**placement.__dict__, "_parents": _of_process_group() or placement._parents},)  # noqa: SLF001


def _restore(state: dict[str, Any]) -> Placement:
    placement = Placement.__new__(Placement)
    placement.__dict__.update(state)
    return placement


ForkingPickler.register(Placement, _to_other_process)
