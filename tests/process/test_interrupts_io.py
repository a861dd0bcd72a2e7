"""`BlobIO`, interrupted at every line of its modules: by Ctrl-C, by handlers that use blobs, by finalizers."""

from __future__ import annotations

import io
import itertools
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import azstoragetorch.io
from azstoragetorch._engine import turns
from azstoragetorch._engine.threads import engine_for
from azstoragetorch.io import BlobIO
from tests.faults import FaultService
from tests.process.interrupts import Run, collecting, interrupt, sweep
from tests.support import QUICK, content, wait_until

FILES = [*Path(azstoragetorch.io.__file__).parent.glob("*.py"), str(turns.__file__)]
_limits = itertools.count(100)
TRANSFER = [QUICK]  # of the present test: its engine is that of no other one
DATA = b"0123456789\n" + content(200_000)
NEW = [b"some ", content(100_000, 1), b" more"]

READS: dict[str, Callable[[BlobIO], Any]] = {
    "read": lambda blob: blob.read(20),
    "read on": lambda blob: blob.read(100_000),
    "read all": lambda blob: blob.read(),
    "readinto": lambda blob: blob.readinto(bytearray(20)),
    "readinto on": lambda blob: blob.readinto(bytearray(100_000)),
    "readline": lambda blob: blob.readline(),
    "read1": lambda blob: blob.read1(20),
    "seek": lambda blob: blob.seek(20),
}


@pytest.fixture(autouse=True)
def _engine_of_its_own() -> None:
    TRANSFER[0] = replace(QUICK, max_connections=next(_limits))


@pytest.fixture
def service(fault_service: FaultService) -> Iterator[FaultService]:
    fault_service.put("c", "b", DATA)
    fault_service.put("c", "other", b"other")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        yield fault_service


def open_blob(service: FaultService, mode: Any = "rb", name: str = "b") -> BlobIO:
    return BlobIO(service.blob_url("c", name), mode, credential=False, transfer=TRANSFER[0])


def opened_at_3(service: FaultService) -> BlobIO:
    blob = open_blob(service)
    assert blob.read(3) == DATA[:3]
    return blob


def write_all(blob: BlobIO) -> None:
    with blob:
        for piece in NEW:
            blob.write(piece)


def is_given_back() -> bool:
    return engine_for(TRANSFER[0]).budget.in_flight == 0


def use_others(service: FaultService) -> None:
    """What a handler that saves a checkpoint does."""
    with open_blob(service, "wb", "other") as blob:
        blob.write(b"other")
    with open_blob(service, name="other") as blob:
        assert blob.read() == b"other"


@pytest.mark.untraced
class TestInterrupts:
    @pytest.mark.parametrize("name", READS)
    def test_of_a_read_move_the_position_past_a_read_or_not_at_all(self, service: FaultService, name: str) -> None:
        with opened_at_3(service) as whole:
            READS[name](whole)
            after = whole.tell()

        def check(blob: BlobIO, run: Run) -> None:
            assert isinstance(run.error, KeyboardInterrupt) or not run.was_reached
            position = blob.tell()
            assert position in (3, after)
            assert blob.read() == DATA[position:]
            blob.close()
            wait_until(is_given_back)

        sweep(lambda: opened_at_3(service), READS[name], check, files=FILES, do=interrupt)

    def test_of_a_write_commit_all_or_nothing(self, service: FaultService) -> None:
        def set_up() -> BlobIO:
            service.put("c", "b", DATA)
            return open_blob(service, "wb")

        def check(blob: BlobIO, run: Run) -> None:
            blob.abort()
            assert blob.closed
            committed = service.get("c", "b")
            assert committed in ((DATA, b"".join(NEW)) if run.was_reached else (b"".join(NEW),))
            if run.place.code.co_name in ("write", "_write"):
                assert committed == DATA
            wait_until(is_given_back)

        sweep(set_up, write_all, check, files=FILES, do=interrupt)


