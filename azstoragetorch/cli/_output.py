"""The output of a command: results on stdout, progress bars and notes on stderr, or one JSON object per line.

All output passes through here, so that it contains no signature or key, and no control characters from names of blobs.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timezone
from email.utils import parsedate_to_datetime
from typing import Any

import click
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from azstoragetorch._blob.secret import redact
from azstoragetorch._files.paths import printable

SIGN_IN = (
    "Sign in with `az login`, or pass --sas-env NAME with the name of an environment variable that holds a SAS, or set "
    "AZURE_STORAGE_KEY, or pass --anonymous if the container is public."
)
# Replaces advice of the library, which is about Python, by advice about the command line.
_IN_A_SHELL = (
    (re.compile(r"\b[Pp]ass credential=, or a URL with a SAS\.?"), SIGN_IN),
    (re.compile(r"\bcredential=False( for a public container)?"), "--anonymous if the container is public"),
    (re.compile(r"\bcredential=(?!\w)"), "a credential"),
)
_SHOWN = 10  # URLs listed before a question
_BREAK = re.compile(r"\s*[\r\n\t]+\s*")


def in_a_shell(message: str) -> str:
    """The advice in *message* in terms of the command line."""
    for programs, shell in _IN_A_SHELL:
        message = programs.sub(shell, message)
    return message


def one_line(message: str) -> str:
    """*message* with spaces for line breaks and tabs. (Names in it were escaped when it was created.)"""
    return _BREAK.sub(" ", message)


def human(count: float) -> str:
    """*count* bytes in a suitable unit."""
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if count < 1024 or unit == "TiB":
            break
        count /= 1024
    return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"


def date_of(header: str) -> str:
    """``2026-11-27T12:00:00Z`` for the date of an HTTP header; anything else is returned unchanged."""
    try:
        return parsedate_to_datetime(header).astimezone(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")
    except ValueError:
        return printable(header) or "-"


class Bar:
    """A progress bar. Call it, from any thread, with the amount done since the last call."""

    def __init__(self, progress: Progress, task: TaskID) -> None:
        self._progress = progress
        self._task = task
        self.total: int | None = None
        """The total that was set last."""

    def __call__(self, count: int) -> None:
        """Advance by *count*."""
        self._progress.advance(self._task, count)

    def plan(self, total: int) -> None:
        """Set the total."""
        self.total = total
        self._progress.update(self._task, total=total)


class Output:
    """Prints results, notes, and errors of one command."""

    def __init__(self, *, is_json: bool = False, is_quiet: bool = False) -> None:
        self.is_json = is_json
        self.is_quiet = is_quiet
        self._warned: set[str] = set()

    def line(self, text: str) -> None:
        """Print one line of the result, unless ``--json``."""
        if not self.is_json:
            click.echo(printable(redact(text)))

    def record(self, record: Mapping[str, Any]) -> None:
        """Print one line of JSON, only with ``--json``."""
        if self.is_json:
            click.echo(redact(json.dumps(record)))

    def table(self, title: str, columns: list[str], rows: list[list[str]]) -> None:
        """Print *rows* below headings; all columns but the first are numbers."""
        if self.is_json:
            return
        table = Table(title=title or None, title_justify="left", title_style="bold")
        for place, column in enumerate(columns):
            table.add_column(column, justify="right" if place else "left", overflow="fold")
        for row in rows:
            table.add_row(*map(printable, row))
        Console(markup=False, highlight=False, emoji=False).print(table)

    def note(self, text: str) -> None:
        """Print one line on stderr, unless ``--quiet`` or ``--json``."""
        if not self.is_quiet and not self.is_json:
            click.echo(printable(redact(text)), err=True)

    def error(self, message: str, code: int) -> None:
        """Print an error on stderr, always."""
        message = redact(in_a_shell(one_line(message)))
        if self.is_json:
            click.echo(json.dumps({"error": message, "exit_code": code}), err=True)
        else:
            click.echo(f"azstoragetorch: {printable(message)}", err=True)

    def warn(self, message: str) -> None:
        """Print a warning on stderr, always, but only once."""
        message = redact(one_line(message))
        if message in self._warned:
            return
        self._warned.add(message)
        if self.is_json:
            click.echo(json.dumps({"warning": message}), err=True)
        else:
            click.echo(f"azstoragetorch: warning: {printable(message)}", err=True)

    def confirm(self, question: str, places: Sequence[str]) -> None:
        """Ask *question* about *places*, the first of which are printed.

        Raises:
            UsageError: standard input is not a terminal.
            Abort: the user says no.
        """
        if sys.stdin is None or not sys.stdin.isatty():
            raise click.UsageError("deleting needs a confirmation, and standard input is not a terminal: pass --yes")
        for place in places[:_SHOWN]:
            self.note(place)
        if len(places) > _SHOWN:
            self.note(f"... and {len(places) - _SHOWN:,} more; --dry-run lists them all")
        click.confirm(question, abort=True, err=True)

    @contextmanager
    def progress(self, what: str, total: int | None, *, unit: str = "bytes") -> Iterator[Bar]:
        """Show a bar with rate and time left. If *total* is None, `Bar.plan` sets it later."""
        columns: list[ProgressColumn] = [TextColumn("{task.description}", markup=False), BarColumn()]
        if unit == "bytes":
            columns.append(DownloadColumn(binary_units=True))
        else:
            columns += [MofNCompleteColumn(), TextColumn(unit)]
        columns += [_Rate(unit), TimeRemainingColumn()]
        is_off = self.is_quiet or self.is_json or not sys.stderr.isatty()
        console = Console(stderr=True, markup=False, highlight=False, emoji=False)
        with Progress(*columns, console=console, disable=is_off) as bar:
            yield Bar(bar, bar.add_task(what, total=total))


class _Rate(ProgressColumn):
    """The current rate, or the average since the start if the current one is unknown."""

    def __init__(self, unit: str) -> None:
        super().__init__()
        self._unit = unit

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        if not speed and task.elapsed:
            speed = task.completed / task.elapsed
        if not speed:
            return Text("")
        return Text(f"{human(speed)}/s" if self._unit == "bytes" else f"{speed:,.1f}/s")
