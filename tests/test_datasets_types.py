"""Type checkers infer what a dataset yields."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
from typing import Any

from torch.utils.data import DataLoader
from typing_extensions import assert_type

from azstoragetorch.datasets import Blob, BlobDataset, BlobSample, IterableBlobDataset


def length(blob: Blob) -> int:
    assert_type(blob.size, int | None)
    return len(blob.reader().read())


url = "https://account.blob.core.windows.net/container"
assert_type(BlobDataset.from_container_url(url), BlobDataset[BlobSample])
assert_type(BlobDataset.from_container_url(url)[0]["data"], bytes)
assert_type(BlobDataset.from_container_url(url, transform=length), BlobDataset[int])
assert_type(BlobDataset.from_blob_urls([url], transform=length)[0], int)
assert_type(IterableBlobDataset.from_container_url(url), IterableBlobDataset[BlobSample])
assert_type(next(iter(IterableBlobDataset.from_blob_urls(url, transform=length, shuffle=True))), int)
assert_type(IterableBlobDataset.from_container_url(url).state_dict(), dict[str, Any])
DataLoader(IterableBlobDataset.from_container_url(url, transform=length))
BlobDataset.from_container_url(url, shuffle=True)  # type: ignore[call-overload]
BlobDataset.from_blob_urls(7)  # type: ignore[call-overload]
"""


@pytest.mark.slow
def test_a_checker_infers_samples_and_finds_misspellings(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    command = [sys.executable, "-m", "mypy", "--strict", "--cache-dir", str(tmp_path / "cache"), str(program)]
    checked = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)
    assert checked.returncode == 0, checked.stdout + checked.stderr
