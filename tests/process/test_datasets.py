"""Datasets across processes: every blob exactly once, with any start method of workers and ranks."""

from __future__ import annotations

import itertools
import json
import multiprocessing
import sys
import threading
import warnings
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch.distributed
from torch.utils.data import DataLoader

from azstoragetorch._samples.steps import State, Steps
from azstoragetorch.datasets import Blob, BlobDataset, IterableBlobDataset
from tests.azurite.container import Container
from tests.faults import FaultService, Match, Reset, Status, Torn
from tests.support import QUICK, content, run_python

COUNT = 25
NAMES = [f"{index:03d}" for index in range(COUNT)]


def checked_name(blob: Blob) -> str:
    with blob.reader() as reader:
        assert reader.read() == content(2000, int(blob.blob_name))
    return blob.blob_name


def url_of_filled(service: FaultService) -> str:
    for index, name in enumerate(NAMES):
        service.put("data", name, content(2000, index))
    return service.container_url("data")


def make(kind: Any, url: str, **options: Any) -> Any:
    options = {"credential": False, "transfer": QUICK, "transform": checked_name, **options}
    return kind.from_container_url(url, **options)


def matrix() -> list[Any]:
    """Of the cases that start processes with torch, one of each method is fast enough, and most are exhaustive."""
    samples = {(IterableBlobDataset, "spawn", 2, True, True), (IterableBlobDataset, "forkserver", 1, False, True)}
    kinds, contexts, both = (IterableBlobDataset, BlobDataset), ("fork", "spawn", "forkserver"), (False, True)
    alone = itertools.product(kinds, ("fork",), (0,), both, (False,))  # no process is started
    cases = [*alone, *itertools.product(kinds, contexts, (1, 2), both, both)]
    slow = [case for case in cases if case[1] != "fork" and case not in samples]
    marks = {case: [pytest.mark.exhaustive if number % 5 else pytest.mark.slow] for number, case in enumerate(slow)}
    return [pytest.param(*case, marks=marks.get(case, [])) for case in cases]


@pytest.mark.timeout(600)
@pytest.mark.parametrize(("kind", "context", "workers", "is_used_before", "is_persistent"), matrix())
def test_every_blob_exactly_once_in_each_of_two_epochs(
    fault_service: FaultService, kind: Any, context: str, workers: int, is_used_before: bool, is_persistent: bool
) -> None:
    url = url_of_filled(fault_service)
    dataset = make(kind, url)
    if is_used_before:
        assert (next(iter(dataset)) if kind is IterableBlobDataset else dataset[0]) == NAMES[0]
    loader = DataLoader(
        dataset,
        batch_size=3,
        num_workers=workers,
        collate_fn=list,
        multiprocessing_context=context if workers else None,
        persistent_workers=is_persistent,
    )
    fault_service.reset_log()
    for _ in range(2):
        assert Counter(name for batch in loader for name in batch) == Counter(NAMES)
    listings = len(fault_service.requests("list_blobs"))
    assert listings == (0 if kind is BlobDataset or is_used_before else 1)
    requests = Counter(request.blob for request in fault_service.requests("get_blob"))
    assert requests == Counter(NAMES * 2) or is_used_before  # plus what was read ahead when the first one was dropped


@pytest.mark.parametrize("persistent", [False, True])
def test_an_epoch_set_in_the_parent_reaches_workers(fault_service: FaultService, persistent: bool) -> None:
    url = url_of_filled(fault_service)
    dataset = make(IterableBlobDataset, url, shuffle=True, seed=3)
    loader = DataLoader(dataset, batch_size=None, num_workers=2, persistent_workers=persistent)
    alone = make(IterableBlobDataset, url, shuffle=True, seed=3)
    orders = []
    for epoch in (0, 1, 2, 1):
        dataset.set_epoch(epoch)
        alone.set_epoch(epoch)
        orders.append(list(loader))
        # Two workers, in turns, have the same order as one.
        assert orders[-1] == list(alone)
    assert orders[1] == orders[3]
    assert len({tuple(order) for order in orders}) == 3


