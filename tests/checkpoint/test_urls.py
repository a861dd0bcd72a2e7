"""torch's own functions save to URLs and load from them, and leave everything else to torch."""

from __future__ import annotations

import inspect
import logging
import pickle
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
import torch.distributed.checkpoint as dcp
from azure.core.credentials import AzureSasCredential
from torch.distributed.checkpoint import _storage_utils, state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.logging_handlers import DCP_LOGGER_NAME

from azstoragetorch import TransferConfig
from azstoragetorch.checkpoint import (
    BlobStorageReader,
    BlobStorageWriter,
    disable_urls,
    enable_urls,
    list_checkpoints,
)
from azstoragetorch.checkpoint import _urls as urls
from tests.azurite.container import Container
from tests.checkpoint import jobs
from tests.checkpoint.ranks import run_ranks
from tests.checkpoint.states import alone, blank, reason, rich_state, same

FUNCTIONS = [(place, name) for name, places in urls._FUNCTIONS.items() for place in places]
PLACES = [*FUNCTIONS, *((place, "_storage_setup") for place in urls._SETUPS)]
AZURE = "https://account.blob.core.windows.net/c/run"


@pytest.fixture(autouse=True)
def _disabled_afterwards() -> Iterator[None]:
    yield
    disable_urls()


class Fails:
    """A value that cannot be saved, which shows only when its bytes are asked for."""

    def __reduce__(self) -> Any:
        raise OSError("the disk is on fire")


def chosen(checkpoint_id: Any, *, reader: bool = False) -> Any:
    """What torch would save with, or load with."""
    return state_dict_saver._storage_setup(None, checkpoint_id, reader=reader)


def load(checkpoint_id: str) -> dict[str, Any]:
    state = blank(rich_state())
    with alone():
        dcp.load(state, checkpoint_id=checkpoint_id)
    return dict(state)


def test_a_url_is_saved_to_and_loaded_from(container: Container) -> None:
    enable_urls(credential=container.key)
    url = container.blob_url("run/step-1")
    with alone():
        metadata = dcp.save(rich_state(), checkpoint_id=url)
    same(rich_state(), load(url))
    assert list_checkpoints(container.blob_url("run"), credential=container.key) == [url]
    assert metadata.storage_meta.checkpoint_id == url


def test_torchs_log_has_no_sas(container: Container, caplog: pytest.LogCaptureFixture) -> None:
    enable_urls()
    url = container.blob_sas_url("run")
    logger = logging.getLogger(next(name for name in logging.root.manager.loggerDict if name.endswith(DCP_LOGGER_NAME)))
    caplog.set_level(logging.DEBUG, logger.name)
    logger.addHandler(caplog.handler)
    try:
        with alone():
            dcp.save(rich_state(), checkpoint_id=url)
            dcp.async_save(rich_state(), checkpoint_id=url).result()
        same(rich_state(), load(url))
    finally:
        logger.removeHandler(caplog.handler)
    assert container.blob_url("run") in caplog.text
    assert "sig=" not in caplog.text


def test_functions_that_were_imported_before(container: Container) -> None:
    save, async_save, stock_load = dcp.save, dcp.async_save, dcp.load
    enable_urls(credential=container.key)
    with alone():
        save(rich_state(), checkpoint_id=container.blob_url("one"))
        async_save(rich_state(), checkpoint_id=container.blob_url("two")).result()
        for name in ("one", "two"):
            state = blank(rich_state())
            stock_load(state, checkpoint_id=container.blob_url(name))
            same(rich_state(), state)


@pytest.mark.parametrize("kind", ["THREAD", pytest.param("PROCESS", marks=pytest.mark.slow)])
def test_ranks_save_in_the_background(container: Container, kind: str) -> None:
    """Also by another process, in which nothing was enabled."""
    run_ranks(2, jobs.save_to_a_url, container.url, container.key, kind, env=[{"MASTER_ADDR": "127.0.0.1"}] * 2)


