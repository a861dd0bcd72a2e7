"""``safetensors``: list, show, and convert models."""

from __future__ import annotations

import io
from typing import Any

import pytest
import safetensors.torch
import torch
import torch.distributed.checkpoint as dcp

from azstoragetorch.checkpoint import BlobStorageWriter, load_keys
from azstoragetorch.safetensors import load_model_folder, save_folder
from tests.azurite.container import Container
from tests.cli.conftest import Command
from tests.safetensors.models import filled, same

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is")
TENSORS = {
    "a.weight": filled(torch.float32, (40, 30)),
    "a.bias": filled(torch.bfloat16, (40,), 1),
    "empty": torch.empty(0, 3),
    "narrow": filled(torch.float8_e5m2, (7, 5), 2),
    "step": torch.tensor(3),
}


@pytest.fixture
def model(container: Container) -> str:
    url = f"{container.url}/model"
    save_folder(TENSORS, url, max_shard_size=3000, credential=container.key)
    return url


def test_ls(model: str, command: Command) -> None:
    *files, summary = command("safetensors", "ls", model, "--json").records
    assert [file["file"] for file in files] == ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    total = sum(tensor.nbytes for tensor in TENSORS.values())
    assert summary["summary"] == {"url": model, "files": 2, "tensors": 5, "bytes": total}
    assert "model-00001-of-00002.safetensors" in command("safetensors", "ls", "-H", model).out


def test_inspect(model: str, command: Command) -> None:
    *rows, summary = command("safetensors", "inspect", model, "--json").records
    found = {row["name"]: (row["type"], row["shape"], row["bytes"]) for row in rows}
    assert found["a.weight"] == ("F32", [40, 30], 4800)
    assert found["narrow"] == ("F8_E5M2", [7, 5], 35)
    assert summary["summary"]["metadata"] == {"format": "pt"}
    assert "40x30" in command("safetensors", "inspect", model).out
    assert command("safetensors", "inspect", f"{model}/{rows[0]['file']}").code == 0


def test_from_a_checkpoint_and_back(container: Container, command: Command) -> None:
    url, other = f"{container.url}/checkpoint", f"{container.url}/converted"
    state = {"model": TENSORS, "epoch": 3}
    dcp.save(state, storage_writer=BlobStorageWriter(url, credential=container.key), no_dist=True)
    refused = command("safetensors", "convert", url, other)
    assert refused.code != 0
    assert "'epoch' cannot be stored in safetensors files" in refused.err
    assert command("safetensors", "convert", url, other, "--only-tensors", "--max-shard-size", "3KB").code == 0
    expected = {f"model.{name}": tensor for name, tensor in TENSORS.items()}
    same(load_model_folder(other, credential=container.key), expected)
    assert command("safetensors", "convert", other, f"{url}-2", "--to", "checkpoint").code == 0
    same(load_keys(f"{url}-2", credential=container.key), expected)
    again = command("safetensors", "convert", url, other, "--only-tensors")
    assert again.code != 0
    assert "overwrite=False" in again.err
    assert command("safetensors", "convert", url, other, "--only-tensors", "--overwrite").code == 0
    same(load_model_folder(other, credential=container.key), expected)


def test_from_a_blob_of_torch_save_and_back(container: Container, command: Command) -> None:
    base = filled(torch.float32, (20, 30))
    state: dict[str, Any] = {"model": {**TENSORS, "view": base[3:5], "transposed": base.t(), "same": base}, "lr": 0.1}
    buffer = io.BytesIO()
    torch.save(state, buffer)
    container.put("run/model.pt", buffer.getvalue())
    source, target = f"{container.url}/run/model.pt", f"{container.url}/folder"
    assert "'lr' cannot be stored" in command("safetensors", "convert", source, target).err
    assert command("safetensors", "convert", source, target, "--only-tensors").code == 0
    expected = {f"model.{name}": tensor.contiguous() for name, tensor in state["model"].items()}
    same(load_model_folder(target, credential=container.key), expected)
    same(safetensors.torch.load(container.get("folder/model.safetensors")), expected)
    assert command("safetensors", "convert", target, f"{container.url}/back.pt").code == 0
    same(torch.load(io.BytesIO(container.get("back.pt")), weights_only=True), expected)


@pytest.mark.parametrize("content", [b"", b"nothing", b"\x80\x02]q\x00."], ids=["empty", "text", "a pickle"])
def test_a_blob_that_torch_save_did_not_write(container: Container, command: Command, content: bytes) -> None:
    container.put("model.pt", content)
    ended = command("safetensors", "convert", f"{container.url}/model.pt", f"{container.url}/folder")
    assert ended.code == 1
    assert "is not a file that torch.save wrote" in ended.err
    assert container.names() == ["model.pt"]


def test_a_pickle_with_code_is_not_run(container: Container, command: Command) -> None:
    class Hostile:
        def __reduce__(self) -> Any:
            return print, ("run",)

    buffer = io.BytesIO()
    torch.save({"a": Hostile()}, buffer)
    container.put("model.pt", buffer.getvalue())
    ended = command("safetensors", "convert", f"{container.url}/model.pt", f"{container.url}/folder")
    assert ended.code == 1
    assert "weights_only=True admits" in ended.err
    assert "run" not in ended.out


def test_what_is_not_converted(model: str, command: Command) -> None:
    assert command("safetensors", "convert", model, f"{model}-2").code == 2
    assert command("safetensors", "convert", model, "http://127.0.0.1:1/other/c/model.pt").code == 2


def test_with_a_sas_in_both_urls(container: Container, model: str, command: Command) -> None:
    sas = container.sas()
    assert command("safetensors", "convert", f"{model}?{sas}", f"{container.url}/model.pt?{sas}").code == 0
    same(torch.load(io.BytesIO(container.get("model.pt")), weights_only=True), TENSORS)


def test_no_error_shows_a_sas(container: Container) -> None:
    from azstoragetorch.exceptions import SafetensorsError
    from azstoragetorch.safetensors import checkpoint_to_safetensors, torch_save_to_safetensors

    sas = container.sas()
    buffer = io.BytesIO()
    torch.save({"lr": 0.1}, buffer)
    container.put("model.pt", buffer.getvalue())
    url = f"{container.url}/checkpoint"
    dcp.save({"epoch": 3}, storage_writer=BlobStorageWriter(url, credential=container.key), no_dist=True)
    for convert, source in ((torch_save_to_safetensors, f"{container.url}/model.pt"), (checkpoint_to_safetensors, url)):
        with pytest.raises(SafetensorsError, match="cannot be stored") as caught:
            convert(f"{source}?{sas}", f"{container.url}/folder?{sas}")
        assert caught.value.url == source
        assert "sig" not in str(caught.value)
