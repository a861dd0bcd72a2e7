"""Exact resuming mid-epoch: with torchdata's loader, manually, with other numbers of ranks and workers."""

from __future__ import annotations

import itertools
import json
import os
import pickle
import signal
import sys
import threading
from typing import Any

import pytest
from torch.utils.data import DataLoader
from torchdata.stateful_dataloader import StatefulDataLoader

from azstoragetorch.datasets import Blob, BlobDataset, IterableBlobDataset, merge_states
from tests.faults import FaultService, Hold
from tests.support import QUICK

COUNT = 23


def name_of(blob: Blob) -> str:
    with blob.reader() as reader:
        assert reader.read() == blob.blob_name.encode()
    return blob.blob_name


@pytest.fixture
def url(fault_service: FaultService) -> str:
    for index in range(COUNT):
        fault_service.put("data", f"{index:02d}", f"{index:02d}".encode())
    return fault_service.container_url("data")


def make(url: str, **options: Any) -> IterableBlobDataset[str]:
    return IterableBlobDataset.from_container_url(
        url, **{"credential": False, "transfer": QUICK, "transform": name_of, "shuffle": True, **options}
    )


def through_json(state: Any) -> Any:
    return json.loads(json.dumps(state))


def loader_of(url: str, workers: int, *, persistent: bool = False, **options: Any) -> tuple[Any, Any]:
    dataset = make(url, **options)
    return dataset, StatefulDataLoader(
        dataset, batch_size=3, num_workers=workers, collate_fn=list, persistent_workers=persistent
    )


def epochs(dataset: Any, loader: Any, first: int, last: int) -> list[list[list[str]]]:
    read = []
    for epoch in range(first, last + 1):
        dataset.set_epoch(epoch)
        read.append(list(loader))
    return read


LOADERS = [(0, False), (2, False), (2, True)]


@pytest.mark.parametrize(("workers", "persistent"), LOADERS)
@pytest.mark.timeout(600)
def test_a_stateful_loader_continues_exactly_from_every_place(url: str, workers: int, persistent: bool) -> None:
    """From the start, middle and end of an epoch, then two more epochs; the state is stored as JSON."""
    dataset, loader = loader_of(url, workers, persistent=persistent)
    expected = epochs(dataset, loader, 0, 2)
    assert len({tuple(map(tuple, epoch)) for epoch in expected}) == 3
    assert all(sorted(itertools.chain(*epoch)) == [f"{i:02d}" for i in range(COUNT)] for epoch in expected)
    steps = len(expected[0])
    for stop in {0: range(steps + 1), 2: (0, 1, 4, steps - 1, steps)}[workers]:
        dataset, loader = loader_of(url, workers, persistent=persistent)
        iterator = iter(loader)
        read = [next(iterator) for _ in range(stop)]
        state = through_json(loader.state_dict())
        resumed, again = loader_of(url, workers, persistent=persistent)
        again.load_state_dict(state)
        first, second, third = epochs(resumed, again, 0, 2)
        assert read + first == expected[0], stop
        assert [second, third] == expected[1:], stop


@pytest.mark.parametrize(("workers", "persistent"), LOADERS)
def test_the_state_of_an_ended_epoch_leads_to_the_next_one(url: str, workers: int, persistent: bool) -> None:
    dataset, loader = loader_of(url, workers, persistent=persistent)
    expected = epochs(dataset, loader, 0, 1)
    dataset, loader = loader_of(url, workers, persistent=persistent)
    assert epochs(dataset, loader, 0, 0) == expected[:1]
    state = through_json(loader.state_dict())
    resumed, again = loader_of(url, workers, persistent=persistent)
    again.load_state_dict(state)
    assert epochs(resumed, again, 1, 1) == expected[1:]


@pytest.mark.parametrize(("workers", "persistent"), LOADERS)
def test_a_state_from_a_later_epoch_continues_in_that_epoch(url: str, workers: int, persistent: bool) -> None:
    dataset, loader = loader_of(url, workers, persistent=persistent)
    expected = epochs(dataset, loader, 0, 3)
    dataset, loader = loader_of(url, workers, persistent=persistent)
    epochs(dataset, loader, 0, 1)
    dataset.set_epoch(2)
    iterator = iter(loader)
    read = [next(iterator) for _ in range(3)]
    state = through_json(loader.state_dict())
    resumed, again = loader_of(url, workers, persistent=persistent)
    again.load_state_dict(state)
    third, fourth = epochs(resumed, again, 2, 3)
    assert [read + third, fourth] == expected[2:]


