"""Write a block blob: blocks staged in parallel, committed once, or nothing at all.

What is written is collected into blocks that are staged in the background; a write that is large enough to keep all
connections busy by itself is staged straight from the caller's memory before it returns. Until `commit` the blob in
the service is untouched; an abandoned writer leaves uncommitted blocks, which the service discards after a week or at
the next commit.
"""

from __future__ import annotations

import base64
import hashlib
import os
import queue
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property, wraps
from typing import Any, Concatenate, ParamSpec, TypeVar

from azure.core import MatchConditions
from azure.core.exceptions import (
    AzureError,
    ClientAuthenticationError,
    HttpResponseError,
    ResourceExistsError,
    ResourceModifiedError,
    ResourceNotFoundError,
)
from azure.storage.blob import BlobBlock, ContentSettings

from azstoragetorch._blob.errors import portable
from azstoragetorch._blob.ranges import ByteRange, split
from azstoragetorch._blob.retry import RETRYABLE_STATUS, retrying
from azstoragetorch._blob.sdk import Pieces, SdkBlob
from azstoragetorch._blob.service import Service
from azstoragetorch._blob.url import BlobURL
from azstoragetorch._engine.config import MAX_BLOCK_SIZE, MiB
from azstoragetorch._engine.engine import Engine, Reservation, Scope, engine_for
from azstoragetorch._engine.memory import copy
from azstoragetorch._engine.metrics import timed
from azstoragetorch.exceptions import ClientRequestIdMismatchError, FatalBlobIOWriteError

P = ParamSpec("P")
T = TypeVar("T")

MAX_BLOCKS = 50_000  # the service's limit for a committed blob
_GROW_AFTER = 1_000  # blocks; past it blocks grow with what is written, so that some 170 TiB fit under the limit
_MIN_CUT = 8 * MiB  # for a smaller piece of a large write the cost of a request counts
_BUFFERED_SHARE = 4  # a block that is collected in memory takes at most this part of the memory limit


