"""Processes that are killed, interrupted or ended during a transfer: no partial result, and no wait."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import torch
from azure.core.credentials import AccessToken

from azstoragetorch._engine.config import MiB
from azstoragetorch.datasets import BlobDataset
from azstoragetorch.io import BlobIO
from tests.faults import FaultService, Match, SlowBytes, Stall
from tests.faults.fixtures import LoopbackTls
from tests.support import QUICK, ROOT, content, run_threads, wait_until

_ENDS_WITHIN = 30.0  # seconds; interpreters with torch take some to end on a busy machine
_STALL = 90.0  # seconds; what nobody may wait for

PRELUDE = """
import sys, time, torch
from torch.utils.data import DataLoader
from azstoragetorch import TransferConfig
from azstoragetorch.io import BlobIO
from azstoragetorch.datasets import IterableBlobDataset
url = sys.argv[1]
transfer = TransferConfig(part_size=65536, block_size=65536, max_concurrency=4, max_connections=8,
                          memory_limit=1 << 22, read_timeout=120.0)
access = {"credential": False, "transfer": transfer}
def ready():
    print("ready", flush=True)
"""

WRITES = {
    "small writes": 'f = BlobIO(url + "/model.pt", "wb", **access)\nready()\nwhile True: f.write(b"x" * 1000)',
    "a large write": 'f = BlobIO(url + "/model.pt", "wb", **access)\nready()\nf.write(b"x" * (64 << 20))\nf.close()',
    "torch.save": """
with BlobIO(url + "/model.pt", "wb", **access) as f:
    ready()
    torch.save({str(n): torch.zeros(200_000) for n in range(50)}, f)""",
    "the commit": 'f = BlobIO(url + "/model.pt", "wb", **access)\nf.write(b"x" * 200_000)\nready()\nf.close()',
}
READS = {
    "read": 'ready()\nBlobIO(url + "/blob", "rb", **access).read()',
    "small reads": """
f = BlobIO(url + "/blob", "rb", **access)
ready()
while f.read(100): pass""",
    "an epoch": 'ready()\nlist(IterableBlobDataset.from_container_url(url, prefix="set/", **access))',
    # Small samples: with larger ones than fit into a pipe, torch's workers wait forever after their parent has ended.
    "an epoch of workers": """
def length(blob):
    with blob.reader() as file: return len(file.read())
data = IterableBlobDataset.from_container_url(url, prefix="set/", transform=length, **access)
it = iter(DataLoader(data, None, num_workers=2))
next(it), next(it)  # one of each: a worker of torch that starts without its parent never misses it
ready()
list(it)""",
}


@contextmanager
def program(source: str, service: FaultService) -> Iterator[subprocess.Popen[str]]:
    """Start *source* in a new interpreter; kill it at the end with its children, if they still run."""
    process = subprocess.Popen(
        [sys.executable, "-c", PRELUDE + source, service.container_url("data")],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n", process.communicate()[1]
        yield process
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate(timeout=240)


def saved(seed: int) -> bytes:
    sink = io.BytesIO()
    torch.save({"weight": torch.full((1000,), float(seed))}, sink)
    return sink.getvalue()


def slow_service(service: FaultService) -> FaultService:
    """Blobs that are read slowly, and one to overwrite whose blocks are slow."""
    service.put("data", "blob", content(2 * MiB))
    service.put("data", "model.pt", saved(1))
    for number in range(60):
        service.put("data", f"set/{number:02d}", content(100_000, number))
    service.script(Match("get_blob", path="/set/"), [SlowBytes(50_000)], repeat=True)
    service.script(Match("get_blob", path="/blob$"), [SlowBytes(20_000)], repeat=True)
    service.script(Match("put_block", nth=8), [Stall(_STALL, None)], repeat=True)  # no program that ends has so many
    service.script("put_block_list", [Stall(_STALL, None)], repeat=True)
    return service


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name == "torch.save" else [pytest.mark.exhaustive]) for name in WRITES]
)
def test_a_write_that_is_ended_changes_nothing(fault_service: FaultService, name: str, how: signal.Signals) -> None:
    """The blob is the old one or, if the commit was sent, the complete new one; the process ends at once."""
    service = slow_service(fault_service)
    with program(WRITES[name], service) as process:
        wait_until(
            lambda: (
                len(service.requests("put_block_list" if name == "the commit" else "put_block"))
                >= 3 - 2 * (name == "the commit")
            )
        )
        process.send_signal(how)
        begin = time.monotonic()
        _, errors = process.communicate(timeout=_STALL)
        assert time.monotonic() - begin < _ENDS_WITHIN
        # torch.save itself can raise another error while the interrupt propagates.
        assert process.returncode in {-how, 1 if name == "torch.save" and how == signal.SIGINT else -how}, errors
        assert (how == signal.SIGINT) == ("KeyboardInterrupt" in errors)
    wait_until(lambda: service.open_connections == 0)
    if name == "the commit":
        assert service.get("data", "model.pt") in (saved(1), b"x" * 200_000)
    else:
        assert service.get("data", "model.pt") == saved(1)
        assert not service.requests("put_block_list")
    service.clear_script()
    with BlobIO(service.blob_url("data", "model.pt"), "wb", credential=False, transfer=QUICK) as file:
        file.write(saved(3))
    assert service.get("data", "model.pt") == saved(3), "the next writer is not disturbed by what was left"


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[] if name in ("read", "an epoch of workers") else [pytest.mark.exhaustive])
        for name in READS
    ],
)
def test_a_read_that_is_ended_ends(fault_service: FaultService, name: str, how: signal.Signals) -> None:
    """In the main process, together with its workers."""
    service = slow_service(fault_service)
    with program(READS[name], service) as process:
        service.wait_for_requests(3, "get_blob")
        process.send_signal(how)
        begin = time.monotonic()
        process.wait(_STALL)
        # A DataLoader that is interrupted waits up to 5 s for each worker.
        assert time.monotonic() - begin < _ENDS_WITHIN + (10 if "workers" in name else 0)
        assert process.returncode in (-how, 1)
        # Workers check their parent between two batches.
        wait_until(lambda: service.open_connections == 0)


@pytest.mark.parametrize(
    "how", [signal.SIGKILL, signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.exhaustive)]
)
def test_a_worker_that_is_ended_ends_the_epoch(fault_service: FaultService, how: signal.Signals) -> None:
    """With an error that names the worker; the other worker also ends."""
    service = slow_service(fault_service)
    with program(READS["an epoch of workers"], service) as process:
        service.wait_for_requests(3, "get_blob")
        workers = children_of(process.pid)
        assert len(workers) >= 2
        os.kill(workers[-1], how)
        _, errors = process.communicate(timeout=240)
        assert process.returncode == 1
        assert "DataLoader worker" in errors
    wait_until(lambda: service.open_connections == 0)


def children_of(pid: int) -> list[int]:
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[1]) == pid:
            found.append(int(path.parent.name))
    return sorted(found)


AT_EXIT = {
    "a read under way": 'import threading\nf = BlobIO(url + "/blob", "rb", **access)\n'
    "threading.Thread(target=f.read, daemon=True).start()\ntime.sleep(0.3)\nready()",
    "reading ahead": 'f = BlobIO(url + "/blob", "rb", **access)\nf.read(10)\nready()',
    "an iterator in the middle": 'it = iter(IterableBlobDataset.from_container_url(url, prefix="set/", **access))\n'
    "next(it)\nready()",
    "a writer that was not closed": 'f = BlobIO(url + "/model.pt", "wb", **access)\nf.write(b"x" * 300_000)\nready()',
    "an unhandled error": 'f = BlobIO(url + "/model.pt", "wb", **access)\nf.write(b"x" * 300_000)\nready()\n1 / 0',
}


@pytest.mark.parametrize("name", AT_EXIT)
def test_the_interpreter_ends_with_transfers_open(fault_service: FaultService, name: str) -> None:
    """Without delay or a crash, and nothing is committed."""
    service = slow_service(fault_service)
    with program(AT_EXIT[name], service) as process:
        begin = time.monotonic()
        _, errors = process.communicate(timeout=_STALL)
        assert time.monotonic() - begin < _ENDS_WITHIN
        assert process.returncode == (1 if "error" in name else 0), errors
        assert "Fatal Python error" not in errors
        assert "Exception ignored" not in errors, errors
    assert service.get("data", "model.pt") == saved(1)
    wait_until(lambda: service.open_connections == 0)


@pytest.mark.slow
def test_a_cached_epoch_that_is_killed_leaves_a_cache_that_can_be_trusted(
    fault_service: FaultService, tmp_path: Path
) -> None:
    """Wherever it is killed, the next epoch reads the right bytes, from the cache as far as possible."""
    for number in range(30):
        fault_service.put("data", f"set/{number:02d}", content(50_000, number))
    source = f"""
