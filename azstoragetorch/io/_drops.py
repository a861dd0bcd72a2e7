"""Distinguish a deliberate close from a drop.

Dropping a writer commits nothing. But a wrapper that is dropped, such as `io.TextIOWrapper`, flushes and closes the
wrapped file as in a deliberate close. Its finalizer can be recognized:

* Python's own wrappers call ``_dealloc_warn(wrapper)`` of what they wrap before they close it.
* A finalizer written in Python is a frame named ``__del__`` below the call of `close`.
* A Python class that inherits the finalizer of Python's io classes has the mark ``_finalizing`` in its own `close`.

A writer that was itself opened inside a finalizer, say to save a summary, is closed there on purpose.
"""

from __future__ import annotations

import inspect
import io
import sys
import warnings
from threading import get_ident
from types import FrameType
from typing import Any

from azstoragetorch._engine.process import here


class Drops:
    """What one file knows of finalizers that reach it."""

    __slots__ = ("_has_warned", "_looks_for_finalizers", "_process", "is_entered", "thread")

    def __init__(self, *, is_writer: bool) -> None:
        self.is_entered = False  # while it is in a ``with`` block, that block decides
        self.thread: int | None = None  # on which a wrapper's finalizer is at work
        self._process = here()
        self._has_warned = False
        self._looks_for_finalizers = is_writer and finalized_object() is None

    @property
    def is_ours(self) -> bool:
        """Whether this process opened it, not a parent."""
        return self._process is here()

    def is_here(self) -> bool:
        """Whether a wrapper's finalizer is at work on this thread."""
        return self.thread is not None and self.thread == get_ident()

    def is_closing(self) -> bool:
        """Whether `close` is called by a finalizer, or so late that nothing can be uploaded any more."""
        if self.is_here() or sys.is_finalizing():
            return True
        return self._looks_for_finalizers and finalized_object() is not None

    def warn_of_wrapper(self, blob: object, wrapper: object) -> None:
        """Warn that *wrapper* was dropped, unless a ``with`` block of *blob* itself decides what is committed."""
        if not self.is_entered:
            what = "a file over it" if wrapper is None else f"the {type(wrapper).__name__} over it"
            self.warn(
                blob, f"{blob!r}: {what} was dropped without close(): nothing was committed; close both to commit"
            )

    def warn(self, blob: object, message: str, stacklevel: int = 3) -> None:
        """Warn of a drop, once, and in the process that opened *blob*."""
        if self.is_ours and not self._has_warned:
            self._has_warned = True
            warnings.warn(message, ResourceWarning, stacklevel=stacklevel, source=blob)


def finalized_object() -> object:
    """The object whose finalizer has called the code that asks, or None."""
    frame: FrameType | None = inspect.currentframe()
    while frame is not None:
        code = frame.f_code
        if code.co_name in ("__del__", "close") and code.co_argcount:
            owner = frame.f_locals.get(code.co_varnames[0])
            if code.co_name == "__del__" or _has_mark(owner):
                return owner
        frame = frame.f_back
    return None


def _has_mark(owner: Any) -> bool:
    try:
        return isinstance(owner, io.IOBase) and bool(owner._finalizing)  # type: ignore[attr-defined]  # noqa: SLF001
    except AttributeError:
        return False
