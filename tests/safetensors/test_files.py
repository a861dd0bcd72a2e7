"""Files in blobs: bit for bit what the package safetensors reads and writes, of one version, in few requests."""

from __future__ import annotations

import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors
import safetensors.torch
import torch
from azure.core.exceptions import ResourceNotFoundError
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from azstoragetorch import TransferConfig
from azstoragetorch.exceptions import BlobChangedError, FatalBlobIOWriteError, SafetensorsError
from azstoragetorch.safetensors import load_file, safe_open, save_file
from tests.azurite.container import Container
from tests.faults import FaultService, Status
from tests.safetensors.models import bits, entry, filled, models, raw, same
from tests.support import QUICK

KiB, MiB = 1 << 10, 1 << 20
fixed = settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])


def put(service: FaultService, data: bytes, name: str = "model.safetensors") -> str:
    service.put("models", name, data)
    service.reset_log()
    return service.blob_url("models", name)


def received(service: FaultService) -> int:
    return sum(request.sent for request in service.requests("get_blob"))


class TestWhole:
    @fixed
    @given(models())
    def test_bit_for_bit_what_the_package_loads(self, service: FaultService, tensors: Any) -> None:
        data = safetensors.torch.save(tensors)
        same(load_file(put(service, data), credential=False, transfer=QUICK), tensors)

    @fixed
    @given(models())
    def test_byte_for_byte_what_the_package_saves(self, service: FaultService, tensors: Any) -> None:
        save_file(tensors, service.blob_url("models", "saved"), credential=False, transfer=QUICK)
        assert service.get("models", "saved") == safetensors.torch.save(tensors)

    def test_through_azurite(self, container: Container, tmp_path: Path) -> None:
        tensors = {"weight": filled(torch.bfloat16, (300, 200)), "bias": filled(torch.float32, (200,), 1)}
        url = container.blob_url("model.safetensors")
        save_file(tensors, url, {"format": "pt"}, credential=container.key)
        (tmp_path / "model").write_bytes(container.get("model.safetensors"))
        same(safetensors.torch.load_file(tmp_path / "model"), tensors)
        same(load_file(url, credential=container.key), tensors)

    def test_a_large_file_is_loaded_and_saved_in_parts(self, service: FaultService) -> None:
        tensors = {str(number): filled(torch.float32, (100, 150 * number), number) for number in range(5)}
        data = safetensors.torch.save(tensors)
        same(load_file(put(service, data), credential=False, transfer=QUICK), tensors)
        assert received(service) == len(data)
        save_file(tensors, service.blob_url("models", "saved"), credential=False, transfer=QUICK)
        assert service.get("models", "saved") == data

    def test_names_dtype_and_order(self, service: FaultService) -> None:
        tensors = {"half": filled(torch.float16, (3, 4)).nan_to_num(), "index": filled(torch.int16, (5,))}
        url = put(service, safetensors.torch.save(tensors))
        found = load_file(url, names=["index", "half"], dtype=torch.float64, credential=False)
        same(found, {"half": tensors["half"].double(), "index": tensors["index"]})
        assert list(found) == ["half", "index"]
        assert list(load_file(url, names=["index"], credential=False)) == ["index"]
        with pytest.raises(SafetensorsError, match=r"no tensor 'indes'.*did you mean 'index'") as caught:
            load_file(url, names=["indes"], credential=False)
        assert caught.value.tensor == "indes"

    def test_a_device_other_than_the_cpu(self, service: FaultService) -> None:
        """The meta device takes the copies of all bytes, as an accelerator would."""
        url = put(service, safetensors.torch.save({"a": filled(torch.float32, (100, 300))}))
        found = load_file(url, "meta", credential=False, transfer=QUICK)
        assert found["a"].device.type == "meta"