@pytest.mark.parametrize(("even", "lengths"), [("none", {4, 5}), ("drop", {4}), ("pad", {5})])
def test_explicit_ranks_share_the_blobs(fault_service: FaultService, even: str, lengths: set[int]) -> None:
    url = url_of_filled(fault_service)
    shards = []
    for rank in range(3):
        dataset = make(IterableBlobDataset, url, shard_by="rank_and_worker", rank=rank, world_size=3, even=even)
        names = list(DataLoader(dataset, batch_size=None, num_workers=2))
        shards += [names[worker::2] for worker in range(2)] if even != "none" else [names]
    if even == "none":
        assert Counter(name for names in shards for name in names) == Counter(NAMES)
    else:
        assert {len(names) for names in shards} == lengths


def test_a_rank_without_samples_is_an_error_that_says_so(fault_service: FaultService) -> None:
    fault_service.put("data", "only", b"")
    url = fault_service.container_url("data")
    options: dict[str, Any] = {"shard_by": "rank_and_worker", "world_size": 2, "transform": None}
    assert len(list(make(IterableBlobDataset, url, rank=0, **options))) == 1
    dataset = make(IterableBlobDataset, url, rank=1, **options)
    for workers in (0, 1):
        with pytest.raises(ValueError, match="rank 1 of world_size 2 is left without samples: the dataset has 1"):
            list(DataLoader(dataset, batch_size=None, num_workers=workers))
    # Enough for the ranks, but not for all of their workers.
    for name in NAMES[:4]:
        fault_service.put("data", name, b"")
    for even, count in (("drop", None), ("pad", 3), ("none", 2)):
        dataset = make(IterableBlobDataset, url, rank=1, even=even, **options)
        loader = DataLoader(dataset, batch_size=None, num_workers=3)
        if count is None:
            with pytest.raises(ValueError, match=r"rank 1 .* has 5 \(even='drop', 6 shards\)"):
                list(loader)
        else:
            assert len(list(loader)) == count


