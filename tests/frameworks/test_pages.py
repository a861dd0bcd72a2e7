"""The pages whose examples need a framework work as they stand, with it installed."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from tests.azurite.container import Container
from tests.docs.pages import ROOT, frameworks_of, run_page

PAGES = {
    str(path.relative_to(ROOT)): path.read_text(encoding="utf-8") for path in sorted((ROOT / "docs").rglob("*.md"))
}
WITH_FRAMEWORKS = [name for name, text in PAGES.items() if frameworks_of(text)]


def test_there_are_such_pages() -> None:
    assert "docs/integrations/lightning.md" in WITH_FRAMEWORKS


@pytest.mark.frameworks
@pytest.mark.timeout(600)
@pytest.mark.parametrize("page", WITH_FRAMEWORKS)
def test_its_python_runs(page: str, emulator_container: Container, tmp_path: Path) -> None:
    """All of it whose framework is installed, on the emulator, as one program."""
    needed = frameworks_of(PAGES[page])
    present = [name for name in needed if importlib.util.find_spec(name) is not None]
    if not present:
        pytest.skip(f"{', '.join(needed)} not installed; `make frameworks` or `make ray` installs it")
    run_page(PAGES[page], emulator_container, tmp_path, present)