def test_an_interrupted_save_leaves_the_checkpoint_that_was_there(container: Container) -> None:
    enable_urls(credential=container.key)
    url = container.blob_url("run")
    with alone():
        dcp.save(rich_state(), checkpoint_id=url)
        before = {name: container.get(name) for name in container.names()}
        with pytest.raises(dcp.CheckpointException, match="the disk is on fire"):
            dcp.save({**rich_state(), "name": Fails()}, checkpoint_id=url)
    assert {name: container.get(name) for name in container.names()} == before
    same(rich_state(), load(url))


@pytest.mark.filterwarnings("ignore:Detected an existing checkpoint")
def test_torchs_own_writer_deletes_it() -> None:
    """The reason for `enable_urls`: after an interrupted write torch removes the file, which is still the old one."""
    enable_urls()
    try:
        with alone():
            dcp.save(rich_state(), checkpoint_id="memory://run")
            same(rich_state(), load("memory://run"))
            with pytest.raises(dcp.CheckpointException, match="the disk is on fire"):
                dcp.save({**rich_state(), "name": Fails()}, checkpoint_id="memory://run")
            with pytest.raises(dcp.CheckpointException, match="FileNotFoundError"):
                load("memory://run")
    finally:
        fsspec.filesystem("memory").rm("/run", recursive=True)


def test_local_paths_are_torchs_own(tmp_path: Path) -> None:
    enable_urls()
    for checkpoint_id in (tmp_path / "one", str(tmp_path / "two")):
        with alone():
            dcp.save(rich_state(), checkpoint_id=checkpoint_id)
        assert (Path(checkpoint_id) / "__0_0.distcp").exists()
        same(rich_state(), load(str(checkpoint_id)))
    for checkpoint_id in ("abfss", "az", "https"):
        assert type(chosen(tmp_path / checkpoint_id)) is dcp.FileSystemWriter
        assert type(chosen(checkpoint_id)) is dcp.FileSystemWriter
    assert type(chosen(tmp_path, reader=True)) is dcp.FileSystemReader


def test_writers_and_readers_that_are_passed_are_used(container: Container) -> None:
    enable_urls(credential=False)  # which cannot access anything
    url = container.blob_url("run")
    writer = BlobStorageWriter(url, credential=container.key)
    with alone():
        dcp.save(rich_state(), storage_writer=writer)
        dcp.async_save(rich_state(), storage_writer=writer, checkpoint_id=container.blob_url("b")).result()
        state = blank(rich_state())
        dcp.load(state, storage_reader=BlobStorageReader(url, credential=container.key), checkpoint_id=url)
    same(rich_state(), state)
    assert "b/.metadata" in container.names()


