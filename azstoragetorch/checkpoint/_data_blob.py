"""Write one data blob: with one request if it is small, else in blocks. The service copies unchanged blocks."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator

from azstoragetorch._blob.client import BlockContent, CopyOrUpload, CopyRange
from azstoragetorch._engine.config import MiB, TransferConfig
from azstoragetorch._engine.ranges import ByteRange, growing_blocks, regroup
from azstoragetorch._engine.scope import Scope, on_error
from azstoragetorch.checkpoint._base import Base
from azstoragetorch.checkpoint._encoding import Encoder
from azstoragetorch.checkpoint._folder import Folder
from azstoragetorch.checkpoint._unchanged import Part, Unchanged

_SINGLE = 24 * MiB  # a blob up to this size is copied together and put at once, which saves a round trip
_WHOLE = 64 * MiB  # a blob up to this size is one block: another try sends no more than this again


def block_size_of(size: int, transfer: TransferConfig, *, has_base: bool = False) -> int:
    """Bytes of a block of a blob of about *size* bytes: all, unless another try would send too much again.

    With a base it is not known how much will be sent: blocks are shorter, and there are more requests at once.
    """
    return max(transfer.block_size, size if size <= _WHOLE and not has_base else 0)


def write_blob(folder: Folder, encoder: Encoder, base: Base | None, concurrency: int, scope: Scope) -> None:
    """Write what *encoder* makes as one blob of *folder*, in at most *concurrency* requests at once.

    Raises:
        Exception: what the encoder raised.
        FatalBlobIOWriteError: the service refused the request, or could not be reached. The blob is not there.
    """
    transfer = folder.transfer
    single = min(_SINGLE, 3 * transfer.block_size // 2)
    writer = folder.blob(encoder.name).writer()
    with on_error(writer.abort), scope.holding(writer.cancel):
        parts = encoder.pieces(scope)
        first: list[Part] = []
        if encoder.size_hint <= single:
            first = list(_until(single, parts))
        together = [part for part in first if not isinstance(part, Unchanged)]
        if encoder.is_done and len(together) == len(first):
            writer.put(together)
            return
        blocks = _blocks(
            itertools.chain(first, parts), block_size_of(encoder.size_hint, transfer, has_base=base is not None), base
        )
        writer.write_blocks(blocks, concurrency=concurrency)
        writer.commit()


def _blocks(parts: Iterable[Part], block_size: int, base: Base | None) -> Iterator[BlockContent]:
    """*parts* as blocks: what is unchanged as it is, and what is between as blocks of *block_size* bytes or more."""
    written = 0
    for is_unchanged, group in itertools.groupby(parts, lambda part: isinstance(part, Unchanged)):
        if is_unchanged:
            for part in group:
                assert isinstance(part, Unchanged)
                assert base is not None  # it is what the part was found in
                written += part.stop - part.start
                yield _copied(part, base)
        else:
            pieces = (part for part in group if not isinstance(part, Unchanged))
            sizes = growing_blocks(written, block_size)
            for block in regroup(pieces, sizes if base is None else map(base.cut, sizes)):
                written += sum(piece.nbytes for piece in block)
                yield block


def _copied(part: Unchanged, base: Base) -> CopyOrUpload:
    source = base.folder.blob(part.path).copy_source(part.etag)
    copied = CopyRange(source, ByteRange(part.start, part.stop))
    return CopyOrUpload(copied, part.pieces, lambda: base.is_usable, base.refused)


def _until(size: int, parts: Iterator[Part]) -> Iterator[Part]:
    """The first of *parts*, until they are longer than *size* together; only of tensors the size is known before."""
    taken = 0
    for part in parts:
        yield part
        taken += part.stop - part.start if isinstance(part, Unchanged) else part.nbytes
        if taken > size:
            return
