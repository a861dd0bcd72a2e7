"""Bytes of a save that are the same in an earlier checkpoint: which of them to have the service copy. No I/O."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import NamedTuple

from azstoragetorch._engine.config import KiB, MiB
from azstoragetorch._engine.ranges import even_cuts

LEAST = 256 * KiB  # bytes; a shorter run is uploaded with what is next to it, which is faster than two more requests
MOST = 64 * MiB  # bytes that one request copies; longer runs are copied in several requests at once
_RUNS = 10_000  # of one blob, which has at most 50,000 blocks


class Unchanged(NamedTuple):
    """Bytes ``start <= i < stop`` of the data blob *path* of the base. *pieces* makes them again for an upload."""

    path: str
    etag: str
    start: int
    stop: int
    pieces: Callable[[], Iterable[memoryview]]

    def is_continued_by(self, other: Unchanged) -> bool:
        """Whether *other* begins where this one ends."""
        return (self.path, self.etag, self.stop) == (other.path, other.etag, other.start)


Part = memoryview | Unchanged


def merged(parts: Iterable[Part], *, least: int | None = None, most: int | None = None) -> Iterator[Part]:
    """*parts* with neighbors among the unchanged ones as one. Runs shorter than *least* bytes become pieces again.

    Runs are cut at *most* bytes.
    """
    least, most = least or LEAST, most or MOST
    run: list[Unchanged] = []
    copied = 0
    for part in parts:
        if run and not (
            isinstance(part, Unchanged) and run[-1].is_continued_by(part) and run[-1].stop - run[0].start < most
        ):
            copied += 1
            yield from _of_run(run, least if copied <= _RUNS else run[-1].stop + 1, most)
            run = []
        if isinstance(part, Unchanged):
            run.append(part)
        else:
            yield part
    if run:
        yield from _of_run(run, least, most)


def _of_run(run: list[Unchanged], least: int, most: int) -> Iterator[Part]:
    first, length = run[0], run[-1].stop - run[0].start
    if length < least:
        for part in run:
            yield from part.pieces()
        return
    whole = tuple(run)
    for cut in even_cuts(length, most):
        start, stop = first.start + cut.start, first.start + cut.stop
        yield Unchanged(first.path, first.etag, start, stop, partial(_pieces, whole, start, stop))


def _pieces(run: tuple[Unchanged, ...], start: int, stop: int) -> Iterator[memoryview]:
    """The bytes ``start <= i < stop`` of the blob that *run* is of."""
    inside = [part for part in run if part.start < stop and start < part.stop]
    at = inside[0].start
    for piece in itertools.chain.from_iterable(part.pieces() for part in inside):
        low, high = max(start - at, 0), min(stop - at, piece.nbytes)
        if low < high:
            yield piece[low:high]
        at += piece.nbytes
        if at >= stop:
            return
