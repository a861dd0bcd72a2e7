"""The landing page leads to every task and guide, and the tables of settings are complete."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path

import pytest

from azstoragetorch import TransferConfig
from tests.docs.pages import ROOT

DOCS = ROOT / "docs"
PAGES = {path.relative_to(DOCS).as_posix(): path.read_text(encoding="utf-8") for path in sorted(DOCS.rglob("*.md"))}


def test_each_task_is_one_click_from_the_landing_page() -> None:
    """At least 15 tasks, each with a link from the landing page and a code block."""
    sections = re.split(r"^## (.+)$", PAGES["tasks.md"], flags=re.MULTILINE)[1:]
    tasks = dict(zip(sections[::2], sections[1::2], strict=True))
    assert len(tasks) >= 15
    anchors = {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in tasks}
    assert anchors == set(re.findall(r"\(tasks\.md#([\w-]+)\)", PAGES["index.md"]))
    assert [title for title, text in tasks.items() if not re.search(r"^```(python|sh)$", text, re.MULTILINE)] == []


def test_the_landing_page_is_plain_markdown() -> None:
    """It is read on a code host, too, which knows neither directives nor roles; it leads to every guide."""
    assert re.findall(r"\{[\w:]+\}`|^[`:]{3,}\{.*", PAGES["index.md"], re.MULTILINE) == []
    linked = set(re.findall(r"\]\(([\w/-]+\.md)", PAGES["index.md"]))
    assert linked <= set(PAGES)
    parts = ("guide/", "integrations/", "start/", "coming-from/")
    assert {name for name in PAGES if name.startswith(parts)} <= linked


def test_every_variable_and_extra_is_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AZSTORAGETORCH_HEDGE_AFTER", raising=False)
    page = PAGES["reference/environment.md"]
    rows = dict(re.findall(r"^\| `AZSTORAGETORCH_(\w+)` \| ([\w.]+) \|", page, re.MULTILINE))
    defaults = {field.name: getattr(TransferConfig(), field.name) for field in fields(TransferConfig)}
    assert defaults.pop("trusted_hosts") == ()  # which stands with access
    assert "| `AZSTORAGETORCH_TRUSTED_HOSTS` |" in page
    assert rows == {name.upper(): str(value).lower() for name, value in defaults.items()}
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    table = re.split(r"^\[", project.partition("[project.optional-dependencies]")[2], flags=re.MULTILINE)[0]
    extras = re.findall(r"^\| `([\w-]+)` \|", page[page.index("## Extras") :], re.MULTILINE)
    assert extras == re.findall(r"^([\w-]+) = ", table, re.MULTILINE)
    source = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "azstoragetorch").rglob("*.py"))
    read = set(re.findall(r"""["'](AZURE_STORAGE_\w+|\w+_CA_BUNDLE|SSL_CERT_\w+|XDG_\w+|LOCALAPPDATA)["']""", source))
    read |= set(re.findall(r"""environ\.get\(["'](\w+)["']""", source))
    assert {name for name in read - {"PATH"} if f"`{name}`" not in page} == set()


@pytest.mark.parametrize("chart", sorted((DOCS / "performance").glob("*.svg")), ids=lambda path: path.stem)
def test_a_chart_follows_the_theme(chart: Path) -> None:
    """Its colors are variables with a light and a dark value, and its background is transparent."""
    style, rest = re.split(r"</style>\s+<defs>", chart.read_text(encoding="utf-8"), maxsplit=1)
    assert "@media (prefers-color-scheme: dark)" in style
    assert re.findall(r"(?:fill|stroke): #\w+", rest) == []
    assert set(re.findall(r"var\((--\w+)\)", rest)) <= set(re.findall(r"(--\w+): #", style))
