"""`BlobIO` beyond the interface of binary files: arguments, attributes, and when it commits."""

from __future__ import annotations

import copy
import io
import json
import pickle
import sys
import tarfile
import threading
import traceback
import zipfile
from collections.abc import Callable
from dataclasses import replace
from multiprocessing.reduction import ForkingPickler
from typing import Any

import numpy as np
import pytest
import torch
from azure.core.credentials import AzureSasCredential
from azure.core.exceptions import AzureError, ClientAuthenticationError, ResourceExistsError, ResourceNotFoundError

from azstoragetorch import TransferConfig
from azstoragetorch._engine.config import KiB, MiB
from azstoragetorch.exceptions import BlobChangedError, FatalBlobIOWriteError
from azstoragetorch.io import BlobIO
from tests.azurite.container import Container
from tests.faults import FaultService, Hold, Match, Status
from tests.support import QUICK, collect_garbage, content, run_threads, taking

OLD = b"the old content"
ACCOUNT = "https://account.blob.core.windows.net"


@pytest.fixture
def service(fault_service: FaultService) -> FaultService:
    fault_service.put("c", "b", OLD)
    return fault_service


def open_blob(service: FaultService, mode: Any = "rb", name: str = "b", transfer: TransferConfig = QUICK) -> BlobIO:
    return BlobIO(service.blob_url("c", name), mode, credential=False, transfer=transfer)


class TestWrongArguments:
    @pytest.mark.parametrize(
        ("arguments", "options", "kind", "message"),
        [
            (("not a url", "rb"), {}, ValueError, "blob_url is not a URL"),
            ((f"{ACCOUNT}", "rb"), {}, ValueError, "blob_url .* no container"),
            ((f"{ACCOUNT}/c", "rb"), {}, ValueError, "blob_url .* not of a blob"),
            ((f"{ACCOUNT}/c/b", "r"), {}, ValueError, "mode must be 'rb', 'wb' or 'xb', not 'r'"),
            ((f"{ACCOUNT}/c/b", "ab"), {}, ValueError, "mode must be"),
            ((f"{ACCOUNT}/c/b", "r+b"), {}, ValueError, "mode must be"),
            ((f"{ACCOUNT}/c/b", "w"), {}, ValueError, "mode must be"),
            ((f"{ACCOUNT}/c/b", None), {}, ValueError, "mode must be"),
            ((f"{ACCOUNT}/c/b?snapshot=x", "wb"), {}, ValueError, "snapshot or versionid can only be read"),
            ((f"{ACCOUNT}/c/b?versionid=x", "xb"), {}, ValueError, "snapshot or versionid can only be read"),
            (
                ("http://127.0.0.1/account/c/b", "rb"),
                {},
                ValueError,
                "credential: a token is never sent over plain http",
            ),
            ((None, "rb"), {}, TypeError, "blob_url must be a str"),
            ((b"https://x/c/b", "rb"), {}, TypeError, "blob_url must be a str"),
            ((f"{ACCOUNT}/c/b",), {}, TypeError, "mode"),
            ((f"{ACCOUNT}/c/b", "rb"), {"credential": "key"}, TypeError, "credential must be"),
            ((f"{ACCOUNT}/c/b?sv=1&sig=x", "rb"), {"credential": "key"}, TypeError, "credential must be"),
            ((f"{ACCOUNT}/c/b", "rb"), {"credentails": None}, TypeError, "credentails"),
            ((f"{ACCOUNT}/c/b", "rb"), {"transfer": {"part_size": 1}}, TypeError, "transfer must be a TransferConfig"),
            ((f"{ACCOUNT}/c/b", "rb", None), {}, TypeError, "positional"),
        ],
    )
    def test_are_named(
        self, arguments: tuple[Any, ...], options: dict[str, Any], kind: type[Exception], message: str
    ) -> None:
        with pytest.raises(kind, match=message):
            BlobIO(*arguments, **options)
        collect_garbage()  # an incompletely constructed object does not warn

    @pytest.mark.parametrize("size", ["5", 1.5, [1]])
    def test_of_a_read(self, service: FaultService, size: Any) -> None:
        with open_blob(service) as blob, pytest.raises(TypeError):
            blob.read(size)

    @pytest.mark.parametrize("target", [b"read only", "text", 5, memoryview(np.zeros((4, 4)))[::2]])
    def test_of_readinto(self, service: FaultService, target: Any) -> None:
        with open_blob(service) as blob:
            with pytest.raises((TypeError, BufferError)):
                blob.readinto(target)
            assert blob.tell() == 0
            assert blob.read() == OLD

    def test_they_change_nothing(self, service: FaultService) -> None:
        for options in ({"mode": "w"}, {"mode": "wb", "credential": 5}, {"mode": "wb", "transfer": 5}):
            with pytest.raises((ValueError, TypeError)):
                BlobIO(service.blob_url("c", "b"), **options)  # type: ignore[arg-type]
        with open_blob(service, "wb") as blob:
            with pytest.raises(TypeError, match=r"'str'.*TextIOWrapper"):
                blob.write("text")  # type: ignore[arg-type]
            blob.abort()
        assert service.log == []
        assert service.get("c", "b") == OLD


