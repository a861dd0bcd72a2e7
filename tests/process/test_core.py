"""One blob in several processes: forked, spawned, pickled, interrupted. Objects used before still work."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import random
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

import pytest
from azure.core.credentials import AccessToken, AzureNamedKeyCredential, AzureSasCredential

import azstoragetorch.exceptions
from azstoragetorch import TransferConfig
from azstoragetorch._blob import transport
from azstoragetorch._blob.client import Head
from azstoragetorch._blob.credentials import CredentialHolder
from azstoragetorch._blob.download import BlobVersion
from azstoragetorch._blob.listing import Page
from azstoragetorch._blob.url import parse_url
from azstoragetorch._engine.config import MiB
from azstoragetorch._engine.ranges import ByteRange
from azstoragetorch._engine.threads import engine_for
from azstoragetorch.exceptions import AZStorageTorchError, FatalBlobIOWriteError
from azstoragetorch.io import BlobIO
from tests.azurite.container import Container
from tests.faults import FaultService, Hold, Match, Stall
from tests.support import QUICK, ROOT, blob_client, content, interrupted_once, run_python, taking, wait_until

DATA = content(400_000)
METHODS = ["fork", "spawn", "forkserver"]
SECRET = "dG9wc2VjcmV0"


@pytest.fixture
def service(fault_service: FaultService) -> FaultService:
    fault_service.put("c", "b", DATA)
    return fault_service


def in_fork(action: Callable[[], Any], timeout: float = 60.0) -> Any:
    """The result of *action* in a forked child."""
    receiver, sender = multiprocessing.Pipe(duplex=False)
    pid = os.fork()
    if pid == 0:
        try:
            sender.send((True, action()))
        except BaseException:  # noqa: BLE001 - the parent's test fails with it
            sender.send((False, traceback.format_exc()))
        finally:
            os._exit(0)
    sender.close()
    try:
        assert receiver.poll(timeout), "the child hangs"
        is_good, answer = receiver.recv()
    finally:
        if not receiver.closed:
            os.kill(pid, 9)
        os.waitpid(pid, 0)
        receiver.close()
    assert is_good, answer
    return answer


def read_all(readers: list[BlobIO]) -> list[bytes]:
    return [blob.read() for blob in readers]


def write_new(url: str) -> None:
    with BlobIO(url, "wb", credential=False, transfer=QUICK) as blob:
        blob.write(DATA[::-1])


def child(connection: Any, action: Callable[..., Any], *arguments: Any) -> None:
    try:
        connection.send((True, action(*arguments)))
    except BaseException:  # noqa: BLE001 - the parent's test fails with it
        connection.send((False, traceback.format_exc()))


def in_process(method: str, action: Callable[..., Any], *arguments: Any, timeout: float = 240.0) -> Any:
    """The result of *action* in a child started with *method*."""
    context = multiprocessing.get_context(method)
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=child, args=(sender, action, *arguments))
    process.start()
    sender.close()
    assert receiver.poll(timeout), "the child hangs"
    is_good, answer = receiver.recv()
    process.join(240)
    assert is_good, answer
    return answer


def use_all(readers: list[BlobIO], url: str) -> list[tuple[int, bytes]]:
    write_new(url)
    return [(blob.tell(), blob.read()) for blob in readers]


class TestMethods:
    """With every start method, and whether or not the parent has read before."""

    @pytest.mark.parametrize("method", METHODS)
    def test_readers_continue_in_a_child(self, service: FaultService, method: str) -> None:
        """At the same time as the parent, which is not disturbed."""
        url, used = service.blob_url("c", "b"), [0, 1000, 200_000]
        readers = [BlobIO(url, "rb", credential=False, transfer=QUICK) for _ in used]
        for blob, size in zip(readers, used, strict=True):
            assert blob.read(size) == DATA[:size]
        answers = in_process(method, use_all, readers, service.blob_url("c", "child's"))
        assert answers == [(size, DATA[size:]) for size in used]
        assert service.get("c", "child's") == DATA[::-1]
        assert [blob.read() for blob in readers] == [DATA[size:] for size in used]

    @pytest.mark.parametrize("method", METHODS)
    def test_secrets_travel_to_the_child(self, container: Container, method: str) -> None:
        url = container.put("b", DATA)
        readers = [
            BlobIO(url, "rb"),
            BlobIO(container.blob_url("b"), "rb", credential=container.sas_credential),
            BlobIO(container.blob_url("b"), "rb", credential=container.key),
        ]
        readers[0].read(100)
        answers = in_process(method, read_all, readers)
        assert answers == [DATA[100:], DATA, DATA]


class TestFork:
    def test_the_same_object_in_several_children(self, service: FaultService) -> None:
        with BlobIO(service.blob_url("c", "b"), "rb", credential=False, transfer=QUICK) as blob:
            blob.read(70_000)
            for _ in range(3):
                assert in_fork(blob.read) == DATA[70_000:]
                assert in_fork(lambda: blob.size) == len(DATA)
            assert blob.read() == DATA[70_000:]

    def test_one_that_was_opened_only(self, service: FaultService) -> None:
        blob = BlobIO(service.blob_url("c", "b"), "rb", credential=False, transfer=QUICK)
        assert in_fork(lambda: (blob.size, blob.read())) == (len(DATA), DATA)
        assert blob.read() == DATA

    def test_in_the_middle_of_everything(self, service: FaultService) -> None:
        """Threads of the parent can hold any locks: no child hangs, and no transfer of the parent is affected."""
        service.put("c", "big", content(3 * MiB))
        is_over = threading.Event()
        errors: list[BaseException] = []

        def keep_busy(number: int) -> None:
            try:
                while not is_over.is_set():
                    url = service.blob_url("c", "big")
                    with BlobIO(url, "rb", credential=False, transfer=QUICK) as blob:
                        while blob.read(10_000) and not is_over.is_set():
                            pass
                    assert blob_client(service.blob_url("c", "b")).read()[0] == DATA
                    write_new(service.blob_url("c", f"busy-{number}"))
            except BaseException as error:  # noqa: BLE001 - checked below
                errors.append(error)

        threads = [threading.Thread(target=keep_busy, args=(number,), daemon=True) for number in range(3)]
        for thread in threads:
            thread.start()
        blob = BlobIO(service.blob_url("c", "b"), "rb", credential=False, transfer=QUICK)
        blob.read(1000)

        def act() -> bool:
            fresh = blob_client(service.blob_url("c", "b")).read()[0]
            write_new(service.blob_url("c", f"child-{os.getpid()}"))
            return blob.read() == DATA[1000:] and fresh == DATA

        try:
            for _ in range(15):
                time.sleep(random.uniform(0, 0.02))
                assert in_fork(act)
        finally:
            is_over.set()
            for thread in threads:
                thread.join(240)
        assert errors == []
        assert blob.read() == DATA[1000:]

    @pytest.mark.parametrize("action", ["read", "seek", "write"])
    def test_while_a_thread_of_the_parent_is_in_a_call_of_the_same_object(
        self, service: FaultService, action: str
    ) -> None:
        """The child does not wait for it: a reader has the position before that call."""
        gate = threading.Event()
        transfer = replace(QUICK, read_timeout=240)
        if action == "write":
            blob = BlobIO(service.blob_url("c", "new"), "wb", credential=False, transfer=transfer)
            service.script("put_block", [Hold(gate)], repeat=True)
            call: Callable[[], object] = lambda: blob.write(DATA)  # noqa: E731
        else:
            blob = BlobIO(service.blob_url("c", "b"), "rb", credential=False, transfer=transfer)
            blob.seek(1000)
            service.script("get_blob", [Hold(gate)])
            call = blob.read if action == "read" else lambda: blob.seek(-5, os.SEEK_END)
        thread = threading.Thread(target=call, daemon=True)
        thread.start()
        service.wait_for_requests(1)

        def act() -> bool:
            if action == "write":
                with pytest.raises(FatalBlobIOWriteError, match="forked"):
                    blob.close()
                return True
            return blob.tell() == 1000 and blob.read() == DATA[1000:] and blob.seek(0) == 0

        try:
            assert in_fork(act)
        finally:
            gate.set()
            thread.join(240)
        blob.abort()

    def test_connections_of_the_parent_are_let_go(self, service: FaultService) -> None:
        """Idle ones and those in mid-response: what the parent closes is closed."""
        gate = threading.Event()
        service.script(Match("get_blob", nth=3), [Stall(60, after=1000)])
        client = blob_client(service.blob_url("c", "b"), replace(QUICK, part_size=1 * MiB, read_timeout=240))
        client.read()
        client.read()
        thread = threading.Thread(target=lambda: (client.read(), gate.set()), daemon=True)
        thread.start()
        service.wait_for_requests(3)
        time.sleep(0.1)

        def sockets() -> list[str]:
            found = []
            for link in Path("/proc/self/fd").iterdir():
                with suppress(FileNotFoundError):  # the descriptor of the listing itself
                    found.append(str(link.readlink()))
            return found

        ours = {
            f"socket:[{os.fstat(connection._http.sock.fileno()).st_ino}]"
            for connection in transport._pool.get()._made
            if connection._http.sock is not None and connection._http.sock.fileno() >= 0
        }
        assert ours <= set(sockets())
        assert ours
        assert not ours & set(in_fork(sockets))
        service.drop_connections()
        assert gate.wait(60)

    def test_a_writer_belongs_to_the_process_that_opened_it(self, service: FaultService) -> None:
        """A child neither commits nor disturbs it, however the child ends."""
        blob = BlobIO(service.blob_url("c", "b"), "wb", credential=False, transfer=QUICK)
        blob.write(DATA[::-1][:300_000])

        def use() -> str:
            answers = []
            for action in (lambda: blob.write(b"x"), blob.flush, blob.close):
                with pytest.raises(FatalBlobIOWriteError, match="forked") as caught:
                    action()
                answers.append(str(caught.value))
            return answers[0]

        assert "open the blob in the child" in in_fork(use)
        in_fork(blob.abort)
        assert service.get("c", "b") == DATA
        blob.write(DATA[::-1][300_000:])
        blob.close()
        assert service.get("c", "b") == DATA[::-1]

    def test_a_token_that_is_just_being_fetched(self, https_fault_service: FaultService) -> None:
        """The thread that fetches it does not exist in the child, which fetches another token."""
        service = https_fault_service
        service.put("c", "b", DATA)
        fetching, go_on = threading.Event(), threading.Event()

        class Slow:
            is_first = True

            def get_token(self, *scopes: str, **options: Any) -> AccessToken:
                if Slow.is_first:
                    Slow.is_first = False
                    fetching.set()
                    go_on.wait(60)
                return AccessToken("token", int(time.time()) + 3600)

        blob = BlobIO(service.blob_url("c", "b"), "rb", credential=Slow(), transfer=QUICK)
        other = BlobIO(service.blob_url("c", "b"), "rb", credential=blob._client._credential._credential)
        thread = threading.Thread(target=blob.read, daemon=True)
        thread.start()
        assert fetching.wait(60)
        assert in_fork(other.read) == DATA
        go_on.set()
        thread.join(240)

    def test_memory_in_flight_is_counted_again(self, service: FaultService) -> None:
        service.put("c", "b", content(2 * MiB))
        blob = BlobIO(service.blob_url("c", "b"), "rb", credential=False, transfer=QUICK)
        for _ in range(20):
            blob.read(10_000)
        engine = blob._client.engine
        assert engine.budget.in_flight > 0

        def act() -> tuple[int, int, bool]:
            before = blob._client.engine.budget.in_flight
            is_right = blob.read() == content(2 * MiB)[200_000:]
            blob.close()
            return before, blob._client.engine.budget.in_flight, is_right

        assert in_fork(act) == (0, 0, True)


def every_exception() -> list[BaseException]:
    kinds = [
        kind
        for kind in vars(azstoragetorch.exceptions).values()
        if isinstance(kind, type) and issubclass(kind, Exception) and issubclass(kind, AZStorageTorchError)
    ]
    return [kind.__new__(kind, "what, where, and what to do") for kind in kinds]


class TestPickles:
    @pytest.mark.parametrize("dump", [pickle.dumps, ForkingPickler.dumps], ids=["plain", "to a child"])
    @pytest.mark.parametrize(
        "value",
        [
            TransferConfig(part_size=1 * MiB),
            parse_url("https://account.blob.core.windows.net/c/b?snapshot=x"),
            BlobVersion(5, '"etag"'),
            ByteRange(1, 5),
            Page(["a"], [1], ['"e"'], ["p/"], "m"),
            Head(BlobVersion(3, '"e"'), b"abc"),
        ],
        ids=lambda value: type(value).__name__,
    )
    def test_values(self, value: object, dump: Any) -> None:
        assert pickle.loads(dump(value)) == value

    @pytest.mark.parametrize("error", every_exception(), ids=lambda error: type(error).__name__)
    def test_errors(self, error: Exception) -> None:
        """A worker that raises one must not hang its job."""
        try:
            raise error from ValueError("cause")
        except AZStorageTorchError as raised:
            again = pickle.loads(pickle.dumps(raised))
        assert type(again) is type(error)
        assert str(again) == str(error)

    @pytest.mark.parametrize(
        "holder",
        [
            CredentialHolder(AzureSasCredential(f"sig={SECRET}")),
            CredentialHolder(AzureNamedKeyCredential("account", SECRET)),
            CredentialHolder(None, parse_url(f"https://account.blob.core.windows.net/c/b?sig={SECRET}").sas),
        ],
        ids=["sas", "key", "url"],
    )
    def test_a_secret_is_in_none_that_may_be_kept(self, holder: CredentialHolder) -> None:
        assert SECRET.encode() not in pickle.dumps(holder)
        assert SECRET.encode() in bytes(ForkingPickler.dumps(holder))
        again = pickle.loads(ForkingPickler.dumps(holder))
        assert SECRET.encode() not in pickle.dumps(again)


RAIN = """
import random, signal, sys, threading, time
from azstoragetorch import TransferConfig
from azstoragetorch._engine.threads import engine_for
from azstoragetorch.exceptions import BlobChangedError, FatalBlobIOWriteError
from azstoragetorch.io import BlobIO

