"""How writing a blob ends: what is committed, what is not, and which warnings are issued. Without torch."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import lzma
import subprocess
import sys
import tarfile
import wave
import weakref
import zipfile
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from typing import Any

import pytest

from azstoragetorch.exceptions import FatalBlobIOWriteError
from azstoragetorch.io import BlobIO
from tests.faults import FaultService
from tests.support import QUICK, ROOT, collect_garbage, content

OLD = b"the old content"


@pytest.fixture
def service(fault_service: FaultService) -> FaultService:
    fault_service.put("c", "b", OLD)
    return fault_service


def writer(service: FaultService, name: str = "b") -> BlobIO:
    return BlobIO(service.blob_url("c", name), "wb", credential=False, transfer=QUICK)


class StreamWrapper:
    """Like the one of torch's datapipes: its finalizer closes the wrapped file."""

    def __init__(self, file: BlobIO) -> None:
        self.file = file

    def write(self, data: bytes) -> int:
        return self.file.write(data)

    def close(self) -> None:
        self.file.close()

    def __del__(self) -> None:
        self.close()


class Compressed(io.RawIOBase):
    """A Python class with the finalizer of the io classes."""

    def __init__(self, file: BlobIO) -> None:
        self.file = file

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        return self.file.write(data)

    def close(self) -> None:
        if not self.closed:
            self.file.close()
        super().close()


def text(file: Any, **options: Any) -> Any:
    return io.TextIOWrapper(file, encoding="utf-8", **options)


WRAPPERS: dict[str, Callable[[BlobIO], Any]] = {
    "text": text,
    "text, written through": lambda blob: text(blob, write_through=True),
    "buffered": io.BufferedWriter,
    "text over buffered": lambda blob: text(io.BufferedWriter(blob)),
    "csv": lambda blob: csv.writer(text(blob)),
    "gzip": lambda blob: gzip.GzipFile(fileobj=blob, mode="wb"),
    "gzip as text": lambda blob: gzip.open(blob, "wt"),  # noqa: SIM115
    "bz2": lambda blob: bz2.BZ2File(blob, "wb"),
    "lzma": lambda blob: lzma.LZMAFile(blob, "wb"),  # noqa: SIM115
    "zip": lambda blob: zipfile.ZipFile(blob, "w"),
    "tar": lambda blob: tarfile.open(fileobj=blob, mode="w|"),  # noqa: SIM115
    "wave": lambda blob: wave.open(blob, "wb"),  # noqa: SIM115
    "a finalizer in Python": StreamWrapper,
    "an inherited finalizer": Compressed,
    "nothing": lambda blob: blob,
}


def write_half(wrapper: Any, size: int) -> None:
    data = content(size)
    if hasattr(wrapper, "writerow"):
        wrapper.writerow([data.hex()])
    elif isinstance(wrapper, io.TextIOBase):
        wrapper.write(data.hex())
    elif isinstance(wrapper, zipfile.ZipFile):
        wrapper.writestr("half", data)
    elif isinstance(wrapper, tarfile.TarFile):
        member = tarfile.TarInfo("half")
        member.size = size
        wrapper.addfile(member, io.BytesIO(data))
    elif isinstance(wrapper, wave.Wave_write):
        wrapper.setparams((1, 1, 8000, size, "NONE", ""))
        wrapper.writeframesraw(data)
    else:
        wrapper.write(data)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
