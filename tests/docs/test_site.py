"""The built site: no warnings, no dead links, every public name in the reference. `make docs` runs the doctests."""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from sphinx.util.inventory import InventoryFile

from tests.test_architecture import FRAMEWORKS, MODULES
from tests.test_architecture import PUBLIC as NAMES

ROOT = Path(__file__).parents[2]
PUBLIC = [MODULES[name].dotted for name in NAMES]
IMPORTABLE = [MODULES[name].dotted for name in NAMES if name not in FRAMEWORKS]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if "SITE" in os.environ:  # `make docs` has built it
        return Path(os.environ["SITE"])
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-b", "html", "docs", str(folder)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=580, check=False)
    assert result.returncode == 0, result.stderr
    return folder


def load_links() -> ModuleType:
    spec = importlib.util.spec_from_file_location("links", ROOT / "docs/links.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.site
@pytest.mark.timeout(600)
def test_its_links_lead_somewhere(site: Path) -> None:
    assert load_links().dead_links(site) == []


def test_a_dead_link_is_seen(tmp_path: Path) -> None:
    (tmp_path / "a.html").write_text(
        '<p id="here"><a href="#here"><a href="b.html#there"><a href="https://x.example/">'
    )
    (tmp_path / "b.html").write_text('<img src="missing.png"><a href="a.html">')
    assert load_links().dead_links(tmp_path) == ["a.html: b.html#there", "b.html: missing.png"]


@pytest.mark.site
@pytest.mark.timeout(600)
@pytest.mark.parametrize("module", PUBLIC)
def test_every_public_name_is_in_the_reference(site: Path, module: str) -> None:
    """Under its own module, or under another public one that hands out the same object."""
    inventory = InventoryFile.loads((site / "objects.inv").read_bytes(), uri="")
    documented = {name for kind in inventory.data if kind.startswith("py:") for name in inventory.data[kind]}
    if module not in IMPORTABLE:  # because its framework is not installed here
        source = MODULES[module.partition(".")[2]].source
        quoted = source.partition("__all__ = [")[2].partition("]")[0]
        assert {f"{module}.{name}" for name in re.findall(r'"(\w+)"', quoted)} <= documented
        assert quoted
        return
    names = importlib.import_module(module).__all__
    assert names
    missing = []
    for name in names:
        value = getattr(importlib.import_module(module), name)
        twins = [other for other in IMPORTABLE if getattr(importlib.import_module(other), name, None) is value]
        if not any(f"{other}.{name}" in documented for other in twins):
            missing.append(name)
    assert missing == []


@pytest.mark.site
@pytest.mark.timeout(600)
def test_signatures_of_datasets_are_those_that_users_call(site: Path) -> None:
    """The reference shows all arguments of the methods that create a dataset, and no private constructor."""
    page = re.sub("<[^>]+>", "", (site / "reference/datasets.html").read_text(encoding="utf-8"))
    assert "even" in page
    assert [word for word in ("contents:", "placement:", "**options", "BlobClient") if word in page] == []
