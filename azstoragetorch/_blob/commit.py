"""Commit a write exactly once, and find out whether a commit took effect when its response was lost."""

from __future__ import annotations

import base64
import hashlib
import socket
import xml.etree.ElementTree as ET
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from azure.core.exceptions import (
    AzureError,
    HttpResponseError,
    ResourceExistsError,
    ResourceModifiedError,
    ResourceNotFoundError,
    ServiceResponseError,
)

from azstoragetorch._blob.connection import length_of
from azstoragetorch._blob.download import BlobVersion
from azstoragetorch._blob.errors import picklable
from azstoragetorch._blob.head import number_in
from azstoragetorch._blob.retry import RETRYABLE_STATUS, Transient, retrying
from azstoragetorch._blob.service import Request, Service
from azstoragetorch._blob.url import BlobURL
from azstoragetorch._engine.scope import Scope
from azstoragetorch.exceptions import ClientRequestIdMismatchError, FatalBlobIOWriteError

CREATED = frozenset({201})


@dataclass(frozen=True, slots=True)
class BlobProperties:
    """The properties of a blob: its version, stored MD5 and response headers."""

    version: BlobVersion
    md5: bytes | None
    headers: Mapping[str, str]


def get_properties(service: Service, url: BlobURL, scope: Scope | None = None) -> BlobProperties:
    """Request the properties of the blob at *url*.

    Raises:
        ResourceNotFoundError: the blob does not exist.
        AzureError: the service refused the request, or could not be reached.
        Cancelled: *scope* was cancelled.
    """
    return retrying(service.config, lambda: _get_properties(service, url, scope), scope)


def _get_properties(service: Service, url: BlobURL, scope: Scope | None) -> BlobProperties:
    with service.send(Request("HEAD", url, accept=frozenset({200}), scope=scope)) as response:
        headers = response.headers
    length, etag = headers.get("Content-Length", ""), headers.get("ETag", "")
    size = number_in(length)
    if size is None or not etag:
        what = f"HEAD {url}: the service sent no valid length and ETag: {length[:80]!r}, {etag!r}"
        raise Transient(picklable(ServiceResponseError(what)))
    return BlobProperties(BlobVersion(size, etag), _md5(headers.get("Content-MD5")), headers)


def read_tags(service: Service, url: BlobURL, scope: Scope | None = None) -> dict[str, str]:
    """The index tags of the blob at *url*. Raises as `get_properties` does.

    Reading tags needs a separate permission.
    """
    request = Request("GET", url, "comp=tags", scope=scope, purpose="tags")

    def ask() -> bytes:
        with service.send(request) as response:
            return response.read()

    raw = retrying(service.config, ask, scope)
    try:
        root = ET.fromstring(raw)  # noqa: S314 - as in `listing`
    except (ET.ParseError, LookupError, ValueError) as error:
        raise picklable(ServiceResponseError(f"GET (tags) {url}: the response is not XML: {error}")) from error
    return {tag.findtext("Key") or "": tag.findtext("Value") or "" for tag in root.iter("Tag")}


def _md5(stored: str | None) -> bytes | None:
    if not stored:
        return None
    try:
        return base64.b64decode(stored, validate=True)
    except ValueError:
        return b""  # invalid: no MD5 is equal to it


def exists_already(url: BlobURL, refused: AzureError | None = None) -> ResourceExistsError:
    """The error to raise when a blob that must not be overwritten exists."""
    detail = f": {refused}" if refused is not None else ""
    error = ResourceExistsError(f"{url} already exists, and overwriting it was not allowed; it is unchanged{detail}")
    error.status_code = 409
    error.error_code = "BlobAlreadyExists"  # type: ignore[attr-defined]  # the SDK sets it too
    return picklable(error)


def unknown_outcome(url: BlobURL, error: Exception) -> FatalBlobIOWriteError:
    """The error to raise when a commit ended with *error* and the service does not say whether it took effect."""
    return FatalBlobIOWriteError(
        f"{url}: the commit was sent, but the service does not say whether it was carried out; check the blob before "
        f"writing it again: {error}"
    )


