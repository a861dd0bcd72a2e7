"""The README works as printed."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.azurite.container import Container
from tests.docs.pages import EMULATOR, program_of, run_page, run_page_signed_in

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
PRINTED = ["the model exists already", "b'cat.png,0\\n'", "step 1"]


def test_its_python_runs_without_an_account(emulator_container: Container, tmp_path: Path) -> None:
    """All blocks in order, as one program, on the emulator that its command starts."""
    assert run_page(README, emulator_container, tmp_path).splitlines() == PRINTED
    assert emulator_container.get("model.pt")


def test_its_python_runs_on_an_account(https_container: Container, tmp_path: Path) -> None:
    """After changing the one line, and signed in."""
    assert run_page_signed_in(README, https_container, tmp_path).splitlines() == PRINTED
    assert https_container.get("model.pt")


def test_its_first_example_needs_no_account() -> None:
    first = program_of(README[: README.index("## Install")])
    assert first.startswith("import torch\nfrom azstoragetorch.io import BlobIO\n")
    assert f'container = "{EMULATOR}"' in first
    assert "credential" not in first


def test_it_names_no_package_that_is_another_one() -> None:
    """Of the same name, the registry has another implementation: only the warning says how to install that one."""
    lines = [line for line in README.splitlines() if re.search(r"pip install \S*azstoragetorch", line)]
    assert len(lines) == 1
    assert "installs a different package" in lines[0]
    for path in [*(ROOT / "azstoragetorch").rglob("*.py"), *(ROOT / "docs").rglob("*.md")]:
        assert not re.search(r"pip install \S*azstoragetorch\[", path.read_text(encoding="utf-8")), path


@pytest.mark.parametrize("document", ["README.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md"])
def test_its_links_lead_somewhere(document: str) -> None:
    text = (ROOT / document).read_text(encoding="utf-8")
    targets = re.findall(r"\]\(([^)#]+)", text)
    assert [to for to in targets if "://" not in to and not (ROOT / to).exists()] == []


def test_its_links_lead_to_pages_that_need_no_builder() -> None:
    """A code host shows Markdown alone; a page of grids and lists of contents would show as their source."""
    for target in re.findall(r"\]\((docs/[^)#]+\.md)", README):
        text = (ROOT / target).read_text(encoding="utf-8")
        assert not re.search(r"^:::|^% |\{(?:py:\w+|grid|toctree|note|warning)\}", text, re.MULTILINE), target


def test_the_make_targets_it_names_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    named = set(re.findall(r"^make ([a-z-]+)$", README, re.MULTILINE))
    assert {"demo", "test"} <= named <= set(re.findall(r"^([a-z-]+):", makefile, re.MULTILINE))