class TestModes:
    def test_a_reader_does_not_write(self, service: FaultService) -> None:
        with open_blob(service) as blob:
            assert (blob.mode, blob.readable(), blob.writable(), blob.seekable()) == ("rb", True, False, True)
            for action in (lambda: blob.write(b"x"), lambda: blob.writelines([b"x"]), lambda: blob.truncate(0)):
                with pytest.raises(io.UnsupportedOperation):
                    action()
            blob.flush()
        assert service.get("c", "b") == OLD

    @pytest.mark.parametrize("mode", ["wb", "xb"])
    def test_a_writer_does_not_read_and_knows_its_place(self, service: FaultService, mode: str) -> None:
        with open_blob(service, mode, "new") as blob:
            assert (blob.mode, blob.readable(), blob.writable(), blob.seekable()) == (mode, False, True, False)
            actions: list[Callable[[], object]] = [
                blob.read,
                blob.read1,
                blob.peek,
                blob.readline,
                blob.readlines,
                lambda: next(blob),
                lambda: blob.readinto(bytearray(1)),
                lambda: blob.readinto1(bytearray(1)),
                lambda: blob.seek(0),
                lambda: blob.truncate(),
            ]
            for action in actions:
                with pytest.raises(io.UnsupportedOperation):
                    action()
            blob.write(b"12345")
            assert (blob.tell(), blob.size) == (5, 5)
            assert blob.etag is None
        assert service.get("c", "new") == b"12345"

    @pytest.mark.parametrize("mode", ["rb", "wb"])
    def test_there_is_no_descriptor(self, service: FaultService, mode: str) -> None:
        """torch, numpy and subprocess ask for one, and work without it."""
        blob = open_blob(service, mode)
        with pytest.raises(io.UnsupportedOperation):
            blob.fileno()
        assert not blob.isatty()
        blob.abort()


