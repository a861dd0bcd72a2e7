"""The pipe that divides items among workers and ranks."""

from __future__ import annotations

import hashlib
import heapq
from collections.abc import Iterable, Iterator, Sequence, Sized
from itertools import cycle, islice
from typing import Any, Literal, TypeVar

from azstoragetorch._samples.items import BlobInfo, BlobRange
from azstoragetorch._samples.sharding import EVEN, Even, Shardable, shard_range
from azstoragetorch._samples.workers import Placement
from azstoragetorch.datapipes._base import IterDataPipe, functional_datapipe, own_share

T = TypeVar("T")


@functional_datapipe("shard_blobs")
class BlobSharderIterDataPipe(Shardable, IterDataPipe[T]):
    """Yields the share of this worker and rank; without workers and ranks, all items.

    Use only one of these or of `sharding_filter` per graph. DataLoader passes the number of shards (workers x ranks)
    and the index of this one; without a loader, call ``torch.utils.data.graph_settings.apply_sharding``. Every shard
    must see the same source in the same order, which is the case for listings that do not change, and for `shuffle`
    under DataLoader.

    Args:
        source_datapipe: Yields URLs, :class:`BlobInfo`, :class:`BlobRange`, or sequences that begin with a URL.
        by: ``"index"``: every n-th item. ``"hash"``: by the URL, so that a blob stays in its shard whatever else is
            listed (ranges of one blob go to different shards). ``"size"``: shares of about the same number of bytes;
            needs :class:`BlobInfo` or :class:`BlobRange`, and reads all of the source first.
        even: Shares of the same length, so that no rank waits for another: ``"drop"`` leaves out the surplus, ``"pad"``
            repeats some items, ``"none"`` does neither. ``"hash"`` then reads all of the source first.

    Raises:
        ValueError: an argument is unknown.

    With ``by="index"``, the length is known if that of the source is.
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

    def _place(self) -> tuple[int, int]:
        return self._shard_over_groups() or own_share(self, self._placement)

    def __len__(self) -> int:
        shards, shard = self._place()
        if self.by == "index" and isinstance(self.source_datapipe, Sized):
            return len(shard_range(len(self.source_datapipe), shards, shard, self.even))
        raise TypeError(f"{type(self).__name__} has no length: it needs by='index' and a source that has one")

    def __iter__(self) -> Iterator[T]:
        shards, shard = self._place()
        if shards == 1:
            yield from self.source_datapipe
        elif self.by == "index":
            yield from self._by_index(shards, shard)
        elif self.by == "hash":
            yield from self._by_hash(shards, shard)
        else:
            items = list(self.source_datapipe)
            shares = balance([_size_of(item) for item in items], shards, self.even)
            for index in shares[shard]:
                yield items[index]

    def _by_index(self, shards: int, shard: int) -> Iterator[T]:
        first: list[T] = []
        round_: list[T] = []
        for item in self.source_datapipe:
            if self.even == "pad" and len(first) < shards:
                first.append(item)
            round_.append(item)
            is_full = len(round_) == shards
            if is_full if self.even != "none" else len(round_) == shard + 1:
                yield round_[shard]
            if is_full:
                round_ = []
        if self.even == "pad" and round_:
            yield (round_ + list(islice(cycle(first), shards)))[shard]

    def _by_hash(self, shards: int, shard: int) -> Iterator[T]:
        if self.even == "none":
            for item in self.source_datapipe:
                if _hash_of(item) % shards == shard:
                    yield item
            return
        mine: list[T] = []
        some: list[T] = []  # for a shard without items that it could repeat
        counts = [0] * shards
        for item in self.source_datapipe:
            owner = _hash_of(item) % shards
            counts[owner] += 1
            if owner == shard:
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
