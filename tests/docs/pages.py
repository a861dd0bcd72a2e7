"""Run the Python of a page as a reader would: in order, as one program, in a process of its own."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from tests.azurite.container import Container
from tests.docs.identity import signed_in

ROOT = Path(__file__).parents[2]
CONTAINER = "https://<account>.blob.core.windows.net/<container>"
EMULATOR = "http://127.0.0.1:10000/devstoreaccount1/scratch"

# A comment before a block says that it is not run, and why, or that it is run only where a framework is installed:
# "<!-- not run: REASON -->", "<!-- needs: FRAMEWORK -->".
MARK = r"<!-- (?:not run: *(?P<reason>[^\n]*)|needs: *(?P<framework>[^\n]*)) -->"
BLOCK = re.compile(rf"(?:^{MARK}\n\n?)?^ *```python\n(?P<code>.*?)^ *```$", re.MULTILINE | re.DOTALL)


def program_of(page: str, frameworks: Sequence[str] = ()) -> str:
    """The Python of *page* that is run, with the blocks that need one of *frameworks*."""
    blocks = [block for block in BLOCK.finditer(page) if block["reason"] is None]
    return "\n".join(block["code"] for block in blocks if block["framework"] in (None, *frameworks))


def frameworks_of(page: str) -> list[str]:
    """The frameworks that blocks of *page* need."""
    return sorted({block["framework"] for block in BLOCK.finditer(page) if block["framework"] is not None})


def run_page(page: str, container: Container, folder: Path, frameworks: Sequence[str] = ()) -> str:
    """Run *page* against *container* of the emulator, without a credential; returns what it prints."""
    return _run(page, container, folder, {}, frameworks)


def run_page_signed_in(page: str, container: Container, folder: Path) -> str:
    """Run *page* against *container*, which stands for one of Azure's, signed in; returns what it prints."""
    with signed_in(folder) as environment:
        # In the page the host is Azure's, which gets tokens whatever names it.
        return _run(page, container, folder, {**environment, "AZSTORAGETORCH_TRUSTED_HOSTS": "127.0.0.1"})


def _run(
    page: str,
    container: Container,
    folder: Path,
    environment: Mapping[str, str],
    frameworks: Sequence[str] = (),
) -> str:
    """Only the emulator's address and names in angle brackets are filled in."""
    program = program_of(page, frameworks).replace(CONTAINER, container.url).replace(EMULATOR, container.url)
    program = program.replace("<sas>", container.sas()).replace("<account>", container.service.account_name)
    program = program.replace("<key>", container.service.account_key)
    (folder / "page.py").write_text(program, encoding="utf-8")
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("AZURE_", "AZSTORAGETORCH_"))}
    result = subprocess.run(
        [sys.executable, "-W", "default::ResourceWarning:azstoragetorch", "page.py"],
        cwd=folder,
        env={**clean, "PYTHONPATH": str(ROOT), "PATH": f"{folder}{os.pathsep}{os.environ['PATH']}", **environment},
        capture_output=True,
        text=True,
        timeout=570,
        check=False,
    )
    assert result.returncode == 0, f"{result.stdout[-3000:]}\n{result.stderr[-5000:]}"
    assert "was dropped without close()" not in result.stderr
    return result.stdout