def block_size_at(written: int, first: int) -> int:
    """Bytes of the next block when *written* bytes are staged in blocks that began at *first* bytes."""
    return min(MAX_BLOCK_SIZE, max(first, -(-written // _GROW_AFTER)))


def even_cuts(length: int, limit: int) -> list[ByteRange]:
    """Cut *length* bytes into the fewest pieces of at most *limit* bytes, all of about one size."""
    if not length:
        return []
    count = -(-length // limit)
    return split(ByteRange(0, length), -(-length // count))


class _UnknownOutcome(Exception):  # noqa: N818 - control flow; its cause is shown
    """Nobody answers to say whether a commit was carried out."""


def _all_or_nothing(method: Callable[Concatenate[BlockWriter, P], T]) -> Callable[Concatenate[BlockWriter, P], T]:
    """An error or an interrupt in *method* ends the writer: it may have less than it was given."""

    @wraps(method)
    def guarded(writer: BlockWriter, /, *arguments: P.args, **options: P.kwargs) -> T:
        writer._check()  # noqa: SLF001
        try:
            return method(writer, *arguments, **options)
        except BaseException as error:  # noqa: BLE001 - raised with what it means
            failed = writer._failed(error)  # noqa: SLF001
            raise failed from failed.__cause__

    return guarded


class BlockWriter:
    """Collects, stages and commits the bytes of one blob. One writer at a time: the caller serialises."""

    def __init__(self, service: Service, url: BlobURL, *, create_only: bool = False) -> None:
        self._service = service
        self._url = url
        self._config = service.config
        self._create_only = create_only
        self._scope = Scope()
        self._pid = os.getpid()
        # Unique to this writer, so that blocks of two writers of one blob never mix; all ids have one length.
        self._nonce = os.urandom(9).hex()
        self._block_ids: list[str] = []
        self._collected: memoryview | None = None
        self._filled = 0
        self._staged = 0
        self._begun = 0  # blocks given to the background
        # Counted so that an interrupt at any moment leaves the count right, which a Condition does not.
        self._ended: list[None] = []  # background blocks that have ended
        self._news: queue.SimpleQueue[None] = queue.SimpleQueue()  # wakes who waits for one
        self._failure: BaseException | None = None

    @cached_property
    def _sdk(self) -> SdkBlob:
        return SdkBlob(self._service, self._url, self._scope)

    @property
    def written(self) -> int:
        """Bytes taken so far."""
        return self._staged + self._filled

    @_all_or_nothing
    def write(self, data: memoryview) -> None:
        """Take *data*, bytes in one contiguous piece; its memory is not used after the return.

        Raises:
            FatalBlobIOWriteError: this or an earlier block failed; nothing will be committed.
        """
        while data.nbytes:
            if data.nbytes >= self._enough_for_all():
                self._stage_from_caller(data)
                return
            if self._collected is None:
                self._collected = engine_for(self._config).buffers.take(self._block_size())
                self._filled = 0
            count = min(data.nbytes, self._collected.nbytes - self._filled)
            copy(self._collected[self._filled : self._filled + count], data[:count])
            self._filled += count
            data = data[count:]
            if self._filled == self._collected.nbytes:
                self._stage_collected()

    @_all_or_nothing
    def write_pieces(
        self,
        pieces: Iterable[memoryview],
        *,
        block_size: int,
        concurrency: int,
        staged: Callable[[int], None] | None = None,
    ) -> None:
        """Take all of *pieces*, bytes, one after the other, in blocks that are cut across them and staged in parallel.

        Nothing is copied: a piece is sent from its own memory, which stays as it is until the return. Pieces are
        drawn as blocks of *block_size* go out, *concurrency* at once, by one thread at a time but not always the same.
        *staged* is called, from any thread, with the length of each block that has arrived.

        Raises:
            FatalBlobIOWriteError: a block failed, or *pieces* raised; nothing will be committed.
        """
        if self._filled:
            self._stage_collected()
        self._stage_all(self._scattered(pieces, block_size, staged), concurrency)

    @timed("blocked_seconds")
    def flush(self) -> None:
        """Wait until the blocks that are on their way have arrived; makes no small block of what is collected.

        Raises:
            FatalBlobIOWriteError: a block failed.
        """
        self._check()
        self._wait_for_less_than(1)
        self._check()

    @_all_or_nothing
    def put(self, pieces: Sequence[memoryview]) -> None:
        """Make *pieces*, bytes, and nothing else, the content of the blob, by one request whatever their length.

        Nothing is copied: they are sent from their own memory, which stays as it is until the return.

        Raises:
            FatalBlobIOWriteError: it could not be done; the blob is unchanged.
            ResourceExistsError: the blob exists and was to be created only.
        """
        self._finish(lambda: self._put_blob(pieces))

    @_all_or_nothing
    def commit(self, *, md5: bytes | None = None, properties: Mapping[str, str] | None = None) -> None:
        """Make everything written the content of the blob, at once, with *md5* as its Content-MD5.

        *properties* are headers of the request: ``x-ms-blob-content-type`` and the like, ``x-ms-meta-*``.

        Raises:
            FatalBlobIOWriteError: it could not be done; the blob is unchanged.
            ResourceExistsError: the blob exists and was to be created only.
        """
        if not self._block_ids:
            pieces = [self._collected[: self._filled]] if self._collected is not None else []
            self._finish(lambda: self._put_blob(pieces, properties))
        else:
            if self._filled:
                self._stage_collected()
            self.flush()
            self._finish(lambda: self._put_block_list(md5, properties))
        self._free()

    def cancel(self) -> None:
        """From another thread, or a finalizer: fail what is on its way, and so whoever writes. `abort` is still due."""
        if self._pid == os.getpid():
            self._scope.cancel()

    def abort(self) -> None:
        """Give up: stop what is on its way, commit nothing."""
        if self._pid != os.getpid():
            return  # forked: it is the parent's to finish
        self._scope.cancel()  # what is in the background ends by itself: it has its own memory
        self._free()

    def _check(self) -> None:
        if self._pid != os.getpid():
            raise FatalBlobIOWriteError(
                f"{self._url}: a writer cannot be used in a forked child; open the blob for writing there"
            )
        if self._failure is not None:
            raise self._fatal(self._failure)

    def _failed(self, error: BaseException) -> BaseException:
        """Remember that *error* ended this writer; what to raise for it."""
        if self._failure is None:
            self._failure = error
        if isinstance(error, Exception) and not isinstance(error, (FatalBlobIOWriteError, ResourceExistsError)):
            return self._fatal(error)
        return error

    def _fatal(self, cause: BaseException) -> FatalBlobIOWriteError:
        error = FatalBlobIOWriteError(f"{self._url}: writing failed and nothing was committed: {cause}")
        error.__cause__ = cause
        return error

    def _block_size(self) -> int:
        size = block_size_at(self._staged, self._config.block_size)
        return max(self._config.block_size, min(size, self._config.memory_limit // _BUFFERED_SHARE))

    def _enough_for_all(self) -> int:
        """Bytes of a write whose blocks keep every connection busy."""
        return max(self._block_size(), self._config.max_concurrency * min(self._config.block_size, _MIN_CUT))

    def _next_id(self, length: int) -> str:
        if len(self._block_ids) >= MAX_BLOCKS:
            raise FatalBlobIOWriteError(
                f"{self._url}: {self.written} bytes need more than {MAX_BLOCKS} blocks; raise block_size or "
                "memory_limit in TransferConfig"
            )
        if not self._block_ids and self._create_only:
            self._refuse_existing()
        block_id = f"{self._nonce}-{len(self._block_ids):06d}"
        self._block_ids.append(block_id)
        self._staged += length
        return block_id

    def _refuse_existing(self) -> None:
        """Fail before uploading anything that could not be committed."""
        try:
            self._sdk.call("HEAD", lambda client: client.get_blob_properties())
        except ResourceNotFoundError:
            return
        except ClientAuthenticationError:
            return  # a SAS may allow to create and not to look; the commit will say
        raise _exists(self._url)

    def _stage_from_caller(self, data: memoryview) -> None:
        """Stage what is collected and *data* as blocks of about one size, without copying *data*."""
        head = self._collected[: self._filled] if self._collected is not None else data[:0]
        # As many pieces as may be in flight, if they are worth a request: one connection is slower than the network.
        share = -(-(head.nbytes + data.nbytes) // self._config.max_concurrency)
        limit = block_size_at(self._staged, min(self._config.block_size, max(_MIN_CUT, share)))
        tasks: list[Callable[[Scope], None]] = []
        held, self._collected, self._filled = self._collected, None, 0
        for cut in even_cuts(head.nbytes + data.nbytes, limit):
            low, high = cut.start - head.nbytes, cut.stop - head.nbytes
            pieces = [p for p in (head[cut.start : cut.stop], data[max(low, 0) : max(high, 0)]) if p.nbytes]
            tasks.append(self._staging(self._next_id(len(cut)), pieces))
        try:
            self._stage_all(tasks, self._config.max_concurrency)
        finally:
            if held is not None:
                head.release()
                engine_for(self._config).buffers.give_back(held)

    def _scattered(
        self, pieces: Iterable[memoryview], first: int, staged: Callable[[int], None] | None
    ) -> Iterator[Callable[[Scope], None]]:
        """Stage the bytes of *pieces* in blocks of the size that is due, the last one shorter."""
        block: list[memoryview] = []
        size = room = block_size_at(self._staged, first)
        try:
            for piece in pieces:
                while piece.nbytes:
                    head, piece = piece[:room], piece[room:]
                    block.append(head)
                    room -= head.nbytes
                    if not room:
                        yield self._staging(self._next_id(size), block, staged)
                        block = []
                        size = room = block_size_at(self._staged, first)
            if block:
                yield self._staging(self._next_id(size - room), block, staged)
        except Exception as error:  # noqa: BLE001 - raised by the task
            failure = error

            def fail(_scope: Scope) -> None:
                raise failure

            yield fail

    @timed("blocked_seconds")
    def _stage_all(self, tasks: Iterable[Callable[[Scope], None]], concurrency: int) -> None:
        engine_for(self._config).run_all(tasks, concurrency, self._scope)

    def _stage_collected(self) -> None:
        """Stage the collected block: in the background if the budget has room for it now, else here.

        Nobody waits for the budget: readers may hold it until whoever writes here reads on.
        """
        block, length = self._collected, self._filled
        assert block is not None
        engine = engine_for(self._config)
        stage = self._staging(self._next_id(length), [block[:length]])
        self._collected, self._filled = None, 0
        self._wait_for_less_than(self._config.max_concurrency)
        reservation = Reservation(engine.budget)
        try:
            if reservation.take(block.nbytes):
                self._begun += 1
                engine.submit(lambda: self._stage_in_background(engine, block, reservation, stage))
                return
        except BaseException:
            reservation.release()  # interrupted: perhaps nobody stages it
            raise
        stage(self._scope)
        engine.buffers.give_back(block)

    def _wait_for_less_than(self, count: int) -> None:
        """Wait until fewer than *count* blocks are on their way in the background."""
        while self._begun - len(self._ended) >= count:
            self._news.get()

    def _stage_in_background(
        self, engine: Engine, block: memoryview, reservation: Reservation, stage: Callable[[Scope], None]
    ) -> None:
        try:
            if self._failure is None:
                self._scope.check()
                stage(self._scope)
        except BaseException as error:  # noqa: BLE001 - raised by the next call of the writer
            self._failure = self._failure or error
        finally:
            engine.buffers.give_back(block)
            reservation.release()
            self._ended.append(None)
            self._news.put(None)

    def _staging(
        self, block_id: str, pieces: Sequence[memoryview], staged: Callable[[int], None] | None = None
    ) -> Callable[[Scope], None]:
        length = sum(piece.nbytes for piece in pieces)

        def stage(_scope: Scope) -> None:
            headers = {"Content-MD5": _md5(pieces)} if self._config.validate_content else {}
            self._sdk.call(
                "PUT (block)",
                lambda client: client.stage_block(block_id, Pieces(pieces), length=length, headers=headers),  # type: ignore[arg-type]
            )
            if staged is not None:
                staged(length)

        return stage

    @timed("blocked_seconds")
    def _finish(self, operation: Callable[[], T]) -> T:
        try:
            return operation()
        except _UnknownOutcome as unknown:
            cause = unknown.__cause__
            raise FatalBlobIOWriteError(
                f"{self._url}: the commit was sent, and the service does not say whether it was carried out; look at "
                f"the blob before writing it again: {cause}"
            ) from cause

    def _put_blob(self, pieces: Sequence[memoryview], properties: Mapping[str, str] | None = None) -> None:
        length = sum(piece.nbytes for piece in pieces)
        headers = {
            "x-ms-blob-type": "BlockBlob",
            "Content-Type": "application/octet-stream",
            "Content-Length": str(length),
            **({"Content-MD5": _md5(pieces)} if self._config.validate_content else {}),
            **({"If-None-Match": "*"} if self._create_only else {}),
            **(properties or {}),
        }

        def put() -> None:
            self._service.send(
                "PUT", self._url, headers=headers, body=pieces, accept=frozenset({201}), scope=self._scope
            ).close()

        self._commit_once(put, lambda: self._has_content(length, _md5(pieces)))

    def _put_block_list(self, md5: bytes | None, properties: Mapping[str, str] | None) -> None:
        blocks = [BlobBlock(block_id=block_id) for block_id in self._block_ids]
        options: dict[str, Any] = (
            {"match_condition": MatchConditions.IfMissing, "etag": "*"} if self._create_only else {}
        )
        if md5 is not None:  # of a blob that is put whole the service computes it
            options["content_settings"] = ContentSettings(content_md5=bytearray(md5))
        if properties:
            options["headers"] = dict(properties)
        self._commit_once(
            self._sdk.attempt("PUT (block list)", lambda client: client.commit_block_list(blocks, **options)),
            self._is_committed,
        )

    def _commit_once(self, commit: Callable[[], object], look: Callable[[], bool]) -> None:
        """Run *commit*; *look* tells whether one that ended otherwise was carried out."""
        tries = 0

        def attempt() -> None:
            nonlocal tries
            tries += 1
            commit()

        try:
            retrying(self._config, attempt, self._scope)
        except (ResourceExistsError, ResourceModifiedError) as error:
            if not self._create_only:
                raise
            # After a lost answer the blob that is in the way may be the one we put.
            if tries == 1 or not self._took_effect(error, look):
                raise _exists(self._url, error) from error
        except (AzureError, ClientRequestIdMismatchError) as error:
            is_refused = isinstance(error, HttpResponseError) and error.status_code not in RETRYABLE_STATUS
            if is_refused or not self._took_effect(error, look):
                raise

    def _took_effect(self, error: Exception, look: Callable[[], bool]) -> bool:
        """What *look* says of a commit that ended with *error*, as one does whose answer is lost."""
        try:
            return look()
        except ResourceNotFoundError:
            return False
        except (AzureError, ClientRequestIdMismatchError):
            raise _UnknownOutcome from error

    def _has_content(self, length: int, md5: str) -> bool:
        found = self._sdk.call("HEAD", lambda client: client.get_blob_properties())
        return found.size == length and bytes(found.content_settings.content_md5 or b"") == base64.b64decode(md5)

    def _is_committed(self) -> bool:
        committed, _ = self._sdk.call("GET (block list)", lambda client: client.get_block_list("committed"))
        return [block.id for block in committed] == self._block_ids

    def _free(self) -> None:
        block, self._collected = self._collected, None
        if block is not None:
            engine_for(self._config).buffers.give_back(block)


def _exists(url: BlobURL, refused: AzureError | None = None) -> ResourceExistsError:
    told = f": {refused}" if refused is not None else ""
    error = ResourceExistsError(f"{url} exists already, and was to be created only; it is unchanged{told}")
    error.status_code = 409
    error.error_code = "BlobAlreadyExists"  # type: ignore[attr-defined]  # the SDK sets it too
    return portable(error)


def _md5(pieces: Sequence[memoryview]) -> str:
    digest = hashlib.md5(usedforsecurity=False)
    for piece in pieces:
        digest.update(piece)
    return base64.b64encode(digest.digest()).decode()
