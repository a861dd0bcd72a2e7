"""Local paths: which can be read and replaced, and how to create a file atomically.

In a folder that others can write to, another user can create a link with an expected name. So a new file has a name
that nobody can guess, is created with ``O_EXCL`` and ``O_NOFOLLOW``, and is then renamed, which does not follow links.
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

PARTIAL_PREFIX = ".azstoragetorch-"  # prefix of the names of unfinished files
_NO_TERMINAL = getattr(os, "O_NOCTTY", 0)  # a terminal that is opened must not become the controlling terminal
_SYSTEM = ("/proc/", "/sys/")  # files there do not report their length


class CopyError(AZStorageTorchError):
    """A copy failed; its target is unchanged."""


class WrongMD5Error(CopyError):
    """The bytes do not match the MD5 stored with the blob: either of them is wrong."""


def printable(text: str) -> str:
    """Escape control characters in *text*, so that it is printed as one line and does not control the terminal."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def display(path: Path) -> str:
    """*path* as it is shown in messages."""
    return printable(str(path))


def current_user_id() -> int:
    """The user id of files that this process creates; 0 on Windows."""
    return os.geteuid() if sys.platform != "win32" else 0


def has_unknown_length(path: Path, found: os.stat_result) -> bool:
    """Whether the length of *path*, which has the status *found*, is known only after reading it to its end."""
    return not stat.S_ISREG(found.st_mode) or not found.st_size or os.path.realpath(path).startswith(_SYSTEM)


def is_stream_target(path: Path) -> bool:
    """Whether *path* is a device or fifo, which is written into; otherwise a new file replaces what is there.

    Raises:
        CopyError: *path* is a folder, a link, or a fifo or device of another user, which a file must not replace.
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
        CopyError: one of them is a link, which can lead out of *root*.
    """
    place = root
    for part in relative.split("/")[:-1]:
        place = place / part
        if place.is_symlink():
            raise CopyError(
                f"{display(place)} is a link, and links below the target are not followed: remove it, or use the "
                "folder that it leads to as the target"
            )


def open_to_read(path: Path) -> FileIO:
    """Open *path*, a file of any type, for reading without a buffer."""
    return FileIO(path, "r", opener=_without_terminal)


def open_stream(path: Path) -> FileIO:
    """Open the device or fifo *path* for writing, without creating or truncating it."""
    return FileIO(path, "w", opener=_as_it_is)


def _without_terminal(path: str, flags: int) -> int:
    return os.open(path, flags | _NO_TERMINAL)


def _as_it_is(path: str, flags: int) -> int:
    return os.open(path, flags & ~(os.O_CREAT | os.O_TRUNC) | _NO_TERMINAL)


def open_exclusive(path: Path) -> FileIO:
    """Create *path* and open it for reading and writing.

    Raises:
        FileExistsError: *path* exists, even as a dangling link.
    """
    return FileIO(path, "x+", opener=_without_links)


def open_own(path: Path, *, create: bool = False) -> FileIO:
    """Open *path* for reading and writing. With *create*, create it if it does not exist, private to this user.

    Raises:
        OSError: *path* is a link, or cannot be opened.
    """
    # A file object, not a descriptor: it is closed even if an interrupt comes before it is stored in a variable.
    return FileIO(path, "r+", opener=_create_without_links if create else _without_links)


def _without_links(path: str, flags: int) -> int:
    return os.open(path, flags | getattr(os, "O_NOFOLLOW", 0), 0o666)


def _create_without_links(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o600)


def partial_name() -> str:
    """A name for an unfinished file that nobody can guess."""
    return f"{PARTIAL_PREFIX}{secrets.token_hex(12)}.part"


def rename_into_place(unfinished: Path, path: Path) -> None:
    """Rename *unfinished* to *path*, with the permissions of the file that it replaces.

    Raises:
        CopyError: *path* is now something that a file cannot replace.
        OSError: the rename failed.
    """
    if is_stream_target(path):
        raise CopyError(f"{display(path)} was replaced with a device or fifo during the copy; nothing was written")
    with suppress(OSError):  # *path* does not exist, or the file system has no permissions
        unfinished.chmod(stat.S_IMODE(path.lstat().st_mode) & 0o777)
    unfinished.replace(path)


@contextmanager
def atomic_write(path: Path) -> Iterator[BinaryIO]:
    """Open *path* for writing. The file is created or replaced when the block ends without an error.

    If *path* is a device or fifo, it is written into.

    Raises:
        CopyError: *path* is something that a file cannot replace.
        OSError: *path* cannot be written.
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
    """Whether *link* is created by the system: ``/dev/stdout``, ``/proc/self/fd/1``."""
    place = os.path.realpath(link.parent)
    return place == "/dev" or place.startswith("/proc/")
