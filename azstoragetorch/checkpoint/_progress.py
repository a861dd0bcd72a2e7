"""Report how far a save or load is."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import Any

Progress = Callable[[int, int], None]
"""Called with the bytes done and the bytes planned on this rank, from any thread but one call at a time."""

log = logging.getLogger("azstoragetorch")


class Meter:
    """Counts bytes and reports them. An error of the callback ends the reports with a warning, and nothing else."""

    def __init__(self, report: Progress | None, planned: int) -> None:
        self._report = report
        self._planned = planned
        self._done = 0
        # Only threads of one save or load wait for it, and nothing else waits for them.
        self._lock = threading.Lock()
        self.add(0)

    def add(self, count: int) -> None:
        """*count* bytes more are done."""
        if self._report is not None:
            with self._lock:
                self._done += count
                self._call()

    def _call(self) -> None:
        report = self._report
        if report is not None:  # a thread that held the lock before may have ended the reports
            try:
                report(self._done, self._planned)
            except Exception:
                self._report = None
                log.warning(
                    "the progress callback failed, so it is not called again; the transfer continues", exc_info=True
                )


class TqdmProgress:
    """A ``progress=`` that draws a tqdm bar; keyword arguments are those of :class:`tqdm.tqdm`.

    Use one object for one save or load at a time. It pickles without the bar that it draws.

    Raises:
        ImportError: tqdm is not installed.
    """

    def __init__(self, **options: Any) -> None:
        _tqdm()
        self._options: dict[str, Any] = {"unit": "B", "unit_scale": True, "unit_divisor": 1024, **options}
        self._bar: Any = None

    def __call__(self, done: int, planned: int) -> None:
        """Draw *done* of *planned* bytes; the bar is closed when all are done."""
        if self._bar is None:
            self._bar = _tqdm()(total=planned, **self._options)
        self._bar.update(done - self._bar.n)
        if done >= planned:
            self._bar.close()
            self._bar = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_bar": None}


def _tqdm() -> Any:
    try:
        from tqdm.auto import tqdm  # type: ignore[import-untyped]
    except ImportError as error:
        raise ImportError("TqdmProgress needs tqdm: pip install tqdm") from error
    return tqdm
