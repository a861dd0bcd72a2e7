"""Many small blobs on one thread: the same bytes and errors as ordinary reads, whatever the service does."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
from azure.core.exceptions import AzureError, ResourceNotFoundError
from hypothesis import given, settings
from hypothesis import strategies as st

from azstoragetorch import TransferConfig, metrics
from azstoragetorch._blob import first_part, multiplex
from azstoragetorch._blob.client import ContainerClient, Head
from azstoragetorch._blob.credentials import CredentialHolder
from azstoragetorch._blob.first_part import Attempt, FirstPart
from azstoragetorch._blob.takeover import Takeover, UnfitError
from azstoragetorch._blob.transport import close_idle_connections
from azstoragetorch._blob.url import parse_container_url
from azstoragetorch._engine import job
from azstoragetorch._engine.job import IsStuck
from azstoragetorch._engine.scope import Scope
from azstoragetorch._engine.threads import start_thread
from azstoragetorch._samples.prefetch import OrderedPrefetch, Prefetched
from tests.faults.faults import (
    ChangedEtag,
    Chunked,
    CorruptByte,
    Fault,
    FullInsteadOfPartial,
    GarbageStatusLine,
    Hangup,
    Hold,
    Match,
    MissingHeader,
    Reset,
    ResetInHeaders,
    SlowBytes,
    StaleConnection,
    Stall,
    StallUntil,
    Status,
    Together,
    Torn,
    TornReset,
    WrongContentRange,
    WrongHeader,
    WrongLength,
)
from tests.faults.service import FaultService
from tests.process.interrupts import Run, interrupt, sweep
from tests.support import idle_connections, in_time, run_threads, taking, wait_until

QUICK = TransferConfig(max_backoff=0.01, part_size=64 << 10, max_connections=16)
IMPATIENT = replace(QUICK, read_timeout=0.8, max_attempts=20)  # others may take too long as well on a busy machine
COUNT = 60


@pytest.fixture
def blobs(fault_service: FaultService) -> dict[str, bytes]:
    made = {f"{i:03d}": os.urandom(1 + i * 997) for i in range(COUNT)}
    for name, data in made.items():
        fault_service.put("box", name, data)
    return made


def container(service: FaultService, config: TransferConfig = QUICK) -> ContainerClient:
    url = parse_container_url(service.container_url("box"))
    return ContainerClient(url, CredentialHolder(False, url.sas), config)


def prefetch(
    client: ContainerClient, names: Iterable[str], started: list[bool] | None = None
) -> OrderedPrefetch[str, Head]:
    """The heads of *names* in order, 16 at once; *started* gets whether the multiplexer could start each."""

    def start(name: str, scope: Scope, done: Callable[[Head], None], failed: Callable[[], None]) -> IsStuck | None:
        is_stuck = client.blob(name).start_head(scope, done, failed)
        if started is not None:
            started.append(is_stuck is not None)
        return is_stuck

    return OrderedPrefetch(
        client.engine,
        iter(names),
        lambda name, scope: client.blob(name).head(scope),
        cost=lambda _name: 64 << 10,
        size=lambda head: len(head.data),
        depth=16,
        start=start,
    )


def read_all(client: ContainerClient, names: list[str], started: list[bool] | None = None) -> list[Head]:
    ahead = prefetch(client, names, started)
    try:
        return [item.result() for item in ahead]
    finally:
        ahead.close()


def warm(client: ContainerClient, blobs: dict[str, bytes]) -> None:
    """Leave idle connections in the pool: the multiplexer uses only those."""
    close_idle_connections()
    wait_until(lambda: bool(read_all(client, list(blobs))) and idle_connections() > 1)


def test_order_bytes_and_one_request_each(fault_service: FaultService, blobs: dict[str, bytes]) -> None:
    """Heads are complete and in order, with one request each, over existing connections."""
    client = container(fault_service)
    warm(client, blobs)
    fault_service.reset_log()
    before, started = metrics(), list[bool]()
    heads = read_all(client, list(blobs), started)
    assert [head.data for head in heads] == list(blobs.values())
    assert all(head.version.size == len(head.data) for head in heads)
    assert len(fault_service.requests()) == COUNT
    assert started.count(True) > COUNT // 2
    seen = metrics() - before
    assert (seen.requests, seen.bytes_received) == (COUNT, sum(map(len, blobs.values())))
    assert client.engine.budget.in_flight == 0


@pytest.mark.parametrize(
    "faults",
    [
        [Status(503)],
        [Status(429, retry_after=0)],
        [Status(500), Status(500)],
        [Reset()],
        [ResetInHeaders()],
        [Hangup()],
        [Torn(after=0)],
        [Torn(after=100)],
        [TornReset(after=100)],
        [Stall(after=10, seconds=60)],
        [SlowBytes(200_000)],
        [WrongContentRange()],
        [WrongLength(delta=-1)],
        [WrongLength(delta=1)],
        [FullInsteadOfPartial()],
        [GarbageStatusLine()],
        [MissingHeader("ETag")],
        [MissingHeader("Content-Range")],
        [MissingHeader("x-ms-client-request-id")],
        [WrongHeader("x-ms-client-request-id", "another's")],
        [Chunked()],
        [StaleConnection()],
    ],
    ids=repr,
)
def test_exact_bytes_under_faults(fault_service: FaultService, blobs: dict[str, bytes], faults: list[Fault]) -> None:
    """Whatever happens to some responses, every blob is right, and nothing stays in flight."""
    client = container(fault_service, IMPATIENT if isinstance(faults[0], Stall) else QUICK)
    warm(client, blobs)
    names = [name for name, data in blobs.items() if len(data) > 200]
    for nth in (5, 20, 40):
        fault_service.script(Match("get_blob", path=f"{names[nth]}$"), faults)
    heads = read_all(client, names)
    assert [head.data for head in heads] == [blobs[name] for name in names]
    assert not fault_service.unused_faults()
    assert client.engine.budget.in_flight == 0


def test_connections_change_hands(fault_service: FaultService, blobs: dict[str, bytes]) -> None:
    """A connection can be used for multiplexed reads, then for an ordinary one with its timeout, and back."""
    client = container(fault_service, replace(QUICK, read_timeout=3.0))
    warm(client, blobs)
    before = metrics()
    for nth in range(5):
        started = list[bool]()
        read_all(client, list(blobs)[:4], started)
        assert all(started)
        for name in ("010", "020"):
            fault_service.script(Match("get_blob", path=f"{name}$"), [Stall(after=10, seconds=60)] if nth == 2 else [])
            assert client.blob(name).head().data == blobs[name]
    seen = metrics() - before
    assert (seen.requests, seen.retries, seen.connections) == (5 * 6 + 2, 2, 0)


def test_corrupt_bytes_are_noticed_where_asked_for(fault_service: FaultService, blobs: dict[str, bytes]) -> None:
    """With validate_content every head is checked."""
    client = container(fault_service, TransferConfig(max_backoff=0.01, validate_content=True, max_connections=16))
    warm(client, blobs)
    fault_service.script(Match("get_blob", path="030$"), [CorruptByte()])
    assert [head.data for head in read_all(client, list(blobs))] == list(blobs.values())


def test_refusals_have_their_type_and_place(fault_service: FaultService, blobs: dict[str, bytes]) -> None:
    """A missing blob raises an error in its place, after those before it."""
    client = container(fault_service)
    warm(client, blobs)
    names = [*list(blobs)[:20], "missing", *list(blobs)[20:]]
    ahead = prefetch(client, names)
    for item in ahead:
        if item.item == "missing":
            with pytest.raises(ResourceNotFoundError, match="missing"):
                item.result()
        else:
            assert item.result().data == blobs[item.item]


def test_service_that_ends_for_good(fault_service: FaultService, blobs: dict[str, bytes]) -> None:
    """A service that resets every connection leads to an error after the attempts, not a hang."""
    client = container(fault_service)
    warm(client, blobs)
    fault_service.script(Match("get_blob"), [Reset()], repeat=True)
    with pytest.raises(AzureError):
        read_all(client, list(blobs))


def test_closing_gives_up_what_is_under_way(fault_service: FaultService, blobs: dict[str, bytes]) -> None:
    """Closing during slow responses returns at once and gives all bytes of the budget back."""
    client = container(fault_service)
    warm(client, blobs)
    fault_service.script(Match("get_blob", nth=2), [Stall(60, None)], repeat=True)
    ahead = prefetch(client, blobs)
    next(ahead)
    ahead.close()
    with taking():
        wait_until(lambda: client.engine.budget.in_flight == 0)


def test_forked_child_reads_on_its_own(fault_service: FaultService, blobs: dict[str, bytes]) -> None:
    """After use in the parent, a forked child reads the same, and then so does the parent."""
    client = container(fault_service)
    warm(client, blobs)
    child = os.fork()
    if child == 0:
        try:
            is_same = [head.data for head in read_all(client, list(blobs) * 2)] == list(blobs.values()) * 2
            os._exit(0 if is_same else 1)
        finally:
            os._exit(2)
    assert [head.data for head in read_all(client, list(blobs))] == list(blobs.values())
    assert os.waitpid(child, 0)[1] == 0


def start(client: ContainerClient, name: str) -> threading.Event | None:
    """Start a read; an event that is set when it has ended, or None if it could not be started."""
    ended = threading.Event()
    is_started = client.blob(name).start_head(Scope(), lambda _head: ended.set(), ended.set)
    return ended if is_started else None


def test_an_interrupt_anywhere_in_a_start_leaves_the_next_read_working(
    fault_service: FaultService, blobs: dict[str, bytes]
) -> None:
    """Ctrl-C between two lines: the read ends or was never started, and later reads are received."""
    client = container(fault_service)

    def set_up() -> ContainerClient:
        multiplex._multiplexers.get().clear()  # a fresh one, whose thread does not run
        client.blob("001").head()  # leaves an idle connection
        return client

    def check(client: ContainerClient, run: Run) -> None:
        if isinstance(run.result, threading.Event):
            assert run.result.wait(60)
        client.blob("001").head()
        ended = start(client, "002")
        assert ended is not None
        assert ended.wait(10), "no thread receives the read"

    sweep(set_up, lambda client: start(client, "001"), check, files=[multiplex], do=interrupt)


def test_a_read_that_begins_while_no_thread_can_be_made_ends(
    fault_service: FaultService, blobs: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """If no thread can be started every read fails, also one that starts while the others fail."""
    client = container(fault_service)
    warm(client, blobs)
    multiplex._multiplexers.get().clear()
    monkeypatch.setattr(multiplex, "start_thread", lambda _work: False)
    ends: list[threading.Event | None] = []
    assert client.blob("001").start_head(
        Scope(), lambda _head: pytest.fail("nobody received it"), lambda: ends.append(start(client, "002"))
    )
    assert ends[0] is not None
    assert ends[0].is_set()


def test_a_handler_in_the_start_of_the_thread_gets_its_read(
    fault_service: FaultService, blobs: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A signal handler that runs just before the thread is started, and waits for a read, has the thread started."""
    client = container(fault_service)
    warm(client, blobs)
    multiplex._multiplexers.get().clear()
    ends = list[bool]()

    def start_interrupted(work: Callable[[], None]) -> bool:
        monkeypatch.setattr(multiplex, "start_thread", start_thread)
        ended = start(client, "002")
        assert ended is not None
        ends.append(ended.wait(20))
        return start_thread(work)

    monkeypatch.setattr(multiplex, "start_thread", start_interrupted)
    ended = start(client, "001")
    assert ends == [True], "the handler waits for a thread that only the interrupted code starts"
    assert ended is not None
    assert ended.wait(60)


