"""The command line as a shell sees it: arguments, exit code, stdout and stderr."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from azstoragetorch.cli._app import run
from tests.azurite.container import Container
from tests.support import ROOT


@dataclass(frozen=True)
class Ended:
    """The result of a command."""

    code: int
    out: str
    err: str

    @property
    def records(self) -> list[dict[str, Any]]:
        """The output of ``--json``."""
        return [json.loads(line) for line in self.out.splitlines()]


Command = Callable[..., Ended]


def run_command(*arguments: object, timeout: float = 240.0, **environment: str) -> Ended:
    """Run the command line in a separate process, without credentials in its environment."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("AZURE_", "AZSTORAGETORCH_"))}
    ended = subprocess.run(
        [sys.executable, "-m", "azstoragetorch.cli", *map(str, arguments)],
        cwd=ROOT,
        env={**clean, **environment},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    return Ended(ended.returncode, ended.stdout, ended.stderr)


@pytest.fixture(autouse=True)
def state_home(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder for records of unfinished downloads, for this process and its children."""
    home = tmp_path_factory.mktemp("state")
    monkeypatch.setenv("XDG_STATE_HOME", str(home))
    return home


@pytest.fixture
def command(
    container: Container, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Iterator[Command]:
    """Run the command line in this process, with the key of Azurite; check that its output has no secret."""
    key = container.service.account_key
    for name in [name for name in os.environ if name.startswith(("AZURE_", "AZSTORAGETORCH_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AZURE_STORAGE_KEY", key)
    before = signal.getsignal(signal.SIGTERM)

    def run_here(*arguments: object, **environment: str) -> Ended:
        capfd.readouterr()
        with monkeypatch.context() as patch:
            for name, value in environment.items():
                patch.setenv(name, value)
            code = run(list(map(str, arguments)))
        captured = capfd.readouterr()
        assert key not in captured.out + captured.err
        assert "sig=" not in (captured.out + captured.err).replace("sig=[redacted]", "")
        return Ended(code, captured.out, captured.err)

    yield run_here
    signal.signal(signal.SIGTERM, before)
