"""Where a stream of weights is: a folder of blobs."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import TypeVar

from azure.core.exceptions import ResourceNotFoundError

from azstoragetorch._blob.client import BlobClient, ClientFactory
from azstoragetorch._blob.credentials import Credential
from azstoragetorch._blob.url import parse_url
from azstoragetorch._engine.config import TransferConfig
from azstoragetorch._engine.threads import engine_for
from azstoragetorch.exceptions import WeightsError
from azstoragetorch.weights._format import POINTER, Pointer, is_name, load_pointer

T = TypeVar("T")
R = TypeVar("R")
log = logging.getLogger("azstoragetorch")


class Place:
    """The folder *url*, and the blobs in it.

    Raises:
        ValueError: *url* is not a valid URL, or names a snapshot.
    """

    def __init__(self, url: str, credential: Credential, transfer: TransferConfig | None) -> None:
        parsed = parse_url(url)
        if parsed.is_read_only:
            raise ValueError(f"url {str(parsed)!r}: a stream of weights has no snapshot or version")
        clients = ClientFactory(credential, transfer, parsed)
        self._container = clients.container(parsed)
        self.config = clients.config
        folder = parsed.blob.strip("/")
        self._prefix = f"{folder}/" if folder else ""
        self.url = str(replace(parsed, blob=folder, sas=None))

    def blob(self, name: str) -> BlobClient:
        """The blob *name*."""
        return self._container.blob(self._prefix + name)

    def pointer(self) -> tuple[str | None, Pointer | None]:
        """The ETag of the pointer and the pointer, or None twice.

        Raises:
            WeightsError: it is damaged.
            AzureError: the service refused the request, or could not be reached.
        """
        try:
            content, version = self.blob(POINTER).read()
        except ResourceNotFoundError:
            return None, None
        try:
            return version.etag, load_pointer(content)
        except WeightsError as error:
            raise WeightsError(f"{self.blob(POINTER).url}: {error}") from None

    def names(self) -> list[str]:
        """The names of all full blobs and deltas."""
        pages = self._container.pages(prefix=self._prefix)
        found = {name.removeprefix(self._prefix) for page in pages for name in page.names}
        return sorted(name for name in found if is_name(name))

    def each(self, action: Callable[[T], R], items: Iterable[T]) -> list[R]:
        """What *action*, which computes, returns for each of *items*, on as many threads as there are processors."""
        threads = min(os.cpu_count() or 1, self.config.max_connections)
        return engine_for(self.config).map(lambda item, _scope: action(item), list(items), threads)

    def __repr__(self) -> str:
        return f"Place({self.url!r})"