# -- finalizers that run on the thread of the multiplexer --------------------------------------------------------------


class Finalized:
    """Calls *action* when the last reference is dropped."""

    def __init__(self, action: Callable[[], object]) -> None:
        self._action = action

    def __del__(self) -> None:
        self._action()


def connect(service: FaultService, client: ContainerClient, count: int = 8) -> None:
    """Leave *count* idle connections in the pool."""
    close_idle_connections()
    service.reset_log()
    rule = service.script(Match("head"), [Together(count)], repeat=True)
    run_threads(count, lambda _: client.blob("000").version())
    rule.cancel()
    assert idle_connections() == count


def finalize_on_its_thread(client: ContainerClient, action: Callable[[], object]) -> threading.Event:
    """Run *action* in a finalizer on the thread of the multiplexer; the event is set when it has returned."""
    ended = threading.Event()
    begun = threading.Event()

    def act() -> None:
        begun.set()
        action()
        ended.set()

    bag = [Finalized(act)]
    assert client.blob("001").start_head(Scope(), lambda _head: bag.clear(), lambda: pytest.fail("the read failed"))
    assert begun.wait(60)
    return ended


def test_a_finalizer_on_its_thread_reads(fault_service: FaultService, blobs: dict[str, bytes]) -> None:
    """It cannot wait for reads on the thread that it occupies: they use other connections and threads."""
    client = container(fault_service)
    connect(fault_service, client)
    heads: list[Head] = []
    ended = finalize_on_its_thread(client, lambda: heads.extend(read_all(client, list(blobs))))
    assert ended.wait(60), "it waits for itself"
    assert [head.data for head in heads] == list(blobs.values())


