"""Manifests: made from a listing, read lazily, and refused where they are not what they should be."""

from __future__ import annotations

import json
import pickle
import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from azure.core.exceptions import ResourceExistsError, ResourceNotFoundError
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader
from torchdata.nodes import Loader

import azstoragetorch._samples.manifest
import azstoragetorch._samples.manifest_writer
import azstoragetorch._samples.parquet
from azstoragetorch._blob.client import ClientFactory
from azstoragetorch._blob.url import parse_url
from azstoragetorch._samples.manifest import Manifest, open_manifest
from azstoragetorch._samples.manifest_writer import Writing
from azstoragetorch._samples.parquet import encode
from azstoragetorch._samples.rows import Columns, Description, Part
from azstoragetorch.datapipes import AzureBlobInfoLister, AzureBlobManifestLister, ManifestBlob
from azstoragetorch.datasets import Blob, BlobDataset, IterableBlobDataset, merge_states
from azstoragetorch.exceptions import BlobChangedError
from azstoragetorch.manifest import (
    ManifestChange,
    ManifestError,
    compare_manifest,
    describe_manifest,
    make_manifest,
    verify_manifest,
)
from azstoragetorch.nodes import BlobManifestLister, BlobReader, BlobSharder
from tests.azurite.container import Container
from tests.faults import FaultService
from tests.support import QUICK, run_python

NAMES = sorted([f"train/{index:03d}" for index in range(17)] + ["train/é", "train/\U0001f600", "train/~", "test/0"])


def url_of(blob: Blob) -> str:
    return blob.url


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> int:
    """Parts of 4 rows, of which few are kept in memory."""
    monkeypatch.setattr(azstoragetorch._samples.manifest_writer, "PART_ROWS", 4)
    monkeypatch.setattr(azstoragetorch._samples.manifest, "_KEPT", 400)
    return 4


@pytest.fixture
def filled(container: Container, small_parts: int) -> Container:
    for name in NAMES:
        container.put(name, name.encode())
    return container


def make(container: Container, **options: Any) -> str:
    url = f"{container.url}/manifests/{options.pop('folder', 'all')}"
    make_manifest(container.url, url, credential=container.key, transfer=QUICK, **options)
    return url


def opened(container: Container, url: str) -> Manifest:
    return open_manifest(url, credential=container.key, transfer=QUICK)


def dataset_of(container: Container, url: str, **options: Any) -> IterableBlobDataset[Any]:
    return IterableBlobDataset.from_manifest(url, credential=container.key, transfer=QUICK, **options)


def names_in(dataset: IterableBlobDataset[Any] | DataLoader[Any]) -> list[str]:
    return [sample["data"].decode() for sample in dataset]


