"""State that belongs to one process.

Threads, sockets, and connections of a parent are useless in a forked child, and locks that another thread held during
the fork stay locked there forever. So live objects belong to one process: they are created on first use, forgotten in a
forked child, and excluded from pickles. This module contains the only fork hook of the package.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable
from typing import Any, Generic, TypeVar

T = TypeVar("T")


class Process:
    """Identity of one process; compared with ``is``."""

    __slots__ = ()


_here = [Process()]  # a list, so that the hook can replace what is in it
_to_drop: weakref.WeakSet[PerProcess[Any]] = weakref.WeakSet()


def here() -> Process:
    """The process that runs this. Another object in a forked child, so whatever remembers it notices the fork."""
    return _here[0]


class PerProcess(Generic[T]):
    """A value that each process makes for itself when it first needs it. Pickles without the value.

    Two threads that need it first at the same time may both make one; both use the one that was there first, so *make*
    starts nothing that would have to be stopped.

    Args:
        make: Makes the value. It must be picklable if this is pickled, and must not refer to the owner of this.
        drop: Called in a forked child with the value of the parent. It must neither wait nor send anything.
    """

    __slots__ = ("__weakref__", "_drop", "_make", "_values")

    def __init__(self, make: Callable[[], T], drop: Callable[[T], None] | None = None) -> None:
        self._make = make
        self._drop = drop
        self._values: dict[Process, T] = {}
        if drop is not None:
            _to_drop.add(self)

    def get(self) -> T:
        """The value of this process, made if it does not exist yet."""
        process = _here[0]
        try:
            return self._values[process]
        except KeyError:
            made = self._make()
            for other in list(self._values):
                if other is not process:
                    self._values.pop(other, None)
            return self._values.setdefault(process, made)

    def peek(self) -> T | None:
        """The value of this process, or None if it does not exist yet."""
        return self._values.get(_here[0])

    def forget(self) -> T | None:
        """Take the value of this process away, if there is one: the next `get` makes another."""
        return self._values.pop(_here[0], None)

    def _drop_inherited(self) -> None:
        while self._values:
            _, value = self._values.popitem()
            if self._drop is not None:
                self._drop(value)

    def __reduce__(self) -> tuple[Any, ...]:
        return PerProcess, (self._make, self._drop)


def _after_fork_in_child() -> None:
    _here[0] = Process()
    for holder in list(_to_drop):
        holder._drop_inherited()  # noqa: SLF001 - of this module


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)
