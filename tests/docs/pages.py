"""Run the Python of a page as a reader would: in order, as one program, in a process of its own."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from tests.azurite.container import Container
from tests.docs.identity import signed_in

ROOT = Path(__file__).parents[2]
CONTAINER = "https://<account>.blob.core.windows.net/<container>"

# A line "% not run: why" before a block keeps it from being run.
BLOCK = re.compile(r"(?:^% not run: *(?P<reason>.*)\n\n?)?^ *```python\n(?P<code>.*?)^ *```$", re.MULTILINE | re.DOTALL)


def program_of(page: str) -> str:
    """The Python of *page* that is to run."""
    return "\n".join(block["code"] for block in BLOCK.finditer(page) if block["reason"] is None)


def run_page(page: str, container: Container, folder: Path) -> str:
    """Run *page* against *container*, signed in; returns what it prints. Only names in angle brackets are filled in."""
    program = program_of(page).replace(CONTAINER, container.url).replace("<sas>", container.sas())
    program = program.replace("<account>", container.service.account_name)
    program = program.replace("<key>", container.service.account_key)
    (folder / "page.py").write_text(program, encoding="utf-8")
    with signed_in(folder) as environment:
        # In the page the host is Azure's, which gets tokens whatever names it.
        environment |= {"AZSTORAGETORCH_TRUSTED_HOSTS": "127.0.0.1"}
        environment |= {"PYTHONPATH": str(ROOT), "PATH": f"{folder}{os.pathsep}{os.environ['PATH']}"}
        result = subprocess.run(
            [sys.executable, "-W", "default::ResourceWarning:azstoragetorch", "page.py"],
            cwd=folder,
            env=os.environ | environment,
            capture_output=True,
            text=True,
            timeout=170,
            check=False,
        )
    assert result.returncode == 0, f"{result.stdout[-3000:]}\n{result.stderr[-5000:]}"
    assert "was dropped without close()" not in result.stderr
    return result.stdout
