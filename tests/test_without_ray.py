"""Without Ray and pyarrow everything else works, and the modules that need them say what to install."""

from __future__ import annotations

import sys

import pytest

from tests.support import run_python


def test_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)  # as if it were not installed
    monkeypatch.delitem(sys.modules, "azstoragetorch.ray", raising=False)
    with pytest.raises(ImportError, match=r"azstoragetorch\.ray needs Ray Data .*: pip install 'ray\[data\]'$"):
        import azstoragetorch.ray  # noqa: F401


def test_everything_else_is_imported_without_them() -> None:
    """All modules but those of Ray and of other frameworks, in a process in which neither can be imported."""
    program = """
import importlib, pkgutil, sys
sys.modules.update({"ray": None, "pyarrow": None})
import azstoragetorch
others = {"lightning", "litdata", "ray", "torch_checkpointing", "transformers", "webdataset"}
names = []
for module in pkgutil.walk_packages(azstoragetorch.__path__, "azstoragetorch.", onerror=lambda name: None):
    if module.name.split(".")[1] not in others and not module.name.endswith(("__main__", "._samples.parquet")):
        importlib.import_module(module.name)
        names.append(module.name)
try:
    import azstoragetorch._samples.parquet
except ImportError as error:
    print(len(names), error)
"""
    count, _, message = run_python(program).partition(" ")
    assert int(count) > 100
    assert "pip install pyarrow" in message
