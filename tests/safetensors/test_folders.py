"""Folders of files: with an index and without one, saved all or nothing, hostile, iterated over, loaded into memory."""

from __future__ import annotations

import json
import pickle
import re
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import nn

from azstoragetorch._engine.threads import engine_for
from azstoragetorch.exceptions import BlobChangedError, SafetensorsError
from azstoragetorch.safetensors import (
    _save_folder,
    iter_tensors,
    load_file,
    load_into,
    load_model_folder,
    safe_open,
    save_file,
    save_folder,
    snapshot,
)
from tests.azurite.container import Container
from tests.faults import FaultService, Fine, Hold, Match, Status
from tests.safetensors.models import bits, entry, filled, raw, same
from tests.support import QUICK, interrupted_once

INDEX = "model.safetensors.index.json"
TENSORS = {f"layers.{number}.weight": filled(torch.float32, (40, 50), number) for number in range(6)}
HALVES = dict(list(TENSORS.items())[:3]), dict(list(TENSORS.items())[3:])


def put(service: FaultService, files: dict[str, Any], index: Any = None, name: str = INDEX) -> None:
    for path, content in files.items():
        data = content if isinstance(content, bytes) else safetensors.torch.save(content)
        service.put("models", f"llm/{path}", data)
    if index is not None:
        service.put("models", f"llm/{name}", index if isinstance(index, bytes) else json.dumps(index).encode())
    service.reset_log()


def weight_map(files: dict[str, dict[str, Any]]) -> dict[str, Any]:
    return {"weight_map": {name: path for path, tensors in files.items() for name in tensors}}


FILES = {"model-00001-of-00002.safetensors": HALVES[0], "model-00002-of-00002.safetensors": HALVES[1]}


def load(url: str, **options: Any) -> dict[str, torch.Tensor]:
    return load_model_folder(url, credential=False, transfer=QUICK, **options)


class TestFinding:
    def test_by_the_index(self, service: FaultService, url: str) -> None:
        put(service, {**FILES, "other.safetensors": {"other": torch.zeros(1)}}, weight_map(FILES))
        same(load(url), TENSORS)
        same(load(f"{url}/{INDEX}"), TENSORS)
        same(load(f"{url}/"), TENSORS)

    def test_only_the_files_of_the_wanted_tensors_are_opened(self, service: FaultService, url: str) -> None:
        put(service, FILES, weight_map(FILES))
        name = next(iter(HALVES[1]))
        same(load(url, names=[name]), {name: TENSORS[name]})
        assert not service.requests(path="00001-of")
        with pytest.raises(SafetensorsError, match="no tensor 'more'"):
            load(url, names=[name, "more"])

    def test_by_the_names_of_the_files(self, service: FaultService, url: str) -> None:
        put(service, {**FILES, "below/other.safetensors": TENSORS, "config.json": b"{}"})
        same(load(url), TENSORS)

    def test_one_file_before_others(self, service: FaultService, url: str) -> None:
        """As in Hugging Face's libraries; files beside it are of a save in progress, or of another format."""
        put(service, {"model.safetensors": TENSORS, **dict(list(FILES.items())[:1])})
        same(load(url), TENSORS)

    def test_in_few_round_trips(self, service: FaultService, url: str) -> None:
        put(service, FILES, weight_map(FILES))
        same(load_model_folder(url, credential=False), TENSORS)
        counts = [len(service.requests(kind)) for kind in ("list_blobs", "get_blob")]
        assert counts == [1, 3], "index, and each file at once: they are small"

    def test_without_the_permission_to_list(self, service: FaultService, url: str) -> None:
        put(service, FILES, weight_map(FILES))
        service.script("list_blobs", [Status(403)], repeat=True)
        same(load(url), TENSORS)

    def test_through_azurite(self, container: Container) -> None:
        url = container.blob_url("llm")
        names = save_folder(TENSORS, url, max_shard_size=20_000, credential=container.key)
        assert len(names) == 3
        same(load_model_folder(url, credential=container.key), TENSORS)
        same(dict(iter_tensors(url, credential=container.key)), TENSORS)


def other(files: dict[str, Any], index: Any = None, **more: Any) -> Callable[[FaultService], None]:
    return lambda service: put(service, files, index, **more)


