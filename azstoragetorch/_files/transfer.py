"""Copy one file or blob atomically: nobody ever sees an incomplete target.

A target that is already a copy is recognized by its length and MD5. A copy reads one version of its source: of a blob
by its ETag, of a file by its length and modification time.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import BinaryIO, Protocol

from azstoragetorch._blob.client import BlobClient
from azstoragetorch._blob.upload import BlockWriter
from azstoragetorch._engine.config import TransferConfig
from azstoragetorch._engine.ranges import ByteRange, gaps, split
from azstoragetorch._engine.scope import Scope, on_error
from azstoragetorch._files.description import Description, describe, headers_of_copy
from azstoragetorch._files.partial import READ_SIZE, Partial
from azstoragetorch._files.paths import (
    CopyError,
    WrongMD5Error,
    display,
    has_unknown_length,
    is_stream_target,
    open_stream,
    open_to_read,
)

Advance = Callable[[int], None]
"""Called from any thread with the number of bytes copied since the last call."""


@dataclass(frozen=True, slots=True)
class CopyOptions:
    """Options of a copy."""

    is_forced: bool = False
    """Copy even if the target is already a copy of the source."""
    checks_md5: bool = True
    """Check the MD5 stored with the source."""
    keeps_tier: bool = True
    """Give the copy of a blob the access tier that was set for the source."""
    keeps_tags: bool = False
    """Give the copy of a blob the index tags of the source."""


def _ignore_tags(_count: int) -> None:
    """Do nothing."""


@dataclass(frozen=True, slots=True)
class Hooks:
    """The cancel scope and the callbacks of a copy."""

    scope: Scope
    advance: Advance
    report_tags: Callable[[int], None] = _ignore_tags
    """Called with the number of index tags of the source if the copy does not get them."""


def md5_of(path: Path) -> bytes:
    """The MD5 of a file."""
    digest = hashlib.md5(usedforsecurity=False)
    with path.open("rb") as file:
        while data := file.read(READ_SIZE):
            digest.update(data)
    return digest.digest()


def get_file(blob: BlobClient, path: Path, hooks: Hooks, options: CopyOptions = CopyOptions()) -> str:
    """Copy *blob* to the file *path*; returns whether it was ``copied``, ``resumed`` or ``skipped``.

    Raises:
        WrongMD5Error: the bytes do not match the MD5 stored with the blob.
        CopyError: a file cannot replace what is at *path*, or another process is downloading to it.
        BlobChangedError: the blob was overwritten during the copy.
        OSError: the file cannot be written.
    """
    if is_stream_target(path):
        with open_stream(path) as stream:
            get_stream(blob, stream, hooks, options)
        return "copied"
    found = describe(blob, hooks.scope)
    size = found.version.size
    if not options.is_forced and found.md5 is not None and _has_size(path, size) and md5_of(path) == found.md5:
        hooks.advance(size)
        return "skipped"
    identity = hashlib.sha256(f"{blob.url} {found.version.etag} {size}".encode()).hexdigest()
    with Partial(path, identity, size) as partial:
        missing = gaps(ByteRange(0, size), partial.present)
        hooks.advance(size - sum(map(len, missing)))
        _fetch_all(blob, found, missing, partial, hooks)
        partial.finish(found.md5 if options.checks_md5 else None, str(blob.url))
        return "resumed" if partial.present else "copied"


def get_stream(blob: BlobClient, stream: BinaryIO, hooks: Hooks, options: CopyOptions = CopyOptions()) -> None:
    """Write the whole *blob* to *stream*.

    Raises:
        WrongMD5Error: the bytes, which were already written, do not match the MD5 stored with the blob.
        BlobChangedError: the blob was overwritten during the copy.
        OSError: the stream cannot be written.
    """
    found = describe(blob, hooks.scope)
    digest = hashlib.md5(usedforsecurity=False)
    reader = blob.reader(found.version)
    try:
        buffer = memoryview(bytearray(min(READ_SIZE, max(1, found.version.size))))
        at = 0
        while count := reader.readinto(at, buffer[: found.version.size - at]):
            rest = buffer[:count]
            digest.update(rest)
            while rest.nbytes:
                rest = rest[stream.write(rest) or 0 :]
            at += count
            hooks.advance(count)
    finally:
        reader.close()
    if options.checks_md5 and found.md5 is not None and digest.digest() != found.md5:
        raise WrongMD5Error(
            f"{blob.url}: the bytes that were written do not match the MD5 stored with the blob; discard them"
        )


def put_file(
    path: Path, blob: BlobClient, known_size: int | None, hooks: Hooks, options: CopyOptions = CopyOptions()
) -> str:
    """Copy the file *path* to *blob*; returns whether it was ``copied`` or ``skipped``.

    *known_size* is the length of the existing blob, None if it does not exist. A file that does not report its length,
    as in ``/proc``, is read to its end.

    Raises:
        CopyError: the file changed during the copy; nothing was committed.
        OSError: the file cannot be read.
    """
    with open_to_read(path) as file:
        before = os.fstat(file.fileno())
        size = before.st_size
        if not stat.S_ISREG(before.st_mode):
            raise CopyError(f"{display(path)} was replaced with something that is not a file; nothing was copied")
        if not options.is_forced and known_size == size and describe(blob, hooks.scope).md5 == md5_of(path):
            hooks.advance(size)
            return "skipped"
        if has_unknown_length(path, before):
            put_stream(file, blob, hooks)
            return "copied"

        def read(at: int, view: memoryview) -> int:
            return file.readinto(view) if at < size else 0

        def check(_md5: bytes) -> None:
            after = os.fstat(file.fileno())
            if (after.st_size, after.st_mtime_ns) != (size, before.st_mtime_ns):
                raise CopyError(f"{display(path)} changed during the copy; nothing was committed: copy it again")

        _send(blob, _UploadSource(size, read, check, {}), hooks)
    return "copied"


def put_stream(stream: BinaryIO, blob: BlobClient, hooks: Hooks) -> int:
    """Copy *stream* to its end to *blob*; return the number of bytes.

    Raises:
        FatalBlobIOWriteError: the blob could not be written; nothing was committed.
        OSError: the stream cannot be read; nothing was committed.
    """
    digest = hashlib.md5(usedforsecurity=False)
    buffer = memoryview(bytearray(min(READ_SIZE, blob.config.block_size)))
    total = 0
    with _writing(blob, hooks.scope) as writer:
        while count := stream.readinto(buffer):  # type: ignore[attr-defined]  # every binary stream has it
            digest.update(buffer[:count])
            writer.write(buffer[:count])
            total += count
            hooks.advance(count)
        writer.commit(md5=digest.digest())
    return total


def copy_blob(source: BlobClient, target: BlobClient, hooks: Hooks, options: CopyOptions = CopyOptions()) -> str:
    """Copy a blob to another one through this machine, with its content headers, its metadata and what *options* add.

    Returns ``copied`` or ``skipped``.

    Raises:
        WrongMD5Error: the bytes do not match the MD5 stored with the source; nothing was committed.
        BlobChangedError: the source was overwritten during the copy.
    """
    found = describe(source, hooks.scope)
    size = found.version.size
    if found.tag_count and not options.keeps_tags:
        hooks.report_tags(found.tag_count)
    kept = partial(headers_of_copy, keeps_tier=options.keeps_tier, keeps_tags=options.keeps_tags, scope=hooks.scope)
    headers = kept(source, found)
    there = target.version() if not options.is_forced and found.md5 is not None else None
    if there is not None and there.size == size:
        present = describe(target, hooks.scope)
        if present.md5 == found.md5 and kept(target, present) == headers:
            hooks.advance(size)
            return "skipped"
    reader = source.reader(found.version)

    def check(md5: bytes) -> None:
        if options.checks_md5 and found.md5 is not None and md5 != found.md5:
            raise WrongMD5Error(
                f"{source.url}: the bytes do not match the MD5 stored with the blob; nothing was committed"
            )

    try:
        _send(target, _UploadSource(size, reader.readinto, check, headers), hooks)
    finally:
        reader.close()
    return "copied"


class _Digest(Protocol):
    def update(self, data: memoryview, /) -> None: ...


@dataclass(frozen=True, slots=True)
class _UploadSource:
    """The new content of a blob: *read* returns its *size* bytes in order; *check* gets their MD5 and can raise."""

    size: int
    read: Callable[[int, memoryview], int]
    check: Callable[[bytes], None]
    properties: Mapping[str, str]


def _fetch_all(blob: BlobClient, found: Description, missing: list[ByteRange], partial: Partial, hooks: Hooks) -> None:
    """Fetch the ranges *missing* into *partial* in parallel."""
    config, engine = blob.config, blob.engine

    def fetch(span: ByteRange, scope: Scope) -> None:
        with engine.budget.wait_for(config.effective_part_size):
            buffer = engine.buffers.take(config.effective_part_size)
            blob.fetch(span, [buffer[: len(span)]], etag=found.version.etag, scope=scope)
            partial.write(span, buffer[: len(span)])
            engine.buffers.give_back(buffer)
        hooks.advance(len(span))

    parts = [part for span in missing for part in split(span, config.effective_part_size)]
    with hooks.scope.child() as inner:  # a failure cancels this copy only
        engine.map(fetch, parts, engine.concurrency(config), inner)


def _send(blob: BlobClient, content: _UploadSource, hooks: Hooks) -> None:
    """Write *content* to *blob*."""
    config, size = blob.config, content.size
    digest = hashlib.md5(usedforsecurity=False)
    with _writing(blob, hooks.scope) as writer:
        if size < config.block_size:
            # One request, without a commit.
            with blob.engine.budget.wait_for(size):
                for piece in _pieces(content, max(size, 1), digest, str(blob.url)):
                    writer.write(piece)
                content.check(digest.digest())
                writer.commit(properties=content.properties)
            hooks.advance(size)
        else:
            writer.write_pieces(
                _pieces(content, config.block_size, digest, str(blob.url)),
                block_size=config.block_size,
                concurrency=_blocks_at_once(config),
                staged=hooks.advance,
            )
            content.check(digest.digest())
            writer.commit(md5=digest.digest(), properties=content.properties)


def _pieces(content: _UploadSource, length: int, digest: _Digest, target: str) -> Iterator[memoryview]:
    """The bytes of *content*, *length* at a time."""
    at = 0
    while at < content.size:
        view = memoryview(bytearray(min(length, content.size - at)))
        filled = 0
        while filled < view.nbytes:
            count = content.read(at + filled, view[filled:])
            if not count:
                raise CopyError(
                    f"{target}: the source ended after {at + filled} of {content.size} bytes; nothing was committed"
                )
            filled += count
        digest.update(view)
        at += view.nbytes
        yield view


@contextmanager
def _writing(blob: BlobClient, scope: Scope) -> Iterator[BlockWriter]:
    """A writer that is cancelled with *scope* and aborted if the block raises an error."""
    writer = blob.writer()
    with on_error(writer.abort), scope.holding(writer.cancel):
        yield writer


def _blocks_at_once(config: TransferConfig) -> int:
    return max(1, min(config.initial_concurrency, config.memory_limit // (2 * config.block_size)))


def _has_size(path: Path, size: int) -> bool:
    try:
        found = path.lstat()
    except OSError:
        return False
    return stat.S_ISREG(found.st_mode) and found.st_size == size
