"""Make uploaded bytes the content of a blob, once, and find out what became of a commit whose answer was lost."""

from __future__ import annotations

import base64
import hashlib
import xml.etree.ElementTree as ET
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

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
from azstoragetorch._blob.retry import RETRYABLE_STATUS, Transient, retrying
from azstoragetorch._blob.service import Request, Service
from azstoragetorch._blob.url import BlobURL
from azstoragetorch._engine.scope import Scope
from azstoragetorch.exceptions import ClientRequestIdMismatchError, FatalBlobIOWriteError

CREATED = frozenset({201})


@dataclass(frozen=True, slots=True)
class BlobProperties:
    """A blob as the service describes it."""

    version: BlobVersion
    md5: bytes | None
    headers: Mapping[str, str]


def get_properties(service: Service, url: BlobURL, scope: Scope | None = None) -> BlobProperties:
    """Ask the service about the blob at *url*.

    Raises:
        ResourceNotFoundError: it does not exist.
        AzureError: the service refused, or could not be reached.
        Cancelled: *scope* was cancelled.
    """
    return retrying(service.config, lambda: _get_properties(service, url, scope), scope)


def _get_properties(service: Service, url: BlobURL, scope: Scope | None) -> BlobProperties:
    with service.send(Request("HEAD", url, accept=frozenset({200}), scope=scope)) as answer:
        headers = answer.headers
    length, etag = headers.get("Content-Length", ""), headers.get("ETag", "")
    if not (length.isascii() and length.isdigit() and etag):
        what = f"HEAD {url}: the service told no length and ETag: {length!r}, {etag!r}"
        raise Transient(picklable(ServiceResponseError(what)))
    return BlobProperties(BlobVersion(int(length), etag), _md5(headers.get("Content-MD5")), headers)


def _md5(stored: str | None) -> bytes | None:
    if not stored:
        return None
    try:
        return base64.b64decode(stored, validate=True)
    except ValueError:
        return b""  # the MD5 of no bytes at all, so that a comparison with it fails


def exists_already(url: BlobURL, refused: AzureError | None = None) -> ResourceExistsError:
    """The error for a blob that was to be created only, and is there."""
    detail = f": {refused}" if refused is not None else ""
    error = ResourceExistsError(f"{url} exists already, and was to be created only; it is unchanged{detail}")
    error.status_code = 409
    error.error_code = "BlobAlreadyExists"  # type: ignore[attr-defined]  # the SDK sets it too
    return picklable(error)


def unknown_outcome(url: BlobURL, error: Exception) -> FatalBlobIOWriteError:
    """The error for a commit that ended with *error*, if the service does not answer what became of it."""
    return FatalBlobIOWriteError(
        f"{url}: the commit was sent, and the service does not say whether it was carried out; look at the blob before "
        f"writing it again: {error}"
    )


# The answer to a commit can be lost after the service has carried it out, so silence is never taken for a failure.
#
# - The request is sent again. Without a condition a second one leads to the same content: Put Blob carries all bytes,
#   and the block ids of Put Block List exist in this one writer only, so the list means the same bytes or is refused.
# - "Create only" is a condition, and a second request is refused if the first one was carried out. So after a refusal
#   that is not the answer to the very first request, the blob is looked at: by its block ids, or by length and MD5 for
#   Put Blob, it is ours (success) or another writer's (which stays; our bytes are not visible). `transport` does not
#   send a conditional write again by itself, which would hide that there was a first one.
# - After the last try has failed the blob is looked at in the same way.
# - If that look is not answered either, nobody knows, and the error says so instead of "nothing was committed".
class Commit:
    """The one commit of a writer to *url*; with *create_only* there must not be a blob.

    Both functions raise FatalBlobIOWriteError if the service does not say what became of the request, AzureError if it
    refuses, and ResourceExistsError if there is a blob that was to be created only.
    """

    def __init__(self, service: Service, url: BlobURL, scope: Scope, *, create_only: bool) -> None:
        self._service = service
        self._url = url
        self._scope = scope
        self._condition = {"If-None-Match": "*"} if create_only else {}
        self._tries = 0

    def put_blob(self, pieces: Sequence[memoryview], properties: Mapping[str, str]) -> None:
        """Make *pieces*, bytes in order, the content of the blob; *properties* are headers that describe it."""
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
        """Make the staged blocks *block_ids* the content of the blob; *md5* is that of all bytes, if it is known."""
        headers = {
            "Content-Type": "application/xml",
            # The service computes the MD5 of a blob that is put whole, and of no other.
            **({"x-ms-blob-content-md5": base64.b64encode(md5).decode()} if md5 is not None else {}),
            **self._condition,
            **properties,
        }
        listed = "".join(f"<Latest>{block_id}</Latest>" for block_id in block_ids)
        body = f'<?xml version="1.0" encoding="utf-8"?><BlockList>{listed}</BlockList>'.encode()
        request = Request("PUT", self._url, "comp=blocklist", headers, body, CREATED, self._scope, "block list")
        self._send(request, lambda: self._has_blocks(block_ids))

    def _send(self, request: Request, is_committed: Callable[[], bool]) -> None:
        """Send *request* until it is answered; *is_ours* looks whether the blob is what is to be committed."""
        try:
            retrying(self._service.config, lambda: self._try(request), self._scope)
        except (ResourceExistsError, ResourceModifiedError) as error:
            if not self._condition:
                raise
            if self._tries == 1 or not self._took_effect(error, is_committed):
                raise exists_already(self._url, error) from error
        except (AzureError, ClientRequestIdMismatchError) as error:
            is_refused = isinstance(error, HttpResponseError) and error.status_code not in RETRYABLE_STATUS
            if is_refused or not self._took_effect(error, is_committed):
                raise

    def _try(self, request: Request) -> None:
        self._tries += 1
        self._service.send(request).close()

    def _took_effect(self, error: Exception, is_committed: Callable[[], bool]) -> bool:
        """What *is_ours* says after a commit that ended with *error*, as one does whose answer was lost."""
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
        with self._service.send(Request("GET", self._url, query, scope=self._scope, purpose="block list")) as answer:
            raw = answer.read()
        try:
            return parse_block_list(raw)
        except ValueError as error:
            what = f"GET (block list) {self._url}: the service sent a list that cannot be read: {error}"
            raise Transient(picklable(ServiceResponseError(what))) from None


def parse_block_list(raw: bytes) -> list[str]:
    """The ids of the committed blocks in an answer to Get Block List.

    Raises:
        ValueError: *raw* is not such a list.
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
    """The MD5 of *pieces*, bytes in order, as headers carry it."""
    digest = hashlib.md5(usedforsecurity=False)
    for piece in pieces:
        digest.update(piece)
    return base64.b64encode(digest.digest()).decode()
