"""The record of an unfinished download, in a folder that only this user can write to.

The unfinished file is next to its target, where other users may be able to write. If the record were there too, another
user could create both. So the record, which identifies the file and the bytes that it has, is in
``$XDG_STATE_HOME/azstoragetorch`` (``~/.local/state/azstoragetorch``), and the file is used only if it is the very file
that this user created. Without such a folder nothing is recorded, and an interrupted download starts again.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
import sys
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from io import FileIO
from pathlib import Path

from azstoragetorch._engine.ranges import ByteRange, coalesce
from azstoragetorch._engine.scope import on_error
from azstoragetorch._files.paths import PARTIAL_PREFIX, CopyError, current_user_id, display, open_own

_PART = re.compile(rf"{re.escape(PARTIAL_PREFIX)}[0-9a-f]{{24}}\.part")
_LONGEST = 64 << 20  # bytes of a record, which has one line for about 64 MiB


@dataclass(frozen=True, slots=True)
class RecordedDownload:
    """The recorded state of an unfinished file."""

    identity: str
    part: str
    inode: int
    spans: list[ByteRange]


class Record:
    """The record of the download to one path, locked by one process at a time."""

    def __init__(self, place: Path, file: FileIO) -> None:
        self._place = place
        self._file = file

    @classmethod
    def of(cls, path: Path) -> Record | None:
        """Open and lock the record for *path*; None without a private folder.

        Raises:
            CopyError: another process is downloading to *path*.
        """
        place = _place_of(path)
        while place is not None:
            try:
                file = open_own(place, create=True)
            except OSError:
                return None
            try:
                with on_error(file.close):
                    _lock(file.fileno())
                    if _is_file_at(place, file.fileno()):  # otherwise the process that had it locked has removed it
                        return cls(place, file)
            except BlockingIOError:
                raise CopyError(
                    f"{display(path)}: another process is downloading to it: wait until that has finished"
                ) from None
            file.close()
        return None

    @staticmethod
    def kept_bytes(path: Path) -> int:
        """The recorded number of bytes of the unfinished download to *path*."""
        place = _place_of(path)
        kept = _parse(place) if place is not None else None
        return sum(map(len, kept.spans)) if kept is not None else 0

    def read(self) -> RecordedDownload | None:
        """The recorded state; None if nothing is recorded."""
        return _parse(self._place)

    def begin(self, identity: str, part: Path, inode: int) -> None:
        """Record a new unfinished file, *part*, without any bytes."""
        with suppress(OSError):
            self._file.truncate(0)
        self._append(json.dumps({"identity": identity, "part": part.name, "inode": inode}) + "\n")

    def add(self, spans: Iterable[ByteRange]) -> bool:
        """Record *spans*, whose bytes are on disk. Return False if that failed: they are downloaded again later."""
        return self._append("".join(f"{span.start} {span.stop}\n" for span in spans))

    def forget(self) -> None:
        """Delete the record, after the unfinished file was renamed or deleted."""
        with suppress(OSError):
            self._place.unlink()

    def close(self) -> None:
        """Unlock the record."""
        self._file.close()

    def _append(self, lines: str) -> bool:
        data = lines.encode("ascii")
        try:
            self._file.seek(0, os.SEEK_END)
            return self._file.write(data) == len(data)  # after an incomplete line nothing more is read
        except OSError:
            return False


def _place_of(path: Path) -> Path | None:
    folder = _private_folder()
    if folder is None:
        return None
    target = Path(os.path.realpath(path.parent)) / path.name
    return folder / f"{hashlib.sha256(os.fsencode(target)).hexdigest()[:32]}.download"


def _private_folder() -> Path | None:
    """A folder that only this user can write to; None if it cannot be created."""
    try:
        base = os.environ.get("LOCALAPPDATA" if sys.platform == "win32" else "XDG_STATE_HOME")
        folder = (Path(base) if base else Path.home() / ".local" / "state") / "azstoragetorch"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = folder.lstat()
    except (OSError, RuntimeError):  # RuntimeError: the user has no home directory
        return None
    if sys.platform != "win32" and (found.st_uid != current_user_id() or found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)):
        return None
    return folder if stat.S_ISDIR(found.st_mode) else None


def _parse(place: Path) -> RecordedDownload | None:
    try:
        if place.lstat().st_size > _LONGEST:
            return None
        head, *lines = place.read_text(encoding="ascii").split("\n")
        facts = json.loads(head)
        identity, part, inode = facts["identity"], facts["part"], facts["inode"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    if not (isinstance(identity, str) and isinstance(part, str) and isinstance(inode, int) and _PART.fullmatch(part)):
        return None
    spans = []
    for line in lines[:-1]:  # the last line is empty or incomplete
        start, _, stop = line.partition(" ")
        if not (start.isdigit() and stop.isdigit() and len(line) < 40 and int(start) < int(stop)):
            return None
        spans.append(ByteRange(int(start), int(stop)))
    end = max((span.stop for span in spans), default=0)
    return RecordedDownload(identity, part, inode, coalesce(sorted(spans), max_gap=0, limit=end))


def _is_file_at(place: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(place.lstat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


if sys.platform == "win32":  # pragma: no cover

    def _lock(descriptor: int) -> None:
        """Do nothing: Windows does not allow deleting an open file, which is enough."""

else:
    import fcntl

    def _lock(descriptor: int) -> None:
        """Lock the file.

        Raises:
            BlockingIOError: another process has locked it.
        """
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise
        except OSError:
            pass  # a file system without locks
