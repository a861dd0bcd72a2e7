"""The blob that a transform receives, and its conversion to a sample."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, TypeAlias, TypedDict, TypeVar, cast

from azure.core.exceptions import ClientAuthenticationError

from azstoragetorch._blob.client import BlobClient, Head
from azstoragetorch._engine.metrics import timed
from azstoragetorch.io import BlobIO

T = TypeVar("T")

GetHead: TypeAlias = Callable[[], Head]
"""Returns the first part of a blob, which was fetched ahead or is fetched now."""


class BlobSample(TypedDict):
    """The sample of a dataset without a transform."""

    url: str
    data: bytes


class Blob:
    """One blob, as it is passed to a transform.

    It can be kept and pickled; data that was fetched ahead for it is dropped when the transform returns.
    """

    __slots__ = ("_client", "_etag", "_head", "_size")

    def __init__(self, client: BlobClient, size: int | None = None, etag: str | None = None) -> None:
        self._client = client
        self._size = size
        self._etag = etag
        self._head: GetHead | None = None

    @property
    def url(self) -> str:
        """The URL of the blob, without its query."""
        return str(self._client.url)

    @property
    def blob_name(self) -> str:
        """The name of the blob in its container, not percent-encoded."""
        return self._client.url.blob

    @property
    def container_name(self) -> str:
        """The name of the container."""
        return self._client.url.container

    @property
    def size(self) -> int | None:
        """Size in bytes according to the listing; None if the blob was given by URL. Makes no request."""
        return self._size

    @property
    def etag(self) -> str | None:
        """ETag, with its quotes, according to the listing; None if the blob was given by URL. Makes no request.

        The blob may have been overwritten since: ``reader().etag`` is the version that is read.
        """
        return self._etag

    def reader(self) -> BlobIO:
        """Open the blob for reading.

        Inside a transform, the first part of the blob, usually all of it, was fetched ahead, and `reader` waits for it.
        The rest of a larger blob is streamed as it is read.

        Raises:
            AzureError: the service refused the request, or could not be reached.
        """
        if self._head is None:
            return BlobIO._of(self._client)  # noqa: SLF001
        head = self._head()
        return BlobIO._of(self._client, head.version, head.data)  # noqa: SLF001

    def __repr__(self) -> str:
        return f"Blob({self.url!r})"

    def __getstate__(self) -> tuple[BlobClient, int | None, str | None]:
        return self._client, self._size, self._etag

    def __setstate__(self, state: tuple[BlobClient, int | None, str | None]) -> None:
        self._client, self._size, self._etag = state
        self._head = None


def to_sample(blob: Blob) -> BlobSample:
    """What a dataset without a transform makes of a blob."""
    if blob._head is not None:  # noqa: SLF001
        head = blob._head()  # noqa: SLF001
        if len(head.data) == head.version.size:
            return {"url": blob.url, "data": head.data}
    with blob.reader() as reader:
        return {"url": blob.url, "data": reader.read()}


def check_transform(transform: Any) -> None:
    """Raise TypeError unless *transform* can be one."""
    if transform is not None and not callable(transform):
        raise TypeError(f"transform must be callable, not {type(transform).__name__}")


def apply(transform: Callable[[Blob], T] | None, blob: Blob, head: GetHead | None = None) -> T:
    """Make a sample of *blob*, whose first part *head* returns. An error of the transform names the blob."""
    if head is not None:
        blob._head = head  # noqa: SLF001
    try:
        if transform is None:
            return cast(T, to_sample(blob))
        with timed("transform_seconds"):
            return transform(blob)
    except StopIteration as error:  # it would end the epoch unnoticed
        raise RuntimeError(f"the transform raised StopIteration on {blob.url}") from error
    except Exception as error:
        if transform is not None and blob.url not in str(error):
            _name_blob(error, f"the transform failed on {blob.url}")
        raise
    finally:
        blob._head = None  # noqa: SLF001


if sys.version_info >= (3, 11):

    def _name_blob(error: Exception, note: str) -> None:
        """Add *note* to *error*."""
        error.add_note(note)

else:

    def _name_blob(error: Exception, note: str) -> None:
        """Raise a copy of *error*, whose message has *note*, from it: this version of Python has no notes."""
        kind = type(error)
        try:
            copied = kind(f"{error.args[0]}\n{note}") if list(map(type, error.args)) == [str] else None
        except Exception:  # noqa: BLE001 - the class wants other arguments
            copied = None
        if copied is None:
            copied = RuntimeError(f"{note}: {kind.__name__}: {error}")
        else:
            copied.__dict__.update(error.__dict__)
        try:
            raise copied from error
        finally:
            del copied, error  # the traceback refers to this frame


def is_refused(error: Exception) -> bool:
    """Whether all blobs are going to fail like this."""
    return isinstance(error, ClientAuthenticationError) or getattr(error, "status_code", None) in (401, 403)
