"""Load: the bytes that a rank needs, once each, from all blobs at once, straight into the tensors they are for.

What the planner asks for becomes pieces of blobs, pieces become requests (``_planning``), and requests run on the
engine. A request receives into the memory of contiguous tensors on the CPU; for all others its bytes are staged in
buffers under the memory limit and copied.
"""

from __future__ import annotations

import io
import logging
import threading
import uuid
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from azure.core.exceptions import AzureError, ResourceNotFoundError
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, StorageMeta
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, LoadPlanner, ReadItem
from torch.distributed.checkpoint.storage import StorageReader
from torch.futures import Future

from azstoragetorch._blob.config import KiB, MiB, TransferConfig
from azstoragetorch._blob.credentials import Credential
from azstoragetorch._blob.download import open_range
from azstoragetorch._blob.engine import Budget, BufferPool, Cancelled, Scope, engine_for
from azstoragetorch._blob.memory import expect_filling
from azstoragetorch._blob.ranges import ByteRange, split
from azstoragetorch._blob.url import BlobURL
from azstoragetorch.checkpoint._folder import Folder, describe, plain
from azstoragetorch.checkpoint._format import PROBE, Item, Payload, many_objects, probe, read_item
from azstoragetorch.checkpoint._host import Lane, is_in_place, select, view_of
from azstoragetorch.checkpoint._planning import Box, Piece, Request, Source, contiguous_strides, cut, join
from azstoragetorch.checkpoint._progress import Meter, Progress
from azstoragetorch.checkpoint._sharing import SHARING, Sharing, plan_sharing, source_of, this_node
from azstoragetorch.checkpoint._sharing import Source as SharedSource
from azstoragetorch.checkpoint._writer import is_url
from azstoragetorch.exceptions import AZStorageTorchError, BlobChangedError, CheckpointError, CheckpointNotFoundError

log = logging.getLogger("azstoragetorch")

_NOTHING = torch.empty(0, dtype=torch.uint8)
_REUSED = 64 * MiB  # staging buffers up to this size are kept for the next request
_ALIGNMENT = 64  # bytes; elements of any type may lie there
_PROBED = 256 * KiB  # items of unknown inner layout below are fetched and decoded whole


