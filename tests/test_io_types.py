"""A program that uses the package passes strict type checking."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import ROOT

PROGRAM = """
import csv
import io
from typing import IO, BinaryIO

import torch

from azstoragetorch.io import BlobIO


def save(url: str, state: dict[str, torch.Tensor]) -> None:
    with BlobIO(url, "wb") as blob:
        torch.save(state, blob)
    with BlobIO(url, "rb") as blob:
        print(torch.load(blob, weights_only=True))
    with io.TextIOWrapper(BlobIO(url, "rb")) as table:
        print(list(csv.reader(table)))


def name_of(file: IO[bytes]) -> str:
    return file.name


def opened(url: str) -> BinaryIO:
    return BlobIO(url, "rb")


blob: BlobIO = BlobIO("https://account.blob.core.windows.net/c/b", "rb")
size: int = blob.size
data: bytes = blob.read(size)
print(name_of(blob), data, opened(blob.name))
"""


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    "checker",
    [["mypy", "--strict", "--cache-dir=.cache"], ["basedpyright", "--level=error", f"--pythonpath={sys.executable}"]],
    ids=lambda c: c[0],
)
def test_a_file_of_bytes_is_what_torch_and_others_take(tmp_path: Path, checker: list[str]) -> None:
    """`torch.save` and `torch.load` take an ``IO[bytes]``."""
    (tmp_path / "program.py").write_text(PROGRAM)
    result = subprocess.run(
        [sys.executable, "-m", *checker, "program.py"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "MYPYPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=800,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
