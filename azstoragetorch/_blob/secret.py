"""Secrets that are used but never shown: not in a repr, not in a plain pickle.

A secret travels to a child process (spawn, forkserver, multiprocessing queues and pipes), where it is needed.
In any other pickle, which may end up in a file, its place is taken by a marker that says what to do. One that is
updated later reaches child processes through memory that they share.
"""

from __future__ import annotations

import hashlib
import mmap
import os
import re
import struct
import weakref
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from multiprocessing.context import get_spawning_popen
from multiprocessing.reduction import ForkingPickler
from typing import Any

_SIGNATURE = re.compile(r"(?i)\b(sig|x-ms-signature|access_token|accountkey)(\"?\s*[=:]\s*\"?|%3d)[^&\s\"'<>;]+")
_BEARER = re.compile(r"(?i)\b(bearer|sharedkey(?:lite)?)\s+[a-z0-9._~+/:=-]{8,}")


def redact(text: str) -> str:
    """*text* without signatures and tokens."""
    return _BEARER.sub(r"\1 [redacted]", _SIGNATURE.sub(r"\1\2[redacted]", text))


class Secret:
    """A text that is kept out of sight. ``reveal()`` gives it."""

    __slots__ = ("_value",)

    def __init__(self, value: str | None) -> None:
        self._value = value

    def reveal(self) -> str:
        """The secret.

        Raises:
            ValueError: this object came out of a plain pickle, which never holds secrets.
        """
        if self._value is None:
            raise ValueError(
                "the SAS or key of this object was left out when it was pickled, since a pickle may be kept in a file: "
                "make the object again with its credential"
            )
        return self._value

    def __repr__(self) -> str:
        return "Secret(...)"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Secret) and self._value == other._value

    def __hash__(self) -> int:
        return hash((Secret, self._value))

    def __copy__(self) -> Secret:
        return self

    def __deepcopy__(self, _memo: object) -> Secret:
        return self  # a copy stays in this process

    def __reduce__(self) -> tuple[Any, ...]:
        # While a child process is being started its arguments may hold plain pickles: DataLoader wraps a pipe in one.
        return Secret, (self._value if get_spawning_popen() is not None else None,)


def _to_other_process(secret: Secret) -> tuple[Any, ...]:
    return Secret, (secret._value,)  # noqa: SLF001


ForkingPickler.register(Secret, _to_other_process)


class SharedString:
    """A string that this process shares with those that it starts: after `set` in one, `get` returns it in all.

    It is in memory that no file has a name for, in two slots. A setter fills the slot of the older version, so that a
    reader always finds a whole one; a digest shows which is. Nobody waits for anybody. A process made by fork has the
    same memory; where memory can be passed on by a descriptor (Linux), one made by spawn or forkserver gets it by
    `handle`.
    """

    _HEADER = struct.Struct("<QI16s")  # version, length, digest
    _SLOT = 16 << 10  # bytes; no URL is that long

    def __init__(self, value: str) -> None:
        self._fd: int | None = None
        if hasattr(os, "memfd_create"):
            self._fd = os.memfd_create("azstoragetorch")
            os.ftruncate(self._fd, 2 * self._SLOT)
        self._map()
        self.set(value)

    def _map(self) -> None:
        self._memory = mmap.mmap(-1 if self._fd is None else self._fd, 2 * self._SLOT)
        self._known = (0, "")
        self._handed: tuple[Callable[[], Any], Any] = (lambda: None, None)

    @classmethod
    def attach(cls, handle: Any) -> SharedString:
        """In a child process: what the parent's *handle* stands for."""
        return _attached(handle.detach())

    def handle(self) -> Any:
        """What a child process that is being started attaches to; None where only a fork passes memory on."""
        child: Any = get_spawning_popen()
        if self._fd is None or child is None:
            return None
        from multiprocessing.reduction import DupFd

        # A descriptor can be passed to a child once, however often a credential is in what the child gets.
        of, handle = self._handed
        if of() is not child:
            handle = DupFd(self._fd)
            self._handed = weakref.ref(child), handle
        return handle

    def get(self) -> str:
        """The string that was set last."""
        versions = [self._HEADER.unpack_from(self._memory, slot * self._SLOT) for slot in (0, 1)]
        version, known = self._known
        if version != max(versions)[0]:
            for version, length, digest in sorted(versions, reverse=True):
                start = (version % 2) * self._SLOT + self._HEADER.size
                data = self._memory[start : start + length]
                if _digest(version, data) == digest:
                    self._known = version, known = version, data.decode()
                    break
        return known

    def set(self, value: str) -> None:
        """Make *value* the string, in all processes that share it.

        Raises:
            ValueError: it is too long.
        """
        data = value.encode()
        if len(data) > self._SLOT - self._HEADER.size:
            raise ValueError(f"a SAS or key of {len(data)} bytes is too long")
        while True:
            version = max(self._HEADER.unpack_from(self._memory, slot * self._SLOT)[0] for slot in (0, 1)) + 1
            start = (version % 2) * self._SLOT
            self._memory[start + self._HEADER.size : start + self._HEADER.size + len(data)] = data
            self._HEADER.pack_into(self._memory, start, version, len(data), _digest(version, data))
            if self.get() == value:  # else another thread wrote at the same time
                return

    def __del__(self) -> None:
        if (fd := getattr(self, "_fd", None)) is not None:
            with suppress(OSError):
                os.close(fd)


def _digest(version: int, data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=16, salt=version.to_bytes(16, "little")).digest()


@cache
def _attached(fd: int) -> SharedString:
    # Several objects of one pickle may come with the same descriptor, so it stays open.
    shared = SharedString.__new__(SharedString)
    shared._fd = fd  # noqa: SLF001 - a second constructor
    shared._map()  # noqa: SLF001
    return shared
