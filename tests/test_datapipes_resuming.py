"""`to_resumable`: the same samples, in the same order, whether an epoch was interrupted or not."""

from __future__ import annotations

import json
import warnings
from collections import Counter
from itertools import chain
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader
from torchdata.stateful_dataloader import StatefulDataLoader

from azstoragetorch.datapipes import AzureBlobFileLister, ResumableDataPipe
from azstoragetorch.datapipes._base import IterableWrapper, IterDataPipe
from tests.faults import FaultService
from tests.test_datapipes_tar import make_tar

COUNT = 23


def name_of(sample: tuple[str, bytes]) -> str:
    return sample[0].rpartition("/")[2]


def names_of(samples: list[tuple[str, bytes]]) -> list[str]:
    return [name_of(sample) for sample in samples]


def key_of(sample: dict[str, Any]) -> str:
    return str(sample["__key__"])


def is_wanted(sample: tuple[str, bytes]) -> bool:
    return not sample[0].endswith("7")


def fill(service: FaultService) -> None:
    for number in range(COUNT):
        service.put("data", f"{number:02d}", b"x")
    for shard in range(4):
        service.put("tars", f"{shard}.tar", make_tar({f"{shard}{number}.txt": b"x" for number in range(6)}))


def build(service: FaultService, kind: str, seed: int = 0) -> ResumableDataPipe:
    if kind == "tar":
        listed = AzureBlobFileLister(service.container_url("tars"), credential=False)
        opened = listed.shuffle().shard_blobs().open_files_by_azure(credential=False)
        return opened.expand_blob_tar().group_blob_samples().map(key_of).shuffle(buffer_size=5).to_resumable(seed)
    listed = AzureBlobFileLister(service.container_url("data"), credential=False)
    read = listed.shuffle().sharding_filter().read_files_by_azure(credential=False)
    if kind == "map":
        return read.map(name_of).to_resumable(seed)
    if kind == "batch":
        return read.batch(3).map(names_of).to_resumable(seed)
    return read.filter(is_wanted).map(name_of).shuffle(buffer_size=4).to_resumable(seed)


KINDS = ["map", "batch", "filter", "tar"]


@pytest.mark.parametrize("kind", KINDS)
def test_by_hand_at_any_point(fault_service: FaultService, kind: str) -> None:
    fill(fault_service)
    whole = list(build(fault_service, kind))
    for stop in range(len(whole) + 1):
        first = build(fault_service, kind)
        samples = iter(first)
        assert [next(samples) for _ in range(stop)] == whole[:stop]
        state = json.loads(json.dumps(first.state_dict()))
        second = build(fault_service, kind)
        second.load_state_dict(state)
        assert second.state_dict() == state
        assert list(second) == whole[stop:]
        assert list(second) == whole, "the next iteration begins at the beginning"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_under_a_stateful_dataloader(fault_service: FaultService, kind: str, workers: int) -> None:
    """Also from the state at the end of an epoch, which starts the next one."""
    fill(fault_service)
    check_loader(fault_service, kind, workers, range(0, 40, 3))


def test_under_a_stateful_dataloader_with_two_workers(fault_service: FaultService) -> None:
    fill(fault_service)
    check_loader(fault_service, "map", 2, [0, 5, 12])


def check_loader(service: FaultService, kind: str, workers: int, stops: Any) -> None:
    def loader() -> StatefulDataLoader:
        return StatefulDataLoader(build(service, kind), batch_size=2, num_workers=workers, collate_fn=list)

    whole = list(loader())
    samples = chain.from_iterable(whole)
    assert sorted(chain.from_iterable(samples) if kind == "batch" else samples) == expected(kind)
    for stop in sorted({min(stop, len(whole)) for stop in stops}):
        first = loader()
        batches = iter(first)
        assert [next(batches) for _ in range(stop)] == whole[:stop]
        if stop == len(whole):
            assert next(batches, None) is None
        state = first.state_dict()
        del batches, first
        second = loader()
        second.load_state_dict(state)
        assert list(second) == (whole[stop:] or whole)


