"""The front door of the core: from a URL to one blob or one container, and what can be done with it.

A client is cheap and lazy: no connection, token or thread exists before the first call. It pickles without any of
them and works in a forked child.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from types import MappingProxyType
from typing import Any

from azure.core.exceptions import AzureError, ResourceExistsError, ResourceModifiedError, ResourceNotFoundError

from azstoragetorch._blob.commit import CREATED, BlobProperties, get_properties, md5_of, unknown_outcome
from azstoragetorch._blob.credentials import Credential, CredentialHolder
from azstoragetorch._blob.download import BlobVersion, RangeRead, fetch, open_range
from azstoragetorch._blob.listing import Page, list_pages
from azstoragetorch._blob.multiplex import multiplexer_for
from azstoragetorch._blob.readahead import ReadAhead
from azstoragetorch._blob.retry import Retry, Transient, retrying
from azstoragetorch._blob.service import Request, Service, is_tracing
from azstoragetorch._blob.upload import BlockWriter
from azstoragetorch._blob.url import BlobURL, needs_no_parsing, parse_blob_url
from azstoragetorch._engine.config import TransferConfig
from azstoragetorch._engine.memory import filled_bytes
from azstoragetorch._engine.process import PerProcess
from azstoragetorch._engine.ranges import ByteRange
from azstoragetorch._engine.scope import Scope, on_error
from azstoragetorch._engine.threads import Engine, engine_for
from azstoragetorch.exceptions import ClientRequestIdMismatchError

__all__ = [
    "BlobClient",
    "BlobProperties",
    "BlobVersion",
    "BlockWriter",
    "ClientFactory",
    "ContainerClient",
    "Head",
    "Page",
    "ReadAhead",
]


@dataclass(frozen=True, slots=True)
class Head:
    """The first part of one version of a blob: all of it if it fits into a part."""

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
        """Signed requests of this process to the account."""
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
        """Random access with read-ahead; pinned to *version*, or to the one that the first read sees.

        *head* is what is known already of the beginning of *version*; it is not fetched again.
        """
        return ReadAhead(self.service, self.url, version, head)

    def writer(self, *, create_only: bool = False) -> BlockWriter:
        """A new content for the blob, committed whole or not at all; with *create_only* there must not be a blob."""
        return BlockWriter(self.service, self.url, create_only=create_only)

    def read(self) -> tuple[bytes, BlobVersion]:
        """The whole blob and its version; one request if it fits into a part."""
        reader = self.reader()
        try:
            data = reader.read(0)
            assert reader.version is not None
            return data, reader.version
        finally:
            reader.close()

    def head(self, scope: Scope | None = None) -> Head:
        """Fetch the first part, by one request."""
        span = ByteRange(0, self.config.effective_part_size)
        opened = open_range(self.service, self.url, span, scope=scope)
        try:
            return Head(opened.version, filled_bytes(len(opened.span), lambda view: opened.receive([view])))
        finally:
            opened.close()

    def start_head(self, scope: Scope, done: Callable[[Head], None], failed: Callable[[], None]) -> bool:
        """Do as `head` on a thread that serves many, and call *done*, or *failed* where `head` itself is needed.

        False if that cannot be begun now, which `head` always can.
        """
        multiplexer = None if self.config.validate_content or is_tracing() else multiplexer_for(self.engine)
        if multiplexer is None:
            return False
        length = self.config.effective_part_size
        return multiplexer.begin(
            self.service, self.url, length, scope, lambda version, data: done(Head(version, data)), failed
        )

    def open_range(self, span: ByteRange, *, etag: str | None = None, scope: Scope | None = None) -> RangeRead:
        """Ask for *span*, of the version *etag* if given, and return when the head of the answer is there."""
        return open_range(self.service, self.url, span, etag=etag, scope=scope)

    def fetch(self, span: ByteRange, targets: Sequence[memoryview], *, etag: str, scope: Scope) -> None:
        """Fetch *span* of the version *etag* by one request into *targets*, filled one after the other."""
        fetch(self.service, self.url, span, targets, etag=etag, scope=scope)

    def get_properties(self, scope: Scope | None = None) -> BlobProperties:
        """The blob as the service describes it.

        Raises:
            ResourceNotFoundError: it does not exist.
        """
        return get_properties(self.service, self.url, scope)

    def find_properties(self) -> BlobProperties | None:
        """The blob as the service describes it; None if it does not exist."""
        try:
            return self.get_properties()
        except ResourceNotFoundError:
            return None

    def version(self) -> BlobVersion | None:
        """The blob's present version; None if it does not exist."""
        found = self.find_properties()
        return found.version if found is not None else None

    def put(self, data: bytes, *, create_only: bool = False) -> None:
        """Make *data* the content of the blob, by one request if it fits into a block.

        Raises:
            FatalBlobIOWriteError: it could not be done; the blob is unchanged.
            ResourceExistsError: the blob exists and was to be *create_only*.
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
        """Make *data* the content of the blob if it still has *etag*; with None, if there is no blob.

        One request. If its answer is lost or refuses the condition, the blob is looked at before anything is sent
        again, and known by its content. *properties* are headers of the request.

        Returns:
            Whether *data* is the content now, and the blob as it is now.

        Raises:
            FatalBlobIOWriteError: the service does not say whether the request was carried out.
            AzureError: the service refused, or could not be reached; the blob is unchanged.
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
            # The blob that was in the way was deleted before the look.

    def _put_once(self, data: bytes, condition: Mapping[str, str], properties: Mapping[str, str]) -> BlobProperties:
        headers = {
            "x-ms-blob-type": "BlockBlob",
            "Content-Type": "application/octet-stream",
            **condition,
            **properties,
        }
        if self.config.validate_content:
            headers["Content-MD5"] = md5_of([memoryview(data)])
        with self.service.send(Request("PUT", self.url, headers=headers, body=data, accept=CREATED)) as answer:
            return BlobProperties(BlobVersion(len(data), answer.headers.get("ETag", "")), None, properties)

    def _properties_after(self, failure: Exception) -> BlobProperties | None:
        try:
            return self.find_properties()
        except (AzureError, ClientRequestIdMismatchError) as error:
            raise unknown_outcome(self.url, failure) from error

    def has_content(self, found: BlobProperties, data: bytes) -> bool:
        """Whether the blob that was *found* holds *data*; where the service has no MD5 it is read as it is now."""
        if found.version.size != len(data):
            return False
        if found.md5 is not None:
            return found.md5 == base64.b64decode(md5_of([memoryview(data)]))
        try:
            return self.read()[0] == data
        except ResourceNotFoundError:
            return False

    def delete(self, *, etag: str | None = None) -> bool:
        """Delete the blob, if it is *etag*; False if it does not exist."""
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

    def at(self, url: BlobURL) -> BlobClient:
        """The blob at *url*, which is in this container; it may be a snapshot or a version."""
        return BlobClient(url, self._credential, self.config, self._services)

    def pages(
        self, *, prefix: str = "", delimiter: str = "", uncommitted: bool = False, with_modified: bool = False
    ) -> Iterator[Page]:
        """The listing, page by page, in the service's order."""
        return list_pages(
            self.service,
            self.url,
            prefix=prefix,
            delimiter=delimiter,
            uncommitted=uncommitted,
            with_modified=with_modified,
        )


