"""`shard_blobs`: each item in exactly one shard, and shards as even as requested."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from azstoragetorch.datapipes import BlobInfo, BlobRange
from azstoragetorch.datapipes._base import SHARDING_PRIORITIES, IterableWrapper, apply_sharding
from azstoragetorch.datapipes._sharding import balance

URL = "https://account.blob.core.windows.net/c"


def blobs(count: int) -> list[BlobInfo]:
    return [BlobInfo(f"{URL}/{number:03d}", number * number * 7919 % 1000, '"e"') for number in range(count)]


def shares(items: list[Any], count: int, **options: Any) -> list[list[Any]]:
    found = []
    for shard in range(count):
        pipe = IterableWrapper(items).shard_blobs(**options)
        apply_sharding(pipe, count, shard)
        found.append(list(pipe))
        assert list(pipe) == found[-1]
        if options.get("by", "index") == "index":
            assert len(pipe) == len(found[-1])
        else:
            with pytest.raises(TypeError):
                len(pipe)
    return found


@pytest.mark.parametrize("by", ["index", "hash", "size"])
@pytest.mark.parametrize("length", [0, 1, 2, 10, 12, 101])
@pytest.mark.parametrize("count", [1, 3, 4])
def test_shares(by: str, length: int, count: int) -> None:
    """Together they are everything; with "drop" and "pad" all have the same length."""
    items = blobs(length)
    together = [item for share in shares(items, count, by=by) for item in share]
    assert Counter(together) == Counter(items)
    dropped = shares(items, count, by=by, even="drop")
    assert len({len(share) for share in dropped}) == 1
    assert max(Counter(item for share in dropped for item in share).values(), default=1) == 1
    padded = shares(items, count, by=by, even="pad")
    assert len({len(share) for share in padded}) == 1
    assert {item for share in padded for item in share} == set(items)
    if by != "hash":
        assert sum(map(len, dropped)) == length // count * count
        assert sum(map(len, padded)) == -(-length // count) * count


def test_by_hash_a_blob_stays_with_its_shard_whatever_else_is_listed() -> None:
    all_, fewer = (shares(blobs(100)[::step], 4, by="hash") for step in (1, 3))
    assert all(set(some) <= set(every) for some, every in zip(fewer, all_, strict=True))
    urls = shares([blob.url for blob in blobs(100)], 4, by="hash")
    assert urls == [[blob.url for blob in share] for share in all_]
    assert all(15 <= len(share) <= 35 for share in urls)


def test_ranges_of_one_blob_spread() -> None:
    ranges = [BlobRange(f"{URL}/a", at, at + 10, 1000, '"e"') for at in range(0, 1000, 10)]
    assert all(share for share in shares(ranges, 4, by="hash"))
    assert all(len(share) == 25 for share in shares(ranges, 4, by="size"))


@settings(max_examples=100)
@given(st.lists(st.integers(0, 10**9), max_size=60), st.integers(1, 7))
def test_by_size_no_share_is_heavier_than_another_by_more_than_one_item(sizes: list[int], count: int) -> None:
    found = balance(sizes, count)
    assert sorted(index for share in found for index in share) == list(range(len(sizes)))
    weights = [sum(sizes[index] for index in share) for share in found]
    assert max(weights) - min(weights) <= max(sizes, default=0) + len(sizes)


def test_it_needs_what_it_shards_by() -> None:
    with pytest.raises(TypeError, match="list_blobs_by_azure"):
        shares(["a", "b"], 2, by="size")
    with pytest.raises(TypeError, match="URL"):
        shares([1, 2], 2, by="hash")
    with pytest.raises(ValueError, match="by must be"):
        IterableWrapper([]).shard_blobs(by="name")
    with pytest.raises(ValueError, match="even must be"):
        IterableWrapper([]).shard_blobs(even="maybe")


def test_it_counts_groups_as_torchs_own_does() -> None:
    for ranks, rank, workers, worker in [(2, 1, 3, 0), (2, 0, 3, 2)]:
        ours, theirs = IterableWrapper(range(20)).shard_blobs(), IterableWrapper(range(20)).sharding_filter()
        for pipe in (ours, theirs):
            apply_sharding(pipe, ranks, rank, SHARDING_PRIORITIES.DISTRIBUTED)
            apply_sharding(pipe, workers, worker, SHARDING_PRIORITIES.MULTIPROCESSING)
        assert list(ours) == list(theirs)
        with pytest.raises(RuntimeError, match="cannot mix"):
            apply_sharding(ours, 2, 0)
    with pytest.raises(ValueError, match="instance_id"):
        ours.apply_sharding(2, 2)


def test_two_sharders_on_a_branch_raise() -> None:
    with pytest.raises(RuntimeError, match="Sharding twice"):
        list(DataLoader(IterableWrapper(range(4)).shard_blobs().sharding_filter(), num_workers=0))


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_under_dataloader_each_once(workers: int) -> None:
    pipe = IterableWrapper([f"{URL}/{number}" for number in range(11)]).shuffle().shard_blobs()
    loader = DataLoader(pipe, num_workers=workers, batch_size=3, collate_fn=list)
    for _ in range(2):
        assert Counter(url for batch in loader for url in batch) == Counter(f"{URL}/{number}" for number in range(11))