def expected(kind: str) -> list[str]:
    """The contents of the samples of an epoch, with or without batches."""
    if kind == "tar":
        return [f"{shard}{number}" for shard in range(4) for number in range(6)]
    names = [f"{number:02d}" for number in range(COUNT)]
    return [name for name in names if not name.endswith("7")] if kind == "filter" else names


def test_epochs_differ_and_repeat(fault_service: FaultService) -> None:
    fill(fault_service)
    dataset = build(fault_service, "map")
    orders = []
    for epoch in (0, 1, 0):
        dataset.set_epoch(epoch)
        orders.append(list(dataset))
    assert orders[0] == orders[2] != orders[1]
    assert list(build(fault_service, "map", seed=1)) != orders[0]
    dataset.set_epoch(1)
    samples = iter(dataset)
    next(samples)
    resumed = build(fault_service, "map")
    resumed.load_state_dict(dataset.state_dict())
    assert list(resumed) == orders[1][1:], "a state brings its epoch"


@pytest.mark.parametrize("is_shuffled", [True, False])
def test_a_forgotten_set_epoch_is_reported_once(fault_service: FaultService, is_shuffled: bool) -> None:
    """Only if the graph shuffles, and neither for an epoch that was set again nor for one that is resumed."""
    fill(fault_service)

    def messages(epochs: list[int | None]) -> list[str]:
        dataset = build(fault_service, "map")
        if not is_shuffled:
            listed = AzureBlobFileLister(fault_service.container_url("data"), credential=False)
            dataset = listed.sharding_filter().to_resumable()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for epoch in epochs:
                if epoch is not None:
                    dataset.set_epoch(epoch)
                list(dataset)
            dataset.load_state_dict(dataset.state_dict())
            list(dataset)
        return [str(warning.message) for warning in caught if "set_epoch" in str(warning.message)]

    assert len(messages([None, None, None])) == is_shuffled
    assert messages([0, 1, 2]) == messages([3, 3]) == []


def test_set_epoch_reaches_persistent_workers(fault_service: FaultService) -> None:
    fill(fault_service)
    dataset = build(fault_service, "map")
    loader = DataLoader(dataset, batch_size=None, num_workers=1, persistent_workers=True)
    orders = []
    for epoch in (0, 1):
        dataset.set_epoch(epoch)
        orders.append(list(loader))
    assert orders[0] != orders[1]
    assert sorted(orders[0]) == sorted(orders[1])


def test_what_was_consumed_is_not_read_again(fault_service: FaultService) -> None:
    """Through map and batch: consumed samples are skipped in the listing."""
    fill(fault_service)
    for kind, consumed in (("map", 15), ("batch", 5)):
        first = build(fault_service, kind)
        samples = iter(first)
        done = [next(samples) for _ in range(consumed)]
        state = first.state_dict()
        assert list(samples), "nothing of the first reading is under way"
        fault_service.reset_log()
        second = build(fault_service, kind)
        second.load_state_dict(state)
        rest = list(second)
        assert len(fault_service.requests("get_blob")) == COUNT - 15
        assert len(done) + len(rest) == (COUNT if kind == "map" else 8)


def test_the_state_is_small_and_a_fresh_copy(fault_service: FaultService) -> None:
    fill(fault_service)
    dataset = build(fault_service, "map")
    samples = iter(dataset)
    states = []
    for _ in range(3):
        next(samples)
        states.append(dataset.state_dict())
    assert [state["position"] for state in states] == [1, 2, 3]
    assert len(json.dumps(states[0])) < 300


def url_in(sample: tuple[str, bytes]) -> str:
    return sample[1].decode()


def test_how_far_a_reader_drew_ahead_of_its_turn_does_not_matter(fault_service: FaultService) -> None:
    """For blobs that list blobs, the number of the former that were read depends on the free memory."""
    fill(fault_service)
    for number in range(COUNT):
        fault_service.put("names", f"{number:02d}", fault_service.blob_url("data", f"{number:02d}").encode())

    def naming(ahead: int) -> ResumableDataPipe:
        listed = AzureBlobFileLister(fault_service.container_url("names"), credential=False).sharding_filter()
        urls = listed.read_files_by_azure(credential=False).map(url_in)
        read = urls.read_files_by_azure(credential=False, prefetch=ahead)
        return read.filter(is_wanted).map(name_of).to_resumable()

    whole = list(naming(0))
    assert len(whole) == len(expected("filter"))
    first, second = naming(0), naming(8)
    samples = iter(first)
    for _ in range(5):
        next(samples)
    second.load_state_dict(first.state_dict())
    assert list(second) == whole[5:]


