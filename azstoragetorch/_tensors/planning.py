"""Which bytes to ask for, in which requests: pure functions, no I/O.

What is wanted of a tensor is a box: a range of indices in every dimension. A box is cut into smaller ones whose bytes
lie close together; neighbours in a blob are joined into one request as long as little is fetched in vain.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from azstoragetorch._engine.config import KiB

NEAR = 16 * KiB  # a gap this small is always fetched as well: it holds what stands between two tensors
FAR = 512 * KiB  # a gap this large costs more than a separate request: some 10 ms at 60 MB/s
WASTE = 1 / 4  # share of a request that may be fetched in vain, beyond small gaps
EXCESS = 1 / 4  # share by which a request may be too long, rather than to be cut into two that are short
_GRAIN = 16  # boxes are cut at rows of at most this fraction of a request, so that requests come out about full


class Box(NamedTuple):
    """``lengths[d]`` indices from ``offsets[d]`` on in every dimension *d*."""

    offsets: tuple[int, ...]
    lengths: tuple[int, ...]


class StoredBox(NamedTuple):
    """A box of a stored array: ``base`` is the byte in the blob of its element zero, strides count elements."""

    blob: str
    base: int
    itemsize: int
    strides: tuple[int, ...]
    box: Box


class Piece(NamedTuple):
    """Bytes ``start <= i < stop`` of a blob that hold ``box``, which is counted from the box of the whole read.

    ``is_dense`` says that they hold nothing else; ``read`` is the number of the read.
    """

    blob: str
    start: int
    stop: int
    read: int
    box: Box
    is_dense: bool = True


class Request(NamedTuple):
    """Bytes ``start <= i < stop`` of a blob, and the pieces in them by their start."""

    blob: str
    start: int
    stop: int
    pieces: tuple[Piece, ...]


def extent(source: StoredBox, box: Box) -> tuple[int, int]:
    """First byte and one past the last byte in the blob of *box*, which lies in ``source.box``."""
    first = last = 0
    for base, offset, length, stride in zip(source.box.offsets, box.offsets, box.lengths, source.strides, strict=True):
        first += (base + offset) * stride
        last += (base + offset + length - 1) * stride
    return source.base + first * source.itemsize, source.base + (last + 1) * source.itemsize


def cut(source: StoredBox, read: int, limit: int) -> Iterator[Piece]:
    """Cut the box of *source* into pieces of at most about *limit* bytes, in the order of their indices.

    Every piece is made of whole rows of some dimension. Rows that lie far apart become separate pieces.
    """
    lengths = source.box.lengths
    rank = len(lengths)
    # Bytes from the first to the last of dimensions d.., and whether the rows of d lie close enough to come together.
    spans, is_close = [source.itemsize] * (rank + 1), [True] * rank
    for dim in reversed(range(rank)):
        step = source.strides[dim] * source.itemsize
        is_close[dim] = lengths[dim] == 1 or step - spans[dim + 1] <= FAR
        spans[dim] = step * (lengths[dim] - 1) + spans[dim + 1]
    if not rank or (spans[0] <= limit and all(is_close)):
        yield _piece(source, read, Box((0,) * rank, lengths))
        return
    inner = rank
    while inner > 1 and is_close[inner - 1] and spans[inner - 1] <= limit // _GRAIN:
        inner -= 1
    dim = inner - 1
    step, span, count = source.strides[dim] * source.itemsize, spans[inner], lengths[dim]
    rows = max(1, (limit - span) // max(step, 1) + 1) if is_close[dim] else 1
    rows = -(-count // -(-count // rows))  # of about one size: a tiny last piece would be a request for little
    for outer in itertools.product(*map(range, lengths[:dim])):
        for at in range(0, count, rows):
            taken = min(rows, count - at)
            box = Box((*outer, at, *(0,) * (rank - inner)), (*(1,) * dim, taken, *lengths[inner:]))
            yield _piece(source, read, box)


def boxes(lengths: Sequence[int], itemsize: int, limit: int) -> Iterator[Box]:
    """Boxes of at most *limit* bytes, or of one element, that make up an array of *lengths*, in order."""
    strides = contiguous_strides(lengths)
    whole = StoredBox("", 0, itemsize, strides, Box((0,) * len(lengths), tuple(lengths)))
    if all(lengths):
        for piece in cut(whole, 0, limit):
            yield piece.box


def join(pieces: Sequence[Piece], limit: int) -> list[Request]:
    """Join *pieces*, of any order, into requests of about *limit* bytes at most.

    Pieces that overlap get into one request whatever its length, so that no byte is fetched twice.
    """
    requests: list[Request] = []
    chain: list[Piece] = []
    blob, start, stop, wasted = "", 0, 0, 0
    for piece in sorted(pieces, key=lambda piece: (piece.blob, piece.start, piece.stop)):
        if chain and piece.blob == blob:
            gap = piece.start - stop
            waste = wasted + max(gap, 0)
            length = max(stop, piece.stop) - start
            if gap <= NEAR or (gap <= FAR and waste <= WASTE * length):
                chain.append(piece)
                stop, wasted = max(stop, piece.stop), waste
                continue
        requests += _split_chain(chain, limit)
        chain, blob, start, stop, wasted = [piece], piece.blob, piece.start, piece.stop, 0
    requests += _split_chain(chain, limit)
    return requests


def _split_chain(chain: Sequence[Piece], limit: int) -> Iterator[Request]:
    """Cut a *chain* of neighbours, at borders of pieces, into few requests, all of about one length."""
    if not chain:
        return
    start, stop = chain[0].start, max(piece.stop for piece in chain)
    count = max(1, math.ceil((stop - start) / limit - EXCESS))
    done = 0
    group, end = [chain[0]], chain[0].stop
    for piece in chain[1:]:
        # The piece that a border would cut goes to the side where more of it is.
        border = start + (stop - start) * (done + 1) // count
        if (piece.start + piece.stop) / 2 > border and piece.start >= end:
            yield Request(piece.blob, group[0].start, end, tuple(group))
            done = max(done + 1, (piece.start - start) * count // (stop - start))
            group = []
        group.append(piece)
        end = max(end, piece.stop)
    yield Request(chain[0].blob, group[0].start, end, tuple(group))


def partition(sizes: Sequence[int], parts: int) -> list[range]:
    """Cut the sequence of *sizes* into at most *parts* consecutive runs of about the same total; none is empty."""
    total, runs, at, done = sum(sizes), [], 0, 0
    for part in range(1, parts + 1):
        begin = at
        # The size that a border would cut goes to the side where more of it is.
        while at < len(sizes) and (part == parts or done + sizes[at] / 2 <= total * part / parts):
            done += sizes[at]
            at += 1
        if at > begin:
            runs.append(range(begin, at))
    return runs


def contiguous_strides(shape: Sequence[int]) -> tuple[int, ...]:
    """Strides, in elements, of a contiguous array of *shape*."""
    strides, step = [], 1
    for size in reversed(shape):
        strides.append(step)
        step *= max(size, 1)
    return tuple(reversed(strides))


def _piece(source: StoredBox, read: int, box: Box) -> Piece:
    start, stop = extent(source, box)
    return Piece(source.blob, start, stop, read, box, stop - start == math.prod(box.lengths) * source.itemsize)