def spoil(container: Container, url: str, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the document of a manifest."""
    name = f"{parse_url(url).blob}/manifest.json"
    document = json.loads(container.get(name))
    change(document)
    container.put(name, json.dumps(document).encode())


# -- making ------------------------------------------------------------------------------------------------------------


def test_a_manifest_has_what_the_sdk_lists(filled: Container) -> None:
    """Names, sizes, and ETags, in order; without its own blobs."""
    listed = {item.name: (item.size, f'"{item.etag}"') for item in filled.client.list_blobs()}
    counts: list[int] = []
    url = make(filled, progress=counts.append)
    assert {row.name: (row.size, row.etag) for row in opened(filled, url).rows()} == listed
    assert [row.name for row in opened(filled, url).rows()] == NAMES
    assert counts == [4, 8, 12, 16, 20, 21]
    info = describe_manifest(url, credential=filled.key)
    assert (info.count, info.size, info.prefix) == (len(NAMES), sum(len(name.encode()) for name in NAMES), "")
    assert info.container_url == filled.url
    again = make(filled, folder="again")
    # The first manifest is one of the blobs that the second lists.
    assert describe_manifest(again, credential=filled.key).count == len(NAMES) + 7


def test_a_prefix_and_the_same_digest(filled: Container) -> None:
    first, second = (make(filled, folder=folder, prefix="train/") for folder in "ab")
    one, two = (describe_manifest(url, credential=filled.key) for url in (first, second))
    assert one.count == 20
    assert one.digest == two.digest
    filled.put("train/000", b"new")
    third = make(filled, folder="c", prefix="train/")
    assert describe_manifest(third, credential=filled.key).digest != one.digest


def test_the_parts_are_parquet_files_for_other_programs(filled: Container, tmp_path: Path) -> None:
    import pyarrow.parquet as pq

    make(filled)
    for name in filled.names():
        if name.endswith(".parquet"):
            (tmp_path / Path(name).name).write_bytes(filled.get(name))
    assert pq.read_table(tmp_path).column("name").to_pylist() == NAMES


def test_a_manifest_is_replaced_only_on_request(filled: Container) -> None:
    url = make(filled, prefix="train/")
    with pytest.raises(ResourceExistsError, match="overwrite=True"):
        make(filled, prefix="train/")
    filled.put("train/new", b"")
    before = filled.names()
    make(filled, prefix="train/", overwrite=True)
    assert verify_manifest(url, credential=filled.key).count == 21
    assert len(filled.names()) == len(before) + 1  # parts that nothing refers to are gone
    make(filled, overwrite=True)
    make(filled, overwrite=True)
    assert verify_manifest(url, credential=filled.key).count == 22  # without its own blobs


def test_a_failure_leaves_no_manifest(filled: Container, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(count: int) -> None:
        if count >= 8:
            raise RuntimeError("stop")

    before = filled.names()
    with pytest.raises(RuntimeError, match="stop"):
        make(filled, progress=fail)
    assert filled.names() == before


PAGES = st.lists(
    st.lists(st.tuples(st.text(st.characters(exclude_categories=("Cs",)), min_size=1, max_size=6), st.integers(0, 9))),
    max_size=5,
)


@given(pages=PAGES, run=st.integers(1, 9))
@settings(deadline=None, max_examples=25)
def test_rows_in_any_order_are_sorted(pages: list[list[tuple[str, int]]], run: int) -> None:
    writer = azstoragetorch._samples.manifest_writer

    def source() -> Iterator[Columns]:
        for page in pages:
            yield [name for name, _ in page], [size for _, size in page], [None for _ in page]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(writer, "_RUN", run)
        found = writer.in_order(source, lambda columns: [name for names, _, _ in columns for name in names])
    assert found == sorted(name for page in pages for name, _ in page)


def test_names_that_are_listed_twice_are_refused(container: Container, small_parts: int) -> None:
    folder = parse_url(f"{container.url}/m/")
    home = ClientFactory(container.key, QUICK, folder).container(folder)
    names = [f"{index:02d}" for index in range(20)]
    for twice in ("03", "07"):  # inside a part, and at its end
        doubled = sorted([*names, twice])
        pages: list[Columns] = [(doubled, [0] * 21, [None] * 21)]
        with pytest.raises(ManifestError, match=f"the name '{twice}' is there twice"):
            Writing(home, folder, lambda _count: None).write(
                lambda pages=pages: iter(pages), Description(container.url, "", "", 0, ()), create_only=True
            )
    assert container.names() == []


# -- bad input ---------------------------------------------------------------------------------------------------------


def test_there_is_no_manifest(container: Container) -> None:
    with pytest.raises(ResourceNotFoundError, match=r"no manifest at .*manifest make"):
        describe_manifest(f"{container.url}/none", credential=container.key)
    with pytest.raises(ValueError, match="a folder in a container"):
        describe_manifest(container.url, credential=container.key)


@pytest.mark.parametrize(
    ("spoiled", "message"),
    [
        (lambda d: d["parts"].pop(), "do not add up"),
        (lambda d: d.update(version=9), "version 9"),
        (lambda d: d.update(format="other"), "not a manifest"),
        (lambda d: d["parts"][0].update(name="../x"), "damaged"),
        (lambda d: d["parts"][0].update(digest="0" * 31), "damaged"),
        (lambda d: d["parts"][0].update(rows=0), "damaged"),
        (lambda d: d["parts"][0].update(rows=True), "damaged"),
        (lambda d: d.pop("prefix"), "damaged"),
        (lambda d: d.update(container=5), "damaged"),
        (lambda d: d.update(container="no url"), "damaged"),
    ],
)
def test_a_damaged_document_is_an_error(filled: Container, spoiled: Any, message: str) -> None:
    url = make(filled)
    spoil(filled, url, spoiled)
    with pytest.raises(ManifestError, match=message):
        opened(filled, url)


def test_a_truncated_manifest_is_an_error(filled: Container) -> None:
    url = make(filled)
    name = next(name for name in filled.names() if name.endswith("00002.parquet"))
    whole = filled.get(name)
    filled.put(name, whole[:-1])
    with pytest.raises(ManifestError, match="part is truncated"):
        verify_manifest(url, credential=filled.key)
    with pytest.raises(ManifestError, match="part is truncated"):
        list(dataset_of(filled, url))
    filled.put(name, b"x" * len(whole))
    with pytest.raises(ManifestError, match="not a Parquet file"):
        verify_manifest(url, credential=filled.key)
    other = next(name for name in filled.names() if name.endswith("00003.parquet"))
    filled.put(name, filled.get(other).ljust(len(whole), b"\0")[: len(whole)])
    with pytest.raises(ManifestError):
        verify_manifest(url, credential=filled.key)
    filled.client.delete_blob(name)
    with pytest.raises(ManifestError, match="part of the manifest is missing"):
        verify_manifest(url, credential=filled.key)
    document = f"{parse_url(url).blob}/manifest.json"
    filled.put(document, filled.get(document)[:-9])
    with pytest.raises(ManifestError, match="truncated"):
        opened(filled, url)


def read_whole(container: Container, url: str, **options: Any) -> list[Callable[[], object]]:
    """All ways to read what a manifest lists."""
    given = {"credential": container.key, "transfer": QUICK}

    def pipe() -> object:
        return list(pipe_of(container, url, **options).read_files_by_azure(**given))

    def node() -> object:
        return list(Loader(BlobReader(BlobManifestLister(url, **given, **options), **given)))

    def one_by_one() -> object:
        dataset = BlobDataset.from_manifest(url, **given, **options)
        return [dataset[index] for index in range(len(dataset))]

    datasets = (partial(dataset_of, container, url, shuffle=shuffle, **options) for shuffle in (False, True))
    return [pipe, node, one_by_one, *(partial(lambda make: list(make()), make) for make in datasets)]


def write_rows(container: Container, url: str, parts: list[list[str]]) -> None:
    """Write a manifest by hand."""
    folder = parse_url(url).blob
    described = []
    for number, names in enumerate(parts):
        data, rows = encode((names, [1] * len(names), [None] * len(names)), url)
        name = f"parts-0/{number}.parquet"
        container.put(f"{folder}/{name}", data)
        described.append(Part(name, len(names), len(data), rows.digest))
    document = Description(container.url, "", "2026-11-27T12:00:00Z", 1, tuple(described)).to_bytes()
    container.put(f"{folder}/manifest.json", document)


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ([["a", "b", "b"], ["c"]], "the name 'b' is there twice"),
        ([["a", "b"], ["b", "c"]], "the name 'b' is there twice"),
        ([["a"], ["b", "d"], ["c"]], "the name 'c' comes after 'd'"),
    ],
)
def test_names_that_are_there_twice_are_an_error(
    container: Container, monkeypatch: pytest.MonkeyPatch, parts: list[list[str]], message: str
) -> None:
    """Inside a part or at its end, whoever reads it."""
    url = f"{container.url}/m"
    with monkeypatch.context() as patch:
        patch.setattr(azstoragetorch._samples.parquet, "check_order", lambda *_: None)
        write_rows(container, url, parts)
    for name in "abcd":
        container.put(name, b"1")
    for read in read_whole(container, url):
        with pytest.raises(ManifestError, match=message):
            read()
    with pytest.raises(ManifestError, match=message):
        verify_manifest(url, credential=container.key)


def test_all_readers_refuse_what_is_truncated_of_another_container_or_old(filled: Container) -> None:
    url = make(filled)
    for read in read_whole(filled, url, container_url=f"{filled.url}2"):
        with pytest.raises(ManifestError, match=f"is of another container: {filled.url}, not {filled.url}2"):
            read()
    filled.put(NAMES[3], b"new")
    for read in read_whole(filled, url):
        with pytest.raises(BlobChangedError, match=rf"{NAMES[3]} was overwritten after it was listed"):
            read()
    for read in read_whole(filled, url, if_changed="read"):
        assert len(read()) == len(NAMES)  # type: ignore[arg-type]
    for name, message in (("00002.parquet", "part is truncated: it has"), ("manifest.json", "manifest is truncated")):
        (name,) = (found for found in filled.names() if found.endswith(name))
        filled.put(name, filled.get(name)[:-1])
        for read in read_whole(filled, url, if_changed="read"):
            with pytest.raises(ManifestError, match=f"{name}: .*{message}"):
                read()


def test_parts_in_another_order_are_an_error(filled: Container) -> None:
    """Each part is whole, and names of one part come after those of the next."""
    url = make(filled)

    def swap(document: dict[str, Any]) -> None:
        import hashlib

        parts = document["parts"]
        parts[1], parts[2] = parts[2], parts[1]
        digest = hashlib.blake2b(b"".join(bytes.fromhex(part["digest"]) for part in parts), digest_size=16)
        document["digest"] = digest.hexdigest()

    spoil(filled, url, swap)
    with pytest.raises(ManifestError, match="comes after"):
        verify_manifest(url, credential=filled.key)


def test_a_manifest_of_another_container_is_an_error(filled: Container) -> None:
    url = make(filled)
    other = f"{filled.url}-other"
    with pytest.raises(ManifestError, match="is of another container"):
        dataset_of(filled, url, container_url=other)
    assert len(dataset_of(filled, url, container_url=filled.url).metadata.fingerprint) == 32


def test_a_manifest_does_not_choose_where_the_credential_goes(filled: Container, fault_service: FaultService) -> None:
    url = make(filled)
    elsewhere = fault_service.container_url("data")
    spoil(filled, url, lambda document: document.update(container=elsewhere))
    with pytest.raises(ManifestError, match="in another account"):
        dataset_of(filled, url)
    spoil(filled, url, lambda document: document.update(container=f"{filled.url}?sv=1&sig=secret"))
    with pytest.raises(ManifestError, match="has a SAS"):
        dataset_of(filled, url)
    assert fault_service.requests() == []


# -- datasets ----------------------------------------------------------------------------------------------------------


def test_datasets_read_what_the_manifest_lists(filled: Container) -> None:
    url = make(filled)
    filled.put("train/later", b"later")
    assert names_in(dataset_of(filled, url)) == NAMES
    mapped = BlobDataset.from_manifest(url, credential=filled.key, transfer=QUICK)
    assert len(mapped) == len(NAMES)
    assert mapped[-1]["data"].decode() == NAMES[-1]
    order = random.Random(0).sample(range(len(NAMES)), len(NAMES))
    assert [s["data"].decode() for s in mapped.__getitems__(order)] == [NAMES[i] for i in order]
    info = mapped.metadata
    assert info == dataset_of(filled, url).metadata
    assert info.fingerprint == describe_manifest(url, credential=filled.key).digest
    assert pickle.loads(pickle.dumps(mapped)).metadata == info
    assert "21 blobs of" in repr(mapped)


@pytest.mark.parametrize("collected", [1000, 5])
def test_a_shuffled_dataset_has_the_same_order_as_one_of_a_listing(
    filled: Container, monkeypatch: pytest.MonkeyPatch, collected: int
) -> None:
    """The order is by position, so it is that of a container with the same names."""
    monkeypatch.setattr(azstoragetorch._samples.manifest, "_COLLECTED", collected)
    urls = [filled.blob_url(name) for name in NAMES]
    url = make(filled)
    for epoch in (0, 1):
        plain = IterableBlobDataset.from_blob_urls(urls, credential=filled.key, transfer=QUICK, shuffle=True, seed=3)
        mine = dataset_of(filled, url, shuffle=True, seed=3)
        for each in (plain, mine):
            each.set_epoch(epoch)
        assert names_in(mine) == names_in(plain)


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("context", ["fork", pytest.param("spawn", marks=pytest.mark.exhaustive)])
def test_workers_and_ranks_divide_the_rows(filled: Container, shuffle: bool, context: str) -> None:
    url = make(filled)
    seen = []
    for rank in range(2):
        dataset = dataset_of(filled, url, shuffle=shuffle, shard_by="rank_and_worker", rank=rank, world_size=2)
        seen += names_in(DataLoader(dataset, batch_size=None, num_workers=2, multiprocessing_context=context))
        if context == "spawn":
            break  # half of them is as good
    assert len(seen) == len(set(seen)) == (len(NAMES) if context == "fork" else 11)


@pytest.mark.parametrize("shuffle", [False, True])
def test_resuming_is_exact_at_any_point(filled: Container, shuffle: bool) -> None:
    url = make(filled)
    whole = names_in(dataset_of(filled, url, shuffle=shuffle))
    for stop in (0, 1, 4, 13, len(NAMES)):
        dataset = dataset_of(filled, url, shuffle=shuffle)
        samples = iter(dataset)
        begun = [next(samples)["data"].decode() for _ in range(stop)]
        state = json.loads(json.dumps(dataset.state_dict()))
        resumed = dataset_of(filled, url, shuffle=shuffle)
        resumed.load_state_dict(state)
        assert begun + names_in(resumed) == whole


def test_a_job_resumes_with_another_number_of_ranks(filled: Container) -> None:
    url = make(filled)

    def of(rank: int, ranks: int) -> IterableBlobDataset[Any]:
        return dataset_of(filled, url, shuffle=True, shard_by="rank_and_worker", rank=rank, world_size=ranks)

    seen, states = [], []
    for rank in range(3):
        dataset = of(rank, 3)
        samples = iter(dataset)
        seen += [next(samples)["data"].decode() for _ in range(2 + rank)]
        states.append(dataset.state_dict())
    for rank in range(2):
        dataset = of(rank, 2)
        dataset.load_state_dict(merge_states(states))
        seen += names_in(dataset)
    assert sorted(seen) == NAMES


def test_another_manifest_does_not_resume(filled: Container) -> None:
    url = make(filled, prefix="train/")
    dataset = dataset_of(filled, url)
    next(iter(dataset))
    state = dataset.state_dict()
    filled.put("train/later", b"later")
    changed = dataset_of(filled, make(filled, folder="new", prefix="train/"))
    changed.load_state_dict(state)
    with pytest.raises(ValueError, match="the listing has changed"):
        iter(changed)


def test_a_blob_that_was_overwritten_is_an_error_or_read_by_choice(filled: Container, tmp_path: Path) -> None:
    url = make(filled)
    filled.put(NAMES[3], b"new")
    with pytest.raises(BlobChangedError, match=r"overwritten after it was listed.*if_changed='read'"):
        list(dataset_of(filled, url))
    for cache in (None, tmp_path / "cache"):
        mapped = BlobDataset.from_manifest(url, credential=filled.key, transfer=QUICK, cache_dir=cache)
        assert mapped[2]["data"].decode() == NAMES[2]
        with pytest.raises(BlobChangedError, match="overwritten after"):
            mapped[3]
        blob = BlobDataset.from_manifest(
            url, credential=filled.key, transfer=QUICK, cache_dir=cache, transform=lambda blob: blob
        )[3]
        with pytest.raises(BlobChangedError, match="overwritten after"):
            blob.reader().read()
    assert len(list(dataset_of(filled, url, on_error="skip"))) == len(NAMES) - 1
    now = names_in(dataset_of(filled, url, if_changed="read"))
    assert now == [*NAMES[:3], "new", *NAMES[4:]]
    with pytest.raises(ValueError, match="if_changed must be"):
        dataset_of(filled, url, if_changed="skip")


def test_rows_are_read_when_they_are_needed(filled: Container, monkeypatch: pytest.MonkeyPatch) -> None:
    """In order: a part when its first row is needed. Shuffled: each part once for a whole share."""
    loaded: list[int] = []
    load = Manifest._fetch

    def note(self: Manifest, number: int, *rest: Any) -> Any:
        loaded.append(number)
        return load(self, number, *rest)

    monkeypatch.setattr(Manifest, "_fetch", note)
    url = make(filled)
    quick = replace(QUICK, max_connections=1, max_concurrency=1)
    dataset = IterableBlobDataset.from_manifest(url, credential=filled.key, transfer=quick)
    assert loaded == []
    samples = iter(dataset)
    next(samples)
    assert loaded == [0]
    list(samples)
    assert loaded == [0, 1, 2, 3, 4, 5]
    loaded.clear()
    names_in(dataset_of(filled, url, shuffle=True))
    assert sorted(loaded) == [0, 1, 2, 3, 4, 5]
    loaded.clear()
    manifest = opened(filled, url)
    monkeypatch.setattr(azstoragetorch._samples.manifest, "_KEPT", manifest._part(0).nbytes + manifest._part(4).nbytes)
    loaded.clear()
    manifest._parts.clear()
    assert [manifest.row(row).name for row in (20, 19, 3, 18, 2)] == [NAMES[row] for row in (20, 19, 3, 18, 2)]
    assert loaded == [5, 4, 0]
    assert list(manifest._parts) == [4, 0]  # what was used last


def test_reading_takes_little_memory_and_no_pandas(tmp_path: Path) -> None:
    """A part of 65,536 rows at a time, of which a rank takes one in 64; importing pandas would cost 30 MiB."""
    from azstoragetorch._samples.rows import PART_ROWS

    names = [f"train/shard-{row // 1000:05d}/image-{row:09d}.jpg" for row in range(PART_ROWS)]
    etags = [f'"0x8DC{row * 0x9E3779B97F4A7C15 % (1 << 48):012X}"' for row in range(PART_ROWS)]
    data, rows = encode((names, list(range(PART_ROWS)), [None, *etags[1:]]), "here")
    (tmp_path / "part").write_bytes(data)
    program = (
        "import sys; from array import array\n"
        "from azstoragetorch._samples.parquet import decode, ranks_of\n"
        "def memory():\n"
        "    status = open('/proc/self/status').read()\n"
        "    return int(status.partition('RssAnon:')[2].split()[0]) / 1024\n"
        "data, before, most = open(sys.argv[1], 'rb').read(), memory(), 0\n"
        "for _ in range(8):\n"
        f"    part = decode(data, rows={PART_ROWS}, digest=sys.argv[2], where='here')\n"
        "    ordered, ranks = ranks_of(array('Q', range(65535, 0, -64)))\n"
        "    names, sizes, etags = part.take(array('H', ordered))\n"
        "    most = max(most, memory() - before)\n"
        "print(sizes[0], etags[0], ranks[0], 'pandas' in sys.modules, most)\n"
    )
    size, etag, rank, has_pandas, most = run_python(program, str(tmp_path / "part"), rows.digest).split()
    assert (size, etag, rank, has_pandas) == ("63", etags[63], "1023", "False")
    assert float(most) < 40


# -- pipes and nodes ---------------------------------------------------------------------------------------------------


def pipe_of(container: Container, url: str, **options: Any) -> AzureBlobManifestLister:
    return AzureBlobManifestLister(url, credential=container.key, transfer=QUICK, **options)


def test_a_pipe_yields_what_the_manifest_lists(filled: Container) -> None:
    url = make(filled)
    lister = pipe_of(filled, url)
    expected = list(AzureBlobInfoLister(filled.url, credential=filled.key))
    found = list(lister)
    assert [tuple(blob) for blob in found] == sorted(
        (tuple(blob) for blob in expected if "/manifests/" not in blob.url),
        key=lambda blob: NAMES.index(name_at(blob[0])),
    )
    assert len(lister) == len(NAMES)
    assert pickle.loads(pickle.dumps(found)) == found
    assert type(pickle.loads(pickle.dumps(found[0]))) is ManifestBlob
    read = lister.sharding_filter().read_files_by_azure(credential=filled.key, transfer=QUICK)
    samples = list(DataLoader(read, batch_size=None, num_workers=2))
    assert sorted(data.decode() for _, data in samples) == NAMES


def name_at(url: str) -> str:
    return parse_url(url).blob


@pytest.mark.parametrize("reader", ["read_files_by_azure", "load_files_by_azure", "open_files_by_azure"])
def test_readers_refuse_a_blob_that_was_overwritten(filled: Container, reader: str) -> None:
    url = make(filled)
    filled.put(NAMES[3], b"new")
    for if_changed in ("raise", "read"):
        lister = pipe_of(filled, url, if_changed=if_changed)
        samples = iter(getattr(lister, reader)(credential=filled.key, transfer=QUICK))
        for _ in range(3):
            next(samples)
        if if_changed == "read":
            next(samples)
        else:
            with pytest.raises(BlobChangedError, match="overwritten after it was listed"):
                next(samples)


def test_an_empty_blob_is_read(container: Container, small_parts: int) -> None:
    """The response to a request for its first part has no ETag."""
    container.put("empty", b"")
    container.put("full", b"1")
    url = make(container)
    read = pipe_of(container, url).read_files_by_azure(credential=container.key, transfer=QUICK)
    assert [data for _, data in read] == [b"", b"1"]
    assert names_in(dataset_of(container, url)) == ["", "1"]
    container.put("full", b"")
    with pytest.raises(BlobChangedError, match="overwritten after it was listed"):
        list(dataset_of(container, url))


def test_a_large_blob_that_was_overwritten_is_refused(container: Container, small_parts: int) -> None:
    """Its parts are requested at once, and the first of them shows the version."""
    container.put("train/0", bytes(300_000))
    url = make(container)
    container.put("train/0", bytes(299_999))
    read = pipe_of(container, url).read_files_by_azure(credential=container.key, transfer=QUICK)
    with pytest.raises(BlobChangedError, match="overwritten after it was listed"):
        list(read)


def test_a_resumable_pipe_on_a_manifest(filled: Container) -> None:
    def graph() -> Any:
        lister = pipe_of(filled, url)
        shuffled = lister.shuffle(buffer_size=5).sharding_filter()
        return shuffled.read_files_by_azure(credential=filled.key, transfer=QUICK).to_resumable(seed=2)

    url = make(filled)
    whole = [data for _, data in graph()]
    begun = graph()
    samples = iter(begun)
    first = [next(samples)[1] for _ in range(9)]
    resumed = graph()
    resumed.load_state_dict(json.loads(json.dumps(begun.state_dict())))
    assert first + [data for _, data in resumed] == whole
    assert sorted(data.decode() for data in whole) == NAMES


def test_a_node_resumes_at_its_row(filled: Container, monkeypatch: pytest.MonkeyPatch) -> None:
    url = make(filled)

    def graph(url: str = url) -> Any:
        lister = BlobManifestLister(url, credential=filled.key, transfer=QUICK)
        return BlobReader(BlobSharder(lister, 1, 2), credential=filled.key, transfer=QUICK)

    whole = [data.decode() for _, data in Loader(graph())]
    assert whole == NAMES[1::2]
    loaded: list[int] = []
    load = Manifest._fetch
    monkeypatch.setattr(Manifest, "_fetch", lambda self, number, *rest: (loaded.append(number), load(self, number))[1])
    for stop in (1, 4, len(whole) - 1):
        begun = Loader(graph())
        samples = iter(begun)
        first = [next(samples)[1].decode() for _ in range(stop)]
        state = json.loads(json.dumps(begun.state_dict()))
        loaded.clear()
        resumed = Loader(graph())
        resumed.load_state_dict(state)
        assert first + [data.decode() for _, data in resumed] == whole
        assert 0 not in loaded or stop == 1  # parts before the position are not read
    filled.put("train/later", b"")
    other = Loader(graph(make(filled, folder="new")))
    other.load_state_dict(state)
    with pytest.raises(ValueError, match="the state is of another manifest"):
        next(iter(other))


def test_a_node_goes_on_after_an_error(filled: Container) -> None:
    url = make(filled)
    name = next(name for name in filled.names() if name.endswith("00001.parquet"))
    whole = filled.get(name)
    filled.put(name, whole[:-1])
    node = BlobManifestLister(url, credential=filled.key, transfer=QUICK)
    node.reset()
    begun = [name_at(next(node).url) for _ in range(4)]
    with pytest.raises(ManifestError, match="truncated"):
        next(node)
    filled.put(name, whole)
    assert begun + [name_at(blob.url) for blob in node] == NAMES


# -- comparing ---------------------------------------------------------------------------------------------------------


def test_a_manifest_is_compared_with_its_container_and_with_another(filled: Container) -> None:
    url = make(filled, prefix="train/")
    assert compare_manifest(url, credential=filled.key).is_equal
    filled.put("train/001", b"new")
    filled.put("train/later", b"later")
    filled.client.delete_blob("train/002")
    other = make(filled, folder="new", prefix="train/")
    for found in (compare_manifest(url, credential=filled.key), compare_manifest(url, other, credential=filled.key)):
        assert (found.added, found.removed, found.changed) == (1, 1, 1)
        assert found.changes == (
            ManifestChange("changed", "train/001"),
            ManifestChange("removed", "train/002"),
            ManifestChange("added", "train/later"),
        )
    assert compare_manifest(url, at_most=1, credential=filled.key).changes == found.changes[:1]
    back = compare_manifest(other, url, credential=filled.key)
    assert (back.added, back.removed, back.changed) == (1, 1, 1)


def test_nothing_else_imports_pyarrow() -> None:
    program = (
        "import sys; import azstoragetorch.datasets, azstoragetorch.datapipes, azstoragetorch.nodes, "
        "azstoragetorch.manifest; print('pyarrow' in sys.modules)\n"
        "sys.modules['pyarrow'] = None\n"
        "try: azstoragetorch.manifest.make_manifest('https://a.blob.core.windows.net/c', "
        "'https://a.blob.core.windows.net/c/m')\nexcept ImportError as error: print(error)"
    )
    found = run_python(program).splitlines()
    assert found[0] == "False"
    assert "pip install pyarrow" in found[1]