url, new, seconds = sys.argv[1], sys.argv[2], float(sys.argv[3])
transfer = TransferConfig(part_size=65536, block_size=65536, max_concurrency=4, max_connections=8,
                          memory_limit=1 << 20, read_ahead=1 << 19, max_backoff=0.01)
data = BlobIO(url, "rb", credential=False, transfer=transfer).read()
left = 0  # interrupts that are still to come

def interrupt(*_):
    global left
    if left:
        left -= 1
        raise KeyboardInterrupt

signal.signal(signal.SIGALRM, interrupt)
randomness = random.Random(int(sys.argv[4]))
counts = {"whole": 0, "interrupted": 0, "committed": 0}

def read_all():
    with BlobIO(url, "rb", credential=False, transfer=transfer) as blob:
        assert blob.read() == data

def read_into():
    buffer = bytearray(len(data))
    try:
        with BlobIO(url, "rb", credential=False, transfer=transfer) as blob:
            assert blob.readinto(buffer) == len(data)
            assert buffer == data
    except KeyboardInterrupt:
        after = bytes(buffer)
        time.sleep(0.003)
        assert after == buffer, "written to after the interrupt"
        raise

def read_small():
    with BlobIO(url, "rb", credential=False, transfer=transfer) as blob:
        at = 0
        while True:
            try:
                piece = blob.read(5000)
            except KeyboardInterrupt:
                # A second one may come while the first is put right.
                assert left == 0 or blob.tell() in (at, min(at + 5000, len(data)))
                raise
            if not piece:
                break
            assert piece == data[at : at + len(piece)]
            at += len(piece)
        assert at == len(data)

