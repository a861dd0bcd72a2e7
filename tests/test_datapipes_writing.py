"""The pipes that write: complete blobs or none."""

from __future__ import annotations

import array
import functools
import io
import tarfile
from typing import Any

import pytest
from azure.core.exceptions import ResourceExistsError
from torch.utils.data import DataLoader

import azstoragetorch.datapipes  # noqa: F401 - registers the functional names
from azstoragetorch import TransferConfig
from azstoragetorch.datapipes._base import IterableWrapper
from azstoragetorch.exceptions import FatalBlobIOWriteError
from tests.azurite.container import Container
from tests.faults import FaultService, Match, Status, Together

KiB = 1 << 10
SMALL = TransferConfig(block_size=64 * KiB, memory_limit=1 << 20, max_attempts=2, max_backoff=0.01)


def in_folder(name: str, folder: str) -> str:
    return f"{folder}/{name}"


def test_it_writes_each_blob_and_yields_its_url_in_order(container: Container) -> None:
    data: list[Any] = [b"", b"bytes", bytearray(b"array"), memoryview(b"view"), array.array("i", [1, 2])]
    data += [b"x" * 200_000, io.BytesIO(b"stream"), io.BytesIO(b"y" * 200_000)]
    items = [(f"{container.url}/{number:02d}", value) for number, value in enumerate(data)]
    pipe = IterableWrapper(items, deepcopy=False).save_by_azure(credential=container.key, transfer=SMALL)
    assert len(pipe) == len(items)
    assert list(pipe) == [url for url, _ in items]
    stored = [container.get(name) for name in container.names()]
    assert stored == [v.getvalue() if isinstance(v, io.BytesIO) else memoryview(v).tobytes() for v in data]


def test_filepath_fn_makes_the_url(container: Container) -> None:
    """Also in workers, and from one pipe to another without copying a blob in memory."""
    container.put("in/a", b"1")
    container.put("in/b", b"2" * 100_000)
    listed = IterableWrapper([f"{container.url}/in/"]).list_files_by_azure(credential=container.key)
    opened = listed.sharding_filter().open_files_by_azure(credential=container.key)
    named = functools.partial(copy_name, container_url=container.url)
    saved = opened.save_by_azure(named, credential=container.key)
    urls = sorted(DataLoader(saved, num_workers=2, batch_size=None))
    assert urls == [container.blob_url("out/a"), container.blob_url("out/b")]
    assert container.get("out/b") == b"2" * 100_000


def copy_name(url: str, container_url: str) -> str:
    return f"{container_url}/out/{url.rpartition('/')[2]}"


@pytest.mark.parametrize("make", [bytes, io.BytesIO])
def test_without_overwrite_a_blob_that_is_there_stays(container: Container, make: Any) -> None:
    container.put("a", b"old")
    pipe = IterableWrapper([(container.blob_url("a"), make(b"new"))], deepcopy=False)
    with pytest.raises(ResourceExistsError, match=f"{container.name}/a"):
        list(pipe.save_by_azure(overwrite=False, credential=container.key))
    assert container.get("a") == b"old"
    assert list(pipe.save_by_azure(credential=container.key)) == [container.blob_url("a")]


@pytest.mark.parametrize("data", ["text", 7, None, {"a": 1}, io.StringIO("text" * 100_000)])
def test_items_that_are_not_bytes_are_an_error_that_names_the_url(container: Container, data: Any) -> None:
    container.put("a", b"old")
    items = [(container.blob_url("0"), b"first"), (container.blob_url("a"), data)]
    saved = iter(IterableWrapper(items, deepcopy=False).save_by_azure(credential=container.key, transfer=SMALL))
    assert next(saved) == items[0][0]
    with pytest.raises(TypeError, match=container.blob_url("a")):
        next(saved)
    assert container.get("a") == b"old"