data = IterableBlobDataset.from_container_url(url, prefix="set/", cache_dir={str(tmp_path)!r}, **access)
ready()
list(data)
"""
    for moment in range(5):
        fault_service.reset_log()
        with program(source, fault_service) as process:
            fault_service.wait_for_requests(1 + 2 * moment)
            process.send_signal(signal.SIGKILL)
            process.wait()
        data = BlobDataset.from_container_url(
            fault_service.container_url("data"), prefix="set/", credential=False, transfer=QUICK, cache_dir=tmp_path
        )
        assert [sample["data"] for sample in data] == [content(50_000, number) for number in range(30)]
        cached = sorted(tmp_path.rglob("*.blob"))
        assert len(cached) == 30
        for path in cached[::3]:
            path.unlink()


class CountingTokens:
    """Returns one token, slowly, and counts the requests."""

    def __init__(self) -> None:
        self.asked = 0

    def get_token(self, *_scopes: str, **_options: object) -> AccessToken:
        self.asked += 1
        time.sleep(0.1)
        return AccessToken("the-token", int(time.time()) + 3600)


def test_eight_threads_share_a_dataset_and_a_credential(
    https_fault_service: FaultService, loopback_tls: LoopbackTls
) -> None:
    """Each reads every blob correctly, and all use one token."""
    service = https_fault_service
    for number in range(24):
        service.put("data", f"{number:02d}", content(1000 * number, number))
    service.require_token("the-token")
    service.script(Match("get_blob", every=5), [Stall(0.05, 0)], repeat=True)
    credential, whole = CountingTokens(), threading.Lock()
    data = BlobDataset.from_container_url(service.container_url("data"), credential=credential, transfer=QUICK)
    blob = BlobIO(service.blob_url("data", "23"), "rb", credential=credential, transfer=QUICK)

    def read(thread: int) -> None:
        order = [(index * 7 + thread * 3) % 24 for index in range(24)]
        for index in order[:12]:
            assert data[index]["data"] == content(1000 * index, index)
        for at in range(12, 24, 4):
            batch = order[at : at + 4]
            assert [sample["data"] for sample in data.__getitems__(batch)] == [content(1000 * i, i) for i in batch]
        with whole:
            blob.seek(thread * 1000)
            assert blob.read(1000) == content(23_000, 23)[thread * 1000 : (thread + 1) * 1000]

    run_threads(8, read)
    assert credential.asked == 1
    blob.close()