@pytest.mark.parametrize("even", ["drop", "pad"])
def test_a_loader_whose_state_is_some_steps_old_continues_exactly(url: str, even: str) -> None:
    """``snapshot_every_n_steps``: torchdata reads again what follows the snapshot."""

    def loader() -> Any:
        dataset = make(url, even=even)
        return StatefulDataLoader(dataset, 2, num_workers=2, collate_fn=list, snapshot_every_n_steps=3)

    whole = list(loader())
    assert sum(map(len, whole)) == {"drop": COUNT - 1, "pad": COUNT + 1}[even]
    for stop in (1, 3, 5, 8, len(whole)):
        first, again = loader(), loader()
        read = list(itertools.islice(iter(first), stop))
        again.load_state_dict(through_json(first.state_dict()))
        assert read + list(again) == whole
        assert list(again) == whole


@pytest.mark.parametrize("workers", [0, 2])
def test_a_map_style_dataset_continues_with_the_sampler_of_a_stateful_loader(url: str, workers: int) -> None:
    def loader() -> Any:
        dataset = BlobDataset.from_container_url(url, credential=False, transfer=QUICK, transform=name_of)
        return StatefulDataLoader(dataset, 3, shuffle=True, num_workers=workers, collate_fn=list)

    first, again = loader(), loader()
    iterator = iter(first)
    read = [next(iterator) for _ in range(4)]
    state = pickle.loads(pickle.dumps(first.state_dict()))
    rest = list(iterator)
    again.load_state_dict(state)
    assert list(again) == rest
    assert sorted(itertools.chain(*read, *rest)) == [f"{i:02d}" for i in range(COUNT)]


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    "context",
    [pytest.param("spawn", marks=pytest.mark.exhaustive), pytest.param("forkserver", marks=pytest.mark.slow)],
)
def test_a_stateful_loader_with_spawned_workers_continues_exactly(url: str, context: str) -> None:
    def loader() -> Any:
        return StatefulDataLoader(make(url), 3, num_workers=2, collate_fn=list, multiprocessing_context=context)

    whole = list(loader())
    first = loader()
    iterator = iter(first)
    read = [next(iterator) for _ in range(3)]
    again = loader()
    again.load_state_dict(through_json(first.state_dict()))
    assert read + list(again) == whole


def test_by_hand_from_every_place(url: str) -> None:
    whole = list(make(url))
    for stop in range(COUNT + 1):
        dataset = make(url)
        assert list(itertools.islice(iter(dataset), stop)) == whole[:stop]
        state = through_json(dataset.state_dict())
        resumed = make(url)
        resumed.load_state_dict(state)
        assert resumed.state_dict() == state
        assert list(resumed) == whole[stop:]
        assert list(resumed) == whole  # only the next iteration is the resumed one


class Preempted(BaseException):
    """Raised by a signal handler, at any point of the program."""


def preempt(*_: object) -> None:
    raise Preempted


def check_nothing_is_lost(dataset: Any, samples: Any, url: str, rest: list[str]) -> None:
    resumed = make(url)
    resumed.load_state_dict(through_json(dataset.state_dict()))
    assert list(resumed) == rest
    assert list(samples) == rest


def test_an_interrupt_in_a_transform_loses_no_sample(url: str) -> None:
    """Neither in a state that is taken then, nor in the same iterator."""
    whole = list(make(url))
    due = {whole[0], whole[5]}

    def read(blob: Blob) -> str:
        if blob.blob_name in due:
            due.remove(blob.blob_name)
            preempt()
        return name_of(blob)

    dataset = make(url, transform=read)
    samples = iter(dataset)
    with pytest.raises(Preempted):
        next(samples)
    assert list(itertools.islice(samples, 5)) == whole[:5]
    with pytest.raises(Preempted):
        next(samples)
    check_nothing_is_lost(dataset, samples, url, whole[5:])


