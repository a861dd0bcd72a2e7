"""Plan which segments of a blob to fetch, keep and evict as it is read: pure functions over byte ranges.

Each sequential read doubles the read-ahead window, up to ``read_ahead`` bytes; skipping less than a part still counts
as sequential. A jump closes the window: then only the requested bytes are fetched, and for a small read up to
`RANDOM_READ` bytes from its start. The last bytes of a blob, its tail, hold the directory of most archive formats (zip,
and so ``torch.save``). The first small read that begins there fetches the whole tail, which is kept until the reader is
closed. A read of the tail does not count as a jump, since the reader of an archive looks something up there and returns
to where it was.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

from azstoragetorch._engine.config import KiB, MiB
from azstoragetorch._engine.ranges import ByteRange, gaps, split

DIRECT_READ = 1 * MiB  # bytes; a read this large is fetched into the caller's memory, a smaller one becomes a segment
MIN_SEGMENT = 4 * MiB
RANDOM_READ = 128 * KiB  # fetched for a small random read: takes as long as one round trip at 6 MB/s
_REQUESTS = 16  # a blob is cut into at least about this many segments, so that a small one is also fetched in parallel
_LARGE_READ_WINDOW = 4  # parts; large reads run in parallel already, and read-ahead has to hide only one round trip
_ARCHIVE_STREAK = 4  # opening an archive counts as this many sequential reads
_NOTHING = ByteRange(0, 0)
_LONGEST_STREAK = 8  # a window of 256 parts; `read_ahead` limits it long before that


class Segment(Protocol):
    """A segment of the blob that is in memory or in flight."""

    @property
    def span(self) -> ByteRange:
        """The position of the segment in the blob."""
        ...

    @property
    def is_kept(self) -> bool:
        """Whether it is kept until the reader is closed."""
        ...

    @property
    def reserved(self) -> int:
        """Bytes of the memory budget that it holds."""
        ...


S = TypeVar("S", bound=Segment)


@dataclass(frozen=True, slots=True)
class AccessPattern:
    """How a blob has been read so far: the last read outside the tail, and the number of sequential reads before it."""

    previous: ByteRange = _NOTHING
    streak: int = 0

    def after(self, span: ByteRange, part_size: int) -> AccessPattern:
        """The pattern after a read of *span*."""
        is_next = self.previous.start <= span.start <= self.previous.stop + part_size
        return AccessPattern(span, min(self.streak + 1, _LONGEST_STREAK) if is_next and self.previous.stop else 0)

    def after_tail(self) -> AccessPattern:
        """The pattern after a read of the tail.

        A reader that reads the first bytes and then the tail opens an archive, and is about to read all of it.
        """
        if self.previous.start == 0 < self.previous.stop:
            return AccessPattern(self.previous, max(self.streak, _ARCHIVE_STREAK))
        return self


def tail(size: int) -> ByteRange:
    """The tail of a blob of *size* bytes, where an archive has its directory: 1/512 of the blob, 256 KiB to 4 MiB."""
    return ByteRange(max(0, size - min(max(size >> 9, 256 * KiB), 4 * MiB)), size)


def extend(gap: ByteRange, size: int, held: Sequence[ByteRange], end: ByteRange | None) -> ByteRange:
    """The range to fetch for a small *gap*: the rest of the tail *end* if given, else some bytes more than *gap*."""
    wanted = end or ByteRange(gap.start, min(max(gap.stop, gap.start + RANDOM_READ), size))
    for piece in gaps(wanted, held):
        if piece.start <= gap.start and gap.stop <= piece.stop:
            return piece
    return gap


def segments_ahead(
    span: ByteRange, streak: int, size: int, held: Sequence[ByteRange], part_size: int, read_ahead: int
) -> list[ByteRange]:
    """The segments to read ahead after *span*, which is being read now, in the order of their positions."""
    window = min(read_ahead, part_size << streak)
    if len(span) >= part_size:
        window = min(window, part_size * _LARGE_READ_WINDOW)
    limit = min(part_size, max(MIN_SEGMENT, -(-size // _REQUESTS // MiB) * MiB))
    wanted = ByteRange(min(span.stop, size), min(span.stop + window, size))
    pieces: list[ByteRange] = []
    for gap in gaps(wanted, held):
        for piece in split(gap, limit):
            if len(piece) < limit and piece.stop == wanted.stop < size:
                return pieces  # too small for a separate request: the next read extends it
            pieces.append(piece)
    return pieces


def to_evict(segments: Sequence[S], span: ByteRange, streak: int, limit: int) -> list[S]:
    """Which of the sorted *segments* to evict after *span* was read.

    For a sequential reader, all segments before *span* except the last one, since it may seek back a little. For a
    random reader, segments from the start of the blob and then from its end, until the others hold at most *limit*
    bytes.
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
    """Bytes to borrow for a segment. Most segments borrow a whole part, so that their buffers can be reused."""
    return part_size if MIN_SEGMENT <= len(span) <= part_size else len(span)
