"""torch_checkpointing itself saves to blobs, and loads from them."""

from __future__ import annotations

import io
import logging
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

from azstoragetorch import TransferConfig, metrics
from azstoragetorch.exceptions import BlobChangedError
from azstoragetorch.io import BlobIO
from tests.azurite.container import Container
from tests.checkpoint.states import same
from tests.faults import FaultService, Status
from tests.support import Killed, struck

pytest.importorskip("torch_checkpointing", reason="it is not installed; `make frameworks` installs it")
from torch_checkpointing import CheckpointManager
from torch_checkpointing.checkpoint_process import CheckpointProcessConfig
from torch_checkpointing.config import AsyncCheckpointSaverConfig, SyncCheckpointSaverConfig
from torch_checkpointing.default_resharder import DefaultResharder
from torch_checkpointing.schema import ItemSpec
from torch_checkpointing.staging import CheckpointStagerConfig
from torch_checkpointing.storage.base_storage import ReadArgs

from azstoragetorch.torch_checkpointing import BlobStorage, BlobStorageConfig

pytestmark = [pytest.mark.frameworks, pytest.mark.timeout(600), pytest.mark.filterwarnings("ignore")]

FAST = TransferConfig(block_size=1 << 16, part_size=1 << 16, max_attempts=3, max_backoff=0)
ALONE = TransferConfig(max_connections=1, max_concurrency=1, max_attempts=3, max_backoff=0)


