"""The emulator as a user starts it, with the command, which finds an installed Azurite on the PATH."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from recipes.azurite import Azurite, find_azurite, find_node

ROOT = Path(__file__).parents[2]
# As Microsoft publishes it: https://learn.microsoft.com/azure/storage/common/storage-connect-azurite
PUBLISHED_KEY = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="


@contextmanager
def run_emulator(
    folder: Path, *, container: str = "scratch", end_with: signal.Signals = signal.SIGTERM
) -> Iterator[Azurite]:
    """Run ``azstoragetorch azurite`` on a free port, and end it by *end_with*; *folder* gets Azurite's command."""
    program = folder / "azurite-blob"
    program.write_text(f'#!/bin/sh\nexec "{find_node()}" "{find_azurite()}" "$@"\n')
    program.chmod(0o755)
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("AZURE_", "AZSTORAGE"))}
    environment |= {"PATH": f"{folder}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    # Variables in the environment of the caller that Azurite must not use.
    environment |= {"AZURITE_ACCOUNTS": "another:a2V5"}
    process = subprocess.Popen(
        [sys.executable, "-m", "azstoragetorch", "azurite", "--port", "0", "--container", container],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        assert process.stdout is not None
        said = ""
        while (found := re.search(r'^container = "(http://\S+)/\w+"$', said, re.MULTILINE)) is None:
            line = process.stdout.readline()
            assert line, f"the command ended: {said}"
            said += line
        yield Azurite(found[1], found[1].rpartition("/")[2], PUBLISHED_KEY, None, process.pid)
    finally:
        process.send_signal(end_with)
        process.communicate()