def write():
    value = bytes([randomness.randrange(256)]) * randomness.choice([100, 70_000, 300_000])
    global attempted
    attempted = value
    with BlobIO(new, "wb", credential=False, transfer=transfer) as blob:
        for start in range(0, len(value), 40_000):
            blob.write(value[start : start + 40_000])

attempted = None
possible = set()
end = time.monotonic() + seconds
while time.monotonic() < end:
    action = randomness.choice([read_all, read_into, read_small, write])
    try:
        left = 2
        signal.setitimer(signal.ITIMER_REAL, randomness.uniform(0.0005, 0.02), randomness.uniform(0.003, 0.01))
        action()
        left = 0
        counts["whole"] += 1
    except (KeyboardInterrupt, FatalBlobIOWriteError):
        counts["interrupted"] += 1
        try:
            left = 0
        except KeyboardInterrupt:
            pass
    signal.setitimer(signal.ITIMER_REAL, 0)
    if action is write:
        try:
            found = BlobIO(new, "rb", credential=False, transfer=transfer).read()
        except BlobChangedError:  # a commit that had been sent when the interrupt came
            found = BlobIO(new, "rb", credential=False, transfer=transfer).read()
        assert len(found) in (100, 70_000, 300_000) and len(set(found)) == 1, "half a blob"
