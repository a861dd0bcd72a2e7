"""Ray itself lists, reads, and writes blobs, and keeps checkpoints in them, on a local cluster of two CPUs."""

from __future__ import annotations

import io
import os
import pickle
import signal
import tarfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from azure.core.exceptions import ResourceExistsError, ResourceNotFoundError

import azstoragetorch
from azstoragetorch.datapipes import AzureBlobInfoLister, AzureBlobManifestLister, BlobInfo
from azstoragetorch.manifest import make_manifest
from tests.azurite.container import Container

ray = pytest.importorskip("ray", reason="it is not installed; `make ray` installs it")
import azstoragetorch.ray as ours  # noqa: E402
from azstoragetorch.exceptions import AZStorageTorchError, BlobChangedError  # noqa: E402
from azstoragetorch.ray import _writing  # noqa: E402
from azstoragetorch.ray._reading import balance  # noqa: E402

ROOT = Path(__file__).parents[2]

pytestmark = [pytest.mark.frameworks, pytest.mark.timeout(600), pytest.mark.filterwarnings("ignore")]


@pytest.fixture(scope="module", autouse=True)
def _cluster() -> Iterator[None]:
    """One cluster for all tests, with two workers of one CPU. It gets no credential from the environment."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(ROOT))
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("RAY_DATA_DISABLE_PROGRESS_BARS", "1")
        ray.init(num_cpus=2, include_dashboard=False, object_store_memory=200 << 20, log_to_driver=False)
        yield
        ray.shutdown()


def fill(container: Container, count: int, folders: int = 4) -> dict[str, bytes]:
    """*count* blobs in *folders*; their content by name."""
    content = {f"data/{number % folders}/{number:03}.bin": b"%d" % number * (number + 1) for number in range(count)}
    for name, data in content.items():
        container.put(name, data)
    return content


def shared(container: Container, kind: str) -> dict[str, Any]:
    """The URL of the folder ``data`` and its credential, of the given kind, as arguments."""
    if kind == "sas_url":
        return {"url": f"{container.blob_url('data')}?{container.sas()}"}
    return {"url": container.blob_url("data"), "credential": getattr(container, kind)}


def shards_of(container: Container, folder: str = "out") -> list[str]:
    return [name for name in container.names() if name.startswith(f"{folder}/") and name.endswith(".tar")]


def samples_of(container: Container, folder: str = "out") -> list[tuple[str, bytes]]:
    """The names and contents of all files in all shards of *folder*, read by ``tarfile``."""
    found = []
    for name in shards_of(container, folder):
        with tarfile.open(fileobj=io.BytesIO(container.get(name))) as tar:
            for member in tar:
                file = tar.extractfile(member)
                assert file is not None
                found.append((member.name, file.read()))
    return sorted(found)


@pytest.mark.parametrize("kind", ["key", "sas_credential", "sas_url"])
def test_blobs_are_listed(container: Container, kind: str) -> None:
    fill(container, 12)
    container.put("data/top.txt", b"top")
    container.put("database", b"not in the folder")
    expected = sorted(AzureBlobInfoLister(container.blob_url("data/"), credential=container.key))
    arguments = shared(container, kind)
    with azstoragetorch.share_credentials():
        found = ours.list_blobs(**arguments)
        chosen = ours.list_blobs(arguments.pop("url"), "*.txt", **arguments)
    assert sorted(BlobInfo(**row) for row in found.take_all()) == expected
    assert [row["size"] for row in chosen.take_all()] == [3]


def test_each_folder_is_a_share_that_a_task_lists(container: Container) -> None:
    from azstoragetorch.ray._listing import shares_of
    from azstoragetorch.ray._sending import clients_below

    names = [f"data/{a}/{b:02}/0" for a in range(2) for b in range(40)]
    for name in [*names, "data/top.txt"]:
        container.put(name, b"1")
    place, clients = clients_below(container.url, container.key, None)
    top, *folders = shares_of(clients, place)
    assert getattr(top, "names", None) == ["data/top.txt"]
    assert sorted(folders) == [name[:-1] for name in names]
    one, clients = clients_below(container.blob_url("data/top.txt"), container.key, None)
    assert [share.names for share in shares_of(clients, one)] == [["data/top.txt"]]  # type: ignore[union-attr]


@pytest.mark.parametrize("count", [1, 3, 7, 100])
def test_tasks_get_about_the_same_number_of_bytes(count: int) -> None:
    blobs = [BlobInfo(f"{n}", (n * 7919 % 50) << 14, '"1"') for n in range(60)]
    groups = balance(blobs, count)
    assert [blob for group in groups for blob in group] == blobs
    assert all(groups)
    assert len(groups) <= count
    costs = [sum(blob.size + (64 << 10) for blob in group) for group in groups]
    largest = max(blob.size + (64 << 10) for blob in blobs)
    assert max(costs) <= sum(costs) / count + largest
    assert balance([], 3) == []


def test_what_is_not_there(container: Container) -> None:
    with azstoragetorch.share_credentials():
        assert ours.list_blobs(container.url, credential=container.key).take_all() == []
        with pytest.raises(ResourceNotFoundError, match="missing is not a blob"):
            ours.list_blobs(container.blob_url("missing"), credential=container.key)
        with pytest.raises(ResourceNotFoundError, match="missing is not a blob"):
            ours.read_blobs(container.blob_url("missing"), credential=container.key)


@pytest.mark.parametrize("kind", ["key", "sas_url"])
def test_blobs_are_read(container: Container, kind: str) -> None:
    """By a URL, by what is known of them, and by a dataset of them."""
    content = fill(container, 12)
    expected = sorted((container.blob_url(name), data) for name, data in content.items())
    arguments = shared(container, kind)
    with azstoragetorch.share_credentials():
        by_url = ours.read_blobs(arguments["url"], credential=arguments.get("credential"))
        infos = [BlobInfo(**row) for row in ours.list_blobs(**arguments).take_all()]
        by_infos = ours.read_blobs(infos[:3], credential=container.key)
        by_dataset = ours.read_blobs(ours.list_blobs(**arguments), credential=container.key)
    assert sorted((row["url"], row["data"]) for row in by_url.take_all()) == expected
    assert sorted((row["url"], row["data"]) for row in by_dataset.take_all()) == expected
    assert {row["url"] for row in by_infos.take_all()} == {info.url for info in infos[:3]}


def test_each_group_of_a_dataset_of_blobs_is_read_by_a_task_of_its_own(
    container: Container, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray could run the whole chain as one task, because all blobs of a folder are listed by one."""
    content = fill(container, 12, folders=1)
    monkeypatch.setattr("azstoragetorch.ray._reading._TASK", 4 * (64 << 10))

    def to_row(blob: Any) -> dict[str, Any]:
        with blob.reader() as reader:
            return {"data": reader.read(), "task": ray.get_runtime_context().get_task_id()}

    with azstoragetorch.share_credentials():
        listed = ours.list_blobs(container.url, credential=container.key)
        rows = ours.read_blobs(listed, transform=to_row, credential=container.key).take_all()
    assert sorted(row["data"] for row in rows) == sorted(content.values())
    assert sorted(Counter(row["task"] for row in rows).values()) == [3, 3, 3, 3]