class TestDroppedWrappers:
    """A wrapper that is not closed commits nothing, whatever its finalizer does."""

    @pytest.mark.parametrize("size", [10, 200_000])
    @pytest.mark.parametrize("name", WRAPPERS)
    def test_by_an_exception_that_leaves_the_function(self, service: FaultService, name: str, size: int) -> None:
        def fail() -> None:
            wrapper = WRAPPERS[name](writer(service))
            write_half(wrapper, size)
            raise KeyError

        with pytest.warns(ResourceWarning, match="dropped without close.*nothing was committed"):  # noqa: PT031
            with pytest.raises(KeyError):
                fail()
            collect_garbage()
        assert service.get("c", "b") == OLD

    @pytest.mark.parametrize("name", WRAPPERS)
    def test_without_an_exception(self, service: FaultService, name: str) -> None:
        with pytest.warns(ResourceWarning, match="nothing was committed") as caught:  # noqa: PT031
            wrapper = WRAPPERS[name](writer(service))
            write_half(wrapper, 10)
            del wrapper
            collect_garbage()
        assert service.get("c", "b") == OLD
        assert len([warning for warning in caught if "BlobIO" in str(warning.message)]) == 1, "once is enough"

    def test_in_a_reference_cycle(self, service: FaultService) -> None:
        with pytest.warns(ResourceWarning, match="nothing was committed"):  # noqa: PT031
            cycle: list[Any] = [text(writer(service))]
            cycle[0].write("half")
            cycle.append(cycle)
            del cycle
            collect_garbage()
        assert service.get("c", "b") == OLD

    def test_with_warnings_as_errors(self, service: FaultService) -> None:
        """An error in a finalizer does not commit either."""
        program = (
            "import gc\nw = io.TextIOWrapper(BlobIO(url, 'wb', credential=False)); w.write('half'); del w; gc.collect()"
        )
        run_script(service, program, options=["-W", "error"])
        assert service.get("c", "b") == OLD

    @pytest.mark.parametrize("name", ["text", "buffered", "a finalizer in Python"])
    def test_the_blob_is_still_there_for_its_owner(self, service: FaultService, name: str) -> None:
        """Closing it explicitly commits everything written, including the buffer of the dropped wrapper."""
        with pytest.warns(ResourceWarning, match="nothing was committed"):  # noqa: PT031
            blob = writer(service)
            blob.write(b"before, ")
            wrapper = WRAPPERS[name](blob)
            wrapper.write("within, " if name == "text" else b"within, ")
            del wrapper
        assert service.get("c", "b") == OLD
        blob.write(b"after")
        blob.close()
        assert service.get("c", "b") == b"before, within, after"

    def test_in_a_with_block_of_the_blob_the_block_decides(self, service: FaultService) -> None:
        def rows() -> None:
            with writer(service) as blob:
                csv.writer(text(blob)).writerow(["a", "b"])
                text(blob).write("end")

        rows()
        assert service.get("c", "b") == b"a,b\r\nend"
        with pytest.raises(KeyError), writer(service) as blob:
            text(blob).write("half")
            raise KeyError
        assert service.get("c", "b") == b"a,b\r\nend"

    def test_a_with_block_decides_where_a_drop_leaves_no_trace(self, service: FaultService) -> None:
        """A pair has no `_dealloc_warn`: without the block, dropping it looks like closing it."""
        with suppress(KeyError), writer(service) as blob:
            wrapper = text(io.BufferedRWPair(io.BytesIO(), blob))
            wrapper.write("half")
            raise KeyError
        del wrapper
        collect_garbage()
        assert service.get("c", "b") == OLD

    def test_a_dropped_reader_is_closed(self, service: FaultService) -> None:
        blob = BlobIO(service.blob_url("c", "b"), "rb", credential=False, transfer=QUICK)
        wrapper = text(blob)
        assert wrapper.read(3) == "the"
        del wrapper
        assert blob.closed
        with pytest.raises(ValueError, match="closed"):
            blob.read()

    def test_a_finalizer_that_saves_something_does(self, service: FaultService) -> None:
        """It opens and closes the blob itself."""

        class Summary:
            def __del__(self) -> None:
                blob = writer(service)
                blob.write(b"the summary")
                blob.close()

        Summary()
        collect_garbage()
        assert service.get("c", "b") == b"the summary"


