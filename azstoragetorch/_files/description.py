"""What the service says of a blob: its version, its MD5, and what a copy of it has to keep."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping
from dataclasses import dataclass

from azure.core.exceptions import ServiceResponseError

from azstoragetorch._blob.client import BlobClient
from azstoragetorch._blob.download import BlobVersion
from azstoragetorch._blob.errors import portable
from azstoragetorch._blob.retry import Transient, retrying
from azstoragetorch._engine.scope import Scope

_CONTENT = ("Content-Type", "Content-Encoding", "Content-Language", "Content-Disposition", "Cache-Control")
_METADATA = "x-ms-meta-"


@dataclass(frozen=True, slots=True)
class Description:
    """A blob as the service describes it."""

    version: BlobVersion
    md5: bytes | None
    properties: Mapping[str, str]
    """Content headers and metadata, as headers of the request that commits a copy."""


def describe(blob: BlobClient, scope: Scope) -> Description:
    """Ask the service for *blob*.

    Raises:
        AzureError: there is no such blob, or the service refused or could not be reached.
    """

    def look() -> Description:
        with blob.service.send("HEAD", blob.url, accept=frozenset({200}), scope=scope) as response:
            headers = response.headers
        length, etag = headers.get("Content-Length", ""), headers.get("ETag", "")
        if not (length.isascii() and length.isdigit() and etag):
            what = f"HEAD {blob.url}: the answer has no length and ETag: {length!r}, {etag!r}"
            raise Transient(portable(ServiceResponseError(what)))
        return Description(BlobVersion(int(length), etag), _md5(headers), _properties(headers))

    return retrying(blob.config, look, scope)


def _md5(headers: Mapping[str, str]) -> bytes | None:
    stored = headers.get("Content-MD5")
    if not stored:
        return None
    try:
        return base64.b64decode(stored, validate=True)
    except binascii.Error:
        return b""  # the MD5 of nothing: the copy fails, and the error says how to get past it


def _properties(headers: Mapping[str, str]) -> dict[str, str]:
    kept = {f"x-ms-blob-{name.lower()}": headers[name] for name in _CONTENT if headers.get(name)}
    return kept | {name: value for name, value in headers.items() if name.lower().startswith(_METADATA)}
