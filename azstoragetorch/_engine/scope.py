"""Transfers that are canceled together, and the resources that they block on.

Canceling takes no lock, because signal handlers and finalizers cancel while the thread may be in the middle of
anything. Instead, it relies on the order of single steps, which the interpreter does not divide:

* `Hold.__enter__` first adds the hold to the scope and then looks whether the scope is cancelled; `Scope.cancel` first
  marks the scope and then goes through its holds. So at least one of the two sees the other.
* A hold ends once: the holder leaves, or a cancel wakes it. Both write the same key with ``dict.setdefault``, and the
  first one stays. A holder that comes second learns it from ``was_woken`` and must not pass the resource on, since the
  wake may still be running.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import Literal


class Cancelled(BaseException):
    """Raised inside a transfer whose scope was cancelled. Not an `Exception`, so that no handler takes it for one."""


class Hold:
    """One resource that a transfer may block on, from entering its ``with`` block until leaving it."""

    __slots__ = ("_end", "_scope", "_wake")

    def __init__(self, scope: Scope, wake: Callable[[], None]) -> None:
        self._scope = scope
        self._wake = wake
        self._end: dict[None, Literal["left", "woken"]] = {}

    @property
    def was_woken(self) -> bool:
        """Whether a cancel has woken the resource, or is about to: others must not use it any more."""
        return self._end.get(None) == "woken"

    def __enter__(self) -> Hold:
        self._scope._holds[self] = None  # noqa: SLF001 - two parts of one protocol
        if self._scope.is_cancelled:
            self.leave()
            raise Cancelled
        return self

    def __exit__(self, *_error: object) -> None:
        self.leave()

    def leave(self) -> None:
        """End the hold; a cancel that comes later does not touch the resource."""
        self._scope._holds.pop(self, None)  # noqa: SLF001
        self._end.setdefault(None, "left")

    def cancel(self) -> None:
        """Wake the resource unless its holder has left."""
        if self._end.setdefault(None, "woken") == "woken":
            self._wake()


class Scope:
    """Transfers that are given up together: cancelling wakes every one that is blocked."""

    __slots__ = ("__weakref__", "_holds", "is_cancelled")

    def __init__(self) -> None:
        self._holds: dict[Hold, None] = {}
        self.is_cancelled = False

    def holding(self, wake: Callable[[], None]) -> Hold:
        """A context manager; while inside it, `cancel` calls *wake*.

        *wake* makes what blocks fail or return at once. It may be called from any thread, a signal handler or a
        finalizer, and more than once: it must not wait.

        Raises:
            Cancelled: on entering, the scope was cancelled.
        """
        return Hold(self, wake)

    def check(self) -> None:
        """Raise `Cancelled` if the scope was cancelled."""
        if self.is_cancelled:
            raise Cancelled

    def pause(self, seconds: float) -> None:
        """Wait, unless the scope is cancelled.

        Raises:
            Cancelled: it was.
        """
        nap = threading.Lock()
        nap.acquire()
        with self.holding(partial(_open, nap)):
            nap.acquire(timeout=max(0.0, seconds))
        self.check()

    @contextmanager
    def child(self) -> Iterator[Scope]:
        """A scope that is cancelled with this one and can be cancelled without it."""
        inner = Scope()
        with self.holding(inner.cancel):
            yield inner

    def cancel(self) -> None:
        """Give up: what is blocked fails at once, what has not begun never begins. Never waits."""
        self.is_cancelled = True
        for hold in list(self._holds):
            hold.cancel()


class on_error:  # noqa: N801 - used like a function
    """Call *undo* if the ``with`` block is left by an error or an interrupt, which is raised on."""

    __slots__ = ("_undo",)

    def __init__(self, undo: Callable[[], object]) -> None:
        self._undo = undo

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            self._undo()


def _open(lock: threading.Lock) -> None:
    with suppress(RuntimeError):  # it is open
        lock.release()