def state(step: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(step)
    model = {f"layer{n}": torch.randn(30_000, generator=generator) for n in range(3)}
    return {"model": model, "step": step, "note": {"text": "a", "numbers": [1, 2]}}


def blank() -> dict[str, Any]:
    return {"model": {f"layer{n}": torch.zeros(30_000) for n in range(3)}, "step": 0, "note": None}


def manager(storage: BlobStorageConfig, **options: Any) -> CheckpointManager:
    options.setdefault("save", SyncCheckpointSaverConfig())
    return CheckpointManager(CheckpointManager.Config(storage_config=storage, **options))


def check(storage: BlobStorageConfig, name: str, step: int) -> None:
    loading = manager(storage)
    try:
        same(dict(loading.load(name, into=blank())), state(step))
    finally:
        loading.close()


@pytest.fixture
def config(container: Container) -> BlobStorageConfig:
    """In Azurite, which copies with a SAS for the container and not with a key."""
    return BlobStorageConfig(f"{container.url}/run", credential=container.sas_that_copies(), transfer=FAST)


@pytest.fixture
def local(fault_service: FaultService) -> BlobStorageConfig:
    fault_service.create_container("c")
    return BlobStorageConfig(f"{fault_service.container_url('c')}/run", credential=False, transfer=ALONE)


# -- with a manager ----------------------------------------------------------------------------------------------------


def test_a_checkpoint_is_saved_and_loaded(container: Container, config: BlobStorageConfig) -> None:
    saving = manager(config)
    saving.save("step-1", state(1))
    saving.save("step-2", state(2))
    with pytest.raises(OSError, match="step-2 exists, so run/tmp_step-2 was not renamed to it: delete it first"):
        saving.save("step-2", state(3))
    saving.close()
    check(config, "step-1", 1)
    check(config, f"{container.url}/run/step-2", 2)  # torch_checkpointing makes a path of it
    assert config.create_storage().ls(Path()) == ["step-1", "step-2", "tmp_step-2"]
    with BlobIO(f"{container.url}/run/step-1/model_0.pt", "rb", credential=container.sas_credential) as blob:
        same(torch.load(blob), state(1)["model"])  # an ordinary file


def test_a_process_of_its_own_writes_in_the_background(config: BlobStorageConfig) -> None:
    staging = CheckpointStagerConfig(
        use_pinned_memory=False, use_shared_memory=False, use_async_staging=False, use_non_blocking_copy=False
    )
    options = AsyncCheckpointSaverConfig(staging_config=staging, process_config=CheckpointProcessConfig())
    saving = manager(config, save=options)
    future = saving.save("step-7", state(7))
    assert future is not None
    future.result(timeout=300)
    saving.close()
    check(config, "step-7", 7)


def test_items_with_a_resharder_have_metadata(config: BlobStorageConfig) -> None:
    items = {"model": ItemSpec(resharder=DefaultResharder())}
    saving = manager(config, items=items)
    saving.save("step-1", state(1))
    found = saving.load("step-1", into=blank())
    saving.close()
    same(found["model"], state(1)["model"])


def test_a_checkpoint_that_does_not_exist(config: BlobStorageConfig) -> None:
    loading = manager(config)
    with pytest.raises(Exception, match="step-9"):
        loading.load("step-9", into=blank())
    loading.close()


def test_no_secret_is_shown_or_pickled(container: Container) -> None:
    for config in (
        BlobStorageConfig(f"{container.sas_url}", transfer=FAST),
        BlobStorageConfig(container.url, credential=container.sas_credential),
        BlobStorageConfig(container.url, credential=container.key),
    ):
        for shown in (repr(config), config.url, repr(config.create_storage()), str(pickle.dumps(config))):
            assert "sig=" not in shown
            assert container.service.account_key not in shown


def test_a_service_that_does_not_copy(
    fault_service: FaultService, local: BlobStorageConfig, caplog: pytest.LogCaptureFixture
) -> None:
    """As a firewall can have it: the bytes pass through this machine, with one warning."""
    rule = fault_service.script("copy_blob", [Status(403)], repeat=True)
    saving = manager(local)
    with caplog.at_level(logging.WARNING, "azstoragetorch"):
        saving.save("step-1", state(1))
    saving.close()
    assert len([record for record in caplog.records if "copies pass through this machine" in record.message]) == 1
    assert rule.is_exhausted
    check(local, "step-1", 1)


# -- the files ---------------------------------------------------------------------------------------------------------


def storage_with(config: BlobStorageConfig, **files: bytes) -> BlobStorage:
    storage = config.create_storage()
    for name, content in files.items():
        storage.write(Path(name.replace("__", "/")), content)
    return storage


def test_files(local: BlobStorageConfig) -> None:
    storage = storage_with(local, a__b=b"0123456789", a__c=b"")
    with storage.stream_write(Path("a/d")) as stream:
        stream.write(b"xy")
    assert [storage.read(Path(f"a/{name}")) for name in "bcd"] == [b"0123456789", b"", b"xy"]
    with storage.stream_read(Path("a/b"), ReadArgs(pre_read_full_file=False)) as stream:
        assert stream.seek(4) == 4
        into = bytearray(3)
        assert stream.readinto(into) == 3
        assert into == b"456"
    assert storage.getsize(Path("/a/b")) == 10
    assert [storage.exists(Path(name)) for name in ("a", "a/b", "b", "a/")] == [True, True, False, True]
    assert [storage.isdir(Path(name)) for name in ("a", "a/b", "b")] == [True, False, False]
    assert storage.ls(Path("a")) == ["b", "c", "d"]
    assert storage.glob("a/[bc]") == ["a/b", "a/c"]
    assert storage.remap_path(Path("a/b")) == f"{local.url}/a/b"
    storage.mkdir(Path("e"))
    storage.delete(Path("a/b"))
    for action in (storage.read, storage.getsize, storage.delete, storage.stream_read):
        with pytest.raises(FileNotFoundError, match="run/a/b does not exist"):
            action(Path("a/b"))
    storage.rmdir(Path("a"))
    for action in (storage.ls, storage.rmdir):
        with pytest.raises(FileNotFoundError, match="no directory 'run/a'"):
            action(Path("a"))
    assert storage.ls(Path()) == []


def test_a_stream_that_fails_changes_nothing(local: BlobStorageConfig) -> None:
    storage = storage_with(local, a=b"old")

    def write() -> None:
        with storage.stream_write(Path("a")) as stream:
            stream.write(b"new")
            raise KeyError

    with pytest.raises(KeyError):
        write()
    assert storage.read(Path("a")) == b"old"


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("a/../b", "has a '.' or '..' segment"),
        ("https://elsewhere.blob.core.windows.net/c/run/a", "is not in the container of"),
        ("https://127.0.0.1:1/devstoreaccount1/c/run/a", "is not in the container of"),
        (".", "name a file or directory in it"),
    ],
)
def test_paths_that_lead_elsewhere_are_refused(local: BlobStorageConfig, path: str, reason: str) -> None:
    storage = local.create_storage()
    with pytest.raises(ValueError, match=reason):
        storage.write(Path(path), b"")


def test_a_folder_next_to_it_is_not_below_it(local: BlobStorageConfig) -> None:
    with pytest.raises(ValueError, match="is not below"):
        local.create_storage().read(Path(f"{local.url}-other/a"))


# -- renaming ----------------------------------------------------------------------------------------------------------