print(counts["whole"], counts["interrupted"])
"""


def rain(service: FaultService, seconds: float) -> None:
    service.put("c", "new", b"x" * 100)
    seed = str(random.randrange(1 << 30))
    answer = run_python(
        RAIN, service.blob_url("c", "b"), service.blob_url("c", "new"), str(seconds), seed, timeout=seconds + 60
    )
    whole, interrupted = map(int, answer.split())
    assert interrupted > 10 * seconds, (whole, interrupted, seed)


@pytest.mark.untraced
def test_interrupts_at_any_moment(service: FaultService) -> None:
    """Repeated Ctrl-C: bytes are right or not returned, no buffer changes later, no commit is partial."""
    rain(service, 3)


@pytest.mark.exhaustive
@pytest.mark.untraced
def test_interrupts_at_any_moment_for_long(service: FaultService) -> None:
    rain(service, 90)


INTERRUPT = """
import os, signal, sys, threading, time
from azstoragetorch import TransferConfig
from azstoragetorch.io import BlobIO

transfer = TransferConfig(part_size=65536, max_concurrency=4, max_connections=8, read_timeout=240.0)
buffer = bytearray(400_000)
try:
    threading.Timer(float(sys.argv[2]), os.kill, [os.getpid(), signal.SIGINT]).start()
    with BlobIO(sys.argv[1], "rb", credential=False, transfer=transfer) as blob:
        blob.readinto(buffer)
