"""Writing: the exact bytes, committed once, or nothing at all; bounded memory; the result of each fault."""

from __future__ import annotations

import base64
import hashlib
import pickle
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from typing import Any

import pytest
from azure.core.exceptions import (
    AzureError,
    ClientAuthenticationError,
    HttpResponseError,
    ResourceExistsError,
    ResourceNotFoundError,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from azstoragetorch._blob.upload import BlockWriter
from azstoragetorch._engine.config import KiB, MiB, TransferConfig
from azstoragetorch._engine.ranges import MAX_BLOCKS, block_size_at, even_cuts
from azstoragetorch._engine.threads import engine_for
from azstoragetorch.exceptions import FatalBlobIOWriteError
from azstoragetorch.io import BlobIO
from tests.azurite.container import Container
from tests.faults import (
    Fault,
    FaultService,
    GarbageStatusLine,
    Hangup,
    Hold,
    LostAnswer,
    Match,
    Reset,
    ResetInHeaders,
    ResetUpload,
    Stall,
    Status,
    Together,
    WrongHeader,
)
from tests.support import (
    IMPATIENT,
    PERSISTENT,
    QUICK,
    blob_client,
    content,
    in_time,
    interrupted_once,
    run_threads,
    taking,
    wait_until,
    watch_peak,
)

OLD = b"the old content"
TiB = 1 << 40


@pytest.fixture
def service(fault_service: FaultService) -> FaultService:
    fault_service.put("c", "b", OLD)
    return fault_service


def open_writer(service: FaultService, mode: Any = "wb", name: str = "b", transfer: TransferConfig = QUICK) -> BlobIO:
    return BlobIO(service.blob_url("c", name), mode, credential=False, transfer=transfer)


class TestPlans:
    @given(st.integers(0, 200 * TiB), st.integers(64 * KiB, 4000 * MiB))
    def test_blocks_are_within_the_limits_and_grow(self, written: int, first: int) -> None:
        size = block_size_at(written, first)
        assert first <= size <= 4000 * MiB
        assert block_size_at(written + 1, first) >= size

    @pytest.mark.parametrize(("first", "reach"), [(64 * KiB, 140), (8 * MiB, 165), (16 * MiB, 165), (4000 * MiB, 190)])
    def test_the_blocks_of_a_blob_reach_as_far_as_it_may_ever_grow(self, first: int, reach: int) -> None:
        """In TiB; the service allows 190."""
        written = 0
        for _ in range(MAX_BLOCKS):
            written += block_size_at(written, first)
        assert written >= reach * TiB

    @given(st.integers(0, 10_000), st.integers(1, 500))
    def test_cuts_are_few_and_even(self, length: int, limit: int) -> None:
        cuts = even_cuts(length, limit)
        assert len(cuts) == -(-length // limit)
        assert [cut.start for cut in cuts] == [0, *[cut.stop for cut in cuts[:-1]]][: len(cuts)]
        assert not cuts or cuts[-1].stop == length
        assert all(0 < len(cut) <= limit for cut in cuts)
        assert len({len(cut) for cut in cuts[:-1]}) <= 1


class TestRequests:
    """Requests are counted: none is unnecessary."""

    @pytest.mark.parametrize("size", [0, 1, 64 * KiB - 1])
    @pytest.mark.parametrize("mode", ["wb", "xb"])
    def test_what_fits_into_a_block_is_one_put_blob(self, service: FaultService, size: int, mode: str) -> None:
        with open_writer(service, mode, "new") as blob:
            for start in range(0, size, 1000):
                blob.write(content(size)[start : start + 1000])
        assert [entry.operation for entry in service.log] == ["put_blob"]
        assert service.get("c", "new") == content(size)

    def test_opening_makes_none(self, service: FaultService) -> None:
        blob = open_writer(service)
        blob.tell()
        blob.flush()
        assert service.connections_opened == 0
        blob.abort()
        assert service.connections_opened == 0

    def test_small_writes_make_full_blocks(self, service: FaultService) -> None:
        data = content(300_000)
        with open_writer(service) as blob:
            for start in range(0, len(data), 7000):
                blob.write(data[start : start + 7000])
                blob.flush()
        assert (
            sorted(entry.body_length for entry in service.requests("put_block")) == [300_000 - 4 * 65536] + [65536] * 4
        )
        assert len(service.requests("put_block_list")) == 1
        assert len(service.log) == 6
        assert service.get("c", "b") == data

    def test_a_large_write_makes_even_blocks(self, service: FaultService) -> None:
        with open_writer(service) as blob:
            blob.write(content(300_000))
        sizes = [entry.body_length for entry in service.requests("put_block")]
        assert len(sizes) == 5
        assert max(sizes) - min(sizes) < 5
        assert len(service.log) == 6

    def test_what_is_collected_goes_out_with_the_large_write_that_follows(self, service: FaultService) -> None:
        with open_writer(service) as blob:
            blob.write(b"head")
            blob.write(content(65536 * 4))
            blob.write(b"tail")
        assert len(service.requests("put_block")) == 6
        assert service.get("c", "b") == b"head" + content(65536 * 4) + b"tail"

    def test_writes_that_leave_connections_idle_continue_in_the_background(self, service: FaultService) -> None:
        gate = threading.Event()
        service.script("put_block", [Hold(gate)], repeat=True)
        blob = open_writer(service)
        for _ in range(3):
            blob.write(content(65536))
        service.wait_for_requests(3, "put_block")
        service.clear_script()
        gate.set()
        blob.close()
        assert service.get("c", "b") == content(65536) * 3

    def test_blocks_are_staged_at_once(self, service: FaultService) -> None:
        service.script("put_block", [Together(QUICK.max_concurrency)], repeat=True)
        with open_writer(service) as blob:
            blob.write(content(8 * 65536))
        assert service.peak_active == QUICK.max_concurrency

    def test_small_writes_do_not_wait_for_the_service(self, service: FaultService) -> None:
        gate = threading.Event()
        service.script("put_block", [Hold(gate)], repeat=True)
        blob = open_writer(service)
        for _ in range(8):
            blob.write(content(30_000))
        service.clear_script()
        gate.set()
        blob.close()
        assert service.get("c", "b") == content(30_000) * 8

    def test_ids_are_of_one_length_and_in_order(self, service: FaultService) -> None:
        with open_writer(service) as blob:
            blob.write(content(300_000))
        found = service.store.find("c", "b")
        assert found is not None
        ids = [block_id for block_id, _ in found.blocks]
        assert len({len(block_id) for block_id in ids}) == 1
        assert len(ids[0]) <= 64 * 4 / 3
        assert ids == sorted(ids, key=base64.b64decode)


class TestCaller:
    """The memory that is passed to `write` belongs to the caller again when it returns."""

    @pytest.mark.parametrize("size", [1000, 65535, 65536, 65537, 1_000_000])
    def test_it_may_be_changed_at_once(self, service: FaultService, size: int) -> None:
        service.latency = 0.02
        buffer = bytearray(content(size))
        with open_writer(service) as blob:
            blob.write(buffer)
            buffer[:] = bytes(size)
            blob.write(buffer)
        assert service.get("c", "b") == content(size) + bytes(size)

    def test_and_may_be_resized(self, service: FaultService) -> None:
        """No reference to it is kept."""
        buffer = bytearray(200_000)
        blob = open_writer(service)
        blob.write(buffer)
        buffer.append(1)
        blob.write(buffer)
        buffer.clear()
        blob.close()


def leave_by_an_error(blob: BlobIO) -> None:
    with suppress(KeyError), blob:
        raise KeyError


class WriteMachine(RuleBasedStateMachine):
    """Pieces of any size, in any order of calls: exactly what was written is committed, or nothing."""

    service: FaultService

    @initialize(
        mode=st.sampled_from(["wb", "xb"]),
        block=st.sampled_from([64 * KiB, 65 * KiB + 1]),
        validates=st.booleans(),
        end=st.sampled_from([BlobIO.close, BlobIO.close, BlobIO.abort, leave_by_an_error]),
    )
    def open(self, mode: Any, block: int, validates: bool, end: Callable[[BlobIO], None]) -> None:
        self.end = end
        self.service = FaultService()
        self.service.create_container("c")
        if mode == "wb":
            self.service.put("c", "b", OLD)
        transfer = replace(QUICK, block_size=block, validate_content=validates)
        self.mode = mode
        self.blob = BlobIO(self.service.blob_url("c", "b"), mode, credential=False, transfer=transfer)
        self.written = bytearray()

    @rule(
        base=st.sampled_from([0, 64 * KiB, 65 * KiB, 128 * KiB, 256 * KiB, 4 * (65 * KiB + 1)]),
        delta=st.integers(-3, 3),
        kind=st.sampled_from([bytes, bytearray, memoryview]),
    )
    def write(self, base: int, delta: int, kind: Any) -> None:
        data = content(max(0, base + delta), len(self.written) % 7)
        assert self.blob.write(kind(data)) == len(data)
        self.written += data

    @rule(size=st.integers(1, 5000), count=st.integers(1, 40))
    def write_small(self, size: int, count: int) -> None:
        data = content(size, 3)
        self.blob.writelines([data] * count)
        self.written += data * count

    @rule()
    def flush(self) -> None:
        self.blob.flush()

    @precondition(lambda self: self.mode == "wb")
    @rule(fault=st.sampled_from([Status(503), Reset(), LostAnswer(), ResetUpload(after=1000)]))
    def fault(self, fault: Fault) -> None:
        if self.service.unused_faults() == []:
            self.service.script(Match(method="PUT"), [fault])

    @invariant()
    def nothing_is_committed_yet(self) -> None:
        if hasattr(self, "blob"):
            assert self.blob.tell() == self.blob.size == len(self.written)
            assert self.service.exists("c", "b") == (self.mode == "wb")

    def teardown(self) -> None:
        if sys.exc_info()[0] is not None:  # hypothesis has ended this example
            self.blob.abort()
            self.service.close()
        elif hasattr(self, "blob"):
            self.end(self.blob)
            assert self.blob.closed
            if self.end is BlobIO.close:
                assert self.service.get("c", "b") == bytes(self.written)
                assert self.service.uncommitted("c", "b") == {}
            elif self.mode == "wb":
                assert self.service.get("c", "b") == OLD
            else:
                assert not self.service.exists("c", "b")
            self.service.close()


TestWriteMachine = WriteMachine.TestCase
TestWriteMachine.settings = settings(max_examples=25, stateful_step_count=12, deadline=None)


PASSING: list[Fault] = [
    Status(503),
    Status(503, retry_after_ms=50),
    Status(429, retry_after=0.05),
    Status(500),
    Status(408),
    Status(503, before_body=True),
    Reset(),
    Hangup(),
    ResetInHeaders(),
    ResetUpload(after=0),
    ResetUpload(after=30_000),
    GarbageStatusLine(),
    LostAnswer(),
    Stall(60, after=None),
    WrongHeader("x-ms-client-request-id", "another's"),
]
STAYING = [
    (Status(400, "InvalidHeaderValue"), HttpResponseError),
    (Status(403), ClientAuthenticationError),
    (Status(403, before_body=True), ClientAuthenticationError),
    (Status(404, "ContainerNotFound"), ResourceNotFoundError),
    (Status(409, "LeaseIdMissing"), HttpResponseError),
    (Status(412, "LeaseIdMissing"), HttpResponseError),
    (Status(413), HttpResponseError),
]


class TestFaults:
    NEW = content(300_000)

    @pytest.mark.parametrize(
        ("operation", "size"), [("put_blob", 50_000), ("put_block", 300_000), ("put_block_list", 300_000)]
    )
    @pytest.mark.parametrize(("mode", "pieces"), [("wb", 50), ("xb", 1)])
    @pytest.mark.parametrize("fault", PASSING, ids=repr)
    def test_one_is_survived(
        self, service: FaultService, fault: Fault, operation: str, size: int, pieces: int, mode: str
    ) -> None:
        rule = service.script(operation, [fault])
        name = "b" if mode == "wb" else "new"
        transfer = PERSISTENT if isinstance(fault, Stall) else QUICK
        with taking(), open_writer(service, mode, name, transfer) as blob:
            step = -(-size // pieces)
            for start in range(0, size, step):
                blob.write(self.NEW[start : min(start + step, size)])
        assert service.get("c", name) == self.NEW[:size]
        assert service.uncommitted("c", name) == {}
        assert rule.is_exhausted

    @pytest.mark.parametrize(
        ("operation", "size"), [("put_blob", 50_000), ("put_block", 300_000), ("put_block_list", 300_000)]
    )
    @pytest.mark.parametrize("fault", PASSING, ids=repr)
    def test_one_that_stays_is_fatal_and_changes_nothing(
        self, service: FaultService, fault: Fault, operation: str, size: int
    ) -> None:
        service.script(operation, [fault], repeat=True)
        transfer = IMPATIENT if isinstance(fault, Stall) else QUICK
        error = None
        with taking():
            try:
                with open_writer(service, transfer=transfer) as blob:
                    blob.write(self.NEW[:size])
            except FatalBlobIOWriteError as raised:
                error = raised
        is_carried_out = isinstance(fault, (LostAnswer, WrongHeader, ResetInHeaders, GarbageStatusLine, Stall))
        if is_carried_out and operation != "put_block":
            # The responses were lost, but the check of the blob finds the new content.
            assert error is None
            assert service.get("c", "b") == self.NEW[:size]
        else:
            assert error is not None
            assert "/c/b" in str(error)
            assert isinstance(error.__cause__, Exception)
            assert type(pickle.loads(pickle.dumps(error))) is FatalBlobIOWriteError
            assert service.get("c", "b") == OLD

    @pytest.mark.parametrize(
        ("operation", "size"), [("put_blob", 50_000), ("put_block", 300_000), ("put_block_list", 300_000)]
    )
    @pytest.mark.parametrize(("fault", "kind"), STAYING, ids=repr)
    def test_one_that_will_not_pass_is_fatal_at_once(
        self, service: FaultService, fault: Fault, kind: type[Exception], operation: str, size: int
    ) -> None:
        service.script(operation, [fault], repeat=True)
        with taking(), pytest.raises(FatalBlobIOWriteError) as caught, open_writer(service) as blob:
            blob.write(self.NEW[:size])
        assert isinstance(caught.value.__cause__, kind)
        assert service.get("c", "b") == OLD
        if operation != "put_block":
            assert len(service.requests(operation)) == 1

    def test_every_later_call_fails_with_the_same_cause(self, service: FaultService) -> None:
        service.script("put_block", [Status(403)], repeat=True)
        blob = open_writer(service)
        with pytest.raises(FatalBlobIOWriteError) as first:
            blob.write(self.NEW)
        service.clear_script()
        calls: list[Callable[[], object]] = [
            lambda: blob.write(b"x"),
            lambda: blob.write(self.NEW),
            blob.flush,
            lambda: blob.writelines([b"x"]),
            blob.close,
        ]
        for call in calls:
            with pytest.raises(FatalBlobIOWriteError) as again:
                call()
            assert again.value.__cause__ is first.value.__cause__
        assert blob.closed
        blob.close()
        assert service.get("c", "b") == OLD

    def test_a_block_that_fails_in_the_background_is_reported_by_the_next_call(self, service: FaultService) -> None:
        service.script("put_block", [Status(403)], repeat=True)
        blob = open_writer(service)
        for _ in range(10):
            blob.write(content(10_000))
        with pytest.raises(FatalBlobIOWriteError):
            blob.flush()
        with pytest.raises(FatalBlobIOWriteError):
            blob.close()
        assert service.get("c", "b") == OLD

    def test_a_service_that_is_not_there(self, service: FaultService) -> None:
        for size in (100, 300_000):
            refused = pytest.raises(FatalBlobIOWriteError, match=r"nothing was committed: .*refused")
            with service.refusing_connections(), taking(), refused, open_writer(service) as blob:
                blob.write(self.NEW[:size])
        assert service.get("c", "b") == OLD

    def test_a_corrupted_upload_is_refused_when_content_is_validated(self, service: FaultService) -> None:
        """Every body is sent with its MD5, which the service checks."""
        transfer = replace(QUICK, validate_content=True)
        for size in (1000, 300_000):
            with open_writer(service, transfer=transfer) as blob:
                blob.write(self.NEW[:size])
            assert service.get("c", "b") == self.NEW[:size]
        uploads = [entry for entry in service.log if entry.operation in ("put_blob", "put_block")]
        assert all(entry.headers.get("content-md5") for entry in uploads)


class TestNothingCommitted:
    NEW = content(300_000)

    @pytest.fixture(params=[100, 300_000], ids=["collected", "staged"])
    def size(self, request: pytest.FixtureRequest) -> int:
        return int(request.param)

    @pytest.mark.parametrize("kind", [KeyError, KeyboardInterrupt, SystemExit, GeneratorExit])
    def test_when_an_exception_leaves_the_block(
        self, service: FaultService, size: int, kind: type[BaseException]
    ) -> None:
        with pytest.raises(kind), open_writer(service) as blob:
            blob.write(self.NEW[:size])
            raise kind
        assert blob.closed
        assert service.get("c", "b") == OLD
        assert not service.requests("put_block_list") + service.requests("put_blob")

    def test_after_abort(self, service: FaultService, size: int) -> None:
        blob = open_writer(service)
        blob.write(self.NEW[:size])
        blob.abort()
        blob.abort()
        blob.close()
        assert blob.closed
        with pytest.raises(ValueError, match="closed file"):
            blob.write(b"x")
        assert service.get("c", "b") == OLD

    def test_when_the_object_is_dropped(self, service: FaultService, size: int) -> None:
        blob = open_writer(service)
        blob.write(self.NEW[:size])
        with pytest.warns(ResourceWarning, match="nothing was committed"):
            del blob
        service.wait_until_idle()
        assert service.get("c", "b") == OLD

    def test_when_the_length_of_the_blob_is_beyond_the_service(self, service: FaultService, monkeypatch: Any) -> None:
        """And no later call commits the earlier bytes."""
        monkeypatch.setattr("azstoragetorch._blob.upload.MAX_BLOCKS", 3)
        blob = open_writer(service)
        blob.write(self.NEW[: 3 * 65536])
        with pytest.raises(FatalBlobIOWriteError, match="more than 3 blocks"):
            blob.write(self.NEW)
        with pytest.raises(FatalBlobIOWriteError, match="more than 3 blocks"):
            blob.close()
        assert service.get("c", "b") == OLD

    def test_when_an_interrupt_came_to_another_thread(
        self, service: FaultService, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """If no thread can be started, any thread stages for all: if it is interrupted, the writer does not wait."""
        transfer = replace(QUICK, max_connections=1, memory_limit=3 * MiB + 2)
        writer = blob_client(service.blob_url("c", "b"), transfer).writer()
        busy, waiting = threading.Event(), []

        def interrupt(*_: object) -> None:
            monkeypatch.undo()
            waiting.append(pool.submit(writer.flush))
            wait_until(lambda: writer._bell._sleepers)
            raise KeyboardInterrupt

        with ThreadPoolExecutor() as pool:
            try:
                engine_for(transfer).submit(busy.wait)  # its only thread
                writer.write(memoryview(content(transfer.block_size)))
                (job,) = writer._in_flight
                monkeypatch.setattr(BlockWriter, "_stage", interrupt)
                with pytest.raises(KeyboardInterrupt):
                    job.run()
                with pytest.raises(FatalBlobIOWriteError, match="interrupted"):
                    waiting[0].result(60)
                writer.abort()
            finally:
                busy.set()

    @pytest.mark.parametrize("operation", ["put_block", "put_block_list", "put_blob"])
    def test_when_a_write_or_the_commit_is_interrupted(self, service: FaultService, operation: str) -> None:
        gate = threading.Event()
        service.script(operation, [Hold(gate)], repeat=True)
        blob = open_writer(service, transfer=replace(QUICK, read_timeout=240))
        held = interrupted_once(lambda: bool(service.requests(operation)))
        with taking(), pytest.raises(KeyboardInterrupt), held:
            blob.write(self.NEW if operation != "put_blob" else b"new")
            blob.close()
        service.clear_script()
        if not blob.closed:
            with pytest.raises(FatalBlobIOWriteError):
                blob.write(b"more")
            with pytest.raises(FatalBlobIOWriteError):
                blob.close()
        blob.close()
        service.wait_until_idle()
        assert service.get("c", "b") == OLD

    def test_when_the_abort_comes_during_a_pause(self, service: FaultService) -> None:
        service.script("put_block", [Status(503, retry_after=60)], repeat=True)
        blob = open_writer(service)
        for _ in range(7):
            blob.write(content(10_000))
        wait_until(lambda: bool(service.requests("put_block", status=503)))
        engine = engine_for(QUICK)
        with taking():
            blob.abort()
            wait_until(lambda: engine.budget.in_flight == 0)
        assert service.get("c", "b") == OLD


class TestTwoWriters:
    @pytest.mark.parametrize("sizes", [(300_000, 300_000), (100, 300_000), (300_000, 100)])
    @pytest.mark.parametrize("order", [(0, 1), (1, 0)])
    def test_of_one_blob_never_mix(self, service: FaultService, sizes: tuple[int, int], order: tuple[int, int]) -> None:
        """Each commit is complete, or raises a clear error."""
        data = [content(size, seed) for seed, size in enumerate(sizes)]
        writers = [open_writer(service) for _ in sizes]
        for at in range(0, 300_000, 50_000):
            for writer, new in zip(writers, data, strict=True):
                writer.write(new[at : at + 50_000])
        outcomes = []
        for number in order:
            with suppress(FatalBlobIOWriteError):
                writers[number].close()
                outcomes.append(data[number])
        assert service.get("c", "b") == outcomes[-1]
        assert len(outcomes) >= 1

    def test_at_the_same_moment(self, service: FaultService) -> None:
        data = [content(200_000, seed) for seed in range(4)]

        def write(number: int) -> bool:
            try:
                with open_writer(service) as blob:
                    blob.write(data[number])
            except FatalBlobIOWriteError:
                return False
            return True

        for _ in range(5):
            done = run_threads(4, write)
            assert service.get("c", "b") in [new for new, is_done in zip(data, done, strict=True) if is_done]

    def test_on_azurite(self, container: Container) -> None:
        url = container.put("b", OLD)
        first, second = (BlobIO(url, "wb", transfer=QUICK) for _ in range(2))
        first.write(content(200_000, 1))
        second.write(content(200_000, 2))
        second.close()
        assert container.get("b") == content(200_000, 2)
        try:
            first.close()
        except FatalBlobIOWriteError:
            assert container.get("b") == content(200_000, 2)
        else:
            assert container.get("b") == content(200_000, 1)


class TestCreateOnly:
    @pytest.mark.parametrize("size", [100, 300_000])
    def test_a_blob_that_is_there_stays(self, service: FaultService, size: int) -> None:
        with pytest.raises(ResourceExistsError, match=r"/c/b already exists"), open_writer(service, "xb") as blob:
            blob.write(content(size))
        assert service.get("c", "b") == OLD
        assert service.requests("put_block") == []

    @pytest.mark.parametrize("size", [100, 300_000])
    def test_one_that_comes_meanwhile_stays_too(self, service: FaultService, size: int) -> None:
        blob = open_writer(service, "xb", "new")
        blob.write(content(size))
        service.put("c", "new", b"somebody else's")
        with pytest.raises(
            ResourceExistsError, match=r"already exists.*PUT.* 409 .*BlobAlreadyExists.*request id"
        ) as caught:
            blob.close()
        assert service.get("c", "new") == b"somebody else's"
        told = pickle.loads(pickle.dumps(caught.value))
        assert (str(told), told.status_code, told.error_code) == (str(caught.value), 409, "BlobAlreadyExists")

    @pytest.mark.parametrize("size", [100, 300_000])
    def test_a_failed_condition_is_such_a_blob_too(self, service: FaultService, size: int) -> None:
        """A leased blob gives this response: the only condition of the request is that the blob does not exist."""
        service.script("put_blob" if size == 100 else "put_block_list", [Status(412, "LeaseIdMissing")], repeat=True)
        with pytest.raises(ResourceExistsError, match="LeaseIdMissing"), open_writer(service, "xb", "new") as blob:
            blob.write(content(size))

    @pytest.mark.parametrize("size", [100, 300_000])
    def test_leave_to_write_is_enough(self, container: Container, size: int) -> None:
        """With a SAS that does not allow reading properties, the commit finds out whether the blob exists."""
        for mode, data in (("xb", content(size)), ("wb", content(size, 1))):
            with BlobIO(container.blob_sas_url("b", "w"), mode, transfer=QUICK) as blob:  # type: ignore[arg-type]
                blob.write(data)
            assert container.get("b") == data
        refused = pytest.raises(ResourceExistsError, match="already exists")
        with refused, BlobIO(container.blob_sas_url("b", "w"), "xb", transfer=QUICK) as blob:
            blob.write(content(size, 2))
        assert container.get("b") == content(size, 1)

    @pytest.mark.parametrize("size", [100, 300_000])
    def test_a_lost_answer_that_nobody_may_look_after(self, service: FaultService, size: int) -> None:
        """The error does not say that nothing was committed."""
        service.script("put_blob" if size == 100 else "put_block_list", [LostAnswer()])
        service.script("head", [Status(403)], repeat=True)
        service.script("get_block_list", [Status(403)], repeat=True)
        blob = open_writer(service, "xb", "new")
        blob.write(content(size))
        with pytest.raises(FatalBlobIOWriteError, match="does not say whether it was carried out"):
            blob.close()
        assert service.get("c", "new") == content(size)

    @pytest.mark.parametrize("size", [100, 300_000])
    @pytest.mark.parametrize("is_pooled", [False, True])
    def test_a_lost_answer_is_not_taken_for_somebody_else(
        self, service: FaultService, size: int, is_pooled: bool
    ) -> None:
        if is_pooled:
            blob_client(service.blob_url("c", "b")).version()
        service.script("put_blob" if size == 100 else "put_block_list", [LostAnswer()])
        with open_writer(service, "xb", "new") as blob:
            blob.write(content(size))
        assert service.get("c", "new") == content(size)
        assert service.unused_faults() == []

    @pytest.mark.parametrize("size", [100, 300_000])
    def test_nor_is_somebody_else_taken_for_a_lost_answer(self, service: FaultService, size: int) -> None:
        service.script("put_blob" if size == 100 else "put_block_list", [Reset()])
        blob = open_writer(service, "xb", "new")
        blob.write(content(size))
        service.put("c", "new", content(size)[::-1])
        with pytest.raises(ResourceExistsError):
            blob.close()
        assert service.get("c", "new") == content(size)[::-1]

    def test_of_two_one_wins(self, service: FaultService) -> None:
        def create(number: int) -> bool:
            try:
                with open_writer(service, "xb", "new") as blob:
                    blob.write(content(100 + 200_000 * (number % 2), number))
            except (ResourceExistsError, FatalBlobIOWriteError):
                return False
            return True

        done = run_threads(4, create)
        assert sum(done) == 1
        winner = done.index(True)
        assert service.get("c", "new") == content(100 + 200_000 * (winner % 2), winner)

    @pytest.mark.parametrize("size", [100, 300_000])
    def test_on_azurite(self, container: Container, size: int) -> None:
        with BlobIO(container.blob_sas_url("new"), "xb", transfer=QUICK) as blob:
            blob.write(content(size))
        assert container.get("new") == content(size)
        with pytest.raises(ResourceExistsError), BlobIO(container.blob_sas_url("new"), "xb", transfer=QUICK) as blob:
            blob.write(b"x" * size)
        blob = BlobIO(container.blob_sas_url("late"), "xb", transfer=QUICK)
        blob.write(content(size))
        container.put("late", OLD)
        with pytest.raises(ResourceExistsError):
            blob.close()
        assert container.get("late") == OLD
        assert container.get("new") == content(size)

    def test_a_check_that_fails_leaves_nothing_behind(self, service: FaultService) -> None:
        """Not even an empty blob, if the error is caught and the writer is closed."""
        service.script("head", [Status(400)], repeat=True)
        blob = open_writer(service, "xb", "new")
        with pytest.raises(FatalBlobIOWriteError):
            blob.write(content(300_000))
        with pytest.raises(FatalBlobIOWriteError):
            blob.close()
        assert not service.exists("c", "new")


class TestMemory:
    def test_what_is_in_flight_stays_below_the_limit(self, service: FaultService) -> None:
        transfer = replace(QUICK, memory_limit=1 * MiB, max_concurrency=64, max_connections=63)
        engine = engine_for(transfer)
        peak = watch_peak(engine.budget)
        service.latency = 0.02
        with open_writer(service, transfer=transfer) as blob:
            for _ in range(800):
                blob.write(content(10_000))
        assert service.get("c", "b") == content(10_000) * 800
        assert 512 * KiB < peak() <= 1 * MiB
        assert engine.budget.in_flight == 0

    def test_readers_that_hold_all_of_it_do_not_stop_a_writer(self, service: FaultService) -> None:
        """A copy from blob to blob on one thread, with a window as large as the budget."""
        transfer = replace(QUICK, memory_limit=1 * MiB, read_ahead=64 * MiB, max_connections=9)
        data = content(5 * MiB)
        service.put("c", "source", data)

        def copy() -> None:
            source = BlobIO(service.blob_url("c", "source"), "rb", credential=False, transfer=transfer)
            with source, open_writer(service, transfer=transfer) as target:
                while piece := source.read(10_000):
                    target.write(piece)

        in_time(copy, 30)
        assert service.get("c", "b") == data

    def test_a_writer_waits_for_the_service_and_does_not_collect(self, service: FaultService) -> None:
        gate = threading.Event()
        service.script("put_block", [Hold(gate)], repeat=True)
        transfer = replace(QUICK, memory_limit=1 * MiB, max_connections=7, read_timeout=240)
        blob = open_writer(service, transfer=transfer)
        taken = []

        def write() -> None:
            for _ in range(400):
                blob.write(content(10_000))
                taken.append(10_000)

        thread = threading.Thread(target=write)
        thread.start()
        service.wait_for_requests(2)
        time.sleep(0.3)
        assert sum(taken) <= 2 * MiB
        service.clear_script()
        gate.set()
        thread.join(240)
        blob.close()
        assert service.get("c", "b") == content(10_000) * 400


class TestScattered:
    """`write_pieces`, which checkpoints use."""

    @given(st.lists(st.integers(0, 200_000), max_size=8), st.integers(0, 1000))
    @settings(max_examples=20, deadline=None)
    def test_pieces_of_any_size_come_out_in_order(self, sizes: list[int], head: int) -> None:
        with FaultService() as service:
            service.create_container("c")
            pieces = [content(size, seed) for seed, size in enumerate(sizes)]
            writer = blob_client(service.blob_url("c", "b")).writer()
            writer.write(memoryview(content(head)))
            writer.write_pieces(iter(map(memoryview, pieces)), block_size=64 * KiB, concurrency=3)
            writer.write(memoryview(b"end"))
            writer.commit()
            assert service.get("c", "b") == content(head) + b"".join(pieces) + b"end"

    def test_an_error_of_the_pieces_is_fatal(self, service: FaultService) -> None:
        def pieces() -> Any:
            yield memoryview(content(200_000))
            raise KeyError("lost")

        writer = blob_client(service.blob_url("c", "b")).writer()
        with pytest.raises(FatalBlobIOWriteError, match="lost"):
            writer.write_pieces(pieces(), block_size=64 * KiB, concurrency=3)
        with pytest.raises(FatalBlobIOWriteError):
            writer.commit()
        writer.abort()
        assert service.get("c", "b") == OLD

    @pytest.mark.parametrize("size", [1, 200 * KiB])
    def test_properties_go_with_the_commit(self, container: Container, size: int) -> None:
        """Content headers and metadata are set together with the bytes, by one request or by a block list."""
        writer = blob_client(container.blob_sas_url("b")).writer()
        writer.write(memoryview(content(size)))
        writer.commit(
            properties={
                "x-ms-blob-content-type": "image/png",
                "x-ms-blob-content-encoding": "gzip",
                "x-ms-blob-cache-control": "no-store",
                "x-ms-meta-Source": "here",
            }
        )
        found = container.client.get_blob_client("b").get_blob_properties()
        settings = found.content_settings
        assert (settings.content_type, settings.content_encoding, settings.cache_control) == (
            "image/png",
            "gzip",
            "no-store",
        )
        assert {key.lower(): value for key, value in found.metadata.items()} == {"source": "here"}

    def test_the_md5_of_the_whole_goes_with_the_commit(self, service: FaultService) -> None:
        writer = blob_client(service.blob_url("c", "b")).writer()
        writer.write(memoryview(content(200_000)))
        digest = hashlib.md5(content(200_000)).digest()
        writer.commit(md5=digest)
        found = service.store.find("c", "b")
        assert found is not None
        assert found.settings["Content-MD5"] == base64.b64encode(digest).decode()


def test_errors_of_the_service_are_azure_errors(service: FaultService) -> None:
    service.script("put_blob", [Status(403)], repeat=True)
    with pytest.raises(FatalBlobIOWriteError) as caught:
        blob_client(service.blob_url("c", "b")).put(b"x")
    assert isinstance(caught.value.__cause__, AzureError)
