"""Without Ray everything else works: nothing imports it, and its module says what to install."""

from __future__ import annotations

import subprocess
import sys

from tests.test_architecture import FRAMEWORKS, ROOT

PROGRAM = """
import importlib, pkgutil, sys
sys.modules["ray"] = None  # as if it were not installed
import azstoragetorch
failed = []
for module in pkgutil.walk_packages(azstoragetorch.__path__, "azstoragetorch.", onerror=lambda name: None):
    if not module.name.endswith("__main__"):
        try:
            importlib.import_module(module.name)
        except ImportError as error:
            failed.append((module.name, str(error)))
missing = {"azstoragetorch." + name for name in sys.argv[1:]}
failed = [(name, text) for name, text in failed if name not in missing]
assert [name for name, _ in failed] == ["azstoragetorch.ray"], failed
assert "azstoragetorch.ray needs Ray Data" in failed[0][1], failed
assert failed[0][1].endswith("pip install 'ray[data]'"), failed
print("done")
"""


def test_everything_else_is_imported_without_it() -> None:
    program = [sys.executable, "-c", PROGRAM, *FRAMEWORKS - {"ray"}]
    result = subprocess.run(program, cwd=ROOT, capture_output=True, text=True, check=False, timeout=100)
    assert result.stdout == "done\n", result.stderr