class TestWhatItIs:
    def test_name_size_and_version(self, service: FaultService) -> None:
        url = service.blob_url("c", "a b", sv="1", sig="topsecret")
        etag = service.put("c", "a b", content(100_000))
        with BlobIO(url, "rb", transfer=QUICK) as blob:
            assert blob.name == service.blob_url("c", "a b")
            assert blob.etag is None
            assert repr(blob) == f"<BlobIO '{blob.name}' mode='rb'>"
            assert blob.size == 100_000
            assert blob.etag == etag
        assert repr(blob) == f"<BlobIO '{blob.name}' mode='rb' closed>"
        assert (blob.name, blob.mode, blob.etag) == (service.blob_url("c", "a b"), "rb", etag)
        assert repr(BlobIO.__new__(BlobIO)) == "<BlobIO not opened>"

    @pytest.mark.parametrize("length", [0, 5, 200_000])
    @pytest.mark.parametrize("end", [BlobIO.close, BlobIO.abort])
    def test_a_closed_writer_still_knows_how_much_it_took(
        self, service: FaultService, length: int, end: Callable[[BlobIO], None]
    ) -> None:
        blob = open_blob(service, "wb")
        blob.write(content(length))
        end(blob)
        assert blob.size == length

    def test_peek_does_not_move(self, service: FaultService) -> None:
        with open_blob(service) as blob:
            assert blob.peek(3)[:3] == OLD[:3]
            assert blob.tell() == 0
            assert blob.read() == OLD
            assert blob.peek() == b""

    def test_a_second_open_sees_a_new_version_and_the_first_says_so(self, service: FaultService) -> None:
        service.put("c", "b", content(300_000))
        with open_blob(service) as first:
            first.read(10)
            service.put("c", "b", content(300_000, 1))
            with open_blob(service) as second:
                assert second.read() == content(300_000, 1)
            with pytest.raises(BlobChangedError):
                first.read()

    def test_several_readers_of_one_blob(self, service: FaultService) -> None:
        data = content(500_000)
        service.put("c", "b", data)
        with open_blob(service) as shared:

            def read(number: int) -> bytes:
                if number % 2:
                    with open_blob(service) as own:
                        return own.read()
                return shared.read(0)

            assert [piece for piece in run_threads(8, read) if piece] == [data] * 4


class TestBuffers:
    def test_not_contiguous(self, service: FaultService) -> None:
        array = np.arange(24, dtype=np.int32).reshape(4, 6)
        with open_blob(service, "wb") as blob:
            assert blob.write(array.T) == array.nbytes
            assert blob.write(array[::2, ::3]) == array[::2, ::3].nbytes
            assert blob.write(memoryview(b"0123456789")[::-2]) == 5
        assert service.get("c", "b") == array.T.tobytes() + array[::2, ::3].tobytes() + b"97531"

    def test_of_other_byte_order(self, service: FaultService) -> None:
        array = np.arange(10, dtype=">f8")
        with open_blob(service, "wb") as blob:
            assert blob.write(array) == 80
        assert service.get("c", "b") == array.tobytes()

    def test_large_ones_that_are_not_bytes(self, service: FaultService) -> None:
        array = np.arange(100_000, dtype=np.int64)
        with open_blob(service, "wb") as blob:
            assert blob.write(memoryview(array)) == 800_000
        target = np.zeros_like(array)
        with open_blob(service) as blob:
            assert blob.readinto(target) == 800_000
        assert (target == array).all()

    def test_pickle_with_buffers_of_its_own(self, service: FaultService) -> None:
        """Protocol 5 passes large buffers on without a copy."""
        value = {"array": np.arange(100_000), "bytes": content(300_000)}
        buffers: list[pickle.PickleBuffer] = []
        with open_blob(service, "wb") as blob:
            pickle.dump(value, blob, protocol=5, buffer_callback=buffers.append)
            sizes = [blob.write(buffer) for buffer in buffers]
        with open_blob(service) as blob:
            at = blob.seek(-sum(sizes), io.SEEK_END)
            parts = [blob.read(size) for size in sizes]
            blob.seek(0)
            loaded = pickle.load(blob, buffers=parts)
            assert blob.tell() <= at + 10 * MiB
        assert (loaded["array"] == value["array"]).all()

    @pytest.mark.parametrize("size", [1 * MiB - 1, 1 * MiB, 1 * MiB + 1, 3 * MiB])
    def test_large_reads_into_tensors(self, service: FaultService, size: int) -> None:
        data = content(size)
        service.put("c", "b", data)
        target = torch.zeros(size, dtype=torch.uint8)
        with open_blob(service) as blob:
            assert blob.readinto(target.numpy()) == size
            blob.seek(0)
            assert blob.read(size) == data
        assert target.numpy().tobytes() == data


