"""Load: the bytes that a rank needs, once each, from all blobs at once, straight into the tensors they are for.

What the planner asks for becomes requests (``_reads``), and requests run on the engine. A request receives into the
memory of contiguous tensors on the CPU; for all others its bytes are staged in buffers under the memory limit and
copied.
"""

from __future__ import annotations

import io
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from azure.core.exceptions import AzureError
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlanner, ReadItem

from azstoragetorch._engine.memory import expect_filling
from azstoragetorch._engine.scope import Cancelled, Scope
from azstoragetorch._engine.threads import engine_for, one_at_a_time
from azstoragetorch._tensors.host import Copier, select, view_of
from azstoragetorch._tensors.planning import Box, Piece, Request, join
from azstoragetorch._tensors.progress import ProgressCallback, ProgressCounter
from azstoragetorch._tensors.staging import NoMemoryError, Staging, elements_of, place_of
from azstoragetorch.checkpoint._checking import Check
from azstoragetorch.checkpoint._folder import Folder, picklable
from azstoragetorch.checkpoint._format import PROBE, Digests, Item, ItemFile, many_objects, probe
from azstoragetorch.checkpoint._reads import Read, named, plan, reads_of
from azstoragetorch.checkpoint._receiving import DataBlobs
from azstoragetorch.checkpoint._sharing import ReadKey, read_key
from azstoragetorch.exceptions import AZStorageTorchError, CheckpointError


