"""An interrupt, a transfer in a handler, or a finalizer at every line of the engine and of transfers.

None of them hangs, loses bytes of the budget, or breaks the next transfer.
"""

from __future__ import annotations

import gc
import itertools
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from types import ModuleType
from typing import Any

import pytest

from azstoragetorch._blob import admission, download, first_part, listing, multiplex, readahead, retry, takeover, window
from azstoragetorch._blob.admission import forget_admissions
from azstoragetorch._blob.client import BlobClient, ClientFactory
from azstoragetorch._blob.readahead import ReadAhead
from azstoragetorch._engine import budget, job, metrics, pacing, process, scope, threads
from azstoragetorch._engine.config import KiB, TransferConfig
from azstoragetorch._engine.scope import Scope
from azstoragetorch._engine.threads import Engine, engine_for
from azstoragetorch._samples import prefetch
from azstoragetorch._samples.fetching import fetch_ahead
from azstoragetorch._samples.prefetch import OrderedPrefetch
from tests.faults import FaultService
from tests.faults.faults import Match, Status
from tests.process.interrupts import Run, collecting, interrupt, sweep
from tests.support import QUICK, blob_client, collect_garbage, container_client, content, wait_until

FILES: list[ModuleType] = [budget, job, metrics, process, scope, threads, readahead, window, download, listing]
FILES += [multiplex, first_part, takeover, prefetch, admission, pacing, retry]
SIZE = 600 * KiB
NAMES = [f"{number:02}" for number in range(12)]
_limits = itertools.count(20)


@pytest.fixture
def transfer() -> TransferConfig:
    """A configuration whose engine no other test uses."""
    return replace(QUICK, max_connections=next(_limits))


@pytest.fixture
def service(fault_service: FaultService) -> FaultService:
    fault_service.keeps_log = False
    fault_service.put("c", "large", content(SIZE))
    fault_service.put("c", "other", content(200 * KiB, 1))
    for name in NAMES:
        fault_service.put("small", name, content(2000))
    return fault_service


class Actor:
    """One kind of transfer: created, run in part or in full, closed; then the budget has all bytes again."""

    def __init__(self, service: FaultService, transfer: TransferConfig) -> None:
        self.service = service
        self.transfer = transfer

    def act(self) -> None:
        raise NotImplementedError

    def close(self) -> None:
        """Close it, as its owner always does."""


class Reading(Actor):
    """Sequential, tail, random and large reads: everything that the window does."""

    def __init__(self, service: FaultService, transfer: TransferConfig) -> None:
        super().__init__(service, transfer)
        client = blob_client(service.blob_url("c", "large"), transfer)
        self.reader = ReadAhead(client.service, client.url)

    def act(self) -> None:
        data = content(SIZE)
        for at in (0, 1000, 2000, SIZE - 100, 3000, 100 * KiB, 90 * KiB):
            assert self.reader.read(at, 1000) == data[at : at + 1000]
        assert self.reader.read(0) == data

    def close(self) -> None:
        self.reader.close()


class Prefetching(Actor):
    """Small blobs on one thread, with results in order."""

    def __init__(self, service: FaultService, transfer: TransferConfig) -> None:
        super().__init__(service, transfer)
        urls = [service.blob_url("small", name) for name in NAMES]
        blob_client(urls[0], transfer).read()  # so that a connection is idle, and the multiplexer begins a read
        self.ahead: OrderedPrefetch[Any, Any] = fetch_ahead(ClientFactory(False, transfer), urls, depth=6)

    def act(self) -> None:
        assert [item.result().data for item in self.ahead] == [content(2000)] * len(NAMES)

    def close(self) -> None:
        self.ahead.close()


class Mapping(Actor):
    """Calls on several threads."""

    def __init__(self, service: FaultService, transfer: TransferConfig) -> None:
        super().__init__(service, transfer)
        self.running: set[int] = set()

    def act(self) -> None:
        def call(number: int, _scope: Scope) -> int:
            self.running.add(number)
            try:
                return number * number
            finally:
                self.running.discard(number)

        results = engine_for(self.transfer).map(call, iter(range(20)), 4)
        assert results == [number * number for number in range(20)]

    def close(self) -> None:
        assert not self.running


class Listing(Actor):
    """Several pages; the next one is fetched while one is used."""

    def __init__(self, service: FaultService, transfer: TransferConfig) -> None:
        super().__init__(service, transfer)
        client = container_client(service.container_url("small"), transfer)
        self.pages: Iterator[Any] = listing.list_pages(client.service, client.url, page_size=5)

    def act(self) -> None:
        assert [name for page in self.pages for name in page.names] == NAMES

    def close(self) -> None:
        self.pages.close()  # type: ignore[attr-defined]


