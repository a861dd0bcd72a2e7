"""Silent requests that are sent once more: exact bytes, of one version, whichever response comes first."""

from __future__ import annotations

import logging
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from azstoragetorch import Metrics, TransferConfig, metrics
from azstoragetorch._blob import head, race, takeover, transport
from azstoragetorch._blob.connection import Origin
from azstoragetorch._blob.head import Stream, receive_head
from azstoragetorch._blob.listing import list_pages
from azstoragetorch._blob.race import Race, Sent
from azstoragetorch._blob.transport import Pool, Response, close_idle_connections
from azstoragetorch._engine.hedging import Hedging
from azstoragetorch._engine.scope import Cancelled, Scope
from tests.faults.faults import (
    ChangedEtag,
    Fault,
    FullInsteadOfPartial,
    Hold,
    MissingHeader,
    Reset,
    Rule,
    SlowBytes,
    Stall,
    StallUntil,
    Status,
    Torn,
    WrongContentRange,
    WrongHeader,
)
from tests.faults.service import FaultService
from tests.process.interrupts import Run, interrupt, sweep
from tests.support import QUICK, blob_client, container_client, content, idle_connections, in_time, wait_until

HEDGED = replace(QUICK, hedge_after=0.05, hedge_budget=1.0, read_timeout=240.0)
"""What stalls here stalls until its connection is closed, or for longer than any test may take."""
SIZE = 50_000
BLOB = content(SIZE)
LARGE = content(300_000, 1)  # five parts


@pytest.fixture
def service(fault_service: FaultService) -> FaultService:
    fault_service.put("c", "blob", BLOB)
    fault_service.put("c", "large", LARGE)
    return fault_service


@contextmanager
def counted() -> Iterator[list[Metrics]]:
    """What happens inside, as metrics."""
    seen: list[Metrics] = []
    before = metrics()
    yield seen
    seen.append(metrics() - before)


def read(service: FaultService, name: str = "blob", transfer: TransferConfig = HEDGED) -> bytes:
    return blob_client(service.blob_url("c", name), transfer).read()[0]


def read_by_reader(service: FaultService) -> bytes:
    reader = blob_client(service.blob_url("c", "large"), HEDGED).reader()
    try:
        found = b""
        while piece := reader.read(len(found), 3000):
            found += piece
        return found
    finally:
        reader.close()


def names(service: FaultService) -> bytes:
    client = container_client(service.container_url("c"), HEDGED)
    return " ".join(name for page in list_pages(client.service, client.url) for name in page.names).encode()


def properties(service: FaultService) -> bytes:
    found = blob_client(service.blob_url("c", "blob"), HEDGED).get_properties()
    return str(found.version.size).encode()


def write(service: FaultService) -> bytes:
    writer = blob_client(service.blob_url("c", "new"), HEDGED).writer()
    writer.write(memoryview(LARGE))
    writer.commit()
    return service.get("c", "new")


OPERATIONS: dict[str, tuple[Callable[[FaultService], bytes], bytes]] = {
    "get_blob": (read, BLOB),
    "get_blob, parts": (lambda service: read(service, "large"), LARGE),
    "get_blob, reader": (read_by_reader, LARGE),
    "list_blobs": (names, b"blob large"),
    "head": (properties, str(SIZE).encode()),
    "put_block": (write, LARGE),
}


def check_the_rival_wins(
    service: FaultService, rule: Rule, operate: Callable[[FaultService], bytes], expected: bytes
) -> None:
    """The operation returns the right result in time, by a repeated request, and not by a retry."""
    with counted() as seen:
        assert in_time(lambda: operate(service)) == expected
    assert rule.fired
    assert seen[0].hedges_won >= 1
    assert seen[0].retries == 0
    service.wait_until_idle()


