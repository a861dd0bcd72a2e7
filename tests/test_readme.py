"""What the README shows works as it stands."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from tests.azurite.container import Container

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_its_python_runs(container: Container, capsys: pytest.CaptureFixture[str]) -> None:
    """All blocks in order, as one program, with a real container in the URLs."""
    blocks = re.findall(r"^```python\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
    assert len(blocks) >= 3
    program = re.sub(
        r'"https://<account>\.blob\.core\.windows\.net/<container>/([^"]*)"',
        lambda url: repr(container.blob_sas_url(url[1])),
        "\n".join(blocks),
    )
    names: dict[str, Any] = {}
    exec(compile(program, "README.md", "exec"), names)
    assert capsys.readouterr().out == "there is a model already\nb'cat.png,0\\n'\n"
    assert container.names() == ["labels.csv", "log.gz", "model.pt"]


@pytest.mark.parametrize("document", ["README.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md"])
def test_its_links_lead_somewhere(document: str) -> None:
    text = (ROOT / document).read_text(encoding="utf-8")
    targets = re.findall(r"\]\(([^)#]+)", text)
    assert [to for to in targets if "://" not in to and not (ROOT / to).exists()] == []


def test_the_make_targets_it_names_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    named = set(re.findall(r"^make ([a-z-]+)$", README, re.MULTILINE))
    assert {"demo", "test"} <= named <= set(re.findall(r"^([a-z-]+):", makefile, re.MULTILINE))
