"""Plans over byte ranges, by their properties."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from azstoragetorch._blob.ranges import ByteRange, coalesce, gaps, split


@st.composite
def spans(draw: st.DrawFn, limit: int = 200) -> ByteRange:
    start = draw(st.integers(0, limit))
    return ByteRange(start, draw(st.integers(start, limit)))


def covered(ranges: list[ByteRange]) -> set[int]:
    return {place for span in ranges for place in range(span.start, span.stop)}


def is_sorted_and_disjoint(ranges: list[ByteRange]) -> bool:
    return all(left.stop <= right.start for left, right in pairwise(ranges))


sorted_spans = st.lists(spans(), max_size=12).map(sorted)


@pytest.mark.parametrize(("start", "stop"), [(-1, 0), (1, 0), (-2, -1)])
def test_a_range_runs_forward_from_zero(start: int, stop: int) -> None:
    with pytest.raises(ValueError, match="not a byte range"):
        ByteRange(start, stop)


def test_the_header_names_the_last_byte() -> None:
    assert ByteRange(0, 1).header == "bytes=0-0"
    assert ByteRange(5, 10).header == "bytes=5-9"


@given(spans(), st.integers(1, 50))
def test_split_covers_the_span_in_order_with_pieces_of_the_limit(span: ByteRange, limit: int) -> None:
    pieces = split(span, limit)
    assert covered(pieces) == covered([span])
    assert is_sorted_and_disjoint(pieces)
    assert all(len(piece) == limit for piece in pieces[:-1])
    assert all(0 < len(piece) <= limit for piece in pieces)


@given(spans(), sorted_spans)
def test_gaps_are_exactly_what_is_not_covered(span: ByteRange, pieces: list[ByteRange]) -> None:
    disjoint = [piece for at, piece in enumerate(pieces) if not at or piece.start >= max(p.stop for p in pieces[:at])]
    missing = gaps(span, disjoint)
    assert covered(missing) == covered([span]) - covered(disjoint)
    assert is_sorted_and_disjoint(missing)
    assert all(len(gap) > 0 for gap in missing)


@given(sorted_spans, st.integers(0, 30), st.integers(1, 100))
def test_coalesce_loses_no_byte_and_fetches_none_twice(pieces: list[ByteRange], max_gap: int, limit: int) -> None:
    joined = coalesce(pieces, max_gap=max_gap, limit=limit)
    assert covered(pieces) <= covered(joined)
    assert is_sorted_and_disjoint(joined)
    for piece in pieces:
        assert any(whole.start <= piece.start and piece.stop <= whole.stop for whole in joined)


@given(sorted_spans, st.integers(0, 30), st.integers(1, 100))
def test_coalesce_joins_across_small_gaps_up_to_the_limit(pieces: list[ByteRange], max_gap: int, limit: int) -> None:
    joined = coalesce(pieces, max_gap=max_gap, limit=limit)
    for hole in gaps(ByteRange(joined[0].start, max(s.stop for s in joined)), joined) if joined else []:
        left = next(span for span in joined if span.stop == hole.start)
        right = next(piece for piece in pieces if piece.start == hole.stop)
        assert len(hole) > max_gap or right.stop - left.start > limit
    longest = max((len(piece) for piece in pieces), default=0)
    for span in joined:
        inside = [piece for piece in pieces if span.start <= piece.start < span.stop]
        overlap = any(right.start < left.stop for left, right in pairwise(inside))
        assert len(span) <= max(limit, longest) or overlap
        assert all(len(hole) <= max_gap for hole in gaps(span, merged(inside)))


def merged(pieces: list[ByteRange]) -> list[ByteRange]:
    return coalesce(pieces, max_gap=0, limit=1 << 60)