@pytest.mark.parametrize("is_warm", [False, True])
@pytest.mark.parametrize("name", OPERATIONS)
def test_a_stall_before_the_response_is_not_waited_for(service: FaultService, name: str, is_warm: bool) -> None:
    """On a new connection, and on one that was used before."""
    operate, expected = OPERATIONS[name]
    if is_warm:
        operate(service)
    rule = service.script(name.partition(",")[0], [Stall(60, None)])
    check_the_rival_wins(service, rule, operate, expected)


def test_a_stall_late_in_a_long_body_is_not_waited_for(service: FaultService) -> None:
    """A body is received in pieces. That it can be continued is known from its head, in each of them."""
    data = content(2 << 20)
    service.put("c", "long", data)
    rule = service.script("get_blob", [Stall(60, 1_500_000)])
    transfer = replace(HEDGED, part_size=8 << 20, memory_limit=64 << 20)
    with counted() as seen:
        assert in_time(lambda: read(service, "long", transfer)) == data
    assert rule.fired
    assert seen[0].hedges_won == 1
    assert seen[0].retries == 0
    service.wait_until_idle()


@pytest.mark.parametrize("after", [0, 300, 30_000])
@pytest.mark.parametrize("name", ["get_blob", "get_blob, parts", "get_blob, reader", "list_blobs"])
def test_a_stall_in_the_body_is_not_waited_for(service: FaultService, name: str, after: int) -> None:
    operate, expected = OPERATIONS[name]
    rule = service.script(name.partition(",")[0], [Stall(60, after if name != "list_blobs" else min(after, 300))])
    check_the_rival_wins(service, rule, operate, expected)


def test_the_rest_is_requested_from_the_byte_reached_of_the_same_version(service: FaultService) -> None:
    etag = service.put("c", "blob", BLOB)
    service.script("get_blob", [Stall(60, 30_000)])
    assert in_time(lambda: read(service)) == BLOB
    first, *others = service.requests("get_blob")
    assert first.headers.get("if-match") is None
    assert others[-1].headers["if-match"] == etag
    assert others[-1].range is not None
    assert 0 < others[-1].range[0] <= 30_000
    ids = [entry.headers["x-ms-client-request-id"] for entry in (first, *others)]
    assert len(set(ids)) == len(ids)
    assert all(each.startswith(ids[0]) for each in ids)


REFUSALS = [Status(403), Status(404), Status(412), Status(503), WrongHeader("x-ms-client-request-id", "x"), Reset()]
UNFIT = [
    *REFUSALS,
    ChangedEtag(),
    ChangedEtag(ignores_conditions=True),
    WrongContentRange(),
    FullInsteadOfPartial(),
    MissingHeader("ETag"),
]


def read_while_hedges_are_refused(service: FaultService, first: Fault, gate: threading.Event, refusal: Fault) -> bytes:
    service.script("get_blob", [first, refusal, refusal])
    before = metrics().hedges_canceled

    def release() -> None:
        wait_until(lambda: metrics().hedges_canceled > before)
        gate.set()

    releasing = threading.Thread(target=release)
    releasing.start()
    try:
        return in_time(lambda: read(service))
    finally:
        gate.set()
        releasing.join(240)


@pytest.mark.parametrize("refusal", REFUSALS, ids=repr)
def test_a_refused_hedge_does_not_replace_a_response_that_has_not_begun(service: FaultService, refusal: Fault) -> None:
    gate = threading.Event()
    with counted() as seen:
        assert read_while_hedges_are_refused(service, Hold(gate), gate, refusal) == BLOB
    assert seen[0].hedges_won == seen[0].retries == 0


@pytest.mark.parametrize("first", ["before the response", "in the body"])
def test_a_hedge_that_is_refused_paces_the_service(service: FaultService, first: str) -> None:
    """A pause that the service asks for holds for all requests, whichever one it has refused."""
    gate = threading.Event()
    stall: Fault = StallUntil(gate, 300) if first == "in the body" else Hold(gate)
    assert read_while_hedges_are_refused(service, stall, gate, Status(503, retry_after_ms=1)) == BLOB
    assert metrics().pace < float("inf")
    assert len(service.requests(status=503)) == 1, "nothing is sent once more to a service that throttles"


