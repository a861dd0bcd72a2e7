"""Telling how far a save or load is."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

Progress = Callable[[int, int], None]
"""Called with the bytes done and the bytes planned on this rank, from any thread but one call at a time."""


class Meter:
    """Counts bytes and reports them. An error of the callback fails the save or load."""

    def __init__(self, report: Progress | None, planned: int) -> None:
        self._report = report
        self._planned = planned
        self._done = 0
        self._lock = threading.Lock()
        self.add(0)

    def add(self, count: int) -> None:
        """*count* bytes more are done."""
        if self._report is not None:
            with self._lock:
                self._done += count
                self._report(self._done, self._planned)


class TqdmProgress:
    """A ``progress=`` that draws a tqdm bar; keyword arguments are those of :class:`tqdm.tqdm`.

    Use one object for one save or load at a time. It pickles without the bar that it draws. Raises ImportError when
    it is first used without tqdm installed.
    """

    def __init__(self, **options: Any) -> None:
        self._options: dict[str, Any] = {"unit": "B", "unit_scale": True, "unit_divisor": 1024, **options}
        self._bar: Any = None

    def __call__(self, done: int, planned: int) -> None:
        """Draw *done* of *planned* bytes; the bar is closed when all are done."""
        if self._bar is None:
            from tqdm.auto import tqdm  # type: ignore[import-untyped]

            self._bar = tqdm(total=planned, **self._options)
        self._bar.update(done - self._bar.n)
        if done >= planned:
            self._bar.close()
            self._bar = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_bar": None}