class BlobStorageReader(StorageReader):
    """Loads distributed checkpoints from folders of blobs, for `torch.distributed.checkpoint.load`.

    Reads what :class:`BlobStorageWriter` wrote, on any number of ranks, and what torch's ``FileSystemWriter`` and
    ``FsspecWriter`` wrote. Each rank fetches just the bytes that it needs, whatever the sharding was at saving.

    The metadata, which is a pickle, is read by an unpickler that runs no foreign code. Entries that are no tensors
    are pickles too, which are the planner's to read: torch's default planner trusts them.

    A load that fails may have written to some tensors: ``touched`` of its error names them.

    Args:
        url: URL of the folder, in any of the forms that :doc:`the guide </guide/urls>` lists. ``checkpoint_id`` of
            ``dcp.load`` names another one in the same account.
        credential: As for :class:`~azstoragetorch.io.BlobIO`.
        transfer: How to transfer; see :class:`azstoragetorch.TransferConfig`. ``memory_limit`` bounds what a load
            takes beside the tensors themselves.
        load_once_per: ``"rank"``: every rank fetches what it needs. ``"node"`` or ``"world"``: what all ranks of a
            node or of the job need alike, such as replicated weights, is fetched by one of them and broadcast.
        process_group: The group that was given to ``dcp.load``, for broadcasting.
        check_etags: Refuse data blobs that are not those that the save wrote. Only for a checkpoint that is where it
            was saved: a copy elsewhere has other ETags. Pass False after restoring from a backup in place.
        extension_registry: Where stream extensions of torch are looked up; torch's own by default.
        progress: Called with the bytes done and planned on this rank, from any thread but one call at a time.

    Raises:
        ValueError: *url* is none, or names a snapshot; ``load_once_per`` is none of the three.
        TypeError: an argument has a wrong type.

    Loading raises :class:`~azstoragetorch.exceptions.CheckpointError` and what the service refuses as types of
    ``azure.core.exceptions``; torch wraps them, on all ranks, into its ``CheckpointException``.
    """

    def __init__(
        self,
        url: str,
        *,
        credential: Credential = None,
        transfer: TransferConfig | None = None,
        load_once_per: str = "rank",
        process_group: Any = None,
        check_etags: bool = True,
        extension_registry: Any = None,
        progress: Progress | None = None,
    ) -> None:
        super().__init__()
        if load_once_per not in SHARING:
            raise ValueError(f"load_once_per must be one of {', '.join(map(repr, SHARING))}, not {load_once_per!r}")
        self._folder = Folder(url, credential, transfer)
        self._load_once_per = load_once_per
        self._group = process_group
        self._check_etags = check_etags
        self._registry = extension_registry
        self._progress = progress
        self._load_id = uuid.uuid4().hex
        self._rank = 0
        self._failure: Exception | None = None
        self._storage: dict[MetadataIndex, Any] = {}
        self._is_original = False

    @property
    def checkpoint_id(self) -> str:
        """The URL of the folder, without a SAS."""
        return self._folder.url

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.checkpoint_id!r})"

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: object) -> bool:
        """Whether *checkpoint_id* is a URL that this reader understands."""
        return is_url(checkpoint_id)

    def reset(self, checkpoint_id: Any = None) -> None:
        """Begin a new load, of the folder *checkpoint_id* if that is not None.

        Raises:
            TypeError: *checkpoint_id* is no str; a path object loses one of the slashes after the scheme.
            ValueError: it is no URL, or one in another account.
        """
        if checkpoint_id is not None:
            self._folder = self._folder.at(checkpoint_id)
        self._load_id = uuid.uuid4().hex
        self._failure, self._storage = None, {}

    def read_metadata(self, *_args: Any, **kwargs: Any) -> Metadata:
        """The metadata of the checkpoint, or with ``rank=`` that of one rank that did not coordinate.

        Raises:
            CheckpointNotFoundError: there is no checkpoint, or only an interrupted save.
            CheckpointError: the metadata is broken, or may run foreign code.
            AzureError: the service refused, or could not be reached.
        """
        rank = kwargs.get("rank")
        if rank is not None and self._failure is not None:
            # torch looks for a rank's own metadata after any failure; only a missing one is a reason to.
            raise self._failure
        try:
            metadata = self._folder.metadata(rank)
        except Exception as error:
            if not isinstance(error, CheckpointNotFoundError):
                log.warning("%s: the metadata could not be read: %s", self.checkpoint_id, error)
                self._failure = error
            raise
        if metadata.storage_meta is None:
            metadata.storage_meta = StorageMeta()
        metadata.storage_meta.load_id = self._load_id
        return metadata

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *_args: Any, **kwargs: Any) -> None:  # noqa: ARG002 - torch's
        """Begin a load on this rank; called by torch."""
        rank = kwargs.get("rank")
        self._rank = rank if rank is not None else 0
        self._storage = metadata.storage_data or {}
        saved_to = getattr(getattr(metadata, "storage_meta", None), "checkpoint_id", None)
        self._is_original = str(saved_to) == self.checkpoint_id

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """Say where this rank runs, if ranks are to share what they fetch."""
        if self._load_once_per != "rank":
            plan.storage_data = this_node()
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """Decide who fetches what several ranks need alike; called by torch on the coordinator."""
        if self._load_once_per != "rank" and len(plans) > 1:
            shared = plan_sharing(plans, by_node=self._load_once_per == "node", size_of=self._size_of)
            for plan, sharing in zip(plans, shared, strict=True):
                plan.storage_data = sharing
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Load the items of *plan*; called by torch on every rank.

        Raises:
            CheckpointError: an item could not be loaded; the message names it, the rank and the reason, and
                ``touched`` the entries that may have been written to.
        """
        sharing = plan.storage_data if isinstance(plan.storage_data, Sharing) else None
        load = Load(self._folder, planner, self._registry, sharing.kept() if sharing is not None else ())
        mine = plan.items if sharing is None else sharing.mine(plan.items)
        failure: CheckpointError | None = None
        try:
            with many_objects():
                wanted = [(item, self._item(item.storage_index)) for item in mine]
            load.run(wanted, self._progress)
        except Exception as error:  # noqa: BLE001 - raised below, by all ranks that share
            failure = self._failed(error, load)
        if sharing is not None:
            try:
                sharing.exchange(plan.items, load, failure, self._group)
            except Exception as error:  # noqa: BLE001 - raised below
                failure = failure or self._failed(error, load)
        if failure is not None:
            raise failure from plain(failure.__cause__ or failure)
        future: Future[None] = Future()
        future.set_result(None)
        return future

    def _item(self, index: MetadataIndex) -> Item:
        info = self._storage.get(index)
        if info is None:
            raise CheckpointError(f"the metadata does not say where {index.fqn!r} is stored", key=index.fqn)
        item = read_item(info)
        if not (self._check_etags and self._is_original) and item.etag is not None:
            item = Item(item.path, item.offset, item.length, item.transforms, item.payload)
        return item

    def _size_of(self, index: MetadataIndex) -> int:
        return getattr(self._storage.get(index), "length", 0)

    def _failed(self, error: Exception, load: Load) -> CheckpointError:
        touched = load.touched()
        state = (
            f"{len(touched)} entries of the state dict may have been written to (see touched), first {min(touched)!r}"
            if touched
            else "no tensor was written to"
        )
        failure = CheckpointError(
            f"{self.checkpoint_id}: rank {self._rank} could not load: {describe(error)}; {state}",
            checkpoint=self.checkpoint_id,
            key=getattr(error, "key", None),
            rank=self._rank,
            touched=touched,
        )
        failure.__cause__ = error.__cause__ or error
        return failure


@dataclass(slots=True, eq=False)
class _Read:
    """One thing to load: all that is known of it, and how far it is."""

    wanted: ReadItem
    item: Item
    payload: Payload | None
    target: torch.Tensor | None = None
    pieces_left: int = 0
    followers: list[_Read] = field(default_factory=list)  # reads of the very same bytes

    @property
    def key(self) -> str:
        return self.wanted.dest_index.fqn

    @property
    def box(self) -> Box:
        return Box(tuple(self.wanted.storage_offsets), tuple(self.wanted.lengths))


class _Blob:
    """A data blob: its client, and the version that all requests of this load are pinned to."""

    def __init__(self, folder: Folder, path: str) -> None:
        self.client = folder.blob(path)
        self.lock = threading.Lock()
        self.etag: str | None = None  # as the metadata tells it, or else the first answer
        self.size: int | None = None


class Load:
    """Carries out the reads of one rank. One `run` at a time."""

    def __init__(
        self, folder: Folder, planner: LoadPlanner, registry: Any = None, keep: Collection[SharedSource] = ()
    ) -> None:
        self._folder = folder
        self._planner = planner
        self._registry = registry
        self._keep = frozenset(keep)
        self.kept: dict[SharedSource, torch.Tensor | bytes] = {}
        """What was loaded of what other ranks wait for; `accept` hands it to the planner."""
        self._config = folder.transfer
        self._budget = Budget(folder.transfer.memory_limit)
        self._buffers = BufferPool(folder.transfer.memory_limit)
        self._blobs: dict[str, _Blob] = {}
        self._touched: set[str] = set()
        self._planner_lock = threading.Lock()
        self._lanes: dict[tuple[int, torch.device], Lane] = {}

    def touched(self) -> frozenset[str]:
        """The entries of the state dict that may have been written to."""
        return frozenset(self._touched)

    def run(self, wanted: Iterable[tuple[ReadItem, Item]], progress: Progress | None = None) -> None:
        """Load everything that is *wanted*."""
        with many_objects():
            reads = self._reads(wanted)
        self._probe([read for read in reads if self._needs_probe(read)])
        with many_objects():
            requests = self._plan(reads)
        for read in reads:
            if not read.pieces_left:
                self._finish(read)
        meter = Meter(progress, sum(request.stop - request.start for request in requests))
        tasks = [self._task(request, reads, meter) for request in requests]
        engine_for(self._config).run_all(tasks, self._config.max_concurrency)

    # -- planning -----------------------------------------------------------------------------------------------------

    def _plan(self, reads: list[_Read]) -> list[Request]:
        """The requests that fetch all of *reads*."""
        pieces: list[Piece] = []
        for number, read in enumerate(reads):
            self._check(read)
            read.pieces_left = -len(pieces)
            pieces += self._pieces(number, read, self._config.effective_part_size)
            read.pieces_left += len(pieces)
        return join(pieces, self._config.effective_part_size)

    def _reads(self, wanted: Iterable[tuple[ReadItem, Item]]) -> list[_Read]:
        """What to read, each source once: reads of the very same bytes follow the first of them."""
        reads: dict[Any, _Read] = {}
        for item_wanted, item in wanted:
            if item.path not in self._blobs:
                self._blobs[item.path] = _Blob(self._folder, item.path)
            blob = self._blobs[item.path]
            if item.etag is not None:
                blob.etag = item.etag
            is_tensor = item_wanted.type == LoadItemType.TENSOR
            read = _Read(item_wanted, item, item.payload if is_tensor and not item.transforms else None)
            key = (item.path, item.offset, item.length, is_tensor, tuple(item_wanted.storage_offsets), read.box.lengths)
            first = reads.setdefault(key, read)
            if first is not read:
                first.followers.append(read)
        return list(reads.values())

    def _needs_probe(self, read: _Read) -> bool:
        is_tensor = read.wanted.type == LoadItemType.TENSOR
        return is_tensor and read.payload is None and not read.item.transforms and read.item.length >= _PROBED

    def _probe(self, reads: list[_Read]) -> None:
        """Find out what lies inside items that the metadata does not describe."""
        ends: list[tuple[bytearray, bytearray]] = [(bytearray(PROBE), bytearray(PROBE)) for _ in reads]
        pieces = []
        for number, read in enumerate(reads):
            start, stop = read.item.offset, read.item.offset + read.item.length
            pieces.append(Piece(read.item.path, start, start + PROBE, 2 * number, Box((), ())))
            pieces.append(Piece(read.item.path, stop - PROBE, stop, 2 * number + 1, Box((), ())))

        def task(request: Request) -> Callable[[Scope], None]:
            keys = [reads[piece.read // 2].key for piece in request.pieces]
            targets = [memoryview(ends[piece.read // 2][piece.read % 2]) for piece in request.pieces]
            return lambda scope: self._receive(request, targets, keys, scope)

        requests = join(pieces, self._config.effective_part_size)
        engine_for(self._config).run_all([task(request) for request in requests], self._config.max_concurrency)
        for read, (head, tail) in zip(reads, ends, strict=True):
            read.payload = probe(bytes(head), bytes(tail), read.item.length)

    def _check(self, read: _Read) -> None:
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

    def _pieces(self, number: int, read: _Read, limit: int) -> Iterator[Piece]:
        item, payload = read.item, read.payload
        if payload is None or not payload.is_contiguous:
            read.payload = None
            yield Piece(item.path, item.offset, item.offset + item.length, number, read.box)
            return
        base, nbytes = item.offset + payload.offset, payload.nbytes
        if tuple(read.wanted.lengths) == payload.shape and 0 < nbytes <= limit:
            yield Piece(item.path, base, base + nbytes, number, read.box)  # most are like this
        elif all(read.wanted.lengths):
            strides = contiguous_strides(payload.shape)
            yield from cut(Source(item.path, base, payload.dtype.itemsize, strides, read.box), number, limit)

    # -- one request --------------------------------------------------------------------------------------------------

    def _task(self, request: Request, reads: list[_Read], meter: Meter) -> Callable[[Scope], None]:
        def run(scope: Scope) -> None:
            pieces = [(piece, reads[piece.read]) for piece in request.pieces]
            keys = [read.key for _, read in pieces]
            try:
                self._load(request, pieces, keys, scope)
            except (Cancelled, AZStorageTorchError, AzureError):
                raise
            except Exception as error:  # noqa: BLE001 - of torch, the planner or an extension
                raise CheckpointError(
                    f"{_named(keys)} in {request.blob}: {type(error).__name__}: {error}", key=keys[0]
                ) from plain(error)
            meter.add(request.stop - request.start)

        return run

    def _load(self, request: Request, pieces: list[tuple[Piece, _Read]], keys: list[str], scope: Scope) -> None:
        places = [self._place(piece, read) for piece, read in pieces]
        with self._staging(pieces, places) as buffers:
            scope.check()
            self._transfer(request, pieces, places, buffers, keys, scope)
        for _, read in pieces:
            with self._planner_lock:
                read.pieces_left -= 1
                is_done = not read.pieces_left
            if is_done and read.payload is not None:
                self._finish(read)

    def _transfer(
        self,
        request: Request,
        pieces: list[tuple[Piece, _Read]],
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
        self._receive(request, targets, keys, scope)
        lanes = set()
        for (piece, read), place, buffer in zip(pieces, places, buffers, strict=True):
            if read.payload is None:
                self._decode(read, view_of(buffer))
                continue
            source = place if place is not None else self._elements(piece, read.payload, buffer)
            for sink in [read, *read.followers]:
                if sink is not read or place is None:
                    self._touched.add(sink.key)
                    lane = self._lane(sink)
                    lane.copy(select(self._target(sink), piece.box), source)
                    lanes.add(lane)
        for lane in lanes:
            lane.wait()

    @contextmanager
    def _staging(
        self, pieces: list[tuple[Piece, _Read]], places: list[torch.Tensor | None]
    ) -> Iterator[list[torch.Tensor]]:
        """Buffers for those of *pieces* that have no place to be received into, under the memory limit."""
        lanes = [
            None if place is not None else self._lane(read) for (_, read), place in zip(pieces, places, strict=True)
        ]
        lengths = [-(-(piece.stop - piece.start) // _ALIGNMENT) * _ALIGNMENT for piece, _ in pieces]
        plain = sum(n for n, lane in zip(lengths, lanes, strict=True) if lane is not None and not lane.is_pinned)
        pinned = sum(n for n, lane in zip(lengths, lanes, strict=True) if lane is not None and lane.is_pinned)
        # Of few sizes, so that they are reused: what malloc gets back it may keep for each thread.
        plain = 1 << (plain - 1).bit_length() if 0 < plain <= _REUSED else plain
        self._budget.acquire(plain + pinned)
        area = self._buffers.take(plain) if plain else memoryview(b"")
        try:
            buffers: list[torch.Tensor] = []
            at = 0
            for (piece, _), lane, length in zip(pieces, lanes, lengths, strict=True):
                size = piece.stop - piece.start
                if lane is None:
                    buffers.append(_NOTHING)
                elif lane.is_pinned:
                    buffers.append(lane.buffer(size))
                else:
                    buffers.append(torch.frombuffer(area, dtype=torch.uint8, count=size, offset=at))
                    at += length
            yield buffers
            buffers.clear()
            if 0 < plain <= _REUSED:
                self._buffers.give_back(area)
        finally:
            self._budget.release(plain + pinned)

    def _place(self, piece: Piece, read: _Read) -> torch.Tensor | None:
        """The tensor whose memory takes the bytes of *piece* as they are, or None if they are to be staged."""
        if read.payload is None:
            return None
        target = self._target(read)
        if not piece.is_dense or target.dtype != read.payload.dtype:
            return None
        place = select(target, piece.box)
        if not is_in_place(place):
            return None
        return place

    def _elements(self, piece: Piece, payload: Payload, buffer: torch.Tensor) -> torch.Tensor:
        """The elements of *piece* as they lie, perhaps apart, in *buffer*."""
        strides = contiguous_strides(payload.shape) if not piece.is_dense else contiguous_strides(piece.box.lengths)
        return buffer.view(payload.dtype).as_strided(piece.box.lengths, strides)

    def _receive(self, request: Request, targets: list[memoryview], keys: list[str], scope: Scope) -> None:
        """Receive the bytes of *request*, those of each of its pieces into the target of that piece."""
        # An MD5 is that of all bytes of an answer, and the service computes none for more than some MiB.
        validates = self._config.validate_content
        parts, copies = scatter(request, targets, keeps_gaps=validates)
        span = ByteRange(request.start, request.stop)
        limit = self._config.effective_part_size if validates else len(span)
        try:
            for part in split(span, limit):
                at = part.start - span.start
                self._fetch(self._blobs[request.blob], part, _cut(parts, at, at + len(part)), keys, scope)
        except (ResourceNotFoundError, BlobChangedError) as error:
            # A blob that is gone may fail the condition on its version before it is missed.
            is_gone = isinstance(error, ResourceNotFoundError) or self._blobs[request.blob].client.version() is None
            state = (
                "is missing"
                if is_gone
                else "is not the one that was saved, or was overwritten while it was read; if it was restored from a "
                "copy, read it with check_etags=False"
            )
            raise CheckpointError(
                f"the data blob {request.blob} with {_named(keys)} {state} ({error})", key=keys[0]
            ) from plain(error)
        except AzureError as error:
            raise CheckpointError(
                f"{_named(keys)} in {request.blob}: {type(error).__name__}: {error}", key=keys[0]
            ) from plain(error)
        for target, source in copies:
            target[:] = source

    def _fetch(self, blob: _Blob, span: ByteRange, targets: list[memoryview], keys: list[str], scope: Scope) -> None:
        client = blob.client
        with blob.lock if blob.etag is None else nullcontext():
            # The first answer tells the version that all others are pinned to.
            read = None
            if blob.etag is None:
                read = open_range(client.service, client.url, span, scope=scope)
                blob.etag, blob.size = read.version.etag, read.version.size
        if read is None:
            if blob.size is not None and span.stop > blob.size:
                raise self._truncated(blob.size, client.url, span, keys)
            read = open_range(client.service, client.url, span, etag=blob.etag, scope=scope)
            blob.size = read.version.size
        if read.span != span:
            read.close()
            raise self._truncated(read.version.size, client.url, span, keys)
        read.receive(targets)

    def _truncated(self, size: int, url: BlobURL, span: ByteRange, keys: list[str]) -> CheckpointError:
        return CheckpointError(
            f"{url}, which holds {_named(keys)}, is truncated: it has {size} bytes, and the checkpoint needs "
            f"{span.stop}",
            key=keys[0],
        )

    # -- the planner's side -------------------------------------------------------------------------------------------

    def _target(self, read: _Read) -> torch.Tensor:
        """The tensor that *read* is for."""
        with self._planner_lock:
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
            # Detaching makes a second sparse tensor, which would take the values in place of the first.
            return read.target.detach() if read.target.layout == torch.strided else read.target

    def target(self, wanted: ReadItem) -> torch.Tensor:
        """The tensor that *wanted*, which another rank fetches, is for."""
        with self._planner_lock:
            return self._planner.resolve_tensor(wanted).detach()

    def accept(self, wanted: ReadItem, value: torch.Tensor | bytes) -> None:
        """Hand over what was fetched, here or by another rank."""
        self._touched.add(wanted.dest_index.fqn)
        with self._planner_lock:
            if isinstance(value, torch.Tensor):
                self._planner.commit_tensor(wanted, value)
            else:
                self._planner.load_bytes(wanted, io.BytesIO(value))

    def _finish(self, read: _Read) -> None:
        """All pieces of *read* are there."""
        for done in [read, *read.followers]:
            self._target(done)
            target, done.target = done.target, None
            assert target is not None
            self._deliver(done, target)

    def _deliver(self, read: _Read, value: torch.Tensor | bytes) -> None:
        source = source_of(read.wanted)
        if source in self._keep:
            self.kept[source] = value
        else:
            self.accept(read.wanted, value)

    def _decode(self, read: _Read, data: memoryview) -> None:
        """Load an item from all of its bytes."""
        stream: Any = io.BytesIO(data)
        if read.item.transforms:
            for extension in self._extensions(read.item.transforms):
                stream = extension.transform_from(stream)
            stream = io.BytesIO(stream.read(-1))
        if read.wanted.type == LoadItemType.BYTE_IO:
            for sink in [read, *read.followers]:
                self._deliver(sink, stream.getvalue())
            return
        tensor = torch.load(stream, map_location="cpu", weights_only=True)
        if not isinstance(tensor, torch.Tensor):
            raise CheckpointError(f"{read.key!r} is stored as a {type(tensor).__name__}, not a tensor", key=read.key)
        if read.box.lengths != tuple(tensor.shape):
            tensor = select(tensor, read.box)
        for sink in [read, *read.followers]:
            self._touched.add(sink.key)
            target = self._target(sink)
            _check_cast(sink.key, tensor.dtype, target.dtype)
            lane = self._lane(sink)
            lane.copy(target, tensor)
            lane.wait()
        self._finish(read)

    def _extensions(self, descriptors: tuple[str, ...]) -> Iterable[Any]:
        if self._registry is None:
            from torch.distributed.checkpoint._extension import ExtensionRegistry

            self._registry = ExtensionRegistry()
        found: Iterable[Any] = self._registry.from_descriptor_list(descriptors)
        return found

    def _lane(self, read: _Read) -> Lane:
        """The lane of this thread to the device that *read* is for."""
        device = torch.device("cpu") if read.payload is None else self._target(read).device
        key = threading.get_ident(), device
        with self._planner_lock:
            if key not in self._lanes:
                self._lanes[key] = Lane(device)
            return self._lanes[key]


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


def _check_cast(key: str, stored: torch.dtype, target: torch.dtype) -> None:
    if stored != target and not torch.can_cast(stored, target):
        raise CheckpointError(f"{key!r} is stored as {stored}, which {target} in the state dict cannot take", key=key)


def _named(keys: list[str]) -> str:
    more = len(set(keys)) - 1
    return f"{keys[0]!r}" + (f" and {more} more" if more else "")