@pytest.mark.parametrize("refusal", UNFIT, ids=repr)
def test_a_hedge_that_does_not_fit_does_not_continue_a_body(service: FaultService, refusal: Fault) -> None:
    """Another version, another range, a refusal: the first response is waited for, and is complete."""
    gate = threading.Event()
    with counted() as seen:
        assert read_while_hedges_are_refused(service, StallUntil(gate, 300), gate, refusal) == BLOB
    assert seen[0].hedges_won == seen[0].retries == 0


def test_the_first_response_comes_too_late(service: FaultService) -> None:
    """Its connection is closed: nothing that it sends afterwards reaches the memory."""
    gate = threading.Event()
    service.script("get_blob", [StallUntil(gate, 300)])
    target = bytearray(SIZE)
    reader = blob_client(service.blob_url("c", "blob"), HEDGED).reader()
    assert in_time(lambda: reader.readinto(0, memoryview(target))) == SIZE
    assert target == BLOB
    target[:] = bytes(SIZE)
    gate.set()
    service.wait_until_idle()
    assert target == bytes(SIZE)
    reader.close()


def test_a_hedge_that_stalls_as_well_is_hedged(service: FaultService) -> None:
    service.script("get_blob", [Stall(60, None), Stall(60, None)])
    assert in_time(lambda: read(service)) == BLOB
    service.wait_until_idle()


def test_a_body_of_a_hedge_that_breaks_is_resumed(service: FaultService) -> None:
    """Its length was declared, and it ends early: the rest is requested as usual."""
    service.script("get_blob", [Stall(60, 300), Torn(1000)])
    assert in_time(lambda: read(service)) == BLOB


def test_validated_parts_are_checked_as_a_whole(service: FaultService) -> None:
    service.script("get_blob", [Stall(60, 20_000)])
    assert in_time(lambda: read(service, transfer=replace(HEDGED, validate_content=True))) == BLOB


@pytest.mark.parametrize("operation", ["put_block_list", "put_blob", "delete"])
def test_writes_that_cannot_be_repeated_are_not_hedged(service: FaultService, operation: str) -> None:
    """The stall ends by the read timeout, as without hedging."""
    transfer = replace(HEDGED, read_timeout=0.5, max_attempts=20)
    client = blob_client(service.blob_url("c", "new"), transfer)
    if operation == "delete":
        service.put("c", "new", b"x")
    service.script(operation, [Stall(60, None)])
    with counted() as seen:
        if operation == "delete":
            client.delete()
        elif operation == "put_blob":
            client.put(b"data")
        else:
            writer = client.writer()
            writer.write(memoryview(LARGE))
            writer.commit()
    requests = service.requests(operation)
    assert len(requests) == len({entry.connection for entry in requests})
    assert not any("-" in entry.headers["x-ms-client-request-id"] for entry in requests)
    assert seen[0].retries >= 1


def test_a_body_that_drips_is_not_waited_for(service: FaultService) -> None:
    """Compared with what other requests took; it would take a minute."""
    transfer = replace(HEDGED, max_connections=10)
    for _ in range(12):
        read(service, transfer=transfer)
    service.script("get_blob", [SlowBytes(SIZE / 60)])
    with counted() as seen:
        assert in_time(lambda: read(service, transfer=transfer), 120) == BLOB
    assert seen[0].hedges_won >= 1
    service.wait_until_idle()


def test_a_budget_of_zero_and_none_send_nothing_twice(service: FaultService) -> None:
    for off in ({"hedge_budget": 0.0}, {"hedge_after": None}):
        service.script("get_blob", [Stall(60, None)])
        with counted() as seen:
            assert read(service, transfer=replace(HEDGED, read_timeout=0.5, max_attempts=20, **off)) == BLOB  # type: ignore[arg-type]
        assert seen[0].hedged == 0
        assert seen[0].retries >= 1


