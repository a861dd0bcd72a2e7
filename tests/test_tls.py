"""Over TLS as without it: truncated bodies, silent requests, many small blobs on one thread, forks."""

from __future__ import annotations

import itertools
import os
import ssl
import time
from contextlib import suppress
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from azure.core.exceptions import ServiceResponseError

from azstoragetorch import TransferConfig, metrics
from azstoragetorch._blob import head
from azstoragetorch._blob.head import Stream
from azstoragetorch._samples.prefetch import OrderedPrefetch
from tests.faults import FaultService
from tests.faults.faults import Fault, Match, SlowBytes, Stall, Torn, TornReset
from tests.support import QUICK, blob_client, container_client, content, idle_connections, in_time

DATA = content(700_000)
WHOLE = replace(QUICK, part_size=1 << 20, memory_limit=4 << 20)
HEDGED = replace(WHOLE, hedge_after=0.05, hedge_budget=1.0, read_timeout=60.0)


@pytest.fixture
def service(https_fault_service: FaultService) -> FaultService:
    https_fault_service.put("c", "b", DATA)
    return https_fault_service


def read(service: FaultService, transfer: TransferConfig = WHOLE) -> bytes:
    return blob_client(service.blob_url("c", "b"), transfer).read()[0]


@pytest.mark.parametrize("after", [0, 20_000, 699_999])
@pytest.mark.parametrize("kind", [Torn, TornReset])
def test_a_truncated_body_is_continued(service: FaultService, kind: type[Torn], after: int) -> None:
    rule = service.script("get_blob", [kind(after=after)])
    assert read(service) == DATA
    assert rule.fired


def test_and_is_an_error_in_the_end(service: FaultService) -> None:
    service.script("get_blob", [Torn(after=20_000)], repeat=True)
    with pytest.raises(ServiceResponseError):
        read(service, replace(WHOLE, max_attempts=2))


@pytest.mark.parametrize("fault", [Stall(60, None), Stall(60, 0), Stall(60, 200_000)])
def test_a_silent_request_is_hedged(service: FaultService, fault: Stall) -> None:
    read(service, HEDGED)
    rule = service.script("get_blob", [fault])
    before = metrics()
    assert in_time(lambda: read(service, HEDGED)) == DATA
    assert rule.fired
    assert (metrics() - before).hedges_won >= 1
    service.wait_until_idle()


RECORD = 16 << 10


class Records(ssl.SSLSocket):
    """A socket that returns *arriving*, one for each call; None is a silence as long as the timeout.

    An error is raised.
    """

    unready: type[ssl.SSLError] = ssl.SSLWantReadError

    def __init__(self, *arriving: bytes | BaseException | None) -> None:
        self.arriving = list(arriving)
        self.asked: list[int] = []
        self.timeouts = [5.0]

    def recv_into(self, buffer: Any, *_: Any) -> int:
        self.asked.append(len(buffer))
        if self.arriving[0] is None and not self.timeouts[-1]:
            raise self.unready
        data = self.arriving.pop(0)
        if data is None:
            raise TimeoutError("slow")
        if isinstance(data, BaseException):
            raise data
        buffer[: len(data)] = data
        return len(data)

    def gettimeout(self) -> float:
        return self.timeouts[-1]

    def settimeout(self, value: float | None) -> None:
        self.timeouts.append(value or 0.0)


def stream(*arriving: bytes | BaseException | None, on_silence: Any = None) -> tuple[Stream, Records]:
    socket = Records(*arriving)
    return Stream(SimpleNamespace(socket=socket), on_silence), socket  # type: ignore[arg-type]


@pytest.mark.parametrize("last", [b"c" * RECORD, b"c" * 7, b""])
def test_one_call_receives_many_records(last: bytes) -> None:
    target = bytearray(3 * RECORD)
    found, socket = stream(b"a" * RECORD, b"b" * RECORD, last, b"", b"next")
    whole = b"a" * RECORD + b"b" * RECORD + last
    assert found.readinto(memoryview(target)) == len(whole)
    assert target.startswith(whole)
    assert socket.arriving[-1] == b"next"


@pytest.mark.parametrize("unready", [ssl.SSLWantReadError, ssl.SSLWantWriteError])
def test_what_has_not_arrived_is_waited_for_with_the_timeout(unready: type[ssl.SSLError]) -> None:
    """A key update of the peer is answered, which can have to wait as well."""
    found, socket = stream(b"a" * RECORD, b"b" * 5, None, b"c")
    socket.unready = unready
    assert found.readinto(memoryview(bytearray(3 * RECORD))) == RECORD + 5
    assert socket.timeouts == [5.0, 0.0, 5.0]
    assert socket.arriving == [b"c"]