class TestCommit:
    def test_closing_commits_and_not_before(self, service: FaultService) -> None:
        blob = open_blob(service, "wb")
        blob.write(content(300_000))
        blob.flush()
        assert service.get("c", "b") == OLD
        blob.close()
        assert service.get("c", "b") == content(300_000)
        count = len(service.log)
        blob.close()
        blob.abort()
        assert len(service.log) == count

    def test_a_text_wrapper_whose_block_fails(self, service: FaultService) -> None:
        """It always closes the file below it; still nothing is committed."""

        def fail() -> None:
            with io.TextIOWrapper(open_blob(service, "wb"), encoding="utf-8") as text:
                text.write("half of it")
                raise KeyError

        with pytest.warns(RuntimeWarning, match="nothing was committed"), pytest.raises(KeyError):
            fail()
        assert service.get("c", "b") == OLD

    @pytest.mark.parametrize("wrap", [io.BufferedWriter, io.TextIOWrapper])
    def test_any_wrapper_that_closes_during_an_exception(self, service: FaultService, wrap: Any) -> None:
        wrapper = wrap(open_blob(service, "wb"))

        def fail() -> None:
            try:
                raise KeyError
            finally:
                wrapper.close()

        with pytest.warns(RuntimeWarning, match="KeyError"), pytest.raises(KeyError):
            fail()
        assert service.get("c", "b") == OLD

    def test_one_that_was_opened_and_closed_in_a_handler_is_committed(self, service: FaultService) -> None:
        """Saving something after a failure is not a failure of the save."""
        try:
            raise KeyError
        except KeyError:
            with open_blob(service, "wb") as blob:
                blob.write(b"saved")
            other = open_blob(service, "wb", "other")
            other.write(b"saved too")
            other.close()
        assert service.get("c", "b") == b"saved"
        assert service.get("c", "other") == b"saved too"

    def test_a_with_block_in_a_handler_commits_what_was_opened_before(self, service: FaultService) -> None:
        """The block itself reports how it ended."""
        blob = open_blob(service, "wb")
        try:
            raise KeyError
        except KeyError:
            with blob:
                blob.write(b"saved")
        assert service.get("c", "b") == b"saved"

    @pytest.mark.parametrize("save", ["torch", "zip", "tar", "json"])
    def test_what_fails_while_saving_leaves_the_old_one(self, service: FaultService, save: str) -> None:
        class Unpicklable:
            def __reduce__(self) -> Any:
                raise KeyError("no")

        good = b"x" * 200_000
        with pytest.raises((KeyError, TypeError)), open_blob(service, "wb") as blob:
            if save == "torch":
                torch.save({"a": torch.ones(100_000), "b": Unpicklable()}, blob)
            elif save == "zip":
                with zipfile.ZipFile(blob, "w") as archive:
                    archive.writestr("a", good)
                    raise KeyError
            elif save == "tar":
                with tarfile.open(fileobj=blob, mode="w") as tar:
                    member = tarfile.TarInfo("a")
                    member.size = len(good)
                    tar.addfile(member, io.BytesIO(good))
                    raise KeyError
            else:
                blob.write(json.dumps({"a": 1}).encode())
                json.dump({"b": object()}, io.TextIOWrapper(io.BytesIO()))
        assert service.get("c", "b") == OLD

    def test_a_failed_close_says_so_once(self, service: FaultService) -> None:
        service.script("put_blob", [Status(403)], repeat=True)
        blob = open_blob(service, "wb")
        blob.write(b"new")
        with pytest.raises(FatalBlobIOWriteError, match=r"nothing was committed.*403"):
            blob.close()
        assert blob.closed
        blob.close()
        del blob
        collect_garbage()
        assert service.get("c", "b") == OLD

    def test_a_failing_commit_at_the_end_of_a_block_is_the_error(self, service: FaultService) -> None:
        service.script("put_block_list", [Status(403)], repeat=True)
        with pytest.raises(FatalBlobIOWriteError) as caught, open_blob(service, "wb") as blob:
            blob.write(content(200_000))
        assert isinstance(caught.value.__cause__, ClientAuthenticationError)
        assert service.get("c", "b") == OLD

    def test_closing_from_another_thread_waits_its_turn(self, service: FaultService) -> None:
        gate = threading.Event()
        service.script(Match("put_block"), [Hold(gate)])
        blob = open_blob(service, "wb")
        written: list[int] = []

        def act(number: int) -> None:
            if number == 0:
                written.append(blob.write(content(200_000)))
            elif number == 1:
                service.wait_for_requests(1)
                blob.close()
            else:
                service.wait_for_requests(2)
                gate.set()

        run_threads(3, act)
        assert service.get("c", "b") == content(200_000)

    @pytest.mark.parametrize("size", [5, 200_000])
    def test_closing_from_many_threads_commits_once(self, service: FaultService, size: int) -> None:
        for _ in range(10):
            blob = open_blob(service, "wb")
            blob.write(content(size))
            run_threads(6, lambda _, blob=blob: blob.close())  # type: ignore[misc]
            assert service.get("c", "b") == content(size)
        commits = service.requests("put_blob") + service.requests("put_block_list")
        assert len(commits) == 10

    def test_exclusive_creation(self, service: FaultService) -> None:
        with pytest.raises(ResourceExistsError), open_blob(service, "xb") as blob:
            blob.write(b"new")
        with open_blob(service, "xb", "new") as blob:
            blob.write(b"new")
        assert (service.get("c", "b"), service.get("c", "new")) == (OLD, b"new")


