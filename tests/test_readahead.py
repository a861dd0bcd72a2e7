"""Reads at any position in any order are those of a file; requests are counted, and memory is bounded."""

from __future__ import annotations

import contextlib
import gc
import io
import random
import sys
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest
import torch
from azure.core.exceptions import ResourceNotFoundError
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from azstoragetorch._blob.client import Head
from azstoragetorch._blob.download import BlobVersion
from azstoragetorch._blob.readahead import ReadAhead, _Content
from azstoragetorch._engine.config import KiB, MiB, TransferConfig
from azstoragetorch._engine.threads import Engine, engine_for
from azstoragetorch.io import BlobIO
from tests.faults import FaultService, Match, Reset, Stall, Status, Together, Torn
from tests.support import (
    QUICK,
    blob_client,
    collect_garbage,
    content,
    in_time,
    run_python,
    taking,
    wait_until,
    watch_peak,
)

PART = 64 * KiB
BORDERS = [0, 100, 32 * KiB, PART, 2 * PART, 128 * KiB, 256 * KiB, 512 * KiB, MiB, MiB + PART, 2 * MiB]
near_borders = st.builds(lambda base, delta: max(0, base + delta), st.sampled_from(BORDERS), st.integers(-2, 2))


@pytest.fixture
def service(fault_service: FaultService) -> FaultService:
    return fault_service


def open_blob(service: FaultService, transfer: TransferConfig = QUICK, name: str = "b") -> BlobIO:
    return BlobIO(service.blob_url("c", name), "rb", credential=False, transfer=transfer)


def lines(size: int, seed: int) -> bytes:
    """Content with lines of very different lengths."""
    randomness = random.Random(seed)
    data = bytearray(content(size, seed).replace(b"\n", b"x"))
    at = 0
    while at < size:
        data[at] = 10
        at += int(randomness.expovariate(1 / 5000)) + 1
    return bytes(data)


class ReadMachine(RuleBasedStateMachine):
    """Every call returns what `io.BytesIO` returns, and leaves the same position."""

    service: FaultService

    @initialize(
        size=near_borders,
        seed=st.integers(0, 3),
        read_ahead=st.sampled_from([0, PART, 512 * KiB, 4 * MiB]),
        memory_limit=st.sampled_from([MiB, 8 * MiB]),
        part=st.sampled_from([PART, PART + 1, MiB]),
        known=st.sampled_from(["nothing", "version", "head"]),
    )
    def open(self, size: int, seed: int, read_ahead: int, memory_limit: int, part: int, known: str) -> None:
        self.service = FaultService()
        self.data = lines(size, seed)
        etag = self.service.put("c", "b", self.data)
        transfer = replace(
            QUICK, read_ahead=read_ahead, memory_limit=memory_limit, part_size=part, max_attempts=8, max_connections=6
        )
        client = blob_client(self.service.blob_url("c", "b"), transfer)
        version = None if known == "nothing" else BlobVersion(size, etag)
        self.blob = BlobIO._of(client, version, self.data[:1000] if known == "head" else b"")
        self.oracle = io.BytesIO(self.data)
        self.engine = engine_for(transfer)
        self.peak = watch_peak(self.engine.budget)

    @rule(offset=near_borders)
    def seek(self, offset: int) -> None:
        assert self.blob.seek(offset) == self.oracle.seek(offset)

    @rule(offset=st.integers(-200_000, 200_000))
    def seek_on(self, offset: int) -> None:
        offset = max(offset, -self.oracle.tell())
        assert self.blob.seek(offset, io.SEEK_CUR) == self.oracle.seek(offset, io.SEEK_CUR)

    @rule(back=near_borders)
    def seek_from_end(self, back: int) -> None:
        back = min(back, len(self.data))
        assert self.blob.seek(-back, io.SEEK_END) == self.oracle.seek(-back, io.SEEK_END)

    @rule(size=near_borders)
    def read(self, size: int) -> None:
        assert self.blob.read(size) == self.oracle.read(size)

    @rule(size=st.integers(1, 3000), times=st.integers(1, 60))
    def read_on(self, size: int, times: int) -> None:
        for _ in range(times):
            assert self.blob.read(size) == self.oracle.read(size)

    @rule(size=st.sampled_from([None, -1]))
    def read_rest(self, size: int | None) -> None:
        assert self.blob.read(size) == self.oracle.read(size)

    @rule(size=near_borders)
    def readinto(self, size: int) -> None:
        ours, theirs = bytearray(size), bytearray(size)
        assert self.blob.readinto(ours) == self.oracle.readinto(theirs)
        assert ours == theirs

    @rule(size=st.one_of(near_borders, st.just(-1)), into=st.booleans())
    def read_one(self, size: int, into: bool) -> None:
        """Read what is available, at least one byte."""
        position = self.oracle.tell()
        if into:
            buffer = bytearray(max(0, size))
            count = self.blob.readinto1(buffer)
            got = bytes(buffer[:count])
        else:
            got = self.blob.read1(size)
        assert got == self.data[position : position + len(got)]
        assert len(got) <= size or size < 0
        assert got or position >= len(self.data) or size == 0 or (into and size < 0)
        self.oracle.seek(position + len(got))

    @rule(size=st.sampled_from([0, 1, 100, 100_000]))
    def peek(self, size: int) -> None:
        position = self.oracle.tell()
        got = self.blob.peek(size)
        assert got == self.data[position : position + len(got)]
        assert got or position >= len(self.data)

    @rule(limit=st.sampled_from([None, -1, 0, 1, 100, 70_000]))
    def readline(self, limit: int | None) -> None:
        assert self.blob.readline(limit) == self.oracle.readline(-1 if limit is None else limit)

    @rule(count=st.integers(1, 20))
    def iterate(self, count: int) -> None:
        for _ in range(count):
            assert next(self.blob, None) == next(self.oracle, None)

    @rule(fault=st.sampled_from([Status(503), Reset(), Torn(after=100), Torn(after=50_000)]))
    def fault(self, fault: Any) -> None:
        if self.service.unused_faults() == []:
            self.service.script("get_blob", [fault])

    @invariant()
    def position_and_budget(self) -> None:
        if hasattr(self, "blob"):
            assert self.blob.tell() == self.oracle.tell()
            assert self.engine.budget.in_flight <= self.engine.budget.limit

    def teardown(self) -> None:
        if hasattr(self, "blob"):
            self.blob.close()
            wait_until(lambda: self.engine.budget.in_flight == 0)
            assert self.peak() <= self.engine.budget.limit
            self.service.close()