def test_records_that_never_cease_are_left_to_the_next_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """The layers above see in time that a body of tiny records is slow."""
    ticks = itertools.count(step=0.01)
    monkeypatch.setattr(head, "time", SimpleNamespace(monotonic=lambda: next(ticks), perf_counter=time.perf_counter))
    found, socket = stream(b"a" * RECORD, *[b"b"] * 100)
    assert RECORD < found.readinto(memoryview(bytearray(3 * RECORD))) < RECORD + 10
    assert socket.timeouts == [5.0, 0.0, 5.0]


@pytest.mark.parametrize("error", [ssl.SSLError("bad record"), ConnectionResetError(), KeyboardInterrupt()], ids=repr)
def test_an_error_restores_the_timeout(error: BaseException) -> None:
    found, socket = stream(b"a" * RECORD, error)
    with pytest.raises(type(error)):
        found.readinto(memoryview(bytearray(3 * RECORD)))
    assert socket.timeouts == [5.0, 0.0, 5.0]


def test_the_time_for_what_has_arrived_is_counted(service: FaultService, fault_service: FaultService) -> None:
    fault_service.put("c", "b", DATA)
    before = metrics()
    assert read(fault_service) == DATA
    assert (metrics() - before).tls_seconds == 0
    assert read(service) == DATA
    assert (metrics() - before).tls_seconds > 0


def test_a_caller_may_pass_a_bytearray() -> None:
    """Of which a slice is a copy: `io.RawIOBase.read` does it."""
    found, _ = stream(b"a" * RECORD, b"b" * RECORD, b"")
    assert found.read(2 * RECORD) == b"a" * RECORD + b"b" * RECORD


def test_what_is_buffered_does_not_wait_for_what_is_behind_a_response() -> None:
    """A buffer of a record or more would be filled with several, also after the last byte of a body."""
    found, socket = stream(b"head", None)
    assert found.makefile("rb").read(4) == b"head"
    assert socket.asked == [8 << 10]


def test_a_silence_between_records_is_noticed_by_the_next_call() -> None:
    """At once: it does not wait for the timeout a second time."""
    began, silences = time.monotonic(), list[float]()
    found, _ = stream(b"a" * RECORD, None, b"b", on_silence=silences.append)
    target = memoryview(bytearray(3 * RECORD))
    assert found.readinto(target) == RECORD
    assert not silences
    assert found.readinto(target) == 1
    assert -5.0 <= silences[0] - began <= 240.0 - 5.0


def test_and_is_an_error_without_anybody_to_notice() -> None:
    found, socket = stream(b"a" * RECORD, None, b"b")
    target = memoryview(bytearray(3 * RECORD))
    assert found.readinto(target) == RECORD
    with pytest.raises(TimeoutError):
        found.readinto(target)
    assert socket.arriving == [b"b"]


SMALL = {f"{number:02d}": content(1 + number * 2_500, number) for number in range(40)}


def read_small(service: FaultService, transfer: TransferConfig) -> tuple[list[bytes], int]:
    """The blobs of `SMALL`, eight at once, and how many of them one thread began to read."""
    client, started = container_client(service.container_url("box"), transfer), list[bool]()

    def start(name: str, *how: Any) -> Any:
        is_stuck = client.blob(name).start_head(*how)
        started.append(is_stuck is not None)
        return is_stuck

    ahead = OrderedPrefetch(
        client.engine,
        iter(SMALL),
        lambda name, scope: client.blob(name).head(scope),
        cost=lambda _name: 64 << 10,
        size=lambda read: len(read.data),
        depth=8,
        start=start,
    )
    try:
        return [item.result().data for item in ahead], sum(started)
    finally:
        ahead.close()


@pytest.fixture
def small(service: FaultService) -> FaultService:
    for name, data in SMALL.items():
        service.put("box", name, data)
    read_small(service, HEDGED)  # leaves idle connections
    return service


def test_many_small_blobs_take_one_request_each(small: FaultService) -> None:
    """Also one that comes in pieces: a part of a record is not the end of a connection."""
    small.script(Match("get_blob", path="30$"), [SlowBytes(400_000)])
    small.reset_log()
    found, started = in_time(lambda: read_small(small, replace(HEDGED, hedge_after=None)))
    assert found == list(SMALL.values())
    assert started > len(SMALL) // 2
    assert len(small.requests()) == len(SMALL)


@pytest.mark.parametrize("fault", [Torn(after=5_000), SlowBytes(200_000), Stall(60, 5_000)], ids=repr)
def test_many_small_blobs_under_faults(small: FaultService, fault: Fault) -> None:
    small.script(Match("get_blob", path="30$"), [fault])
    assert in_time(lambda: read_small(small, HEDGED))[0] == list(SMALL.values())
    assert not small.unused_faults()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child_makes_its_own_connections(service: FaultService) -> None:
    assert read(service) == DATA
    opened = service.connections_opened
    child = os.fork()
    if not child:
        code = 1
        with suppress(BaseException):
            code = 0 if read(service) == DATA and not idle_connections() > QUICK.max_connections else 1
        os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert service.connections_opened == opened + 1
    assert read(service) == DATA
    assert service.connections_opened == opened + 1