@pytest.mark.skipif(sys.platform == "win32", reason="needs signals")
def test_an_interrupt_while_the_service_is_waited_for_loses_no_sample(url: str, fault_service: FaultService) -> None:
    whole = list(make(url))
    dataset = make(url, transform=None)
    _ = dataset.metadata
    gate = threading.Event()
    fault_service.reset_log()
    fault_service.script("get_blob", [Hold(gate)], repeat=True)
    samples = iter(dataset)

    def send() -> None:
        fault_service.wait_for_requests(1, "get_blob")
        os.kill(os.getpid(), signal.SIGUSR1)

    previous = signal.signal(signal.SIGUSR1, preempt)
    sender = threading.Thread(target=send)
    sender.start()
    try:
        with pytest.raises(Preempted):
            next(samples)
    finally:
        sender.join()
        signal.signal(signal.SIGUSR1, previous)
        gate.set()
    names = (sample["url"].rpartition("/")[2] for sample in samples)
    check_nothing_is_lost(dataset, names, url, whole)


def test_a_state_is_small_and_fresh_and_makes_no_request(url: str, fault_service: FaultService) -> None:
    dataset = make(url)
    samples = iter(dataset)
    before = dataset.state_dict()
    fault_service.reset_log()
    next(samples)
    fault_service.wait_until_idle()
    after = dataset.state_dict()
    assert (before["position"], after["position"]) == (0, 1)
    assert after["consumed"] is not dataset.state_dict()["consumed"]
    assert len(json.dumps(after)) < 300
    requests = len(fault_service.log)
    for _ in range(100):
        dataset.state_dict()
    assert len(fault_service.log) == requests


def test_a_state_without_an_iterator_is_the_beginning(url: str) -> None:
    state = make(url).state_dict()
    assert state["position"] == 0
    dataset = make(url)
    dataset.load_state_dict(state)
    assert len(list(dataset)) == COUNT


def test_a_changed_listing_is_refused(url: str, fault_service: FaultService) -> None:
    dataset = make(url)
    next(iter(dataset))
    state = dataset.state_dict()
    fault_service.put("data", "00", b"00")  # overwritten: the same sequence
    same = make(url)
    same.load_state_dict(state)
    assert len(list(same)) == COUNT - 1
    fault_service.put("data", "newer", b"newer")
    changed = make(url)
    changed.load_state_dict(state)
    with pytest.raises(ValueError, match="the listing has changed since the state was saved"):
        iter(changed)


def test_a_state_of_another_order_or_shard_is_refused(url: str) -> None:
    dataset = make(url, seed=1)
    state = dataset.state_dict()
    for other in (make(url, seed=2), make(url, shuffle=False)):
        with pytest.raises(ValueError, match="saved with seed=1"):
            other.load_state_dict(state)
    ranks = [make(url, shard_by="rank_and_worker", rank=rank, world_size=2) for rank in range(2)]
    ranks[1].load_state_dict(ranks[0].state_dict())
    with pytest.raises(ValueError, match=r"shard \[0\] of 2, but this process reads shard 1"):
        iter(ranks[1])
    alone = make(url)
    alone.load_state_dict(ranks[0].state_dict())
    with pytest.raises(ValueError, match=r"those of \[1\] are missing"):
        iter(alone)
    with pytest.raises(ValueError, match="not the state of a dataset"):
        alone.load_state_dict({"epoch": 1})


def test_a_state_that_comes_too_late_for_workers_is_refused(url: str) -> None:
    dataset = make(url)
    whole = list(dataset)
    list(itertools.islice(iter(dataset), 5))
    state = dataset.state_dict()

    def loader() -> Any:
        return DataLoader(dataset, None, num_workers=1, persistent_workers=True)

    begun = loader()
    assert list(begun) == whole
    dataset.load_state_dict(state)
    with pytest.raises(ValueError, match=r"state: it was loaded when the workers of this loader had begun"):
        list(begun)
    again = loader()
    assert list(again) == whole[5:]
    assert list(again) == whole
    # An iterator that is abandoned, or resumed elsewhere, does not affect them.
    dataset.load_state_dict(state)
    dataset.set_epoch(1)
    assert sorted(again) == sorted(whole)
    dataset.set_epoch(0)
    dataset.load_state_dict(state)
    assert list(dataset) == whole[5:]
    assert list(again) == whole


def test_another_epoch_drops_a_loaded_state(url: str) -> None:
    whole = list(make(url))
    dataset = make(url)
    list(itertools.islice(iter(dataset), 5))
    state = dataset.state_dict()
    resumed = make(url)
    resumed.load_state_dict(state)
    resumed.set_epoch(0)
    assert list(resumed) == whole[5:]
    resumed.load_state_dict(state)
    resumed.set_epoch(1)
    assert len(list(resumed)) == COUNT


