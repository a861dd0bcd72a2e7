"""Let the service itself copy bytes of one blob into another: they do not pass through this machine.

Every request names the version (ETag) of the source, so a copy never mixes versions. It can be sent again after a lost
response: the service then copies the same bytes of the same version.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace

from azure.core.exceptions import ResourceModifiedError, ServiceResponseError

from azstoragetorch._blob.errors import picklable
from azstoragetorch._blob.retry import retrying
from azstoragetorch._blob.service import Request, Service
from azstoragetorch._blob.url import BlobURL
from azstoragetorch._engine.config import MAX_BLOCK_SIZE, MiB
from azstoragetorch._engine.metrics import count
from azstoragetorch._engine.ranges import ByteRange
from azstoragetorch._engine.scope import Scope
from azstoragetorch.exceptions import BlobChangedError

MAX_COPIED_AT_ONCE = 256 * MiB  # the service's limit for one Copy Blob From URL
MAX_COPIED_BLOCK = MAX_BLOCK_SIZE  # the service's limit for one Put Block From URL


@dataclass(frozen=True, slots=True)
class CopySource:
    """One version of a blob, and the service whose credential can read it."""

    service: Service
    url: BlobURL
    etag: str

    def __str__(self) -> str:
        return str(self.url)


@dataclass(frozen=True, slots=True)
class CopyRange:
    """Bytes of another blob that become one block."""

    source: CopySource
    span: ByteRange

    def __len__(self) -> int:
        return len(self.span)


@dataclass(frozen=True, slots=True)
class CopyOrUpload:
    """Bytes of another blob that become one block. Where the service refuses to copy them, *pieces* are uploaded.

    *may_try* says whether to ask the service at all, and *refused* is called with its reason, both from any thread.
    """

    part: CopyRange
    pieces: Callable[[], Iterable[memoryview]]
    may_try: Callable[[], bool]
    refused: Callable[[Exception], None]

    def __len__(self) -> int:
        return len(self.part)


def copy_blob(
    service: Service, url: BlobURL, source: CopySource, properties: Mapping[str, str], scope: Scope | None = None
) -> None:
    """Replace the blob at *url* with *source*, which has at most `MAX_COPIED_AT_ONCE` bytes, with one request.

    Content headers and metadata of the source are copied. *properties* are request headers, such as
    ``x-ms-access-tier``.

    Raises:
        BlobChangedError: the source no longer has its ETag.
        AzureError: the service refused the request, cannot read the source, or cannot be reached.
        Cancelled: *scope* was cancelled.
    """

    def send() -> None:
        headers = {"x-ms-requires-sync": "true", **properties}
        with service.send(_request(url, "", headers, source, frozenset({202}), scope)) as response:
            status = response.headers.get("x-ms-copy-status", "")
        if status.lower() != "success":
            what = f"PUT (copy) {url}: the service did not copy {source} at once: it sent the status {status!r}"
            raise picklable(ServiceResponseError(what))

    _carry_out(service, source, send, scope)


def stage_block(
    service: Service,
    url: BlobURL,
    block_id: str,
    part: CopyRange,
    scope: Scope | None = None,
    *,
    at_most: int | None = None,
) -> None:
    """Stage *part*, at most `MAX_COPIED_BLOCK` bytes, as the block *block_id* (percent-encoded) of the blob at *url*.

    *at_most* limits the attempts, where there is something else to try. Raises as `copy_blob` does.
    """
    query = f"comp=block&blockid={block_id}"
    headers = {"x-ms-source-range": part.span.header}

    def send() -> None:
        service.send(_request(url, query, headers, part.source, frozenset({201}), scope)).close()

    _carry_out(service, part.source, send, scope, at_most)
    count("bytes_copied", len(part))


def _request(
    url: BlobURL,
    query: str,
    headers: Mapping[str, str],
    source: CopySource,
    accept: frozenset[int],
    scope: Scope | None,
) -> Request:
    if (source.url.scheme, source.url.host) != (url.scheme, url.host) and not url.is_azure:
        raise ValueError(
            f"{url}: not copied from {source} by the service: the credential of the source would be sent to a host "
            "that is not one of Azure Storage"
        )
    # The credential of the source can expire between two attempts, so each attempt asks for it.
    proof = source.service.source_headers(source.url)
    sent = {**headers, **proof, "x-ms-source-if-match": source.etag}
    return Request("PUT", url, query, sent, b"", accept, scope, f"copy from {source}")


def _carry_out(
    service: Service, source: CopySource, send: Callable[[], None], scope: Scope | None, at_most: int | None = None
) -> None:
    config = service.config
    if at_most is not None:
        config = replace(config, max_attempts=min(config.max_attempts, at_most))
    try:
        retrying(config, send, scope)
    except ResourceModifiedError as error:
        raise BlobChangedError(f"{source} was overwritten while it was being copied: copy it again") from error
