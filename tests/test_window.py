"""The window: a plan that never fetches a byte twice, stays within the blob, and follows the reader."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from azstoragetorch._blob import window
from azstoragetorch._blob.window import AccessPattern
from azstoragetorch._engine.config import KiB, MiB
from azstoragetorch._engine.ranges import ByteRange

PART = 8 * MiB
sizes = st.integers(1, 300 * MiB)


@st.composite
def layouts(draw: st.DrawFn) -> tuple[int, list[ByteRange]]:
    """The size of a blob, and segments of it: sorted, disjoint, not empty."""
    size = draw(sizes)
    cuts = sorted(draw(st.sets(st.integers(0, size), max_size=8)))
    return size, [ByteRange(low, high) for low, high in zip(cuts[::2], cuts[1::2], strict=False)]


@dataclass(eq=False)
class Segment:
    span: ByteRange
    is_kept: bool = False

    @property
    def reserved(self) -> int:
        return len(self.span)


def overlap(one: ByteRange, other: ByteRange) -> bool:
    return max(one.start, other.start) < min(one.stop, other.stop)


@given(layouts(), st.integers(0, 300 * MiB), st.integers(1, 64 * MiB), st.integers(0, 8), st.integers(0, 256 * MiB))
def test_what_is_fetched_ahead_lies_behind_the_read_and_is_held_nowhere(
    layout: tuple[int, list[ByteRange]], start: int, length: int, streak: int, read_ahead: int
) -> None:
    size, held = layout
    start = min(start, size - 1)
    span = ByteRange(start, min(start + length, size))
    pieces = window.segments_ahead(span, streak, size, held, PART, read_ahead)
    assert pieces == sorted(pieces)
    assert all(span.stop <= piece.start < piece.stop <= min(size, span.stop + read_ahead) for piece in pieces)
    assert all(len(piece) <= PART for piece in pieces)
    assert not any(overlap(piece, other) for piece in pieces for other in [*held, *pieces] if piece is not other)


@given(layouts(), st.integers(0, 300 * MiB), st.integers(1, MiB), st.booleans())
def test_around_a_small_gap_is_at_least_the_gap_and_held_nowhere(
    layout: tuple[int, list[ByteRange]], start: int, length: int, at_end: bool
) -> None:
    size, held = layout
    end = window.tail(size) if at_end else None
    start = max(min(start, size - 1), end.start if end else 0)
    stop = min([start + length, size, *(piece.start for piece in held if piece.start > start)])
    gap = ByteRange(start, stop)
    if any(overlap(gap, piece) for piece in held) or not len(gap):
        return
    wanted = window.extend(gap, size, held, end)
    assert wanted.start <= gap.start < gap.stop <= wanted.stop <= size
    assert not any(overlap(wanted, piece) for piece in held)


@given(sizes)
def test_the_tail_is_the_end_and_small(size: int) -> None:
    end = window.tail(size)
    assert end.stop == size
    assert len(end) == min(size, max(256 * KiB, min(size >> 9, 4 * MiB)))


def test_reading_in_sequence_doubles_the_window_and_a_jump_ends_it() -> None:
    pattern, size, windows = AccessPattern(), 10_000 * MiB, []
    for at in range(12):
        span = ByteRange(at * KiB, (at + 1) * KiB)
        pattern = pattern.after(span, PART)
        windows.append(sum(map(len, window.segments_ahead(span, pattern.streak, size, [], PART, 10_000 * MiB))))
    assert windows[0] == PART
    assert all(later in (earlier, 2 * earlier) for earlier, later in pairwise(windows))
    assert windows[-1] == 256 * PART
    assert pattern.after(ByteRange(5000 * MiB, 5001 * MiB), PART).streak == 0


def test_a_large_read_needs_only_a_few_parts_behind_it() -> None:
    span = ByteRange(0, 64 * MiB)
    assert sum(map(len, window.segments_ahead(span, 8, 10_000 * MiB, [], PART, 10_000 * MiB))) == 4 * PART


def test_the_end_after_the_beginning_is_how_archives_are_opened() -> None:
    """The directory of an archive is read after its first bytes; the bytes between are needed next."""
    opened = AccessPattern().after(ByteRange(0, 30), PART).after_tail()
    assert opened == AccessPattern(ByteRange(0, 30), 4)
    elsewhere = AccessPattern(ByteRange(50, 60), 3)
    assert elsewhere.after_tail() is elsewhere
    assert AccessPattern().after_tail() == AccessPattern()


def test_a_sequential_reader_leaves_behind_all_but_the_last_segment_it_passed() -> None:
    segments = [Segment(ByteRange(at, at + 10)) for at in range(0, 60, 10)]
    segments[1].is_kept = True
    evicted = window.to_evict(segments, ByteRange(40, 45), 3, 1000)
    assert [segment.span.start for segment in evicted] == [0, 20]


@given(layouts(), st.integers(0, 300 * MiB), st.integers(0, 400 * MiB), st.sets(st.integers(0, 3)))
def test_a_random_reader_evicts_no_more_than_its_limit_asks(
    layout: tuple[int, list[ByteRange]], start: int, limit: int, kept: set[int]
) -> None:
    _, held = layout
    segments = [Segment(span, number in kept) for number, span in enumerate(held)]
    read = ByteRange(start, start + 1)
    evicted = window.to_evict(segments, read, 0, limit)
    left = [segment for segment in segments if segment not in evicted]
    assert not any(segment.is_kept or overlap(segment.span, read) for segment in evicted)
    in_the_way = [segment for segment in left if not segment.is_kept and not overlap(segment.span, read)]
    assert sum(segment.reserved for segment in left) <= limit or not in_the_way
    if evicted:
        assert sum(segment.reserved for segment in [*left, evicted[-1]]) > limit


def test_few_sizes_of_buffers() -> None:
    for length in (1, 100, 4 * MiB - 1, 4 * MiB, PART - 1, PART, PART + 1):
        reserved = window.reserve_for(ByteRange(5, 5 + length), PART)
        assert reserved == (PART if 4 * MiB <= length <= PART else length)
