"""litdata itself streams a dataset from blobs."""

from __future__ import annotations

import asyncio
import io
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from azure.core.exceptions import ResourceNotFoundError

from azstoragetorch import metrics
from tests.azurite.container import Container

litdata = pytest.importorskip("litdata", reason="it is not installed; `make frameworks` installs it")
from litdata.streaming.cache import Cache, Dir  # noqa: E402
from litdata.streaming.downloader import AzureDownloader, get_downloader, register_downloader  # noqa: E402

from azstoragetorch.litdata import BlobDownloader, register  # noqa: E402

pytestmark = [pytest.mark.frameworks, pytest.mark.timeout(600), pytest.mark.filterwarnings("ignore")]


@pytest.fixture(autouse=True)
def _registered() -> Any:
    register()
    yield
    register_downloader("azure://", AzureDownloader, overwrite=True)


@pytest.fixture
def dataset(container: Container, tmp_path: Path) -> dict[str, Any]:
    """100 samples in chunks of 10, in the container; what `StreamingDataset` is called with."""
    cache = Cache(str(tmp_path / "made"), chunk_size=10)
    for number in range(100):
        cache[number] = {"number": number, "data": torch.full((20,), number)}
    cache.done()
    cache.merge()
    for path in (tmp_path / "made").iterdir():
        if path.suffix in (".bin", ".json"):
            container.put(f"data/train/{path.name}", path.read_bytes())
    options = {"account_url": container.service.account_url, "credential": container.key}
    place = Dir(path=str(tmp_path / "cache"), url=f"azure://{container.name}/data/train")
    (tmp_path / "cache").mkdir()
    return {"input_dir": place, "storage_options": options}


def check(samples: list[Any]) -> None:
    assert [int(sample["number"]) for sample in samples] == list(range(100))
    assert all(torch.equal(sample["data"], torch.full((20,), number)) for number, sample in enumerate(samples))


def test_a_dataset_is_streamed(dataset: dict[str, Any]) -> None:
    before = metrics()
    stream = litdata.StreamingDataset(**dataset, shuffle=False)
    assert len(stream) == 100
    check(list(stream))
    assert (metrics() - before).requests >= 11  # of this package: the index and ten chunks


def test_a_url_as_it_is(container: Container, dataset: dict[str, Any], tmp_path: Path) -> None:
    place = Dir(path=str(tmp_path / "cache"), url=container.blob_url("data/train"))
    check(list(litdata.StreamingDataset(place, storage_options={"credential": container.sas_credential})))


def test_workers_stream_it(dataset: dict[str, Any]) -> None:
    stream = litdata.StreamingDataset(**dataset, shuffle=False)
    loader = litdata.StreamingDataLoader(stream, num_workers=2, batch_size=5)
    numbers = [int(n) for batch in loader for n in batch["number"]]
    assert sorted(numbers) == list(range(100))


@pytest.fixture
def downloader(container: Container, tmp_path: Path) -> BlobDownloader:
    container.put("data/chunk-0-0.bin", bytes(range(256)) * 4000)
    options = {"account_url": f"{container.service.account_url}/", "credential": container.key}
    found = get_downloader(f"azure://{container.name}/data", str(tmp_path), [{"filename": "chunk-0-0.bin"}], options)
    assert type(found) is BlobDownloader
    return found


def test_every_way_of_reading_a_chunk(container: Container, downloader: BlobDownloader, tmp_path: Path) -> None:
    remote, content = f"azure://{container.name}/data/chunk-0-0.bin", bytes(range(256)) * 4000
    downloader.download_chunk_from_index(0)
    assert (tmp_path / "chunk-0-0.bin").read_bytes() == content
    before = metrics()
    assert downloader.download_chunk_bytes_from_index(0, 1000, 3000) == content[1000:4000]
    assert downloader.download_bytes(remote, 5, 0, "") == b""
    assert ((metrics() - before).requests, (metrics() - before).bytes_received) == (1, 3000)
    file = io.BytesIO()
    downloader.download_fileobj(remote, file)
    assert file.getvalue() == content
    assert asyncio.run(downloader.adownload_fileobj(remote)) == content
    assert asyncio.run(downloader.adownload_bytes(remote, 1000, 3000, "")) == content[1000:4000]
    asyncio.run(downloader.adownload_file(remote, str(tmp_path / "other")))
    assert (tmp_path / "other").read_bytes() == content


def test_a_file_that_is_here_or_in_progress_is_left_alone(
    container: Container, downloader: BlobDownloader, tmp_path: Path
) -> None:
    from filelock import FileLock

    remote = f"azure://{container.name}/data/chunk-0-0.bin"
    (tmp_path / "here").write_bytes(b"here")
    downloader.download_file(remote, str(tmp_path / "here"))
    assert (tmp_path / "here").read_bytes() == b"here"
    with FileLock(str(tmp_path / "taken.lock")):
        downloader.download_file(remote, str(tmp_path / "taken"))
    assert not (tmp_path / "taken").exists()


def test_a_failed_download_leaves_no_file(container: Container, downloader: BlobDownloader, tmp_path: Path) -> None:
    with pytest.raises(ResourceNotFoundError, match=r"missing.bin"):
        downloader.download_file(f"azure://{container.name}/data/missing.bin", str(tmp_path / "chunk"))
    assert [path.name for path in tmp_path.iterdir() if path.suffix != ".lock"] == []


def test_a_worker_process_gets_it(container: Container, downloader: BlobDownloader, tmp_path: Path) -> None:
    found = pickle.loads(pickle.dumps(downloader))
    assert type(found) is BlobDownloader
    assert b"Eby8" not in pickle.dumps(downloader)


@pytest.mark.parametrize(
    ("url", "blob"),
    [
        ("azure://account.blob.core.windows.net/c/d", "https://account.blob.core.windows.net/c/d/x"),
        ("azure://c/d", "https://fromenv.blob.core.windows.net/c/d/x"),
        ("az://c/d", "https://fromenv.blob.core.windows.net/c/d/x"),
        ("https://account.blob.core.windows.net/c/d", "https://account.blob.core.windows.net/c/d/x"),
        ("abfss://c@account.dfs.core.windows.net/d", "https://account.blob.core.windows.net/c/d/x"),
    ],
)
def test_urls(url: str, blob: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_NAME", "fromenv")
    found = get_downloader(url, str(tmp_path), [], {"credential": False})
    assert type(found) is BlobDownloader
    assert str(found._client(f"{url}/x").url) == blob


def test_unknown_options_are_refused(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="storage_options has 'key', which azstoragetorch does not know: expected acc"):
        get_downloader("azure://c/d", str(tmp_path), [], {"key": "secret"})
    with pytest.raises(TypeError, match="credential must be"):
        get_downloader("azure://c/d", str(tmp_path), [], {"credential": "key"})
