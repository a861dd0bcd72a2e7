"""Receive ranges of data blobs into memory. All requests for a blob are pinned to one version of it."""

from __future__ import annotations

from functools import partial

from azure.core.exceptions import AzureError, ResourceNotFoundError

from azstoragetorch._blob.client import RangeRead
from azstoragetorch._blob.url import BlobURL
from azstoragetorch._engine.job import Job
from azstoragetorch._engine.ranges import ByteRange, split
from azstoragetorch._engine.scope import Scope, on_error
from azstoragetorch.checkpoint._folder import Folder, picklable
from azstoragetorch.checkpoint._planning import Request
from azstoragetorch.checkpoint._reads import named
from azstoragetorch.exceptions import BlobChangedError, CheckpointError


class DataBlobs:
    """The data blobs of the checkpoint in *folder*, for one load."""

    def __init__(self, folder: Folder) -> None:
        self._folder = folder
        self._transfer = folder.transfer
        self._blobs: dict[str, _Blob] = {}

    def add(self, path: str, etag: str | None) -> None:
        """Take the blob at *path* for one of them, of the version *etag* if that is known."""
        if path not in self._blobs:
            self._blobs[path] = _Blob(self._folder, path)
        if etag is not None:
            self._blobs[path].etag = etag

    def receive(self, request: Request, targets: list[memoryview], keys: list[str], scope: Scope) -> None:
        """Receive the bytes of *request*, those of each of its pieces into the target of that piece.

        Raises:
            CheckpointError: it could not be done; the message names *keys*, which are those of the pieces.
        """
        # An MD5 is that of all bytes of an answer, and the service computes none for more than some MiB.
        validates = self._transfer.validate_content
        parts, copies = scatter(request, targets, keeps_gaps=validates)
        span = ByteRange(request.start, request.stop)
        limit = self._transfer.effective_part_size if validates else len(span)
        blob = self._blobs[request.blob]
        try:
            for part in split(span, limit):
                at = part.start - span.start
                blob.receive(part, _cut(parts, at, at + len(part)), keys, scope)
        except (ResourceNotFoundError, BlobChangedError) as error:
            # A blob that is gone may fail the condition on its version before it is missed.
            is_gone = isinstance(error, ResourceNotFoundError) or blob.client.version() is None
            state = (
                "is missing"
                if is_gone
                else "is not the one that was saved, or was overwritten while it was read; if it was restored from a "
                "copy, read it with check_etags=False"
            )
            raise CheckpointError(
                f"the data blob {request.blob} with {named(keys)} {state} ({error})", key=keys[0]
            ) from picklable(error)
        except AzureError as error:
            raise CheckpointError(
                f"{named(keys)} in {request.blob}: {type(error).__name__}: {error}", key=keys[0]
            ) from picklable(error)
        for target, source in copies:
            target[:] = source


class _Blob:
    """A data blob: its client, and the version that all requests of this load are pinned to."""

    def __init__(self, folder: Folder, path: str) -> None:
        self.client = folder.blob(path)
        self.etag: str | None = None  # from the metadata, or else the first answer
        self._size: int | None = None
        self._first: dict[None, Job[RangeRead]] = {}  # the request whose answer says which version is read

    def receive(self, span: ByteRange, targets: list[memoryview], keys: list[str], scope: Scope) -> None:
        """Receive the bytes of *span* into *targets*, one after the other."""
        read = self._open(span, keys, scope)
        if read.span != span:
            read.close()
            raise _truncated(read.version.size, self.client.url, span, keys)
        read.receive(targets)

    def _open(self, span: ByteRange, keys: list[str], scope: Scope) -> RangeRead:
        if self.etag is None:
            ours = Job(partial(self.client.open_range, span, scope=scope))
            first = self._first.setdefault(None, ours)
            with on_error(self._first.clear):  # else the error's traceback and this are a reference cycle
                read = first.result()
            self.etag, self._size = read.version.etag, read.version.size
            if first is ours:
                return read
        if self._size is not None and span.stop > self._size:
            raise _truncated(self._size, self.client.url, span, keys)
        read = self.client.open_range(span, etag=self.etag, scope=scope)
        self._size = read.version.size
        return read


def _truncated(size: int, url: BlobURL, span: ByteRange, keys: list[str]) -> CheckpointError:
    return CheckpointError(
        f"{url}, which holds {named(keys)}, is truncated: it has {size} bytes, and the checkpoint needs {span.stop}",
        key=keys[0],
    )


def scatter(
    request: Request, targets: list[memoryview], *, keeps_gaps: bool = False
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


def _cut(parts: list[memoryview], start: int, stop: int) -> list[memoryview]:
    """Bytes ``start <= i < stop`` of *parts* laid one after the other."""
    cuts, at = [], 0
    for part in parts:
        low, high = max(start - at, 0), min(stop - at, part.nbytes)
        if low < high:
            cuts.append(part[low:high])
        at += part.nbytes
    return cuts
