"""Divide a listing among workers that list at the same time, without knowing beforehand what there is.

A share is all names with one beginning. `split` divides before anything is listed, for engines that must know all work
when they begin. `list_share` also divides while it lists, for engines that accept new work at any time: a worker that
has listed many pages of a share, and is not through, looks at the folders around its position, keeps the one that it is
in, and gives away those after it as new shares. Folders that are likely small are given away by a common beginning of
their names, since each share costs a request.

No name is lost or listed twice, and no parameter is needed that the service does not have: all folders at a level are
seen before any is given away. A folder that has a great many blobs and no folders cannot be divided.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from azstoragetorch._blob.client import Page

Pages: TypeAlias = Callable[[str, str], Iterator[Page]]
"""Lists what begins with a prefix, grouped by a delimiter unless that is empty, in the order of the service."""

LATER_PAGES = 200  # of a share that was given away, until it is divided: a million names, some ten seconds
LATER_PARTS = 16  # that it is divided into

_ENOUGH = 64  # shares; with more of them than workers, no worker waits long for the last one
_MOST = 256  # folders at one level, of which more are not listed one by one
_SPLIT_PAGES = 64  # that are read for it at most: some seconds
_LEAVES = 4  # folders in a row without folders, after which others are not expected to have any

_SURVEYED = 2  # pages of folders that may be read, for each page that a share has had
_OF_BLOBS = 2  # pages with more blobs than folders that may be read: the folders are not worth more


def list_share(pages: Pages, prefix: str, *, at_most: int, into: int) -> Iterator[Page | str]:
    """The pages of a share, in any order, and the prefixes of shares that are given away.

    Every *at_most* pages, the rest is divided into about *into* shares, if it can be.
    """
    limit = prefix
    listed, patience = 0, at_most
    for page in pages(prefix, ""):
        inside = _count_inside(page, limit)
        if inside:
            yield _part_of(page, inside)
        listed += 1
        if inside < len(page.names):
            return  # behind the folder that was kept
        if listed >= patience and page.marker and page.names:
            rest = _divide(pages, limit, page.names[-1], into, _SURVEYED * patience)
            if rest is None:
                patience *= 2  # attempts together cost no more than what was listed
            else:
                listed, patience = 0, at_most
                if rest.blobs.names:
                    yield rest.blobs
                yield from rest.prefixes
                if not rest.kept:
                    return
                limit = rest.kept


def split(pages: Pages, prefix: str) -> list[Page | str]:
    """Shares that hold every blob below *prefix* once, as prefixes and as what was found next to folders.

    Looks into the outermost folders until there are enough shares, or nothing that is likely to be divisible.
    """
    folders = deque([prefix])
    shares: list[Page | str] = []
    left, leaves = _SPLIT_PAGES, 0
    while folders and left > 0 and leaves < _LEAVES and len(folders) + len(shares) < _ENOUGH:
        folder = folders.popleft()
        survey = _survey(pages, folder, left)
        left -= survey.pages
        leaves = 0 if survey.folders else leaves + 1
        if not survey.is_complete or not survey.folders:
            shares.append(folder)
            continue
        inner = sorted(set(survey.folders))  # two pages can name the same one
        if len(inner) > _MOST:
            inner = _grouped(inner, _level_of(folder), "", _ENOUGH)
            shares += inner
        else:
            folders.extend(inner)
        if (blobs := _not_covered(survey.blobs, inner)).names:
            shares.append(blobs)
    return [*shares, *folders]


def _count_inside(page: Page, limit: str) -> int:
    """How many names of *page*, from its first one on, begin with *limit*."""
    names = page.names
    if not names or names[-1].startswith(limit):
        return len(names)
    return _end_of(names, limit, 0, len(names))


def _part_of(page: Page, count: int) -> Page:
    if count == len(page.names):
        return page
    return Page(page.names[:count], page.sizes[:count], page.etags[:count], [], "")


@dataclass(frozen=True, slots=True)
class _Rest:
    """What comes after a name."""

    kept: str  # the folder that the name is in, of which more may come; empty if it is in none
    prefixes: list[str]
    blobs: Page  # those that no prefix covers


def _divide(pages: Pages, limit: str, last: str, into: int, at_most: int) -> _Rest | None:
    """What comes after *last* below *limit*, divided by the outermost folders; None if it cannot be divided."""
    blobs: list[_Blob] = []  # of outer levels, where no folders come after *last*
    while True:
        level = _level_of(limit)
        child = last[: last.find("/", len(level)) + 1]
        found = _survey(pages, limit, at_most)
        if not (found.is_complete and found.is_unambiguous):
            return None
        blobs += [blob for blob in found.blobs if blob[0] > (child or last)]
        later = [name for name in found.folders if name > (child or last)]
        if later:
            prefixes = _grouped(later, level, last, into)
            return _Rest(child, prefixes, _not_covered(blobs, prefixes))
        if not child:
            return None
        limit = child


_Blob: TypeAlias = tuple[str, int, str]
"""Its name, size, and ETag."""


@dataclass(slots=True)
class _Survey:
    """The folders and blobs at one level."""

    folders: list[str]
    blobs: list[_Blob]
    pages: int
    is_complete: bool
    """Whether this is all; False if it was too much."""

    @property
    def is_unambiguous(self) -> bool:
        """Whether what comes after a name is the same in all orders that services have.

        Accounts with a hierarchical namespace compare names segment by segment, others character by character.
        """
        if len(set(self.folders)) != len(self.folders):
            return False
        entries = self.folders + [name for name, _, _ in self.blobs]
        return sorted(entries) == sorted(entries, key=lambda name: name.removesuffix("/"))


def _survey(pages: Pages, prefix: str, at_most: int) -> _Survey:
    """What there is at one level, if that is not too much."""
    found = _Survey([], [], 0, is_complete=False)
    of_blobs = 0
    for page in pages(prefix, "/"):
        found.pages += 1
        found.folders += page.prefixes
        found.blobs += zip(page.names, page.sizes, page.etags, strict=True)
        of_blobs += len(page.names) > len(page.prefixes)
        if page.marker and (found.pages >= at_most or of_blobs >= _OF_BLOBS):
            return found
    found.is_complete = True
    return found


def _level_of(prefix: str) -> str:
    """The folder that *prefix* is in or names, with its slash."""
    return prefix[: prefix.rfind("/") + 1]


def _not_covered(blobs: list[_Blob], prefixes: list[str]) -> Page:
    """Those of *blobs* that begin with none of the sorted *prefixes*."""
    rest = [blob for blob in blobs if not any(map(blob[0].startswith, _candidates(blob[0], prefixes)))]
    names, sizes, etags = map(list, zip(*rest, strict=True)) if rest else ([], [], [])
    return Page(names, sizes, etags, [], "")


def _candidates(name: str, prefixes: list[str]) -> list[str]:
    """The only one of the sorted *prefixes*, none of which begins with another, that *name* may begin with."""
    at = bisect_left(prefixes, name)
    return prefixes[max(0, at - 1) : at + 1]


def _grouped(names: list[str], level: str, last: str, into: int) -> list[str]:
    """Prefixes that cover *names*, which are folders at *level* after *last* in order, and nothing before them."""
    most = -(-len(names) // into)
    found: list[str] = []
    waiting = [(0, len(names), level)]
    while waiting:
        start, stop, prefix = waiting.pop()
        if stop - start == 1:
            found.append(names[start])
        elif stop - start <= most and not last.startswith(prefix):
            found.append(prefix)
        else:
            at = start
            while at < stop:
                longer = names[at][: len(prefix) + 1]
                end = _end_of(names, longer, at, stop)
                waiting.append((at, end, longer))
                at = end
    return sorted(found)


def _end_of(names: Sequence[str], prefix: str, start: int, stop: int) -> int:
    """Where those of *names* end that begin with *prefix*; they begin at *start*."""
    return start + bisect_left(range(start, stop), True, key=lambda index: not names[index].startswith(prefix))