class TestOpen:
    def test_as_the_package_opens_it(self, service: FaultService, tmp_path: Path) -> None:
        tensors = {"b": filled(torch.float32, (4, 5)), "a": filled(torch.int64, (3,)), "none": torch.empty(0, 3)}
        data = safetensors.torch.save(tensors, {"by": "test"})
        (tmp_path / "file").write_bytes(data)
        with (
            safe_open(put(service, data), credential=False) as ours,
            safetensors.safe_open(tmp_path / "file", "pt") as theirs,
        ):
            assert ours.metadata() == theirs.metadata() == {"by": "test"}
            assert sorted(ours.keys()) == sorted(theirs.keys())
            assert ours.keys() == ours.offset_keys() == theirs.offset_keys()
            assert len(ours) == 3
            assert "a" in ours
            for name in tensors:
                part = ours.get_slice(name)
                assert part.get_shape() == theirs.get_slice(name).get_shape()
                assert part.get_dtype() == theirs.get_slice(name).get_dtype()
                assert bits(ours.get_tensor(name)) == bits(theirs.get_tensor(name))
            same(ours.get_tensors(), tensors)
        with pytest.raises(ValueError, match="closed"):
            ours.keys()

    def test_metadata_is_none_without_one(self, service: FaultService) -> None:
        assert safe_open(put(service, safetensors.torch.save({})), credential=False).metadata() is None

    def test_it_can_be_pickled(self, service: FaultService) -> None:
        tensors = {"a": filled(torch.float32, (4, 5))}
        opened = safe_open(put(service, safetensors.torch.save(tensors)), credential=False)
        same(pickle.loads(pickle.dumps(opened)).get_tensors(), tensors)

    def test_the_header_of_an_ordinary_file_takes_one_request(self, service: FaultService) -> None:
        tensors = {f"model.layers.{number}.mlp.weight": filled(torch.int8, (64, 64), number) for number in range(400)}
        url = put(service, safetensors.torch.save(tensors))
        opened = safe_open(url, credential=False)
        assert len(service.requests()) == 1
        opened.get_tensor("model.layers.0.mlp.weight")
        assert len(service.requests()) == 1, "its bytes came with the header"

    def test_a_long_header_takes_two_round_trips(self, service: FaultService) -> None:
        tensors = {f"{'n' * 200}{number}": torch.zeros(1) for number in range(2000)}
        data = safetensors.torch.save(tensors)
        assert safe_open(put(service, data), credential=False).keys()
        assert len(service.requests()) == 2
        same(load_file(put(service, data), credential=False, transfer=replace(QUICK, validate_content=True)), tensors)

    @fixed
    @given(st.data())
    def test_any_index_selects_what_torch_selects(self, service: FaultService, data: st.DataObject) -> None:
        shape = data.draw(st.lists(st.integers(1, 6), min_size=1, max_size=3))
        tensor = filled(torch.int16, tuple(shape))
        step = st.one_of(
            st.integers(-7, 7),
            st.slices(6).filter(lambda cut: (cut.step or 1) > 0),
            st.none(),
            st.just(...),
            st.lists(st.integers(-6, 5), max_size=3),
        )
        index = data.draw(step | st.lists(step, max_size=3).map(tuple))
        part = safe_open(put(service, safetensors.torch.save({"a": tensor})), credential=False).get_slice("a")
        lists = [step for step in (index if isinstance(index, tuple) else (index,)) if isinstance(step, list)]
        try:
            expected = tensor[index]
        except IndexError:
            with pytest.raises(IndexError):
                part[index]
            return
        dots = [step for step in (index if isinstance(index, tuple) else ()) if step is ...]
        if len(dots) > 1 or len(lists) > 1:
            return
        try:
            found = part[index]
        except IndexError:
            assert not expected.numel()  # torch does not check the indices of an empty selection
            return
        assert found.shape == expected.shape
        assert torch.equal(found, expected)

    @pytest.mark.parametrize(
        ("index", "error"),
        [
            (slice(None, None, -1), ValueError),
            ("a", TypeError),
            (True, TypeError),
            (1.0, TypeError),
            ((..., ...), IndexError),
        ],
    )
    def test_an_index_that_is_not_one(self, service: FaultService, index: Any, error: type[Exception]) -> None:
        url = put(service, safetensors.torch.save({"a": torch.zeros(2, 2)}))
        with pytest.raises(error):
            safe_open(url, credential=False).get_slice("a")[index]

    def test_only_the_bytes_of_rows_are_read(self, service: FaultService) -> None:
        tensor = filled(torch.float32, (4096, 256))
        opened = safe_open(put(service, safetensors.torch.save({"a": tensor})), credential=False)
        service.reset_log()
        assert torch.equal(opened.get_slice("a")[3000:3100].view(torch.int32), tensor[3000:3100].view(torch.int32))
        assert received(service) == 100 * 256 * 4
        assert len(service.requests()) == 1