def test_several_processes_without_a_process_group_are_not_taken_for_one(
    fault_service: FaultService, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    dataset = make(IterableBlobDataset, url_of_filled(fault_service), shard_by="rank_and_worker")
    with pytest.raises(ValueError, match=r"WORLD_SIZE=2, but torch\.distributed is not initialised"):
        iter(dataset)


def rank_main(rank: int, world: int, store: str, url: str, workers: int, context: str | None, folder: str) -> None:
    if world > 1:
        torch.distributed.init_process_group("gloo", f"file://{store}", rank=rank, world_size=world)
    dataset = make(IterableBlobDataset, url, shard_by="rank_and_worker", shuffle=True)
    loader = DataLoader(dataset, 4, num_workers=workers, collate_fn=list, multiprocessing_context=context)
    epochs = []
    for epoch in range(2):
        dataset.set_epoch(epoch)
        epochs.append([name for batch in loader for name in batch])
    Path(folder, str(rank)).write_text(json.dumps([epochs, dataset.metadata.fingerprint]))
    if world > 1:
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("world", "workers", "context"),
    [
        pytest.param(1, 0, None, marks=pytest.mark.slow),
        pytest.param(1, 2, "fork", marks=pytest.mark.slow),
        pytest.param(2, 0, None, marks=pytest.mark.slow),
        (2, 2, "fork"),
        pytest.param(2, 2, "spawn", marks=pytest.mark.exhaustive),
        pytest.param(2, 2, "forkserver", marks=pytest.mark.slow),
        (3, 0, None),
        pytest.param(3, 2, "fork", marks=pytest.mark.exhaustive),
    ],
)
def test_ranks_over_gloo_share_the_blobs(
    container: Container, tmp_path: Path, world: int, workers: int, context: str | None
) -> None:
    """Also in spawned workers, which have no process group."""
    for index, name in enumerate(NAMES):
        container.put(name, content(2000, index))
    container.client.set_container_access_policy({}, public_access="container")
    # A forked rank would use the fork server of this process.
    start = multiprocessing.get_context("spawn" if context == "forkserver" else "fork")
    ranks = [
        start.Process(
            target=rank_main,
            args=(rank, world, str(tmp_path / "store"), container.url, workers, context, str(tmp_path)),
        )
        for rank in range(world)
    ]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(200)
    assert [process.exitcode for process in ranks] == [0] * world
    told = [json.loads((tmp_path / str(rank)).read_text()) for rank in range(world)]
    assert len({fingerprint for _, fingerprint in told}) == 1
    for epoch in range(2):
        assert Counter(name for epochs, _ in told for name in epochs[epoch]) == Counter(NAMES)
    assert told[0][0][0] != told[0][0][1]
    assert all(len(epochs[0]) >= COUNT // world - workers for epochs, _ in told)


EPOCHS = """
import gc, os, sys
from dataclasses import replace
from pathlib import Path
from azstoragetorch.datasets import IterableBlobDataset
from tests.support import QUICK, idle_connections

patient = replace(QUICK, max_attempts=10)
dataset = IterableBlobDataset.from_container_url(sys.argv[1], credential=False, transfer=patient, shuffle=True)
after = []
for number in range(6):
    dataset.set_epoch(number)
    assert sum(len(sample["data"]) for sample in dataset) == int(sys.argv[2])
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    descriptors = len(list(Path("/proc/self/fd").iterdir()))
    after.append((pages * os.sysconf("SC_PAGE_SIZE"), descriptors - idle_connections()))
assert after[-1][0] - after[1][0] < 8 << 20, after
assert after[-1][1] <= max(descriptors for _, descriptors in after[:2]), after
assert idle_connections() <= QUICK.max_connections
"""


@pytest.mark.exhaustive
@pytest.mark.timeout(600)
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_ten_thousand_blobs_leave_memory_and_sockets_as_they_were(fault_service: FaultService) -> None:
    """While one request in fifty fails."""
    size, count = 2000, 10_000
    for index in range(count):
        fault_service.put("data", f"{index:05d}", content(size, index % 50))
    fault_service.keeps_log = False
    faults = [Status(503), Torn(after=1000), Status(500), Reset(), Status(429)]
    rule = fault_service.script(Match("get_blob", every=50), faults, repeat=True)
    run_python(EPOCHS, fault_service.container_url("data"), str(size * count), timeout=500)
    assert rule.fired > 1000


def warned_rank_main(rank: int, store: str, url: str, workers: int, folder: str, options: dict[str, Any]) -> None:
    torch.distributed.init_process_group("gloo", f"file://{store}", rank=rank, world_size=2)
    seen = Path(folder, str(rank))
    seen.touch()

    def note(message: Any, *_: Any, **__: Any) -> None:
        with seen.open("a") as file:  # also by forked workers
            file.write(f"{message}\n")

    warnings.simplefilter("always")
    warnings.showwarning = note
    loader = DataLoader(make(IterableBlobDataset, url, **options), 4, num_workers=workers, collate_fn=list)
    for _ in range(2):
        list(loader)
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(
    ("options", "count"), [({}, 1), ({"shard_by": "rank_and_worker"}, 0), ({"shard_by": "none"}, 0)]
)
def test_ranks_that_all_read_everything_are_warned_of_once(
    fault_service: FaultService, tmp_path: Path, workers: int, options: dict[str, Any], count: int
) -> None:
    """Once in each rank, with any number of workers and epochs; the warning says what to pass."""
    url = url_of_filled(fault_service)
    (tmp_path / "seen").mkdir()
    arguments = (str(tmp_path / "store"), url, workers, str(tmp_path / "seen"), options)
    start = multiprocessing.get_context("fork")
    ranks = [start.Process(target=warned_rank_main, args=(rank, *arguments)) for rank in range(2)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(240)
        assert process.exitcode == 0
    for rank in range(2):
        lines = (tmp_path / "seen" / str(rank)).read_text().splitlines()
        said = [line for line in lines if "each of the 2 ranks reads all blobs" in line]
        assert len(said) == count
        assert all("shard_by='rank_and_worker'" in line for line in said)


def finish(samples: Any, into: str) -> None:
    Path(into).write_text(json.dumps(list(samples)))


@pytest.mark.parametrize("connections", [1, 4])
def test_a_forked_child_can_continue_its_parents_iterator(
    fault_service: FaultService, tmp_path: Path, connections: int
) -> None:
    """What threads of the parent had started is read again; parent and child both yield all remaining items."""
    transfer = replace(QUICK, max_connections=connections)
    fault_service.latency = 0.02
    samples = iter(make(IterableBlobDataset, url_of_filled(fault_service), transfer=transfer))
    assert [next(samples) for _ in range(2)] == NAMES[:2]
    child = multiprocessing.get_context("fork").Process(target=finish, args=(samples, str(tmp_path / "names")))
    child.start()
    child.join(240)
    assert child.exitcode == 0
    assert json.loads((tmp_path / "names").read_text()) == NAMES[2:]
    assert list(samples) == NAMES[2:]


@pytest.mark.parametrize("connections", [1, 4])
def test_a_forked_child_can_take_a_batch_that_its_parent_reads_ahead(
    fault_service: FaultService, tmp_path: Path, connections: int
) -> None:
    transfer = replace(QUICK, max_connections=connections)
    dataset = make(BlobDataset, url_of_filled(fault_service), transfer=transfer)
    assert dataset.__getitems__(range(4)) == NAMES[:4]
    fork = multiprocessing.get_context("fork")
    child = fork.Process(target=take_batch, args=(dataset, str(tmp_path / "names")))
    child.start()
    child.join(240)
    assert child.exitcode == 0
    assert json.loads((tmp_path / "names").read_text()) == NAMES[4:8]
    assert dataset.__getitems__(range(4, 8)) == NAMES[4:8]


def test_a_forked_child_can_continue_while_a_thread_of_its_parent_takes_a_sample(
    fault_service: FaultService, tmp_path: Path
) -> None:
    """The step in progress belongs to the parent: the child starts with the same blob."""
    entered, go_on = threading.Event(), threading.Event()

    def stop_once(blob: Blob) -> str:
        if multiprocessing.parent_process() is None and not entered.is_set():
            entered.set()
            assert go_on.wait(60)
        return checked_name(blob)

    samples = iter(make(IterableBlobDataset, url_of_filled(fault_service), transform=stop_once))
    with ThreadPoolExecutor() as pool:
        try:
            first = pool.submit(next, samples)
            assert entered.wait(60)
            child = multiprocessing.get_context("fork").Process(target=finish, args=(samples, str(tmp_path / "names")))
            child.start()
            child.join(240)
        finally:
            go_on.set()
    assert child.exitcode == 0
    assert json.loads((tmp_path / "names").read_text()) == NAMES
    assert [first.result(), *samples] == NAMES


class _Count:
    """A run that counts its steps."""

    def __init__(self, state: State | None) -> None:
        self.state = state or {"steps": 0}

    def interrupt(self) -> None:
        pass

    def close(self) -> None:
        pass


class _Counting(Steps[int, _Count]):
    def __init__(self) -> None:
        super().__init__()
        self.entered, self.go_on = threading.Event(), threading.Event()

    def _begin(self, state: State | None) -> _Count:
        return _Count(state)

    def _step(self, run: _Count) -> int:
        if threading.current_thread() is not threading.main_thread():
            self.entered.set()
            assert self.go_on.wait(60)
        run.state = {"steps": run.state["steps"] + 1}
        return int(run.state["steps"])


def begin_and_step(steps: _Counting) -> None:
    steps.begin({"steps": 6})
    assert steps.next() == 7


def test_a_forked_child_can_reset_while_a_thread_of_its_parent_takes_a_step() -> None:
    """The step in progress belongs to the parent: the child does not wait for it."""
    steps = _Counting()
    with ThreadPoolExecutor() as pool:
        try:
            step = pool.submit(steps.next)
            assert steps.entered.wait(60)
            child = multiprocessing.get_context("fork").Process(target=begin_and_step, args=(steps,))
            child.start()
            child.join(240)
            child.kill()  # in case it still waits
            child.join()
        finally:
            steps.go_on.set()
        assert child.exitcode == 0
        assert step.result() == 1


def take_batch(dataset: Any, into: str) -> None:
    finish(dataset.__getitems__(range(4, 8)), into)