class Throttled(Actor):
    """Reads of a service that refuses some requests: waiting for turns, probes, and being woken."""

    def act(self) -> None:
        forget_admissions()
        self.service.script(Match("get_blob", every=2), [Status(503), Status(429, retry_after=0.002), Status(503)])
        patient = replace(self.transfer, max_attempts=100)  # one request can get all refusals
        clients = [blob_client(self.service.blob_url("small", name), patient) for name in NAMES[:4]]
        assert engine_for(self.transfer).map(lambda client, _: client.read()[0], clients, 3) == [content(2000)] * 4

    def close(self) -> None:
        self.service.clear_script()
        forget_admissions()


class Borrowing(Actor):
    """Loans with waiting, and buffers."""

    engine: Engine | None = None

    def act(self) -> None:
        engine = self.engine = Engine(2, 1000)
        with engine.budget.wait_for(800), engine.budget.wait_for(200):
            assert engine.budget.take(1) is None
            engine.buffers.give_back(engine.buffers.take(100))
        assert engine.budget.in_flight == 0

    def close(self) -> None:
        """Check that no waiter is left in the queue, for which others would wait."""
        assert self.engine is None or self.engine.budget.take(1) is not None


ACTORS = [Reading, Prefetching, Mapping, Listing, Throttled, Borrowing]


def visit(
    actor: type[Actor], service: FaultService, transfer: TransferConfig, do: Callable[[], object], turns: int
) -> None:
    """Sweep over *actor*; after each visit nothing is on loan, and the same transfer succeeds."""

    def check(state: Actor, run: Run) -> None:
        if do is interrupt:
            assert run.error is None or isinstance(run.error, KeyboardInterrupt), repr(run.error)
        else:
            assert run.error is None, repr(run.error)
        state.close()
        wait_until(lambda: engine_for(transfer).budget.in_flight == 0)
        again = actor(service, transfer)
        again.act()
        again.close()

    collect_garbage()
    gc.disable()  # nothing must depend on it
    try:
        sweep(lambda: actor(service, transfer), lambda state: state.act(), check, files=FILES, do=do, turns=turns)
    finally:
        gc.enable()


pytestmark = [
    pytest.mark.untraced,
    pytest.mark.timeout(600),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),  # for sockets that an interrupt leaves to the collector
]


@pytest.mark.parametrize("actor", ACTORS, ids=lambda actor: actor.__name__)
def test_an_interrupt_at_every_line_loses_nothing(
    actor: type[Actor], service: FaultService, transfer: TransferConfig
) -> None:
    visit(actor, service, transfer, interrupt, turns=1)


@pytest.mark.slow
@pytest.mark.parametrize("actor", ACTORS, ids=lambda actor: actor.__name__)
def test_a_handler_transfers_at_every_line(actor: type[Actor], service: FaultService, transfer: TransferConfig) -> None:
    """It reads, lists and writes with the interrupted engine."""
    blob = blob_client(service.blob_url("c", "other"), transfer)

    def handle() -> None:
        assert blob.read()[0] == content(200 * KiB, 1)
        BlobClient.put(blob_client(service.blob_url("c", "written"), transfer), content(200 * KiB, 2))

    visit(actor, service, transfer, handle, turns=1)
    assert service.get("c", "written") == content(200 * KiB, 2)


@pytest.mark.slow
@pytest.mark.parametrize("actor", ACTORS, ids=lambda actor: actor.__name__)
def test_finalizers_run_at_every_line(actor: type[Actor], service: FaultService, transfer: TransferConfig) -> None:
    """Readers, iterations and listings that were not closed are collected in the engine."""

    class Dropped:
        """Closes its transfers like the public classes."""

        def __init__(self) -> None:
            self.reading = Reading(service, transfer)
            self.reading.reader.read(0, 1000)
            self.ahead = Prefetching(service, transfer).ahead
            next(self.ahead)
            self.pages = Listing(service, transfer).pages
            next(self.pages)

        def __del__(self) -> None:
            self.reading.reader.abandon()
            self.ahead.abandon()

    visit(actor, service, transfer, collecting(Dropped), turns=1)


def test_an_interrupt_while_threads_are_made_costs_none() -> None:
    """As many tasks as the engine may have threads run at once, wherever an interrupt came."""

    def act(engine: Engine) -> None:
        for _ in range(3):
            engine.submit(int)

    def check(engine: Engine, run: Run) -> None:
        together = threading.Barrier(4)
        for _ in range(3):
            engine.submit(partial(together.wait, 240))
        together.wait(240)

    sweep(lambda: Engine(3, 1 << 20), act, check, files=[threads], do=interrupt)
