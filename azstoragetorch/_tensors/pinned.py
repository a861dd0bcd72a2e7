"""Receive ranges of a blob into memory. All requests for a blob are pinned to one version of it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from azstoragetorch._blob.client import BlobClient, BlobVersion, RangeRead
from azstoragetorch._engine.job import Job
from azstoragetorch._engine.ranges import ByteRange, split
from azstoragetorch._engine.scope import Scope, on_error
from azstoragetorch._tensors.planning import Request


class TruncatedError(Exception):
    """A range is wanted that the blob, of *size* bytes, does not have."""

    def __init__(self, size: int) -> None:
        super().__init__(f"the blob has only {size} bytes")
        self.size = size


class PinnedBlob:
    """A blob, and the version that all requests are pinned to: *etag* if given, else that of the first response.

    *head* is the beginning of that version, if the caller already has it; it is not requested again.
    """

    def __init__(self, client: BlobClient, version: BlobVersion | None = None, head: bytes = b"") -> None:
        self.client = client
        self.etag = version.etag if version is not None else None
        self._size = version.size if version is not None else None
        self._head = memoryview(head)
        self._first: dict[None, Job[RangeRead]] = {}  # the request whose response says which version is read

    def receive(self, span: ByteRange, targets: Sequence[memoryview], scope: Scope) -> None:
        """Receive the bytes of *span* into *targets*, one after the other.

        Raises:
            TruncatedError: the blob is shorter.
            BlobChangedError: the blob no longer has the pinned version.
            AzureError: the service refused the request, or could not be reached.
        """
        if span.start < self._head.nbytes:
            known = self._head[span.start : span.stop]
            at = 0
            for target in cut_views(targets, 0, known.nbytes):
                target[:] = known[at : at + target.nbytes]
                at += target.nbytes
            targets = cut_views(targets, at, len(span))
            span = ByteRange(span.start + at, span.stop)
            if not len(span):
                return
        read = self._open(span, scope)
        if read.span != span:
            read.close()
            raise TruncatedError(read.version.size)
        read.receive(targets)

    def receive_request(
        self, request: Request, targets: Sequence[memoryview], scope: Scope, *, validated_part: int | None = None
    ) -> None:
        """Receive the bytes of *request*, those of each of its pieces into the target of that piece.

        With *validated_part*, the service computes an MD5 of each response, which covers at most so many bytes.
        Raises the same errors as `receive`.
        """
        parts, copies = scatter(request, targets, keeps_gaps=validated_part is not None)
        span = ByteRange(request.start, request.stop)
        for part in split(span, validated_part or len(span)):
            at = part.start - span.start
            self.receive(part, cut_views(parts, at, at + len(part)), scope)
        for target, source in copies:
            target[:] = source

    def _open(self, span: ByteRange, scope: Scope) -> RangeRead:
        if self.etag is None:
            ours = Job(partial(self.client.open_range, span, scope=scope))
            first = self._first.setdefault(None, ours)
            with on_error(self._first.clear):  # else the error's traceback and this are a reference cycle
                read = first.result()
            self.etag, self._size = read.version.etag, read.version.size
            if first is ours:
                return read
        if self._size is not None and span.stop > self._size:
            raise TruncatedError(self._size)
        read = self.client.open_range(span, etag=self.etag, scope=scope)
        self._size = read.version.size
        return read


def scatter(
    request: Request, targets: Sequence[memoryview], *, keeps_gaps: bool = False
) -> tuple[list[memoryview], list[tuple[memoryview, memoryview]]]:
    """Where the bytes of *request* go, one after the other, and what is copied after that.

    Bytes between pieces go to scratch memory, all to the same unless *keeps_gaps*. Where pieces overlap, the bytes are
    received for the first of them and copied to the others.
    """
    parts: list[memoryview] = []
    copies: list[tuple[memoryview, memoryview]] = []
    received: list[tuple[int, memoryview]] = []  # by their place in the blob, one after the other
    scratch = memoryview(b"")
    at = request.start
    for piece, target in zip(request.pieces, targets, strict=True):
        gap = piece.start - at
        if gap > 0:
            if keeps_gaps or gap > scratch.nbytes:
                scratch = memoryview(bytearray(gap))
            parts.append(scratch[:gap])
            at = piece.start
        elif gap < 0:
            for begin, memory in received:
                low, high = max(begin, piece.start), min(begin + memory.nbytes, piece.stop)
                if low < high:
                    copies.append((target[low - piece.start : high - piece.start], memory[low - begin : high - begin]))
        if piece.stop > at:
            fresh = target[at - piece.start :]
            parts.append(fresh)
            received.append((at, fresh))
            at = piece.stop
    return parts, copies


def cut_views(parts: Sequence[memoryview], start: int, stop: int) -> list[memoryview]:
    """Bytes ``start <= i < stop`` of *parts* laid one after the other."""
    cuts, at = [], 0
    for part in parts:
        low, high = max(start - at, 0), min(stop - at, part.nbytes)
        if low < high:
            cuts.append(part[low:high])
        at += part.nbytes
    return cuts