def test_a_finalizer_on_its_thread_waits_for_reads_in_flight(
    fault_service: FaultService, blobs: dict[str, bytes]
) -> None:
    """Another thread has begun them."""
    client = container(fault_service)
    connect(fault_service, client)
    names = ["002", "003", "004", "005"]
    held = threading.Event()
    fault_service.script(Match("get_blob", path="00[2-5]$"), [Hold(held)] * len(names))
    started = list[bool]()
    ahead = prefetch(client, names, started)
    items = [next(ahead), *ahead._queue]
    assert started == [True] * len(names)
    heads: list[Head] = []
    ended = finalize_on_its_thread(client, lambda: heads.extend(item.result() for item in items))
    fault_service.wait_for_requests(len(names) + 2, "get_blob")  # it has asked for the first one itself
    held.set()
    assert ended.wait(60), "it waits for itself"
    assert [head.data for head in heads] == [blobs[name] for name in names]
    ahead.close()
    items.clear()
    wait_until(lambda: client.engine.budget.in_flight == 0)


def test_a_finalizer_on_its_thread_waits_for_a_thread_that_reads(
    fault_service: FaultService, blobs: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reads in flight, and reads that begin meanwhile, do not count on the thread that is stuck."""
    monkeypatch.setattr(multiplex, "_STUCK_SECONDS", 0.5)
    client = container(fault_service)
    connect(fault_service, client)
    names = ["002", "003", "004", "005"]
    held, has_read = threading.Event(), threading.Event()
    fault_service.script(Match("get_blob", path="00[2-5]$"), [Hold(held)] * len(names))
    started = list[bool]()
    ahead = prefetch(client, names, started)
    items = [next(ahead), *ahead._queue]
    assert started == [True] * len(names)
    ended = finalize_on_its_thread(client, lambda: has_read.wait(120))
    held.set()
    try:
        assert [item.result().data for item in items] == [blobs[name] for name in names]
        assert [head.data for head in read_all(client, list(blobs))] == list(blobs.values())
        assert not ended.is_set()
    finally:
        has_read.set()
    assert ended.wait(60)
    ahead.close()
    items.clear()
    wait_until(lambda: client.engine.budget.in_flight == 0)
    del started[:]
    wait_until(lambda: bool(read_all(client, names, started)) and any(started))  # the thread receives again


def test_a_finalizer_at_every_line_of_its_thread_reads(
    fault_service: FaultService, blobs: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It reads other blobs, and waits for a read that the thread is receiving."""
    monkeypatch.setattr(multiplex, "_STUCK_SECONDS", 0.3)
    monkeypatch.setattr(job, "_LOOK_AGAIN", 0.05)
    monkeypatch.setattr(multiplex, "_IDLE_SECONDS", 0.0)
    client = container(fault_service)
    connect(fault_service, client)
    wanted = [blobs["010"], blobs["011"]]
    threads: list[Callable[[], None]] = []
    present: list[Prefetched[str, Head]] = []

    def set_up() -> OrderedPrefetch[str, Head]:
        """Two reads in flight, which the calling thread is to receive."""
        multiplex._multiplexers.get().clear()
        with monkeypatch.context() as patched:
            patched.setattr(multiplex, "start_thread", lambda work: threads.append(work) is None)
            started = list[bool]()
            ahead = prefetch(client, ["010", "011"], started)
            present[:] = [next(ahead), *ahead._queue]
        assert started[0]
        return ahead

    def handle() -> None:
        assert [item.result().data for item in present] == wanted
        assert [head.data for head in read_all(client, ["020", "021"])] == [blobs["020"], blobs["021"]]

    def receive(ahead: OrderedPrefetch[str, Head]) -> list[bytes]:
        threads.pop()()
        try:
            return [item.result().data for item in present]
        finally:
            ahead.close()
            present.clear()

    def check(_ahead: OrderedPrefetch[str, Head], run: Run) -> None:
        assert run.error is None, repr(run.error)
        assert run.result == wanted
        wait_until(lambda: client.engine.budget.in_flight == 0)

    sweep(set_up, receive, check, files=[multiplex], do=handle, turns=1)


# -- hedging ----------------------------------------------------------------------------------------------------------

HEDGED = replace(QUICK, hedge_after=0.05, hedge_budget=1.0, read_timeout=240.0, max_connections=17)
"""What stalls here stalls until its connection is closed, or for longer than any test may take."""


@pytest.mark.parametrize("after", [None, 0, 10, 30_000])
def test_stalled_responses_are_not_waited_for(
    fault_service: FaultService, blobs: dict[str, bytes], after: int | None
) -> None:
    """Some stall before the response or in its body: the rest is received on another connection."""
    client = container(fault_service, HEDGED)
    warm(client, blobs)
    names = [name for name, data in blobs.items() if len(data) > 31_000]
    for nth in (2, 9, 20):
        fault_service.script(Match("get_blob", path=f"{names[nth]}$"), [Stall(60, after)])
    before = metrics()
    heads = in_time(lambda: read_all(client, names))
    assert [head.data for head in heads] == [blobs[name] for name in names]
    assert not fault_service.unused_faults()
    seen = metrics() - before
    assert seen.hedges_won >= 3
    assert seen.retries == 0
    assert client.engine.budget.in_flight == 0


def test_the_rest_of_a_small_blob_is_requested_of_the_same_version(
    fault_service: FaultService, blobs: dict[str, bytes]
) -> None:
    client = container(fault_service, HEDGED)
    warm(client, blobs)
    etag = fault_service.put("box", "050", blobs["050"])
    fault_service.reset_log()
    fault_service.script("get_blob", [Stall(60, 30_000)])
    assert in_time(lambda: read_all(client, ["050"]))[0].data == blobs["050"]
    first, *others = fault_service.requests("get_blob")
    rests = [entry for entry in others if "if-match" in entry.headers]
    assert "if-match" not in first.headers
    assert all(entry.headers["if-match"] == etag for entry in rests)
    assert all(entry.range is not None and entry.range[0] > 0 for entry in rests)


@pytest.mark.parametrize(
    "refusal", [Status(403), Status(412), Status(503), Reset(), ChangedEtag(ignores_conditions=True)], ids=repr
)
def test_a_hedge_that_does_not_fit_leaves_the_first_response(
    fault_service: FaultService, blobs: dict[str, bytes], refusal: Fault
) -> None:
    """The first response continues after the hedges were refused, and is used."""
    client = container(fault_service, HEDGED)
    warm(client, blobs)
    gate, before = threading.Event(), metrics()
    fault_service.script(Match("get_blob", path="050$"), [StallUntil(gate, 30_000), refusal, refusal])

    def release() -> None:
        wait_until(lambda: (metrics() - before).hedges_canceled >= 1)
        gate.set()

    releasing = threading.Thread(target=release)
    releasing.start()
    try:
        heads = in_time(lambda: read_all(client, ["049", "050"]))
    finally:
        gate.set()
        releasing.join(240)
    assert [head.data for head in heads] == [blobs["049"], blobs["050"]]
    assert (metrics() - before).retries == 0


def test_a_hedge_that_is_refused_paces_the_service(fault_service: FaultService, blobs: dict[str, bytes]) -> None:
    client = container(fault_service, HEDGED)
    warm(client, blobs)
    gate, before = threading.Event(), metrics()
    fault_service.script(
        Match("get_blob", path="050$"), [StallUntil(gate, 30_000), *[Status(503, retry_after_ms=1)] * 2]
    )
    read = start(client, "050")
    assert read is not None
    wait_until(lambda: (metrics() - before).hedges_canceled >= 1)
    assert metrics().pace < float("inf")
    gate.set()
    assert read.wait(60)


def test_without_an_idle_connection_a_thread_asks_again(fault_service: FaultService, blobs: dict[str, bytes]) -> None:
    client = container(fault_service, HEDGED)
    close_idle_connections()
    client.blob("000").head()  # leaves one connection
    fault_service.script(Match("get_blob", path="050$"), [Stall(60, 100)])
    started = list[bool]()
    assert in_time(lambda: read_all(client, ["050"], started))[0].data == blobs["050"]
    assert started == [True]


class _Connection:
    """A connection whose socket has what the test puts there."""

    def __init__(self) -> None:
        self.socket = self
        self.arrived = bytearray()
        self.is_closed = False

    def recv_into(self, target: memoryview) -> int:
        assert not self.is_closed, "a response that was given up is received"
        count = min(len(target), len(self.arrived))
        if not count:
            raise BlockingIOError
        target[:count] = self.arrived[:count]
        del self.arrived[:count]
        return count

    def interrupt(self) -> None: ...

    def close(self) -> None:
        self.is_closed = True


STEPS = st.lists(
    st.tuples(st.integers(0, 2), st.sampled_from(["begin", "send", "receive"]), st.integers(1, 20)),
    min_size=5,
    max_size=30,
)


@settings(max_examples=300)
@given(size=st.integers(2, 80), steps=STEPS, versions=st.sampled_from([(1, 1, 1), (1, 1, 2), (1, 2, 1), (1, 2, 2)]))
def test_no_byte_is_written_by_two_responses(
    size: int, steps: list[tuple[int, str, int]], versions: tuple[int, int, int]
) -> None:
    """Whenever which of three responses sends what: each byte comes from one of them, and stays.

    A byte shows its place in the blob and which response it comes from.
    """
    results: list[bytes] = []
    read = FirstPart(
        Takeover(None, "GET", {"x-ms-client-request-id": "id"}, Attempt.close),
        "/",
        8 << 20,
        Scope(),
        lambda *_: None,
        lambda _version, data: results.append(data),
        lambda: pytest.fail("it has failed"),
    )
    scratch = memoryview(bytearray(16 << 10))
    attempts: list[Attempt] = []
    connections: list[_Connection] = []
    sent: dict[int, int] = {}

    def begin() -> None:
        connection: Any = _Connection()
        headers, start = read.takeover.rest() if attempts else ({"x-ms-client-request-id": "id"}, 0)
        hold = read.scope.holding(connection.interrupt)
        attempt = Attempt(read, connection, len(attempts), hold, headers, start)
        number, first = len(attempts), start
        attempts.append(attempt)
        connections.append(connection)
        connection.arrived += (
            f'HTTP/1.1 206 Partial Content\r\nContent-Length: {size - first}\r\nETag: "{versions[number]}"\r\n'
            f"x-ms-client-request-id: {headers['x-ms-client-request-id']}\r\n"
            f"Content-Range: bytes {first}-{size - 1}/{size}\r\n\r\n"
        ).encode()
        sent[number] = size - first

    def send(number: int, count: int) -> None:
        start = size - sent[number]
        count = min(count, sent[number])
        sent[number] -= count
        connections[number].arrived += bytes(at % 80 * 3 + number for at in range(start, start + count))

    seen = b""

    def receive(number: int) -> None:
        nonlocal seen
        attempt = attempts[number]
        try:
            if not connections[number].is_closed and attempt.advance(scratch):
                read.end(attempt, is_good=True)
        except UnfitError:
            read.end(attempt, is_good=False)
        assert read.data[: len(seen)] == seen or read.is_over, "what was received before has changed"
        seen = read.data[: read.takeover.reached]

    begin()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(first_part, "give_back", lambda _connection: None)
        for number, step, count in steps:
            if read.is_over:
                break
            if step == "begin" and len(attempts) < 3:
                begin()
            elif number < len(attempts) and step == "send":
                send(number, count)
            elif number < len(attempts) and step == "receive":
                receive(number)
        while not read.is_over:
            for number in range(len(attempts)):
                send(number, size)
                receive(number)
    (data,) = results
    assert [value // 3 for value in data] == [at % 80 for at in range(size)]
    writers = [data[0] % 3, *(b % 3 for a, b in pairwise(data) if a % 3 != b % 3)]
    assert len(writers) == len(set(writers)), "a response that was given up has written again"
    assert len({versions[writer] for writer in writers}) == 1, "bytes of two versions"
    assert not read.takeover.attempts