BAD: dict[str, tuple[Callable[[FaultService], None], str]] = {
    "nothing": (lambda service: None, "neither an index nor a file"),
    "a missing file": (other(dict(list(FILES.items())[:1]), weight_map(FILES)), "00002.safetensors is missing"),
    "a missing tensor": (
        other({**FILES, "model-00001-of-00002.safetensors": {"x": torch.zeros(1)}}, weight_map(FILES)),
        "no tensor 'layers.0.weight', which model.safetensors.index.json",
    ),
    "an unfinished save": (other(dict(list(FILES.items())[:1])), "1 of the 2 files"),
    "the same tensor in two files": (other({"a.safetensors": TENSORS, "b.safetensors": TENSORS}), "not of one model"),
    "an index that is not JSON": (other(FILES, b"{"), "not a valid index"),
    "a deep index": (other(FILES, b"[" * 100_000), "not a valid index"),
    "an index without a map": (other(FILES, {"weights": {}}), "not a valid index"),
    "a map of numbers": (other(FILES, {"weight_map": {"a": 1}}), "not a valid index"),
    "a file elsewhere": (other(FILES, {"weight_map": {"a": "../secret/model.safetensors"}}), "not a safetensors file"),
    "a file at an absolute path": (other(FILES, {"weight_map": {"a": "/model.safetensors"}}), "not a safetensors file"),
    "a file that is a URL": (
        other(FILES, {"weight_map": {"a": "https://example.com/model.safetensors"}}),
        "not a safetensors file",
    ),
    "a file of another kind": (other(FILES, {"weight_map": {"a": "pytorch_model.bin"}}), "not a safetensors file"),
    "a broken file": (other({**FILES, "model-00002-of-00002.safetensors": b"x"}, weight_map(FILES)), "only 1 bytes"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_a_folder_that_is_not_a_model_is_refused_with_the_reason(service: FaultService, url: str, case: str) -> None:
    make, reason = BAD[case]
    make(service)
    with pytest.raises(SafetensorsError, match=re.escape(reason)) as caught:
        load(url)
    assert "/models/llm" in str(caught.value)
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


def test_a_folder_with_two_indexes(service: FaultService, url: str) -> None:
    put(service, FILES, weight_map(FILES))
    put(service, {}, weight_map(FILES), name="diffusion_model.safetensors.index.json")
    with pytest.raises(SafetensorsError, match=r"2 indexes.*Pass the URL of one"):
        load(url)
    same(load(f"{url}/{INDEX}"), TENSORS)
    put(service, {}, weight_map(FILES), name=INDEX)


def test_an_index_that_is_too_large_is_not_read(service: FaultService, url: str) -> None:
    put(service, FILES, b" " * ((64 << 20) + 1))
    with pytest.raises(SafetensorsError, match="at most"):
        load(url)
    assert sum(request.sent for request in service.requests(path=INDEX)) <= 2 * QUICK.part_size


def test_a_file_that_is_overwritten_during_a_load(service: FaultService, url: str) -> None:
    """After its header was read."""
    large = {"a": filled(torch.float32, (400, 300))}
    put(service, {"model.safetensors": large})
    opened = safe_open(f"{url}/model.safetensors", credential=False, transfer=QUICK)
    put(service, {"model.safetensors": {"a": large["a"] * 0}})
    with pytest.raises(BlobChangedError):
        opened.get_tensors()


class TestSaving:
    def test_several_files_as_transformers_expects_them(self, service: FaultService, url: str) -> None:
        names = save_folder(TENSORS, url, max_shard_size="20KB", credential=False)
        assert names == [f"model-0000{number}-of-00003.safetensors" for number in (1, 2, 3)]
        index = json.loads(service.get("models", f"llm/{INDEX}"))
        assert index["metadata"] == {"total_size": 6 * 40 * 50 * 4}
        found: dict[str, torch.Tensor] = {}
        for name in names:
            data = service.get("models", f"llm/{name}")
            tensors = safetensors.torch.load(data)
            assert all(index["weight_map"][key] == name for key in tensors)
            found |= tensors
            assert b'"format":"pt"' in data
        same(found, TENSORS)
        assert service.requests("put_blob")[-1].blob == f"llm/{INDEX}"

    def test_one_file_has_no_index(self, service: FaultService, url: str) -> None:
        assert save_folder(TENSORS, url, credential=False) == ["model.safetensors"]
        assert service.names("models") == ["llm/model.safetensors"]
        same(load(url), TENSORS)

    @pytest.mark.parametrize("before", ["20KB", "5GB"])
    @pytest.mark.parametrize("after", ["20KB", "5GB"])
    def test_a_model_is_replaced_at_once(self, service: FaultService, url: str, before: str, after: str) -> None:
        """Files that it replaces are deleted; other blobs stay."""
        service.put("models", "llm/config.json", b"{}")
        service.put("models", "llm/adapter.safetensors", safetensors.torch.save({"a": torch.zeros(1)}))
        old = {name: tensor * 0 for name, tensor in TENSORS.items()}
        save_folder(old, url, max_shard_size=before, credential=False)
        names = save_folder(TENSORS, url, max_shard_size=after, credential=False)
        same(load(url), TENSORS)
        left = {name.removeprefix("llm/") for name in service.names("models")}
        index = {INDEX} if before == "20KB" or after == "20KB" else set()
        assert left == {"config.json", "adapter.safetensors", *names} | index

    def test_a_save_that_fails_at_any_request_leaves_the_old_model(self, service: FaultService, url: str) -> None:
        old = {name: tensor * 0 for name, tensor in TENSORS.items()}
        save_folder(old, url, max_shard_size="20KB", credential=False)
        for number in range(4):
            service.script("put_blob", [*[Fine()] * number, Status(403)])
            with pytest.raises(Exception, match="403"):
                save_folder(TENSORS, url, max_shard_size="20KB", credential=False, transfer=QUICK)
            service.clear_script()
            same(load(url), old)
            assert len(service.names("models")) == 4, "what the failed save wrote is deleted"

    def test_an_interrupted_first_save_is_not_a_model(self, service: FaultService, url: str) -> None:
        gate = threading.Event()
        service.script(Match("put_blob", path="00003-of"), [Hold(gate)])
        with pytest.raises(KeyboardInterrupt), interrupted_once(lambda: bool(service.requests(path="00003-of"))):
            save_folder(TENSORS, url, max_shard_size="20KB", credential=False)
        gate.set()
        with pytest.raises(SafetensorsError):
            load(url)

    def test_a_save_by_another_in_the_meantime(
        self, service: FaultService, url: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        old = {name: tensor * 0 for name, tensor in TENSORS.items()}
        save_folder(old, url, max_shard_size="20KB", credential=False)
        theirs = json.dumps(weight_map({"theirs.safetensors": TENSORS})).encode()

        write = _save_folder.write_file

        def write_late(*arguments: Any, **options: Any) -> None:
            put(service, {"theirs.safetensors": TENSORS}, theirs)
            write(*arguments, **options)

        monkeypatch.setattr(_save_folder, "write_file", write_late)
        with pytest.raises(SafetensorsError, match="another save"):
            save_folder(old, url, max_shard_size="20KB", credential=False)
        same(load(url), TENSORS)

    def test_overwrite_false(self, service: FaultService, url: str) -> None:
        save_folder(TENSORS, url, overwrite=False, credential=False)
        before = service.get("models", "llm/model.safetensors")
        service.reset_log()
        with pytest.raises(SafetensorsError, match="overwrite=False"):
            save_folder({"a": torch.zeros(1)}, url, overwrite=False, credential=False)
        assert service.get("models", "llm/model.safetensors") == before
        assert [request.method for request in service.requests()] == ["GET"]

    def test_a_module_with_tied_weights(self, service: FaultService, url: str) -> None:
        model = nn.Sequential(nn.Embedding(10, 4), nn.Linear(4, 10, bias=False))
        model[1].weight = model[0].weight
        save_folder(model, url, credential=False)
        assert list(load(url)) == ["0.weight"]
        loaded = nn.Sequential(nn.Embedding(10, 4), nn.Linear(4, 10, bias=False))
        loaded[1].weight = loaded[0].weight
        assert load_into(loaded, url, credential=False) == ([], [])
        assert torch.equal(loaded[1].weight, model[0].weight)

    def test_an_empty_model(self, service: FaultService, url: str) -> None:
        save_folder({}, url, credential=False)
        assert load(url) == {}

    @pytest.mark.parametrize("size", ["5", "x", "0B", -1, 0, True, None, 1.5])
    def test_a_size_that_is_not_one(self, url: str, size: Any) -> None:
        with pytest.raises(ValueError, match="max_shard_size"):
            save_folder({}, url, max_shard_size=size, credential=False)


class TestIterating:
    def test_everything_once(self, service: FaultService, url: str) -> None:
        put(service, FILES, weight_map(FILES))
        same(dict(iter_tensors(url, credential=False, transfer=QUICK)), TENSORS)
        name = next(iter(TENSORS))
        ((found, tensor),) = iter_tensors(url, [name], dtype=torch.float64, shard=(0, 1, 2), credential=False)
        assert found == name
        assert bits(tensor) == bits(TENSORS[name][20:].double())

    def test_what_arrives_first_is_next(self, service: FaultService, url: str) -> None:
        """A request that hangs does not hold up those after it."""
        large = {name: filled(torch.float32, (100, 200), number) for number, name in enumerate("abcd")}
        put(service, {"model.safetensors": large})
        gate = threading.Event()
        first = iter_tensors(url, credential=False, transfer=replace(QUICK, memory_limit=1 << 20))
        service.script(Match("get_blob", where=lambda request: (request.range or (0,))[0] < 80_000), [Hold(gate)])
        names = [next(first)[0] for _ in range(2)]
        assert "a" not in names
        gate.set()
        assert {*names, *(name for name, _ in first)} == set("abcd")

    def test_a_request_that_hangs_on_the_only_free_thread(self, service: FaultService, url: str) -> None:
        large = {name: filled(torch.float32, (100, 200), number) for number, name in enumerate("abcd")}
        put(service, {"model.safetensors": large})
        gate = threading.Event()
        transfer = replace(QUICK, max_connections=5, memory_limit=3 << 20)  # an engine that no other test uses
        first = iter_tensors(url, credential=False, transfer=transfer)
        for _ in range(4):
            engine_for(transfer).submit(gate.wait)
        service.script(Match("get_blob", where=lambda request: (request.range or (0,))[0] < 80_000), [Hold(gate)])
        try:
            assert next(first)[0] != "a"
        finally:
            gate.set()
        assert len(list(first)) == 3

    def test_memory_in_flight_is_bounded(self, service: FaultService, url: str) -> None:
        large = {str(number): filled(torch.uint8, (60_000,), number) for number in range(40)}
        put(service, {"model.safetensors": large})
        found = iter_tensors(url, credential=False, transfer=replace(QUICK, max_concurrency=2))
        next(found)
        service.wait_until_idle()
        assert sum(request.sent for request in service.requests("get_blob")) <= 6 * 64 * 1024
        found.close()  # type: ignore[attr-defined]

    def test_a_tensor_larger_than_the_limit(self, service: FaultService, url: str) -> None:
        large = {"a": filled(torch.uint8, (3 << 20,)), "b": filled(torch.uint8, (2 << 20,), 1), "c": torch.zeros(1)}
        put(service, {"model.safetensors": large})
        same(dict(iter_tensors(url, credential=False, transfer=QUICK)), large)

    def test_an_error_is_raised_where_it_belongs(self, service: FaultService, url: str) -> None:
        put(service, {"model.safetensors": {"a": filled(torch.float32, (400, 300))}})
        found = iter_tensors(url, credential=False, transfer=QUICK)
        put(service, {"model.safetensors": {"a": torch.zeros(400, 300)}})
        with pytest.raises(BlobChangedError):
            list(found)

    def test_names_are_checked_at_once(self, service: FaultService, url: str) -> None:
        put(service, FILES)
        with pytest.raises(SafetensorsError, match="no tensor 'x'"):
            iter_tensors(url, ["x"], credential=False)


class Net(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.first = nn.Linear(20, 30, **options)
        self.norm = nn.BatchNorm1d(30, **options)


class TestLoadingIntoMemory:
    def test_a_module(self, service: FaultService, url: str) -> None:
        model, other = Net(), Net()
        save_folder(model, url, credential=False)
        pointers = [tensor.data_ptr() for tensor in other.state_dict().values()]
        assert load_into(other, url, credential=False) == ([], [])
        same(other.state_dict(), model.state_dict())
        assert [tensor.data_ptr() for tensor in other.state_dict().values()] == pointers
        assert other.first.weight.requires_grad

    def test_a_state_dict_of_views_and_other_layouts(self, service: FaultService, url: str) -> None:
        put(service, {"model.safetensors": TENSORS})
        state = {name: torch.zeros(50, 40).t() for name in TENSORS}
        load_into(state, url, credential=False, transfer=QUICK)
        same(state, TENSORS)

    def test_in_inference_mode(self, service: FaultService, url: str) -> None:
        put(service, {"model.safetensors": TENSORS})
        with torch.inference_mode():
            state = {name: torch.zeros(50, 40).t() for name in TENSORS}
            load_into(state, url, credential=False, transfer=QUICK)
        same(state, TENSORS)

    def test_another_type_only_if_it_may_be_converted(self, service: FaultService, url: str) -> None:
        save_folder({"a": torch.arange(6.0)}, url, credential=False)
        state = {"a": torch.zeros(6, dtype=torch.bfloat16)}
        with pytest.raises(SafetensorsError, match=r"'a'.*float32.*bfloat16; pass cast=True"):
            load_into(state, url, credential=False)
        load_into(state, url, cast=True, credential=False)
        assert state["a"].tolist() == list(range(6))
        with pytest.raises(SafetensorsError, match="cannot take"):
            load_into({"a": torch.zeros(6, dtype=torch.int32)}, url, cast=True, credential=False)

    @pytest.mark.parametrize(
        ("state", "reason"),
        [
            ({"a": torch.zeros(5)}, "shape [6], and the target [5]"),
            ({"a": torch.zeros(6, device="meta")}, "to_empty"),
            ({"a": torch.zeros(6).to_sparse()}, "dense"),
            ({}, "unexpected in the target: 'a'"),
            ({"a": torch.zeros(6), "b": torch.zeros(1)}, "missing in the blobs: 'b'"),
        ],
        ids=["shape", "meta", "sparse", "unexpected", "missing"],
    )
    def test_what_does_not_match_is_an_error_before_anything_is_written(
        self, service: FaultService, url: str, state: dict[str, torch.Tensor], reason: str
    ) -> None:
        save_folder({"a": torch.ones(6)}, url, credential=False)
        with pytest.raises(SafetensorsError, match=re.escape(reason)):
            load_into(state, url, credential=False)
        assert not any(tensor.any() for tensor in state.values() if not (tensor.is_meta or tensor.is_sparse))

    def test_not_strict(self, service: FaultService, url: str) -> None:
        save_folder({"a": torch.ones(6), "c": torch.ones(1)}, url, credential=False)
        state = {"a": torch.zeros(6), "b": torch.zeros(1)}
        keys = load_into(state, url, strict=False, credential=False)
        assert (keys.missing_keys, keys.unexpected_keys) == (["b"], ["c"])
        assert state["a"].sum() == 6

    def test_a_shard(self, service: FaultService, url: str) -> None:
        put(service, {"model.safetensors": TENSORS})
        state = {name: torch.zeros(40, 25) for name in TENSORS}
        load_into(state, url, shard=(1, 1, 2), credential=False, transfer=QUICK)
        same(state, {name: tensor[:, 25:] for name, tensor in TENSORS.items()})


def test_a_file_by_its_url(service: FaultService) -> None:
    url = service.blob_url("models", "one.safetensors")
    save_file(TENSORS, url, credential=False)
    same(dict(iter_tensors(url, credential=False)), TENSORS)
    state = {name: torch.zeros(40, 50) for name in TENSORS}
    load_into(state, url, credential=False)
    same(state, load_file(url, credential=False))


def test_a_tensor_of_a_type_that_torch_lacks_does_not_hinder_others(service: FaultService, url: str) -> None:
    put(service, {"model.safetensors": raw({"a": entry("F6_E2M3", [4], 0, 3), "b": entry("U8", [1], 3, 4)}, bytes(4))})
    assert list(load(url, names=["b"])) == ["b"]


class TestSnapshot:
    def test_all_but_the_weights(self, service: FaultService, url: str, tmp_path: Path) -> None:
        put(service, {**FILES, "config.json": b"{}", "tokenizer/vocab.txt": b"a", "model.bin": b"x", "empty": b""})
        assert snapshot(url, tmp_path / "local", credential=False) == tmp_path / "local"
        found = {
            str(path.relative_to(tmp_path / "local")): path.read_bytes()
            for path in (tmp_path / "local").rglob("*")
            if path.is_file()
        }
        assert found == {"config.json": b"{}", "tokenizer/vocab.txt": b"a", "empty": b""}
        snapshot(url, tmp_path / "all", ignore=(), credential=False)
        assert (tmp_path / "all/model.bin").read_bytes() == b"x"

    @pytest.mark.parametrize("name", ["../outside", "a/../../outside", "a\\b", "a:b"])
    def test_a_name_that_leads_elsewhere(self, service: FaultService, url: str, tmp_path: Path, name: str) -> None:
        service.put("models", f"llm/{name}", b"x")
        with pytest.raises((SafetensorsError, ValueError)):
            snapshot(url, tmp_path / "local", credential=False)
        assert not (tmp_path / "outside").exists()

    def test_a_link_to_another_folder_is_not_followed(self, service: FaultService, url: str, tmp_path: Path) -> None:
        put(service, {"a/config.json": b"{}"})
        (tmp_path / "local").mkdir()
        (tmp_path / "other").mkdir()
        (tmp_path / "local/a").symlink_to(tmp_path / "other")
        with pytest.raises(Exception, match="link"):
            snapshot(url, tmp_path / "local", credential=False)
        assert not list((tmp_path / "other").iterdir())

    def test_a_folder_without_blobs(self, service: FaultService, url: str, tmp_path: Path) -> None:
        with pytest.raises(SafetensorsError, match="no blobs"):
            snapshot(url, tmp_path / "local", credential=False)