class ClientFactory:
    """The one way from a URL to a client: a credential and a configuration, for any number of URLs.

    A SAS in a URL wins over the credential and is used for that URL alone. *named* is the URL that the user gave
    together with the credential, which may therefore be sent to its host.

    Raises:
        TypeError: *credential* or *transfer* has a wrong type.
    """

    def __init__(
        self, credential: Credential = None, transfer: TransferConfig | None = None, trusted_url: BlobURL | None = None
    ) -> None:
        if transfer is not None and not isinstance(transfer, TransferConfig):
            raise TypeError(f"transfer must be a TransferConfig, not {type(transfer).__name__}")
        self.config = transfer or TransferConfig()
        self._holder = CredentialHolder(credential, trusted_url=trusted_url)
        self._containers: dict[tuple[str, str, str, str], ContainerClient] = {}
        self._last: tuple[str, ContainerClient | None] = ("", None)  # a URL is mostly in the container of the last one

    def container(self, url: BlobURL) -> ContainerClient:
        """The container that *url* is in."""
        address = replace(url, blob="", snapshot=None, versionid=None)
        if url.sas is not None:
            return ContainerClient(address, CredentialHolder(None, url.sas), self.config)
        key = (url.scheme, url.host, url.account_path, url.container)
        client = self._containers.get(key)
        if client is None:
            client = self._containers.setdefault(key, ContainerClient(address, self._holder, self.config))
        return client

    def blob(self, url: str | BlobURL) -> BlobClient:
        """The blob at *url*.

        Raises:
            ValueError: *url* is not the URL of a blob.
        """
        if isinstance(url, str):
            prefix, last = self._last
            if last is not None and url.startswith(prefix) and needs_no_parsing(url, len(prefix)):
                _ = last.service  # made once, for all blobs of the container
                return last.blob(url[len(prefix) :])
        parsed = parse_blob_url(url) if isinstance(url, str) else url
        container = self.container(parsed)
        if parsed.sas is None:
            self._last = f"{container.url}/", container
        _ = container.service
        return container.at(parsed)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_containers": {}, "_last": ("", None)}
