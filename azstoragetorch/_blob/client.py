"""Clients for one blob or one container: the public interface of the core for the packages above it.

A client is cheap and lazy: it creates no connection, token or thread before the first call. It pickles without them
and works in a forked child.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import partial
from types import MappingProxyType
from typing import Any

from azure.core.exceptions import AzureError, ResourceExistsError, ResourceModifiedError, ResourceNotFoundError

from azstoragetorch._blob.commit import CREATED, BlobProperties, get_properties, md5_of, read_tags, unknown_outcome
from azstoragetorch._blob.copying import MAX_COPIED_AT_ONCE, CopyOrUpload, CopyRange, CopySource, copy_blob
from azstoragetorch._blob.credentials import Credential, CredentialHolder
from azstoragetorch._blob.download import BlobVersion, RangeRead, fetch, open_range
from azstoragetorch._blob.listing import ContainerEntry, Page, list_containers, list_pages
from azstoragetorch._blob.multiplex import multiplexer_for
from azstoragetorch._blob.readahead import ReadAhead
from azstoragetorch._blob.retry import Retry, Transient, retrying
from azstoragetorch._blob.service import Request, Service, is_tracing
from azstoragetorch._blob.signing import sign_for_identity, sign_with_key
from azstoragetorch._blob.upload import BlockContent, BlockWriter
from azstoragetorch._blob.url import BlobURL, needs_no_parsing, parse_blob_url
from azstoragetorch._engine.config import TransferConfig
from azstoragetorch._engine.job import IsStuck
from azstoragetorch._engine.memory import filled_bytes
from azstoragetorch._engine.process import PerProcess
from azstoragetorch._engine.ranges import ByteRange
from azstoragetorch._engine.scope import Scope, on_error
from azstoragetorch._engine.threads import Engine, engine_for
from azstoragetorch.exceptions import ClientRequestIdMismatchError

__all__ = [
    "MAX_COPIED_AT_ONCE",
    "AccountClient",
    "BlobClient",
    "BlobProperties",
    "BlobVersion",
    "BlockContent",
    "BlockWriter",
    "ClientFactory",
    "ContainerClient",
    "ContainerEntry",
    "CopyOrUpload",
    "CopyRange",
    "CopySource",
    "Head",
    "Page",
    "RangeRead",
    "ReadAhead",
]


@dataclass(frozen=True, slots=True)
class Head:
    """The first part of one version of a blob; the whole blob if it fits into one part."""

    version: BlobVersion
    data: bytes


class _Client:
    def __init__(
        self,
        url: BlobURL,
        credential: CredentialHolder,
        config: TransferConfig,
        services: PerProcess[Service] | None = None,
    ) -> None:
        self.url = url
        self.config = config
        self._credential = credential
        self._services = PerProcess(partial(Service, url, credential, config)) if services is None else services

    @property
    def service(self) -> Service:
        """The service of this process, which signs and sends requests."""
        return self._services.get()

    @property
    def engine(self) -> Engine:
        """The threads and the memory budget of this process for this configuration."""
        return engine_for(self.config)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({str(self.url)!r})"

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_live"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._services = PerProcess(partial(Service, self.url, self._credential, self.config))


class BlobClient(_Client):
    """One blob."""

    def reader(self, version: BlobVersion | None = None, head: bytes = b"") -> ReadAhead:
        """A reader with random access and read-ahead, pinned to *version* or to the version that the first read sees.

        *head* is the beginning of *version*, if the caller already has it; it is not fetched again.
        """
        return ReadAhead(self.service, self.url, version, head)

    def writer(self, *, create_only: bool = False) -> BlockWriter:
        """A writer that replaces the whole content of the blob; with *create_only* the blob must not exist."""
        return BlockWriter(self.service, self.url, create_only=create_only)

    def read(self) -> tuple[bytes, BlobVersion]:
        """Read the whole blob; return it and its version. Takes one request if the blob fits into one part."""
        reader = self.reader()
        try:
            data = reader.read(0)
            assert reader.version is not None
            return data, reader.version
        finally:
            reader.close()

    def head(self, scope: Scope | None = None) -> Head:
        """Fetch the first part with one request."""
        span = ByteRange(0, self.config.effective_part_size)
        opened = open_range(self.service, self.url, span, scope=scope)
        try:
            return Head(opened.version, filled_bytes(len(opened.span), lambda view: opened.receive([view])))
        finally:
            opened.close()

    def start_head(self, scope: Scope, done: Callable[[Head], None], failed: Callable[[], None]) -> IsStuck | None:
        """Start to fetch the first part on the multiplexer's thread. Return None if that is not possible now.

        If it returns a function, either *done* is called with the result, or *failed*: then the caller has to call
        `head`, which retries and raises errors. The function returns whether that thread is stuck.
        """
        multiplexer = None if self.config.validate_content or is_tracing() else multiplexer_for(self.engine)
        if multiplexer is None:
            return None
        length = self.config.effective_part_size
        is_begun = multiplexer.begin(
            self.service, self.url, length, scope, lambda version, data: done(Head(version, data)), failed
        )
        return multiplexer.is_stuck if is_begun else None

    def open_range(self, span: ByteRange, *, etag: str | None = None, scope: Scope | None = None) -> RangeRead:
        """Request *span*, of the version *etag* if given; return when the response headers have arrived."""
        return open_range(self.service, self.url, span, etag=etag, scope=scope)

    def fetch(self, span: ByteRange, targets: Sequence[memoryview], *, etag: str, scope: Scope) -> None:
        """Fetch *span* of the version *etag* with one request into *targets*, which are filled in order."""
        fetch(self.service, self.url, span, targets, etag=etag, scope=scope)

    def get_properties(self, scope: Scope | None = None) -> BlobProperties:
        """The properties of the blob.

        Raises:
            ResourceNotFoundError: the blob does not exist.
        """
        return get_properties(self.service, self.url, scope)

    def tags(self, scope: Scope | None = None) -> dict[str, str]:
        """The index tags of the blob.

        Raises:
            AzureError: the service refused the request, or cannot be reached. Reading tags needs a separate permission.
        """
        return read_tags(self.service, self.url, scope)

    def find_properties(self) -> BlobProperties | None:
        """The properties of the blob; None if it does not exist."""
        try:
            return self.get_properties()
        except ResourceNotFoundError:
            return None

    def version(self) -> BlobVersion | None:
        """The current version of the blob; None if it does not exist."""
        found = self.find_properties()
        return found.version if found is not None else None

    def put(self, data: bytes | memoryview, *, create_only: bool = False) -> None:
        """Replace the content of the blob with *data*, with one request if it fits into a block.

        Raises:
            FatalBlobIOWriteError: the write failed; the blob is unchanged.
            ResourceExistsError: the blob exists and *create_only* is set.
        """
        writer = self.writer(create_only=create_only)
        with on_error(writer.abort):
            if len(data) <= self.config.block_size:
                writer.put([memoryview(data)])
            else:
                writer.write(memoryview(data))
                writer.commit()

    def replace(
        self, data: bytes, *, etag: str | None, properties: Mapping[str, str] = MappingProxyType({})
    ) -> tuple[bool, BlobProperties | None]:
        """Replace the content of the blob with *data* if it still has *etag*; with None, if the blob does not exist.

        One request. If its response is lost or says that the condition failed, the properties of the blob are requested
        before the write is sent again: an earlier attempt may have succeeded, which the content shows. *properties* are
        sent as headers of the write.

        Returns:
            Whether the content is *data* now, and the current properties of the blob.

        Raises:
            FatalBlobIOWriteError: the service did not confirm whether the write was carried out.
            AzureError: the service refused the request, or could not be reached; the blob is unchanged.
        """
        condition = {"If-Match": etag} if etag is not None else {"If-None-Match": "*"}
        retry = Retry(self.config)
        refusals = 0
        while True:
            failure: Transient | ResourceExistsError | ResourceModifiedError
            try:
                return True, self._put_once(data, condition, properties)
            except (Transient, ResourceExistsError, ResourceModifiedError) as error:
                failure = error
            found = self._properties_after(failure)
            if (found.version.etag if found is not None else None) != etag:
                return found is not None and self.has_content(found, data), found
            if isinstance(failure, Transient):
                Scope().pause(retry.pause_after(failure))
                continue
            refusals += 1
            if etag is not None or refusals >= self.config.max_attempts:
                raise failure  # refused although the condition holds
            # The blob was deleted between the refusal and the request for its properties: try again.

    def _put_once(self, data: bytes, condition: Mapping[str, str], properties: Mapping[str, str]) -> BlobProperties:
        headers = {
            "x-ms-blob-type": "BlockBlob",
            "Content-Type": "application/octet-stream",
            **condition,
            **properties,
        }
        if self.config.validate_content:
            headers["Content-MD5"] = md5_of([memoryview(data)])
        with self.service.send(Request("PUT", self.url, headers=headers, body=data, accept=CREATED)) as response:
            return BlobProperties(BlobVersion(len(data), response.headers.get("ETag", "")), None, properties)

    def _properties_after(self, failure: Exception) -> BlobProperties | None:
        try:
            return self.find_properties()
        except (AzureError, ClientRequestIdMismatchError) as error:
            raise unknown_outcome(self.url, failure) from error

    def has_content(self, found: BlobProperties, data: bytes) -> bool:
        """Whether the blob with the properties *found* holds *data*. Without an MD5, its current version is read."""
        if found.version.size != len(data):
            return False
        if found.md5 is not None:
            return found.md5 == base64.b64decode(md5_of([memoryview(data)]))
        try:
            return self.read()[0] == data
        except ResourceNotFoundError:
            return False

    def copy_source(self, etag: str) -> CopySource:
        """The version *etag* of this blob, for `copy_from` and for `BlockWriter.write_blocks` of other blobs."""
        return CopySource(self.service, self.url, etag)

    def copy_from(
        self,
        source: CopySource,
        *,
        properties: Mapping[str, str] = MappingProxyType({}),
        scope: Scope | None = None,
    ) -> None:
        """Replace this blob with *source*, at most `MAX_COPIED_AT_ONCE` bytes. The bytes do not pass through here.

        Content headers and metadata are copied, too. *properties* are request headers, such as ``x-ms-access-tier``.

        Raises:
            BlobChangedError: the source was overwritten.
            AzureError: the service refused the request, cannot read the source, or cannot be reached.
        """
        copy_blob(self.service, self.url, source, properties, scope)

    def sign(self, lifetime: timedelta) -> str:
        """The URL of the blob with a SAS that allows reading it for *lifetime*.

        Raises:
            ValueError: the credential is a SAS, or anonymous: neither can sign.
            AzureError: the service refused to create a key for the identity.
        """
        if (key := self._credential.account_key(self.url)) is not None:
            return sign_with_key(self.url, key, lifetime)
        if not self.service.authorizer.headers():
            raise ValueError(f"{self.url}: only an account key or an identity can sign a URL, not a SAS")
        return sign_for_identity(self.service, self.url, lifetime)

    def delete(self, *, etag: str | None = None) -> bool:
        """Delete the blob, only if it has *etag* where that is given; return False if the blob does not exist."""
        headers = {} if etag is None else {"If-Match": etag}
        request = Request("DELETE", self.url, headers=headers, accept=frozenset({202}))
        try:
            retrying(self.config, lambda: self.service.send(request).close())
        except ResourceNotFoundError:
            return False
        return True


class ContainerClient(_Client):
    """One container."""

    def blob(self, name: str) -> BlobClient:
        """The blob *name* in this container."""
        return self.at(self.url.with_blob(name))

    def create(self) -> None:
        """Create the container.

        Raises:
            ResourceExistsError: it exists.
        """
        request = Request("PUT", self.url, query="restype=container", accept=CREATED)
        retrying(self.config, lambda: self.service.send(request).close())

    def delete(self) -> bool:
        """Delete the container with all its blobs; return False if it does not exist."""
        request = Request("DELETE", self.url, query="restype=container", accept=frozenset({202}))
        try:
            retrying(self.config, lambda: self.service.send(request).close())
        except ResourceNotFoundError:
            return False
        return True

    def at(self, url: BlobURL) -> BlobClient:
        """The blob at *url*, which must be in this container; it can be a snapshot or a version."""
        return BlobClient(url, self._credential, self.config, self._services)

    def has_names(self, prefix: str = "") -> bool:
        """Whether a blob or directory has a name that begins with *prefix*. Mostly one request.

        Raises:
            ResourceNotFoundError: the container does not exist.
        """
        pages = list_pages(self.service, self.url, prefix=prefix, page_size=1, fetches_ahead=False)
        return any(page.names or page.directories for page in pages)

    def pages(
        self, *, prefix: str = "", delimiter: str = "", uncommitted: bool = False, with_modified: bool = False
    ) -> Iterator[Page]:
        """List the blobs, page by page, in the order of the service. See `listing.list_pages`."""
        return list_pages(
            self.service,
            self.url,
            prefix=prefix,
            delimiter=delimiter,
            uncommitted=uncommitted,
            with_modified=with_modified,
        )


class AccountClient(_Client):
    """One account."""

    def containers(self) -> list[ContainerEntry]:
        """List the containers, in the order of the service.

        Raises:
            AzureError: the service refused the request, or cannot be reached. A SAS for one container does not
                allow it.
        """
        return list_containers(self.service, self.url)


class ClientFactory:
    """Creates clients for any number of URLs, with one credential and one configuration.

    A SAS in a URL takes precedence over the credential and is used for that URL only. *trusted_url* is the URL that the
    user passed together with the credential, so the credential may be sent to its host.

    Raises:
        TypeError: *credential* or *transfer* has the wrong type.
    """

    def __init__(
        self,
        credential: Credential | CredentialHolder = None,
        transfer: TransferConfig | None = None,
        trusted_url: BlobURL | None = None,
    ) -> None:
        if transfer is not None and not isinstance(transfer, TransferConfig):
            raise TypeError(f"transfer must be a TransferConfig, not {type(transfer).__name__}")
        self.config = transfer or TransferConfig()
        if not isinstance(credential, CredentialHolder):
            credential = CredentialHolder(credential, trusted_url=trusted_url)
        self._holder = credential
        self._containers: dict[tuple[str, str, str, str], ContainerClient] = {}
        self._last: tuple[str, ContainerClient | None] = (
            "",
            None,
        )  # most URLs are in the same container as the previous one

    def account(self, url: BlobURL) -> AccountClient:
        """The client for the account of *url*."""
        address = replace(url, container="", blob="", snapshot=None, versionid=None)
        return AccountClient(address, self._holder, self.config)

    def container(self, url: BlobURL) -> ContainerClient:
        """The client for the container of *url*."""
        address = replace(url, blob="", snapshot=None, versionid=None)
        if url.sas is not None:
            return ContainerClient(address, CredentialHolder(None, url.sas), self.config)
        key = (url.scheme, url.host, url.account_path, url.container)
        client = self._containers.get(key)
        if client is None:
            client = self._containers.setdefault(key, ContainerClient(address, self._holder, self.config))
        return client

    def blob(self, url: str | BlobURL) -> BlobClient:
        """The client for the blob at *url*.

        Raises:
            ValueError: *url* is not the URL of a blob.
        """
        if isinstance(url, str):
            prefix, last = self._last
            if last is not None and url.startswith(prefix) and needs_no_parsing(url, len(prefix)):
                _ = last.service  # created once here and shared by all blobs of the container
                return last.blob(url[len(prefix) :])
        parsed = parse_blob_url(url) if isinstance(url, str) else url
        container = self.container(parsed)
        if parsed.sas is None:
            self._last = f"{container.url}/", container
        _ = container.service
        return container.at(parsed)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_containers": {}, "_last": ("", None)}
