"""What a load reads: each source once, checked against what is stored, cut into pieces of blobs. No I/O."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.distributed.checkpoint.planner import LoadItemType, ReadItem

from azstoragetorch._engine.config import KiB
from azstoragetorch._tensors.planning import Box, Piece, Request, StoredBox, contiguous_strides, cut, join
from azstoragetorch.checkpoint._format import Item, Payload
from azstoragetorch.exceptions import CheckpointError

_PROBED = 256 * KiB  # items of unknown inner layout below are fetched and decoded whole


@dataclass(slots=True, eq=False)
class Read:
    """One thing to load, what is known about it, and how far it is. Without *payload* its item is decoded whole."""

    wanted: ReadItem
    item: Item
    payload: Payload | None
    target: torch.Tensor | None = None
    pieces_left: int = 0
    followers: list[Read] = field(default_factory=list)
    """Reads of the very same bytes."""

    @property
    def key(self) -> str:
        """The entry of the state dict."""
        return self.wanted.dest_index.fqn

    @property
    def box(self) -> Box:
        """What is wanted of the stored tensor."""
        return Box(tuple(self.wanted.storage_offsets), tuple(self.wanted.lengths))

    @property
    def needs_probe(self) -> bool:
        """Whether to look at both ends of the item for its layout, rather than to fetch all of it."""
        is_tensor = self.wanted.type == LoadItemType.TENSOR
        return is_tensor and self.payload is None and not self.item.transforms and self.item.length >= _PROBED

    @property
    def sinks(self) -> list[Read]:
        """All reads that want what is read here."""
        return [self, *self.followers]


def reads_of(wanted: Iterable[tuple[ReadItem, Item]]) -> list[Read]:
    """What to read for everything *wanted*: reads of the very same bytes follow the first of them."""
    reads: dict[Any, Read] = {}
    for item_wanted, item in wanted:
        is_tensor = item_wanted.type == LoadItemType.TENSOR
        read = Read(item_wanted, item, item.payload if is_tensor and not item.transforms else None)
        key = (item.path, item.offset, item.length, is_tensor, tuple(item_wanted.storage_offsets), read.box.lengths)
        first = reads.setdefault(key, read)
        if first is not read:
            first.followers.append(read)
    return list(reads.values())


def plan(reads: list[Read], limit: int) -> list[Request]:
    """The requests, of about *limit* bytes at most, that fetch all of *reads*.

    Raises:
        CheckpointError: something is wanted that is not in what is stored.
    """
    pieces: list[Piece] = []
    for number, read in enumerate(reads):
        _check(read)
        before = len(pieces)
        pieces += _pieces(number, read, limit)
        read.pieces_left = len(pieces) - before
    return join(pieces, limit)


def named(keys: list[str]) -> str:
    """*keys* in a few words."""
    more = len(set(keys)) - 1
    return f"{keys[0]!r}" + (f" and {more} more" if more else "")


def _check(read: Read) -> None:
    if read.payload is None:
        return
    box, shape = read.box, read.payload.shape
    fits = len(box.lengths) == len(shape) and all(
        offset + length <= size for offset, length, size in zip(box.offsets, box.lengths, shape, strict=True)
    )
    if not fits:
        raise CheckpointError(
            f"{read.key!r} is stored in the shape {shape}, of which {box.lengths} at {box.offsets} is asked for",
            key=read.key,
        )


def _pieces(number: int, read: Read, limit: int) -> Iterator[Piece]:
    item, payload = read.item, read.payload
    if payload is None or not payload.is_contiguous:
        read.payload = None
        if item.length:
            yield Piece(item.path, item.offset, item.offset + item.length, number, read.box)
        return
    base, nbytes = item.offset + payload.offset, payload.nbytes
    if tuple(read.wanted.lengths) == payload.shape and 0 < nbytes <= limit:
        yield Piece(item.path, base, base + nbytes, number, read.box)  # most are like this
    elif all(read.wanted.lengths):
        strides = contiguous_strides(payload.shape)
        yield from cut(StoredBox(item.path, base, payload.dtype.itemsize, strides, read.box), number, limit)
