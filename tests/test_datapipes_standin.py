"""The pipes on a torch without DataPipes. `tests/without_datapipes` documents what is simulated."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SIMULATION = ROOT / "tests/without_datapipes"
SUITE = ["listing", "ranges", "reading", "resuming", "sharding", "tar", "writing"]

PROGRAM = """
import io, pickle, warnings
from collections import Counter
import torch.utils.data as data

def show(error, make):
    try:
        make()
    except error as raised:
        print(raised)

def even(number):
    return number % 2 == 0

if __name__ == "__main__":
    assert not hasattr(data, "IterDataPipe")
    show(ImportError, lambda: __import__("torch.utils.data.datapipes.iter"))
    import azstoragetorch.datapipes as pipes
    from azstoragetorch.datapipes._base import IterableWrapper, IterDataPipe, StreamWrapper, functional_datapipe
    assert issubclass(pipes.AzureBlobFileLister, data.IterableDataset)

    for shard in ("sharding_filter", "shard_blobs"):
        pipe = getattr(IterableWrapper([f"url/{n}" for n in range(20)]).shuffle(), shard)()
        for options in ({}, {"num_workers": 3}, {"num_workers": 2, "multiprocessing_context": "spawn"}):
            orders = []
            loader = data.DataLoader(pipe, batch_size=None, **options)
            for _ in range(2):
                orders.append(list(loader))
                assert Counter(orders[-1]) == Counter(f"url/{n}" for n in range(20)), (shard, options, orders)
            assert orders[0] != orders[1], (shard, options)
    pipe = IterableWrapper(range(20)).shuffle().sharding_filter()
    loader = data.DataLoader(pipe, None, num_workers=2, persistent_workers=True)
    orders = [list(loader) for _ in range(3)]
    assert all(sorted(order) == list(range(20)) for order in orders)
    assert len(set(map(tuple, orders))) == 3

    chain = IterableWrapper(range(10)).filter(even).map(str).batch(2)
    assert list(chain) == [["0", "2"], ["4", "6"], ["8"]]
    assert len(IterableWrapper(range(10)).batch(4)) == 3
    assert list(pickle.loads(pickle.dumps(chain)).unbatch()) == ["0", "2", "4", "6", "8"]
    IterDataPipe.set_getstate_hook(lambda state: {"hooked": sorted(state)})
    assert pickle.loads(pickle.dumps(chain)).hooked == ["batch_size", "datapipe", "drop_last", "iterations"]
    IterDataPipe.set_getstate_hook(None)
    first = iter(chain)
    next(first), next(iter(chain))
    show(RuntimeError, lambda: next(first))
    show(RuntimeError, lambda: list(IterableWrapper(range(4)).shard_blobs().sharding_filter()))
    show(ValueError, lambda: functional_datapipe("map")(IterableWrapper))

    stream = io.BytesIO(b"data")
    wrapper = StreamWrapper(stream, name="a")
    assert (wrapper.read(), wrapper.name, wrapper.seekable()) == (b"data", "a", True)
    copied = pickle.loads(pickle.dumps(wrapper))
    assert (copied.getvalue(), copied.name) == (b"data", "a")
    del wrapper
    assert stream.closed
"""


def run(*command: str, timeout: float) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(SIMULATION), str(ROOT)])
    return subprocess.run(
        [sys.executable, *command],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


@pytest.mark.timeout(600)
def test_chains_and_a_plain_dataloader_work_without_torchs_pipes(tmp_path: Path) -> None:
    """Each item once with any number of workers, another order in each epoch, pickling, and torch's errors."""
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    done = run(str(program), timeout=580)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "No module named 'torch.utils.data.datapipes'",
        "This iterator has been invalidated: another one was made from Batcher",
        "Sharding twice on one branch: ShardingFilter draws from a pipe that shards, too; keep one of them",
        "Unable to add DataPipe function name map as it is already taken",
    ]


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    "part",
    [
        pytest.param(part, marks=pytest.mark.slow if part in ("listing", "sharding") else pytest.mark.exhaustive)
        for part in SUITE
    ],
)
def test_the_suite_of_the_pipes_passes_without_torchs_pipes(part: str) -> None:
    done = run("-m", "pytest", "-q", "-p", "no:cacheprovider", f"tests/test_datapipes_{part}.py", timeout=880)
    assert done.returncode == 0, done.stdout[-5000:]
