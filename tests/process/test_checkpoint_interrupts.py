"""Distributed checkpoints: an interrupt, a handler that saves and loads, or a finalizer at every line.

An interrupted save leaves the old or the new checkpoint, complete; an interrupted load leaves no memory on loan. A
checkpoint saved by a handler is right, and so is the save or load that it has interrupted.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.api import CheckpointException

from azstoragetorch._engine.threads import engine_for
from azstoragetorch._tensors import host, pinned, planning, staging
from azstoragetorch.checkpoint import (
    BlobStorageReader,
    BlobStorageWriter,
    _commit,
    _encoding,
    _fence,
    _folder,
    _joint_failure,
    _load,
    _reader,
    _reads,
    _receiving,
    _save,
    _storage,
    _writer,
)
from azstoragetorch.io import BlobIO
from tests.checkpoint.states import load, save
from tests.faults import FaultService
from tests.process.interrupts import Run, collecting, interrupt, sweep
from tests.support import QUICK, content, wait_until

FILES = [_joint_failure, _commit, _encoding, _fence, _folder, _load, _reader, _reads, _receiving, _save, _storage]
FILES += [_writer, host, pinned, planning, staging]
TRANSFER = replace(QUICK, max_connections=7)
_numbers = itertools.count()

pytestmark = [
    pytest.mark.untraced,
    pytest.mark.timeout(900),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),  # for sockets that an interrupt leaves to the collector
]


@pytest.fixture(autouse=True)
def gradients() -> Iterator[None]:
    """Enabled again after an interrupt in `torch.no_grad`, before its block was entered."""
    yield
    torch.set_grad_enabled(True)


@pytest.fixture(autouse=True)
def service(fault_service: FaultService) -> FaultService:
    fault_service.keeps_log = False
    fault_service.create_container("data")
    fault_service.put("data", "read", content(70_000))
    return fault_service


def state(seed: int) -> dict[str, Any]:
    """Tensors that are received in place, cast or copied from strides, and an entry that is not a tensor."""
    tensor = torch.arange(600.0) + seed
    return {"weight": tensor, "half": tensor[:20].half(), "view": tensor.reshape(20, 30).t(), "step": seed}


def blank() -> dict[str, Any]:
    return {
        "weight": torch.zeros(600),
        "half": torch.zeros(20),
        "view": torch.zeros(30, 20),
        "step": 0,
    }


def loaded(reader: BlobStorageReader) -> int:
    """The seed of the checkpoint, which must be one complete state."""
    found = blank()
    load(found, reader)
    seed = int(found["step"])
    for name, value in state(seed).items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(found[name], value.to(found[name].dtype)), name
    return seed


@dataclass
class Job:
    """A folder with a checkpoint of seed 1, and the operations on it."""

    url: str
    writer: BlobStorageWriter
    reader: BlobStorageReader

    @classmethod
    def at(cls, url: str) -> Job:
        job = cls(
            url,
            BlobStorageWriter(url, credential=False, transfer=TRANSFER, blobs_per_rank=2),
            BlobStorageReader(url, credential=False, transfer=TRANSFER),
        )
        save(state(1), job.writer)
        return job

    def save(self) -> int:
        save(state(2), self.writer, checkpoint_id=self.url)
        return 2

    def load(self) -> int:
        return loaded(self.reader)

    def check(self, *expected: int) -> None:
        """One of the checkpoints *expected* exists, and the next one can be saved."""
        wait_until(lambda: engine_for(TRANSFER).budget.in_flight == 0)
        assert loaded(self.reader) in expected
        save(state(3), self.writer, checkpoint_id=self.url)
        assert loaded(self.reader) == 3


@pytest.fixture
def jobs(service: FaultService) -> Callable[[], Job]:
    return lambda: Job.at(f"{service.container_url('data')}/run{next(_numbers)}")


def is_interrupt(error: BaseException | None) -> bool:
    """Whether *error* is the interrupt, or the error that torch raises for one."""
    if isinstance(error, CheckpointException):
        return all(isinstance(wrapped[0], KeyboardInterrupt) for wrapped in error.failures.values())
    return isinstance(error, KeyboardInterrupt)


def test_an_interrupted_save_leaves_the_old_checkpoint_or_the_new_one(jobs: Callable[[], Job]) -> None:
    def check(job: Job, run: Run) -> None:
        assert run.error is None or is_interrupt(run.error), repr(run.error)
        job.check(*((2,) if run.error is None else (1, 2)))

    sweep(jobs, Job.save, check, files=FILES, do=interrupt, turns=1)


def test_an_interrupted_load_leaves_nothing_behind(jobs: Callable[[], Job]) -> None:
    job = jobs()

    def check(job: Job, run: Run) -> None:
        assert run.error is None or is_interrupt(run.error), repr(run.error)
        wait_until(lambda: engine_for(TRANSFER).budget.in_flight == 0)
        assert job.load() == 1

    sweep(lambda: job, Job.load, check, files=FILES, do=interrupt, turns=1)


ACTS: dict[str, tuple[Callable[[Job], int], int]] = {"save": (Job.save, 2), "load": (Job.load, 1)}


@pytest.mark.slow
@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize(
    "is_shared",
    [pytest.param(False, marks=pytest.mark.exhaustive, id="own writer"), pytest.param(True, id="same writer")],
)
def test_a_handler_saves_and_loads_at_every_line(
    service: FaultService, jobs: Callable[[], Job], act: str, is_shared: bool
) -> None:
    """In another folder, with a separate writer or with the interrupted one."""
    now: list[Job] = []
    url = f"{service.container_url('data')}/handler{next(_numbers)}"
    own = Job.at(url)
    seeds = itertools.count(10)

    def set_up() -> Job:
        now[:] = [jobs()]
        return now[0]

    def handle() -> None:
        seed = next(seeds)
        save(state(seed), now[0].writer if is_shared else own.writer, checkpoint_id=url)
        assert loaded(own.reader) == seed
        with BlobIO(service.blob_url("data", "read"), "rb", credential=False, transfer=TRANSFER) as blob:
            assert blob.read() == content(70_000)

    do, expected = ACTS[act]

    def check(job: Job, run: Run) -> None:
        assert run.error is None, repr(run.error)
        assert run.result == expected
        job.check(expected)

    sweep(set_up, do, check, files=FILES, do=handle, turns=1, after_calls=False)


@pytest.mark.slow
@pytest.mark.parametrize("act", ACTS)
def test_finalizers_run_at_every_line(service: FaultService, jobs: Callable[[], Job], act: str) -> None:
    """Readers and writers that were not closed are collected during a save and a load."""
    do, expected = ACTS[act]

    def dropped() -> Iterator[BlobIO]:
        url = service.blob_url("data", "read")
        reader = BlobIO(url, "rb", credential=False, transfer=TRANSFER)
        reader.read(1000)
        return iter([reader])

    def check(job: Job, run: Run) -> None:
        assert run.error is None, repr(run.error)
        job.check(expected)

    sweep(jobs, do, check, files=FILES, do=collecting(dropped), turns=1, after_calls=False)
