"""Requests to a service that throttles: who waits, for how long, and what ends a wait."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from dataclasses import replace
from types import FrameType

import pytest
from azure.core.exceptions import HttpResponseError

from azstoragetorch import TransferConfig, metrics
from azstoragetorch._blob import admission
from azstoragetorch._blob.admission import Admission, admission_for, forget_admissions
from azstoragetorch._blob.client import ClientFactory
from azstoragetorch._engine import pacing
from azstoragetorch._engine.pacing import Pacing, Plan
from azstoragetorch._engine.scope import Cancelled, Scope
from azstoragetorch._samples.fetching import fetch_ahead
from tests.faults.faults import Match, Status
from tests.faults.service import FaultService
from tests.support import QUICK, blob_client, container_client, content, run_threads, taking, wait_until

PATIENT = replace(QUICK, max_backoff=1000.0)
NAMES = [f"{number:03}" for number in range(150)]


@pytest.fixture
def service(fault_service: FaultService) -> FaultService:
    for number, name in enumerate(NAMES):
        fault_service.put("c", name, content(100 + number, number))
    return fault_service


@pytest.fixture
def no_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Requests wait for their turn, however long that takes."""
    monkeypatch.setattr(admission, "_BACKOFF", 1000.0)
    monkeypatch.setattr(pacing, "_PROBE_FOR", 1000.0)


def closed(host: str = "h", seconds: float = 60.0) -> Admission:
    """An admission whose service has asked for a pause of so many *seconds*."""
    found = Admission(host, Pacing(64))
    now = time.monotonic()
    for _ in range(4):  # as many as show that it throttles
        found.pacing.refused(now, now, seconds)
    return found


def in_thread(action: Callable[[], object]) -> threading.Thread:
    thread = threading.Thread(target=action, daemon=True)
    thread.start()
    return thread