except KeyboardInterrupt:
    after = bytes(buffer)
    time.sleep(0.5)
    print("still" if after == buffer else "changed")
"""


@pytest.mark.parametrize("way", ["read", "readinto", "small", "write", "small writes"])
def test_an_interrupt_of_who_waits_gives_everything_back(service: FaultService, way: str) -> None:
    """The engine and the position are unchanged, and the same object can continue to read."""
    service.put("c", "big", content(3 * MiB))
    gate = threading.Event()
    service.script(Match("get_blob", nth=4), [Hold(gate)], repeat=True)
    service.script(Match("put_block", nth=2), [Hold(gate)], repeat=True)
    transfer = replace(QUICK, read_timeout=240, max_connections=20)
    mode: Any = "wb" if "write" in way else "rb"
    blob = BlobIO(service.blob_url("c", "big"), mode, credential=False, transfer=transfer)
    budget = engine_for(transfer).budget

    def act() -> None:
        if way == "read":
            blob.read()
        elif way == "readinto":
            blob.readinto(bytearray(3 * MiB))
        elif way == "small":
            while blob.read(10_000):
                pass
        else:
            for _ in range(40):
                blob.write(content(300_000 if way == "write" else 30_000))

    held = interrupted_once(lambda: any(isinstance(entry.fault, Hold) for entry in service.log))
    with taking(), pytest.raises(KeyboardInterrupt), held:
        act()
    service.clear_script()
    gate.set()
    if mode == "rb":
        position = blob.tell()
        assert blob.read() == content(3 * MiB)[position:]
        blob.close()
    else:
        blob.abort()
        assert service.get("c", "big") == content(3 * MiB)
    wait_until(lambda: budget.in_flight == 0)


@pytest.mark.parametrize("nth", [1, 2])
def test_a_stalled_read_ends_with_ctrl_c(service: FaultService, nth: int) -> None:
    service.script(Match("get_blob", nth=nth), [Hold(threading.Event())], repeat=True)
    with taking():
        answer = run_python(INTERRUPT, service.blob_url("c", "b"), "0.5")
    assert answer == "still\n"


READER = "blob = BlobIO(url, 'rb', credential=False, transfer=transfer)\nblob.read(100)\n"
WRITER = "blob = BlobIO(url, 'wb', credential=False, transfer=transfer)\nfor _ in range(40): blob.write(bytes(9000))\n"
CYCLE = "cycle = [blob]\ncycle.append(cycle)\ndel blob\n"
ENDS = {
    "a reader": (READER, 0),
    "a reader in a cycle": (READER + CYCLE, 0),
    "a writer": (WRITER, 0),
    "a writer in a cycle": (WRITER + CYCLE, 0),
    "an error": (WRITER + "1 / 0", 1),
    "an exit": (WRITER + "sys.exit(3)", 3),
}


@pytest.mark.parametrize("what", ENDS)
def test_the_interpreter_ends_at_once_with(service: FaultService, what: str) -> None:
    """Nothing waits for open blobs, and nothing is committed."""
    gate = threading.Event()
    service.script("put_block", [Hold(gate)], repeat=True)
    service.script(Match("get_blob", nth=2), [Hold(gate)], repeat=True)
    source, code = ENDS[what]
    program = (
        "import sys\nfrom azstoragetorch import TransferConfig\nfrom azstoragetorch.io import BlobIO\n"
        "url = sys.argv[1]\ntransfer = TransferConfig(part_size=65536, block_size=65536, read_timeout=240.0)\n" + source
    )
    command = [sys.executable, "-c", program, service.blob_url("c", "b")]
    with taking():
        result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240, check=False)
    assert result.returncode == code, result.stderr
    assert "Exception ignored" not in result.stderr
    assert "Fatal Python error" not in result.stderr
    assert service.get("c", "b") == DATA


def test_at_exit_a_blob_can_still_be_written(service: FaultService) -> None:
    """For programs that save in an `atexit` handler."""
    program = (
        "import atexit, sys\nfrom azstoragetorch import TransferConfig\nfrom azstoragetorch.io import BlobIO\n"
        "transfer = TransferConfig(part_size=65536, block_size=65536)\n"
        "def save():\n"
        "    with BlobIO(sys.argv[1], 'wb', credential=False, transfer=transfer) as blob:\n"
        "        for _ in range(40):\n            blob.write(bytes(9000))\n"
        "        blob.write(bytes(300_000))\n"
        "    with BlobIO(sys.argv[1], 'rb', credential=False, transfer=transfer) as blob:\n"
        "        print(len(blob.read(10)) + len(blob.read()))\n"
        "atexit.register(save)"
    )
    assert run_python(program, service.blob_url("c", "b")) == "660000\n"
    assert service.get("c", "b") == bytes(660_000)