def test_what_is_slow_altogether_is_within_the_first_tokens(service: FaultService) -> None:
    """Every request takes longer than the patience: the budget of 2 % is what is spent, not more."""
    transfer = replace(HEDGED, hedge_budget=0.02, max_connections=9)
    service.latency = 0.15
    with counted() as seen:
        for _ in range(20):
            assert read(service, transfer=transfer) == BLOB
    assert seen[0].hedged <= 4


def test_a_cancel_ends_the_race(service: FaultService) -> None:
    """All connections of a request are interrupted together."""
    service.script("get_blob", [Stall(60, None)], repeat=True)
    scope = Scope()

    def cancel() -> None:
        service.wait_for_requests(2, "get_blob")
        scope.cancel()

    canceling = threading.Thread(target=cancel)
    canceling.start()
    with pytest.raises(Cancelled):
        blob_client(service.blob_url("c", "blob"), HEDGED).head(scope)
    canceling.join(240)
    service.wait_until_idle()
    wait_until(lambda: service.open_connections <= idle_connections())
    assert not scope._holds


def test_hedges_are_logged_without_secrets(service: FaultService, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "azstoragetorch")
    service.script("get_blob", [Stall(60, None)])
    url = service.blob_url("c", "blob") + "?sv=2023-11-03&sig=SECRET"
    assert in_time(lambda: blob_client(url, HEDGED).read()[0]) == BLOB
    text = caplog.text
    assert "sent once more" in text
    assert "the second request was answered first" in text
    assert "SECRET" not in text


@pytest.mark.slow
@pytest.mark.parametrize("after", [None, 300])
def test_an_interrupt_anywhere_leaves_no_connection_behind(service: FaultService, after: int | None) -> None:
    service.keeps_log = False
    transfer = replace(HEDGED, hedge_after=0.005, max_connections=17)

    def set_up() -> Scope:
        service.clear_script()
        close_idle_connections()
        service.script("get_blob", [Stall(60, after)])
        return Scope()

    def act(scope: Scope) -> bytes:
        return blob_client(service.blob_url("c", "blob"), transfer).head(scope).data

    def check(scope: Scope, run: Run) -> None:
        assert run.result in (None, BLOB)
        assert isinstance(run.error, (KeyboardInterrupt, type(None)))
        run.error = None
        service.clear_script()
        assert read(service, transfer=transfer) == BLOB
        wait_until(lambda: service.open_connections <= idle_connections())

    sweep(set_up, act, check, files=[race, takeover, transport, head], do=interrupt, turns=1)


# -- a scripted server ------------------------------------------------------------------------------------------------


class Line:
    """A connection whose other end the test writes to, while the client waits."""

    def __init__(self, script: Script) -> None:
        ours, self.theirs = socket.socketpair()
        ours.settimeout(0.001)
        self.socket = ours
        self.origin = Origin("http", "x", 60.0, 60.0)
        self.request: dict[str, str] = {}
        self.is_closed = False
        self.sent = 0
        self.script = script
        script.lines.append(self)

    def send(self, _method: str, _target: str, headers: dict[str, str], *_: object, **__: object) -> None:
        self.request = dict(headers)

    def set_timeout(self, seconds: float) -> None:
        self.socket.settimeout(seconds and 0.001)

    def is_readable(self) -> bool:
        """The client asks when nothing has arrived."""
        self.script.step()
        return False

    def waker(self) -> Callable[[], None]:
        return lambda: None

    def close(self) -> None:
        self.is_closed = True
        self.socket.close()


