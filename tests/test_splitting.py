"""Listings that many workers divide: no name is lost or listed twice, whatever the tree and the order."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from functools import partial

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import azstoragetorch._blob.client
import azstoragetorch._samples.splitting
from azstoragetorch._blob.client import Page
from azstoragetorch._blob.listing import list_pages
from azstoragetorch._blob.url import parse_url
from azstoragetorch._samples.splitting import Pages, list_share, split
from azstoragetorch.datapipes import BlobInfo
from azstoragetorch.datasets import IterableBlobDataset
from azstoragetorch.manifest import list_part, make_manifest
from tests.faults import FaultService
from tests.support import QUICK


class Tree:
    """Lists *names* as the service does, *size* at a time; segment by segment if it is hierarchical."""

    def __init__(self, names: set[str], size: int, *, is_hierarchical: bool = False) -> None:
        self._names = sorted(names, key=lambda name: name.split("/") if is_hierarchical else [name])
        self._size = size
        self.requests = 0

    def pages(self, prefix: str, delimiter: str) -> Iterator[Page]:
        entries: list[tuple[str, bool]] = []
        for name in self._names:
            if name.startswith(prefix):
                end = name.find(delimiter, len(prefix)) + 1 if delimiter else 0
                entry = (name[:end], True) if end else (name, False)
                if entries[-1:] != [entry]:
                    entries.append(entry)
        for start in range(0, max(1, len(entries)), self._size):
            self.requests += 1
            part = entries[start : start + self._size]
            names = [name for name, is_folder in part if not is_folder]
            marker = "more" if start + self._size < len(entries) else ""
            yield Page(names, [0] * len(names), [""] * len(names), [n for n, is_folder in part if is_folder], marker)


def list_all(pages: Pages, at_most: int, into: int) -> tuple[list[str], int]:
    """All names, and the number of shares."""
    found: list[str] = []
    shares = deque([""])
    count = 0
    while shares:
        count += 1
        for item in list_share(pages, shares.popleft(), at_most=at_most, into=into):
            if isinstance(item, str):
                shares.append(item)
            else:
                found += item.names
    return found, count


SEGMENTS = st.text("ab-.0", min_size=1, max_size=3)
NAMES = st.sets(st.lists(SEGMENTS, min_size=1, max_size=4).map("/".join), max_size=60)


@given(NAMES, st.integers(1, 5), st.integers(1, 3), st.integers(1, 9), st.booleans())
@example({"a/1", "a/2", "a-b/1", "a.t", "b/1"}, 1, 1, 4, True)
@example({"a/b/1", "a/b/2", "a/c/1", "a0", "a/d", "b"}, 1, 1, 2, False)
@settings(deadline=None)
def test_every_name_is_listed_once(names: set[str], size: int, at_most: int, into: int, is_hierarchical: bool) -> None:
    if is_hierarchical:  # where a file is not a folder, too
        names = {name for name in names if not any(other.startswith(f"{name}/") for other in names)}
    found, _ = list_all(Tree(names, size, is_hierarchical=is_hierarchical).pages, at_most, into)
    assert sorted(found) == sorted(names)


def split_all(tree: Tree) -> tuple[list[str], int]:
    """All names, and the number of requests before the shares were known."""
    shares = split(tree.pages, "")
    requests = tree.requests
    pages = [page for share in shares for page in (tree.pages(share, "") if isinstance(share, str) else [share])]
    return [name for page in pages for name in page.names], requests


@given(NAMES, st.integers(1, 5), st.integers(1, 9), st.integers(1, 9), st.booleans())
@example({"a/1", "a/2", "a-b/1", "a.t", "b/1"}, 5, 9, 2, True)
@settings(deadline=None)
def test_every_name_is_in_one_share(names: set[str], size: int, pages: int, most: int, is_hierarchical: bool) -> None:
    if is_hierarchical:
        names = {name for name in names if not any(other.startswith(f"{name}/") for other in names)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(azstoragetorch._samples.splitting, "_MOST", most)
        patch.setattr(azstoragetorch._samples.splitting, "_SPLIT_PAGES", pages)
        found, requests = split_all(Tree(names, size, is_hierarchical=is_hierarchical))
    assert sorted(found) == sorted(names)
    assert requests <= pages


@pytest.mark.parametrize(
    ("names", "expected", "requests"),
    [
        ({f"{a}/{b}/{c}" for a in range(3) for b in range(30) for c in range(9)}, 90, 1 + 3 * 3),
        ({f"{a}/{c:04d}" for a in range(20) for c in range(50)}, 20, 2 + 4 * 2),  # no folder in four of them
        ({f"{a:03d}/{c}" for a in range(999) for c in range(2)}, 100, 100),  # by beginnings of the names
        ({f"{c:04d}" for c in range(500)}, 1, 2),
    ],
)
def test_shares_are_found_with_few_requests(names: set[str], expected: int, requests: int) -> None:
    tree = Tree(names, 10)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(azstoragetorch._samples.splitting, "_SPLIT_PAGES", 100)
        patch.setattr(azstoragetorch._samples.splitting, "_MOST", 100)
        assert len(split(tree.pages, "")) == expected
    assert tree.requests == requests


def test_a_large_tree_is_divided_with_few_more_requests() -> None:
    names = {f"{a}/{b}/{c:04d}" for a in "abcd" for b in range(25) for c in range(40)}
    tree = Tree(names, 20)
    found, shares = list_all(tree.pages, at_most=10, into=4)
    assert len(found) == len(names)
    assert shares > 8
    assert tree.requests <= 1.25 * len(names) / 20


def test_small_folders_are_given_away_together() -> None:
    names = {f"{number:04d}/x" for number in range(1000)}
    tree = Tree(names, 100)
    _, shares = list_all(tree.pages, at_most=5, into=5)
    assert 4 < shares < 40
    assert tree.requests < 60


def test_a_folder_without_folders_is_listed_by_one() -> None:
    tree = Tree({f"{number:04d}" for number in range(500)}, 10)
    found, shares = list_all(tree.pages, at_most=5, into=4)
    assert (len(found), shares) == (500, 1)


def test_tasks_list_a_container_and_make_a_manifest(
    fault_service: FaultService, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(azstoragetorch._blob.client, "list_pages", partial(list_pages, page_size=5))
    names = [f"{a}/{b}/{c}" for a in "xyz" for b in range(4) for c in range(6)] + ["a b", "y/\u00e9"]
    for name in names:
        fault_service.put("data", name, b"12")
    url = fault_service.container_url("data")
    parts, found = deque([""]), []
    tasks = 0
    while parts:
        tasks += 1
        for item in list_part(url, parts.popleft(), at_most=2, into=3, credential=False, transfer=QUICK):
            if isinstance(item, str):
                parts.append(item)
            else:
                found += item
    assert tasks > 3
    assert len(found) == len(names)
    info = make_manifest(url, f"{url}/listed", blobs=iter(found), credential=False, transfer=QUICK)
    assert (info.count, info.size) == (len(names), 2 * len(names))
    same = make_manifest(url, f"{url}/same", prefix="", credential=False, transfer=QUICK)
    assert same.count == len(names) + 2  # the first manifest
    dataset = IterableBlobDataset.from_manifest(f"{url}/listed", credential=False, transfer=QUICK)
    assert [parse_url(sample["url"]).blob for sample in dataset] == sorted(names)
    with pytest.raises(ValueError, match="is not in"):
        make_manifest(url, f"{url}/m", blobs=[BlobInfo("https://a.b/c/d", 1, "")], credential=False)
    with pytest.raises(TypeError, match="must be of type BlobInfo"):
        make_manifest(url, f"{url}/m", blobs=[url], credential=False)  # type: ignore[list-item]
    with pytest.raises(ValueError, match="at_most must be at least 1"):
        next(list_part(url, at_most=0))