def test_a_blob_of_a_manifest_that_changed_is_an_error(container: Container) -> None:
    fill(container, 2)
    make_manifest(container.url, container.blob_url("manifest"), prefix="data/", credential=container.key)
    with azstoragetorch.share_credentials():
        listed = AzureBlobManifestLister(container.blob_url("manifest"), credential=container.key)
        dataset = ours.read_blobs(listed, credential=container.key)
    container.put("data/0/000.bin", b"changed")
    with pytest.raises(BlobChangedError, match=r"data/0/000.bin was overwritten after it was listed"):
        dataset.materialize()


def test_a_transform_makes_rows(container: Container) -> None:
    fill(container, 6)

    def to_row(blob: Any) -> dict[str, Any]:
        with blob.reader() as reader:
            return {"number": int(blob.blob_name[-7:-4]), "pixels": np.full((2, 3), len(reader.read()), np.float32)}

    with azstoragetorch.share_credentials():
        rows = ours.read_blobs(container.blob_url("data"), credential=container.key, transform=to_row).take_all()
    assert {row["number"]: row["pixels"].tolist() for row in rows} == {n: [[n + 1] * 3] * 2 for n in range(6)}


def test_a_transform_that_fails_names_the_blob(container: Container) -> None:
    container.put("data/odd.bin", b"1")
    with azstoragetorch.share_credentials():
        wrong = ours.read_blobs(container.blob_url("data"), credential=container.key, transform=lambda blob: blob.size)
    with pytest.raises(TypeError, match=r"returned a int for http.*data/odd.bin: it must return a row"):
        wrong.take_all()
    with pytest.raises(TypeError, match="transform must be callable"):
        ours.read_blobs(container.url, transform="x")  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["key", "sas_url"])
@pytest.mark.parametrize("verb", ["list_blobs", "read_blobs"])
def test_a_worker_without_credentials_says_what_to_do(container: Container, verb: str, kind: str) -> None:
    """A plain pickle never has the secret, so it is not shared unless the user says so."""
    fill(container, 2)
    arguments = shared(container, kind)
    dataset = getattr(ours, verb)(arguments.pop("url"), **arguments)
    with pytest.raises(ValueError, match=r"share_credentials\(\):.*AZURE_CLIENT_ID.*credential=None"):
        dataset.take_all()


def test_a_credential_that_cannot_be_sent() -> None:
    class Token:
        def __init__(self) -> None:
            self.file = open(os.devnull)  # noqa: SIM115, PTH123

        def get_token(self, *scopes: str, **options: Any) -> Any:
            raise AssertionError

    token = Token()
    with token.file, pytest.raises(TypeError, match=r"cannot be sent to a worker of Ray.*pass credential=None"):
        ours.list_blobs("https://account.blob.core.windows.net/c", credential=token)


def images(count: int) -> Any:
    rows = [{"__key__": f"{number:04}", "bin": b"%d" % number * 100, "txt": str(number % 3)} for number in range(count)]
    return ray.data.from_items(rows, override_num_blocks=4)


def expected_samples(count: int) -> list[tuple[str, bytes]]:
    pairs = [(f"{n:04}.bin", b"%d" % n * 100) for n in range(count)]
    return sorted([*pairs, *((f"{n:04}.txt", str(n % 3).encode()) for n in range(count))])


def write(dataset: Any, container: Container, **options: Any) -> list[str]:
    with azstoragetorch.share_credentials():
        return ours.write_shards(dataset, container.blob_url("out"), credential=container.key, **options)


def test_shards_are_written(container: Container) -> None:
    urls = write(images(100), container, max_size=20 << 10)
    assert urls == [container.blob_url(name) for name in shards_of(container)]
    assert len(urls) > 4
    assert samples_of(container) == expected_samples(100)
    assert max(len(container.get(name)) for name in shards_of(container)) <= 20 << 10


def kill_once(marker: Path) -> None:
    """Kill this worker as a lack of memory would, if it is the first that comes here."""
    try:
        marker.touch(exist_ok=False)
    except FileExistsError:
        return
    os.kill(os.getpid(), signal.SIGKILL)


class KilledAfterShards(_writing._ShardSink):
    """Its first task writes all of its shards, and is killed before Ray hears of it."""

    marker: Path
    is_repeatable = True

    def write(self, blocks: Any, ctx: Any) -> Any:
        blocks = list(blocks)
        if not self.is_repeatable and not self.marker.exists():  # a function of the user that returns something else
            blocks = [block.slice(0, block.num_rows - 1) for block in blocks]
        shards = super().write(blocks, ctx)
        kill_once(self.marker)
        return shards


@pytest.mark.parametrize("is_repeatable", [True, False])
def test_a_task_that_is_killed_leaves_no_double(
    container: Container, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_repeatable: bool
) -> None:
    """Its shards were written and not reported; they are written again by another worker."""
    sink = type("Killed", (KilledAfterShards,), {"marker": tmp_path / "killed", "is_repeatable": is_repeatable})
    monkeypatch.setattr(_writing, "_ShardSink", sink)
    container.put("out/note.txt", b"not a shard")
    write(images(40), container, max_count=5)
    assert (tmp_path / "killed").exists()
    assert samples_of(container) == expected_samples(40)
    assert container.get("out/note.txt") == b"not a shard"


def test_a_job_that_fails_leaves_nothing_of_its_own(container: Container) -> None:
    """The shards that were there stay, also if they were to be replaced."""
    write(images(10), container)
    before = {name: container.get(name) for name in shards_of(container)}
    with pytest.raises(ResourceExistsError, match=r"out/: has \d shards already: .* overwrite=True"):
        write(images(10), container)
    rows = [{"__key__": f"{n:04}", "bin": b"x" if n < 60 else None} for n in range(61)]
    with pytest.raises(ValueError, match="the sample '0060' has no data"):
        write(ray.data.from_items(rows, override_num_blocks=4), container, max_count=5, overwrite=True)
    assert {name: container.get(name) for name in shards_of(container)} == before