class TestVersions:
    def test_an_overwritten_file_is_an_error(self, service: FaultService) -> None:
        data = safetensors.torch.save({"a": filled(torch.float32, (300, 300)), "b": torch.zeros(300)})
        url = put(service, data)
        opened = safe_open(url, credential=False, transfer=QUICK)
        put(service, safetensors.torch.save({"a": torch.zeros(300, 300), "b": torch.zeros(300)}))
        with pytest.raises(BlobChangedError, match=r"model\.safetensors"):
            opened.get_tensor("a")

    def test_a_file_that_is_gone_is_not_found(self, service: FaultService) -> None:
        with pytest.raises(ResourceNotFoundError):
            load_file(service.blob_url("models", "missing"), credential=False)

    def test_a_failed_save_leaves_the_file_as_it_was(self, service: FaultService) -> None:
        url = put(service, b"before")
        for tensors in ({"a": torch.zeros(10)}, {"a": torch.zeros(100_000)}):
            service.script("put_blob", [Status(403)])
            service.script("put_block_list", [Status(403)])
            with pytest.raises(FatalBlobIOWriteError):
                save_file(tensors, url, credential=False, transfer=QUICK)
            service.clear_script()
            assert service.get("models", "model.safetensors") == b"before"

    @pytest.mark.parametrize(
        "data",
        [b"", b"x", raw(b"{}", length=1 << 50), raw({"a": entry("F32", [1 << 60], 0, 4 << 60)}), b"\x80\x02}q." * 9],
        ids=["empty", "short", "a long header", "a long tensor", "a pickle"],
    )  # fmt: skip
    def test_a_hostile_file_is_refused_after_one_request(self, service: FaultService, data: bytes) -> None:
        with pytest.raises(SafetensorsError, match=r"model\.safetensors"):
            load_file(put(service, data), credential=False)
        assert len(service.requests()) == 1

    def test_a_type_that_torch_does_not_have(self, service: FaultService) -> None:
        url = put(service, raw({"a": entry("F6_E2M3", [4], 0, 3), "b": entry("U8", [1], 3, 4)}, bytes(4)))
        assert safe_open(url, credential=False).get_slice("a").get_dtype() == "F6_E2M3"
        assert bits(load_file(url, names=["b"], credential=False)["b"]) == b"\0"
        with pytest.raises(SafetensorsError, match="'a' has the type F6_E2M3") as caught:
            load_file(url, credential=False)
        assert caught.value.tensor == "a"

    def test_an_empty_tensor_of_an_absurd_shape(self, service: FaultService) -> None:
        url = put(service, raw({"a": entry("F32", [1 << 62, 1 << 62, 0], 0, 0)}))
        with pytest.raises(SafetensorsError, match="'a'"):
            load_file(url, credential=False)


class TestSaving:
    def test_layouts_and_tensors_that_share_memory(self, service: FaultService) -> None:
        base = filled(torch.float32, (40, 30))
        tensors = {
            "whole": base,
            "transposed": base.t(),
            "columns": base[:, 3:7],
            "again": base,
            "parameter": torch.nn.Parameter(base * 0),
            "conjugate": filled(torch.complex64, (3, 4)).nan_to_num().conj(),
            "narrow": filled(torch.float8_e4m3fn, (6, 8))[:, ::2],
            "expanded": torch.ones(1).expand(7),
        }
        save_file(tensors, service.blob_url("models", "saved"), credential=False, transfer=QUICK)
        found = safetensors.torch.load(service.get("models", "saved"))
        same(found, {name: tensor.detach().resolve_conj().contiguous() for name, tensor in tensors.items()})

    @pytest.mark.parametrize(
        ("tensor", "reason"),
        [
            (torch.zeros(2, dtype=torch.complex128), "complex128"),
            (torch.zeros(2, 2).to_sparse(), "sparse"),
            (torch.zeros(2, device="meta"), "meta"),
        ],
        ids=["type", "sparse", "meta"],
    )
    def test_what_the_format_cannot_hold(self, service: FaultService, tensor: torch.Tensor, reason: str) -> None:
        with pytest.raises(SafetensorsError, match=f"'bad'.*{reason}") as caught:
            save_file({"good": torch.zeros(1), "bad": tensor}, service.blob_url("models", "x"), credential=False)
        assert caught.value.tensor == "bad"
        assert service.names("models") == []

    def test_arguments_of_the_wrong_type(self, service: FaultService) -> None:
        url = service.blob_url("models", "x")
        wrong: list[tuple[Any, Any]] = [
            ([], None),
            ({1: torch.zeros(1)}, None),
            ({"a": 1}, None),
            ({}, {"a": 1}),
            ({}, {1: "a"}),
        ]
        for tensors, metadata in wrong:
            with pytest.raises(TypeError):
                save_file(tensors, url, metadata, credential=False)
        with pytest.raises(SafetensorsError, match="reserves"):
            save_file({"__metadata__": torch.zeros(1)}, url, credential=False)
        with pytest.raises(SafetensorsError, match="UTF-8"):
            save_file({"\ud800": torch.zeros(1)}, url, credential=False)
        with pytest.raises(ValueError, match="container"):
            save_file({}, service.container_url("models"), credential=False)

    def test_the_default_configuration_puts_a_small_file_at_once(self, service: FaultService) -> None:
        save_file(
            {"a": torch.zeros(1000)}, service.blob_url("models", "x"), credential=False, transfer=TransferConfig()
        )
        assert [request.operation for request in service.requests()] == ["put_blob"]