# When the response to a commit is lost, the service may have carried it out or not. A retry must not hide a commit that
# took effect, and an error must not say "nothing was committed" unless that is true. By the outcome of an attempt:
#
#     201                         committed
#     refused, first attempt      not committed: raise. With "create only" a refusal by 409 or 412 means that the blob
#                                 existed before, and becomes ResourceExistsError.
#     no connection               not committed: try again, as `retry` allows; it does not count as sent
#     no response, or 5xx         unknown: try again, as `retry` allows
#     refused, later attempt      unknown: an earlier attempt may have taken effect (with "create only" its blob makes
#                                 this attempt fail; or the SAS has expired in between). Check.
#     last attempt failed         unknown. Check.
#
# To check means to compare the blob with what was to be committed: its block ids for Put Block List, which exist in
# this writer only; its length and MD5 for Put Blob. If they match, an attempt took effect, and the commit succeeded. If
# not, the blob is the old one or another writer's, and the error is raised. If the check fails as well, the outcome
# stays unknown, and the error says that (`unknown_outcome`).
#
# Sending an attempt again is harmless. Without a condition it produces the same content: Put Blob carries all bytes,
# and Put Block List names the same blocks or is refused because they are gone. With "create only" (If-None-Match: *)
# the service refuses it if the first one took effect. `transport` sends a request again by itself when a pooled
# connection turns out to be dead, and reports it, so that it counts as an attempt here. It does not repeat
# a conditional write: the service would refuse the second request because of the first.
#
# `BlobClient.replace`, which writes under If-Match, checks after every attempt without a response or with a failed
# condition, since it has to know the current ETag in any case.
class Commit:
    """The commit of one writer to *url*; with *create_only* the blob must not exist.

    Both methods raise FatalBlobIOWriteError if the service does not say whether the request was carried out, AzureError
    if it refuses the request, and ResourceExistsError if the blob exists and *create_only* is set.
    """

    def __init__(self, service: Service, url: BlobURL, scope: Scope, *, create_only: bool) -> None:
        self._service = service
        self._url = url
        self._scope = scope
        self._condition = {"If-None-Match": "*"} if create_only else {}
        self._attempts = 0  # that may have reached the service

    def put_blob(self, pieces: Sequence[memoryview], properties: Mapping[str, str]) -> None:
        """Replace the content of the blob with *pieces*; *properties* are headers that describe it."""
        headers = {
            "x-ms-blob-type": "BlockBlob",
            "Content-Type": "application/octet-stream",
            **({"Content-MD5": md5_of(pieces)} if self._service.config.validate_content else {}),
            **self._condition,
            **properties,
        }
        request = Request("PUT", self._url, headers=headers, body=pieces, accept=CREATED, scope=self._scope)
        self._send(request, lambda: self._has_content(pieces))

    def put_block_list(self, block_ids: Sequence[str], md5: bytes | None, properties: Mapping[str, str]) -> None:
        """Replace the content of the blob with the staged blocks *block_ids*; *md5* is that of all bytes, if known."""
        headers = {
            "Content-Type": "application/xml",
            # The service itself computes the MD5 for Put Blob only.
            **({"x-ms-blob-content-md5": base64.b64encode(md5).decode()} if md5 is not None else {}),
            **self._condition,
            **properties,
        }
        listed = "".join(f"<Latest>{block_id}</Latest>" for block_id in block_ids)
        body = f'<?xml version="1.0" encoding="utf-8"?><BlockList>{listed}</BlockList>'.encode()
        request = Request("PUT", self._url, "comp=blocklist", headers, body, CREATED, self._scope, "block list")
        self._send(request, lambda: self._has_blocks(block_ids))

    def _send(self, request: Request, is_committed: Callable[[], bool]) -> None:
        """Send *request* until it has a response; *is_committed* checks whether the blob has the committed content."""
        request = replace(request, on_repeat=self._count_attempt)
        try:
            retrying(self._service.config, lambda: self._try(request), self._scope)
        except (AzureError, ClientRequestIdMismatchError) as error:
            if not self._attempts:
                raise
            is_refused = isinstance(error, HttpResponseError) and error.status_code not in RETRYABLE_STATUS
            if not (is_refused and self._attempts == 1) and self._took_effect(error, is_committed):
                return
            if self._condition and isinstance(error, (ResourceExistsError, ResourceModifiedError)):
                raise exists_already(self._url, error) from error
            raise

    def _try(self, request: Request) -> None:
        self._count_attempt()
        try:
            self._service.send(request).close()
        except Transient as failure:
            if isinstance(failure.__cause__, (ConnectionRefusedError, socket.gaierror)):
                self._attempts -= 1  # nothing was sent: the service cannot have carried it out
            raise

    def _count_attempt(self) -> None:
        self._attempts += 1

    def _took_effect(self, error: Exception, is_committed: Callable[[], bool]) -> bool:
        """Whether an attempt took effect although the last one ended with *error*."""
        try:
            return is_committed()
        except ResourceNotFoundError:
            return False
        except (AzureError, ClientRequestIdMismatchError):
            raise unknown_outcome(self._url, error) from error

    def _has_content(self, pieces: Sequence[memoryview]) -> bool:
        found = get_properties(self._service, self._url, self._scope)
        return (found.version.size, found.md5) == (length_of(pieces), base64.b64decode(md5_of(pieces)))

    def _has_blocks(self, block_ids: Sequence[str]) -> bool:
        return retrying(self._service.config, self._committed_blocks, self._scope) == list(block_ids)

    def _committed_blocks(self) -> list[str]:
        query = "comp=blocklist&blocklisttype=committed"
        with self._service.send(Request("GET", self._url, query, scope=self._scope, purpose="block list")) as response:
            raw = response.read()
        try:
            return parse_block_list(raw)
        except ValueError as error:
            what = f"GET (block list) {self._url}: the service sent a list that cannot be read: {error}"
            raise Transient(picklable(ServiceResponseError(what))) from None


def parse_block_list(raw: bytes) -> list[str]:
    """The ids of the committed blocks in a response to Get Block List.

    Raises:
        ValueError: *raw* is not a block list.
    """
    text = raw.decode("utf-8-sig")
    if "<!" in text:
        raise ValueError("it has a declaration, which could define entities")
    try:
        root = ET.fromstring(text)  # noqa: S314 - without a declaration there is nothing to expand or fetch
    except ET.ParseError as error:
        raise ValueError(str(error)) from None
    if root.tag != "BlockList":
        raise ValueError(f"its root is {root.tag!r}")
    return [name.text or "" for name in root.iterfind("CommittedBlocks/Block/Name")]


def md5_of(pieces: Sequence[memoryview]) -> str:
    """The MD5 of *pieces* in base64, as headers carry it."""
    digest = hashlib.md5(usedforsecurity=False)
    for piece in pieces:
        digest.update(piece)
    return base64.b64encode(digest.digest()).decode()
