"""List a local folder: the files to copy, and everything that cannot be copied, with the reason."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from azstoragetorch._files.paths import PARTIAL_PREFIX, display

Links = Literal["files", "all", "none"]
"""Which links are followed: links to files; links to files and folders; or none, which leaves out all links."""


@dataclass(frozen=True, slots=True)
class Entry:
    """A file to copy or, with a *problem*, something that cannot be copied."""

    path: Path
    name: str
    """Relative to the folder, with slashes."""
    status: os.stat_result | None = None
    problem: str = ""
    is_left_out: bool = False
    """Left out on request, or because it is an unfinished download; not a problem."""


def walk(folder: Path, links: Links) -> Iterator[Entry]:
    """Everything below *folder*, sorted by name.

    Raises:
        OSError: *folder* itself cannot be read.
    """
    yield from _walk(folder, "", links, [_identity(folder.stat())])


def _walk(folder: Path, prefix: str, links: Links, above: list[tuple[int, int]]) -> Iterator[Entry]:
    with os.scandir(folder) as found:
        entries = sorted(found, key=lambda entry: entry.name)
    for entry in entries:
        path, name = Path(entry.path), prefix + entry.name
        try:
            is_link = entry.is_symlink()
            if is_link and links == "none":
                yield Entry(path, name, is_left_out=True)
                continue
            status = entry.stat()
        except OSError as error:
            yield Entry(path, name, problem=_problem_of(entry, error))
            continue
        if not stat.S_ISDIR(status.st_mode):
            yield _file(path, name, status)
        elif is_link and links != "all":
            yield Entry(
                path,
                name,
                problem=f"{display(path)} is a link to a folder: use --links all to follow it, --links none to skip it",
            )
        elif _identity(status) in above:
            yield Entry(
                path,
                name,
                problem=f"{display(path)} is a link to a folder that contains it: remove the link, or use --links none",
            )
        else:
            try:
                yield from _walk(path, f"{name}/", links, [*above, _identity(status)])
            except OSError as error:
                yield Entry(path, name, problem=f"{display(path)} cannot be read: {error.strerror or error}")


def _file(path: Path, name: str, status: os.stat_result) -> Entry:
    if path.name.startswith(PARTIAL_PREFIX):
        return Entry(path, name, is_left_out=True)
    if not stat.S_ISREG(status.st_mode):
        what = "fifo" if stat.S_ISFIFO(status.st_mode) else "socket" if stat.S_ISSOCK(status.st_mode) else "device"
        hint = "" if what == "socket" else ": pass it as SOURCE to copy what it produces"
        return Entry(path, name, problem=f"{display(path)} is a {what}, not a file{hint}")
    return Entry(path, name, status)


def _problem_of(entry: os.DirEntry[str], error: OSError) -> str:
    path = display(Path(entry.path))
    if entry.is_symlink() and isinstance(error, FileNotFoundError):
        return f"{path} is a dangling link: remove it, or use --links none to skip it"
    return f"{path} cannot be read: {error.strerror or error}"


def _identity(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino
