"""What to fetch, and what to keep, of a blob that is read at any position: pure functions over byte ranges.

Sequential reading doubles the window until many parts are in flight; a jump ends it, and then only what is asked for is
fetched, with some bytes around it. The end of a blob, where archives keep their directory, is fetched whole once it is
asked for, and kept. Reading it in the middle of something else changes nothing about the rest, since an archive's
reader goes there and comes back.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

from azstoragetorch._engine.config import KiB, MiB
from azstoragetorch._engine.ranges import ByteRange, gaps, split

DIRECT_READ = 1 * MiB  # a gap this large is fetched into the caller's memory; a smaller one joins the window
MIN_SEGMENT = 4 * MiB
_RANDOM = 128 * KiB  # fetched around a small read at an unforeseen place: the cost of one round trip at 6 MB/s
_REQUESTS = 16  # a window is cut into about this many requests, so that a small blob also comes in parallel
_LARGE_READ_WINDOW = 4  # parts; large reads bring their own parallelism and need to hide only one round trip
_ARCHIVE_STREAK = 4  # reads in sequence that opening an archive counts for
_NOTHING = ByteRange(0, 0)
_LONGEST_STREAK = 8  # a window of 256 parts: `read_ahead` limits it long before


class Segment(Protocol):
    """A segment of the blob that is here or in flight."""

    @property
    def span(self) -> ByteRange:
        """Where it lies."""
        ...

    @property
    def is_kept(self) -> bool:
        """Whether it stays until the reader is closed."""
        ...

    @property
    def reserved(self) -> int:
        """Bytes of the budget that it holds."""
        ...


S = TypeVar("S", bound=Segment)


@dataclass(frozen=True, slots=True)
class AccessPattern:
    """How a blob was read so far: the last read that was not of its end, and how many reads in sequence led there."""

    previous: ByteRange = _NOTHING
    streak: int = 0

    def after(self, span: ByteRange, part_size: int) -> AccessPattern:
        """The pattern when *span* is read next."""
        is_next = self.previous.start <= span.start <= self.previous.stop + part_size
        return AccessPattern(span, min(self.streak + 1, _LONGEST_STREAK) if is_next and self.previous.stop else 0)

    def after_tail(self) -> AccessPattern:
        """The pattern when the end of the blob is read next.

        The first bytes, then the directory at the end: that opens an archive, which is about to be read.
        """
        if self.previous.start == 0 < self.previous.stop:
            return AccessPattern(self.previous, max(self.streak, _ARCHIVE_STREAK))
        return self


def tail(size: int) -> ByteRange:
    """The end of a blob of *size* bytes, where an archive has its directory: 1/512 of it, 256 KiB to 4 MiB."""
    return ByteRange(max(0, size - min(max(size >> 9, 256 * KiB), 4 * MiB)), size)


def widen(gap: ByteRange, size: int, held: Sequence[ByteRange], end: ByteRange | None) -> ByteRange:
    """What to fetch for a small *gap*: all of the *end* of the blob, or some bytes more up to the next segment."""
    wanted = end or ByteRange(gap.start, min(max(gap.stop, gap.start + _RANDOM), size))
    for piece in gaps(wanted, held):
        if piece.start <= gap.start and gap.stop <= piece.stop:
            return piece
    return gap


def segments_ahead(
    span: ByteRange, streak: int, size: int, held: Sequence[ByteRange], part_size: int, read_ahead: int
) -> list[ByteRange]:
    """The segments to fetch behind *span*, which is read now, in the order of their need."""
    window = min(read_ahead, part_size << streak)
    if len(span) >= part_size:
        window = min(window, part_size * _LARGE_READ_WINDOW)
    limit = min(part_size, max(MIN_SEGMENT, -(-size // _REQUESTS // MiB) * MiB))
    wanted = ByteRange(min(span.stop, size), min(span.stop + window, size))
    pieces: list[ByteRange] = []
    for gap in gaps(wanted, held):
        for piece in split(gap, limit):
            if len(piece) < limit and piece.stop == wanted.stop < size:
                return pieces  # too little to be worth a request; the next read will see more
            pieces.append(piece)
    return pieces


def to_evict(segments: Sequence[S], span: ByteRange, streak: int, limit: int) -> list[S]:
    """The *segments*, which are sorted, to evict after *span* was read.

    What a sequential reader has passed, but for the last segment, to which it may return a little; of what a random one
    has collected, the first ones, as long as all hold more than *limit* bytes.
    """
    passed = [segment for segment in segments if segment.span.stop <= span.start and not segment.is_kept]
    if streak:
        return passed[:-1]
    evicted: list[S] = []
    excess = sum(segment.reserved for segment in segments) - limit
    later = [segment for segment in segments if segment.span.start >= span.stop and not segment.is_kept]
    for segment in [*passed, *reversed(later)]:
        if excess <= 0:
            break
        excess -= segment.reserved
        evicted.append(segment)
    return evicted


def reserve_for(span: ByteRange, part_size: int) -> int:
    """Bytes to borrow for a segment: few different amounts, so that buffers of one size can be reused."""
    return part_size if MIN_SEGMENT <= len(span) <= part_size else len(span)
