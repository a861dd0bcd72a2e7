"""Write a block blob: stage blocks in parallel, then commit all of them with one request, or none.

Small writes are collected into blocks, which are staged in the background. A write that is large enough to keep all
connections busy is staged from the caller's memory before it returns. The blob does not change before `commit`. A
writer that never commits leaves uncommitted blocks, which the service discards after a week or at the next commit.
"""

from __future__ import annotations

import base64
import os
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial, wraps
from typing import Concatenate, ParamSpec, TypeVar
from urllib.parse import quote

from azure.core.exceptions import (
    AzureError,
    ClientAuthenticationError,
    ResourceExistsError,
    ResourceNotFoundError,
)

from azstoragetorch._blob.commit import CREATED, Commit, exists_already, get_properties, md5_of
from azstoragetorch._blob.connection import length_of
from azstoragetorch._blob.copying import CopyOrUpload, CopyRange, stage_block
from azstoragetorch._blob.retry import retrying
from azstoragetorch._blob.service import Request, Service
from azstoragetorch._blob.url import BlobURL
from azstoragetorch._engine.budget import BufferPool, Loan
from azstoragetorch._engine.growth import Growth
from azstoragetorch._engine.job import Bell, Job
from azstoragetorch._engine.memory import copy
from azstoragetorch._engine.metrics import timed
from azstoragetorch._engine.process import here
from azstoragetorch._engine.ranges import (
    MAX_BLOCKS,
    busy_length,
    collected_block,
    even_blocks,
    growing_blocks,
    regroup,
)
from azstoragetorch._engine.scope import Cancelled, Scope
from azstoragetorch._engine.threads import engine_for
from azstoragetorch.exceptions import AZStorageTorchError, FatalBlobIOWriteError

_COPY_ATTEMPTS = 3  # after which the bytes are uploaded instead

P = ParamSpec("P")
T = TypeVar("T")


def _all_or_nothing(method: Callable[Concatenate[BlockWriter, P], T]) -> Callable[Concatenate[BlockWriter, P], T]:
    """Make an error or an interrupt in *method* end the writer, which may have lost bytes that it was given.

    The writer is marked as incomplete before the call and as complete after it. So wherever an interrupt comes, also
    while another error is being handled, the writer stays incomplete and never commits.
    """

    @wraps(method)
    def guarded(writer: BlockWriter, /, *arguments: P.args, **options: P.kwargs) -> T:
        writer._check()  # noqa: SLF001
        writer._is_whole = False  # noqa: SLF001
        try:
            result = method(writer, *arguments, **options)
            writer._is_whole = True  # noqa: SLF001
            return result
        except BaseException as error:  # noqa: BLE001 - raised as a FatalBlobIOWriteError
            failed = writer._failed(error)  # noqa: SLF001
            raise failed from failed.__cause__

    return guarded


BlockContent = Sequence[memoryview] | CopyRange | CopyOrUpload


@dataclass(frozen=True, slots=True)
class _Block:
    """The bytes of one block: in one or more pieces, or in another blob."""

    block_id: str
    content: BlockContent

    @property
    def length(self) -> int:
        content = self.content
        return len(content) if isinstance(content, (CopyRange, CopyOrUpload)) else length_of(content)


class _BorrowedBuffer:
    """The buffer and the loan of a block that is staged in the background. They are returned once."""

    def __init__(self, buffer: memoryview, loan: Loan, pool: BufferPool) -> None:
        self._buffers = [buffer]  # `pop` is one step, so only one caller returns it
        self._loan = loan
        self._pool = pool

    def check(self) -> None:
        """Raise `Cancelled` if the buffer was returned: an interrupt has ended the first attempt to stage the block."""
        if not self._buffers:
            raise Cancelled

    def release(self) -> None:
        """Return the buffer and end the loan. Never waits."""
        while self._buffers:
            self._pool.give_back(self._buffers.pop())
        self._loan.release()


