"""Requests and writes that are interrupted, re-entered or cancelled at every line: nothing hangs, is lost or mixed."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from typing import Any

import pytest

from azstoragetorch._blob import commit, connection, service, transport, upload
from azstoragetorch._blob.client import BlobClient
from azstoragetorch._engine.config import TransferConfig
from azstoragetorch._engine.scope import Cancelled, Scope
from azstoragetorch._engine.threads import engine_for
from azstoragetorch.exceptions import FatalBlobIOWriteError
from tests.faults import FaultService
from tests.process.interrupts import Run, interrupt, sweep
from tests.support import QUICK, blob_client, container_client, content, run_threads, wait_until

OLD = b"the old content"
DATA = content(200_000)
NEW = content(420_000, 1)
REQUESTS = (transport, connection, service)


@pytest.fixture
def fault_service_with_data() -> Iterator[FaultService]:
    with FaultService() as served:
        served.put("c", "b", DATA)
        served.keeps_log = False
        yield served


@pytest.fixture
def served(fault_service_with_data: FaultService) -> Iterator[FaultService]:
    """Start with an empty pool, and leave an empty one."""
    transport.close_idle_connections()
    yield fault_service_with_data
    transport.close_idle_connections()


def write(client: BlobClient, data: bytes) -> None:
    """Write pieces that are collected, staged in the background and staged at once."""
    writer = client.writer()
    try:
        for start in range(0, 150_000, 30_000):
            writer.write(memoryview(data)[start : start + 30_000])
        writer.flush()
        writer.write(memoryview(data)[150_000:])
        writer.commit()
    except BaseException:
        writer.abort()
        raise


def use_everything(served: FaultService, name: str) -> None:
    """Write, list, read and delete one blob, as a signal handler might."""
    client = blob_client(served.blob_url("c", name))
    write(client, NEW)
    assert client.read()[0] == NEW
    pages = list(container_client(served.container_url("c")).pages(prefix=name))
    assert [listed for page in pages for listed in page.names] == [name]
    assert client.delete()


def check_pool(client: BlobClient) -> None:
    """Every idle connection is in the pool once, was not interrupted, and works."""
    idle = [each for connections in transport._pool.get()._idle.values() for each in connections]
    assert len(set(map(id, idle))) == len(idle)
    assert not any(each._is_interrupted or each._was_closed for each in idle)
    assert client.head().data == DATA


class TestRequests:
    @pytest.fixture(params=["new connection", "pooled connection"])
    def prepare(self, request: pytest.FixtureRequest, served: FaultService) -> Callable[[], None]:
        blob_client(served.blob_url("c", "b")).version()
        return transport.close_idle_connections if request.param == "new connection" else lambda: None

    @pytest.mark.untraced
    def test_an_interrupt_at_any_line_leaves_a_pool_that_works(
        self, served: FaultService, prepare: Callable[[], None]
    ) -> None:
        client = blob_client(served.blob_url("c", "b"), replace(QUICK, part_size=1 << 20))

        def check(_: object, run: Run) -> None:
            assert isinstance(run.error, KeyboardInterrupt) or run.result.data == DATA
            check_pool(client)

        client.head()
        sweep(prepare, lambda _: client.head(), check, files=REQUESTS, do=interrupt, turns=1)

    @pytest.mark.untraced
    def test_requests_inside_any_line_of_another(self, served: FaultService, prepare: Callable[[], None]) -> None:
        """As in a signal handler: both are right."""
        client = blob_client(served.blob_url("c", "b"), replace(QUICK, part_size=1 << 20))

        def check(_: object, run: Run) -> None:
            assert run.error is None
            assert run.result.data == DATA

        def do() -> None:
            use_everything(served, "inner")

        client.head()
        sweep(prepare, lambda _: client.head(), check, files=REQUESTS, do=do, turns=1)
        check_pool(client)

    @pytest.mark.untraced
    def test_a_cancel_at_any_line_wakes_no_connection_of_the_pool(
        self, served: FaultService, prepare: Callable[[], None]
    ) -> None:
        """The request is cancelled or returns its result; another request never gets its connection."""
        client = blob_client(served.blob_url("c", "b"), replace(QUICK, part_size=1 << 20))
        scopes: list[Scope] = []

        def set_up() -> Scope:
            prepare()
            scopes[:] = [Scope()]
            return scopes[0]

        def check(scope: Scope, run: Run) -> None:
            assert scope.is_cancelled == run.was_reached
            assert isinstance(run.error, Cancelled) or run.result.data == DATA
            check_pool(client)

        client.head()
        sweep(set_up, client.head, check, files=REQUESTS, do=lambda: scopes[0].cancel(), turns=1)


class TestWriter:
    CONFIG = replace(QUICK, max_connections=3, max_concurrency=2)

    @pytest.fixture(params=["small", "large", "mixed", "pieces"])
    def steps(self, request: pytest.FixtureRequest) -> Callable[[upload.BlockWriter], None]:
        view = memoryview(NEW)

        def small(writer: upload.BlockWriter) -> None:
            for start in range(0, len(NEW), 60_000):
                writer.write(view[start : start + 60_000])

        def large(writer: upload.BlockWriter) -> None:
            writer.write(view)

        def mixed(writer: upload.BlockWriter) -> None:
            writer.write(view[:70_000])
            writer.write(view[70_000:])
            writer.flush()

        def pieces(writer: upload.BlockWriter) -> None:
            writer.write(view[:10])
            writer.write_pieces([view[10:300_000], view[300_000:]], block_size=65536, concurrency=2)

        return {"small": small, "large": large, "mixed": mixed, "pieces": pieces}[request.param]

    @pytest.fixture(params=["free threads", "no free thread"])
    def config(self, request: pytest.FixtureRequest) -> Iterator[TransferConfig]:
        """Without a free thread the writing thread itself stages the blocks."""
        config = replace(self.CONFIG, max_connections=3 if request.param == "free threads" else 1)
        release = threading.Event()
        if request.param == "no free thread":
            engine_for(config).submit(release.wait)
        yield config
        release.set()

    @pytest.mark.untraced
    def test_an_interrupt_at_any_line_ends_it_and_commits_nothing(
        self, served: FaultService, steps: Callable[[upload.BlockWriter], None], config: TransferConfig
    ) -> None:
        """Nothing is committed, also not later; no byte of the budget stays on loan, and nothing waits."""
        served.put("c", "b", OLD)
        client = blob_client(served.blob_url("c", "b"), config)
        budget = engine_for(config).budget

        def act(writer: upload.BlockWriter) -> None:
            steps(writer)
            writer.flush()

        def check(writer: upload.BlockWriter, run: Run) -> None:
            # Threads share the calls of a `map`, so a line may be reached less often than before.
            assert isinstance(run.error, KeyboardInterrupt) == run.was_reached
            taken = writer.written
            try:
                writer.commit()
            except FatalBlobIOWriteError:
                assert run.was_reached
                assert served.get("c", "b") == OLD
            else:  # between two calls: it has all bytes that it was given
                assert not run.was_reached or run.place.code.co_name in ("guarded", "_check", "_raise_failure")
                assert served.get("c", "b") == NEW[:taken]
                served.put("c", "b", OLD)
            writer.abort()
            wait_until(lambda: budget.in_flight == 0)

        runs = sweep(client.writer, act, check, files=[upload], do=interrupt)
        reached = {run.place.code.co_name for run in runs if run.was_reached}
        assert reached >= {"write", "guarded"} | ({"_stage"} if config.max_connections == 1 else set())

    @pytest.mark.untraced
    @pytest.mark.parametrize("size", [100, 100_000])
    def test_an_interrupt_of_the_commit_leaves_the_old_blob_or_the_new_one(
        self, served: FaultService, size: int
    ) -> None:
        client = blob_client(served.blob_url("c", "b"), self.CONFIG)

        def set_up() -> upload.BlockWriter:
            served.put("c", "b", OLD)
            writer = client.writer()
            writer.write(memoryview(NEW)[:size])
            return writer

        def check(writer: upload.BlockWriter, run: Run) -> None:
            assert isinstance(run.error, KeyboardInterrupt) == run.was_reached
            writer.abort()
            assert served.get("c", "b") in (OLD, NEW[:size])
            wait_until(lambda: engine_for(self.CONFIG).budget.in_flight == 0)

        sweep(set_up, upload.BlockWriter.commit, check, files=[upload, commit], do=interrupt, turns=1)

    @pytest.mark.untraced
    def test_another_write_inside_any_line(self, served: FaultService) -> None:
        """As in a signal handler that saves while the interrupted code saves."""
        client = blob_client(served.blob_url("c", "outer"), self.CONFIG)
        inner = blob_client(served.blob_url("c", "inner"), self.CONFIG)

        def check(_: object, run: Run) -> None:
            assert run.error is None
            assert served.get("c", "outer") == NEW
            if run.was_reached:  # whether a wait is needed depends on the other threads
                assert served.get("c", "inner") == DATA
                served.delete("c", "inner")

        sweep(
            lambda: None,
            lambda _: write(client, NEW),
            check,
            files=[upload, commit],
            do=lambda: write(inner, DATA),
            turns=1,
        )

    @pytest.mark.untraced
    def test_a_cancel_at_any_line_ends_it(self, served: FaultService) -> None:
        client = blob_client(served.blob_url("c", "b"), self.CONFIG)
        writers: list[upload.BlockWriter] = []

        def set_up() -> upload.BlockWriter:
            served.put("c", "b", OLD)
            writers[:] = [client.writer()]
            return writers[0]

        def act(writer: upload.BlockWriter) -> None:
            writer.write(memoryview(NEW)[:150_000])
            writer.write(memoryview(NEW)[150_000:])
            writer.commit()

        def check(writer: upload.BlockWriter, run: Run) -> None:
            assert run.error is None or isinstance(run.error, FatalBlobIOWriteError)
            assert served.get("c", "b") == OLD or served.get("c", "b") == NEW
            if run.error is None:
                assert served.get("c", "b") == NEW
            writer.abort()
            wait_until(lambda: engine_for(self.CONFIG).budget.in_flight == 0)

        sweep(set_up, act, check, files=[upload], do=lambda: writers[0].cancel(), turns=1)


class TestNoFreeThread:
    """A writer needs only the thread that writes."""

    @pytest.mark.parametrize("connections", [1, 2])
    def test_all_threads_are_busy_with_something_else(self, served: FaultService, connections: int) -> None:
        config = replace(QUICK, max_connections=connections, memory_limit=3 << 20)
        release = threading.Event()
        for _ in range(connections):
            engine_for(config).submit(release.wait)
        try:
            write(blob_client(served.blob_url("c", "b"), config), NEW)
        finally:
            release.set()
        assert served.get("c", "b") == NEW

    def test_each_thread_of_the_engine_writes(self, served: FaultService) -> None:
        """Writers inside the tasks of a `map` that uses all threads."""
        config = replace(QUICK, max_connections=2, memory_limit=3 << 20)

        def task(number: int, _scope: Scope) -> None:
            write(blob_client(served.blob_url("c", f"b{number}"), config), NEW)

        engine_for(config).map(task, range(4), 4)
        assert all(served.get("c", f"b{number}") == NEW for number in range(4))


class TestHandOver:
    """The socket of a cancelled request is closed by the request or the cancel, whichever comes later."""

    def test_a_cancel_in_the_middle_closes_it(self, served: FaultService, monkeypatch: pytest.MonkeyPatch) -> None:
        """The request ends while the cancel is about to shut down its socket: the descriptor still belongs to it."""
        origin = transport.Origin.of("http", served.address, QUICK)
        held = connection.Connection(origin)
        held.send("GET", "/devstoreaccount1/c/b", {}, None)
        descriptor = held.socket.fileno()
        seen: list[int] = []
        real = socket.socket.shutdown

        ours = held.socket

        def shutdown(sock: Any, how: int) -> None:
            if sock is ours:  # and not one of the service
                held.close()  # as the request does in its thread
                seen.append(sock.fileno())
            real(sock, how)

        monkeypatch.setattr("socket.socket.shutdown", shutdown)
        held.interrupt()
        assert seen == [descriptor]
        assert held._http.sock is None

    def test_a_cancel_that_comes_late_touches_nothing(self, served: FaultService, monkeypatch: Any) -> None:
        held = connection.Connection(transport.Origin.of("http", served.address, QUICK))
        held.send("GET", "/devstoreaccount1/c/b", {}, None)
        seen: list[Any] = []
        real, ours = socket.socket.shutdown, held.socket
        monkeypatch.setattr("socket.socket.shutdown", lambda sock, how: (seen.append(sock), real(sock, how)))
        held.close()
        held.interrupt()
        assert ours not in seen

    def test_several_cancels_at_once(self, served: FaultService) -> None:
        for _ in range(50):
            held = connection.Connection(transport.Origin.of("http", served.address, QUICK))
            held.send("GET", "/devstoreaccount1/c/b", {}, None)
            calls = [held.interrupt, held.interrupt, held.close, held.interrupt]
            run_threads(len(calls), lambda number, calls=calls: calls[number]())  # type: ignore[misc]
            assert held._http.sock is None
        with suppress(OSError):
            held.interrupt()
