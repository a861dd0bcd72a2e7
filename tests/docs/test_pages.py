"""Every page has an example, and every example works as it stands."""

from __future__ import annotations

import ast
import re
import shlex
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

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


def marked(page: str) -> Any:
    """Examples of the reference are simple, and run before a release; those of the other pages more often."""
    return pytest.param(page, marks=pytest.mark.exhaustive if page.startswith("reference/") else pytest.mark.slow)


@pytest.mark.timeout(600)
@pytest.mark.parametrize("page", [marked(page) for page in WITH_PYTHON if page not in SIGNED_IN])
def test_its_python_runs(page: str, emulator_container: Container, tmp_path: Path) -> None:
    """On the emulator, by a reader who has no account."""
    run_page(PAGES[page], emulator_container, tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(600)
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
    assert "<!-- not run" not in before
    assert "<!-- needs" not in before
    assert before.count("\n\n") <= 2
    assert "\n## " not in before


@pytest.mark.parametrize("page", PAGES)
def test_it_has_an_example(page: str) -> None:
    assert re.search(r"^ *```(\{doctest\}|python|sh|console)", PAGES[page], re.MULTILINE)


@pytest.mark.parametrize("page", PAGES)
def test_what_is_not_run_has_a_reason(page: str) -> None:
    """A mark belongs to a block; what needs a framework is run by ``make frameworks``."""
    marks = re.findall(r"^<!-- (?:not run|needs).*$", PAGES[page], re.MULTILINE)
    blocks = list(BLOCK.finditer(PAGES[page]))
    reasons = [block["reason"] for block in blocks if block["reason"] is not None]
    assert len(marks) == len(reasons) + sum(block["framework"] is not None for block in blocks)
    assert all(len(reason) > 10 for reason in reasons)


def shell_lines(*, start: str) -> Iterator[list[str]]:
    """The commands that begin with *start* in the pages and the README, as words."""
    for text in [*PAGES.values(), (ROOT / "README.md").read_text(encoding="utf-8")]:
        for block in re.findall(r"^```sh\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
            joined = block.replace("\\\n", " ")
            for line in re.findall(rf"(?:^|\$\(){start} ([^\n)]+)", joined, re.MULTILINE):
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
    packages = ("_engine", "_blob", "_files", "_samples", "_tensors")
    rooms = {path.stem for name in packages for path in (ROOT / "azstoragetorch" / name).glob("*.py")} - {"__init__"}
    tables = PAGES["architecture.md"].partition("## The engine")[2]
    firsts = re.findall(r"^\| ((?:`\w+`(?:, )?)+) \|", tables, re.MULTILINE)
    assert {name for first in firsts for name in re.findall(r"\w+", first)} == rooms


VALUE = "\0"  # in a message: what differs from case to case
# Messages of the service and of Python, and names of errors alone.
OF_OTHERS = re.compile(r"\d{3} \.\.\. \(\w+\)$|\w+Error$|Service(Request|Response)Error: |\.\.\. Name or|Too many open")


def messages() -> set[str]:
    """Every string of the package as a message shows it, with `VALUE` for what is filled in."""
    found = set()
    for path in (ROOT / "azstoragetorch").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                parts = [part.value if isinstance(part, ast.Constant) else VALUE for part in node.values]
                found.add("".join(map(str, parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.add(re.sub(r"%(?:\.\d)?[sdf]", VALUE, node.value))
    return found


def is_raised(quoted: str, message: str) -> bool:
    """Whether *message* reads *quoted*, with any value or further text for each ``...``."""
    parts = [part.strip() for part in re.sub(r"^\w+(Error|Warning): ", "", quoted).split("...")]
    return re.search(".*".join(map(re.escape, filter(None, parts))), message, re.DOTALL) is not None


def test_the_messages_to_look_up_are_those_that_are_raised() -> None:
    """Word for word: what the troubleshooting page quotes stands in one string of the package."""
    page = PAGES["guide/troubleshooting.md"]
    terms = re.findall(r"^(`.+)\n: ", page, re.MULTILINE)
    quotes = [quote for term in terms for quote in re.findall(r"`([^`]{12,})`", term)]
    quotes += [" ".join(quote.split()) for quote in re.findall(r"\*(The [^*]+)\*", page)]  # inside an explanation
    ours = [quote for quote in quotes if not OF_OTHERS.match(quote)]
    assert len(ours) >= 18
    known = messages()
    assert [quote for quote in ours if not any(is_raised(quote, message) for message in known)] == []


def test_every_variable_and_field_of_the_configuration_is_explained() -> None:
    from dataclasses import fields

    from azstoragetorch import TransferConfig

    table = re.findall(r"^\| `(\w+)` \| [^|]+ \|", PAGES["guide/tuning.md"], re.MULTILINE)
    assert table == [field.name for field in fields(TransferConfig)]