class TestWaiting:
    def test_a_service_that_does_not_throttle_admits_at_once(self) -> None:
        free = Admission("h", Pacing(1))
        assert all(free.enter(QUICK, None).is_early for _ in range(1000))
        assert not free._waiting
        assert free.enter_now()

    def test_a_cancelled_scope_ends_it(self) -> None:
        held, scope, ended = closed(), Scope(), list[str]()

        def wait() -> None:
            try:
                held.enter(QUICK, scope)
            except Cancelled:
                ended.append("cancelled")

        thread = in_thread(wait)
        wait_until(lambda: bool(held._waiting))
        scope.cancel()
        with taking():
            thread.join()
        assert ended == ["cancelled"]
        assert not held._waiting
        with pytest.raises(Cancelled), taking():
            held.enter(QUICK, scope)

    @pytest.mark.usefixtures("no_way_out")
    def test_an_acceptance_wakes_all_that_wait(self) -> None:
        """In the order of their coming, at the distance of the pace: the turns before were far away."""
        found = closed(seconds=0.0)
        found.pacing.plan = Plan(time.monotonic() + 1000.0)
        threads = []
        for number in range(8):
            threads.append(in_thread(lambda: found.enter(PATIENT, Scope())))
            wait_until(lambda number=number: len(found._waiting) == number + 1)  # type: ignore[misc]
        with taking():
            found.accepted(time.monotonic())
            for thread in threads:
                thread.join()

    def test_a_closed_service_is_asked_again_without_an_answer(self) -> None:
        """A probe can be lost: others go after the pause of a failed request."""
        found = closed(seconds=0.0)
        found.pacing.plan = Plan(time.monotonic() + 1000.0)
        with taking():
            entry = found.enter(QUICK, None)
        assert not entry.is_early

    def test_not_all_begin_when_a_pause_of_the_service_ends(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """One does, and others one by one; those for whom no such turn is left, at random times after that."""
        monkeypatch.setattr(admission.time, "monotonic", lambda: 1000.0)
        waits: list[float] = []

        def note(_self: Admission, seconds: float, *_: object) -> None:
            waits.append(seconds)
            raise Cancelled

        monkeypatch.setattr(Admission, "_sleep", note)
        held = closed(seconds=5.0)
        for _ in range(64):
            with pytest.raises(Cancelled):
                held.enter(TransferConfig(), None)
        assert waits[0] == pytest.approx(5.0)
        assert len(set(waits)) == 64
        assert sum(seconds < 5.05 for seconds in waits) <= 3
        assert max(waits) <= 7.0

    def test_a_long_wait_before_does_not_count_when_the_service_closes(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """A request that has waited for its turn for long waits like all others after the next refusal."""
        now = 1000.0
        monkeypatch.setattr(admission.time, "monotonic", lambda: now)
        found = closed(seconds=0.0)
        waits: list[float] = []

        def wait(held: Admission, seconds: float, *_: object) -> None:
            nonlocal now
            waits.append(seconds)
            if len(waits) == 1:  # it opens, and the request gets a turn that is far away
                held.pacing.accepted(now, now)
                held.pacing.plan.next = now + 30.0
            elif len(waits) == 2:  # and closes again before that
                now += 29.0
                held.pacing.refused(now, now)
                held.pacing.plan.next = now + 1000.0
                now += 1.0
            else:
                raise Cancelled

        monkeypatch.setattr(Admission, "_sleep", wait)
        found.pacing.plan.next = now + 1000.0
        monkeypatch.setattr(admission.random, "uniform", lambda _low, high: high)
        with pytest.raises(Cancelled):
            found.enter(TransferConfig(), None)
        assert waits == pytest.approx([2.0, 30.0, 1.0])

    def test_a_forked_child_does_not_wait(self, service: FaultService) -> None:
        client = blob_client(service.blob_url("c", "000"))
        held = client.service.admission
        held.pacing.refused(time.monotonic(), time.monotonic(), 1000.0)
        assert not held.enter_now()
        child = os.fork()
        if child == 0:
            try:
                os._exit(0 if client.read()[0] == content(100, 0) and metrics().throttled_seconds == 0 else 1)
            finally:
                os._exit(2)
        assert os.waitpid(child, 0)[1] == 0

    def test_a_handler_that_reads_interrupts_a_wait(self, service: FaultService) -> None:
        """It waits for its own turn, not for the one of the code that it interrupts."""
        client = blob_client(service.blob_url("c", "001"))
        done = list[bytes]()

        def handle(_number: int, _frame: FrameType | None) -> None:
            done.append(client.read()[0])

        held = client.service.admission
        held.pacing.refused(time.monotonic(), time.monotonic(), 0.3)
        before = signal.signal(signal.SIGUSR1, handle)
        try:
            main = threading.get_ident()

            def interrupt() -> None:
                wait_until(lambda: bool(held._waiting))
                signal.pthread_kill(main, signal.SIGUSR1)

            thread = in_thread(interrupt)
            assert blob_client(service.blob_url("c", "002")).read()[0] == content(102, 2)
            thread.join()
        finally:
            signal.signal(signal.SIGUSR1, before)
        assert done == [content(101, 1)]


class TestService:
    def test_retry_after_holds_every_transfer(self, service: FaultService) -> None:
        """Reads, small blobs, listings, properties and writes, with any configuration: none is sent before its end."""
        seconds = 0.7
        others = [
            lambda: blob_client(service.blob_url("c", "001"), PATIENT).read(),
            lambda: blob_client(service.blob_url("c", "002")).get_properties(),
            lambda: list(container_client(service.container_url("c")).pages()),
            lambda: blob_client(service.blob_url("d", "new")).put(b"x" * 200_000),
            lambda: blob_client(service.blob_url("c", "003")).delete(),
            lambda: read_all(service, NAMES[10:20]),
        ]
        service.create_container("d")
        blob_client(service.blob_url("c", "004")).read()  # leaves a connection for the multiplexer
        service.script(Match("get_blob", path="000$"), [Status(503, retry_after=seconds)])
        held = blob_client(service.blob_url("c", "000"), PATIENT)
        thread = in_thread(held.read)
        wait_until(lambda: held.service.admission.pacing.is_closed)
        run_threads(len(others), lambda number: others[number]())
        thread.join()
        refused = service.requests(status=503)[0]
        assert refused.finished is not None
        later = [entry for entry in service.requests() if entry.number > refused.number]
        assert len(later) > len(others) + 10
        assert min(entry.time for entry in later) >= refused.finished + seconds

    @pytest.mark.usefixtures("no_way_out")
    @pytest.mark.parametrize("status", [503, 429])
    def test_refusals_of_a_throttled_account_are_not_attempts(self, service: FaultService, status: int) -> None:
        """More than two at once are refused. Two attempts are enough for every blob, which is read once."""
        service.latency = 0.002
        service.script(Match("get_blob", where=lambda _: service.active > 2), [Status(status)], repeat=True)
        assert read_all(service, NAMES, replace(PATIENT, max_attempts=2, max_connections=16)) == [
            content(100 + number, number) for number in range(len(NAMES))
        ]
        answered = Counter(entry.blob for entry in service.requests("get_blob") if entry.status == 206)
        assert set(answered.values()) == {1}
        assert service.requests(status=status)

    def test_one_refusal_does_not_hold_up_the_others(self, service: FaultService) -> None:
        """What was sent before is received, and one accepted request opens the service for all."""
        service.script(Match("get_blob", nth=20), [Status(503)])
        before = metrics()
        assert len(read_all(service, NAMES)) == len(NAMES)
        seen = metrics() - before
        assert seen.throttles == 1
        assert seen.requests == len(NAMES) + 1
        assert seen.throttled_seconds == 0
        assert seen.pace == float("inf")

    def test_a_service_that_refuses_everything_ends_the_attempts(self, service: FaultService) -> None:
        """Each request has as many as it may have, also if others wait."""
        service.script(Match("get_blob"), [Status(503)], repeat=True)

        def read(number: int) -> None:
            with pytest.raises(HttpResponseError, match=f"after {QUICK.max_attempts} attempts"):
                blob_client(service.blob_url("c", f"{number:03}")).read()

        with taking():
            run_threads(8, read)
        assert len(service.requests(status=503)) >= 8 * QUICK.max_attempts

    def test_all_of_a_process_share_one(self, service: FaultService) -> None:
        """Whatever the container, the credential and the configuration; another host has another."""
        one = blob_client(service.blob_url("c", "000")).service.admission
        assert container_client(service.container_url("d"), PATIENT).service.admission is one
        assert blob_client(service.blob_url("c", "001") + "?sv=1&sig=x", credential=None).service.admission is one
        assert admission_for("another", QUICK) is not one


class TestReporting:
    def test_the_pace_and_the_time_of_waiting(self, service: FaultService) -> None:
        before = metrics()
        service.script(Match("get_blob", nth=2), [Status(503, retry_after=0.2)])
        client = blob_client(service.blob_url("c", "000"))
        client.read()
        client.read()
        seen = metrics() - before
        assert 0 < seen.pace < float("inf")
        assert seen.throttled_seconds > 0  # how long depends on when the thread got to wait
        assert seen.throttles == 1
        forget_admissions()
        assert metrics().pace == float("inf")

    def test_debug_lines_name_the_host_and_the_pace(
        self, service: FaultService, caplog: pytest.LogCaptureFixture
    ) -> None:
        service.script("get_blob", [Status(503, "ServerBusy", retry_after=0.1)])
        with caplog.at_level("DEBUG", logger="azstoragetorch"):
            blob_client(service.blob_url("c", "000") + "?sv=1&sig=secret", credential=None).read()
        lines = [line for line in caplog.messages if " refuses " in line or " accepts " in line]
        host = service.blob_url("c", "000").split("/")[2]
        assert lines[0].startswith(f"{host} refuses requests (503 ServerBusy, Retry-After 0.1 s): at most ")
        assert lines[1].startswith(f"{host} accepts requests: at most ")
        assert "secret" not in caplog.text

    def test_a_warning_once_a_minute_counts(
        self, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The first at once; later throttling is counted in the next one."""
        now = 1000.0
        monkeypatch.setattr(admission, "_warned", {})
        monkeypatch.setattr(admission, "_throttled", deque())
        monkeypatch.setattr("azstoragetorch._blob.admission.time.monotonic", lambda: now)
        monkeypatch.setattr(admission, "start_thread", lambda warn: warn() or True)
        found = Admission("h", Pacing(8))

        def refuse(count: int, answer: str) -> None:
            for _ in range(count):
                found.refused(now, answer, None, 8)

        with caplog.at_level("WARNING", logger="azstoragetorch"):
            refuse(6, "503 ServerBusy")  # the first three can be chance
            assert ["refused 1 in the last 60 s (1 x 503 ServerBusy)" in message for message in caplog.messages] == [
                True
            ]
            now += 59
            refuse(1, "429 TooManyRequests")
            assert len(caplog.messages) == 1
            now += 2
            refuse(1, "503 ServerBusy")
        assert len(caplog.messages) == 2
        assert "refused 4 in the last 61 s (3 x 503 ServerBusy, 1 x 429" in caplog.messages[1]

    def test_small_blobs_on_one_thread_are_counted_like_others(
        self, service: FaultService, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Every refusal once, in the metrics and for the warning."""
        noted: list[str] = []
        monkeypatch.setattr(admission, "_note_throttling", noted.append)
        read_all(service, NAMES)  # leaves idle connections, which the multiplexer uses
        service.script(Match("get_blob", nth=5, every=10), [Status(503, "ServerBusy", retry_after_ms=1)] * 8)
        before = metrics()
        assert len(read_all(service, NAMES, replace(QUICK, max_attempts=100))) == len(NAMES)
        assert (metrics() - before).throttles == 8
        assert noted == ["503 ServerBusy"] * 8


def read_all(service: FaultService, names: list[str], transfer: TransferConfig = QUICK) -> list[bytes]:
    def urls() -> Iterator[str]:
        for name in names:
            yield service.blob_url("c", name)

    ahead = fetch_ahead(ClientFactory(False, transfer), urls(), depth=16)
    try:
        return [item.result().data for item in ahead]
    finally:
        ahead.close()
