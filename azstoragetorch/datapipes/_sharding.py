"""The pipe that gives each worker and rank its share."""

from __future__ import annotations

import hashlib
import heapq
from collections.abc import Iterable, Iterator, Sequence, Sized
from itertools import cycle, islice
from typing import Any, Literal, TypeVar

from azstoragetorch._samples.items import BlobInfo, BlobRange
from azstoragetorch._samples.sharding import EVEN, Even, shard_range
from azstoragetorch._samples.workers import Placement
from azstoragetorch.datapipes._base import SHARDING_PRIORITIES, IterDataPipe, functional_datapipe, own_share

T = TypeVar("T")


@functional_datapipe("shard_blobs")
class BlobSharderIterDataPipe(IterDataPipe[T]):
    """Yields the share of this worker and rank, and all without them. One of these, or `sharding_filter`, to a graph.

    DataLoader tells it the number of shards (workers x ranks) and which one it is; by hand,
    ``torch.utils.data.graph_settings.apply_sharding`` does. Every shard must see the same source in the same order,
    which holds for listings that do not change and for `shuffle` under DataLoader.

    Args:
        source_datapipe: Yields URLs, :class:`BlobInfo`, :class:`BlobRange`, or what begins with a URL.
        by: ``"index"``: every n-th item. ``"hash"``: by the URL, so that a blob stays with its shard whatever else is
            listed (ranges of one blob spread). ``"size"``: shares of about the same number of bytes; needs
            :class:`BlobInfo` or :class:`BlobRange`, and reads all of the source first.
        even: Shares of the same length, so that no rank waits for another: ``"drop"`` leaves out the surplus, ``"pad"``
            repeats some items, ``"none"`` does neither. ``"hash"`` then reads all of the source first.

    Raises:
        ValueError: an argument is unknown.

    The length is known with ``by="index"`` if that of the source is.
    """

    def __init__(
        self, source_datapipe: Iterable[T], by: Literal["index", "hash", "size"] = "index", even: Even = "none"
    ) -> None:
        super().__init__()
        if by not in ("index", "hash", "size"):
            raise ValueError(f"by must be 'index', 'hash' or 'size', not {by!r}")
        if even not in EVEN:
            raise ValueError(f"even must be one of {', '.join(map(repr, EVEN))}, not {even!r}")
        self.source_datapipe = source_datapipe
        self.by = by
        self.even = even
        self._placement = Placement("rank_and_worker")
        self._groups: dict[int, tuple[int, int]] = {}
        self._shards = 1
        self._shard = 0

    def apply_sharding(
        self,
        num_of_instances: int,
        instance_id: int,
        sharding_group: SHARDING_PRIORITIES = SHARDING_PRIORITIES.DEFAULT,
    ) -> None:
        """Be shard *instance_id* of *num_of_instances*, within the shards of other groups; DataLoader calls it."""
        if not 0 <= instance_id < num_of_instances:
            raise ValueError(f"instance_id({instance_id}) should be between 0 and {num_of_instances - 1}")
        is_default = sharding_group == SHARDING_PRIORITIES.DEFAULT
        if any((group == SHARDING_PRIORITIES.DEFAULT) != is_default for group in self._groups):
            raise RuntimeError("BlobSharder cannot mix DEFAULT and non DEFAULT groups")
        self._groups[int(sharding_group)] = (num_of_instances, instance_id)
        self._shards, self._shard = 1, 0
        for _, (instances, instance) in sorted(self._groups.items(), reverse=True):
            self._shard += self._shards * instance
            self._shards *= instances

    def _settle(self) -> None:
        if not self._groups:
            self._shards, self._shard = own_share(self, self._placement)

    def __len__(self) -> int:
        self._settle()
        if self.by == "index" and isinstance(self.source_datapipe, Sized):
            return len(shard_range(len(self.source_datapipe), self._shards, self._shard, self.even))
        raise TypeError(f"{type(self).__name__} has no length: it needs by='index' and a source that has one")

    def __iter__(self) -> Iterator[T]:
        self._settle()
        if self._shards == 1:
            yield from self.source_datapipe
        elif self.by == "index":
            yield from self._by_index()
        elif self.by == "hash":
            yield from self._by_hash()
        else:
            items = list(self.source_datapipe)
            shares = balance([_size_of(item) for item in items], self._shards, self.even)
            for index in shares[self._shard]:
                yield items[index]

    def _by_index(self) -> Iterator[T]:
        first: list[T] = []
        round_: list[T] = []
        for item in self.source_datapipe:
            if self.even == "pad" and len(first) < self._shards:
                first.append(item)
            round_.append(item)
            is_full = len(round_) == self._shards
            if is_full if self.even != "none" else len(round_) == self._shard + 1:
                yield round_[self._shard]
            if is_full:
                round_ = []
        if self.even == "pad" and round_:
            yield (round_ + list(islice(cycle(first), self._shards)))[self._shard]

    def _by_hash(self) -> Iterator[T]:
        if self.even == "none":
            for item in self.source_datapipe:
                if _hash_of(item) % self._shards == self._shard:
                    yield item
            return
        mine: list[T] = []
        some: list[T] = []  # for a shard that has nothing of its own to repeat
        counts = [0] * self._shards
        for item in self.source_datapipe:
            shard = _hash_of(item) % self._shards
            counts[shard] += 1
            if shard == self._shard:
                mine.append(item)
            elif not some:
                some.append(item)
        if self.even == "drop":
            yield from mine[: min(counts)]
        elif max(counts):
            yield from islice(cycle(mine or some), max(counts))


def balance(sizes: Sequence[int], shards: int, even: Even = "none") -> list[list[int]]:
    """Indices of *sizes* for each of *shards*, in order, so that their sums are about equal.

    Largest first, each to the shard that has least. With *even*, each shard gets one of every *shards* items in the
    order of their size, so that all have the same number; the smallest are dropped, or the largest repeated.
    """
    order = sorted(range(len(sizes)), key=lambda index: -sizes[index])
    shares: list[list[int]] = [[] for _ in range(shards)]
    if even == "none":
        loads = [(0, shard) for shard in range(shards)]
        for index in order:
            load, shard = heapq.heappop(loads)
            shares[shard].append(index)
            heapq.heappush(loads, (load + max(1, sizes[index]), shard))
    else:
        surplus = len(order) % shards
        if surplus and even == "drop":
            order = order[:-surplus]
        elif surplus:
            order += list(islice(cycle(order[:]), shards - surplus))
        totals = [0] * shards
        for at in range(0, len(order), shards):
            lightest = sorted(range(shards), key=lambda shard: (totals[shard], shard))
            for index, shard in zip(order[at : at + shards], lightest, strict=True):
                shares[shard].append(index)
                totals[shard] += sizes[index]
    return [sorted(share) for share in shares]


def _hash_of(item: Any) -> int:
    start = item.start if isinstance(item, BlobRange) else ""
    if isinstance(item, tuple) and item:
        item = item[0]
    if not isinstance(item, str):
        raise TypeError(f"by='hash' needs URLs, or tuples that begin with one, not {type(item).__name__}")
    return int.from_bytes(hashlib.blake2b(f"{item.partition('?')[0]} {start}".encode(), digest_size=8).digest(), "big")


def _size_of(item: Any) -> int:
    if isinstance(item, BlobInfo):
        return item.size
    if isinstance(item, BlobRange):
        return item.stop - item.start
    raise TypeError(f"by='size' needs BlobInfo or BlobRange, not {type(item).__name__}: list with list_blobs_by_azure")
