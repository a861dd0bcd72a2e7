"""Plans are pure functions, so they are compared with indexing of small arrays."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from azstoragetorch._tensors.planning import (
    FAR,
    NEAR,
    WASTE,
    Box,
    Piece,
    StoredBox,
    boxes,
    contiguous_strides,
    cut,
    join,
    partition,
)

MiB = 1 << 20


@st.composite
def sources(draw: st.DrawFn) -> tuple[StoredBox, tuple[int, ...]]:
    shape = tuple(draw(st.lists(st.integers(1, 6), max_size=4)))
    box = []
    for size in shape:
        offset = draw(st.integers(0, size - 1))
        box.append((offset, draw(st.integers(1, size - offset))))
    itemsize = draw(st.sampled_from([1, 2, 4, 8, 16]))
    whole = Box(tuple(o for o, _ in box), tuple(n for _, n in box))
    return StoredBox("blob", draw(st.integers(0, 1000)), itemsize, contiguous_strides(shape), whole), shape


@given(sources(), st.integers(1, 5000))
def test_pieces_hold_every_element_of_the_box_once_and_lie_where_they_say(
    case: tuple[StoredBox, tuple[int, ...]], limit: int
) -> None:
    source, shape = case
    where = torch.arange(math.prod(shape)).reshape(shape) * source.itemsize + source.base
    for dim, (offset, length) in enumerate(zip(source.box.offsets, source.box.lengths, strict=True)):
        where = where.narrow(dim, offset, length)
    seen = torch.zeros(where.shape, dtype=torch.int)
    for piece in cut(source, 7, limit):
        part, count = where, seen
        for dim, (offset, length) in enumerate(zip(piece.box.offsets, piece.box.lengths, strict=True)):
            part, count = part.narrow(dim, offset, length), count.narrow(dim, offset, length)
        count += 1
        assert piece.read == 7
        assert piece.start == int(part.min())
        assert piece.stop == int(part.max()) + source.itemsize
        assert piece.is_dense == (piece.stop - piece.start == part.numel() * source.itemsize)
    assert bool((seen == 1).all())


@given(st.lists(st.integers(0, 7), max_size=4), st.sampled_from([1, 4, 16]), st.integers(1, 500))
def test_boxes_make_up_the_array_in_order_within_the_limit(shape: list[int], itemsize: int, limit: int) -> None:
    array = torch.arange(math.prod(shape)).reshape(shape)
    found = []
    for box in boxes(shape, itemsize, limit):
        part = array
        for dim, (offset, length) in enumerate(zip(box.offsets, box.lengths, strict=True)):
            part = part.narrow(dim, offset, length)
        assert part.numel() * itemsize <= max(limit, itemsize)
        found += part.flatten().tolist()
    assert found == list(range(math.prod(shape)))


@st.composite
def many_pieces(draw: st.DrawFn) -> list[Piece]:
    spans = draw(st.lists(st.tuples(st.integers(0, 40), st.integers(1, 20), st.sampled_from("ab")), max_size=30))
    return [Piece(b, s * 50_000, (s + n) * 50_000, i, Box((), ())) for i, (s, n, b) in enumerate(spans)]


@settings(max_examples=300)
@given(many_pieces(), st.integers(50_000, 3_000_000))
def test_requests_carry_every_piece_and_fetch_no_byte_twice(pieces: list[Piece], limit: int) -> None:
    requests = join(pieces, limit)
    assert sorted(p.read for r in requests for p in r.pieces) == [p.read for p in pieces]
    for request in requests:
        assert all(p.blob == request.blob and request.start <= p.start < p.stop <= request.stop for p in request.pieces)
        assert request.start == min(p.start for p in request.pieces)
        assert request.stop == max(p.stop for p in request.pieces)
        covered = {b for p in request.pieces for b in range(p.start, p.stop, 50_000)}
        wasted = request.stop - request.start - 50_000 * len(covered)
        assert wasted <= max(WASTE * (request.stop - request.start) * 2, NEAR * len(request.pieces))
    for one, two in pairwise(requests):
        assert one.blob < two.blob or one.stop <= two.start


def test_neighbours_share_requests_of_even_length() -> None:
    """94 MiB in 318 tensors, with the bytes between them, are 12 requests."""
    pieces, at = [], 0
    for number, size in enumerate([1_840_000, *[2048] * 5] * 53):
        pieces.append(Piece("blob", at, at + size, number, Box((), ())))
        at += size + 1600
    requests = join(pieces, 8 * MiB)
    assert len(requests) == 12
    lengths = [r.stop - r.start for r in requests]
    assert max(lengths) < 1.3 * min(lengths)


def test_far_apart_is_not_fetched_along() -> None:
    pieces = [Piece("blob", at, at + 10, 0, Box((), ())) for at in (0, FAR * 2, FAR * 4)]
    assert len(join(pieces, 8 * MiB)) == 3


def test_rows_far_apart_are_fetched_alone_and_close_ones_with_what_lies_between() -> None:
    """A column slice: rows of 4 MiB of which 1 MiB is wanted, then rows of 16 KiB of which 2 KiB is."""
    wide = StoredBox("b", 0, 4, (MiB, 1), Box((0, 0), (8, MiB // 4)))
    assert [p.is_dense for p in cut(wide, 0, 8 * MiB)] == [True] * 8
    narrow = StoredBox("b", 0, 4, (4096, 1), Box((0, 512), (256, 512)))
    (piece,) = cut(narrow, 0, 8 * MiB)
    assert not piece.is_dense
    assert piece.stop - piece.start == 255 * 16384 + 2048


def test_tensors_beyond_2_and_4_gib_are_cut_by_exact_arithmetic() -> None:
    shape = (70_000, 40_000)  # 11.2 GB of float32
    source = StoredBox("b", 704, 4, contiguous_strides(shape), Box((0, 0), shape))
    pieces = list(cut(source, 0, 8 * MiB))
    assert (pieces[0].start, pieces[-1].stop) == (704, 704 + 70_000 * 40_000 * 4)
    assert all(a.stop == b.start for a, b in pairwise(pieces))
    assert max(p.stop - p.start for p in pieces) <= 8 * MiB


@given(st.lists(st.integers(0, 100), max_size=40), st.integers(1, 8))
def test_partition_keeps_order_and_leaves_nothing_out(sizes: list[int], parts: int) -> None:
    runs = partition(sizes, parts)
    assert [i for run in runs for i in run] == list(range(len(sizes)))
    assert len(runs) <= parts
    assert all(len(run) for run in runs)


def test_partition_is_about_even() -> None:
    assert [len(run) for run in partition([32] * 16, 16)] == [1] * 16
    assert [len(run) for run in partition([10] * 12, 4)] == [3] * 4


@pytest.mark.parametrize("shape", [(), (1,), (3, 0, 2)])
def test_strides_of_small_shapes_are_torchs(shape: tuple[int, ...]) -> None:
    assert contiguous_strides(shape) == torch.empty(shape).stride()