def test_the_table_of_torch_checkpointing(local: BlobStorageConfig) -> None:
    """The six rows of `Storage.rename`; an empty directory is one that does not exist."""
    storage = storage_with(local, d__x=b"1", d__y__z=b"2", full__x=b"3", f=b"4", g=b"5")
    for target in ("full", "f"):
        with pytest.raises(OSError, match=f"{target} exists, so run/d was not renamed"):
            storage.rename(Path("d"), Path(target), is_directory=True)
    with pytest.raises(IsADirectoryError):
        storage.rename(Path("f"), Path("full"))
    with pytest.raises(FileNotFoundError, match="nothing at 'run/nothing'"):
        storage.rename(Path("nothing"), Path("h"))
    storage.rename(Path("d"), Path("e"), is_directory=True)
    storage.rename(Path("f"), Path("g"))
    storage.rename(Path("g"), Path("h"))
    assert storage.ls(Path()) == ["e", "full", "h"]
    assert [storage.read(Path(name)) for name in ("e/x", "e/y/z", "full/x", "h")] == [b"1", b"2", b"3", b"4"]


def test_nothing_is_uploaded_again(local: BlobStorageConfig) -> None:
    storage = storage_with(local, tmp__a=bytes(3_000_000), tmp__b=bytes(1_000_000))
    before = metrics()
    storage.rename(Path("tmp"), Path("done"), is_directory=True)
    assert (metrics() - before).bytes_sent < 1000
    assert storage.getsize(Path("done/a")) == 3_000_000


@pytest.mark.parametrize("kind", ["killed before", "killed after", "lost"])
def test_a_rename_is_struck_at_every_request(local: BlobStorageConfig, kind: str) -> None:
    """The directory is there completely or not at all, and renaming again completes it."""
    nth, was_struck = 0, True
    while was_struck:
        source, target = Path(f"tmp_{nth}"), Path(f"step-{nth}")
        storage = storage_with(local, **{f"tmp_{nth}__a": b"a", f"tmp_{nth}__b__c": b"c"})
        with struck(nth, kind) as sent:
            try:
                storage.rename(source, target, is_directory=True)
                is_done = True
            except Killed:
                is_done = False
        was_struck = sent[0] > nth
        after = local.create_storage()
        assert not is_done or after.exists(target)
        assert (target.name in after.ls(Path())) == after.isdir(target)
        if not after.exists(target):
            assert sorted(after.ls(source)) == ["a", "b"]  # it can be renamed still
            after.write(source / "d", b"d")
            after.rename(source, target, is_directory=True)
        assert [after.read(target / name) for name in ("a", "b/c")] == [b"a", b"c"]
        nth += 1
    assert nth > 8


def test_what_a_killed_rename_left_is_replaced(fault_service: FaultService, local: BlobStorageConfig) -> None:
    fault_service.put("c", "run/step.incomplete", b"")
    fault_service.put("c", "run/step/of-the-killed-one", b"x")
    storage = storage_with(local, tmp__a=b"a")
    assert not storage.exists(Path("step"))
    assert storage.ls(Path()) == ["tmp"]
    storage.rename(Path("tmp"), Path("step"), is_directory=True)
    assert fault_service.names("c") == ["run/step/a"]


def test_of_two_renames_at_once_one_fails(fault_service: FaultService, local: BlobStorageConfig) -> None:
    """The one that began first finds out when it commits: the marker is not its own any more."""
    storage, other = storage_with(local, tmp__a=b"1"), storage_with(local, other__a=b"2")
    copied = storage._copy

    def copy(*arguments: Any) -> None:
        copied(*arguments)
        other.rename(Path("other"), Path("step"), is_directory=True)
        other.write(Path("step.incomplete"), b"of a third one")

    storage._copy = copy  # type: ignore[method-assign]
    with pytest.raises(BlobChangedError, match="another process is renaming something to it"):
        storage.rename(Path("tmp"), Path("step"), is_directory=True)
    assert fault_service.get("c", "run/step/a") == b"2"
    assert storage.read(Path("tmp/a")) == b"1"


def test_what_torch_saves_through_a_stream_torch_loads(local: BlobStorageConfig) -> None:
    storage = local.create_storage()
    with storage.get_write_stream(Path("a"), None) as stream:
        torch.save(state(3), stream)
    with storage.stream_read(Path("a")) as stream:
        same(torch.load(io.BytesIO(stream.read())), state(3))
