"""Write a manifest: parts first, then the document that makes it one.

Rows are written as they are listed, in bounded memory, if they come in the order of their names, as the service lists
them. Where they do not, they are read once more and sorted on the local disk.
"""

from __future__ import annotations

import heapq
import os
import tempfile
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import TypeAlias, TypeVar

from azure.core.exceptions import AzureError

from azstoragetorch._blob.client import ContainerClient
from azstoragetorch._blob.url import BlobURL, needs_no_parsing, parse_blob_url
from azstoragetorch._engine.scope import on_error
from azstoragetorch._samples.items import BlobInfo
from azstoragetorch._samples.names import NameFilter, NameRules
from azstoragetorch._samples.rows import DOCUMENT, PART_ROWS, Columns, Description, Part
from azstoragetorch.exceptions import ManifestError

T = TypeVar("T")

Source: TypeAlias = Callable[[], Iterator[Columns]]
"""Lists what the manifest is to have; called again if the rows turn out to need sorting."""

_RUN = 1_000_000  # rows sorted in memory at once: about 150 MB


class OutOfOrderError(Exception):
    """Rows came in another order than that of their names."""


def listed(container: ContainerClient, prefix: str, rules: NameRules, leave_out: str = "") -> Iterator[Columns]:
    """What a listing of *container* has, without what *rules* leave out, and without the folder *leave_out*."""
    names_filter = NameFilter(container.url, rules)
    for page in container.pages(prefix=prefix):
        names, sizes, etags = names_filter.keep(page.names, page.sizes, page.etags)
        kept = [index for index, name in enumerate(names) if not (leave_out and name.startswith(leave_out))]
        yield [names[i] for i in kept], [sizes[i] for i in kept], [etags[i] or None for i in kept]
    names_filter.warn()


def from_blobs(blobs: Iterable[BlobInfo], container: BlobURL) -> Iterator[Columns]:
    """The rows of *blobs*, which must be in *container*.

    Raises:
        ValueError: one is not.
        TypeError: one is not a `BlobInfo`.
    """
    base = f"{container}/"
    remaining = iter(blobs)
    while part := list(islice(remaining, PART_ROWS)):
        names: list[str] = []
        for blob in part:
            if not isinstance(blob, BlobInfo):
                raise TypeError(f"blobs must be of type BlobInfo, not {type(blob).__name__}")
            if not blob.url.startswith(base):
                raise ValueError(f"blobs: {blob.url} is not in {container}")
            is_plain = needs_no_parsing(blob.url, len(base))
            names.append(blob.url[len(base) :] if is_plain else parse_blob_url(blob.url).blob)
        yield names, [blob.size for blob in part], [blob.etag or None for blob in part]


def in_order(source: Source, use: Callable[[Iterator[Columns]], T], *, is_sorted: bool = True) -> T:
    """What *use* makes of the rows of *source* by name.

    If *is_sorted*, they probably come in that order. If they do not, *source* and *use* are called a second time.
    """
    try:
        if is_sorted:
            return use(_checked(source()))
    except OutOfOrderError:
        pass
    with tempfile.TemporaryDirectory(prefix="azstoragetorch-") as folder:
        return use(_sorted(source(), folder))


def _checked(pages: Iterable[Columns]) -> Iterator[Columns]:
    """The same pages.

    Raises:
        OutOfOrderError: their names do not ascend.
    """
    last = None
    for names, sizes, etags in pages:
        if not names:
            continue
        if names != sorted(names) or (last is not None and names[0] <= last):
            raise OutOfOrderError
        last = names[-1]
        yield names, sizes, etags


def _sorted(pages: Iterable[Columns], folder: str) -> Iterator[Columns]:
    """The rows of *pages* by name, sorted by way of files in *folder*."""
    from azstoragetorch._samples.parquet import spill, spilled

    runs: list[str] = []
    for columns in _regrouped(pages, _RUN):
        runs.append(os.path.join(folder, str(len(runs))))  # noqa: PTH118 - a string is wanted
        spill(columns, runs[-1])
    rows = heapq.merge(*map(spilled, runs))
    while part := list(islice(rows, PART_ROWS)):
        names, sizes, etags = map(list, zip(*part, strict=True))
        yield names, sizes, etags


def _regrouped(pages: Iterable[Columns], length: int) -> Iterator[Columns]:
    """The rows of *pages*, *length* at a time, and the rest."""
    names: list[str] = []
    sizes: list[int] = []
    etags: list[str | None] = []
    for page in pages:
        names += page[0]
        sizes += page[1]
        etags += page[2]
        while len(names) >= length:
            yield names[:length], sizes[:length], etags[:length]
            del names[:length], sizes[:length], etags[:length]
    if names:
        yield names, sizes, etags


@dataclass
class Writing:
    """One manifest that is being written into *folder*, of the container *home*."""

    home: ContainerClient
    folder: BlobURL
    progress: Callable[[int], object]
    _id: str = field(default_factory=lambda: uuid.uuid4().hex[:12])
    _written: list[str] = field(default_factory=list)  # names of parts, whatever becomes of them

    def write(
        self, source: Source, description: Description, *, create_only: bool, is_sorted: bool = True
    ) -> Description:
        """Write the rows of *source*, then the document: *description* with the parts and the total.

        Raises:
            ManifestError: a name is there twice.
            ResourceExistsError: there is a manifest, and *create_only* is set.
            AzureError: the service refused the request, or could not be reached. No new manifest was made.
        """
        with on_error(self._discard):
            total, parts = in_order(source, self._write_parts, is_sorted=is_sorted)
            complete = replace(description, total=total, parts=tuple(parts))
            self.home.at(self.folder.with_blob(self.folder.blob + DOCUMENT)).put(
                complete.to_bytes(), create_only=create_only
            )
        return complete

    def _write_parts(self, pages: Iterator[Columns]) -> tuple[int, list[Part]]:
        from azstoragetorch._samples.parquet import encode

        parts: list[Part] = []
        total = count = 0
        last = ""
        for columns in _regrouped(pages, PART_ROWS):
            names, sizes, _ = columns
            if names[0] == last:
                raise ManifestError(f"{self.folder}: the name {last!r} is there twice")
            name = f"parts-{self._id}/{len(self._written):05d}.parquet"
            data, rows = encode(columns, str(self.folder))
            self._written.append(name)
            self.home.at(self.folder.with_blob(self.folder.blob + name)).put(data)
            parts.append(Part(name, len(names), len(data), rows.digest))
            total, count, last = total + sum(sizes), count + len(names), names[-1]
            self.progress(count)
        return total, parts

    def _discard(self) -> None:
        discard(self.home, self.folder, self._written)

    def forget(self, complete: Description, before: Description | None) -> None:
        """Delete the parts that *complete* does not have: of a first attempt, and those of the manifest *before*."""
        kept = {part.name for part in complete.parts}
        old = [part.name for part in before.parts] if before is not None else []
        discard(self.home, self.folder, [name for name in (*self._written, *old) if name not in kept])


def discard(home: ContainerClient, folder: BlobURL, names: Iterable[str]) -> None:
    """Delete parts as well as possible: what stays takes space, and nothing else."""
    for name in names:
        with suppress(AzureError):
            home.at(folder.with_blob(folder.blob + name)).delete()