class Script:
    """The steps of a server, one whenever the client finds that nothing has arrived.

    A byte shows its place in the blob and which response it comes from.
    """

    def __init__(self, size: int, steps: list[tuple[int, int]], versions: tuple[int, int, int]) -> None:
        self.size = size
        self.steps = steps
        self.versions = versions
        self.lines: list[Line] = []
        self.is_hedge_due = False

    def step(self) -> None:
        """Send something, or have the client send a hedge."""
        number, count = self.steps.pop(0) if self.steps else (0, self.size)
        self.is_hedge_due = number >= len(self.lines)
        for other in [number] if self.steps else range(len(self.lines)):
            if other < len(self.lines) and not self.lines[other].is_closed:
                self.deliver(other, count)

    def deliver(self, number: int, count: int) -> None:
        line = self.lines[number]
        start = int(line.request["x-ms-range"].removeprefix("bytes=").partition("-")[0])
        data = b""
        if not line.sent:
            line.sent = 1
            data = (
                f"HTTP/1.1 206 Partial Content\r\nContent-Length: {self.size - start}\r\n"
                f'ETag: "{self.versions[number]}"\r\n'
                f"Content-Range: bytes {start}-{self.size - 1}/{self.size}\r\n\r\n"
            ).encode()
        at = start + line.sent - 1
        body = bytes(place % 80 * 3 + number for place in range(at, min(at + count, self.size)))
        line.sent += len(body)
        with suppress(OSError):
            line.theirs.sendall(data + body)


class _Scripted(Hedging):
    def __init__(self, script: Script) -> None:
        super().__init__(0.001, 1.0)
        self.script = script

    def allows(self, *_: object) -> bool:
        return self.script.is_hedge_due


STEPS = st.lists(st.tuples(st.integers(0, 2), st.integers(0, 400)), max_size=12)


VERSIONS = st.sampled_from([(1, 1, 1), (1, 1, 2), (1, 2, 1), (1, 2, 2)])
"""Of the blob, in each response: a server may ignore the condition of a request."""


@given(size=st.integers(1, 1000), steps=STEPS, versions=VERSIONS)
def test_no_byte_is_written_by_two_responses(
    size: int, steps: list[tuple[int, int]], versions: tuple[int, int, int]
) -> None:
    """Whenever which of three responses sends what: each byte comes from one of them, and stays."""
    script = Script(size, list(steps), versions)
    sent = Sent("GET", "/", {"x-ms-range": f"bytes=0-{size - 1}"})
    first: Any = Line(script)
    first.send("GET", "/", sent.headers)
    scope, pool = Scope(), Pool()
    hold = scope.holding(first.waker())

    def take() -> Any:
        line = Line(script)
        return line, scope.holding(line.waker())

    the_race = Race(_Scripted(script), "GET", sent, first, hold, take, lambda *_: None)
    the_race.begin()
    target = bytearray(size)
    with hold:
        try:
            raw = receive_head(Stream(first, the_race.on_silence), "GET")
            the_race.answered(raw)
            response = Response(pool, first, raw, hold, the_race)
        except race.Overtaken as overtaken:
            response = Response(pool, overtaken.rival.connection, overtaken.raw, overtaken.rival.hold, the_race)
        seen = bytearray()
        step = max(1, size // 3)
        for at in range(0, size, step):
            count = response.readinto(memoryview(target)[at : at + step])
            assert count == min(step, size - at)
            assert target[: len(seen)] == seen, "what was received before has changed"
            seen = target[: at + count]
        response.close()
    assert [value // 3 for value in target] == [at % 80 for at in range(size)]
    owners = [target[0] % 3, *(b % 3 for a, b in pairwise(target) if a % 3 != b % 3)]
    assert len(owners) == len(set(owners)), "a response that was given up has written again"
    assert len({versions[owner] for owner in owners}) == 1, "bytes of two versions"
    before = bytes(target)
    for line in script.lines:
        with suppress(OSError):
            line.theirs.sendall(b"\xff" * 100)
    assert target == before
    assert sum(not line.is_closed for line in script.lines) <= 1
    for line in script.lines:
        line.theirs.close()
        line.socket.close()
