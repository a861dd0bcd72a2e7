"""Every page has an example, and every example works as it stands."""

from __future__ import annotations

import ast
import re
import shlex
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import click
import pytest

from azstoragetorch.cli._app import app
from tests.azurite.container import Container
from tests.docs.pages import BLOCK, ROOT, program_of, run_page, run_page_signed_in

DOCS = ROOT / "docs"
PAGES = {str(path.relative_to(DOCS)): path.read_text(encoding="utf-8") for path in sorted(DOCS.rglob("*.md"))}

WITH_PYTHON = [name for name, text in PAGES.items() if program_of(text)]
SIGNED_IN = {"start/credentials.md", "start/install.md"}  # these show how to sign in to an account
WIDTH = 76  # columns of code that fit on the page; longer lines would have to be scrolled


@pytest.mark.slow
@pytest.mark.timeout(180)
@pytest.mark.parametrize("page", [page for page in WITH_PYTHON if page not in SIGNED_IN])
def test_its_python_runs(page: str, emulator_container: Container, tmp_path: Path) -> None:
    """On the emulator, by a reader who has no account."""
    run_page(PAGES[page], emulator_container, tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(180)
@pytest.mark.parametrize("page", sorted(SIGNED_IN))
def test_its_python_runs_signed_in(page: str, https_container: Container, tmp_path: Path) -> None:
    run_page_signed_in(PAGES[page], https_container, tmp_path)


@pytest.mark.parametrize("page", [*PAGES, "../README.md"])
def test_its_code_does_not_scroll(page: str) -> None:
    text = (DOCS / page).read_text(encoding="utf-8")
    blocks = re.findall(r"^```(?:python|sh|\{doctest\}|\{code-block\} \w+)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    assert [line for block in blocks for line in block.splitlines() if len(line) > WIDTH] == []


GUIDES = [page for page in WITH_PYTHON if page.startswith(("guide/", "coming-from/"))]


@pytest.mark.parametrize("page", GUIDES)
def test_a_guide_begins_with_code_that_runs(page: str) -> None:
    """After its title and one paragraph."""
    text = PAGES[page]
    before = text[: text.index("```python\n")]
    assert "% not run" not in before
    assert before.count("\n\n") <= 2
    assert "\n## " not in before


@pytest.mark.parametrize("page", PAGES)
def test_it_has_an_example(page: str) -> None:
    assert re.search(r"^ *```(\{doctest\}|python|sh|console)", PAGES[page], re.MULTILINE)


@pytest.mark.parametrize("page", PAGES)
def test_what_is_not_run_has_a_reason(page: str) -> None:
    marks = re.findall(r"^% not run.*$", PAGES[page], re.MULTILINE)
    reasons = [block["reason"] for block in BLOCK.finditer(PAGES[page]) if block["reason"] is not None]
    assert len(marks) == len(reasons)
    assert all(len(reason) > 10 for reason in reasons)


def shell_lines(*, start: str) -> Iterator[list[str]]:
    """The commands that begin with *start* in the pages and the README, as words."""
    for text in [*PAGES.values(), (ROOT / "README.md").read_text(encoding="utf-8")]:
        for block in re.findall(r"^```sh\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
            for line in re.findall(rf"(?:^|\$\(){start} ([^\n)]+)", block, re.MULTILINE):
                yield shlex.split(line.partition(" > ")[0], comments=True)


def test_the_commands_that_are_shown_are_understood() -> None:
    """Each names a command and options that there are, with what they need."""
    seen = set()
    for words in shell_lines(start="azstoragetorch"):
        arguments = [
            re.sub(r"\$[a-z]+", "https://name.blob.core.windows.net/c/r", re.sub(r"<\w+>", "name", word))
            for word in words
        ]
        command: click.Command | None = app
        while isinstance(command, click.Group) and not arguments[0].startswith("-"):
            command = command.get_command(click.Context(command), arguments.pop(0))
        assert command is not None, words
        seen.add(command.name)
        with suppress(click.exceptions.Exit):  # --help
            command.make_context(command.name, arguments)
    assert {"doctor", "ls", "cp", "verify", "prune", "bench", "completion"} <= seen


def test_the_make_targets_that_are_shown_exist() -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    named = {words[0] for words in shell_lines(start="make")}
    assert {"setup", "check", "docs", "demo", "test"} <= named <= targets


def test_the_architecture_page_shows_every_room() -> None:
    """Each module below the faces has a row in the table of its package, alone or with its neighbors."""
    packages = ("_engine", "_blob", "_files", "_samples")
    rooms = {path.stem for name in packages for path in (ROOT / "azstoragetorch" / name).glob("*.py")} - {"__init__"}
    firsts = re.findall(r"^\| ((?:`\w+`(?:, )?)+) \|", PAGES["architecture.md"], re.MULTILINE)
    assert {name for first in firsts for name in re.findall(r"\w+", first)} == rooms


def own_texts() -> set[str]:
    """The constant parts of all texts in the package."""
    found = set()
    for path in (ROOT / "azstoragetorch").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.add(node.value)
    return found


def test_the_messages_to_look_up_are_those_that_are_raised() -> None:
    """What the troubleshooting page quotes as ours shares a part, of some length, with a text of the package."""
    quoted = re.findall(r"^`(.+?)`.*\n: ", PAGES["guide/troubleshooting.md"], re.MULTILINE)
    of_others = re.compile(
        r"\d{3} |DefaultAzureCredential failed|Service(Request|Response)Error: |Too many open|\w+(Error)?$"
    )
    texts = {text.strip() for text in own_texts() if len(text.strip()) >= 9}
    ours = [message for message in quoted if not of_others.match(message)]
    assert len(ours) >= 10

    def is_known(message: str) -> bool:
        parts = [part.strip() for part in re.sub(r"^\w+: ", "", message).split("...") if len(part.strip()) >= 15]
        return any(text in message or any(part in text for part in parts) for text in texts)

    assert [message for message in ours if not is_known(message)] == []


def test_every_variable_and_field_of_the_configuration_is_explained() -> None:
    from dataclasses import fields

    from azstoragetorch import TransferConfig

    table = re.findall(r"^\| `(\w+)` \| [^|]+ \|", PAGES["guide/tuning.md"], re.MULTILINE)
    assert table == [field.name for field in fields(TransferConfig)]
