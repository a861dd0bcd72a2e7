"""The items of pipes and nodes: a URL, a listed blob, or a range of a blob. No I/O."""

from __future__ import annotations

from typing import Any, NamedTuple, TypeAlias

from azstoragetorch._blob.url import BlobURL


class BlobInfo(NamedTuple):
    """A blob in a listing."""

    url: str
    """The URL, without a SAS."""
    size: int
    """The size in bytes."""
    etag: str
    """The quoted ETag."""


class ManifestBlob(BlobInfo):
    """A blob in a manifest. Readers raise ``BlobChangedError`` if its ETag has changed."""

    __slots__ = ()


class BlobRange(NamedTuple):
    """The bytes ``start <= i < stop`` of one version of a blob.

    With a delimiter in `align`, the range means the records that start in these bytes: a reader skips the end of a
    record that started earlier, and continues past `stop` to the end of the last record.
    """

    url: str
    """The URL of the blob, without a SAS."""
    start: int
    """The first byte."""
    stop: int
    """The byte after the last one."""
    size: int
    """The size of the blob in bytes."""
    etag: str
    """The quoted ETag of the version."""
    align: bytes = b""
    """The delimiter that ends a record; empty if records do not matter."""


Item: TypeAlias = "str | BlobInfo | BlobRange"
"""What readers take: a blob's URL, or what a lister or a range splitter yields."""


def plain_url(url: BlobURL) -> str:
    """*url* as text: no SAS, but with the snapshot or version that it chooses."""
    state = f"?snapshot={url.snapshot}" if url.snapshot else f"?versionid={url.versionid}" if url.versionid else ""
    return f"{url}{state}"


def url_of(item: Item) -> str:
    """The URL that *item* names, as it was given.

    Raises:
        TypeError: *item* is nothing that names a blob.
    """
    if isinstance(item, str):
        return item
    if isinstance(item, (BlobInfo, BlobRange)):
        return item.url
    raise TypeError(
        f"expected the URL of a blob, a BlobInfo or a BlobRange, not {type(item).__name__}: "
        "put the reader behind a lister or a pipe of URLs"
    )


def pair_of(item: Any, wanted: str) -> tuple[Any, Any]:
    """The two halves of *item*.

    Raises:
        TypeError: it is not a pair; the message names what was *wanted*.
    """
    if isinstance(item, (tuple, list)) and len(item) == 2:
        return item[0], item[1]
    what = repr(item.partition("?")[0]) if isinstance(item, str) else type(item).__name__
    raise TypeError(f"expected {wanted}, not {what}")