TestReadMachine = ReadMachine.TestCase
TestReadMachine.settings = settings(max_examples=60, stateful_step_count=15, deadline=None)


@pytest.fixture(scope="module")
def checkpoint() -> bytes:
    """318 tensors in 94 MiB, as in a ResNet: most of them are tiny."""
    state = {f"layer{number}.weight": torch.full((460_000,), float(number)) for number in range(53)}
    state |= {f"layer{number}.norm": torch.full((512,), float(number)) for number in range(265)}
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


class TestCounts:
    """Requests are counted exactly, with the default configuration."""

    DEFAULT = TransferConfig()

    def test_opening_and_seeking_cost_nothing(self, service: FaultService) -> None:
        service.put("c", "b", content(1000))
        blob = open_blob(service, self.DEFAULT)
        blob.seek(10)
        blob.seek(5, io.SEEK_CUR)
        assert blob.tell() == 15
        repr(blob), blob.name, blob.mode, blob.etag, blob.readable(), blob.seekable()
        blob.read(0)
        blob.readinto(bytearray(0))
        blob.close()
        assert service.connections_opened == 0

    @pytest.mark.parametrize("size", [0, 1, 1000, MiB, 8 * MiB - 1, 8 * MiB])
    @pytest.mark.parametrize("way", ["read", "readinto", "pieces", "end", "lines"])
    def test_a_blob_that_fits_into_a_part_is_one_request(self, service: FaultService, size: int, way: str) -> None:
        data = content(size)
        service.put("c", "b", data)
        with open_blob(service, self.DEFAULT) as blob:
            if way == "read":
                assert blob.read() == data
            elif way == "readinto":
                buffer = bytearray(size)
                assert blob.readinto(buffer) == size
                assert buffer == data
            elif way == "pieces":
                assert b"".join(iter(lambda: blob.read(100_000), b"")) == data
            elif way == "end":
                assert blob.seek(0, io.SEEK_END) == size
                blob.seek(0)
                assert blob.read() == data
            else:
                assert b"".join(blob) == data
            assert blob.size == size
        assert len(service.log) == 1
        assert all(entry.method == "GET" for entry in service.log)

    @pytest.mark.parametrize("length", [1000, 1 * MiB, 2 * MiB, 20 * MiB])
    @pytest.mark.parametrize("way", ["read", "readinto"])
    def test_a_piece_out_of_the_middle_costs_what_it_is_long(
        self, service: FaultService, length: int, way: str
    ) -> None:
        data = content(50 * MiB)
        service.put("c", "b", data)
        with open_blob(service, self.DEFAULT) as blob:
            blob.seek(40 * MiB)
            if way == "read":
                piece: bytes | bytearray = blob.read(length)
            else:
                piece = bytearray(length)
                piece = piece[: blob.readinto(piece)]
            assert piece == data[40 * MiB :][:length]
            service.wait_until_idle()
        assert len(service.log) == -(-len(piece) // (8 * MiB))
        assert sum(entry.sent for entry in service.log) == max(len(piece), 64 * KiB)

    def test_a_large_blob_is_read_in_parts_and_no_byte_twice(self, service: FaultService) -> None:
        data = content(50 * MiB)
        service.put("c", "b", data)
        with open_blob(service, self.DEFAULT) as blob:
            assert blob.read() == data
        assert len(service.log) == 7
        assert sum(entry.sent for entry in service.log) == len(data)

    def test_read_on_in_small_pieces_no_byte_is_fetched_twice(self, service: FaultService) -> None:
        data = content(50 * MiB)
        service.put("c", "b", data)
        with open_blob(service, self.DEFAULT) as blob:
            for start in range(0, len(data), 100_000):
                assert blob.read(100_000) == data[start : start + 100_000]
        assert sum(entry.sent for entry in service.log) == len(data)
        assert len(service.log) <= 16

    def test_the_end_of_a_blob_is_kept(self, service: FaultService) -> None:
        """Archives have their directory there, and their readers return to it."""
        data = content(20 * MiB)
        service.put("c", "b", data)
        with open_blob(service, self.DEFAULT) as blob:
            for back in (22, 65_000, 22, 5000):
                blob.seek(-back, io.SEEK_END)
                assert blob.read(22) == data[len(data) - back :][:22]
        assert len(service.log) <= 3

    def test_jumping_about_fetches_little_more_than_is_asked_for(self, service: FaultService) -> None:
        data = content(50 * MiB)
        service.put("c", "b", data)
        with open_blob(service, self.DEFAULT) as blob:
            blob.seek(30 * MiB)
            blob.read(10)
            service.wait_until_idle()
            service.reset_log()
            for number in range(50):
                at = (29 * MiB - number * 3_456_789) % (49 * MiB)
                blob.seek(at)
                assert blob.read(1000) == data[at : at + 1000]
        assert len(service.log) <= 50
        assert sum(entry.sent for entry in service.log) <= 50 * 128 * KiB

    def test_torch_load_of_many_tensors(self, service: FaultService, checkpoint: bytes) -> None:
        service.put("c", "b", checkpoint)
        with open_blob(service, self.DEFAULT) as blob:
            state = torch.load(blob)
        assert len(state) == 318
        assert all(bool((value == float(name[5:].partition(".")[0])).all()) for name, value in state.items())
        assert len(service.log) <= 24
        assert {entry.operation for entry in service.log} == {"get_blob"}
        assert sum(entry.sent for entry in service.log) <= 1.02 * len(checkpoint)

    def test_torch_save_makes_blocks_and_one_commit(self, service: FaultService, checkpoint: bytes) -> None:
        service.create_container("c")
        state = torch.load(io.BytesIO(checkpoint))
        with BlobIO(service.blob_url("c", "b"), "wb", credential=False) as blob:
            torch.save(state, blob)
        assert service.get("c", "b") == checkpoint
        operations = [entry.operation for entry in service.log]
        assert operations[-1] == "put_block_list"
        assert set(operations[:-1]) == {"put_block"}
        assert len(operations) == -(-len(checkpoint) // (8 * MiB)) + 1


class TestWindow:
    def test_opening_an_archive_requests_all_of_it(self, service: FaultService) -> None:
        """After the first bytes and the directory at the end, the bytes between are read ahead."""
        data = content(50 * MiB)
        service.put("c", "b", data)
        with open_blob(service, TestCounts.DEFAULT) as blob:
            blob.read(4)
            blob.seek(-22, io.SEEK_END)
            service.peak_active = service.active
            service.script("get_blob", [Together(6)], repeat=True)
            assert blob.read() == data[-22:]
            assert service.peak_active >= 6
            assert blob.seek(4) == 4
            assert blob.read() == data[4:]
        assert sum(entry.sent for entry in service.log) == len(data)
        assert len(service.log) <= 16

    def test_who_looks_at_the_end_alone_has_not(self, service: FaultService) -> None:
        data = content(50 * MiB)
        service.put("c", "b", data)
        with open_blob(service, TestCounts.DEFAULT) as blob:
            blob.seek(-22, io.SEEK_END)
            assert blob.read() == data[-22:]
            blob.seek(30 * MiB)
            assert blob.read(10) == data[30 * MiB :][:10]
            service.wait_until_idle()
        assert sum(entry.sent for entry in service.log) <= 9 * MiB

    def test_sequential_reading_has_more_and_more_in_flight(self, service: FaultService) -> None:
        transfer = replace(QUICK, read_ahead=8 * MiB, memory_limit=16 * MiB, max_connections=10)
        service.put("c", "b", content(8 * MiB))
        service.latency = 0.05
        with open_blob(service, transfer) as blob:
            while blob.read(10_000):
                pass
        assert service.peak_active >= 5

    def test_without_read_ahead_nothing_is_fetched_that_is_not_asked_for(self, service: FaultService) -> None:
        service.put("c", "b", content(4 * MiB))
        with open_blob(service, replace(QUICK, read_ahead=0, max_connections=11)) as blob:
            for _ in range(10):
                blob.read(10_000)
        assert sum(entry.sent for entry in service.log) <= 100_000 + 2 * 128 * KiB

    def test_what_was_read_is_let_go(self, service: FaultService) -> None:
        """A reader of a large blob holds no more than its window."""
        transfer = replace(QUICK, read_ahead=256 * KiB, memory_limit=64 * MiB, max_connections=12)
        service.put("c", "b", content(8 * MiB))
        engine = engine_for(transfer)
        with open_blob(service, transfer) as blob:
            while blob.read(10_000):
                assert engine.budget.in_flight <= 1 * MiB

    def test_one_that_jumps_about_neither(self, service: FaultService) -> None:
        transfer = replace(QUICK, read_ahead=512 * KiB, memory_limit=64 * MiB, max_connections=13)
        data = content(8 * MiB)
        service.put("c", "b", data)
        engine, randomness = engine_for(transfer), random.Random(2)
        with open_blob(service, transfer) as blob:
            for _ in range(100):
                at = randomness.randrange(7 * MiB)
                blob.seek(at)
                assert blob.read(100) == data[at : at + 100]
                assert engine.budget.in_flight <= 1 * MiB

    @pytest.mark.parametrize("size", [3 * MiB, 12 * MiB])
    def test_the_budget_is_kept_whatever_the_size_of_the_blob(self, service: FaultService, size: int) -> None:
        transfer = replace(QUICK, read_ahead=64 * MiB, memory_limit=1 * MiB, max_connections=14)
        data = content(size)
        service.put("c", "b", data)
        engine = engine_for(transfer)
        peak = watch_peak(engine.budget)
        readers = [open_blob(service, transfer) for _ in range(4)]
        for _ in range(20):
            for reader in readers:
                reader.read(50_000)
        assert 512 * KiB < peak() <= 1 * MiB
        for reader in readers:
            position = reader.tell()
            assert reader.read() == data[position:]
            reader.close()
        wait_until(lambda: engine.budget.in_flight == 0)

    def test_an_error_ahead_is_reported_when_it_is_reached(self, service: FaultService) -> None:
        service.put("c", "b", content(1 * MiB))
        service.script(Match("get_blob", nth=3), [Status(404)], repeat=True)
        with open_blob(service) as blob:
            good = 0
            with pytest.raises(Exception, match="404"):
                while piece := blob.read(10_000):
                    assert piece == content(1 * MiB)[good : good + 10_000]
                    good += 10_000
        assert good >= 60_000

    def test_an_interrupt_of_another_thread_does_not_end_a_read(
        self, service: FaultService, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """If no thread can be started, any thread receives for all: if it is interrupted, the reader receives."""
        data = content(50 * KiB)
        service.put("c", "b", data)
        transfer = replace(QUICK, max_connections=1, memory_limit=3 * MiB + 1)
        client = blob_client(service.blob_url("c", "b"), transfer)
        reader = ReadAhead(client.service, client.url)
        arrived, busy = _Content._arrived, threading.Event()

        def interrupt(*_: object) -> None:
            monkeypatch.setattr(_Content, "_arrived", arrived)
            reading.append(pool.submit(reader.read, 0))
            wait_until(lambda: bool(reader._bell._sleepers))
            raise KeyboardInterrupt

        reading: list[Future[bytes]] = []
        with ThreadPoolExecutor() as pool:
            try:
                engine_for(transfer).submit(busy.wait)  # its only thread
                assert reader.size() == len(data)
                (segment,) = reader._segments
                assert segment.job is not None
                monkeypatch.setattr(_Content, "_arrived", interrupt)
                with pytest.raises(KeyboardInterrupt):
                    segment.job.run()
                assert reading[0].result(60) == data
                reader.close()
            finally:
                busy.set()

    def test_a_head_that_is_known_is_not_fetched(self, service: FaultService) -> None:
        data = content(200_000)
        version = BlobVersion(len(data), service.put("c", "b", data))
        client = blob_client(service.blob_url("c", "b"))
        whole = BlobIO._of(client, version, data)
        assert whole.read() == data
        assert service.log == []
        for start in (0, 1, 50_000, 99_999, 100_000, 100_001):
            part = BlobIO._of(client, version, data[:100_000])
            part.seek(start)
            assert part.read() == data[start:]
            part.close()
        assert min(entry.range[0] for entry in service.log) == 100_000  # type: ignore[index]
        assert client.head() == Head(version, data[:PART])


class TestDropped:
    """A reader that is not closed gives back what it holds."""

    TRANSFER = replace(QUICK, read_ahead=1 * MiB, memory_limit=4 * MiB, max_connections=15)

    @pytest.fixture
    def engine(self, service: FaultService) -> Engine:
        service.put("c", "b", content(4 * MiB))
        return engine_for(self.TRANSFER)

    def start(self, service: FaultService) -> BlobIO:
        blob = open_blob(service, self.TRANSFER)
        for _ in range(20):
            blob.read(10_000)
        return blob

    def test_when_it_goes(self, service: FaultService, engine: Engine) -> None:
        blob = self.start(service)
        assert engine.budget.in_flight > 0
        del blob
        wait_until(lambda: engine.budget.in_flight == 0)

    def test_when_a_cycle_of_it_is_collected(self, service: FaultService, engine: Engine) -> None:
        cycle: dict[str, object] = {"blob": self.start(service)}
        cycle["self"] = cycle
        del cycle
        collect_garbage()
        wait_until(lambda: engine.budget.in_flight == 0)

    def test_even_in_the_middle_of_what_the_engine_does(self, service: FaultService, engine: Engine) -> None:
        """The collector can run anywhere, also where the thread holds a lock of the package."""
        ours = ("engine.py", "readahead.py", "transport.py", "upload.py", "download.py")
        droppable: list[list[object]] = []
        collected = 0

        def trace(frame: Any, event: str, _argument: object) -> Any:
            nonlocal collected
            if not frame.f_code.co_filename.endswith(ours):
                return None
            if event == "line" and droppable and random.random() < 0.05:
                cycle = droppable.pop()
                cycle.append(cycle)
                del cycle
                gc.collect(0)
                collected += 1
            return trace

        def act() -> None:
            for _ in range(3):
                droppable.extend([self.start(service)] for _ in range(10))
                blob = self.start(service)
                writer = BlobIO(service.blob_url("c", "new"), "wb", credential=False, transfer=self.TRANSFER)
                droppable.append([writer])
                writer.write(content(150_000))
                del writer
                sys.settrace(trace)
                try:
                    blob.read(2 * MiB)
                    blob.seek(0)
                    while droppable:
                        blob.read(100_000)
                        blob.seek(random.randrange(3 * MiB))
                finally:
                    sys.settrace(None)
                blob.close()

        with pytest.warns(ResourceWarning, match="nothing was committed"):
            in_time(act, 60)
        collect_garbage()  # what has aged in the meantime
        assert collected >= 30
        wait_until(lambda: engine.budget.in_flight == 0)

    def test_closing_does_not_wait_for_what_is_in_progress(self, service: FaultService, engine: Engine) -> None:
        service.script(Match("get_blob", nth=2), [Stall(60)], repeat=True)
        blob = open_blob(service, replace(self.TRANSFER, read_timeout=240, part_size=128 * KiB))
        blob.read(70_000)
        service.wait_for_requests(2)
        with taking():
            blob.close()
            wait_until(lambda: engine.budget.in_flight == 0)


PROGRAM = """
import resource, sys
from azstoragetorch import TransferConfig
from azstoragetorch.io import BlobIO

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024

transfer = TransferConfig(part_size=1 << 20, block_size=1 << 20, memory_limit=24 << 20, read_ahead=16 << 20)
url, new = sys.argv[1:]
with BlobIO(url, "rb", credential=False, transfer=transfer) as blob:
    blob.read(100)
with BlobIO(new, "wb", credential=False, transfer=transfer) as blob:
    blob.write(b"warm")
before = peak()
total = 0
with BlobIO(url, "rb", credential=False, transfer=transfer) as blob:
    while piece := blob.read(100_000):
        total += len(piece)
print(total, peak() - before)
before = peak()
with BlobIO(new, "wb", credential=False, transfer=transfer) as blob:
    for _ in range(total // 100_000):
        blob.write(bytes(100_000))
print(total // 100_000 * 100_000, peak() - before)
"""


def test_the_process_stays_small(service: FaultService) -> None:
    """Measured from outside: 24 MiB in flight while 200 MiB are transferred in each direction."""
    size = 200 * MiB
    service.put("c", "b", bytes(size))
    answer = run_python(PROGRAM, service.blob_url("c", "b"), service.blob_url("c", "new"), timeout=120)
    (read, read_growth), (written, write_growth) = (map(int, line.split()) for line in answer.splitlines())
    assert read == size
    assert len(service.get("c", "new")) == written > 0.99 * size
    assert read_growth < 60  # MiB
    assert write_growth < 60


def test_threads_take_turns(service: FaultService) -> None:
    """Several threads can read one object: every byte is returned once."""
    data = content(1 * MiB)
    service.put("c", "b", data)
    pieces: list[tuple[bytes, int]] = []
    lock = threading.Lock()
    with open_blob(service) as blob:

        def act() -> None:
            while True:
                with lock:
                    position, piece = blob.tell(), blob.read(3000)
                if not piece:
                    return
                pieces.append((piece, position))
                time.sleep(0)

        threads = [threading.Thread(target=act) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(240)
        blob.seek(0)
        together = [b""] * 4

        def read_on(number: int) -> None:
            together[number] = b"".join(iter(lambda: blob.read(3000), b""))

        threads = [threading.Thread(target=read_on, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(240)
    assert b"".join(piece for piece, _ in sorted(pieces, key=lambda pair: pair[1])) == data
    assert sorted(b"".join(together)) == sorted(data)


def test_after_an_error_no_older_one_is_raised(service: FaultService) -> None:
    """What was being read ahead when a read failed is requested again."""
    data = content(4 * MiB)
    service.put("c", "b", data)
    client = blob_client(service.blob_url("c", "b"), replace(QUICK, read_ahead=512 * KiB))
    with contextlib.closing(ReadAhead(client.service, client.url)) as reader:
        assert reader.read(0, 100) == data[:100]
        service.script("get_blob", [Status(404)], repeat=True)
        assert reader.read(100, 100) == data[100:200]
        ahead = reader._segments[1]
        job = ahead.job
        assert job is not None
        wait_until(lambda: job.error is not None)
        with pytest.raises(ResourceNotFoundError):
            reader.read(2 * MiB, MiB)
        service.clear_script()
        assert reader.read(ahead.span.start, 100) == data[ahead.span.start :][:100]
