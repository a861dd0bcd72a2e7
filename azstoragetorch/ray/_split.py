"""Divide work among tasks: a listing by folders, and listed blobs by their bytes."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import TypeAlias, TypeVar

from azstoragetorch._blob.client import ContainerClient, Page
from azstoragetorch._samples.items import BlobInfo

T = TypeVar("T")

Unit: TypeAlias = "str | Page"
"""A part of a listing: the prefix of the names to list, or blobs that were listed already."""

_ENOUGH = 64  # units; with more of them than workers, no worker waits long for the last one
_SURVEYS = 32  # folders that are looked into at most
_SURVEY_PAGES = 4  # of a folder; one with more entries than these hold is listed flat, by one task
_REQUEST = 64 << 10  # bytes that could be read in the time that a request takes by itself


def split_listing(pages: Callable[[str], Iterator[Page]], prefix: str) -> list[Unit]:
    """Units that hold every blob below *prefix* once.

    Only slashes divide names: those of one folder are listed by one task, however many they are. *pages* lists what is
    directly below a prefix, with the folders in `Page.prefixes`.
    """
    folders = deque([prefix])
    units: list[Unit] = []
    for _ in range(_SURVEYS):
        if not folders or len(folders) + len(units) >= _ENOUGH:
            break
        folder = folders.popleft()
        found = list(islice(pages(folder), _SURVEY_PAGES))
        inner = dict.fromkeys(name for page in found for name in page.prefixes)  # two pages can name the same one
        if not inner or found[-1].marker:
            units.append(folder)
            continue
        folders.extend(inner)
        units += [page for page in found if page.names]
    return [*units, *folders]


def surveyor(container: ContainerClient) -> Callable[[str], Iterator[Page]]:
    """What `split_listing` looks into folders with."""
    return lambda prefix: container.pages(prefix=prefix, delimiter="/")


def deal(items: Sequence[T], count: int) -> list[list[T]]:
    """*items* in at most *count* groups, none empty: neighbors, which can differ most, go to different groups."""
    return [list(items[first::count]) for first in range(min(count, len(items)))]


def cost(blob: BlobInfo) -> int:
    """What it takes to read *blob*, as a number of bytes."""
    return blob.size + _REQUEST


def balance(blobs: Iterable[BlobInfo], count: int) -> list[list[BlobInfo]]:
    """*blobs* in at most *count* groups, in order, none empty, that take about as long to read."""
    known = list(blobs)
    share = sum(map(cost, known)) / max(1, count)
    groups: list[list[BlobInfo]] = []
    passed, group = 0.0, -1
    for blob in known:
        place = int((passed + cost(blob) / 2) / share)  # where the middle of the blob is
        if place != group or not groups:
            groups.append([])
            group = place
        groups[-1].append(blob)
        passed += cost(blob)
    return groups
