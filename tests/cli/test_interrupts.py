"""A download or upload that is interrupted at any line: no incomplete file or blob, and no unused leftovers."""

from __future__ import annotations

import itertools
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest

from azstoragetorch._blob.client import BlobClient
from azstoragetorch._engine.scope import Scope
from azstoragetorch._files import partial, paths, record, transfer
from azstoragetorch._files.transfer import Hooks, get_file, put_file
from tests.faults.service import FaultService
from tests.process.interrupts import Run, interrupt, sweep
from tests.support import KiB, blob_client, content

# After an interrupt between opening a file and storing it, the garbage collector closes the file.
pytestmark = pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")
FILES = [partial, paths, record, transfer]
SIZE = 300 * KiB
OLD = b"the old content"


@dataclass
class Copy:
    """One blob and one file."""

    blob: BlobClient
    path: Path


def hooks() -> Hooks:
    return Hooks(Scope(), lambda _count: None)


@pytest.mark.timeout(600)
@pytest.mark.parametrize("is_handler", [False, True], ids=["interrupt", "handler"])
def test_a_download(fault_service: FaultService, tmp_path: Path, is_handler: bool) -> None:
    """The file is the old or the new one, the budget is free, and the next download ends with exactly the bytes.

    A signal handler can itself download, at any line.
    """
    fault_service.allow_anonymous()
    fault_service.put("c", "b", content(SIZE))
    numbers = itertools.count()

    def set_up() -> Copy:
        path = tmp_path / str(next(numbers)) / "file"
        path.parent.mkdir()
        path.write_bytes(OLD)
        return Copy(blob_client(fault_service.blob_url("c", "b")), path)

    def check(copy: Copy, run: Run) -> None:
        assert run.error is None or isinstance(run.error, KeyboardInterrupt), run.error
        assert copy.path.read_bytes() in (OLD, content(SIZE))
        assert copy.blob.engine.budget.in_flight == 0
        get_file(copy.blob, copy.path, hooks())
        assert copy.path.read_bytes() == content(SIZE)
        assert [path.name for path in copy.path.parent.iterdir()] == ["file"]
        shutil.rmtree(copy.path.parent)

    def download_another() -> None:
        blob, path = blob_client(fault_service.blob_url("c", "b")), tmp_path / "another" / str(next(numbers))
        get_file(blob, path, hooks())
        assert path.read_bytes() == content(SIZE)

    do = download_another if is_handler else interrupt
    sweep(set_up, lambda copy: get_file(copy.blob, copy.path, hooks()), check, files=FILES, do=do, turns=1)


@pytest.mark.timeout(600)
def test_an_upload(fault_service: FaultService, tmp_path: Path) -> None:
    """The blob is the old or the new one, the budget is free, and the next upload ends with exactly the bytes."""
    fault_service.allow_anonymous()
    (tmp_path / "file").write_bytes(content(SIZE))

    def set_up() -> Copy:
        fault_service.put("c", "b", OLD)
        return Copy(blob_client(fault_service.blob_url("c", "b")), tmp_path / "file")

    def check(copy: Copy, run: Run) -> None:
        assert run.error is None or isinstance(run.error, KeyboardInterrupt), run.error
        blob = fault_service.store.find("c", "b")
        assert blob is not None
        assert blob.data in (OLD, content(SIZE))
        assert copy.blob.engine.budget.in_flight == 0
        put_file(copy.path, copy.blob, None, hooks())

    sweep(set_up, lambda copy: put_file(copy.path, copy.blob, None, hooks()), check, files=FILES, do=interrupt, turns=1)