@pytest.mark.parametrize("item", ["https://h/a/c/b?sig=secret", ("https://h/a/c/b",), None])
def test_an_item_that_is_not_a_pair_is_refused(item: Any) -> None:
    """For example URLs directly from a lister."""
    for pipe in ("save_by_azure", "expand_blob_tar", "group_blob_samples"):
        with pytest.raises(TypeError, match=r"expected \((name|url|path), .*, not ('https://h/a/c/b'|tuple|NoneType)"):
            list(getattr(IterableWrapper([item]), pipe)())


class Breaking(io.RawIOBase):
    def __init__(self) -> None:
        self.reads = 0

    def read(self, size: int = -1) -> bytes:
        self.reads += 1
        if self.reads > 3:
            raise OSError("the source broke")
        return b"x" * 100_000


def test_a_source_that_breaks_leaves_no_partial_blob(container: Container) -> None:
    container.put("a", b"old")
    items = [(container.blob_url("a"), Breaking()), (container.blob_url("b"), b"")]
    with pytest.raises(OSError, match="the source broke"):
        list(IterableWrapper(items, deepcopy=False).save_by_azure(credential=container.key, transfer=SMALL))
    assert container.get("a") == b"old"
    assert container.names() == ["a"]


def test_a_service_that_refuses_leaves_no_partial_blob(fault_service: FaultService) -> None:
    fault_service.create_container("data")
    fault_service.script(Match("put_block_list"), [Status(403)], repeat=True)
    items = [(fault_service.blob_url("data", "a"), b"x" * 200_000)]
    with pytest.raises(FatalBlobIOWriteError, match="data/a"):
        list(IterableWrapper(items).save_by_azure(credential=False, transfer=SMALL))
    assert not fault_service.exists("data", "a")


def test_many_are_written_at_once(fault_service: FaultService) -> None:
    fault_service.create_container("data")
    fault_service.script("put_blob", [Together(9)], repeat=True)
    items = [(fault_service.blob_url("data", f"{number:03d}"), b"x") for number in range(60)]
    urls = list(IterableWrapper(items).save_by_azure(credential=False))
    assert urls == [url for url, _ in items]
    assert fault_service.names("data") == [f"{number:03d}" for number in range(60)]
    assert fault_service.peak_active > 8


def test_a_snapshot_cannot_be_written(container: Container) -> None:
    url = f"{container.blob_url('a')}?snapshot=2024-01-01T00:00:00.0000000Z"
    with pytest.raises(ValueError, match="cannot be written"):
        list(IterableWrapper([(url, b"x")]).save_by_azure(credential=container.key))


# -- tar shards --------------------------------------------------------------------------------------------------------

SAMPLES = [
    {
        "__key__": f"k/{number:03d}",
        "__url__": "from",
        "bin": bytes([number]) * (number * 37 % 3000),
        "txt": f"ä{number}",
    }
    for number in range(50)
]


def test_samples_are_packed_into_tars_of_bounded_size(container: Container) -> None:
    """Other tar programs read them; no sample is split; a sample that is too large gets a separate tar."""
    large = [*SAMPLES[:20], {"__key__": "large", "bin": b"x" * 50_000}, *SAMPLES[20:]]
    pipe = IterableWrapper(large).write_blob_tar_shards(
        f"{container.url}/out-{{shard:03d}}.tar", max_size=20_000, credential=container.key, transfer=SMALL
    )
    urls = list(pipe)
    assert [url.rpartition("/")[2] for url in urls] == container.names()
    assert len(urls) > 5
    found: list[tuple[str, bytes]] = []
    for name in container.names():
        packed = container.get(name)
        with tarfile.open(fileobj=io.BytesIO(packed)) as tar:
            files = [(info.name, tar.extractfile(info).read()) for info in tar]  # type: ignore[union-attr]
        assert len(packed) <= 20_000 or [file for file, _ in files] == ["large.bin"]
        assert files[0][0].endswith(".bin")
        found += files
    expected = [
        (f"{sample['__key__']}.{name}", value.encode() if isinstance(value, str) else value)
        for sample in large
        for name, value in sample.items()
        if not name.startswith("__")
    ]
    assert found == expected
    once_more = [container.get(name) for name in container.names()]
    list(pipe)
    assert [container.get(name) for name in container.names()] == once_more


