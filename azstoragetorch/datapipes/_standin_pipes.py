"""Operations between pipes, for a torch without DataPipes: map, filter, batch, collate, concat, shuffle, shard."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch.utils.data import default_collate, get_worker_info

from azstoragetorch._samples.sharding import Shardable
from azstoragetorch._samples.workers import Placement
from azstoragetorch.datapipes._standin import (
    IterDataPipe,
    check_function,
    functional_datapipe,
    own_share,
)


@functional_datapipe("map")
class Mapper(IterDataPipe[Any]):
    """Applies *fn* to each item."""

    def __init__(self, datapipe: Iterable[Any], fn: Callable[[Any], Any]) -> None:
        check_function(fn)
        self.datapipe = datapipe
        self.fn = fn

    def __iter__(self) -> Iterator[Any]:
        return map(self.fn, self.datapipe)

    def __len__(self) -> int:
        return len(self.datapipe)  # type: ignore[arg-type]


@functional_datapipe("collate")
class Collator(Mapper):
    """Makes tensors of batches, by *collate_fn*."""

    def __init__(self, datapipe: Iterable[Any], collate_fn: Callable[[Any], Any] = default_collate) -> None:
        super().__init__(datapipe, collate_fn)


@functional_datapipe("filter")
class Filter(IterDataPipe[Any]):
    """Passes on the items for which *filter_fn* is true."""

    def __init__(self, datapipe: Iterable[Any], filter_fn: Callable[[Any], bool]) -> None:
        check_function(filter_fn)
        self.datapipe = datapipe
        self.filter_fn = filter_fn

    def __iter__(self) -> Iterator[Any]:
        return filter(self.filter_fn, self.datapipe)


@functional_datapipe("batch")
class Batcher(IterDataPipe[list[Any]]):
    """Lists of *batch_size* items; the last one is shorter, or left out with *drop_last*."""

    def __init__(self, datapipe: Iterable[Any], batch_size: int, drop_last: bool = False) -> None:
        if batch_size < 1:
            raise ValueError("Batch size is required to be larger than 0!")
        self.datapipe = datapipe
        self.batch_size = batch_size
        self.drop_last = drop_last

    def __iter__(self) -> Iterator[list[Any]]:
        items = iter(self.datapipe)
        while batch := list(itertools.islice(items, self.batch_size)):
            if len(batch) == self.batch_size or not self.drop_last:
                yield batch

    def __len__(self) -> int:
        whole, rest = divmod(len(self.datapipe), self.batch_size)  # type: ignore[arg-type]
        return whole + (rest > 0 and not self.drop_last)


@functional_datapipe("unbatch")
class Unbatcher(IterDataPipe[Any]):
    """The items of batches."""

    def __init__(self, datapipe: Iterable[Any]) -> None:
        self.datapipe = datapipe

    def __iter__(self) -> Iterator[Any]:
        return itertools.chain.from_iterable(self.datapipe)


@functional_datapipe("concat")
class Concater(IterDataPipe[Any]):
    """One pipe after the other."""

    def __init__(self, *datapipes: Iterable[Any]) -> None:
        self.datapipes = datapipes

    def __iter__(self) -> Iterator[Any]:
        return itertools.chain.from_iterable(self.datapipes)

    def __len__(self) -> int:
        return sum(map(len, self.datapipes))  # type: ignore[arg-type]


@functional_datapipe("shuffle")
class Shuffler(IterDataPipe[Any]):
    """Shuffles within a buffer, in the same order in all workers of a loader, in another one in each epoch.

    Ranks have no seed in common: give them one with `set_seed` before each epoch, or use `to_resumable`, which does.
    """

    def __init__(self, datapipe: Iterable[Any], *, buffer_size: int = 10000) -> None:
        if buffer_size < 1:
            raise ValueError("buffer_size should be larger than 0")
        self.datapipe = datapipe
        self.buffer_size = buffer_size
        self._placement = Placement("rank_and_worker")
        self._is_on = True
        self._seed: int | None = None
        self._epochs = 0

    def set_shuffle(self, shuffle: bool = True) -> Shuffler:
        """Turn shuffling on or off."""
        self._is_on = shuffle
        return self

    def set_seed(self, seed: int) -> Shuffler:
        """Choose the order of the next iteration."""
        self._seed = seed
        return self

    def __iter__(self) -> Iterator[Any]:
        if not self._is_on:
            return iter(self.datapipe)
        seed, self._seed = self._seed, None
        return self._shuffled(random.Random(self._common_seed() if seed is None else seed))

    def __len__(self) -> int:
        return len(self.datapipe)  # type: ignore[arg-type]

    def _common_seed(self) -> int:
        if self._placement.here().world_size > 1:
            raise RuntimeError(
                "shuffle: all ranks need the same seed: call set_seed before each epoch, or use to_resumable(seed=0)"
            )
        worker = get_worker_info()
        self._epochs += 1
        if worker is None:
            return int(torch.empty((), dtype=torch.int64, device="cpu").random_().item())
        return worker.seed - worker.id + self._epochs

    def _shuffled(self, rng: random.Random) -> Iterator[Any]:
        buffer: list[Any] = []
        for item in self.datapipe:
            if len(buffer) == self.buffer_size:
                at = rng.randrange(self.buffer_size)
                item, buffer[at] = buffer[at], item
                yield item
            else:
                buffer.append(item)
        rng.shuffle(buffer)
        yield from buffer


@functional_datapipe("sharding_filter")
class ShardingFilter(Shardable, IterDataPipe[Any]):
    """Every n-th item, by worker and rank, or as `apply_sharding` says."""

    def __init__(self, source_datapipe: Iterable[Any]) -> None:
        self.source_datapipe = source_datapipe
        self._placement = Placement("rank_and_worker")

    def _place(self) -> tuple[int, int]:
        return self._shard_over_groups() or own_share(self, self._placement)

    def __iter__(self) -> Iterator[Any]:
        shards, shard = self._place()
        return itertools.islice(self.source_datapipe, shard, None, shards)

    def __len__(self) -> int:
        shards, shard = self._place()
        return len(range(shard, len(self.source_datapipe), shards))  # type: ignore[arg-type]