@pytest.mark.parametrize("persistent", [False, True])
@pytest.mark.parametrize("batches", [0, 1, 5, 8])
def test_a_plain_loader_with_workers_resumes_by_counting(url: str, batches: int, persistent: bool) -> None:
    """The epoch after it is complete: workers do not use the state again."""

    def loader(dataset: Any, workers: int = 2) -> Any:
        return DataLoader(dataset, 3, num_workers=workers, collate_fn=list, persistent_workers=persistent)

    dataset = make(url)
    iterator = iter(loader(dataset))
    read = [next(iterator) for _ in range(batches)]
    state = through_json(dataset.state_after(batches, batch_size=3, num_workers=2))
    resumed = make(url)
    resumed.load_state_dict(state)
    again = loader(resumed)
    rest = list(again)
    assert sorted(itertools.chain(*read, *rest)) == [f"{i:02d}" for i in range(COUNT)]
    assert sorted(itertools.chain(*again)) == [f"{i:02d}" for i in range(COUNT)]
    # Again in the middle of the resumed epoch.
    resumed = make(url)
    resumed.load_state_dict(state)
    taken = list(itertools.islice(loader(resumed), 1)) if rest else []
    second = resumed.state_after(len(taken), batch_size=3, num_workers=2, resumed_from=state)
    elsewhere = make(url)
    elsewhere.load_state_dict(second)
    last = list(loader(elsewhere, 1))
    assert sorted(itertools.chain(*read, *taken, *last)) == [f"{i:02d}" for i in range(COUNT)]


def test_counting_more_batches_than_there_are_is_refused(url: str) -> None:
    with pytest.raises(ValueError, match="batches=9: the loader yields no more than 8"):
        make(url).state_after(9, batch_size=3, num_workers=2)
    with pytest.raises(ValueError, match="num_workers must be at least 1"):
        make(url).state_after(1, batch_size=3, num_workers=0)
    with pytest.raises(ValueError, match="shard_by='none'"):
        make(url, shard_by="none").state_after(1, batch_size=3, num_workers=1)


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("worlds", [(2, 3), (3, 2, 1), (1, 4, 2, 5)])
def test_another_number_of_ranks_continues_without_loss_or_repetition(
    url: str, worlds: tuple[int, ...], shuffle: bool
) -> None:
    read: list[str] = []
    state: Any = None
    for turn, world in enumerate(worlds):
        ranks = [make(url, shard_by="rank_and_worker", rank=r, world_size=world, shuffle=shuffle) for r in range(world)]
        for rank, dataset in enumerate(ranks):
            if state is not None:
                dataset.load_state_dict(state)
            is_last = turn == len(worlds) - 1
            read += itertools.islice(iter(dataset), None if is_last else 1 + rank)
        state = through_json(merge_states([dataset.state_dict() for dataset in ranks]))
    assert sorted(read) == [f"{i:02d}" for i in range(COUNT)]


def test_loaders_states_of_ranks_and_workers_are_merged_for_any_other_number(url: str) -> None:
    def of_rank(rank: int, world: int, workers: int) -> tuple[Any, Any]:
        return loader_of(url, workers, shard_by="rank_and_worker", rank=rank, world_size=world)

    read: list[str] = []
    states = []
    for rank in range(2):
        _, loader = of_rank(rank, 2, 2)
        read += itertools.chain(*itertools.islice(iter(loader), 1 + rank))
        states.append(loader.state_dict())
    merged = through_json(merge_states(states))
    for rank, workers in ((0, 2), (1, 2), (2, 2)):
        dataset, loader = of_rank(rank, 3, workers)
        dataset.load_state_dict(merged)
        read += itertools.chain(*loader)
        assert len(list(itertools.chain(*loader))) in (7, 8)  # the next epoch is complete
    assert sorted(read) == [f"{i:02d}" for i in range(COUNT)]


def test_a_loaded_state_goes_with_a_pickle(url: str) -> None:
    dataset = make(url)
    whole = list(dataset)
    list(itertools.islice(iter(dataset), 4))
    resumed = make(url)
    resumed.load_state_dict(dataset.state_dict())
    copy = pickle.loads(pickle.dumps(resumed))
    assert list(copy) == whole[4:]
