"""What surrounds a call does not change it: torch's modes and default devices, /dev/shm, a limit of memory."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from torch.utils.data import DataLoader

from azstoragetorch.datapipes import AzureBlobFileLister
from azstoragetorch.datasets import BlobDataset, IterableBlobDataset
from tests.checkpoint.test_surroundings import SURROUNDINGS
from tests.faults import FaultService

ROOT = Path(__file__).parents[1]
CONTENTS = [bytes([number]) * 10_000 for number in range(8)]
SUMS = [10_000 * number for number in range(8)]
READERS = ["open_files_by_azure", "load_files_by_azure", "read_files_by_azure"]


@pytest.fixture
def container_url() -> Iterator[str]:
    with FaultService() as service:
        service.create_container("data")
        for number, content in enumerate(CONTENTS):
            service.put("data", f"x/{number}", content)
        yield service.container_url("data")


def total(blob: Any) -> int:
    return sum(blob.reader().read())


def datasets(url: str) -> list[Any]:
    options: dict[str, Any] = {"prefix": "x/", "credential": False, "transform": total}
    return [
        BlobDataset.from_container_url(url, **options),
        IterableBlobDataset.from_container_url(url, **options),
        IterableBlobDataset.from_container_url(url, **options, shuffle=True, seed=3),
    ]


def samples(dataset: Any) -> Any:
    return (dataset[at] for at in range(len(dataset))) if isinstance(dataset, BlobDataset) else iter(dataset)


def content_of(pipe: Any) -> list[bytes]:
    return [data if isinstance(data, bytes) else data.read() for _, data in pipe]


def pipes(url: str) -> list[Any]:
    return [getattr(AzureBlobFileLister(f"{url}/x/", credential=False), name)(credential=False) for name in READERS]


@pytest.mark.parametrize("name", SURROUNDINGS)
def test_datasets_and_pipes_in_any_surroundings(name: str, container_url: str) -> None:
    with SURROUNDINGS[name]():
        made = datasets(container_url)
        for dataset in made:
            assert sorted(samples(dataset)) == SUMS
        for pipe in pipes(container_url):
            assert content_of(pipe) == CONTENTS
        if "device" not in name:  # torch's DataLoader itself fails with a default device that holds no numbers
            for dataset in made:
                assert sorted(DataLoader(dataset, batch_size=None, num_workers=1)) == SUMS
    # What was made there can be used elsewhere.
    for dataset in made[1:]:
        dataset.set_epoch(1)
        assert sorted(DataLoader(dataset, batch_size=None, num_workers=1)) == SUMS


IN_SHM = """
import sys
import torch
import torch.distributed.checkpoint as dcp
from azstoragetorch.checkpoint import BlobStorageReader, BlobStorageWriter
from tests.test_surroundings import CONTENTS, SUMS, content_of, datasets, pipes, samples

try:
    torch.zeros(10_000).share_memory_()
except RuntimeError:
    pass
else:
    sys.exit("torch can share memory, so this is not what is to be tested")
for dataset in datasets(sys.argv[1]):
    assert sorted(samples(dataset)) == SUMS
    if hasattr(dataset, "set_epoch"):
        dataset.set_epoch(1)
        assert sorted(samples(dataset)) == SUMS
for pipe in pipes(sys.argv[1]):
    assert content_of(pipe) == CONTENTS
saved, found = {"x": torch.randn(100_000), "step": 3}, {"x": torch.zeros(100_000), "step": 0}
url = sys.argv[1] + "/run"
dcp.save(saved, storage_writer=BlobStorageWriter(url, credential=False), no_dist=True)
dcp.load(found, storage_reader=BlobStorageReader(url, credential=False), no_dist=True)
assert torch.equal(found["x"], saved["x"])
assert found["step"] == 3
"""


def run_in(mount: str, program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run *program* in a place with another /dev/shm, which the command *mount* makes."""
    inside = f'{mount} && exec "$0" -c "$@"'
    command = ["unshare", "--mount", "sh", "-c", inside, sys.executable, program, *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)


MOUNTS = {
    "full": "mount -t tmpfs -o size=16k tmpfs /dev/shm && head -c 16384 /dev/zero > /dev/shm/full",
    "read-only": "mount -t tmpfs -o ro tmpfs /dev/shm",
}


@pytest.mark.parametrize("state", MOUNTS)
def test_a_full_or_read_only_dev_shm(state: str, container_url: str) -> None:
    """All but workers of a DataLoader works, which Python itself cannot start there."""
    if shutil.which("unshare") is None or run_in(MOUNTS[state], "").returncode:
        pytest.skip("this user may not mount a file system in a place of its own")
    done = run_in(MOUNTS[state], IN_SHM, container_url)
    assert done.returncode == 0, done.stderr


WITH_LITTLE_MEMORY = """
import resource
import sys
from pathlib import Path
import torch
import torch.distributed.checkpoint as dcp
from azstoragetorch import TransferConfig
from azstoragetorch.checkpoint import BlobStorageReader, BlobStorageWriter
from azstoragetorch.io import BlobIO

MiB = 1 << 20
url = sys.argv[1] + "/run"
transfer = TransferConfig(part_size=64 * MiB, memory_limit=64 * MiB, max_concurrency=1, max_connections=1)
saved = {"x": torch.arange(6 * MiB, dtype=torch.float64)}
dcp.save(saved, storage_writer=BlobStorageWriter(url, credential=False), no_dist=True)


def load():
    # Of another type, so it is staged: 48 MiB at once.
    found = {"x": target}
    reader = BlobStorageReader(url, credential=False, transfer=transfer)
    dcp.load(found, storage_reader=reader, no_dist=True)
    assert torch.equal(found["x"], saved["x"].float())


def read():
    with BlobIO(sys.argv[1] + "/" + sys.argv[2], "rb", credential=False, transfer=transfer) as blob:
        assert len(blob.read()) == 40 * MiB


target = torch.zeros(6 * MiB)
with BlobIO(sys.argv[1] + "/" + sys.argv[2], "wb", credential=False) as blob:
    blob.write(bytes(40 * MiB))
pages = int(Path("/proc/self/statm").read_text().split()[0])
unlimited = resource.getrlimit(resource.RLIMIT_AS)
resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + 20 * MiB, unlimited[1]))
for work, error, text in ((load, dcp.CheckpointException, "no memory for the"), (read, MemoryError, "")):
    try:
        work()
    except error as found:
        assert text in str(found), found
    else:
        sys.exit(f"{work.__name__} had memory enough")
resource.setrlimit(resource.RLIMIT_AS, unlimited)
target = torch.zeros(6 * MiB)
load()  # hangs if the bytes that could not be allocated are still on loan
read()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/statm")
def test_a_limit_of_memory_is_an_error_after_which_everything_works(container_url: str) -> None:
    """As with ``ulimit -v``."""
    command = [sys.executable, "-c", WITH_LITTLE_MEMORY, container_url, "large"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