def test_a_state_loaded_before_there_are_workers_counts_for_one_epoch(fault_service: FaultService) -> None:
    """The workers of the next epoch are new, and get the state that the parent has loaded."""
    fill(fault_service)
    first, second = build(fault_service, "map"), build(fault_service, "map")
    whole = list(first)
    samples = iter(first)
    for _ in range(5):
        next(samples)
    second.load_state_dict(first.state_dict())
    loader = DataLoader(second, batch_size=None, num_workers=1)
    assert list(loader) == whole[5:]
    assert list(loader) == whole


@pytest.mark.parametrize("kind", ["map", "filter"])
@pytest.mark.parametrize("change", ["added", "removed"])
def test_a_changed_listing_raises_instead_of_resuming_wrongly(
    fault_service: FaultService, kind: str, change: str
) -> None:
    fill(fault_service)
    first = build(fault_service, kind)
    samples = iter(first)
    for _ in range(10):
        next(samples)
    if change == "added":
        fault_service.put("data", "000", b"x")
    else:
        fault_service.delete("data", "03")
    second = build(fault_service, kind)
    second.load_state_dict(first.state_dict())
    with pytest.raises(ValueError, match="blobs were added or removed"):
        list(second)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"seed": 5}, "seed=5"),
        ({"shards": 4}, "same number of workers and ranks"),
        ({"version": 99}, "not a state"),
    ],
)
def test_a_state_that_does_not_fit_is_refused(fault_service: FaultService, change: dict[str, int], match: str) -> None:
    fill(fault_service)
    dataset = build(fault_service, "map")
    with pytest.raises(ValueError, match=match):
        dataset.load_state_dict({**dataset.state_dict(), **change})
    with pytest.raises(ValueError, match="not a state"):
        dataset.load_state_dict({})


def test_a_graph_without_a_sharder_is_striped_with_a_warning(fault_service: FaultService) -> None:
    """Each sample is still read once."""
    fill(fault_service)
    listed = AzureBlobFileLister(fault_service.container_url("data"), credential=False)
    dataset = listed.read_files_by_azure(credential=False).map(name_of)
    found = []
    for rank in range(2):
        resumable = ResumableDataPipe(dataset, rank=rank, world_size=2)
        with pytest.warns(UserWarning, match="no sharding_filter"):
            share = list(resumable)
        samples = iter(resumable)
        with pytest.warns(UserWarning, match="no sharding_filter"):
            next(samples)
        resumed = ResumableDataPipe(dataset, rank=rank, world_size=2)
        resumed.load_state_dict(resumable.state_dict())
        with pytest.warns(UserWarning, match="no sharding_filter"):
            assert list(resumed) == share[1:]
        found += share
    assert Counter(found) == Counter(f"{number:02d}" for number in range(COUNT))


def test_explicit_ranks_share(fault_service: FaultService) -> None:
    fill(fault_service)
    found = []
    for rank in range(3):
        dataset = build(fault_service, "map")
        found += list(ResumableDataPipe(dataset.source_datapipe, rank=rank, world_size=3))
    assert Counter(found) == Counter(f"{number:02d}" for number in range(COUNT))


def test_any_graph_resumes() -> None:
    """Also a graph without blobs."""
    dataset = IterableWrapper(range(20)).shuffle().sharding_filter().to_resumable(seed=3)
    whole = list(dataset)
    samples = iter(dataset)
    for _ in range(7):
        next(samples)
    resumed = IterableWrapper(range(20)).shuffle().sharding_filter().to_resumable(seed=3)
    resumed.load_state_dict(dataset.state_dict())
    assert list(resumed) == whole[7:]
    assert isinstance(dataset, torch.utils.data.IterableDataset)
    assert not isinstance(dataset, IterDataPipe)