class TestOrderlyEnds:
    """Every explicit end commits."""

    @pytest.mark.parametrize("name", ["text", "buffered", "text over buffered", "an inherited finalizer"])
    def test_closing_the_wrapper(self, service: FaultService, name: str) -> None:
        for end in (lambda w: w.close(), lambda w: w.__exit__(None, None, None), lambda w: closing(w).__exit__()):
            wrapper = WRAPPERS[name](writer(service))
            wrapper.write("whole" if name.startswith("text") else b"whole")
            end(wrapper)
            assert service.get("c", "b") == b"whole"
            service.put("c", "b", OLD)

    def test_detaching_and_closing(self, service: FaultService) -> None:
        wrapper = text(writer(service))
        wrapper.write("whole")
        blob = wrapper.detach()
        del wrapper
        collect_garbage()
        blob.close()
        assert service.get("c", "b") == b"whole"

    def test_closing_before_the_wrapper_is_dropped(self, service: FaultService) -> None:
        blob = writer(service)
        wrapper = text(blob)
        wrapper.write("whole")
        wrapper.flush()
        blob.close()
        with suppress(ValueError):
            wrapper.close()
        assert service.get("c", "b") == b"whole"

    def test_a_finalizer_elsewhere_does_not_disturb(self, service: FaultService) -> None:
        """The wrapper of another blob is dropped while this blob is written and closed."""
        blob = writer(service)
        with pytest.warns(ResourceWarning):
            text(writer(service, "other")).write("half")
        blob.write(b"whole")
        blob.close()
        assert service.get("c", "b") == b"whole"


def run_script(service: FaultService, program: str, *, options: list[str] | None = None) -> tuple[int, str]:
    prelude = (
        f"import io, os, signal, sys\nfrom azstoragetorch.io import BlobIO\nurl = {service.blob_url('c', 'b')!r}\n"
    )
    command = [sys.executable, *(options or []), "-c", prelude + program]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240, check=False)
    return result.returncode, result.stderr


OPEN = "w = io.TextIOWrapper(BlobIO(url, 'wb', credential=False)); w.write('half of '); w.flush(); w.write('it')\n"


@pytest.mark.parametrize(
    ("program", "code"),
    [
        (f"{OPEN}1 / 0", 1),
        ("def f():\n  " + OPEN.replace("\n", "; 1 / 0\n") + "f()", 1),
        (f"{OPEN}os.kill(os.getpid(), signal.SIGINT)", -2),
        (f"{OPEN}sys.exit(0)", 0),
        (f"{OPEN}sys.exit(3)", 3),
        (OPEN, 0),
        (f"{OPEN}keep = [w]; keep.append(keep)", 0),
        (OPEN.replace("TextIOWrapper", "BufferedWriter").replace("'half of '", "b'x'").replace("'it'", "b'y'"), 0),
        (f"{OPEN}sys.keep = w", 0),
    ],
    ids=["uncaught", "uncaught in a function", "Ctrl-C", "exit 0", "exit 3", "end", "cycle", "buffered", "kept by sys"],
)
def test_a_script_that_ends_without_closing_commits_nothing(service: FaultService, program: str, code: int) -> None:
    returned, errors = run_script(service, program)
    assert returned == code, errors
    assert service.get("c", "b") == OLD
    assert not service.requests("put_blob") + service.requests("put_block_list")


class TestQuietExits:
    """Leaving the block without a visible error warns."""

    def test_exit(self, service: FaultService) -> None:
        for code in (0, 3):
            said = pytest.warns(RuntimeWarning, match=r"c/b.* was left by a SystemExit: nothing was committed")
            with said, pytest.raises(SystemExit), writer(service) as blob:
                blob.write(b"all of it")
                sys.exit(code)
        assert service.get("c", "b") == OLD

    def test_a_generator_that_is_left(self, service: FaultService) -> None:
        def rows() -> Iterator[int]:
            with writer(service) as blob:
                for number in range(5):
                    blob.write(b"%d\n" % number)
                    yield number

        with pytest.warns(RuntimeWarning, match=r"c/b.* was left by a GeneratorExit: nothing was committed"):  # noqa: PT031
            for number in rows():
                if number == 4:
                    break
            collect_garbage()
        assert service.get("c", "b") == OLD
        assert list(rows()) == [0, 1, 2, 3, 4]
        assert service.get("c", "b") == b"0\n1\n2\n3\n4\n"

    @pytest.mark.filterwarnings("error")
    def test_what_is_seen_anyway_does_not_warn(self, service: FaultService) -> None:
        for error in (KeyError, KeyboardInterrupt):
            with pytest.raises(error), writer(service):
                raise error