class BlockWriter:
    """Collects, stages and commits the bytes of one blob. Not thread-safe: the caller serializes the calls."""

    def __init__(self, service: Service, url: BlobURL, *, create_only: bool = False) -> None:
        self._service = service
        self._url = url
        self._config = service.config
        self._create_only = create_only
        self._scope = Scope()
        self._process = here()
        # Unique to this writer, so that blocks of two writers to one blob never mix. All ids must have the same length.
        self._nonce = os.urandom(9).hex()
        self._block_ids: list[str] = []
        self._collected: memoryview | None = None
        self._filled = 0
        self._staged = 0
        self._in_flight: list[Job[None]] = []  # blocks that are staged in the background
        self._bell = Bell()  # rings when one of them is over
        self._failures: list[BaseException] = []  # the first one has ended the writer
        self._is_whole = True  # it has all bytes that it was given, see `_all_or_nothing`

    @property
    def written(self) -> int:
        """The number of bytes written so far."""
        return self._staged + self._filled

    @_all_or_nothing
    def write(self, data: memoryview) -> None:
        """Write *data*, a contiguous view of bytes, which is not used after the call returns.

        Raises:
            FatalBlobIOWriteError: staging this or an earlier block failed; nothing will be committed.
        """
        block, length = self._collected, data.nbytes
        if block is not None and length < block.nbytes - self._filled:  # most small writes end here
            copy(block[self._filled : self._filled + length], data)
            self._filled += length
            return
        while data.nbytes:
            if data.nbytes >= busy_length(self._staged, self._config):
                self._stage_from_caller(data)
                return
            if self._collected is None:
                size = collected_block(self._staged, self._config)
                self._collected = engine_for(self._config).buffers.take(size)
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
        """Write all of *pieces* in order, in blocks of *block_size* that can span pieces, *concurrency* at once.

        Nothing is copied: the bytes are sent from the memory of the pieces, which must not change until the call
        returns. Pieces are drawn as blocks are sent, by one thread at a time, but not always the same thread.
        *staged* is called from any thread with the length of each block that was staged.

        Raises:
            FatalBlobIOWriteError: staging a block failed, or *pieces* raised; nothing will be committed.
        """
        if self._filled:
            self._stage_collected()
        blocks = map(self._block, regroup(pieces, growing_blocks(self._staged, block_size)))
        self._stage_all(blocks, concurrency, staged)

    @_all_or_nothing
    def write_blocks(
        self,
        blocks: Iterable[BlockContent],
        *,
        concurrency: int,
        staged: Callable[[int], None] | None = None,
    ) -> None:
        """Write all of *blocks* in order, *concurrency* at once. Each is one block: uploaded, or copied by the service.

        Memory, order, and *staged* are as in `write_pieces`. No block can be empty or larger than the service allows.

        Raises:
            FatalBlobIOWriteError: staging a block failed, or *blocks* raised; nothing will be committed.
        """
        if self._filled:
            self._stage_collected()
        self._stage_all(map(self._block, blocks), concurrency, staged)

    @_all_or_nothing
    def flush(self) -> None:
        """Wait until the blocks in flight are staged. Bytes that do not fill a block yet stay in memory.

        Raises:
            FatalBlobIOWriteError: staging a block failed.
        """
        self._wait_for_all()

    @_all_or_nothing
    def put(self, pieces: Sequence[memoryview]) -> None:
        """Replace the content of the blob with *pieces*, with one request whatever their length.

        Nothing is copied: the bytes are sent from the memory of the pieces, which must not change until the call
        returns.

        Raises:
            FatalBlobIOWriteError: the write failed; the blob is unchanged.
            ResourceExistsError: the blob exists and *create_only* is set.
        """
        self._put_blob(pieces, {})

    @_all_or_nothing
    def commit(self, *, md5: bytes | None = None, properties: Mapping[str, str] | None = None) -> None:
        """Replace the content of the blob with everything written, atomically, and store *md5* as its Content-MD5.

        *properties* are request headers such as ``x-ms-blob-content-type`` and ``x-ms-meta-*``. Raises the same errors
        as `put`.
        """
        if not self._block_ids:
            pieces = [self._collected[: self._filled]] if self._collected is not None else []
            self._put_blob(pieces, properties or {})
        else:
            if self._filled:
                self._stage_collected()
            self._wait_for_all()
            self._put_block_list(md5, properties or {})
        self._free()

    def cancel(self) -> None:
        """Make the requests in flight fail, and with them the call that waits for them.

        For other threads and finalizers. The owner of the writer still has to call `abort`.
        """
        if self._process is here():
            self._scope.cancel()

    def abort(self) -> None:
        """Cancel the requests in flight and free the memory; nothing is committed."""
        if self._process is not here():
            return  # in a forked child: the blocks and threads belong to the parent
        self._scope.cancel()  # a block that is being staged fails, and its thread returns the buffer and the loan
        for job in self._in_flight:
            job.give_up()
        self._free()

    def _check(self) -> None:
        if self._process is not here():
            raise FatalBlobIOWriteError(
                f"{self._url}: a writer cannot be used in a forked child process; open the blob in the child"
            )
        if not self._is_whole and not self._failures:
            self._failures.append(KeyboardInterrupt())  # an interrupt came where no handler could record it
        if self._failures:
            self._raise_failure()

    def _raise_failure(self) -> None:
        if self._failures:
            raise self._fatal(self._failures[0])

    def _failed(self, error: BaseException) -> BaseException:
        """Record that *error* has ended this writer; return the error to raise."""
        self._failures.append(error)
        # The frames in the traceback can keep a loan, a buffer or the caller's memory alive.
        _clear_frames(error)
        is_clear = isinstance(error, (FatalBlobIOWriteError, ResourceExistsError))
        return self._fatal(error) if isinstance(error, (Exception, Cancelled)) and not is_clear else error

    def _fatal(self, cause: BaseException) -> FatalBlobIOWriteError:
        why = cause if isinstance(cause, Exception) else "it was aborted or interrupted"
        error = FatalBlobIOWriteError(f"{self._url}: writing failed and nothing was committed: {why}")
        error.__cause__ = cause
        return error

    @timed("blocked_seconds")
    def _put_blob(self, pieces: Sequence[memoryview], properties: Mapping[str, str]) -> None:
        self._commit().put_blob(pieces, properties)

    @timed("blocked_seconds")
    def _put_block_list(self, md5: bytes | None, properties: Mapping[str, str]) -> None:
        self._commit().put_block_list(self._block_ids, md5, properties)

    def _commit(self) -> Commit:
        return Commit(self._service, self._url, self._scope, create_only=self._create_only)

    def _block(self, content: BlockContent) -> _Block:
        """Make *content* the next block of the blob."""
        if len(self._block_ids) >= MAX_BLOCKS:
            raise FatalBlobIOWriteError(
                f"{self._url}: {self.written} bytes need more than {MAX_BLOCKS} blocks; raise block_size or "
                "memory_limit in TransferConfig"
            )
        if not self._block_ids and self._create_only:
            self._refuse_existing()
        block_id = base64.b64encode(f"{self._nonce}{len(self._block_ids):06d}".encode()).decode()
        self._block_ids.append(block_id)
        block = _Block(block_id, content)
        self._staged += block.length
        return block

    def _refuse_existing(self) -> None:
        """Raise before anything is uploaded that could not be committed."""
        try:
            get_properties(self._service, self._url, self._scope)
        except ResourceNotFoundError:
            return
        except ClientAuthenticationError:
            return  # a SAS can allow creating but not reading; the commit will find out
        raise exists_already(self._url)

    def _stage_from_caller(self, data: memoryview) -> None:
        """Stage the collected bytes and *data* as blocks of about the same size, without copying *data*."""
        held, filled = self._collected, self._filled
        self._collected, self._filled = None, 0
        pieces = [data] if held is None else [held[:filled], data]
        cuts = even_blocks(length_of(pieces), self._staged, self._config)
        blocks = [self._block(block) for block in regroup(pieces, map(len, cuts))]
        self._stage_all(blocks, engine_for(self._config).concurrency(self._config))
        if held is not None:
            engine_for(self._config).buffers.give_back(held)

    @timed("blocked_seconds")
    def _stage_all(
        self, blocks: Iterable[_Block], concurrency: int | Growth, staged: Callable[[int], None] | None = None
    ) -> None:
        """Stage *blocks*, which are drawn as threads become free, and wait for all of them."""

        def stage(block: _Block, _scope: Scope) -> None:
            self._stage(block)
            if staged is not None:
                staged(block.length)

        engine_for(self._config).map(stage, blocks, concurrency, self._scope)

    def _stage_collected(self) -> None:
        """Stage the collected block: in the background if the budget has memory for it now, otherwise on this thread.

        This never waits for the budget: readers can hold all of it until this very thread reads further.
        """
        buffer, length = self._collected, self._filled
        assert buffer is not None
        engine = engine_for(self._config)
        block = self._block([buffer[:length]])
        self._collected, self._filled = None, 0
        self._wait_for_fewer_than(self._config.initial_concurrency)
        loan = engine.budget.take(buffer.nbytes)
        if loan is None:
            self._stage(block)
            engine.buffers.give_back(buffer)
            return
        job = Job(partial(self._stage_in_background, block, _BorrowedBuffer(buffer, loan, engine.buffers)), self._bell)
        del loan
        self._in_flight.append(job)
        engine.submit(job.run)

    @timed("blocked_seconds")
    def _wait_for_all(self) -> None:
        self._wait_for_fewer_than(1)
        self._raise_failure()

    def _wait_for_fewer_than(self, count: int) -> None:
        """Wait until fewer than *count* blocks are in flight in the background.

        A block that no thread has claimed is staged here. So a writer makes progress without a free thread, and never
        waits for a thread that itself waits for this writer.
        """
        while len(running := self._still_in_flight()) >= count:
            if not any(job.run() for job in running):
                self._bell.wait_until(lambda: any(job.is_over or job.is_open for job in running))

    def _still_in_flight(self) -> list[Job[None]]:
        self._in_flight = [job for job in self._in_flight if not job.is_over]
        return self._in_flight

    def _stage_in_background(self, block: _Block, held: _BorrowedBuffer) -> None:
        try:
            if not self._failures:
                self._scope.check()
                held.check()
                self._stage(block)
        except BaseException as error:
            self._failures.append(error)  # raised by the next call of the writer
            raise
        finally:
            held.release()

    def _stage(self, block: _Block) -> None:
        content, block_id = block.content, quote(block.block_id, safe="")
        if isinstance(content, CopyOrUpload):
            if content.may_try() and self._is_copied(block_id, content):
                return
            content = tuple(content.pieces())
        if isinstance(content, CopyRange):
            stage_block(self._service, self._url, block_id, content, self._scope)
            return
        query = f"comp=block&blockid={block_id}"
        headers = {"Content-MD5": md5_of(content)} if self._config.validate_content else {}
        request = Request("PUT", self._url, query, headers, content, CREATED, self._scope, "block")
        retrying(self._config, lambda: self._service.send(request).close(), self._scope)

    def _is_copied(self, block_id: str, content: CopyOrUpload) -> bool:
        """Have the service copy a block; False if it refuses, for whatever reason."""
        try:
            stage_block(self._service, self._url, block_id, content.part, self._scope, at_most=_COPY_ATTEMPTS)
        except (AzureError, AZStorageTorchError, ValueError) as error:
            content.refused(error)
            return False
        return True

    def _free(self) -> None:
        block, self._collected = self._collected, None
        if block is not None:
            engine_for(self._config).buffers.give_back(block)


def _clear_frames(error: BaseException | None) -> None:
    """Clear the local variables in the tracebacks of *error* and of the errors that caused it."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__
