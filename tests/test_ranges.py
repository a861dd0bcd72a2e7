"""Property tests of plans over byte ranges."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice, pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from azstoragetorch._engine.config import GiB, KiB, MiB, TransferConfig
from azstoragetorch._engine.ranges import (
    ByteRange,
    block_size_at,
    busy_length,
    coalesce,
    collected_block,
    even_blocks,
    gaps,
    growing_blocks,
    regroup,
    split,
)


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


configs = st.builds(
    TransferConfig,
    block_size=st.integers(64 * KiB, 64 * MiB),
    max_concurrency=st.integers(1, 64),
    memory_limit=st.integers(1 * MiB, 1 * GiB),
)


@given(st.integers(0, 1 << 40), st.integers(64 * KiB, 64 * MiB))
def test_blocks_grow_by_the_sizes_that_are_asked_for_one_by_one(written: int, first: int) -> None:
    for size in islice(growing_blocks(written, first), 5):
        assert size == block_size_at(written, first)
        written += size


@given(st.integers(0, 1 << 44), configs)
def test_a_collected_block_leaves_memory_to_others(written: int, config: TransferConfig) -> None:
    size = collected_block(written, config)
    assert size >= config.block_size
    assert size <= max(config.block_size, config.memory_limit // 4)
    assert busy_length(written, config) >= size


@given(st.integers(1, 1 << 32), st.integers(0, 1 << 40), configs)
def test_a_large_write_is_cut_into_blocks_within_the_limit(length: int, written: int, config: TransferConfig) -> None:
    cuts = even_blocks(length, written, config)
    assert cuts[0].start == 0
    assert cuts[-1].stop == length
    assert all(left.stop == right.start for left, right in pairwise(cuts))
    assert max(map(len, cuts)) <= block_size_at(written, config.block_size)


pieces_of_bytes = st.lists(st.binary(max_size=40), max_size=10)


@given(pieces_of_bytes, st.lists(st.integers(1, 30), max_size=20))
def test_regrouped_pieces_are_the_same_bytes_in_blocks_of_the_sizes(pieces: list[bytes], sizes: list[int]) -> None:
    whole = b"".join(pieces)
    sizes = [*sizes, *[7] * len(whole)]  # enough for all
    blocks = list(regroup(map(memoryview, pieces), sizes))
    lengths = [sum(view.nbytes for view in block) for block in blocks]
    assert b"".join(bytes(view) for block in blocks for view in block) == whole
    assert lengths[:-1] == sizes[: len(lengths)][:-1]
    assert all(0 < length <= size for length, size in zip(lengths, sizes, strict=False))
    assert all(view.nbytes for block in blocks for view in block)


@given(pieces_of_bytes, st.integers(1, 30))
def test_a_piece_is_drawn_when_the_block_that_it_begins_in_is_asked_for(pieces: list[bytes], size: int) -> None:
    """At most one block, and the piece that it ends in, wait to be sent."""
    drawn = 0

    def source() -> Iterator[memoryview]:
        nonlocal drawn
        for piece in pieces:
            drawn += len(piece)
            yield memoryview(piece)

    sent = 0
    for block in regroup(source(), iter(lambda: size, 0)):
        sent += sum(view.nbytes for view in block)
        assert drawn - sent <= max(map(len, pieces))
