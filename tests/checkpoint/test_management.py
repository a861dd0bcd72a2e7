"""Find, inspect, convert and remove checkpoints."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from azure.core.exceptions import ClientAuthenticationError, ResourceNotFoundError

from azstoragetorch.checkpoint import (
    BlobStorageReader,
    BlobStorageWriter,
    checkpoint_to_torch_save,
    clean,
    delete_checkpoint,
    inspect_checkpoint,
    keep_last,
    latest_checkpoint,
    list_checkpoints,
    load_keys,
    torch_save_to_checkpoint,
)
from azstoragetorch.exceptions import CheckpointError, CheckpointNotFoundError
from tests.azurite.container import Container
from tests.checkpoint.states import blank, load, rich_state, same, save
from tests.faults import FaultService


@pytest.fixture
def base(container: Container) -> str:
    return container.blob_url("runs/a b")


def put(container: Container, url: str, value: float = 1.0) -> None:
    save({"x": torch.full((3,), value)}, BlobStorageWriter(url, credential=container.key))


def steps(urls: list[str]) -> list[str]:
    return [url.rpartition("/")[2] for url in urls]


def test_the_latest_is_by_number_and_complete(container: Container, base: str) -> None:
    key = container.key
    assert latest_checkpoint(base, credential=key) is None
    assert list_checkpoints(base, credential=key) == []
    for name in ("step-900", "step-1000", "step-50", "final"):
        put(container, f"{base}/{name}")
    container.put("runs/a b/step-2000/__0_0.20260101000000-0123456789abcdef.distcp", b"interrupted")
    container.put("runs/a b/notes.txt", b"no folder")
    found = list_checkpoints(base, credential=key)
    assert [name for name in steps(found) if name.startswith("step")] == ["step-50", "step-900", "step-1000"]
    container.client.delete_blob("runs/a b/final/.metadata")
    assert latest_checkpoint(base, credential=key) == f"{base}/step-1000"
    assert latest_checkpoint(f"{base}/?{container.sas('rl')}") == f"{base}/step-1000"
    load({"x": torch.zeros(3)}, BlobStorageReader(f"{base}/step-1000", credential=key))


def test_the_latest_of_many_takes_few_requests(fault_service: FaultService) -> None:
    fault_service.create_container("c")
    for step in range(500):
        fault_service.put("c", f"run/step-{step}/.metadata", b"")
    fault_service.put("c", "run/step-500/__0_0.20260101000000-0123456789abcdef.distcp", b"under way")
    base = f"{fault_service.container_url('c')}/run"
    assert latest_checkpoint(base, credential=False) == f"{base}/step-499"
    assert [request.operation for request in fault_service.requests()] == ["list_blobs", "head", "head"]


def test_checkpoints_in_the_container_itself(container: Container) -> None:
    put(container, f"{container.url}/1")
    put(container, f"{container.url}/2")
    assert latest_checkpoint(container.url, credential=container.key) == f"{container.url}/2"
    save({"x": torch.ones(3)}, BlobStorageWriter(container.url, credential=container.key))
    assert load({"x": torch.zeros(3)}, BlobStorageReader(container.url, credential=container.key))["x"].sum() == 3


def test_keep_last_deletes_whole_checkpoints_and_nothing_else(container: Container, base: str) -> None:
    for step in (1, 2, 10, 20):
        put(container, f"{base}/{step}")
    container.put("runs/a b/1/readme", b"mine")
    container.put("runs/a b/30/__0_0.20260101000000-0123456789abcdef.distcp", b"under way")
    deleted = keep_last(base, 2, credential=container.key)
    assert steps(deleted) == ["1", "2"]
    assert steps(list_checkpoints(base, credential=container.key)) == ["10", "20"]
    left = container.names()
    assert "runs/a b/1/readme" in left
    assert any("/30/" in name for name in left)
    assert not [name for name in left if "/1/" in name and name.endswith("distcp")]
    for wrong in (0, -1):
        with pytest.raises(ValueError, match="count"):
            keep_last(base, wrong, credential=container.key)


def test_deleting_takes_the_metadata_first(container: Container, base: str, monkeypatch: pytest.MonkeyPatch) -> None:
    put(container, f"{base}/1")
    put(container, f"{base}/1/nested")
    container.put("runs/a b/1/other", b"x")
    assert delete_checkpoint(f"{base}/1", credential=container.key) == 2
    assert {name for name in container.names() if "nested" not in name} == {"runs/a b/1/other"}
    assert delete_checkpoint(f"{base}/1", credential=container.key) == 0
    assert load({"x": torch.zeros(3)}, BlobStorageReader(f"{base}/1/nested", credential=container.key))["x"].sum() == 3


def test_deleting_what_torch_wrote_and_what_cannot_be_read(container: Container, base: str, tmp_path: Any) -> None:
    save({"x": torch.ones(3)}, dcp.FileSystemWriter(tmp_path))
    for path in tmp_path.iterdir():
        container.put(f"runs/a b/s/{path.name}", path.read_bytes())
    assert delete_checkpoint(f"{base}/s", credential=container.key) == 2
    assert container.names() == []
    put(container, f"{base}/t")
    container.put("runs/a b/t/.metadata", b"rubbish")
    assert delete_checkpoint(f"{base}/t", credential=container.key) == 2


def test_cleaning_removes_orphans_below_and_only_them(container: Container, base: str) -> None:
    put(container, f"{base}/1")
    good = set(container.names())
    orphans = {
        "runs/a b/1/__0_0.20200101000000-0123456789abcdef.distcp",
        "runs/a b/2/__3_1.20200101000000-0123456789abcdef.distcp",
    }
    others = {"runs/a b/1/__0_0.distcp", "runs/a b/1/notes", "elsewhere/__0_0.20200101000000-0123456789abcdef.distcp"}
    for name in orphans | others:
        container.put(name, b"x")
    young = "runs/a b/1/__0_0.29990101000000-0123456789abcdef.distcp"
    container.put(young, b"x")
    assert clean(base, min_age=3600, credential=container.key) == [container.blob_url(name) for name in sorted(orphans)]
    assert set(container.names()) == good | others | {young}


def test_cleaning_stops_before_metadata_that_it_cannot_read(container: Container, base: str) -> None:
    put(container, f"{base}/1")
    container.put("runs/a b/1/.metadata", b"rubbish")
    before = container.names()
    with pytest.raises(CheckpointError, match="not an intact pickle"):
        clean(base, min_age=0, credential=container.key)
    assert container.names() == before


def test_cleaning_knows_checkpoints_of_ranks_that_did_not_coordinate(container: Container, base: str) -> None:
    save({"x": torch.ones(3)}, BlobStorageWriter(base, credential=container.key), use_collectives=False)
    assert clean(base, min_age=0, credential=container.key) == []
    assert load({"x": torch.zeros(3)}, BlobStorageReader(base, credential=container.key))["x"].sum() == 3
    assert list_checkpoints(container.blob_url("runs"), credential=container.key) == []


def test_a_summary_reports_keys_types_shapes_and_bytes(container: Container, base: str) -> None:
    save(rich_state(), BlobStorageWriter(base, credential=container.key))
    summary = inspect_checkpoint(base, credential=container.key)
    entries = {entry.key: entry for entry in summary.entries}
    weight = entries["model.weight"]
    assert (weight.dtype, weight.shape, weight.nbytes, weight.shards) == (torch.float32, (300, 200), 240_000, 1)
    assert entries["scalar"].shape == ()
    assert entries["step"].dtype is None
    assert entries["step"].nbytes > 0
    text = str(summary)
    assert text.splitlines()[0] == base
    assert "model.weight" in text
    assert "300x200" in text
    assert f"{summary.nbytes:,} bytes" in text
    assert summary.nbytes == sum(entry.nbytes for entry in summary.entries)


def test_to_one_blob_and_back(container: Container, base: str) -> None:
    key, blob = container.key, container.blob_url("model.pt")
    state = rich_state()
    save(state, BlobStorageWriter(base, credential=key))
    checkpoint_to_torch_save(base, blob, credential=key)
    same(state, torch.load(io.BytesIO(container.get("model.pt")), weights_only=True))
    torch_save_to_checkpoint(blob, f"{base}/again", credential=key)
    same(state, load(blank(state), BlobStorageReader(f"{base}/again", credential=key)))
    same(state, load_keys(f"{base}/again", credential=key))
    with pytest.raises(dcp.CheckpointException, match="overwrite=False"):
        torch_save_to_checkpoint(blob, f"{base}/again", overwrite=False, credential=key)


def test_converting_what_is_not_a_state_dict_or_not_there(container: Container, base: str) -> None:
    stream = io.BytesIO()
    torch.save(torch.ones(3), stream)
    container.put("tensor.pt", stream.getvalue())
    with pytest.raises(TypeError, match="Tensor"):
        torch_save_to_checkpoint(container.blob_url("tensor.pt"), base, credential=container.key)
    with pytest.raises(ResourceNotFoundError):
        torch_save_to_checkpoint(container.blob_url("none.pt"), base, credential=container.key)
    with pytest.raises(CheckpointNotFoundError):
        checkpoint_to_torch_save(base, container.blob_url("model.pt"), credential=container.key)
    assert "model.pt" not in container.names()


@pytest.mark.parametrize("action", [list_checkpoints, latest_checkpoint, delete_checkpoint, clean, inspect_checkpoint])
def test_no_permission_is_said(container: Container, base: str, action: Any) -> None:
    put(container, base)
    with pytest.raises(ClientAuthenticationError):
        action(f"{base}?{container.sas('c')}")


def test_a_save_needs_no_permission_to_list(container: Container, base: str) -> None:
    for value in (1.0, 2.0):
        save({"x": torch.full((3,), value)}, BlobStorageWriter(f"{base}?{container.sas('rwd')}"))
    assert len(container.names()) == 2


@pytest.mark.parametrize("size", [1 << 55, 1 << 62])
def test_absurd_sizes_are_an_error(container: Container, base: str, size: int) -> None:
    from azstoragetorch.checkpoint._format import dump_metadata, load_metadata

    put(container, base)
    metadata = load_metadata(container.get("runs/a b/.metadata"))
    entry: Any = metadata.state_dict_metadata["x"]
    entry.size = torch.Size([size])
    container.put("runs/a b/.metadata", dump_metadata(metadata))
    with pytest.raises(CheckpointError, match="no memory for 'x'"):
        load_keys(base, credential=container.key)


def test_forged_paths_in_the_nested_state_dict_are_refused(container: Container, base: str) -> None:
    from azstoragetorch.checkpoint._format import dump_metadata, load_metadata

    put(container, base)
    metadata = load_metadata(container.get("runs/a b/.metadata"))
    metadata.planner_data = {"x": ("a", 1 << 40)}
    container.put("runs/a b/.metadata", dump_metadata(metadata))
    with pytest.raises(CheckpointError, match="not a path"):
        load_keys(base, credential=container.key)
