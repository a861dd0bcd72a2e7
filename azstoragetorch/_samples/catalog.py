"""Many blobs at a few dozen bytes each: what was listed, or what URLs name, as columns in a few large objects.

A Python object for each of a million blobs is gigabytes and, in forked workers, copied by reference counts; these
columns are neither. Long listings fan out over folders where waiting for the service is what they mostly do.
"""

from __future__ import annotations

import hashlib
import pickle
import time
from array import array
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from itertools import accumulate
from typing import Any

from azstoragetorch._blob.client import ContainerClient
from azstoragetorch._blob.url import BlobURL, parse_blob_url
from azstoragetorch._engine.config import MiB
from azstoragetorch._engine.engine import Scope
from azstoragetorch._samples.prefetch import OrderedPrefetch

_FAN_OUT_AFTER = 20_000  # names; listing so many takes a second, and shows how they are spread
_FAN_OUT = 8  # listings at once
_SURVEY_PAGES = 2  # of one folder; one with more entries than these hold is as well listed flat
_PAGE = 5000  # names that one request can bring
_UNIT_BYTES = 1 * MiB  # what a folder of 15,000 names takes


class Catalog:
    """Names of blobs in their containers, with sizes and ETags if they were listed. Grows by appending.

    Pickles as its columns: about 30 bytes a blob and its name.
    """

    def __init__(self, containers: Iterable[BlobURL] = ()) -> None:
        self.containers = list(containers)
        """Where the blobs are: addresses of containers, possibly with a snapshot or version."""
        self._names = bytearray()
        self._ends = array("Q")
        self._of: array[int] | None = None  # index into `containers`, if not all are in the first
        self._sizes = array("Q")  # as long as `_ends`, or empty
        self._etags = array("Q")
        self._odd_etags: dict[int, str] = {}  # those that are not hexadecimal numbers, as the service's are
        self._fingerprint: tuple[int, str] | None = None

    def __len__(self) -> int:
        return len(self._ends)

    def append_listed(self, names: Sequence[str], sizes: Sequence[int], etags: Sequence[str]) -> None:
        """Append listed blobs of the first container. ETags are quoted."""
        start = len(self)
        self._append_names(names)
        self._sizes.extend(sizes)
        for index, etag in enumerate(etags, start):
            try:
                value = int(etag[1:-1], 16)
            except ValueError:
                value = -1
            if not 0 <= value < 1 << 64 or f'"0x{value:X}"' != etag:
                self._odd_etags[index] = etag
                value = 0
            self._etags.append(value)

    def append_urls(self, urls: Iterable[str]) -> None:
        """Append the blobs that *urls* name.

        Raises:
            ValueError: one is no URL of a blob.
            TypeError: one is no text.
        """
        of = array("I")
        names: list[str] = []
        known = {container: index for index, container in enumerate(self.containers)}
        base, current = "", 0
        for url in urls:
            if not isinstance(url, str):
                raise TypeError(f"blob_urls must be texts, not {type(url).__name__}")
            name = url[len(base) :] if base and url.startswith(base) else ""
            # What cannot be taken apart by looking at it is parsed.
            if not name or not _IS_PLAIN.issuperset(name) or name[0] in "./" or "/." in name or len(name) > 1024:
                parsed = parse_blob_url(url)
                name = parsed.blob
                container = replace(parsed, blob="")
                current = known.setdefault(container, len(self.containers))
                if current == len(self.containers):
                    self.containers.append(container)
                base = "" if parsed.is_read_only or parsed.sas is not None else f"{container}/"
            names.append(name)
            of.append(current)
        self._append_names(names)
        self._of = of if self._of is None else self._of + of

    def append(self, other: Catalog) -> None:
        """Append what was listed in the same container."""
        start = len(self)
        base = len(self._names)
        self._names += other._names
        self._ends.extend(base + end for end in other._ends)
        self._sizes.extend(other._sizes)
        self._etags.extend(other._etags)
        self._odd_etags |= {start + index: etag for index, etag in other._odd_etags.items()}

    def truncate(self, length: int) -> None:
        """Forget all but the first *length* blobs."""
        del self._ends[length:], self._sizes[length:], self._etags[length:]
        del self._names[self._ends[-1] if length else 0 :]
        self._odd_etags = {index: etag for index, etag in self._odd_etags.items() if index < length}

    def name(self, index: int) -> str:
        """The name of a blob."""
        start = self._ends[index - 1] if index else 0
        return self._names[start : self._ends[index]].decode("utf-8")

    def url(self, index: int) -> BlobURL:
        """The address of a blob."""
        return replace(self.containers[self.container_index(index)], blob=self.name(index))

    def container_index(self, index: int) -> int:
        """Which of `containers` a blob is in."""
        return self._of[index] if self._of is not None else 0

    def size(self, index: int) -> int | None:
        """The length of a blob in bytes, if it was listed."""
        return self._sizes[index] if self._sizes else None

    def etag(self, index: int) -> str | None:
        """The ETag of a blob, with its quotes, if it was listed."""
        if not self._etags:
            return None
        return self._odd_etags.get(index) or f'"0x{self._etags[index]:X}"'

    @property
    def total_size(self) -> int | None:
        """Bytes of all blobs together, if they were listed."""
        return sum(self._sizes) if len(self._sizes) == len(self) else None

    @property
    def fingerprint(self) -> str:
        """Equal for two catalogs with the same names in the same order."""
        if self._fingerprint is None or self._fingerprint[0] != len(self):
            digest = hashlib.blake2b(self._names, digest_size=16)
            digest.update(self._ends.tobytes())
            if self._of is not None and len(self.containers) > 1:
                digest.update(self._of.tobytes())
                digest.update("\n".join(f"{c} {c.snapshot} {c.versionid}" for c in self.containers).encode())
            self._fingerprint = len(self), digest.hexdigest()
        return self._fingerprint[1]

    def _append_names(self, names: Sequence[str]) -> None:
        joined = "".join(names)
        encoded = joined.encode("utf-8")
        lengths = map(len, names) if len(encoded) == len(joined) else (len(name.encode("utf-8")) for name in names)
        base = len(self._names)
        self._names += encoded
        self._ends.extend(base + end for end in accumulate(lengths))

    def _columns(self) -> tuple[Any, ...]:
        starts = [0, *self._ends[:-1]]
        # The service allows 1,024 characters a name, so a length fits into 16 bits.
        lengths = array("H", (end - start for start, end in zip(starts, self._ends, strict=False)))
        return bytes(self._names), lengths, self._of, self._sizes, self._etags, self._odd_etags

    @classmethod
    def _restore(cls, containers: Iterable[BlobURL], columns: tuple[Any, ...]) -> Catalog:
        self = cls(containers)
        names, lengths, self._of, self._sizes, self._etags, self._odd_etags = columns
        self._names += names
        self._ends.extend(accumulate(lengths))
        return self

    def to_bytes(self) -> bytes:
        """All but the containers, for a process that knows them."""
        return pickle.dumps(self._columns(), pickle.HIGHEST_PROTOCOL)

    @classmethod
    def from_bytes(cls, containers: Iterable[BlobURL], data: bytes) -> Catalog:
        """The catalog of which a process of this job made *data*."""
        return cls._restore(containers, pickle.loads(data))  # noqa: S301 - from memory that only we share

    def __reduce__(self) -> tuple[Any, ...]:
        return Catalog._restore, (self.containers, self._columns())


