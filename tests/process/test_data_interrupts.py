"""Datasets, pipes and nodes: an interrupt, or a handler that uses this library, at every line of an iteration.

No sample is lost or repeated, no byte of the budget stays on loan, and nothing hangs.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import pytest

import azstoragetorch.datapipes._reading as reading
import azstoragetorch.datasets._iteration as iteration
import azstoragetorch.datasets._map as batches
import azstoragetorch.nodes as nodes
from azstoragetorch._engine.threads import engine_for
from azstoragetorch._samples import steps
from azstoragetorch.datasets import Blob, BlobDataset, IterableBlobDataset
from azstoragetorch.io import BlobIO
from tests.faults import FaultService
from tests.process.interrupts import Run, interrupt, sweep
from tests.support import QUICK, collect_garbage, content, wait_until

COUNT = 3
NAMES = [str(number) for number in range(COUNT)]
TRANSFER = replace(QUICK, max_connections=3)


def fill(service: FaultService) -> str:
    for number, name in enumerate(NAMES):
        service.put("data", name, content(300, number))
    return service.container_url("data")


def checked_name(blob: Blob) -> str:
    with blob.reader() as reader:
        assert reader.read() == content(300, int(blob.blob_name))
    return blob.blob_name


@dataclass
class Reading:
    """An iteration and the items that it has yielded."""

    samples: Any
    owner: Any = None
    yielded: list[str] = field(default_factory=list)
    states: list[Any] = field(default_factory=list)

    def take(self, count: int = 2) -> None:
        for _ in range(count):
            self.yielded.append(next(self.samples))


def iterable(url: str) -> IterableBlobDataset[str]:
    return IterableBlobDataset.from_container_url(url, credential=False, transfer=TRANSFER, transform=checked_name)


def check_all_are_read(reading: Reading, run: Run) -> None:
    """After an interrupt the same iterator continues with the remaining items."""
    assert run.error is None or isinstance(run.error, KeyboardInterrupt)
    assert [*reading.yielded, *reading.samples] == NAMES
    reading.samples = None
    wait_until(lambda: engine_for(TRANSFER).budget.in_flight == 0)


def test_an_interrupted_dataset_continues_where_it_was(fault_service: FaultService) -> None:
    dataset = iterable(fill(fault_service))
    sweep(
        lambda: Reading(iter(dataset)),
        Reading.take,
        check_all_are_read,
        files=[iteration],
        do=interrupt,
        turns=1,
    )


def other_work(service: FaultService, name: str) -> Callable[[], None]:
    """What a signal handler can do: read another dataset, write a blob."""
    other = iterable(service.container_url("data"))
    service.create_container("saved")

    def read() -> None:
        assert list(other) == NAMES

    def write() -> None:
        with BlobIO(service.blob_url("saved", "step"), "wb", credential=False, transfer=TRANSFER) as file:
            file.write(content(70_000))

    return {"read": read, "write": write}[name]


@pytest.mark.parametrize("work", ["read", "write"])
def test_a_handler_inside_a_dataset_can_work(fault_service: FaultService, work: str) -> None:
    dataset = iterable(fill(fault_service))
    sweep(
        lambda: Reading(iter(dataset)),
        lambda reading: reading.take(2),
        check_all_are_read,
        files=[iteration],
        do=other_work(fault_service, work),
        turns=1,
        after_calls=False,
    )


def test_a_state_taken_by_a_handler_resumes_at_the_very_sample(fault_service: FaultService) -> None:
    """The sample in progress when the handler runs counts as not yet yielded."""
    url = fill(fault_service)
    dataset = iterable(url)
    states: list[Any] = []

    def check(reading: Reading, run: Run) -> None:
        state = states.pop()
        resumed = iterable(url)
        resumed.load_state_dict(json.loads(json.dumps(state)))
        rest = list(resumed)
        assert rest == NAMES[len(NAMES) - len(rest) :]
        in_transform = run.place.code.co_name == "apply"
        assert run.result is None
        assert not in_transform or NAMES[0] in rest
        assert [*reading.yielded, *reading.samples] == NAMES

    import azstoragetorch.datasets._blobs as blobs

    sweep(
        lambda: Reading(iter(dataset)),
        lambda reading: reading.take(1),
        check,
        files=[iteration, blobs],
        do=lambda: states.append(dataset.state_dict()),
        turns=1,
    )


def test_an_interrupted_batch_leaves_nothing_behind(fault_service: FaultService) -> None:
    url = fill(fault_service)
    dataset = BlobDataset.from_container_url(url, credential=False, transfer=TRANSFER, transform=checked_name)

    def check(_: Any, run: Run) -> None:
        assert run.error is None or isinstance(run.error, KeyboardInterrupt)
        assert dataset.__getitems__([0, 1]) == NAMES[:2]
        assert dataset.__getitems__([2, 0]) == ["2", "0"]

    sweep(lambda: None, lambda _: dataset.__getitems__([0, 1]), check, files=[batches], do=interrupt, turns=1)
    collect_garbage()  # the interrupts, which their tracers refer to
    wait_until(lambda: engine_for(TRANSFER).budget.in_flight == 0)


def lister(url: str) -> Any:
    return nodes.BlobLister(url, credential=False, transfer=TRANSFER)


def reader(source: Any) -> Any:
    return nodes.BlobReader(source, credential=False, transfer=TRANSFER)


GRAPHS: dict[str, Callable[[str], Any]] = {
    "list": lister,
    "shard": lambda url: nodes.BlobSharder(lister(url), 0, 1),
    "shuffle": lambda url: nodes.ShuffleBuffer(lister(url), 2, seed=1),
    "read": lambda url: reader(nodes.ShuffleBuffer(lister(url), 3, seed=2)),
}


def plain(item: Any) -> Any:
    return item if isinstance(item, tuple) else (item,)


@pytest.mark.parametrize("graph", GRAPHS)
@pytest.mark.parametrize("work", ["interrupt", "state", "reset"])
def test_nodes_lose_nothing(fault_service: FaultService, graph: str, work: str) -> None:
    """An interrupted step yields its item on the next call; a handler can save the state, or start again."""
    url = fill(fault_service)
    whole = list(GRAPHS[graph](url))
    assert len(whole) == COUNT
    present: list[Reading] = []

    def set_up() -> Reading:
        node = GRAPHS[graph](url)
        next(node)
        node.reset(node.state_dict())
        present[:] = [Reading(node, yielded=whole[:1])]
        return present[0]

    def do() -> None:
        reading = present[0]
        if work == "interrupt":
            raise KeyboardInterrupt
        if work == "state":
            reading.states.append(reading.samples.state_dict())
        else:
            reading.samples.reset({**before, "position": 0, "trace": 0} if graph == "list" else before)

    before = GRAPHS[graph](url).state_dict()

    def check(reading: Reading, run: Run) -> None:
        assert run.error is None or isinstance(run.error, (KeyboardInterrupt, StopIteration))
        if work == "reset":
            # The step ends without an item, with the item that it had, or, if it had not started yet, in the new run.
            begun = reading.yielded[1:] if reading.yielded[1:] == whole[:1] else []
            assert [*begun, *reading.samples] == whole
        else:
            assert [*reading.yielded, *reading.samples] == whole
        if reading.states:
            resumed = GRAPHS[graph](url)
            resumed.reset(json.loads(json.dumps(reading.states[0])))
            rest = list(resumed)
            assert rest == whole[COUNT - len(rest) :]
            assert len(rest) >= COUNT - 2
        reading.samples = None
        present.clear()

    sweep(
        set_up,
        lambda reading: reading.take(1),
        check,
        files=[nodes, steps],
        do=do,
        turns=1,
        after_calls=work != "reset",
    )
    wait_until(lambda: engine_for(TRANSFER).budget.in_flight == 0)


def test_an_interrupted_pipe_gives_its_bytes_back(fault_service: FaultService) -> None:
    from azstoragetorch.datapipes import AzureBlobFileLister

    url = fill(fault_service)
    pipe = AzureBlobFileLister(url, credential=False).read_files_by_azure(credential=False, transfer=TRANSFER)

    def check(reading: Reading, run: Run) -> None:
        assert run.error is None or isinstance(run.error, KeyboardInterrupt)
        reading.samples = None
        run.error = None
        wait_until(lambda: engine_for(TRANSFER).budget.in_flight == 0)
        assert [data for _, data in pipe] == [content(300, number) for number in range(COUNT)]

    sweep(
        lambda: Reading(iter(pipe)),
        lambda taking: taking.take(2),
        check,
        files=[reading],
        do=interrupt,
        turns=1,
        after_calls=False,
    )
