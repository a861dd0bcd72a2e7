"""Fetch what is read: the bytes, once each, of all files at once, straight into the tensors that they are for.

The plan is that of checkpoints (`_tensors.planning`): boxes are cut into pieces, neighbors are joined into requests,
and pieces of contiguous tensors on the CPU are received in place.
"""

from __future__ import annotations

from collections.abc import Sequence

from azure.core.exceptions import AzureError

from azstoragetorch._engine.config import TransferConfig
from azstoragetorch._engine.memory import expect_filling
from azstoragetorch._engine.scope import Scope
from azstoragetorch._engine.threads import engine_for
from azstoragetorch._tensors.host import bytes_alike, select, view_of
from azstoragetorch._tensors.pinned import PinnedBlob, TruncatedError
from azstoragetorch._tensors.planning import Piece, Request, StoredBox, contiguous_strides, cut, join
from azstoragetorch._tensors.progress import ProgressCallback, ProgressCounter
from azstoragetorch._tensors.staging import NoMemoryError, Staging, elements_of, place_of
from azstoragetorch.exceptions import AZStorageTorchError, SafetensorsError
from azstoragetorch.safetensors._model import Read


def plan(reads: Sequence[Read], limit: int) -> list[Request]:
    """The requests, of about *limit* bytes at most, that fetch all of *reads*; pieces have their numbers."""
    pieces: list[Piece] = []
    for number, read in enumerate(reads):
        strides = contiguous_strides(read.shape)
        if all(read.box.lengths):
            pieces += cut(StoredBox(read.file.url, read.base, read.dtype.itemsize, strides, read.box), number, limit)
    return join(pieces, limit)


def fetch(
    reads: Sequence[Read],
    transfer: TransferConfig,
    *,
    progress: ProgressCallback | None = None,
    scope: Scope | None = None,
) -> None:
    """Fetch all of *reads* into their targets.

    Raises:
        BlobChangedError: a file was overwritten since it was opened.
        SafetensorsError: the elements cannot be converted to the type of the target.
        AzureError: the service refused the request, or could not be reached.
    """
    requests = plan(reads, transfer.effective_part_size)
    counter = ProgressCounter(progress, sum(request.stop - request.start for request in requests))
    work = _Fetch(reads, transfer, counter)
    engine = engine_for(transfer)
    engine.map(work.run, requests, engine.concurrency(transfer), scope)


class _Fetch:
    def __init__(self, reads: Sequence[Read], transfer: TransferConfig, counter: ProgressCounter) -> None:
        self._reads = reads
        self._transfer = transfer
        self._counter = counter
        self._staging = Staging(transfer.memory_limit)
        self._blobs: dict[str, PinnedBlob] = {}
        for read in reads:
            if read.file.url not in self._blobs:
                self._blobs[read.file.url] = read.file.pinned()

    def run(self, request: Request, scope: Scope) -> None:
        """Carry out one request."""
        first = self._reads[request.pieces[0].read]
        try:
            self._run(request, scope)
        except (AZStorageTorchError, AzureError):
            raise
        except TruncatedError as error:
            what = f"is truncated: {error}"
        except NoMemoryError as error:
            what = str(error)
        except Exception as error:  # noqa: BLE001 - of torch, which cannot copy between all types
            what = f"{type(error).__name__}: {error!s:.300}"
        else:
            self._counter.add(request.stop - request.start)
            return
        raise SafetensorsError(
            f"{request.blob}: {first.name!r:.200} could not be loaded: {what}", url=request.blob, tensor=first.name
        )

    def _run(self, request: Request, scope: Scope) -> None:
        pieces = [(piece, self._reads[piece.read]) for piece in request.pieces]
        places = [place_of(piece, read.dtype, read.target) for piece, read in pieces]
        copiers = [
            None if place is not None else self._staging.copier(read.target.device)
            for (_, read), place in zip(pieces, places, strict=True)
        ]
        with self._staging.buffers([piece.stop - piece.start for piece, _ in pieces], copiers) as buffers:
            scope.check()
            memory = [buffer if place is None else place for place, buffer in zip(places, buffers, strict=True)]
            views = list(map(view_of, memory))
            for place, view in zip(places, views, strict=True):
                if place is not None:
                    expect_filling(view)
            validated = self._transfer.effective_part_size if self._transfer.validate_content else None
            self._blobs[request.blob].receive_request(request, views, scope, validated_part=validated)
            for (piece, read), copier, buffer in zip(pieces, copiers, buffers, strict=True):
                if copier is not None:
                    source = elements_of(piece, read.dtype, read.shape, buffer)
                    target = select(read.target, piece.box)
                    if target.dtype == source.dtype:
                        target, source = bytes_alike(target), bytes_alike(source)
                    copier.copy(target, source)
            for copier in {copier for copier in copiers if copier is not None}:
                copier.wait()
