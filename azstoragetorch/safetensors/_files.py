"""Open safetensors files: the header in one round trip, and the version that everything else is read from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from azure.core.exceptions import ResourceNotFoundError

from azstoragetorch._blob.client import BlobClient, BlobVersion
from azstoragetorch._engine.config import KiB
from azstoragetorch._engine.memory import filled_bytes
from azstoragetorch._engine.ranges import ByteRange, split
from azstoragetorch._engine.scope import Scope
from azstoragetorch._engine.threads import engine_for
from azstoragetorch._tensors.pinned import PinnedBlob
from azstoragetorch.exceptions import SafetensorsError
from azstoragetorch.safetensors._header import LENGTH, Header, header_length, parse_header

_SPECULATED = 64 * KiB  # bytes of the first request: the header of some 500 tensors


@dataclass(frozen=True, slots=True)
class TensorFile:
    """One version of a safetensors file. Picklable; ``head`` is its beginning, which is not requested again."""

    client: BlobClient
    version: BlobVersion
    header: Header
    head: bytes = field(repr=False)

    @property
    def url(self) -> str:
        """The URL, without a SAS."""
        return str(self.client.url)

    def pinned(self) -> PinnedBlob:
        """What receives bytes of this version."""
        return PinnedBlob(self.client, self.version, self.head)


def open_file(client: BlobClient, scope: Scope | None = None) -> TensorFile:
    """Read and check the header of the file.

    Raises:
        ResourceNotFoundError: the blob does not exist.
        SafetensorsError: it is not a valid safetensors file.
        BlobChangedError: it was overwritten meanwhile.
    """
    scope = scope or Scope()
    url = str(client.url)
    version, head = read_head(client, _SPECULATED, scope)
    length = header_length(head, version.size, url)
    stop = LENGTH + length
    if len(head) < stop:
        head = read_rest(client, version, head, stop, scope)
    return TensorFile(client, version, parse_header(head[LENGTH:stop], version.size, url), head)


def open_files(clients: Sequence[BlobClient], why: str) -> list[TensorFile]:
    """Open all of *clients* at once; *why* says in errors where their names come from."""
    if not clients:
        return []

    def open_it(client: BlobClient, scope: Scope) -> TensorFile:
        try:
            return open_file(client, scope)
        except ResourceNotFoundError as error:
            raise SafetensorsError(f"{client.url} is missing, {why}", url=str(client.url)) from error

    config = clients[0].config
    return engine_for(config).map(open_it, clients, config.max_connections)


def read_head(client: BlobClient, length: int, scope: Scope) -> tuple[BlobVersion, bytes]:
    """The version of the blob and its first *length* bytes, with one request."""
    opened = client.open_range(ByteRange(0, min(length, client.config.effective_part_size)), scope=scope)
    try:
        return opened.version, filled_bytes(len(opened.span), lambda view: opened.receive([view]))
    finally:
        opened.close()


def read_rest(client: BlobClient, version: BlobVersion, head: bytes, stop: int, scope: Scope) -> bytes:
    """The first *stop* bytes of *version*, of which *head* is there."""
    pinned = PinnedBlob(client, version, head)

    def fill(view: memoryview) -> None:
        view[: len(head)] = head

        def receive(part: ByteRange, scope: Scope) -> None:
            pinned.receive(part, [view[part.start : part.stop]], scope)

        parts = split(ByteRange(len(head), stop), client.config.effective_part_size)
        engine = engine_for(client.config)
        engine.map(receive, parts, engine.concurrency(client.config), scope)

    return filled_bytes(stop, fill)
