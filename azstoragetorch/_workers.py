"""Which shard this process is: DataLoader worker x distributed rank.

A spawned or forkserver worker has no process group. So rank and world size are noted in the parent, at the moment
when an object is pickled for a child process; a plain pickle, which may be loaded anywhere, carries none.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from multiprocessing.reduction import ForkingPickler
from typing import Any, Literal, TypeAlias

import torch.distributed
import torch.utils.data

ShardBy: TypeAlias = Literal["worker", "rank_and_worker", "none"]
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
    """

    def __init__(self, by: ShardBy = "worker", rank: int | None = None, world_size: int | None = None) -> None:
        if by not in SHARD_BY:
            raise ValueError(f"shard_by must be one of {', '.join(map(repr, SHARD_BY))}, not {by!r}")
        if (rank is None) != (world_size is None):
            raise ValueError("rank= and world_size= go together: pass both, or neither to take torch.distributed's")
        if rank is not None and world_size is not None:
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

    def here(self) -> Place:
        """The place of this process.

        Raises:
            ValueError: the job has several ranks, and there is no way to know which one this is.
        """
        if self._by == "none":
            return Place()
        info = torch.utils.data.get_worker_info()
        worker, workers = (info.id, info.num_workers) if info is not None else (0, 1)
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
