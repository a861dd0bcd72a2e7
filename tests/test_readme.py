"""What the README shows works as it stands."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.azurite.container import Container
from tests.docs.pages import program_of, run_page

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_its_python_runs(https_container: Container, tmp_path: Path) -> None:
    """All blocks in order, as one program, as somebody who is signed in and has a container."""
    printed = run_page(README, https_container, tmp_path)
    assert printed.splitlines() == ["there is a model already", "b'cat.png,0\\n'", "step 1"]
    assert https_container.get("model.pt")


def test_its_first_example_stands_at_the_top() -> None:
    first = program_of(README[: README.index("## Quick start")])
    assert first.startswith("import torch\nfrom azstoragetorch.io import BlobIO\n")


@pytest.mark.parametrize("document", ["README.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md"])
def test_its_links_lead_somewhere(document: str) -> None:
    text = (ROOT / document).read_text(encoding="utf-8")
    targets = re.findall(r"\]\(([^)#]+)", text)
    assert [to for to in targets if "://" not in to and not (ROOT / to).exists()] == []


def test_the_make_targets_it_names_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    named = set(re.findall(r"^make ([a-z-]+)$", README, re.MULTILINE))
    assert {"demo", "test"} <= named <= set(re.findall(r"^([a-z-]+):", makefile, re.MULTILINE))
