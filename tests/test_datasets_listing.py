"""Listings: compact, made once, and in the same order however they are made."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import random
import signal
import sys
import threading
import time
import tracemalloc
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader

import azstoragetorch._samples.once
import azstoragetorch.datasets._contents
from azstoragetorch._blob.url import parse_blob_url, parse_container_url
from azstoragetorch._samples import listing as listing_module
from azstoragetorch._samples.catalog import Catalog
from azstoragetorch._samples.listing import list_catalog
from azstoragetorch._samples.once import OnceAmongForks
from azstoragetorch.datapipes import AzureBlobFileLister
from azstoragetorch.datasets import Blob, BlobDataset, IterableBlobDataset
from azstoragetorch.nodes import BlobLister
from tests.faults import EmptyPageWithMarker, FaultService, Hold, Match
from tests.process.interrupts import Run, sweep
from tests.support import QUICK, container_client

ROOMY = replace(QUICK, memory_limit=64 << 20)
CONTAINER = "https://account.blob.core.windows.net/data"


def url_of(blob: Blob) -> str:
    return blob.url


def entries(catalog: Catalog) -> list[tuple[str, int | None, str | None]]:
    return [(catalog.name(i), catalog.size(i), catalog.etag(i)) for i in range(len(catalog))]


NAMES = st.text(st.characters(exclude_categories=("Cs",)), min_size=1, max_size=20)
ETAGS = st.one_of(
    st.integers(0, 2**64 - 1).map(lambda value: f'"0x{value:X}"'),
    st.sampled_from(['"0x8dc0"', '"0xG"', '"0x1_0"', '"0x10000000000000000"', '"0x01"', '""', '"abc"', '"0x-1"']),
)


@given(st.lists(st.lists(st.tuples(NAMES, st.integers(0, 2**50), ETAGS), max_size=8), max_size=4))
def test_a_catalog_keeps_what_was_listed(pages: list[list[tuple[str, int, str]]]) -> None:
    catalog = Catalog([parse_container_url(CONTAINER)])
    other = Catalog()
    for page in pages:
        columns = [list(column) for column in zip(*page, strict=True)] or [[], [], []]
        catalog.append_listed(*columns)  # type: ignore[arg-type]
        other.append_listed(*columns)  # type: ignore[arg-type]
    expected = [entry for page in pages for entry in page]
    assert entries(catalog) == expected
    copy = pickle.loads(pickle.dumps(catalog))
    assert entries(copy) == entries(Catalog.from_bytes(catalog.containers, catalog.to_bytes())) == expected
    assert copy.fingerprint == catalog.fingerprint
    catalog.append(other)
    assert entries(catalog) == expected * 2
    catalog.truncate(len(expected))
    assert entries(catalog) == expected
    assert catalog.fingerprint == copy.fingerprint


def test_a_fingerprint_tells_order_and_names_apart() -> None:
    def of(*names: str) -> str:
        catalog = Catalog([parse_container_url(CONTAINER)])
        catalog.append_listed(names, [0] * len(names), ['"0x1"'] * len(names))
        return catalog.fingerprint

    assert len({of(), of("a", "b"), of("b", "a"), of("ab"), of("a", "", "b"), of("a")}) == 6


@given(st.lists(st.tuples(st.sampled_from("ab"), NAMES, st.sampled_from(["", "?snapshot=1", "?sv=1&sig=s"]))))
def test_a_catalog_of_urls_gives_back_what_the_parser_makes_of_each(blobs: list[tuple[str, str, str]]) -> None:
    from urllib.parse import quote

    urls = []
    for container, name, query in blobs:
        if not any(segment in (".", "..") for segment in name.split("/")):
            urls.append(f"https://account.blob.core.windows.net/{container}/{quote(name, safe='/~')}{query}")
    catalog = Catalog()
    catalog.append_urls(urls)
    assert [catalog.url(i) for i in range(len(catalog))] == [parse_blob_url(url) for url in urls]
    assert len(catalog.containers) <= 6
    assert catalog.total_size is None or not urls


def test_urls_that_are_refused_are_refused_in_any_place() -> None:
    for url in (f"{CONTAINER}/a/../b", f"{CONTAINER}/./a", f"{CONTAINER}/{'x' * 1025}", f"{CONTAINER}/", "no url"):
        with pytest.raises(ValueError, match="blob_url"):
            Catalog().append_urls([f"{CONTAINER}/a", f"{CONTAINER}/b", url])


def test_a_blob_takes_some_dozens_of_bytes() -> None:
    count = 100_000
    names = [f"train/class{index // 100:03d}/img_{index:08d}.jpg" for index in range(count)]
    etags = [f'"0x{random.Random(index).getrandbits(60):X}"' for index in range(count)]
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        catalog = Catalog([parse_container_url(CONTAINER)])
        for at in range(0, count, 5000):
            catalog.append_listed(names[at : at + 5000], range(5000), etags[at : at + 5000])
        growth = tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()
    assert growth < 90 * count
    assert len(pickle.dumps(catalog)) < 60 * count


# -- fanning out -----------------------------------------------------------------------------------------------------

TREES = {
    "folders": [f"train/class{c:02d}/img{i:03d}" for c in range(12) for i in range(15)],
    "folders and blobs": [f"a/{d}/{i}" for d in "bdfh" for i in range(20)]
    + [f"a/{d}{i:02d}" for d in "ceg" for i in range(30)]
    + [f"{d}{i}" for d in "xz" for i in range(20)]
    + [f"y/{d}/{i}" for d in "pq" for i in range(20)],
    "names around the delimiter": [
        f"{stem}{mark}{i}" for stem in ("d", "d/e", "d-e", "k") for mark in ("/", "-", "0", "~/") for i in range(12)
    ],
    "flat": [f"img{i:04d}" for i in range(150)],
    "one deep folder": [f"a/b/c/d/{i:04d}" for i in range(150)],
    "many tiny folders": [f"{i:03d}/x" for i in range(150)],
    "nested": [f"{a}/{b}/{c}/{i}" for a in "ab" for b in "cde" for c in "fg" for i in range(12)],
}


@pytest.fixture
def small_thresholds(monkeypatch: pytest.MonkeyPatch, fault_service: FaultService) -> FaultService:
    """Fan out after 30 names, with pages of 10, and with a slow service, since only that makes it useful."""
    from azstoragetorch._blob import client, listing

    real = listing.list_pages

    def small_pages(*args: Any, **options: Any) -> Iterator[listing.Page]:
        return real(*args, **options, page_size=10)

    monkeypatch.setattr(client, "list_pages", small_pages)
    monkeypatch.setattr(listing_module, "_FAN_OUT_AFTER", 30)
    monkeypatch.setattr(listing_module, "_PAGE", 10)
    monkeypatch.setattr(listing_module, "_SURVEY_PAGES", 12)
    fault_service.latency = 0.01
    return fault_service


@pytest.mark.parametrize("prefix", ["", "a", "d", "train/class0", "none"])
@pytest.mark.parametrize("tree", TREES)
def test_a_long_listing_is_the_same_however_it_is_made(small_thresholds: FaultService, tree: str, prefix: str) -> None:
    service = small_thresholds
    names = sorted(name for name in set(TREES[tree]) if name.startswith(prefix))
    if not names and prefix != "none":
        pytest.skip("nothing there")
    for name in TREES[tree]:
        service.put("data", name, name.encode())
    is_wide = (tree, prefix) in (("folders", ""), ("folders and blobs", ""), ("nested", ""))
    service.latency = 0.2 if is_wide else 0.01
    counts: list[int] = []
    catalog = list_catalog(container_client(service.container_url("data"), ROOMY), prefix, counts.append)
    assert [name for name, _, _ in entries(catalog)] == names
    assert [catalog.size(i) for i in range(len(catalog))] == [len(name.encode()) for name in names]
    assert counts == sorted(counts)
    assert counts[-1] == len(names)
    fans_out = any(request.query.get("delimiter") for request in service.requests("list_blobs"))
    assert not (fans_out and len(names) <= 30)
    if is_wide:
        assert fans_out
        assert service.peak_active > 2


def test_markers_of_directories_are_not_blobs(small_thresholds: FaultService) -> None:
    with FaultService(hierarchical=True) as service:
        service.latency = 0.01
        for name in TREES["folders"]:
            service.put("data", name, b"1")
        service.put("data", "marker", b"", metadata={"hdi_isfolder": "true"})
        catalog = list_catalog(container_client(service.container_url("data"), ROOMY))
        assert [name for name, _, _ in entries(catalog)] == sorted(TREES["folders"])


def test_short_and_empty_pages_end_nothing(small_thresholds: FaultService) -> None:
    for name in TREES["folders"]:
        small_thresholds.put("data", name, b"1")
    small_thresholds.script(Match("list_blobs", every=3), [EmptyPageWithMarker()] * 8)
    catalog = list_catalog(container_client(small_thresholds.container_url("data"), ROOMY))
    assert [name for name, _, _ in entries(catalog)] == sorted(TREES["folders"])


def test_a_short_listing_takes_one_request(fault_service: FaultService) -> None:
    for index in range(100):
        fault_service.put("data", f"a/{index}/x", b"")
    dataset = BlobDataset.from_container_url(fault_service.container_url("data"), credential=False)
    assert len(dataset) == 100
    assert len(fault_service.log) == 1


def test_progress_is_reported(fault_service: FaultService) -> None:
    for index in range(7):
        fault_service.put("data", str(index), b"")
    told: list[int] = []
    url = fault_service.container_url("data")
    BlobDataset.from_container_url(url, credential=False, progress=told.append)
    assert told == [7]
    list(IterableBlobDataset.from_container_url(url, credential=False, prefix="3", progress=told.append))
    assert told == [7, 1]


# -- once ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("persistent", [False, True])
def test_forked_workers_list_once_together_and_a_new_blob_confuses_none(
    fault_service: FaultService, persistent: bool
) -> None:
    for index in range(20):
        fault_service.put("data", f"{index:02d}", b"x")
    url = fault_service.container_url("data")
    dataset = IterableBlobDataset.from_container_url(url, credential=False, transfer=QUICK, transform=url_of)
    loader = DataLoader(dataset, batch_size=4, num_workers=3, persistent_workers=persistent)
    gate = threading.Event()
    fault_service.script("list_blobs", [Hold(gate)])
    threading.Timer(0.5, gate.set).start()  # the others reach the lock in the meantime
    first = sorted(url for batch in loader for url in batch)
    fault_service.put("data", "00a", b"x")
    second = sorted(url for batch in loader for url in batch)
    assert first == second == [f"{url}/{index:02d}" for index in range(20)]
    assert len(fault_service.requests("list_blobs")) == 1


def test_one_warning_for_an_empty_prefix(fault_service: FaultService) -> None:
    fault_service.create_container("data")
    url = fault_service.container_url("data")
    dataset = IterableBlobDataset.from_container_url(url, prefix="nothing/", credential=False)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert list(dataset) == list(dataset) == []
    (warning,) = caught
    assert f"no blobs in {url} below the prefix 'nothing/'" in str(warning.message)


@pytest.mark.untraced
def test_a_handler_can_ask_for_what_is_just_being_listed(fault_service: FaultService) -> None:
    """At any line of a dataset that lists on first use."""
    fault_service.put("c", "b", b"content")
    url, present = fault_service.container_url("c"), []

    def set_up() -> Any:
        present[:] = [IterableBlobDataset.from_container_url(url, credential=False, transfer=QUICK)]
        return present[0]

    def check(dataset: Any, run: Run) -> None:
        assert run.error is None, repr(run.error)
        assert run.result == dataset.metadata.count == 1

    sweep(
        set_up,
        lambda dataset: dataset.metadata.count,
        check,
        files=[azstoragetorch.datasets._contents, azstoragetorch._samples.once],
        do=lambda: present[0].metadata,
    )


@pytest.mark.skipif(sys.platform == "win32", reason="needs fork")
class TestOnceAmongForks:
    def test_children_find_what_the_first_of_them_made(self, tmp_path: Path) -> None:
        once, made = OnceAmongForks(), tmp_path / "made"

        def make() -> bytes:
            with made.open("a") as file:
                file.write("x")
            time.sleep(0.1)
            return b"result" * 100_000

        assert run_children([lambda: once.get(make) == b"result" * 100_000] * 4) == [0] * 4
        assert made.read_text() == "x"
        assert once.get(make) == b"result" * 100_000
        assert made.read_text() == "x"

    def test_who_fails_or_is_killed_at_it_stops_nobody(self) -> None:
        once = OnceAmongForks()

        def fail() -> bytes:
            raise ZeroDivisionError

        def die() -> bytes:
            os.kill(os.getpid(), signal.SIGKILL)
            return b""

        def fails() -> bool:
            with pytest.raises(ZeroDivisionError):
                once.get(fail)
            return True

        assert run_children([fails, lambda: once.get(die) == b""]) == [0, signal.SIGKILL]
        assert run_children([lambda: once.get(lambda: b"x") == b"x"]) == [0]

    def test_a_call_inside_another_of_its_process(self) -> None:
        """As in a signal handler: all get the result of the inner call, which has released the lock of the process."""
        once = OnceAmongForks()

        def make() -> bytes:
            assert once.get(lambda: b"inner") == b"inner"
            return b"outer"

        assert run_children([lambda: once.get(make) == b"inner"]) == [0]
        assert once.get(make) == b"inner"

    def test_children_that_are_there_already_find_what_their_parent_made(self) -> None:
        once, gate = OnceAmongForks(), multiprocessing.Event()

        def find() -> None:
            gate.wait(60)
            assert once.get(lambda: b"of the child") == b"of the parent"

        child = multiprocessing.get_context("fork").Process(target=find)
        child.start()
        assert once.get(lambda: b"of the parent") == b"of the parent"
        gate.set()
        child.join(240)
        assert child.exitcode == 0

    def test_it_pickles_as_a_new_one_and_leaves_no_descriptor_open(self) -> None:
        def count() -> int:
            return len(list(Path("/proc/self/fd").iterdir())) if sys.platform == "linux" else 0

        before = count()
        once = OnceAmongForks()
        copy = pickle.loads(pickle.dumps(once))
        assert copy.get(lambda: b"copy") == b"copy"
        assert once.get(lambda: b"own") == b"own"
        del once, copy
        assert count() == before


def run_children(programs: list[Any]) -> list[int]:
    """Run each in a forked child; return the exit statuses, 0 for a true result."""
    children = []
    for program in programs:
        pid = os.fork()
        if not pid:
            status = 1
            try:
                status = 0 if program() else 2
            finally:
                os._exit(status)
        children.append(pid)
    statuses = [os.waitpid(pid, 0)[1] for pid in children]
    return [os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status) for status in statuses]


# -- names that cannot be requested, and markers of folders -----------------------------------------------------------

ODD_NAMES = ["a", "d/../c1", "folder/", "folder/b", "z/.."]


def listers(service: FaultService, **options: Any) -> dict[str, Callable[[], list[str]]]:
    """The blob names that each public listing of the container returns."""
    url, transfer = service.container_url("data"), {"credential": False, "transfer": QUICK}

    def names(dataset: Any) -> list[str]:
        return list(dataset) if isinstance(dataset, IterableBlobDataset) else dataset.__getitems__(range(len(dataset)))

    return {
        "map": lambda: names(BlobDataset.from_container_url(url, transform=name_of, **transfer, **options)),
        "iterable": lambda: names(
            IterableBlobDataset.from_container_url(url, transform=name_of, **transfer, **options)
        ),
        "pipe": lambda: [
            found.partition("/data/")[2] for found in AzureBlobFileLister(url, credential=False, **options)
        ],
        "node": lambda: [found.url.partition("/data/")[2] for found in BlobLister(url, credential=False, **options)],
    }


def name_of(blob: Blob) -> str:
    return blob.blob_name


@pytest.mark.parametrize("face", ["map", "iterable", "pipe", "node"])
def test_a_listed_name_that_cannot_be_requested_is_skipped_with_one_warning(
    fault_service: FaultService, face: str
) -> None:
    """The warning counts them and names the first; they are never requested. Empty folder markers are not samples."""
    for name in ODD_NAMES:
        fault_service.put("data", name, b"" if name.endswith("/") else b"x")
    with pytest.warns(UserWarning, match=r"skipped 2 listed blobs .* 'd/\.\./c1' has a '\.' or '\.\.' segment") as seen:
        assert listers(fault_service)[face]() == ["a", "folder/b"]
    assert len(seen) == 1
    assert {request.method for request in fault_service.log} == {"GET"}
    assert fault_service.requests("get_blob") == []


@pytest.mark.parametrize("face", ["map", "iterable", "pipe", "node"])
def test_a_listed_name_that_cannot_be_requested_is_an_error_on_demand(fault_service: FaultService, face: str) -> None:
    for name in ODD_NAMES:
        fault_service.put("data", name, b"")
    with pytest.raises(ValueError, match=r"/data: a listed blob name 'd/\.\./c1' .* invalid_names='skip'"):
        listers(fault_service, invalid_names="raise")[face]()
    with pytest.raises(ValueError, match="invalid_names must be 'skip' or 'raise', not 'drop'"):
        listers(fault_service, invalid_names="drop")[face]()


@pytest.mark.parametrize("face", ["map", "iterable", "pipe", "node"])
def test_markers_of_folders_are_listed_on_demand(fault_service: FaultService, face: str) -> None:
    """A blob with content is not a marker, whatever its name."""
    fault_service.put("data", "folder/", b"")
    fault_service.put("data", "other/", b"content")
    assert listers(fault_service)[face]() == ["other/"]
    assert listers(fault_service, include_folder_markers=True)[face]() == ["folder/", "other/"]


def test_masks_choose_before_names_are_looked_at(fault_service: FaultService) -> None:
    for name in ("a.jpg", "d/../c.txt"):
        fault_service.put("data", name, b"x")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lister = AzureBlobFileLister(fault_service.container_url("data"), "*.jpg", credential=False)
        assert [url.rpartition("/")[2] for url in lister] == ["a.jpg"]