_IS_PLAIN = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_.~/")


def list_catalog(
    container: ContainerClient, prefix: str = "", progress: Callable[[int], object] | None = None
) -> Catalog:
    """List the blobs whose names begin with *prefix*, in the service's order.

    *progress* is called with the number of blobs listed so far, after each answer of the service.

    Raises:
        AzureError: the service refused, or could not be reached.
    """
    catalog = Catalog([container.url])
    _list(container, prefix, catalog, progress or (lambda _count: None), after="")
    return catalog


def _list(
    container: ContainerClient, prefix: str, catalog: Catalog, progress: Callable[[int], object], after: str
) -> bool:
    """Append to *catalog* what is listed below *prefix* and behind the name *after*; whether that was in order."""
    first, last, is_sorted, listed = "", "", True, 0
    may_fan_out = True
    began, cpu = time.monotonic(), time.thread_time()
    pages = container.pages(prefix=prefix)
    try:
        for page in pages:
            names, sizes, etags = page.names, page.sizes, page.etags
            listed += len(names)
            if names:
                first = first or names[0]
                is_sorted = is_sorted and names == sorted(names) and last < names[0]
                if after and is_sorted:
                    keep = [index for index, name in enumerate(names) if name > after]
                    names, sizes, etags = ([column[i] for i in keep] for column in (names, sizes, etags))  # type: ignore[assignment]
                last = page.names[-1]
            catalog.append_listed(names, sizes, etags)
            progress(len(catalog))
            if may_fan_out and listed >= _FAN_OUT_AFTER and page.marker and is_sorted:
                # Parsing is work for one core however many connections there are.
                is_waiting = time.monotonic() - began > 2 * (time.thread_time() - cpu)
                if is_waiting and _fan_out(container, prefix, first, last, catalog, progress):
                    return True
                may_fan_out = False
    finally:
        pages.close()  # type: ignore[attr-defined]
    return is_sorted


