"""Plans over byte ranges: pure functions, no I/O."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, order=True)
class ByteRange:
    """Bytes ``start <= i < stop`` of a blob."""

    start: int
    stop: int

    def __post_init__(self) -> None:
        if not 0 <= self.start <= self.stop:
            raise ValueError(f"not a byte range: {self.start}..{self.stop}")

    def __len__(self) -> int:
        return self.stop - self.start

    @property
    def header(self) -> str:
        """The value of ``x-ms-range``; the service knows no empty ranges."""
        return f"bytes={self.start}-{self.stop - 1}"


def split(span: ByteRange, limit: int) -> list[ByteRange]:
    """Cut *span* into consecutive pieces of at most *limit* bytes."""
    return [ByteRange(at, min(at + limit, span.stop)) for at in range(span.start, span.stop, limit)]


def gaps(span: ByteRange, covered: Iterable[ByteRange]) -> list[ByteRange]:
    """The parts of *span* that the sorted, disjoint ranges *covered* leave open, in order."""
    missing, at = [], span.start
    for piece in covered:
        if piece.stop <= at:
            continue
        if piece.start >= span.stop:
            break
        if piece.start > at:
            missing.append(ByteRange(at, piece.start))
        at = piece.stop
    if at < span.stop:
        missing.append(ByteRange(at, span.stop))
    return missing


def coalesce(spans: Iterable[ByteRange], *, max_gap: int, limit: int) -> list[ByteRange]:
    """Join sorted ranges whose gaps are at most *max_gap* bytes into ranges of at most *limit* bytes.

    A single range longer than *limit* stays whole. Overlapping ranges are joined whatever their length, so
    that no byte is fetched twice.
    """
    joined: list[ByteRange] = []
    for span in spans:
        last = joined[-1] if joined else None
        if last is not None and span.start < last.stop:
            joined[-1] = ByteRange(last.start, max(last.stop, span.stop))
        elif last is not None and span.start - last.stop <= max_gap and span.stop - last.start <= limit:
            joined[-1] = ByteRange(last.start, span.stop)
        else:
            joined.append(span)
    return joined