class Careless:
    """A library that ignores errors of its file, as C libraries do."""

    def __init__(self, file: BlobIO) -> None:
        self.file = file

    def __getattr__(self, name: str) -> Any:
        def call(*arguments: Any) -> Any:
            with suppress(Exception):
                return getattr(self.file, name)(*arguments)

        return call


class TestGoingBack:
    """A blob is written from start to end; bytes that a library writes after a seek are not appended."""

    @pytest.mark.parametrize("target", [(0,), (4,), (-6, 1), (-6, io.SEEK_END), (100,)])
    def test_bytes_that_would_be_misplaced_are_never_committed(self, service: FaultService, target: Any) -> None:
        blob = writer(service)
        blob.write(b"RIFF????data")
        with suppress(io.UnsupportedOperation):
            blob.seek(*target)
        assert blob.write(b"size") == 4
        with suppress(io.UnsupportedOperation):
            blob.seek(0, io.SEEK_END)
        blob.write(b"more")
        with pytest.raises(FatalBlobIOWriteError, match=r"nothing was committed.*seek.*io.BytesIO or a temporary file"):
            blob.close()
        assert service.get("c", "b") == OLD

    def test_also_when_the_library_ignores_every_error(self, service: FaultService) -> None:
        with pytest.raises(FatalBlobIOWriteError, match="temporary file"), writer(service) as blob:
            library = Careless(blob)
            library.write(b"header" * 10_000)
            library.seek(0)
            library.write(b"HEADER")
            library.flush()
        assert service.get("c", "b") == OLD

    @pytest.mark.parametrize("size", [None, 3, 100])
    def test_a_cut_that_was_refused(self, service: FaultService, size: int | None) -> None:
        blob = writer(service)
        blob.write(b"0123456789")
        with suppress(io.UnsupportedOperation):
            blob.seek(0)
        with pytest.raises(io.UnsupportedOperation, match=r"truncate.*io\.BytesIO"):
            blob.truncate(size) if size is not None else blob.truncate()
        with pytest.raises(FatalBlobIOWriteError, match="truncated"):
            blob.close()
        assert service.get("c", "b") == OLD

    def test_a_seek_that_was_refused_says_what_to_do(self, service: FaultService) -> None:
        blob = writer(service)
        blob.write(b"0123456789")
        with pytest.raises(io.UnsupportedOperation, match=r"seek: .*c/b cannot go to byte 4 of 10: .*io\.BytesIO"):
            blob.seek(4)
        blob.seek(10)
        with pytest.raises(io.UnsupportedOperation, match=r"seek: .*c/b is not seekable: .*io\.BytesIO"):
            blob.seek(blob.tell())
        with pytest.raises(ValueError, match="negative"):
            blob.seek(-1)
        with pytest.raises(ValueError, match="whence"):
            blob.seek(0, 5)
        blob.close()
        assert service.get("c", "b") == b"0123456789", "nothing was written elsewhere"

    def test_the_current_place_and_the_start_as_a_last_step(self, service: FaultService) -> None:
        with writer(service) as blob:
            blob.write(b"0123456789")
            assert [blob.seek(10), blob.seek(0, 1), blob.seek(0, 2)] == [10, 10, 10]
            blob.write(b"ab")
            assert blob.seek(0) == blob.tell() == 0
            assert blob.seek(0, io.SEEK_END) == 12
            blob.write(b"cd")
            blob.seek(0)
        assert service.get("c", "b") == b"0123456789abcd"

    def test_a_library_that_only_asks_gets_the_answer_and_does_without(self, service: FaultService) -> None:
        """zipfile seeks to its current position, at the start and later."""
        with writer(service) as blob:
            for _ in range(2):
                with zipfile.ZipFile(blob, "w") as archive:
                    archive.writestr("a", content(100_000))
        with zipfile.ZipFile(io.BytesIO(service.get("c", "b"))) as archive:
            assert archive.read("a") == content(100_000)

    def test_going_elsewhere_and_back_to_the_end_does_no_harm(self, service: FaultService) -> None:
        with writer(service) as blob:
            blob.write(b"0123456789")
            for target in (4, 0, 50):
                with suppress(io.UnsupportedOperation):
                    blob.seek(target)
            blob.seek(10)
            blob.write(b"ab")
        assert service.get("c", "b") == b"0123456789ab"

    def test_wave(self, service: FaultService) -> None:
        """With a known number of frames it streams; otherwise it seeks back, and the error says why that fails."""
        with writer(service) as blob, wave.open(blob, "wb") as sound:
            sound.setparams((1, 2, 8000, 1000, "NONE", ""))
            sound.writeframesraw(content(2000))
        with wave.open(io.BytesIO(service.get("c", "b"))) as read:
            assert read.readframes(1000) == content(2000)
        service.put("c", "b", OLD)
        with (
            pytest.raises(io.UnsupportedOperation, match="WAV"),
            writer(service) as blob,
            wave.open(blob, "wb") as sound,
        ):
            sound.setparams((1, 2, 8000, 0, "NONE", ""))
            sound.writeframes(content(2000))
            sound.writeframes(content(2000))
        assert service.get("c", "b") == OLD


