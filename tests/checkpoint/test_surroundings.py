"""Saving and loading do not depend on the modes and default devices of the caller."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp

from azstoragetorch import TransferConfig
from azstoragetorch.checkpoint import BlobStorageReader, BlobStorageWriter, load_keys
from tests.faults import FaultService


@pytest.fixture
def url() -> Iterator[str]:
    with FaultService() as service:
        service.create_container("data")
        yield f"{service.container_url('data')}/run"


@contextmanager
def meta_by_default() -> Iterator[None]:
    torch.set_default_device("meta")
    try:
        yield
    finally:
        torch.set_default_device(None)


SURROUNDINGS: dict[str, Any] = {
    "default device": meta_by_default,
    "with device": lambda: torch.device("meta"),
    "inference mode": torch.inference_mode,
    "no_grad": torch.no_grad,
}


def state_dict(fill: float) -> dict[str, Any]:
    """On the CPU: in order, transposed, strided, of another type than saved, large enough to probe, not a tensor."""
    with torch.device("cpu"):
        base = torch.arange(600 * 300, dtype=torch.float32).reshape(600, 300)
        return {
            "plain": base + fill,
            "transposed": (base + fill).t(),
            "strided": (base + fill)[::2, ::3],
            "scalar": torch.tensor(fill),
            "empty": torch.zeros(0, 3),
            "step": int(fill),
        }


def same(found: dict[str, Any], expected: dict[str, Any]) -> bool:
    return all(
        found[key].device.type == "cpu" and torch.equal(found[key], value)
        if isinstance(value, torch.Tensor)
        else found[key] == value
        for key, value in expected.items()
    )


@pytest.mark.parametrize("name", SURROUNDINGS)
def test_saving_and_loading_in_any_surroundings(name: str, url: str) -> None:
    saved = state_dict(1.0)
    found = state_dict(0.0)
    with SURROUNDINGS[name]():
        dcp.save(saved, storage_writer=BlobStorageWriter(url, credential=False), no_dist=True)
        dcp.load(found, storage_reader=BlobStorageReader(url, credential=False), no_dist=True)
        keys = load_keys(url, credential=False)
    assert same(found, saved)
    assert same(keys, saved)


def test_loading_into_tensors_that_were_made_in_inference_mode(url: str) -> None:
    """Threads that are not in that mode copy into them."""
    saved = state_dict(1.0)
    dcp.save(saved, storage_writer=BlobStorageWriter(url, credential=False), no_dist=True)
    with torch.inference_mode():
        found = state_dict(0.0)
        dcp.load(found, storage_reader=BlobStorageReader(url, credential=False), no_dist=True)
    assert same(found, saved)


class Harmful:
    def __reduce__(self) -> Any:
        return print, ("this must not be called",)


def test_weights_only_refuses_entries_before_the_planner_unpickles_them(
    url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    dcp.save(
        {"x": torch.ones(3), "bad": Harmful()}, storage_writer=BlobStorageWriter(url, credential=False), no_dist=True
    )
    reader = BlobStorageReader(url, credential=False, weights_only=True)
    with pytest.raises(dcp.CheckpointException, match=r"'bad' holds more than weights_only=True admits"):
        dcp.load({"x": torch.zeros(3), "bad": None}, storage_reader=reader, no_dist=True)
    assert "must not" not in capsys.readouterr().out


def test_weights_only_loads_what_is_harmless(url: str) -> None:
    saved = state_dict(1.0)
    dcp.save(saved, storage_writer=BlobStorageWriter(url, credential=False), no_dist=True)
    found = state_dict(0.0)
    reader = BlobStorageReader(url, credential=False, weights_only=True)
    dcp.load(found, storage_reader=reader, no_dist=True)
    assert same(found, saved)


def test_staging_memory_that_cannot_be_allocated_is_an_error_and_no_hang(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bytes of the budget are given back, so the next load works."""
    saved = state_dict(1.0)
    dcp.save(saved, storage_writer=BlobStorageWriter(url, credential=False), no_dist=True)
    transfer = TransferConfig(memory_limit=8 << 20)

    def fail(_self: Any, _size: int) -> memoryview:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr("azstoragetorch._engine.budget.BufferPool.take", fail)
        with pytest.raises(dcp.CheckpointException, match="no memory for the"):
            load_into(state_dict(0.0), url, transfer)
    found = state_dict(0.0)
    load_into(found, url, transfer)
    assert same(found, saved)


def load_into(state: dict[str, Any], url: str, transfer: TransferConfig) -> None:
    reader = BlobStorageReader(url, credential=False, transfer=transfer)
    dcp.load(state, storage_reader=reader, no_dist=True)
