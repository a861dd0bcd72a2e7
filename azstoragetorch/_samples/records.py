"""Records of a blob that is read in ranges: which records belong to a range, and how to read only these.

A range owns the records that start in it. The reader of a range looks for the first delimiter in it to find where its
records begin, and reads past its end to finish the last one. So different processes can read the ranges without
coordination, and each record is read by exactly one.
"""

from __future__ import annotations

from collections.abc import Callable


def check_delimiter(delimiter: bytes) -> None:
    """Check that *delimiter* can be found from anywhere in a blob.

    Raises:
        ValueError: it is empty, or can overlap itself: which of its occurrences count would depend on where reading
            began.
    """
    if not delimiter:
        raise ValueError("align must not be empty: pass the bytes that end a record, such as b'\\n'")
    if any(delimiter.startswith(delimiter[cut:]) for cut in range(1, len(delimiter))):
        raise ValueError(f"align={delimiter!r} can overlap itself, so that records have no certain borders")


def lookahead(start: int, stop: int) -> int:
    """Bytes to read past *stop* at first, to finish the last record: less than 1 % of a range of some size."""
    return max(64, (stop - start) // 128)


def read_records(start: int, stop: int, size: int, delimiter: bytes, read: Callable[[int, int], bytes]) -> bytes:
    """The records that start at ``start <= i < stop`` of *size* bytes, the last one whole, each with its delimiter.

    *read* returns the bytes from one position to another. It is called once, and again only if the last record is
    longer than `lookahead`.
    """
    length = len(delimiter)
    begin = max(0, start - length)
    step = lookahead(start, stop)
    end = min(size, stop + step)
    data = read(begin, end)
    first = start
    if start:
        # A delimiter that ends at or after `start` is the end of a record of somebody else.
        found = data.find(delimiter)
        first = size if found < 0 else begin + found + length
        if first >= stop:
            return b""
    tail = bytearray()
    pieces = data
    at = max(first, stop - length) - begin  # the last record ends with the first delimiter that ends at or after `stop`
    while (found := pieces.find(delimiter, at)) < 0 and end < size:
        step *= 2
        more = read(end, min(size, end + step))
        end += len(more)
        tail += more
        # What was searched already can hold no more than the beginning of a delimiter.
        at, pieces = 0, pieces[max(at, len(pieces) - length + 1) :] + more
    last = size if found < 0 else end - len(pieces) + found + length
    whole = data + tail if tail else data
    return whole[first - begin : last - begin]