class TestSeeksOfReaders:
    def test_before_the_start_is_an_error_of_both_kinds(self, service: FaultService) -> None:
        """zipfile needs that: it looks for its directory at an offset from the end that a short file does not have."""
        with BlobIO(service.blob_url("c", "b"), "rb", credential=False) as blob:
            for kind in (ValueError, OSError):
                with pytest.raises(kind, match="negative"):
                    blob.seek(-100, io.SEEK_END)
            assert blob.tell() == 0
            assert not zipfile.is_zipfile(blob)
            with pytest.raises(zipfile.BadZipFile):
                zipfile.ZipFile(blob)

    def test_an_empty_zip(self, service: FaultService) -> None:
        with writer(service) as blob, zipfile.ZipFile(blob, "w"):
            pass
        assert len(service.get("c", "b")) == 22
        with BlobIO(service.blob_url("c", "b"), "rb", credential=False) as blob:
            assert zipfile.is_zipfile(blob)
            assert zipfile.ZipFile(blob).namelist() == []

    def test_numbers_that_have_only_an_index(self, service: FaultService) -> None:
        class Number:
            def __init__(self, value: int) -> None:
                self.value = value

            def __index__(self) -> int:
                return self.value

        with BlobIO(service.blob_url("c", "b"), "rb", credential=False) as blob:
            n: Any = Number
            assert blob.seek(n(4), n(0)) == 4
            assert blob.read(n(3)) == OLD[4:7]
            assert blob.readline(n(2)) == OLD[7:9]
            assert blob.read1(n(1)) == OLD[9:10]
            assert blob.peek(n(1))
            assert blob.read(n(-1)) == OLD[10:]


def test_an_error_that_was_there_at_the_opening_is_not_kept(service: FaultService) -> None:
    """It refers to the frames that it has passed through."""

    class Error(Exception):
        pass

    def fail() -> tuple[BlobIO, weakref.ref[Error]]:
        try:
            raise Error
        except Error as error:
            return writer(service), weakref.ref(error)

    collect_garbage()  # a finalizer of another test that fails in the handler would keep the error as its context
    blob, seen = fail()
    blob.write(b"saved")
    blob.close()
    collect_garbage()
    assert seen() is None
    assert service.get("c", "b") == b"saved"