def test_a_job_is_started_again(container: Container) -> None:
    """What has the same content stays, and everything else is replaced."""
    first = write(images(40), container, max_count=10)
    etag = container.client.get_blob_client(shards_of(container)[0]).get_blob_properties().etag
    assert write(images(40), container, max_count=10, overwrite=True) == first
    assert container.client.get_blob_client(shards_of(container)[0]).get_blob_properties().etag == etag
    write(images(20), container, max_count=10, overwrite=True)
    assert samples_of(container) == expected_samples(20)
    with pytest.raises(ValueError, match="max_size and max_count must be at least 1"):
        write(images(1), container, max_count=0)


def test_a_shard_that_another_job_deletes_is_noticed(container: Container, monkeypatch: pytest.MonkeyPatch) -> None:
    keep = _writing._Folder.keep

    def after_a_deletion(folder: Any, shards: Any) -> None:
        container.client.delete_blob(shards_of(container)[0])
        keep(folder, shards)

    monkeypatch.setattr(_writing._Folder, "keep", after_a_deletion)
    with pytest.raises(AZStorageTorchError, match="was deleted or changed while the job was running"):
        write(images(10), container)


def test_a_trainer_goes_on_after_its_worker_was_killed(container: Container, tmp_path: Path) -> None:
    """Workers upload checkpoints, the second one begins with that of the first, and this process reads the last."""
    import torch
    from ray.train import Checkpoint, FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    def train(options: dict[str, Any]) -> None:
        import tempfile

        from ray import train as session

        begin = 0
        if checkpoint := session.get_checkpoint():
            with checkpoint.as_directory() as folder:
                begin = int(torch.load(f"{folder}/weight.pt")[0])
        for step in range(begin + 1, 4):
            if step == 3:
                # Waits until the trainer knows both checkpoints. Older releases of Ray wait in `report`.
                getattr(session, "get_all_reported_checkpoints", list)()
                kill_once(options["marker"])
            with tempfile.TemporaryDirectory() as folder:
                torch.save(torch.full((5,), step), f"{folder}/weight.pt")
                session.report({"step": step, "begin": begin}, checkpoint=Checkpoint.from_directory(folder))

    with azstoragetorch.share_credentials():
        filesystem, path = ours.checkpoint_storage(container.blob_url("runs"), credential=container.key)
    config = RunConfig(
        name="run", storage_filesystem=filesystem, storage_path=path, failure_config=FailureConfig(max_failures=1)
    )
    trainer = TorchTrainer(
        train,
        train_loop_config={"marker": tmp_path / "killed"},
        scaling_config=ScalingConfig(num_workers=1),
        run_config=config,
    )
    result = trainer.fit()
    assert (tmp_path / "killed").exists()
    assert result.metrics["step"] == 3
    assert result.metrics["begin"] == 2
    with result.checkpoint.as_directory() as folder:
        assert torch.load(f"{folder}/weight.pt").tolist() == [3] * 5
    names = [name for name in container.names() if name.endswith("weight.pt")]
    assert len(names) >= 3
    assert all(name.startswith("runs/run/") for name in names)


@pytest.mark.parametrize("kind", ["key", "sas_url"])
def test_a_file_system_that_is_not_shared_has_no_secret(container: Container, kind: str) -> None:
    arguments = shared(container, kind)
    filesystem, path = ours.checkpoint_storage(**arguments)
    assert path == f"{container.name}/data"
    there = pickle.loads(pickle.dumps(filesystem))
    assert container.service.account_key.encode() not in pickle.dumps(filesystem)
    assert b"sig=" not in pickle.dumps(filesystem)
    with pytest.raises(ValueError, match="share_credentials"):
        there.open_output_stream(f"{path}/a")


def test_the_key_is_in_no_repr(container: Container) -> None:
    with azstoragetorch.share_credentials():
        dataset = ours.list_blobs(container.url, credential=container.key)
    assert container.service.account_key not in repr(dataset) + str(vars(dataset))
