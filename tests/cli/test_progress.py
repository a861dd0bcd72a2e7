"""On a terminal every long action shows its progress, its rate, and the time left."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from tests.azurite.container import Container
from tests.support import ROOT, content

pty = pytest.importorskip("pty")

DRIVER = """
import json, sys
from azstoragetorch.cli._app import run
for arguments in json.loads(sys.argv[1]):
    assert run(arguments) == 0, arguments
"""


def on_terminal(container: Container, *commands: list[str], answer: str = "", fails: bool = False) -> str:
    """Run *commands* with a terminal as their stderr, on which *answer* is typed; returns what it shows.

    What moves the cursor is left out.
    """
    ours, theirs = pty.openpty()
    shown: list[bytes] = []

    def collect() -> None:
        try:
            while data := os.read(ours, 65536):
                shown.append(data)
        except OSError:
            pass  # the other end is closed

    reader = threading.Thread(target=collect)
    environment = {**os.environ, "AZURE_STORAGE_KEY": container.service.account_key, "TERM": "xterm", "COLUMNS": "120"}
    process = subprocess.Popen(
        [sys.executable, "-c", DRIVER, json.dumps(commands)],
        cwd=ROOT,
        env=environment,
        stdin=theirs if answer else subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=theirs,
    )
    os.close(theirs)
    os.write(ours, answer.encode())
    reader.start()
    process.wait(timeout=500)
    reader.join()
    os.close(ours)
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", b"".join(shown).decode())
    assert (process.returncode != 0) is fails, text
    return text


def is_shown(what: str, text: str) -> bool:
    """Whether a progress bar ended with an amount, a rate and a time left."""
    return re.search(rf"{what} .* \d[\d.,]*/\d.* \d[\d.,]* ?\w*/s +0:00:00", text) is not None


@pytest.mark.timeout(600)
def test_long_actions_show_amount_rate_and_time_left(container: Container, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for number in range(3):
        (source / f"{number}.bin").write_bytes(content(1 << 20))
    torch.save({"weight": torch.ones(1 << 18)}, tmp_path / "state.pt")
    url = container.url
    key = container.service.account_key
    text = on_terminal(
        container,
        ["cp", "-r", str(source), f"{url}/copies"],
        ["cp", "-r", f"{url}/copies", str(tmp_path / "back")],
        ["cp", str(tmp_path / "state.pt"), f"{url}/state.pt"],
        ["checkpoint", "import", f"{url}/state.pt", f"{url}/run/step-1"],
        ["checkpoint", "import", str(tmp_path / "state.pt"), f"{url}/run/step-2"],
        ["checkpoint", "verify", f"{url}/run/step-1"],
        ["checkpoint", "export", f"{url}/run/step-1", str(tmp_path / "exported.pt")],
        ["checkpoint", "prune", f"{url}/run", "--keep", "1", "--yes"],
        ["doctor", f"{url}", "--size", "8", "--rounds", "1", "--seconds", "0.01"],
        ["bench", f"{url}", "--size", "1", "--count", "5", "--rounds", "1"],
    )
    assert key not in text
    for what in ("copying", "reading", "writing", "verifying", "deleting", "measuring"):
        assert is_shown(what, text), (what, text)
    assert re.search(r"listing .* 3/\?", text)
    assert torch.equal(torch.load(tmp_path / "exported.pt")["weight"], torch.ones(1 << 18))


@pytest.mark.timeout(600)
def test_a_deletion_shows_what_would_go_and_asks(container: Container) -> None:
    names = [f"run/step-{number:02}/.metadata" for number in range(13)]
    for name in names:
        container.put(name, b"x")
    for command in (
        ["rm", "-r", f"{container.url}/run"],
        ["checkpoint", "prune", f"{container.url}/run", "--keep", "1"],
    ):
        text = on_terminal(container, command, answer="n\n", fails=True)
        assert "step-09" in text
        assert "step-10" not in text
        assert f"... and {3 if command[0] == 'rm' else 2} more; --dry-run lists them all" in text
        assert "? [y/N]" in text
        assert container.names() == names
    text = on_terminal(container, ["rm", "-r", f"{container.url}/run"], answer="y\n")
    assert "Permanently delete 13 blobs (13 B)?" in text
    assert container.names() == []
