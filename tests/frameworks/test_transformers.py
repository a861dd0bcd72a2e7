"""The callback under a real Trainer: checkpoints in blobs, complete or not there, and a job that resumes from them."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from azure.core.exceptions import HttpResponseError, ResourceNotFoundError

from azstoragetorch._files.folders import Folders
from azstoragetorch._files.paths import CopyError
from azstoragetorch.exceptions import CheckpointError
from tests.azurite.container import Container
from tests.checkpoint.ranks import run_ranks

transformers = pytest.importorskip("transformers", reason="it is not installed; `make frameworks` installs it")
from azstoragetorch.transformers import BlobCheckpointCallback  # noqa: E402

pytestmark = [pytest.mark.frameworks, pytest.mark.timeout(600), pytest.mark.filterwarnings("ignore")]

LIST = ".complete.json"


def examples() -> list[dict[str, list[int]]]:
    return [{"input_ids": [n % 7, 1, 2, 3], "labels": [n % 7, 1, 2, 3]} for n in range(32)]


def trainer(folder: Path, *callbacks: Any, **options: Any) -> Any:
    """A Trainer of a tiny model that saves every 2 steps."""
    torch.manual_seed(0)
    shape = transformers.GPT2Config(
        vocab_size=8, n_positions=8, n_embd=8, n_layer=1, n_head=1, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    chosen = {"max_steps": 6, "save_steps": 2, "lr_scheduler_type": "constant", **options}
    args = transformers.TrainingArguments(
        output_dir=str(folder), per_device_train_batch_size=4, report_to=[], use_cpu=True, disable_tqdm=True,
        logging_strategy="no", seed=1, **chosen,
    )  # fmt: skip
    return transformers.Trainer(
        transformers.GPT2LMHeadModel(shape), args, train_dataset=examples(), callbacks=list(callbacks)
    )


def weights(of: Any) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in of.model.state_dict().items()}


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def saver(container: Container) -> BlobCheckpointCallback:
    return BlobCheckpointCallback(container.blob_url("run"), credential=container.key)


def test_a_job_resumes_on_another_machine_as_if_nothing_had_happened(
    container: Container, saver: BlobCheckpointCallback, tmp_path: Path
) -> None:
    undisturbed = trainer(tmp_path / "undisturbed")
    undisturbed.train()
    first = trainer(tmp_path / "one", saver, max_steps=4)
    assert saver.download_latest(first.args) is None
    first.train()
    assert saver.checkpoints() == ["checkpoint-2", "checkpoint-4"]
    second = trainer(tmp_path / "two", saver)
    path = saver.download_latest(second.args)
    assert path == str(tmp_path / "two" / "checkpoint-4")
    assert files(Path(path)) == files(tmp_path / "one" / "checkpoint-4")
    assert second.train(resume_from_checkpoint=path).global_step == 6
    assert saver.checkpoints() == ["checkpoint-2", "checkpoint-4", "checkpoint-6"]
    for name, value in weights(undisturbed).items():
        assert torch.equal(weights(second)[name], value), name


def test_the_last_ones_and_the_best_one_are_kept(container: Container, tmp_path: Path) -> None:
    container.put("run/checkpoint-1/left/behind", b"by a save that was interrupted")
    container.put("run/checkpoint-99/being/saved", b"perhaps")
    container.put("run/other", b"not ours")
    saver = BlobCheckpointCallback(container.blob_url("run"), keep=1, credential=container.key)

    class Remember(transformers.TrainerCallback):  # type: ignore[misc,name-defined]
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            state.best_model_checkpoint = str(tmp_path / "checkpoint-2")

    trainer(tmp_path, Remember(), saver).train()
    assert saver.checkpoints() == ["checkpoint-2", "checkpoint-6"]
    folders = {"/".join(name.split("/")[:2]) for name in container.names()}
    assert folders == {"run/checkpoint-2", "run/checkpoint-6", "run/checkpoint-99", "run/other"}


def fail_at(container: Container, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    """Make one step of a save fail, as if the network had gone away."""
    action: Callable[..., Any] = getattr(Folders, step)

    def failing(self: Folders, *arguments: Any) -> Any:
        if step == "upload":
            name, save_id, folder, names = arguments
            action(self, name, save_id, folder, list(names)[:1])
        raise HttpResponseError("the network went away")

    monkeypatch.setattr(Folders, step, failing)


@pytest.mark.parametrize("step", ["upload", "commit"])
def test_an_interrupted_save_leaves_the_checkpoint_that_was_there(
    container: Container, saver: BlobCheckpointCallback, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    """Also that of the same step, which a job that starts again saves again."""
    trainer(tmp_path / "one", saver, max_steps=2).train()
    before = {name: container.get(name) for name in container.names()}
    with monkeypatch.context() as patch:
        fail_at(container, patch, step)
        with pytest.raises(HttpResponseError, match="the network went away"):
            trainer(tmp_path / "two", saver, max_steps=2, learning_rate=1e-2).train()
    assert before.items() <= {name: container.get(name) for name in container.names()}.items()
    path = saver.download_latest(trainer(tmp_path / "three").args)
    assert files(Path(str(path))) == files(tmp_path / "one/checkpoint-2")


def test_a_step_that_is_saved_again_replaces_the_first(
    container: Container, saver: BlobCheckpointCallback, tmp_path: Path
) -> None:
    trainer(tmp_path / "one", saver, max_steps=2).train()
    count = len(container.names())
    trainer(tmp_path / "two", saver, max_steps=2, learning_rate=1e-2).train()
    assert len(container.names()) == count
    path = saver.download_latest(trainer(tmp_path / "one").args)  # in the place of the other one's
    assert files(Path(str(path))) == files(tmp_path / "two/checkpoint-2")
    assert [entry.name for entry in (tmp_path / "one").iterdir()] == ["checkpoint-2"]


def test_files_that_are_here_are_not_fetched(
    container: Container, saver: BlobCheckpointCallback, tmp_path: Path
) -> None:
    from azstoragetorch import metrics

    trainer(tmp_path, saver, max_steps=2).train()
    expected = files(tmp_path / "checkpoint-2")
    (tmp_path / "checkpoint-2/config.json").write_text("{}")
    (tmp_path / "checkpoint-2/stale.bin").write_text("of another run")
    before = metrics()
    saver.download_latest(trainer(tmp_path).args)
    assert files(tmp_path / "checkpoint-2") == expected
    assert (metrics() - before).bytes_received < len(expected["config.json"]) + 20_000


def test_two_saves_of_one_step_at_the_same_time(container: Container, tmp_path: Path) -> None:
    """One of them fails, and the other is complete."""
    folders = Folders(container.blob_url("run"), container.key)
    (tmp_path / "a.bin").write_bytes(b"first")
    sizes = folders.upload("checkpoint-1", "one", tmp_path, ["a.bin"])
    (tmp_path / "a.bin").write_bytes(b"second")
    others = folders.upload("checkpoint-1", "two", tmp_path, ["a.bin"])
    folders.commit("checkpoint-1", "two", others, None)
    with pytest.raises(CopyError, match="another save was committed during this one"):
        folders.commit("checkpoint-1", "one", sizes, None)
    folders.download("checkpoint-1", tmp_path / "down")
    assert (tmp_path / "down/a.bin").read_bytes() == b"second"


def test_data_that_was_deleted_is_not_committed(container: Container, tmp_path: Path) -> None:
    folders = Folders(container.blob_url("run"), container.key)
    (tmp_path / "a.bin").write_bytes(b"first")
    sizes = folders.upload("checkpoint-1", "one", tmp_path, ["a.bin"])
    folders.delete("checkpoint-1")
    with pytest.raises(CopyError, match=r"a.bin was deleted or changed"):
        folders.commit("checkpoint-1", "one", sizes, None)
    assert container.names() == []


def test_nodes_that_share_a_file_system_replace_one_folder(container: Container, tmp_path: Path) -> None:
    folders = Folders(container.blob_url("run"), container.key)
    (tmp_path / "a.bin").write_bytes(b"first")
    folders.commit("c", "one", folders.upload("c", "one", tmp_path, ["a.bin"]), None)
    run_ranks(3, download_often, folders, str(tmp_path / "down"), timeout=300)
    assert files(tmp_path / "down") == {"a.bin": b"first"}
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["a.bin", "down"]


def download_often(rank: int, folders: Folders, target: str) -> None:
    for _ in range(10):
        folders.download("c", Path(target))


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"[]",
        b"{}",
        b"[" * 100_000,
        b'{"format": 1, "save": "../x", "files": {}}',
        b'{"format": 1, "save": "x", "files": []}',
        b'{"format": 1, "save": "x", "files": {"a": "1"}}',
        b'{"format": 1, "save": "x", "files": {"../a": 1}}',
        b'{"format": 1, "save": "x", "files": {"/etc/a": 1}}',
        b'{"format": 1, "save": "x", "files": {"a//b": 1}}',
        b'{"format": 1, "save": "x", "files": {"c:\\\\a": 1}}',
        b'{"format": 1, "save": "x", "files": {"a\\n": 1}}',
        b'{"format": 1, "save": "x", "files": {"": 1}}',
        b'{"format": 2}',
    ],
    ids=str,
)
def test_a_hostile_list_of_files_writes_nothing(container: Container, tmp_path: Path, content: bytes) -> None:
    container.put(f"run/checkpoint-1/{LIST}", content)
    container.put("run/a", b"1")
    with pytest.raises(CopyError, match=r"is damaged|does not know|upgrade"):
        Folders(container.blob_url("run"), container.key).download("checkpoint-1", tmp_path / "down" / "c")
    assert not (tmp_path / "down").exists()


def test_a_file_that_is_gone_leaves_the_local_folder_alone(
    container: Container, saver: BlobCheckpointCallback, tmp_path: Path
) -> None:
    trainer(tmp_path, saver, max_steps=2).train()
    before = files(tmp_path / "checkpoint-2")
    gone = next(name for name in container.names() if name.endswith("optimizer.pt"))
    container.client.delete_blob(gone)
    with pytest.raises(ResourceNotFoundError):
        saver.download_latest(trainer(tmp_path).args)
    assert files(tmp_path / "checkpoint-2") == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["checkpoint-2"]


@pytest.mark.parametrize("keep", [0, -1])
def test_wrong_arguments(keep: int) -> None:
    with pytest.raises(ValueError, match=f"keep must be at least 1, not {keep}"):
        BlobCheckpointCallback("https://account.blob.core.windows.net/c", keep=keep)
    with pytest.raises(TypeError, match="keep must be an integer"):
        BlobCheckpointCallback("https://account.blob.core.windows.net/c", keep=True)
    with pytest.raises(ValueError, match="snapshot"):
        BlobCheckpointCallback("https://account.blob.core.windows.net/c/b?snapshot=x")


def test_a_folder_that_the_trainer_did_not_write(saver: BlobCheckpointCallback, tmp_path: Path) -> None:
    """As in a hyperparameter search."""
    state = transformers.TrainerState(global_step=7)
    with pytest.raises(FileNotFoundError, match="a hyperparameter search saves to other folders"):
        saver.on_save(trainer(tmp_path).args, state, transformers.TrainerControl())


def train_on_ranks(rank: int, url: str, credential: Any, folder: str, fails: bool) -> Any:
    """Two ranks, each on a node of its own: with a separate local folder."""
    os.environ |= {"LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    saver = BlobCheckpointCallback(url, credential=credential)
    job = trainer(Path(folder) / str(rank), saver, max_steps=2, save_on_each_node=True, ddp_backend="gloo")
    if fails and rank == 1:
        shutil.rmtree(folder)
        Path(folder).write_text("not a folder")
    saver.on_save(job.args, job.state, job.control) if fails else job.train()
    return files(Path(str(saver.download_latest(job.args))))


def test_the_files_of_all_nodes_are_copied(container: Container, tmp_path: Path) -> None:
    one, two = run_ranks(2, train_on_ranks, container.blob_url("run"), container.key, str(tmp_path), False, timeout=500)
    assert one == two
    assert {"rng_state_0.pth", "rng_state_1.pth", "model.safetensors"} <= one.keys()


def test_all_ranks_raise_when_one_fails() -> None:
    from azstoragetorch.transformers import _on_all_ranks

    def act() -> Any:
        return run_ranks(2, fail_on_one, timeout=500)

    assert act() == ["OSError: the disk is full", "rank 0 could not copy a checkpoint: OSError: the disk is full"]
    assert _on_all_ranks(lambda: 3) == [3]


def fail_on_one(rank: int) -> str:
    from azstoragetorch.transformers import _on_all_ranks

    def fail() -> None:
        if rank == 0:
            raise OSError("the disk is full")

    try:
        _on_all_ranks(fail)
    except OSError as error:
        return f"OSError: {error}"
    except CheckpointError as error:
        return str(error)
    return "no error"
