"""Secrets that are never shown: neither in a repr nor in a pickle that can end up in a file.

A secret is passed on to child processes (spawn, forkserver, multiprocessing queues and pipes), which need it. In any
other pickle it is replaced by a marker, and using that raises an error that says what to do. Only what was created
inside `sharing`, which users enter to send it to other machines, has its secrets in every pickle. Updates of a secret
reach child processes through shared memory.
"""

from __future__ import annotations

import hashlib
import mmap
import os
import re
import struct
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from multiprocessing.context import get_spawning_popen
from multiprocessing.reduction import ForkingPickler
from typing import Any

_SIGNATURE = re.compile(r"(?i)\b(sig|x-ms-signature|access_token|accountkey)(\"?\s*[=:]\s*\"?|%3d)[^&\s\"'<>;]+")
_BEARER = re.compile(r"(?i)\b(bearer|sharedkey(?:lite)?)\s+[a-z0-9._~+/:=-]{8,}")


def redact(text: str) -> str:
    """Replace signatures and tokens in *text*."""
    return _BEARER.sub(r"\1 [redacted]", _SIGNATURE.sub(r"\1\2[redacted]", text))


# Read when an object is created and not when it is pickled: engines for data pickle late, and in threads of their own.
_sharing: ContextVar[bool] = ContextVar("azstoragetorch_share_credentials", default=False)


@contextmanager
def sharing() -> Iterator[None]:
    """What is created in this context has its secrets in every pickle; see `azstoragetorch.share_credentials`."""
    token = _sharing.set(True)
    try:
        yield
    finally:
        _sharing.reset(token)


def is_sharing() -> bool:
    """Whether what is created now has its secrets in every pickle."""
    return _sharing.get()


class Secret:
    """A string that is not shown in reprs and pickles. ``reveal()`` returns it.

    *is_shared* is whether pickles contain it nevertheless; by default, whether it is created in `sharing`.
    """

    __slots__ = ("_is_shared", "_value")

    def __init__(self, value: str | None, is_shared: bool | None = None) -> None:
        self._value = value
        self._is_shared = is_sharing() if is_shared is None else is_shared

    def reveal(self) -> str:
        """The secret.

        Raises:
            ValueError: this object was unpickled from a plain pickle, which never contains secrets.
        """
        if self._value is None:
            raise ValueError(
                "the SAS or key of this object was left out when it was pickled, since a pickle can end up in a file: "
                "create the object again with its credential. To use it on another machine, create it inside `with "
                "azstoragetorch.share_credentials():`, which lets its pickles contain the secret; or give the machine "
                "an identity (such as AZURE_CLIENT_ID and what goes with it, in its environment), pass "
                "credential=None, and no SAS in the URL"
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
        return self  # a copy in the same process can share it

    def __reduce__(self) -> tuple[Any, ...]:
        # The arguments of a child process that is being started can contain plain pickles, as DataLoader wraps a pipe.
        is_included = self._is_shared or get_spawning_popen() is not None
        return Secret, (self._value if is_included else None, self._is_shared)


def _to_other_process(secret: Secret) -> tuple[Any, ...]:
    return Secret, (secret._value, secret._is_shared)  # noqa: SLF001


ForkingPickler.register(Secret, _to_other_process)


class SharedString:
    """A string that this process shares with its child processes: after `set` in one, `get` returns it in all.

    It is stored in anonymous shared memory with two slots. `set` writes to the slot with the older version, so `get`
    always finds a complete one, which it recognizes by its digest. Neither waits. A forked child has the same memory.
    Where memory can be passed on by a file descriptor (Linux), a child made by spawn or forkserver attaches to it with
    `handle`.
    """

    _HEADER = struct.Struct("<QI16s")  # version, length, digest
    _SLOT = 16 << 10  # bytes; no URL is that long

    def __init__(self, value: str) -> None:
        self.was_copied = False  # into a child process that `set` does not reach
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
        """In a child process: the string of the parent's *handle*."""
        return _attached(handle.detach())

    def handle(self) -> Any:
        """A handle for a child process that is being started; None if only a forked child can share the memory."""
        child: Any = get_spawning_popen()
        if self._fd is None or child is None:
            self.was_copied |= child is not None
            return None
        from multiprocessing.reduction import DupFd

        # A descriptor can be passed to a child only once, but the child can get the same credential several times.
        of, handle = self._handed
        if of() is not child:
            handle = DupFd(self._fd)
            self._handed = weakref.ref(child), handle
        return handle

    def get(self) -> str:
        """Return the string that was set last, in any of the processes."""
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
        """Set the string in all processes that share it.

        Raises:
            ValueError: *value* is too long.
        """
        data = value.encode()
        if len(data) > self._SLOT - self._HEADER.size:
            raise ValueError(f"the SAS or key has {len(data)} bytes, which is too long: check that it is one")
        while True:
            version = max(self._HEADER.unpack_from(self._memory, slot * self._SLOT)[0] for slot in (0, 1)) + 1
            start = (version % 2) * self._SLOT
            self._memory[start + self._HEADER.size : start + self._HEADER.size + len(data)] = data
            self._HEADER.pack_into(self._memory, start, version, len(data), _digest(version, data))
            if self.get() == value:  # otherwise another thread has written at the same time: try again
                return

    def __del__(self, close: Callable[[int], None] = os.close) -> None:
        # At exit, the globals of this module can be gone before.
        if (fd := getattr(self, "_fd", None)) is not None:
            try:  # noqa: SIM105 - `suppress` is one of them
                close(fd)
            except OSError:
                pass


def _digest(version: int, data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=16, salt=version.to_bytes(16, "little")).digest()


@cache
def _attached(fd: int) -> SharedString:
    # Several objects of one pickle can have the same descriptor, so it stays open.
    shared = SharedString.__new__(SharedString)
    shared.was_copied = False
    shared._fd = fd  # noqa: SLF001 - a second constructor
    shared._map()  # noqa: SLF001
    return shared