def test_what_was_packed_comes_back(container: Container) -> None:
    pattern = f"{container.url}/out-{{worker}}-{{shard:03d}}.tar"
    samples = IterableWrapper(SAMPLES).sharding_filter()
    packed = samples.write_blob_tar_shards(pattern, max_count=10, credential=container.key)
    urls = list(DataLoader(packed, num_workers=2, batch_size=None))
    assert len(set(urls)) == 6
    read = IterableWrapper(urls).open_files_by_azure(credential=container.key).expand_blob_tar().group_blob_samples()
    back = sorted(({**sample, "__url__": "from"} for sample in read), key=lambda sample: sample["__key__"])
    assert back == [{**sample, "txt": sample["txt"].encode()} for sample in SAMPLES]  # type: ignore[attr-defined]


def test_an_error_in_a_worker_keeps_its_type_and_url(container: Container) -> None:
    pipe = IterableWrapper([(container.blob_url("a"), 7)]).save_by_azure(credential=container.key)
    with pytest.raises(TypeError, match=container.blob_url("a")):
        list(DataLoader(pipe, num_workers=1, batch_size=None))


@pytest.mark.slow  # torch waits 5 s for each worker of a failed iterator
def test_workers_do_not_overwrite_each_others_tars(fault_service: FaultService) -> None:
    pipe = IterableWrapper(SAMPLES).sharding_filter()
    packed = pipe.write_blob_tar_shards(f"{fault_service.container_url('data')}/{{shard}}.tar", credential=False)
    with pytest.raises(ValueError, match=r"must hold \{worker\}"):
        list(DataLoader(packed, num_workers=2, batch_size=None))


@pytest.mark.parametrize(
    ("sample", "error", "match"),
    [
        ({"__key__": "a", "bin": 7}, TypeError, r"0\.tar/a\.bin"),
        ({"bin": b""}, ValueError, r"0\.tar: .*__key__"),
        ({"__key__": "a", "__url__": "x"}, ValueError, r"0\.tar: the sample 'a' has no data"),
        (b"bytes", ValueError, r"0\.tar: .*__key__"),
        ({"__key__": "a", 0: b""}, TypeError, r"0\.tar: the sample 'a' has the extension 0"),
        ({"__key__": "a.1", "bin": b""}, ValueError, r"0\.tar: 'a\.1\.bin' would not come back"),
        ({"__key__": "a/", "bin": b""}, ValueError, r"0\.tar: 'a/\.bin' would not come back"),
        ({"__key__": "a", "x/bin": b""}, ValueError, r"0\.tar: 'a\.x/bin' would not come back"),
    ],
)
def test_a_sample_that_cannot_be_packed_leaves_no_partial_tar(
    container: Container, sample: Any, error: type[Exception], match: str
) -> None:
    samples = [{"__key__": "fine", "bin": b"x" * 100_000}, sample]
    pipe = IterableWrapper(samples).write_blob_tar_shards(
        f"{container.url}/{{shard}}.tar", credential=container.key, transfer=SMALL
    )
    with pytest.raises(error, match=match):
        list(pipe)
    assert container.names() == []


@pytest.mark.parametrize(
    ("pattern", "options"),
    [
        ("https://account.blob.core.windows.net/c/a.tar", {}),
        ("https://account.blob.core.windows.net/c/{shard}-{rank}.tar", {}),
        ("no url {shard}", {}),
        ("https://account.blob.core.windows.net/c/{shard}.tar", {"max_size": 0}),
        ("https://account.blob.core.windows.net/c/{shard}.tar", {"max_count": 0}),
    ],
)
def test_wrong_arguments_fail_at_once(pattern: str, options: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=r"url_pattern|max_|blob_url"):
        IterableWrapper([]).write_blob_tar_shards(pattern, **options)