class TestPickling:
    def test_a_reader_continues_where_it_was_in_the_version_it_saw(self, service: FaultService) -> None:
        service.put("c", "b", content(500_000))
        with open_blob(service) as blob:
            blob.read(1000)
            for dump in (pickle.dumps, ForkingPickler.dumps):
                with pickle.loads(dump(blob)) as again:
                    assert (again.tell(), again.etag, again.size) == (1000, blob.etag, 500_000)
                    assert again.read() == content(500_000)[1000:]
            frozen = pickle.dumps(blob)
            service.put("c", "b", content(500_000, 1))
            with pickle.loads(frozen) as again, pytest.raises(BlobChangedError):
                again.read()

    def test_one_that_read_nothing_yet(self, service: FaultService) -> None:
        with open_blob(service) as blob:
            blob.seek(4)
            assert pickle.loads(pickle.dumps(blob)).read() == OLD[4:]

    def test_copies_have_their_own_position(self, service: FaultService) -> None:
        url = service.blob_url("c", "b", sv="1", sig="secret")
        service.require_sas("secret")
        with BlobIO(url, "rb", transfer=QUICK) as blob, copy.copy(blob) as one, copy.deepcopy(blob) as two:
            assert one.read(5) == two.read(5) == blob.read(5) == OLD[:5]
            assert one.read() == OLD[5:]

    @pytest.mark.parametrize("mode", ["wb", "xb"])
    def test_a_writer_cannot(self, service: FaultService, mode: str) -> None:
        blob = open_blob(service, mode, "new")
        for dump in (pickle.dumps, copy.copy, copy.deepcopy):
            with pytest.raises(TypeError, match="only readers can be pickled"):
                dump(blob)
        blob.abort()

    def test_nor_can_a_closed_one(self, service: FaultService) -> None:
        blob = open_blob(service)
        blob.close()
        with pytest.raises(ValueError, match="closed"):
            pickle.dumps(blob)