def _fan_out(
    container: ContainerClient,
    prefix: str,
    first: str,
    last: str,
    catalog: Catalog,
    progress: Callable[[int], object],
) -> bool:
    """List all behind *last* folder by folder, several at once; False, with nothing appended, if that is no good."""
    units = _survey(container, prefix, first, last)
    if units is None:
        return False
    length = len(catalog)
    previous = last

    def work(unit: str | Catalog, scope: Scope) -> Catalog | None:
        if isinstance(unit, Catalog):
            return unit
        scope.check()
        part = Catalog()
        return part if _list(container, unit, part, lambda _count: scope.check(), last) else None

    parts = OrderedPrefetch(
        container.engine,
        iter(units),
        work,
        cost=lambda _unit: _UNIT_BYTES,
        size=lambda _part: _UNIT_BYTES,
        depth=_FAN_OUT,
    )
    try:
        for ahead in parts:
            part = ahead.result()
            # The order must be the one of the flat listing, whichever way was taken.
            if part is None or (len(part) and part.name(0) <= previous):
                catalog.truncate(length)
                return False
            if len(part):
                previous = part.name(len(part) - 1)
                catalog.append(part)
                progress(len(catalog))
    finally:
        parts.close()
    return True


def _survey(container: ContainerClient, prefix: str, first: str, last: str) -> list[str | Catalog] | None:
    """What comes behind *last*, in order: folders to be listed, and blobs beside them.

    None if the folders are too many, too few or too small for fanning out to help.
    """
    levels = []
    while True:
        child = _folder_in(prefix, last)
        levels.append((prefix, child))
        if not child or child != _folder_in(prefix, first):
            break
        prefix = child
    units: list[str | Catalog] = []
    folders = passed = 0
    for level, child in reversed(levels):  # the innermost comes first
        entries: list[tuple[str, int, str]] = []
        pages = container.pages(prefix=level, delimiter="/")
        for number, page in enumerate(pages, 1):
            entries += [(name, -1, "") for name in page.prefixes]
            entries += zip(page.names, page.sizes, page.etags, strict=True)
            if page.marker and number == _SURVEY_PAGES:
                return None
        is_innermost = level == levels[-1][0]
        if is_innermost:
            passed = sum(1 for name, size, _ in entries if size < 0 and name <= (child or last))
        for name, size, etag in sorted(entries):
            if size < 0:
                # The innermost folder that *last* is in has been listed in part; those around it are taken apart.
                if name > last or (is_innermost and name == child):
                    units.append(name)
                    folders += 1
            elif name > last:
                blobs = units[-1] if units else None
                if not isinstance(blobs, Catalog):
                    blobs = Catalog()
                    units.append(blobs)
                blobs.append_listed([name], [size], [etag])
    is_worth_it = folders > 1 and _FAN_OUT_AFTER / max(1, passed) * _FAN_OUT > 2 * _PAGE
    return units if is_worth_it else None


def _folder_in(prefix: str, name: str) -> str:
    """The folder right below *prefix* that *name* is in, with its slash; "" if it is in none."""
    return name[: name.find("/", len(prefix)) + 1]
