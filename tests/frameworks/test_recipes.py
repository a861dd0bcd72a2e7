"""The recipes for other frameworks: each command of the page runs as printed, twice: the second time it resumes."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys

import pytest

from tests.azurite.container import Container
from tests.docs.pages import ROOT
from tests.docs.test_recipes import WITH_FRAMEWORKS

EXPECTED = {
    "lightning": ["0 epochs are in blobs", "2 epochs are in blobs"],
    "litdata": ["1000 samples"],
    "ray": ["1797 images in ", "; the loss went down"],
    "transformers_model": ["both models compute the same"],
    "transformers": ["step 6; in blobs: checkpoint-4, checkpoint-6", "/checkpoint-6\n"],
    "webdataset": ["1000 samples from 10 shards"],
}


@pytest.mark.frameworks
@pytest.mark.timeout(600)
@pytest.mark.parametrize("command", WITH_FRAMEWORKS)
def test_it_runs_as_printed(container: Container, command: str) -> None:
    key = {"AZURE_STORAGE_ACCOUNT": container.service.account_name, "AZURE_STORAGE_KEY": container.service.account_key}
    words = [sys.executable, *shlex.split(command.replace("$url", container.url))[1:]]
    for expected in next(texts for name, texts in EXPECTED.items() if name in command):
        result = subprocess.run(
            words, cwd=ROOT, env=os.environ | key, capture_output=True, text=True, timeout=290, check=False
        )
        assert result.returncode == 0, result.stderr[-3000:]
        assert expected in result.stdout
