"""The local cache: right bytes or none, with any other users of the folder and any failure of the disk."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import stat
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from torch.utils.data import DataLoader

import azstoragetorch._samples.cache
from azstoragetorch._blob.url import parse_blob_url
from azstoragetorch._engine.config import KiB
from azstoragetorch._samples.cache import BlobCache
from azstoragetorch.datasets import Blob, BlobDataset, IterableBlobDataset
from tests.faults import FaultService
from tests.process.interrupts import Run, sweep
from tests.support import QUICK, content

URL = parse_blob_url("https://account.blob.core.windows.net/data/blob?sv=1&sig=secret")
LARGE = 5 * QUICK.part_size + 11


def fill(service: FaultService, count: int, size: int = 3000) -> str:
    for index in range(count):
        service.put("data", f"{index:03d}", content(size, index))
    return service.container_url("data")


def make(url: str, folder: Path, kind: Any = IterableBlobDataset, **options: Any) -> Any:
    return kind.from_container_url(
        url, **{"credential": False, "transfer": QUICK, "cache_dir": folder, "cache_bytes": 1 << 20, **options}
    )


def files(folder: Path) -> list[Path]:
    return sorted(folder.glob("??/*"))


def read(blob: Blob) -> bytes:
    with blob.reader() as reader:
        return reader.read()


def test_a_second_reading_asks_the_service_for_the_listing_only(fault_service: FaultService, tmp_path: Path) -> None:
    url = fill(fault_service, 20)
    for kind in (IterableBlobDataset, BlobDataset):
        for transform in (None, read):
            fault_service.reset_log()
            dataset = make(url, tmp_path / "cache", kind, transform=transform)
            samples = list(dataset) if kind is IterableBlobDataset else dataset.__getitems__(range(20))
            data = [sample["data"] if transform is None else sample for sample in samples]
            assert data == [content(3000, i) for i in range(20)]
            assert kind is IterableBlobDataset or dataset[7] == samples[7]
            is_first = kind is IterableBlobDataset and transform is None
            assert len(fault_service.requests("get_blob")) == (20 if is_first else 0)


def test_names_are_hashed_and_the_folder_is_private(fault_service: FaultService, tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "cache"
    list(make(fill(fault_service, 3), folder))
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert len(files(folder)) == 3
    for path in files(folder):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
        assert set(path.stem) <= set("0123456789abcdef")
        assert path.stat().st_size == 3004


def test_another_version_is_another_file(fault_service: FaultService, tmp_path: Path) -> None:
    url = fill(fault_service, 2)
    list(make(url, tmp_path))
    fault_service.put("data", "001", b"new")
    assert [s["data"] for s in make(url, tmp_path)] == [content(3000), b"new"]
    assert [s["data"] for s in make(url, tmp_path)] == [content(3000), b"new"]
    assert len(fault_service.requests("get_blob")) == 3


def test_without_a_listing_the_version_is_asked_for(fault_service: FaultService, tmp_path: Path) -> None:
    fill(fault_service, 2)
    urls = [fault_service.blob_url("data", name) for name in ("000", "001")]
    for turn in range(2):
        fault_service.reset_log()
        dataset = IterableBlobDataset.from_blob_urls(urls, credential=False, transfer=QUICK, cache_dir=tmp_path)
        assert [s["data"] for s in dataset] == [content(3000, i) for i in range(2)]
        assert len(fault_service.requests("get_blob")) == (0 if turn else 2)
        assert len(fault_service.requests("head")) == 2
    dataset = BlobDataset.from_blob_urls(urls, credential=False, transfer=QUICK, cache_dir=tmp_path)
    assert dataset[1]["data"] == content(3000, 1)
    assert fault_service.requests("get_blob") == []


def test_a_large_blob_is_kept_when_it_was_read_whole(fault_service: FaultService, tmp_path: Path) -> None:
    fault_service.put("data", "large", content(LARGE))
    url = fault_service.container_url("data")

    def begin(blob: Blob) -> bytes:
        with blob.reader() as reader:
            return reader.read(10)

    def pieces(blob: Blob) -> bytes:
        with blob.reader() as reader:
            reader.seek(LARGE - 20)
            tail = reader.read()
            reader.seek(0)
            buffer = bytearray(LARGE - 20)
            assert reader.readinto(buffer) == len(buffer)
            return bytes(buffer) + tail

    quiet = replace(QUICK, read_ahead=0)
    assert list(make(url, tmp_path, transform=begin, transfer=quiet)) == [content(LARGE)[:10]]
    assert files(tmp_path) == []
    assert list(make(url, tmp_path, transform=read)) == [content(LARGE)]
    assert len(files(tmp_path)) == 1
    fault_service.reset_log()
    for transform, expected in ((read, LARGE), (begin, 10), (pieces, LARGE)):
        assert list(make(url, tmp_path, transform=transform)) == [content(LARGE)[:expected]]
    assert [s["data"] for s in make(url, tmp_path)] == [content(LARGE)]
    assert fault_service.requests("get_blob") == []


@pytest.mark.parametrize(
    ("size", "damage"),
    [(size, damage) for size in (3000, LARGE) for damage in ("cut", "empty", "longer")] + [(3000, "flipped")],
)
def test_a_damaged_file_is_read_again(fault_service: FaultService, tmp_path: Path, size: int, damage: str) -> None:
    url = fill(fault_service, 1, size)
    list(make(url, tmp_path))
    (path,) = files(tmp_path)
    data = path.read_bytes()
    changed = {"cut": data[:-7], "empty": b"", "flipped": b"?" + data[1:], "longer": data + b"x"}[damage]
    path.write_bytes(changed)
    assert [s["data"] for s in make(url, tmp_path)] == [content(size)]
    assert path.read_bytes() == data


def test_the_least_recently_used_leave(tmp_path: Path) -> None:
    cache = BlobCache(tmp_path, 10 * (1000 + 4))
    for index in range(10):
        cache.store(URL, str(index), content(1000, index))
    assert len(files(tmp_path)) == 10
    for index, path in enumerate(sorted(files(tmp_path), key=lambda path: path.stat().st_mtime_ns)):
        os.utime(path, (index, index))
    assert cache.load(URL, "0") == content(1000, 0)  # used now, so it is kept
    cache.store(URL, "new", content(1000, 99))
    kept = [index for index in range(10) if cache.load(URL, str(index)) is not None]
    assert kept[0] == 0
    assert 1 not in kept
    assert 9 in kept
    assert cache.load(URL, "new") == content(1000, 99)
    assert sum(path.stat().st_size for path in files(tmp_path)) <= cache.limit


def test_what_is_larger_than_the_cache_stays_out(tmp_path: Path) -> None:
    cache = BlobCache(tmp_path, 1000)
    cache.store(URL, "a", bytes(500))
    cache.store(URL, "b", bytes(1000))
    assert cache.load(URL, "b") is None
    assert cache.load(URL, "a") == bytes(500)


def hammer(folder: Path, seed: int, limit: int) -> None:
    cache = BlobCache(folder, limit)
    for turn in range(150):
        index = (turn * 7 + seed * 13) % 40
        found = cache.load(URL, str(index))
        assert found in (None, content(900 + index, index))
        cache.store(URL, str(index), content(900 + index, index))


def test_many_processes_may_use_one_folder(tmp_path: Path) -> None:
    """During eviction, the limit holds and every file is complete."""
    limit = 20_000
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=hammer, args=(tmp_path, seed, limit)) for seed in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(240)
    assert [worker.exitcode for worker in workers] == [0] * 4
    assert sum(path.stat().st_size for path in files(tmp_path)) <= limit
    assert not list(tmp_path.glob("??/*.part"))
    cache = BlobCache(tmp_path, limit)
    kept = [index for index in range(40) if cache.load(URL, str(index)) == content(900 + index, index)]
    assert len(kept) == len(files(tmp_path)) > 5


@pytest.mark.untraced
@pytest.mark.parametrize("is_handler", [True, False])
def test_a_store_inside_any_line_of_another(tmp_path: Path, is_handler: bool) -> None:
    """A store in a signal handler does not wait and is counted; after an interrupt the next store works."""
    numbers = itertools.count()
    cache = BlobCache(tmp_path / "none", 0)

    def set_up() -> None:
        nonlocal cache
        cache = BlobCache(tmp_path / str(next(numbers)), 20_000)

    def handle() -> None:
        if not is_handler:
            raise KeyboardInterrupt
        cache.store(URL, "handler's", content(200))

    def check(_state: None, run: Run) -> None:
        cache.store(URL, "after", content(300))
        names = ["after", *(["handler's"] if is_handler else []), *(["e"] if run.error is None else [])]
        assert all(cache.load(URL, name) is not None for name in names)
        on_disk = sum(path.stat().st_size for path in files(cache.folder))
        assert int((cache.folder / "usage").read_text()) >= on_disk

    sweep(
        set_up, lambda _: cache.store(URL, "e", content(100)), check, files=[azstoragetorch._samples.cache], do=handle
    )


def test_workers_share_it(fault_service: FaultService, tmp_path: Path) -> None:
    url = fill(fault_service, 30)
    for turn in range(2):
        fault_service.reset_log()
        dataset = make(url, tmp_path)
        loader = DataLoader(dataset, batch_size=4, num_workers=2, collate_fn=list)
        data = sorted(sample["data"] for batch in loader for sample in batch)
        assert data == sorted(content(3000, i) for i in range(30))
        assert len(fault_service.requests("get_blob")) == (0 if turn else 30)


def test_a_disk_that_cannot_be_written_is_read_through_with_one_warning(
    fault_service: FaultService, tmp_path: Path
) -> None:
    url = fill(fault_service, 10)
    blocked = tmp_path / "cache"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        dataset = make(url, blocked)
        # Root can write anywhere; a file in the place of a folder stops every user.
        for name in range(256):
            (blocked / f"{name:02x}").write_bytes(b"")
        for _ in range(2):
            assert [s["data"] for s in dataset] == [content(3000, i) for i in range(10)]
    told = [str(entry.message) for entry in caught if entry.category is RuntimeWarning]
    assert len(told) == 1
    assert str(blocked) in told[0]
    assert "cannot be written" in told[0]


@pytest.mark.untraced
def test_a_full_disk_is_read_through_and_leaves_nothing_behind(fault_service: FaultService, tmp_path: Path) -> None:
    """A limit on the file size simulates a full disk; it needs a separate process."""
    url = fill(fault_service, 5)
    context = multiprocessing.get_context("fork")
    worker = context.Process(target=read_with_small_files, args=(url, tmp_path))
    worker.start()
    worker.join(240)
    assert worker.exitcode == 0
    assert files(tmp_path) == []


def read_with_small_files(url: str, folder: Path) -> None:
    import resource
    import signal

    dataset = make(url, folder)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1024, 1024))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert [s["data"] for s in dataset] == [content(3000, i) for i in range(5)]
    assert len([entry for entry in caught if "cannot be written" in str(entry.message)]) == 1


def test_a_folder_that_others_can_write_to_is_refused(fault_service: FaultService, tmp_path: Path) -> None:
    url = fill(fault_service, 1)
    tmp_path.chmod(0o777)
    with pytest.raises(ValueError, match=r"cache_dir .* can be written by others"):
        make(url, tmp_path)
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(ValueError, match=r"cache_dir .* is not a folder"):
        make(url, tmp_path / "file")


def test_unfinished_files_of_dead_writers_are_swept(tmp_path: Path) -> None:
    cache = BlobCache(tmp_path, 10 * KiB)
    cache.store(URL, "a", bytes(100))
    (old, young) = (files(tmp_path)[0].parent / name for name in ("old.part", "young.part"))
    for path in (old, young):
        path.write_bytes(b"x")
    os.utime(old, (0, 0))
    cache.sweep(0)
    assert not old.exists()
    assert young.exists()
