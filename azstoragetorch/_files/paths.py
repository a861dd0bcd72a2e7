"""Paths of this machine: what may be read and replaced there, and a new file that takes its name when it is complete.

Names in a folder that others can write may be planted. So a new file has a name that nobody can guess, is created with
``O_EXCL`` and ``O_NOFOLLOW``, and takes its final name by a rename, which follows no link either.
"""

from __future__ import annotations

import io
import os
import secrets
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from io import FileIO
from pathlib import Path
from typing import BinaryIO

from azstoragetorch._engine.scope import on_error
from azstoragetorch.exceptions import AZStorageTorchError

PARTIAL_PREFIX = ".azstoragetorch-"  # the names of unfinished files begin with it
_NO_TERMINAL = getattr(os, "O_NOCTTY", 0)  # opening a terminal must not make it the controlling one
_SYSTEM = ("/proc/", "/sys/")  # files there have no length before they are read


class CopyError(AZStorageTorchError):
    """A copy was not made; its target is what it was before."""


class WrongMD5Error(CopyError):
    """The bytes do not have the MD5 that is stored with the blob: they, or it, are wrong."""


def printable(text: str) -> str:
    """*text* with control characters escaped, so that it is one line and moves no cursor."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def display(path: Path) -> str:
    """*path* for a message."""
    return printable(str(path))


def current_user_id() -> int:
    """The user id that this process creates files with; 0 where users have no numbers."""
    return os.geteuid() if sys.platform != "win32" else 0


def has_unknown_length(path: Path, found: os.stat_result) -> bool:
    """Whether the length of *path*, which has the status *found*, is known only after it was read to its end."""
    return not stat.S_ISREG(found.st_mode) or not found.st_size or os.path.realpath(path).startswith(_SYSTEM)


def is_stream_target(path: Path) -> bool:
    """Whether writing to *path* means to write into what is there, a device or a fifo; else a new file replaces it.

    Raises:
        CopyError: *path* is a folder, a link, or somebody else's fifo or device, none of which a file may replace.
    """
    try:
        found = path.lstat()
        if stat.S_ISLNK(found.st_mode):
            if not _is_of_the_system(path):
                raise CopyError(
                    f"{display(path)} is a link to {display(path.readlink())}: name the file that it leads to "
                    "as the target, or remove the link"
                )
            path.stat()
            return True
    except FileNotFoundError:
        return False
    if stat.S_ISREG(found.st_mode):
        return False
    if stat.S_ISDIR(found.st_mode):
        raise CopyError(
            f"{display(path)} is a folder, which a file cannot replace: remove it, or choose another target"
        )
    if stat.S_ISSOCK(found.st_mode):
        raise CopyError(f"{display(path)} is a socket, which a file cannot replace: choose another target")
    if found.st_uid not in (0, current_user_id()):
        raise CopyError(f"{display(path)} is a fifo or device of another user: choose another target")
    return True


def check_folders(root: Path, relative: str) -> None:
    """Check that no folder of the path *relative*, below *root*, is a link.

    Raises:
        CopyError: one is, and so leads to another place than the one that was named.
    """
    place = root
    for part in relative.split("/")[:-1]:
        place = place / part
        if place.is_symlink():
            raise CopyError(
                f"{display(place)} is a link, and nothing is copied through links below the target: remove it, or name "
                "the folder that it leads to as the target"
            )


def open_to_read(path: Path) -> FileIO:
    """Open *path*, whatever it is, without a buffer."""
    return FileIO(path, "r", opener=_without_terminal)


def open_stream(path: Path) -> FileIO:
    """Open the device or fifo *path* to write into it; nothing is created or truncated."""
    return FileIO(path, "w", opener=_as_it_is)


def _without_terminal(path: str, flags: int) -> int:
    return os.open(path, flags | _NO_TERMINAL)


def _as_it_is(path: str, flags: int) -> int:
    return os.open(path, flags & ~(os.O_CREAT | os.O_TRUNC) | _NO_TERMINAL)


def open_exclusive(path: Path) -> FileIO:
    """A new file *path*, open for reading and writing.

    Raises:
        FileExistsError: something has that name, be it a link that leads nowhere.
    """
    return FileIO(path, "x+", opener=_without_links)


def open_own(path: Path, *, create: bool = False) -> FileIO:
    """The file *path*, open for reading and writing; with *create* it is made, for this user alone, if it is not there.

    Raises:
        OSError: *path* is a link, or cannot be opened.
    """
    # A file object, not a descriptor: an interrupt that comes before it is in a variable closes it.
    return FileIO(path, "r+", opener=_create_without_links if create else _without_links)


def _without_links(path: str, flags: int) -> int:
    return os.open(path, flags | getattr(os, "O_NOFOLLOW", 0), 0o666)


def _create_without_links(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o600)


def partial_name() -> str:
    """A name for an unfinished file that nobody can guess."""
    return f"{PARTIAL_PREFIX}{secrets.token_hex(12)}.part"


def rename_into_place(unfinished: Path, path: Path) -> None:
    """Rename *unfinished* to *path*; a file that it replaces hands on its permissions.

    Raises:
        CopyError: *path* has become something that a file cannot replace.
        OSError: it cannot be renamed.
    """
    if is_stream_target(path):
        raise CopyError(
            f"{display(path)} has become a device or fifo while its content was copied; nothing was written"
        )
    with suppress(OSError):  # no such file, or a file system without permissions
        unfinished.chmod(stat.S_IMODE(path.lstat().st_mode) & 0o777)
    unfinished.replace(path)


@contextmanager
def atomic_write(path: Path) -> Iterator[BinaryIO]:
    """Write *path*: a file appears, or is replaced, when the block ends without an error.

    A device or fifo that is there is written into.

    Raises:
        CopyError: *path* is something that a file cannot replace.
        OSError: it cannot be written.
    """
    if is_stream_target(path):
        with io.BufferedWriter(open_stream(path)) as stream:
            yield stream
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.parent / partial_name()
    with on_error(partial(unfinished.unlink, missing_ok=True)):
        with io.BufferedWriter(open_exclusive(unfinished)) as file:
            yield file
        rename_into_place(unfinished, path)


def _is_of_the_system(link: Path) -> bool:
    """Whether *link* is one that the system makes: ``/dev/stdout``, ``/proc/self/fd/1``."""
    place = os.path.realpath(link.parent)
    return place == "/dev" or place.startswith("/proc/")