@pytest.mark.parametrize(
    "checkpoint_id",
    [
        AZURE,
        "abfss://c@account.dfs.core.windows.net/run",
        "abfs://c@account.dfs.core.windows.net/run",
        "wasbs://c@account.blob.core.windows.net/run",
        "az://account.blob.core.windows.net/c/run",
        "azt://account.blob.core.windows.net/c/run",
        "AZ://account.blob.core.windows.net/c/run",
        "az://c/run",
        f"{AZURE}?sv=1&sig=x",
        "https://account.privatelink.blob.core.windows.net/c/run",
        "http://127.0.0.1:10000/devstoreaccount1/c/run",
        "https://trusted.example/c/run",
        "https://elsewhere.example/c/run?sv=1&sig=x",
        "abfss://c@trusted.example/run",
    ],
)
def test_urls_of_blobs(checkpoint_id: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_NAME", "account")
    enable_urls(credential=False, transfer=TransferConfig(trusted_hosts=["trusted.example"]))
    writer, reader = chosen(checkpoint_id), chosen(checkpoint_id, reader=True)
    assert (type(writer), type(reader)) == (BlobStorageWriter, BlobStorageReader)
    assert writer.checkpoint_id.endswith("/c/run")


@pytest.mark.parametrize("checkpoint_id", ["https://elsewhere.example/c/run", "https://elsewhere.example", "https://"])
def test_other_web_servers_are_torchs_own(checkpoint_id: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A credential for all URLs is not sent to a host that somebody else has chosen."""
    enable_urls(credential=AzureSasCredential("sv=1&sig=x"))
    for place in (state_dict_saver, state_dict_loader):
        monkeypatch.setattr(place._storage_setup, "stock", lambda *_, **options: ("torch's", options))
    assert chosen(checkpoint_id, reader=True) == ("torch's", {"reader": True})


@pytest.mark.parametrize("checkpoint_id", ["abfss://c@elsewhere.example/run", "az://elsewhere.example/c/run"])
def test_an_unknown_host_gets_no_credential(checkpoint_id: str) -> None:
    enable_urls(credential=AzureSasCredential("sv=1&sig=x"))
    with pytest.raises(
        ValueError, match=r"'elsewhere.example' is not one of Azure.*trusted_hosts=\[\"elsewhere"
    ) as info:
        chosen(checkpoint_id)
    assert "sig" not in str(info.value)


@pytest.mark.parametrize(
    ("checkpoint_id", "why"),
    [
        ("abfss://account.dfs.core.windows.net/run", "no container before an '@'"),
        ("az://account.blob.core.windows.net", "no container"),
        ("azt://", "no host"),
    ],
)
def test_an_invalid_url_says_why(checkpoint_id: str, why: str) -> None:
    enable_urls()
    with pytest.raises(ValueError, match=f"checkpoint_id.*{why}"):
        chosen(checkpoint_id)


@pytest.mark.parametrize("url", [AZURE, "abfss://c@account.dfs.core.windows.net/run", "az://c/run"])
def test_a_path_object_that_was_a_url_is_refused(url: str) -> None:
    """torch takes it for a local folder, which would be lost with the machine."""
    enable_urls()
    with pytest.raises(TypeError, match=r"checkpoint_id: PosixPath objects .* pass the URL as a str"):
        chosen(Path(url))


def test_it_can_be_enabled_again_and_ends() -> None:
    stock = [getattr(place, name) for place, name in PLACES]
    enable_urls(credential=AzureSasCredential("sv=1&sig=one"))
    enable_urls(credential=False)
    for (place, name), function in zip(PLACES, stock, strict=True):
        enabled = getattr(place, name)
        assert (enabled.stock, enabled._access.credential) == (function, False)
    assert pickle.loads(pickle.dumps(dcp.load)) is dcp.load
    assert dcp.async_save.__doc__ == state_dict_saver.async_save.__doc__ is not None
    disable_urls()
    disable_urls()
    assert [getattr(place, name) for place, name in PLACES] == stock


def test_wrong_arguments_are_refused() -> None:
    stock = state_dict_saver._storage_setup
    with pytest.raises(TypeError, match="credential must be"):
        enable_urls(credential="sv=1&sig=x")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="transfer must be"):
        enable_urls(transfer={})  # type: ignore[arg-type]
    assert state_dict_saver._storage_setup is stock


def test_no_secret_is_shown() -> None:
    assert "sig" not in repr(urls._Access(AzureSasCredential("sv=1&sig=x"), None))


def test_torchs_function_is_where_it_was() -> None:
    """Fails when a release of torch moves the private function that `enable_urls` stands in for, or calls it anew."""
    for place in (state_dict_saver, state_dict_loader):
        assert place._storage_setup is _storage_utils._storage_setup
    assert list(inspect.signature(_storage_utils._storage_setup).parameters) == ["storage", "checkpoint_id", "reader"]
    for place, name in FUNCTIONS:
        parameters = inspect.signature(getattr(place, name)).parameters
        storage = parameters["storage_reader" if name == "load" else "storage_writer"]
        assert {parameters["checkpoint_id"].kind, storage.kind} == {inspect.Parameter.KEYWORD_ONLY}


def test_a_torch_that_moved_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    stock = state_dict_saver._storage_setup
    with monkeypatch.context() as patch:
        patch.delattr(state_dict_loader, "_storage_setup")
        with pytest.raises(
            RuntimeError, match=rf"torch {re.escape(torch.__version__)}.*pass storage_writer=BlobStorageWriter"
        ):
            enable_urls()
        assert state_dict_saver._storage_setup is stock


def test_the_error_of_a_missing_checkpoint(container: Container) -> None:
    enable_urls(credential=container.key)
    with pytest.raises(dcp.CheckpointException) as info:
        load(container.blob_url("nothing"))
    assert "there is no checkpoint here" in str(reason(info.value))
