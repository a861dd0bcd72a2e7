"""Plans over bytes: how reads are cut into ranges, and writes into blocks. Pure functions, no I/O."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from azstoragetorch._engine.config import MAX_BLOCK_SIZE, MiB, TransferConfig


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


MAX_BLOCKS = 50_000  # the service's limit for a committed blob
_GROW_AFTER = 1_000  # blocks; past it blocks grow with the length written, so that some 170 TiB fit under the limit
_MIN_CUT = 8 * MiB  # below this the cost of a request counts more than a further connection is worth
_COLLECTED_SHARE = 4  # a block that is collected in memory takes at most this part of the memory limit


def block_size_at(written: int, first: int) -> int:
    """Bytes of the next block after *written* bytes in blocks, the first of which had *first* bytes."""
    return min(MAX_BLOCK_SIZE, max(first, -(-written // _GROW_AFTER)))


def growing_blocks(written: int, first: int) -> Iterator[int]:
    """The sizes of all further blocks after *written* bytes."""
    while True:
        size = block_size_at(written, first)
        yield size
        written += size


def collected_block(written: int, config: TransferConfig) -> int:
    """Bytes of the next block if it is collected in memory."""
    size = block_size_at(written, config.block_size)
    return max(config.block_size, min(size, config.memory_limit // _COLLECTED_SHARE))


def busy_length(written: int, config: TransferConfig) -> int:
    """Bytes of a write that is long enough to keep every connection busy by itself."""
    return max(collected_block(written, config), config.initial_concurrency * min(config.block_size, _MIN_CUT))


def even_blocks(length: int, written: int, config: TransferConfig) -> list[ByteRange]:
    """Cut a write of *length* bytes into blocks of about one size, as many as may be sent at once if that pays."""
    share = -(-length // config.initial_concurrency)  # one connection is slower than the network
    return even_cuts(length, block_size_at(written, min(config.block_size, max(_MIN_CUT, share))))


def even_cuts(length: int, limit: int) -> list[ByteRange]:
    """Cut *length* bytes into the fewest pieces of at most *limit* bytes, all of about one size."""
    if not length:
        return []
    count = -(-length // limit)
    return split(ByteRange(0, length), -(-length // count))


def regroup(pieces: Iterable[memoryview], sizes: Iterable[int]) -> Iterator[list[memoryview]]:
    """The bytes of *pieces*, in order, as blocks of *sizes* bytes; the last block is shorter if the pieces end there.

    A block is a list of views, none of them empty. A piece is drawn when the block that it begins in is asked for.
    """
    remaining = iter(sizes)
    block: list[memoryview] = []
    room = next(remaining, 0)
    for piece in pieces:
        while piece.nbytes:
            head, piece = piece[:room], piece[room:]
            block.append(head)
            room -= head.nbytes
            if not room:
                yield block
                block, room = [], next(remaining, 0)
    if block:
        yield block