class TestSecrets:
    """A SAS is used and never shown."""

    SECRET = "dG9wc2VjcmV0"

    def test_in_no_repr_name_or_pickle(self, service: FaultService) -> None:
        url = service.blob_url("c", "b", sv="1", sig=self.SECRET)
        for blob in (BlobIO(url, "rb"), BlobIO(url, "rb", credential=AzureSasCredential(f"sig={self.SECRET}"))):
            blob.read()
            texts = [repr(blob), str(blob), blob.name, pickle.dumps(blob).decode("latin-1"), repr(vars(blob))]
            assert not any(self.SECRET in text for text in texts)
            assert self.SECRET in ForkingPickler.dumps(blob).tobytes().decode("latin-1")
            blob.close()

    @pytest.mark.parametrize("fault", [Status(403), Status(503)], ids=repr)
    def test_in_no_error_nor_its_chain_nor_its_pickle(self, service: FaultService, fault: Any) -> None:
        service.script(Match(), [fault], repeat=True)
        url = service.blob_url("c", "b", sv="1", sig=self.SECRET)
        actions: list[Callable[[], object]] = [
            lambda: BlobIO(url, "rb", transfer=QUICK).read(),
            lambda: self.write(url, b"x"),
            lambda: self.write(url, content(200_000)),
        ]
        for action in actions:
            with pytest.raises((AzureError, FatalBlobIOWriteError)) as caught:
                action()
            self.check(caught.value)

    def test_in_none_of_a_connection(self, service: FaultService) -> None:
        url = service.blob_url("c", "b", sv="1", sig=self.SECRET)
        with service.refusing_connections():
            for action in (lambda: BlobIO(url, "rb", transfer=QUICK).read(), lambda: self.write(url, b"x")):
                with pytest.raises((AzureError, FatalBlobIOWriteError)) as caught:
                    action()  # type: ignore[no-untyped-call]
                self.check(caught.value)

    def write(self, url: str, data: bytes) -> None:
        with BlobIO(url, "wb", transfer=QUICK) as blob:
            blob.write(data)

    def check(self, error: BaseException) -> None:
        assert self.SECRET not in "".join(traceback.format_exception(error))
        assert self.SECRET not in pickle.dumps(error).decode("latin-1")
        links = [error]
        while links:
            link = links.pop()
            assert self.SECRET not in f"{link} {link!r} {vars(link)}"
            links += [other for other in (link.__cause__, link.__context__) if other is not None]


class TestInAzurite:
    """End to end, with the defaults."""

    def test_a_checkpoint(self, container: Container) -> None:
        state = {"weight": torch.randn(500, 1000), "step": 3}
        with BlobIO(container.blob_sas_url("a b%2F?#ü//x/"), "wb") as blob:
            torch.save(state, blob)
        with BlobIO(container.blob_sas_url("a b%2F?#ü//x/"), "rb") as blob:
            loaded = torch.load(blob, mmap=False, weights_only=True)
        assert torch.equal(loaded["weight"], state["weight"])
        assert torch.load(io.BytesIO(container.get("a b%2F?#ü//x/")))["step"] == 3

    def test_a_large_blob_in_many_parts_and_blocks(self, container: Container) -> None:
        data = content(20 * MiB)
        transfer = replace(QUICK, part_size=512 * KiB, block_size=768 * KiB)
        with BlobIO(container.blob_sas_url("b"), "wb", transfer=transfer) as blob:
            for start in range(0, len(data), 300_000):
                blob.write(data[start : start + 300_000])
        assert container.get("b") == data
        assert container.uncommitted("b") == 0
        with BlobIO(container.blob_sas_url("b"), "rb", transfer=transfer) as blob:
            assert blob.read() == data

    def test_nothing_is_committed_after_an_error(self, container: Container) -> None:
        url = container.put("b", OLD)
        with pytest.raises(KeyError), BlobIO(url, "wb", transfer=QUICK) as blob:
            blob.write(content(300_000))
            raise KeyError
        assert container.get("b") == OLD

    def test_one_that_is_not_there(self, container: Container) -> None:
        with BlobIO(container.blob_sas_url("nowhere"), "rb") as blob, pytest.raises(ResourceNotFoundError):
            blob.read()


def test_the_error_of_an_interrupted_block_is_what_is_seen(service: FaultService) -> None:
    """Our errors do not hide the user's error."""
    service.script("put_block", [Status(403)], repeat=True)
    with pytest.raises(ZeroDivisionError), open_blob(service, "wb") as blob:
        for _ in range(7):
            blob.write(content(10_000))
        raise ZeroDivisionError
    assert sys.exc_info() == (None, None, None)


def test_closing_is_prompt_whatever_is_in_progress(service: FaultService) -> None:
    gate = threading.Event()
    service.put("c", "b", content(2 * MiB))
    service.script(Match("get_blob", nth=2), [Hold(gate)], repeat=True)
    blob = open_blob(service, transfer=replace(QUICK, part_size=128 * KiB, read_timeout=240))
    blob.read(70_000)
    service.wait_for_requests(2)
    with taking():
        blob.close()
    gate.set()