@pytest.mark.untraced
class TestHandlers:
    @pytest.mark.parametrize("name", ["read", "read on", "readinto on", "readline", "seek"])
    def test_may_use_other_blobs_during_a_read(self, service: FaultService, name: str) -> None:
        with opened_at_3(service) as whole:
            expected = READS[name](whole), whole.tell()

        def check(blob: BlobIO, run: Run) -> None:
            assert run.error is None
            assert (run.result, blob.tell()) == expected
            blob.close()

        sweep(
            lambda: opened_at_3(service),
            READS[name],
            check,
            files=FILES,
            do=lambda: use_others(service),
            turns=1,
        )

    def test_may_use_other_blobs_during_a_write(self, service: FaultService) -> None:
        def check(blob: BlobIO, run: Run) -> None:
            assert run.error is None
            assert service.get("c", "b") == b"".join(NEW)

        sweep(
            lambda: open_blob(service, "wb"),
            write_all,
            check,
            files=FILES,
            do=lambda: use_others(service),
            turns=1,
        )

    def test_that_read_the_same_blob_get_its_next_bytes_or_an_error(self, service: FaultService) -> None:
        """It never waits, and bytes are never repeated or out of order."""
        now: list[BlobIO] = []
        nested: list[bytes] = []

        def set_up() -> BlobIO:
            nested.clear()
            now[:] = [opened_at_3(service)]
            return now[0]

        def read_too() -> None:
            try:
                nested.append(now[0].read(20))
            except RuntimeError as error:
                assert "reentrant call" in str(error)  # noqa: PT017

        def check(blob: BlobIO, run: Run) -> None:
            assert run.error is None
            assert {run.result, *nested} == {DATA[3 + 20 * n : 23 + 20 * n] for n in range(1 + len(nested))}
            assert blob.tell() == 23 + 20 * len(nested)
            blob.close()

        runs = sweep(set_up, READS["read"], check, files=FILES, do=read_too)
        assert len(runs) > 10

    @pytest.mark.parametrize("end", [BlobIO.close, BlobIO.abort])
    @pytest.mark.parametrize("name", ["read", "read on"])
    def test_that_close_the_blob_end_its_read(self, service: FaultService, name: str, end: Any) -> None:
        """It fails as on a closed file, or was complete before; all memory is given back."""
        now: list[BlobIO] = []

        def set_up() -> BlobIO:
            now[:] = [opened_at_3(service)]
            return now[0]

        def check(blob: BlobIO, run: Run) -> None:
            assert blob.closed
            assert isinstance(run.error, ValueError) or run.result == DATA[3 : 3 + len(run.result)]
            with pytest.raises(ValueError, match="closed"):
                blob.read(1)
            wait_until(is_given_back)

        sweep(set_up, READS[name], check, files=FILES, do=lambda: end(now[0]))

    @pytest.mark.filterwarnings("ignore::RuntimeWarning")
    @pytest.mark.parametrize("end", [BlobIO.close, BlobIO.abort])
    def test_that_close_the_blob_end_its_write(self, service: FaultService, end: Any) -> None:
        """Only complete writes are committed, or nothing; the interrupted write never is."""
        now: list[BlobIO] = []

        def set_up() -> BlobIO:
            service.put("c", "b", DATA)
            now[:] = [open_blob(service, "wb")]
            now[0].write(NEW[0])
            return now[0]

        def check(blob: BlobIO, run: Run) -> None:
            assert blob.closed
            written = b"".join(NEW[:2]) if run.error is None else NEW[0]
            assert service.get("c", "b") in ((DATA,) if end is BlobIO.abort else (DATA, written))
            wait_until(is_given_back)

        sweep(set_up, lambda blob: blob.write(NEW[1]), check, files=FILES, do=lambda: end(now[0]))


@pytest.mark.untraced
class TestFinalizers:
    @pytest.mark.parametrize("mode", ["rb", "wb"])
    def test_of_wrappers_run_anywhere(self, service: FaultService, mode: str) -> None:
        """For a reader that reads ahead, and a writer with bytes in its wrapper."""

        def make_garbage() -> io.TextIOWrapper:
            wrapper = io.TextIOWrapper(open_blob(service, mode, "b" if mode == "rb" else "other"), encoding="latin-1")
            if mode == "rb":
                wrapper.read(10)
            else:
                wrapper.write("half")
            return wrapper

        def act(blob: BlobIO) -> bytes:
            with open_blob(service, "wb", "new") as other:
                for piece in NEW:
                    other.write(piece)
            return blob.read(100_000)

        def check(blob: BlobIO, run: Run) -> None:
            assert run.error is None
            assert run.result == DATA[3:100_003]
            assert service.get("c", "new") == b"".join(NEW)
            assert service.get("c", "other") == b"other"
            blob.close()
            wait_until(is_given_back)

        sweep(lambda: opened_at_3(service), act, check, files=FILES, do=collecting(make_garbage), turns=1)
