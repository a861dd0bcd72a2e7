"""List a container into a catalog. If a long listing mostly waits for the service, folders are listed in parallel.

The order is always that of the flat listing.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace

from azstoragetorch._blob.client import ContainerClient
from azstoragetorch._engine.config import MiB
from azstoragetorch._engine.scope import Scope
from azstoragetorch._samples.catalog import Catalog
from azstoragetorch._samples.names import DEFAULT_RULES, NameFilter, NameRules
from azstoragetorch._samples.prefetch import OrderedPrefetch

_FAN_OUT_AFTER = 20_000  # names; listing so many takes a second, and shows how they are spread
_FAN_OUT = 8  # listings at once
_SURVEY_PAGES = 2  # of one folder; one with more entries than these hold is as well listed flat
_PAGE = 5000  # names that one request can bring
_UNIT_BYTES = 1 * MiB  # what a folder of 15,000 names takes


def list_catalog(
    container: ContainerClient,
    prefix: str = "",
    progress: Callable[[int], object] | None = None,
    rules: NameRules = DEFAULT_RULES,
) -> Catalog:
    """List the blobs whose names begin with *prefix*, in the service's order, without what *rules* leave out.

    *progress* is called with the number of blobs listed so far, after each answer of the service.

    Raises:
        AzureError: the service refused the request, or could not be reached.
        ValueError: a name is invalid, and that is an error.
    """
    catalog = Catalog([container.url])
    names_filter = NameFilter(container.url, rules)
    _list(_Run(container, names_filter, progress or (lambda _count: None)), prefix, catalog)
    names_filter.warn()
    return catalog


@dataclass(frozen=True, slots=True)
class _Run:
    """What all parts of one listing share."""

    container: ContainerClient
    names_filter: NameFilter
    progress: Callable[[int], object]


def _list(run: _Run, prefix: str, catalog: Catalog, after: str = "") -> bool:
    """Append to *catalog* what is listed below *prefix* and behind the name *after*; whether that was in order."""
    first, last, is_sorted, listed = "", "", True, 0
    may_fan_out = True
    began, cpu = time.monotonic(), time.thread_time()
    pages = run.container.pages(prefix=prefix)
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
            catalog.append_listed(*run.names_filter.keep(names, sizes, etags))
            run.progress(len(catalog))
            if may_fan_out and listed >= _FAN_OUT_AFTER and page.marker and is_sorted:
                # Parsing is work for one core however many connections there are.
                is_waiting = time.monotonic() - began > 2 * (time.thread_time() - cpu)
                if is_waiting and _fan_out(run, prefix, first, last, catalog):
                    return True
                may_fan_out = False
    finally:
        pages.close()  # type: ignore[attr-defined]
    return is_sorted


def _fan_out(run: _Run, prefix: str, first: str, last: str, catalog: Catalog) -> bool:
    """List all behind *last* folder by folder, several at once; False, with nothing appended, if it is not faster."""
    units = _survey(run, prefix, first, last)
    if units is None:
        return False
    length = len(catalog)
    previous = last

    def work(unit: str | Catalog, scope: Scope) -> Catalog | None:
        if isinstance(unit, Catalog):
            return unit
        scope.check()
        part = Catalog()
        part_run = replace(run, progress=lambda _count: scope.check())
        return part if _list(part_run, unit, part, last) else None

    parts = OrderedPrefetch(
        run.container.engine,
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
                run.progress(len(catalog))
    finally:
        parts.close()
    return True


def _survey(run: _Run, prefix: str, first: str, last: str) -> list[str | Catalog] | None:
    """What comes behind *last*, in order: folders to be listed, and blobs next to them.

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
        pages = run.container.pages(prefix=level, delimiter="/")
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
                blobs.append_listed(*run.names_filter.keep([name], [size], [etag]))
    is_worth_it = folders > 1 and _FAN_OUT_AFTER / max(1, passed) * _FAN_OUT > 2 * _PAGE
    return units if is_worth_it else None


def _folder_in(prefix: str, name: str) -> str:
    """The folder right below *prefix* that *name* is in, with its slash; "" if it is in none."""
    return name[: name.find("/", len(prefix)) + 1]
