"""Fetch one byte range, over one or many connections, directly into the caller's memory.

Every request after the first carries the ETag of the first response, so a read never mixes versions of a blob. The
status, range and length of every response are checked, and a body that ends early is resumed at the byte it reached.
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from azure.core.exceptions import ServiceResponseError

from azstoragetorch._blob.errors import picklable
from azstoragetorch._blob.retry import Retry, Transient
from azstoragetorch._blob.service import Request, Service, ServiceResponse
from azstoragetorch._blob.url import BlobURL
from azstoragetorch._engine.config import KiB
from azstoragetorch._engine.ranges import ByteRange, split
from azstoragetorch._engine.scope import Scope, on_error
from azstoragetorch._engine.threads import engine_for
from azstoragetorch.exceptions import BlobChangedError

_CONTENT_RANGE = re.compile(r"bytes (?:([0-9]{1,19})-([0-9]{1,19})|\*)/([0-9]{1,19})")
_PROGRESS_STEP = 512 * KiB  # bytes between two reports of what has arrived
_REAL_PROGRESS = 64 * KiB  # bytes; less than this between two failures does not reset the retry count
_STATUSES = frozenset({200, 206, 412, 416})


@dataclass(frozen=True, slots=True)
class BlobVersion:
    """One version of a blob: its length in bytes and its ETag."""

    size: int
    etag: str


class RangeRead:
    """A read of one range. `open_range` returns it when the response headers have arrived; `receive` does the rest.

    ``version`` is the version of the blob, ``span`` the part of the requested range that lies within the blob.
    """

    def __init__(self, service: Service, url: BlobURL, span: ByteRange, etag: str | None, scope: Scope) -> None:
        self._service = service
        self._url = url
        self._scope = scope
        self._retry = Retry(service.config)
        self._etag = etag
        self._response: ServiceResponse | None = None
        self.span = span
        self.version = self._open()

    def _open(self) -> BlobVersion:
        while True:
            try:
                response, version = self._request(self.span)
            except Transient as failure:
                self._scope.pause(self._retry.pause_after(failure))
                continue
            self.span = ByteRange(min(self.span.start, version.size), min(self.span.stop, version.size))
            self._response = response
            self._etag = version.etag
            return version

    def receive(self, targets: Sequence[memoryview], progress: Callable[[int], None] | None = None) -> None:
        """Receive all of ``span`` into *targets*, which are filled in order.

        *progress* is called with the total number of bytes that have arrived.
        """
        done = counted = 0
        length = len(self.span)
        validates = self._service.config.validate_content
        while done < length:
            begin = done
            try:
                if self._response is None:
                    self._response, _ = self._request(ByteRange(self.span.start + done, self.span.stop))
                response, self._response = self._response, None
                with response:
                    for piece in _unfilled(targets, done):
                        self._scope.check()
                        received = response.readinto(piece)
                        done += received
                        if progress is not None and not validates:
                            progress(done)
                        if received < len(piece):
                            raise Transient(self._broken(f"ended the body after {done} of {length} bytes"))
                if validates:
                    self._validate(response, targets, begin)
            except Transient as failure:
                if validates:
                    done = begin  # the MD5 covers the whole response, so the response is received again
                if done - counted >= _REAL_PROGRESS:
                    counted = done
                    self._retry.made_progress()
                self._scope.pause(self._retry.pause_after(failure))
        if progress is not None:
            progress(done)
        self.close()

    def close(self) -> None:
        """Release the connection if `receive` was not called."""
        response, self._response = self._response, None
        if response is not None:
            response.close(
                is_complete=response.status != 206
            )  # the body of a 206 is as long as the range: not worth draining

    def _request(self, span: ByteRange) -> tuple[ServiceResponse, BlobVersion]:
        """Request *span* and check the response headers."""
        if not len(span):
            raise ValueError("cannot request an empty range")
        headers = {"x-ms-range": span.header}
        if self._etag is not None:
            headers["If-Match"] = self._etag
        if self._service.config.validate_content:
            headers["x-ms-range-get-content-md5"] = "true"
        request = Request("GET", self._url, headers=headers, accept=_STATUSES, scope=self._scope)
        response = self._service.send(request)
        with on_error(partial(response.close, is_complete=False)):
            return response, self._check(response, span)

    def _check(self, response: ServiceResponse, span: ByteRange) -> BlobVersion:
        if response.status == 412:
            raise self.changed()
        etag = response.headers.get("ETag", "")
        found = _CONTENT_RANGE.fullmatch(response.headers.get("Content-Range", ""))
        if response.status == 416:
            if self._etag is not None:
                raise self.changed()  # the pinned version had these bytes
            # Content-Range has the size of the blob. Without it, a refused first byte means that the blob is empty.
            size = int(found.group(3)) if found else 0 if span.start == 0 else None
            if size is None or size > span.start:
                raise Transient(self._broken("refused the range without reporting the size of the blob"))
            return BlobVersion(size, etag)
        if response.status != 206 or found is None or found.group(1) is None:
            raise Transient(
                self._broken(
                    f"answered the range {span.header} with {response.status} and "
                    f"Content-Range {response.headers.get('Content-Range')!r}"
                )
            )
        first, last, size = (int(group) for group in found.groups())
        stop = min(span.stop, size)
        if (first, last + 1) != (span.start, stop) or (response.length is not None and response.length != stop - first):
            raise Transient(
                self._broken(
                    f"answered the range {span.header} of {size} bytes with {found.group(0)!r} and a body of "
                    f"{response.length} bytes"
                )
            )
        if not etag:
            raise Transient(self._broken("sent no ETag"))
        if self._etag is not None and etag != self._etag:
            raise self.changed()
        return BlobVersion(size, etag)

    def _validate(self, response: ServiceResponse, targets: Sequence[memoryview], begin: int) -> None:
        expected = response.headers.get("Content-MD5")
        if expected is None:
            raise Transient(self._broken(f"sent {self.span.header} without the requested MD5"))
        digest = hashlib.md5(usedforsecurity=False)
        for piece in _unfilled(targets, begin):
            digest.update(piece)
        if base64.b64encode(digest.digest()).decode() != expected:
            raise Transient(
                self._broken(f"sent bytes of {self.span.header} that do not match the MD5 in the same response")
            )

    def changed(self) -> BlobChangedError:
        """The error to raise when the blob no longer has the pinned version."""
        return BlobChangedError(
            f"{self._url} was overwritten while it was being read; open it again to read the new version"
        )

    def _broken(self, what: str) -> ServiceResponseError:
        return picklable(ServiceResponseError(f"GET {self._url}: the service {what}"))


def open_range(
    service: Service, url: BlobURL, span: ByteRange, *, etag: str | None = None, scope: Scope | None = None
) -> RangeRead:
    """Request *span*; return when the response headers have arrived, while the body is still in flight.

    Raises:
        BlobChangedError: the blob no longer has *etag*.
        AzureError: the service refused the request, or could not be reached.
        Cancelled: *scope* was cancelled.
    """
    return RangeRead(service, url, span, etag, scope or Scope())


def fetch(
    service: Service, url: BlobURL, span: ByteRange, targets: Sequence[memoryview], *, etag: str, scope: Scope
) -> None:
    """Fetch *span* of the version *etag* into *targets* with one request."""
    open_range(service, url, span, etag=etag, scope=scope).receive(targets)


def fetch_parallel(
    service: Service,
    url: BlobURL,
    jobs: Sequence[tuple[ByteRange, memoryview]],
    *,
    etag: str,
    scope: Scope,
    opened: tuple[RangeRead, memoryview] | None = None,
) -> None:
    """Fetch every range of *jobs* into its memory, split into parts that are fetched over several connections.

    *opened* is a read that was already opened with the same *scope*; it is received first.
    """
    part_size = service.config.effective_part_size
    reads: list[tuple[ByteRange | RangeRead, memoryview]] = [] if opened is None else [opened]
    for span, target in jobs:
        for part in split(span, part_size):
            at = part.start - span.start
            reads.append((part, target[at : at + len(part)]))

    def receive(read: tuple[ByteRange | RangeRead, memoryview], scope: Scope) -> None:
        source, target = read
        if isinstance(source, ByteRange):
            fetch(service, url, source, [target], etag=etag, scope=scope)
        else:
            source.receive([target])

    engine = engine_for(service.config)
    engine.map(receive, reads, engine.concurrency(service.config), scope)


def _unfilled(targets: Sequence[memoryview], done: int) -> list[memoryview]:
    """The rest of *targets* after *done* bytes, in pieces of at most `_PROGRESS_STEP` bytes."""
    pieces = []
    for target in targets:
        if done >= target.nbytes:
            done -= target.nbytes
            continue
        pieces += [
            target[at : min(at + _PROGRESS_STEP, target.nbytes)] for at in range(done, target.nbytes, _PROGRESS_STEP)
        ]
        done = 0
    return pieces
