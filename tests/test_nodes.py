"""Nodes: the same samples in the same order, wherever a run is interrupted, with any nodes before or after."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
from azure.core.exceptions import ResourceNotFoundError
from torchdata.nodes import BaseNode, Batcher, IterableWrapper, Loader, Mapper, ParallelMapper, Prefetcher

from azstoragetorch import TransferConfig
from azstoragetorch._engine.threads import engine_for
from azstoragetorch.exceptions import BlobChangedError
from azstoragetorch.nodes import BlobInfo, BlobLister, BlobRange, BlobReader, BlobSharder, ShuffleBuffer
from tests.azurite.container import Container
from tests.faults import FaultService, Hold, Match, Status, Together, Torn
from tests.support import collect_garbage, wait_until

COUNT = 13
SMALL = TransferConfig(part_size=64 << 10, memory_limit=1 << 20, max_connections=4, max_attempts=3, max_backoff=0.01)


def content(number: int) -> bytes:
    return bytes([number % 251]) * (number * 7919 % 200_000)


def fill(service: FaultService, count: int = COUNT) -> list[str]:
    for number in range(count):
        service.put("data", f"{number:03d}", content(number))
    return [service.blob_url("data", f"{number:03d}") for number in range(count)]


def name_of(sample: tuple[str, bytes]) -> str:
    return sample[0].rpartition("/")[2]


def lister(service: FaultService) -> BlobLister:
    return BlobLister(service.container_url("data"), credential=False)


def read(source: Any) -> BlobReader:
    return BlobReader(source, credential=False, transfer=SMALL)


GRAPHS: dict[str, Callable[[FaultService], Any]] = {
    "list": lister,
    "shard": lambda service: BlobSharder(lister(service), 1, 2),
    "read": lambda service: Mapper(read(lister(service)), name_of),
    "shuffle": lambda service: ShuffleBuffer(lister(service), 5, seed=1),
    "shuffle all": lambda service: ShuffleBuffer(BlobSharder(lister(service), 0, 2), 1000),
    "prefetcher behind": lambda service: Prefetcher(Mapper(read(ShuffleBuffer(lister(service), 4)), name_of), 3),
    "prefetcher in front": lambda service: Mapper(read(ShuffleBuffer(Prefetcher(lister(service), 3), 4)), name_of),
    "mapper in front": lambda service: Mapper(read(ParallelMapper(lister(service), url_of, num_workers=2)), name_of),
    "mapper behind": lambda service: ParallelMapper(read(ShuffleBuffer(lister(service), 6)), name_of, num_workers=2),
    "batcher": lambda service: Batcher(Mapper(read(ShuffleBuffer(lister(service), 6)), name_of), 3, drop_last=False),
    "snapshots now and then": lambda service: Prefetcher(read(lister(service)), 2, snapshot_frequency=3),
}  # fmt: skip


def url_of(info: BlobInfo) -> str:
    return info.url


@pytest.mark.parametrize("graph", GRAPHS)
def test_it_resumes_exactly_at_any_point(fault_service: FaultService, graph: str) -> None:
    """Also into the next epoch; a state is JSON, small, and does not change later."""
    fill(fault_service)
    loader = Loader(GRAPHS[graph](fault_service))
    epochs = [list(loader), list(loader)]
    assert len(epochs[0]) == len(epochs[1]) > 0
    for stop in sorted({0, 1, 4, 5, 6, len(epochs[0]) - 1, len(epochs[0])} & set(range(len(epochs[0]) + 1))):
        first = Loader(GRAPHS[graph](fault_service))
        samples = iter(first)
        assert [next(samples) for _ in range(stop)] == epochs[0][:stop]
        state = first.state_dict()
        text = json.dumps(state)
        list(samples)
        assert json.dumps(state) == text
        assert len(text) < 1000
        second = Loader(GRAPHS[graph](fault_service))
        second.load_state_dict(json.loads(text))
        assert list(second) == (epochs[0][stop:] or epochs[1])
        if stop < len(epochs[0]):
            assert list(second) == epochs[1]


def test_the_reader_reads_every_blob_in_order(container: Container) -> None:
    for number in range(6):
        container.put(f"{number}", content(number))
    node = BlobReader(BlobLister(container.url, credential=container.key), credential=container.key, transfer=SMALL)
    assert list(Loader(node)) == [(container.blob_url(f"{number}"), content(number)) for number in range(6)]


def test_it_takes_urls_infos_and_ranges(fault_service: FaultService) -> None:
    etag = fault_service.put("data", "a", b"one\ntwo\nthree\n")
    url = fault_service.blob_url("data", "a")
    items = [url, BlobInfo(url, 14, etag), BlobRange(url, 2, 6, 14, etag), BlobRange(url, 2, 6, 14, etag, b"\n")]
    expected = [b"one\ntwo\nthree\n", b"one\ntwo\nthree\n", b"e\ntw", b"two\n"]
    assert [data for _, data in Loader(read(IterableWrapper(items)))] == expected
    fault_service.put("data", "a", b"new")
    with pytest.raises(BlobChangedError):
        list(Loader(read(IterableWrapper(items[2:]))))


def test_many_are_in_progress_and_bounded(fault_service: FaultService) -> None:
    fill(fault_service, 40)
    fault_service.latency = 0.02
    fault_service.script("get_blob", [Together(4)], repeat=True)
    node = BlobReader(lister(fault_service), concurrency=6, memory_limit=64 << 20, credential=False)
    assert sum(1 for _ in Loader(node)) == 40
    assert 4 <= fault_service.peak_active <= 7


def test_ranks_share_everything(fault_service: FaultService) -> None:
    urls = fill(fault_service)
    shares = [[info.url for info in Loader(BlobSharder(lister(fault_service), rank, 3))] for rank in range(3)]
    assert [shares[0], shares[1], shares[2]] == [urls[0::3], urls[1::3], urls[2::3]]
    assert len(list(Loader(BlobSharder(lister(fault_service))))) == COUNT
    for arguments in ((1, None), (2, 2), (-1, 2)):
        with pytest.raises(ValueError, match=r"rank"):
            BlobSharder(lister(fault_service), *arguments)


def test_shuffles_are_complete_and_differ_by_epoch_and_seed(fault_service: FaultService) -> None:
    urls = fill(fault_service)
    loader = Loader(Mapper(ShuffleBuffer(lister(fault_service), 5, seed=1), url_of))
    epochs = [list(loader) for _ in range(3)]
    assert all(Counter(epoch) == Counter(urls) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    other = list(Loader(Mapper(ShuffleBuffer(lister(fault_service), 5, seed=2), url_of)))
    assert other not in epochs
    with pytest.raises(ValueError, match="buffer_size"):
        ShuffleBuffer(lister(fault_service), 0)


def test_broken_answers_are_repaired(fault_service: FaultService) -> None:
    fill(fault_service)
    fault_service.script("get_blob", [Torn(after=3), Status(503)])
    assert [data for _, data in Loader(read(lister(fault_service)))] == [content(number) for number in range(COUNT)]


def test_an_error_comes_in_its_turn_and_the_state_is_before_it(fault_service: FaultService) -> None:
    urls = fill(fault_service, 5)
    urls.insert(2, fault_service.blob_url("data", "late"))

    loader = Loader(read(IterableWrapper(urls)))
    samples = iter(loader)
    assert [next(samples)[0] for _ in range(2)] == urls[:2]
    with pytest.raises(ResourceNotFoundError, match="data/late"):
        next(samples)
    fault_service.put("data", "late", b"here")
    resumed = Loader(read(IterableWrapper(urls)))
    resumed.load_state_dict(loader.state_dict())
    assert [url for url, _ in resumed] == urls[2:]


@pytest.mark.parametrize("change", ["added", "removed", "emptied"])
def test_a_changed_listing_raises_instead_of_resuming_wrongly(fault_service: FaultService, change: str) -> None:
    fill(fault_service)
    loader = Loader(lister(fault_service))
    samples = iter(loader)
    for _ in range(6):
        next(samples)
    state = loader.state_dict()
    if change == "added":
        fault_service.put("data", "0000", b"")
    for number in {"removed": [3], "emptied": range(COUNT)}.get(change, []):
        fault_service.delete("data", f"{number:03d}")
    resumed = Loader(lister(fault_service))
    resumed.load_state_dict(state)
    with pytest.raises(ValueError, match="added or removed"):
        list(resumed)


def test_a_state_of_another_node_is_refused(fault_service: FaultService) -> None:
    fill(fault_service)
    state = Loader(BlobSharder(lister(fault_service), 0, 2)).state_dict()
    resumed = Loader(BlobSharder(lister(fault_service), 1, 2))
    resumed.load_state_dict(state)
    with pytest.raises(ValueError, match="rank 0 of 2"):
        iter(resumed)
    state = Loader(ShuffleBuffer(lister(fault_service), seed=1)).state_dict()
    resumed = Loader(ShuffleBuffer(lister(fault_service), seed=2))
    resumed.load_state_dict(state)
    with pytest.raises(ValueError, match="seed=1"):
        iter(resumed)


class Live(BaseNode[str]):  # type: ignore[misc]
    """A source of another library that returns the dict that it keeps using, and fails once."""

    def __init__(self, items: list[str], failing: int = -1) -> None:
        super().__init__()
        self.items = items
        self.failing = failing
        self.state: dict[str, Any] = {"at": 0}

    def reset(self, initial_state: dict[str, Any] | None = None) -> None:
        super().reset(initial_state)
        self.state["at"] = 0 if initial_state is None else initial_state["at"]

    def next(self) -> str:
        if self.state["at"] == self.failing:
            self.failing = -1
            raise ConnectionError("once")
        if self.state["at"] == len(self.items):
            raise StopIteration
        self.state["at"] += 1
        return self.items[self.state["at"] - 1]

    def get_state(self) -> dict[str, Any]:
        return self.state


LIVE: dict[str, Callable[[Any], Any]] = {
    "shard": lambda source: BlobSharder(source, 0, 2),
    "read": read,
    "shuffle": lambda source: ShuffleBuffer(source, 4),
}


@pytest.mark.parametrize("kind", LIVE)
def test_a_state_is_a_copy_of_a_foreign_source_too(fault_service: FaultService, kind: str) -> None:
    urls = fill(fault_service)
    whole = list(Loader(LIVE[kind](Live(urls))))
    node = LIVE[kind](Live(urls))
    assert [next(node) for _ in range(3)] == whole[:3]
    state = node.state_dict()
    list(node)
    resumed = LIVE[kind](Live(urls))
    resumed.reset(state)
    assert list(resumed) == whole[3:]


def test_a_source_that_fails_while_a_buffer_is_drawn_loses_nothing() -> None:
    items = [str(number) for number in range(7)]
    node = ShuffleBuffer(Live(items, failing=2), 5)
    with pytest.raises(ConnectionError):
        next(node)
    assert list(node) == list(ShuffleBuffer(Live(items), 5))


# -- reset while another thread is inside ------------------------------------------------------------------------------


class Slow(BaseNode[str]):  # type: ignore[misc]
    """A source of another library whose third item is slow in the first iteration."""

    def __init__(self, items: list[str]) -> None:
        super().__init__()
        self.items = items
        self.resets = 0

    def reset(self, initial_state: dict[str, Any] | None = None) -> None:
        super().reset(initial_state)
        self.resets += 1
        self.at = 0 if initial_state is None else initial_state["at"]

    def next(self) -> str:
        if self.at == 2 and self.resets == 1:
            time.sleep(1.5)
        if self.at == len(self.items):
            raise StopIteration
        self.at += 1
        return self.items[self.at - 1]

    def get_state(self) -> dict[str, Any]:
        return {"at": self.at}


def waits(thread: threading.Thread) -> bool:
    """Whether *thread* waits for a read."""
    frame = sys._current_frames().get(thread.ident or 0)
    return frame is not None and any(below.f_code.co_name == "wait_until" for below, _ in traceback.walk_stack(frame))


def wait_for(holds: Callable[[], Any]) -> None:
    deadline = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.fixture
def gate() -> Iterator[threading.Event]:
    gate = threading.Event()
    yield gate
    gate.set()


@pytest.mark.parametrize("wrap", ["none", "prefetcher", "mapper"])
def test_re_iterating_while_a_read_blocks_loses_and_steals_nothing(
    fault_service: FaultService, gate: threading.Event, wrap: str
) -> None:
    """The blocked read is interrupted; the thread that waited for it gets no item of the new iteration."""
    fill(fault_service)
    rule = fault_service.script(Match("get_blob", path="data/002"), [Hold(gate)])
    node: Any = read(ShuffleBuffer(lister(fault_service), 1))
    if wrap == "prefetcher":
        node = Prefetcher(node, 8)
    elif wrap == "mapper":
        node = ParallelMapper(node, tuple, num_workers=2)
    loader = Loader(node)
    samples = iter(loader)
    next(samples)
    stolen: list[Any] = []
    if wrap == "none":
        thread = threading.Thread(target=lambda: stolen.extend(node))
        thread.start()
    wait_for(lambda: rule.fired)
    if wrap == "none":
        wait_for(lambda: len(stolen) == 1 and waits(thread))
    whole = list(loader)  # nobody waits for the read that blocks
    assert [name_of(sample) for sample in whole] == [f"{number:03d}" for number in range(COUNT)]
    if wrap == "none":
        thread.join(240)
        assert not thread.is_alive()
        assert [name_of(sample) for sample in stolen] == ["001"]


@pytest.mark.parametrize("between", [False, True])
def test_re_iterating_while_a_foreign_source_blocks(fault_service: FaultService, between: bool) -> None:
    urls = fill(fault_service)
    source: Any = Slow(urls)
    if between:
        source = Prefetcher(source, 2)
    loader = Loader(Prefetcher(read(source), 4))
    samples = iter(loader)
    next(samples)
    assert [url for url, _ in loader] == urls


def test_resetting_often_never_loses_a_sample(fault_service: FaultService) -> None:
    fill(fault_service)
    fault_service.latency = 0.003
    loader = Loader(Prefetcher(read(ShuffleBuffer(lister(fault_service), 4)), 3))
    for taken in range(8):
        samples = iter(loader)
        for _ in range(taken):
            next(samples)
    assert Counter(map(name_of, loader)) == Counter(f"{number:03d}" for number in range(COUNT))


# -- the module --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "older",
    [
        "import sys; sys.modules['torchdata'] = None",
        "import sys; sys.modules['torchdata.nodes'] = None",  # up to 0.9
        "import torchdata; torchdata.__version__ = '0.10.1+cpu'",  # the nodes of 0.10 were a preview
    ],
)
def test_an_older_torchdata_is_an_error_that_says_what_is_needed(older: str) -> None:
    program = f"{older}\nimport azstoragetorch.nodes"
    answer = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=100)
    assert answer.returncode != 0
    assert "azstoragetorch.nodes needs torchdata 0.11 or newer" in answer.stderr


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({"concurrency": 0}, ValueError, "max_connections"),
        ({"memory_limit": 1}, ValueError, "memory_limit"),
        ({"credential": "key"}, TypeError, "credential"),
        ({"memorylimit": 1}, TypeError, "memorylimit"),
    ],
)
def test_wrong_arguments_fail_at_once(arguments: dict[str, Any], error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        BlobReader(IterableWrapper([]), **arguments)


def test_a_reader_that_is_dropped_gives_everything_back(fault_service: FaultService) -> None:
    fill(fault_service)
    transfer = replace(SMALL, max_connections=5)  # a separate engine
    budget = engine_for(transfer).budget
    reader = BlobReader(lister(fault_service), credential=False, transfer=transfer)
    assert next(reader)[1] == content(0)
    assert budget.in_flight > 0
    del reader
    collect_garbage()
    wait_until(lambda: budget.in_flight == 0)
