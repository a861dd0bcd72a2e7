"""WebDataset itself reads shards from blobs, and writes them, by URLs of all forms."""

from __future__ import annotations

import io
import tarfile
from functools import partial
from typing import Any

import pytest
import torch
from azure.core.exceptions import ResourceNotFoundError
from torch.utils.data import DataLoader

from azstoragetorch import TransferConfig
from tests.azurite.container import Container

wds = pytest.importorskip("webdataset", reason="it is not installed; `make frameworks` installs it")
from azstoragetorch import webdataset as ours  # noqa: E402

pytestmark = [pytest.mark.frameworks, pytest.mark.timeout(600), pytest.mark.filterwarnings("ignore")]


@pytest.fixture(autouse=True)
def _schemes(monkeypatch: pytest.MonkeyPatch) -> None:
    """WebDataset's table of schemes is as it was after each test."""
    for scheme in (*ours._OURS, *ours._SHARED):
        if scheme in wds.gopen_schemes:
            monkeypatch.setitem(wds.gopen_schemes, scheme, wds.gopen_schemes[scheme])
        else:
            monkeypatch.delitem(wds.gopen_schemes, scheme, raising=False)


def shard(*numbers: int) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for number in numbers:
            data = str(number).encode()
            member = tarfile.TarInfo(f"{number:06}.cls")
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return file.getvalue()


def classes(urls: Any, **options: Any) -> list[int]:
    return [sample["cls"] for sample in wds.WebDataset(urls, shardshuffle=False, **options).decode()]


def test_shards_are_read_in_order(container: Container) -> None:
    ours.register(credential=container.key)
    for number in range(3):
        container.put(f"train-{number:03}.tar", shard(2 * number, 2 * number + 1))
    assert classes(f"{container.url}/train-{{000..002}}.tar") == list(range(6))
    assert classes([f"{container.url}/train-{n:03}.tar?{container.sas()}" for n in (2, 0)]) == [4, 5, 0, 1]


def test_az_urls(container: Container, monkeypatch: pytest.MonkeyPatch) -> None:
    """The opener for the schemes that have no other."""
    opened: list[tuple[str, str]] = []
    ours.register(credential=container.key)
    container.put("a.tar", shard(1))
    clients = wds.gopen_schemes["az"]._clients
    stock = clients.blob
    monkeypatch.setattr(clients, "blob", lambda url: opened.append(("az", url)) or stock(f"{container.url}/a.tar"))
    assert classes("az://account.blob.core.windows.net/c/a.tar") == [1]
    assert opened == [("az", "az://account.blob.core.windows.net/c/a.tar")]
    assert {type(wds.gopen_schemes[scheme]) for scheme in ours._OURS} == {ours._Opener}


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_workers(container: Container, method: str) -> None:
    for number in range(4):
        container.put(f"train-{number:03}.tar", shard(number))
    ours.register(credential=container.key)
    dataset = wds.WebDataset(f"{container.url}/train-{{000..003}}.tar", shardshuffle=False).decode().to_tuple("cls")
    again = partial(ours.register, credential=container.key) if method == "spawn" else None
    loader = DataLoader(
        dataset,
        batch_size=None,
        num_workers=2,
        multiprocessing_context=method,
        worker_init_fn=again,  # type: ignore[arg-type]
    )
    assert sorted(int(sample[0]) for sample in loader) == [0, 1, 2, 3]


def test_shards_are_written(container: Container) -> None:
    ours.register(credential=container.key)
    with wds.ShardWriter(f"{container.url}/out-%03d.tar", maxcount=2, verbose=0) as writer:
        for number in range(5):
            writer.write({"__key__": f"{number:06}", "cls": number, "pth": torch.full((2,), number)})
    assert container.names() == ["out-000.tar", "out-001.tar", "out-002.tar"]
    assert classes(f"{container.url}/out-{{000..002}}.tar") == list(range(5))


def test_a_shard_that_is_not_finished_is_not_written(container: Container) -> None:
    ours.register(credential=container.key)
    container.put("out.tar", b"before")
    with pytest.raises(OSError, match="the disk is on fire"), wds.TarWriter(f"{container.url}/out.tar") as writer:
        writer.write({"__key__": "1", "cls": 1})
        raise OSError("the disk is on fire")
    assert container.get("out.tar") == b"before"


def test_other_web_servers_are_webdatasets_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """They get no credential."""
    stock = wds.gopen_schemes["https"]
    monkeypatch.setitem(wds.gopen_schemes, "https", lambda url, *_, **__: f"WebDataset's own: {url}")
    ours.register(transfer=TransferConfig(trusted_hosts=["trusted.example"]))
    ours.register(transfer=TransferConfig(trusted_hosts=["trusted.example"]))
    url = "https://elsewhere.example/c/a.tar"
    assert wds.gopen(url) == f"WebDataset's own: {url}"
    assert type(wds.gopen("https://trusted.example/c/a.tar")).__name__ == "BlobIO"
    assert type(wds.gopen("https://elsewhere.example/c/a.tar?sv=1&sig=x")).__name__ == "BlobIO"
    assert stock is not wds.gopen_schemes["https"]


def test_an_unknown_host_gets_no_credential(container: Container) -> None:
    ours.register(credential=container.key)
    with pytest.raises(ValueError, match=r"not sent to the host 'elsewhere.example'"):
        wds.gopen("abfss://c@elsewhere.example/a.tar").read()


def test_errors_are_passed_on(container: Container) -> None:
    ours.register(credential=container.key)
    with pytest.raises(ResourceNotFoundError, match=r"missing.tar"):
        classes(f"{container.url}/missing.tar")
    with pytest.raises(TypeError, match="credential must be"):
        ours.register(credential="sv=1&sig=x")  # type: ignore[arg-type]