class Load:
    """Carries out the reads of one rank. One `run` at a time."""

    def __init__(
        self,
        folder: Folder,
        planner: LoadPlanner,
        registry: Any = None,
        keep: Collection[ReadKey] = (),
        *,
        weights_only: bool = False,
        hint: str = "",
    ) -> None:
        self._planner = planner
        self._folder = folder
        self._check: Check | None = None
        self._weights_only = weights_only
        self._registry = registry
        self._keep = frozenset(keep)
        self.kept: dict[ReadKey, torch.Tensor | bytes] = {}
        """What was loaded of what other ranks wait for; `accept` hands it to the planner."""
        self._config = folder.transfer
        self._buffers = Staging(folder.transfer.memory_limit)
        self._blobs = DataBlobs(folder, hint)
        self._touched: set[str] = set()
        self._planner_calls = one_at_a_time()

    def verify_with(self, digests: Digests | None) -> None:
        """Compare what is loaded with *digests*, if there are any."""
        self._check = Check(self._folder, digests) if digests is not None else None

    def touched(self) -> frozenset[str]:
        """The entries of the state dict that may have been written to."""
        return frozenset(self._touched)

    def run(self, wanted: Iterable[tuple[ReadItem, Item]], progress: ProgressCallback | None = None) -> None:
        """Load everything that is *wanted*."""
        with many_objects():
            reads = reads_of(wanted)
            for read in reads:
                self._blobs.add(read.item.path, read.item.etag)
        self._probe([read for read in reads if read.needs_probe])
        if self._check is not None:
            for read in reads:
                self._check.prepare(read, self._target)
        with many_objects():
            requests = plan(reads, self._config.effective_part_size)
        for read in reads:
            if read.pieces_left:
                continue
            if read.payload is None:
                self._decode(read, memoryview(b""))
            else:
                self._finish(read)
        counter = ProgressCounter(progress, sum(request.stop - request.start for request in requests))

        def run(request: Request, scope: Scope) -> None:
            self._run(request, reads, counter, scope)

        engine = engine_for(self._config)
        engine.map(run, requests, engine.concurrency(self._config))

    def _probe(self, reads: list[Read]) -> None:
        """Find out what lies inside items that the metadata does not describe."""
        ends: list[tuple[bytearray, bytearray]] = [(bytearray(PROBE), bytearray(PROBE)) for _ in reads]
        pieces = []
        for number, read in enumerate(reads):
            start, stop = read.item.offset, read.item.offset + read.item.length
            pieces.append(Piece(read.item.path, start, start + PROBE, 2 * number, Box((), ())))
            pieces.append(Piece(read.item.path, stop - PROBE, stop, 2 * number + 1, Box((), ())))

        def look(request: Request, scope: Scope) -> None:
            keys = [reads[piece.read // 2].key for piece in request.pieces]
            targets = [memoryview(ends[piece.read // 2][piece.read % 2]) for piece in request.pieces]
            self._blobs.receive(request, targets, keys, scope)

        requests = join(pieces, self._config.effective_part_size)
        engine_for(self._config).map(look, requests, self._config.initial_concurrency)
        for read, (head, tail) in zip(reads, ends, strict=True):
            read.payload = probe(bytes(head), bytes(tail), read.item.length)

    # -- one request --------------------------------------------------------------------------------------------------

    def _run(self, request: Request, reads: list[Read], counter: ProgressCounter, scope: Scope) -> None:
        pieces = [(piece, reads[piece.read]) for piece in request.pieces]
        keys = [read.key for _, read in pieces]
        try:
            self._load(request, pieces, keys, scope)
        except (Cancelled, AZStorageTorchError, AzureError):
            raise
        except Exception as error:  # noqa: BLE001 - of torch, the planner or an extension
            raise CheckpointError(
                f"{named(keys)} in {request.blob}: {type(error).__name__}: {error}", key=keys[0]
            ) from picklable(error)
        counter.add(request.stop - request.start)

    def _load(self, request: Request, pieces: list[tuple[Piece, Read]], keys: list[str], scope: Scope) -> None:
        places = [self._place(piece, read) for piece, read in pieces]
        with self._staging(pieces, places) as buffers:
            scope.check()
            self._transfer(request, pieces, places, buffers, keys, scope)
        for _, read in pieces:
            with self._planner_calls:
                read.pieces_left -= 1
                is_done = not read.pieces_left
            if is_done and read.payload is not None:
                self._finish(read)

    def _transfer(
        self,
        request: Request,
        pieces: list[tuple[Piece, Read]],
        places: list[torch.Tensor | None],
        buffers: list[torch.Tensor],
        keys: list[str],
        scope: Scope,
    ) -> None:
        """Receive *request* into the places of its pieces, or their buffers, and pass on what is in the latter."""
        targets = [view_of(buffer if place is None else place) for place, buffer in zip(places, buffers, strict=True)]
        for (_, read), place, target in zip(pieces, places, targets, strict=True):
            if place is not None:
                expect_filling(target)
                self._touched.add(read.key)
        self._blobs.receive(request, targets, keys, scope)
        copiers = set()
        for (piece, read), place, buffer in zip(pieces, places, buffers, strict=True):
            if read.payload is None:
                self._decode(read, view_of(buffer))
                continue
            source = place if place is not None else elements_of(piece, read.payload.dtype, read.payload.shape, buffer)
            for sink in read.sinks:
                if sink is not read or place is None:
                    self._touched.add(sink.key)
                    copier = self._copier(sink)
                    copier.copy(select(self._target(sink), piece.box), source)
                    copiers.add(copier)
        for copier in copiers:
            copier.wait()

    @contextmanager
    def _staging(
        self, pieces: list[tuple[Piece, Read]], places: list[torch.Tensor | None]
    ) -> Iterator[list[torch.Tensor]]:
        """Buffers for those of *pieces* that have no place to be received into, under the memory limit."""
        copiers = [
            None if place is not None else self._copier(read) for (_, read), place in zip(pieces, places, strict=True)
        ]
        decoded = sum(piece.stop - piece.start for piece, read in pieces if read.payload is None)
        sizes = [piece.stop - piece.start for piece, _ in pieces]
        try:
            with self._buffers.buffers(sizes, copiers, extra=decoded) as buffers:
                yield buffers
        except NoMemoryError as error:
            raise CheckpointError(f"no memory for the {error.size:,} bytes of one item: {error.reason}") from None

    def _place(self, piece: Piece, read: Read) -> torch.Tensor | None:
        """The tensor whose memory takes the bytes of *piece* as they are, or None if they are to be staged."""
        return place_of(piece, read.payload.dtype, self._target(read)) if read.payload is not None else None

    # -- the planner's side -------------------------------------------------------------------------------------------

    def _target(self, read: Read) -> torch.Tensor:
        """The tensor that *read* is for."""
        with self._planner_calls:
            if read.target is None:
                target = self._planner.resolve_tensor(read.wanted)
                if tuple(target.shape) != read.box.lengths:
                    raise CheckpointError(
                        f"{read.key!r} has the shape {read.box.lengths} in the checkpoint and {tuple(target.shape)} in "
                        "the state dict",
                        key=read.key,
                    )
                if read.payload is not None:
                    _check_cast(read.key, read.payload.dtype, target.dtype)
                read.target = target
            return _bare(read.target)

    def target(self, wanted: ReadItem) -> torch.Tensor:
        """The tensor that *wanted*, which another rank may fetch, is for."""
        with self._planner_calls:
            return _bare(self._planner.resolve_tensor(wanted))

    def touch(self, wanted: ReadItem) -> None:
        """The target of *wanted* is about to be written to."""
        self._touched.add(wanted.dest_index.fqn)

    def accept(self, wanted: ReadItem, value: torch.Tensor | bytes) -> None:
        """Hand over what was fetched, here or by another rank."""
        self.touch(wanted)
        if self._weights_only and not isinstance(value, torch.Tensor):
            _check_harmless(wanted.dest_index.fqn, value)
        with self._planner_calls:
            if isinstance(value, torch.Tensor):
                self._planner.commit_tensor(wanted, value)
            else:
                self._planner.load_bytes(wanted, io.BytesIO(value))

    def _finish(self, read: Read) -> None:
        """All pieces of *read* are there."""
        for done in read.sinks:
            bare = self._target(done)
            if self._check is not None and read.payload is not None:
                self._check.target(done, bare)
            target, done.target = done.target, None
            assert target is not None
            self._deliver(done, target)

    def _deliver(self, read: Read, value: torch.Tensor | bytes) -> None:
        source = read_key(read.wanted)
        if source in self._keep:
            self.kept[source] = value
        else:
            self.accept(read.wanted, value)

    def _decode(self, read: Read, data: memoryview) -> None:
        """Load an item from all of its bytes."""
        if self._check is not None:
            self._check.item(read, data)
        stream: Any = ItemFile(data)
        if read.item.transforms:
            for extension in self._extensions(read.item.transforms):
                stream = extension.transform_from(stream)
            data = memoryview(stream.read(-1))
            stream = ItemFile(data)
        if read.wanted.type == LoadItemType.BYTE_IO:
            content = bytes(data)
            for sink in read.sinks:
                self._deliver(sink, content)
            return
        tensor = torch.load(stream, map_location="cpu", weights_only=True)
        if not isinstance(tensor, torch.Tensor):
            raise CheckpointError(f"{read.key!r} is stored as a {type(tensor).__name__}, not a tensor", key=read.key)
        if read.box.lengths != tuple(tensor.shape):
            tensor = select(tensor, read.box)
        for sink in read.sinks:
            self._touched.add(sink.key)
            target = self._target(sink)
            _check_cast(sink.key, tensor.dtype, target.dtype)
            copier = self._copier(sink)
            copier.copy(target, tensor)
            copier.wait()
        self._finish(read)

    def _extensions(self, descriptors: tuple[str, ...]) -> Iterable[Any]:
        if self._registry is None:
            from torch.distributed.checkpoint._extension import ExtensionRegistry

            self._registry = ExtensionRegistry()
        found: Iterable[Any] = self._registry.from_descriptor_list(descriptors)
        return found

    def _copier(self, read: Read) -> Copier:
        """The copier of this thread to the device that *read* is for."""
        return self._buffers.copier(torch.device("cpu") if read.payload is None else self._target(read).device)


def _check_harmless(key: str, content: bytes) -> None:
    """Raise unless unpickling *content*, which the planner is about to do, runs no foreign code."""
    try:
        torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:  # noqa: BLE001 - torch raises errors of many types for what it does not load
        raise CheckpointError(
            f"{key!r} holds more than weights_only=True admits, so it was not unpickled: {error!s:.300}", key=key
        ) from picklable(error)


def _bare(tensor: torch.Tensor) -> torch.Tensor:
    # Detaching makes a second sparse tensor, which would take the values in place of the first.
    return tensor.detach() if tensor.layout == torch.strided else tensor


def _check_cast(key: str, stored: torch.dtype, target: torch.dtype) -> None:
    if stored != target and not torch.can_cast(stored, target):
        raise CheckpointError(f"{key!r} is stored as {stored}, which {target} in the state dict cannot take", key=key)
