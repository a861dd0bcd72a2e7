"""Parts for tensor parallelism, and loads that ranks share: the right elements, and no byte in vain."""

from __future__ import annotations

import hashlib
import math
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import azstoragetorch
from azstoragetorch import TransferConfig
from azstoragetorch._tensors.planning import Box
from azstoragetorch.exceptions import SafetensorsError
from azstoragetorch.safetensors import load_file, load_model_folder, save_folder
from azstoragetorch.safetensors._shared import intersection, plan_parcels
from azstoragetorch.safetensors._slices import box_of_index, box_of_shard
from tests.checkpoint.ranks import Ranks, run_ranks
from tests.faults import FaultService, Match, Status
from tests.safetensors.models import bits, filled, same

patient = settings(suppress_health_check=[HealthCheck.too_slow])  # the machine can be busy
KiB, MiB = 1 << 10, 1 << 20
WORLD = 8
TENSORS = {
    "up": filled(torch.bfloat16, (2048, 4096)),
    "down": filled(torch.bfloat16, (4096, 2048), 1),
    "wide": filled(torch.float32, (2, 1024 * 1024), 2),
    "bias": filled(torch.float32, (1001,), 3),
    "scale": torch.tensor(2.5),
    "narrow": filled(torch.float8_e4m3fn, (8, 24), 4),
}


@pytest.fixture
def url(fault_service: FaultService) -> str:
    fault_service.put("models", "model.safetensors", safetensors.torch.save(TENSORS))
    return fault_service.blob_url("models", "model.safetensors")


def received(service: FaultService) -> int:
    return sum(request.sent for request in service.requests("get_blob"))


@patient
@given(st.lists(st.integers(0, 9), min_size=1, max_size=3), st.integers(-3, 3), st.integers(1, 5))
def test_parts_are_those_of_torch(shape: list[int], dim: int, world: int) -> None:
    tensor = torch.arange(math.prod(shape)).reshape(shape)
    if not -len(shape) <= dim < len(shape):
        assert box_of_shard((dim, 0, world), shape).lengths == tuple(shape)
        return
    chunks = list(tensor.chunk(world, dim)) if tensor.shape[dim] else []
    for rank in range(world):
        box = box_of_shard((dim, rank, world), shape)
        part = tensor[tuple(slice(at, at + length) for at, length in zip(*box, strict=True))]
        if rank < len(chunks):
            assert torch.equal(part, chunks[rank])
        else:
            assert part.numel() == 0


@patient
@given(st.lists(st.integers(0, 5), max_size=3), st.data())
def test_a_box_and_what_is_left_of_an_index_select_what_the_index_does(shape: list[int], data: st.DataObject) -> None:
    tensor = torch.arange(math.prod(shape)).reshape(shape)
    index = tuple(data.draw(st.slices(size).filter(lambda cut: (cut.step or 1) > 0)) for size in shape)
    box, rest = box_of_index(index, shape)
    part = tensor[tuple(slice(at, at + length) for at, length in zip(*box, strict=True))]
    assert torch.equal(part[rest], tensor[index])


class TestOneRank:
    def test_rows(self, fault_service: FaultService, url: str) -> None:
        """At most 1.02 times its bytes, with the header."""
        for rank in range(WORLD):
            fault_service.reset_log()
            found = load_file(url, names=["up", "down"], shard=(0, rank, WORLD), credential=False)
            expected = {name: TENSORS[name].chunk(WORLD)[rank] for name in ("up", "down")}
            same(found, expected)
            assert received(fault_service) <= 1.02 * sum(tensor.nbytes for tensor in expected.values())

    def test_columns_that_lie_far_apart(self, fault_service: FaultService, url: str) -> None:
        """At most 1.10 times its bytes, with the header: rows are megabytes long."""
        for rank in range(WORLD):
            fault_service.reset_log()
            found = load_file(url, names=["wide"], shard=(1, rank, WORLD), credential=False)
            expected = {"wide": TENSORS["wide"].chunk(WORLD, 1)[rank]}
            same(found, expected)
            assert received(fault_service) <= 1.10 * expected["wide"].nbytes

    def test_columns_that_lie_close_together_take_few_requests(self, fault_service: FaultService, url: str) -> None:
        """Of rows of kilobytes, what lies between is fetched, too: a request for each row would take longer."""
        fault_service.reset_log()
        found = load_file(url, names=["down"], shard=(1, 3, WORLD), credential=False)
        same(found, {"down": TENSORS["down"].chunk(WORLD, 1)[3]})
        assert len(fault_service.requests("get_blob")) <= 4
        assert received(fault_service) <= TENSORS["down"].nbytes + 64 * KiB

    def test_by_name(self, url: str) -> None:
        shards = {"up": (0, 1, 2), "down": (1, 1, 2)}
        expected = {**TENSORS, "up": TENSORS["up"][1024:], "down": TENSORS["down"][:, 1024:]}
        same(load_file(url, shard=shards, credential=False), expected)
        same(load_file(url, shard=shards.get, credential=False), expected)

    def test_dimensions_that_a_tensor_lacks(self, url: str) -> None:
        found = load_file(url, names=["scale", "bias"], shard=(1, 0, 2), credential=False)
        same(found, {"bias": TENSORS["bias"], "scale": TENSORS["scale"]})

    @pytest.mark.parametrize("shard", [(0, 2, 2), (0, -1, 2), (0, 0, 0)])
    def test_a_part_that_is_not_one(self, url: str, shard: Any) -> None:
        with pytest.raises(ValueError, match="rank"):
            load_file(url, shard=shard, credential=False)

    @pytest.mark.parametrize("shard", [3, (0, 1), (0, 1, 2, 3), (0.0, 1, 2), (0, True, 2), "012"])
    def test_a_shard_of_the_wrong_type(self, url: str, shard: Any) -> None:
        with pytest.raises(TypeError, match="shard must be"):
            load_file(url, shard=shard, credential=False)

    def test_memory_beyond_the_tensors_is_bounded(self, fault_service: FaultService, url: str) -> None:
        """Columns go through buffers under the memory limit, however many there are."""
        transfer = TransferConfig(part_size=64 * KiB, memory_limit=1 * MiB)
        found = load_file(url, names=["down"], shard=(1, 3, WORLD), credential=False, transfer=transfer)
        same(found, {"down": TENSORS["down"].chunk(WORLD, 1)[3]})


def boxes_of(shape: tuple[int, ...], ranks: int) -> st.SearchStrategy[list[Box]]:
    """Of each rank: all of it, or a part of the same dimension."""
    whole = Box((0,) * len(shape), shape)
    shards = st.integers(0, max(0, len(shape) - 1)).map(
        lambda dim: [box_of_shard((dim, rank, ranks), shape) for rank in range(ranks)]
    )
    return st.just([whole] * ranks) | shards


@patient
@given(st.lists(st.lists(st.integers(0, 300), min_size=1, max_size=3), max_size=4), st.integers(1, 5), st.data())
def test_every_element_that_is_wanted_is_read_by_one_rank(shapes: Any, ranks: int, data: st.DataObject) -> None:
    tensors = [(str(number), tuple(shape), 4) for number, shape in enumerate(shapes)]
    wanted = [data.draw(boxes_of(shape, ranks)) for _, shape, _ in tensors]
    plan = plan_parcels(tensors, [[boxes[rank] for boxes in wanted] for rank in range(ranks)])
    for (name, _, _), boxes in zip(tensors, wanted, strict=True):
        parcels = [parcel for parcel in plan.parcels if parcel.name == name]
        if name in plan.alone:
            assert not parcels
            continue
        for one, parcel in enumerate(parcels):
            assert all(intersection(parcel.box, other.box) is None for other in parcels[one + 1 :])
        for box in boxes:
            cuts = [cut for parcel in parcels if (cut := intersection(parcel.box, box)) is not None]
            assert sum(math.prod(cut.lengths) for cut in cuts) == math.prod(box.lengths)


def described(tensors: dict[str, torch.Tensor]) -> Any:
    """What two sets of tensors have in common only if they are equal, bit for bit."""
    return {
        name: (tensor.dtype, tuple(tensor.shape), hashlib.sha256(bits(tensor)).hexdigest())
        for name, tensor in tensors.items()
    }


def load_on_rank(rank: int, url: str, shared: str, shard: Any, dtype: Any = None) -> tuple[int, Any]:
    before = azstoragetorch.metrics()
    parts = {name: (dim, rank, 4) for name, dim in (shard or {}).items()}
    found = load_file(url, shard=parts, shared=shared, dtype=dtype, credential=False)
    return (azstoragetorch.metrics() - before).bytes_received, described(found)


class TestShared:
    def test_all_tensors_alike(self, fault_service: FaultService, url: str) -> None:
        """Each byte is read once by all ranks together, in about equal parts, and each rank reads the header."""
        total = sum(tensor.nbytes for tensor in TENSORS.values())
        results = run_ranks(4, load_on_rank, url, "world", None)
        for nbytes, found in results:
            assert found == described(TENSORS)
            assert nbytes <= total / 4 * 1.02 + 66 * KiB
        assert received(fault_service) <= total + 4 * 66 * KiB

    def test_columns_and_rows(self, fault_service: FaultService, url: str) -> None:
        """A rank of tensor parallelism reads at most 1.10 times its bytes of columns, however close they lie."""
        dims = {"up": 0, "down": 1, "wide": 1, "narrow": 1}
        for rank, (nbytes, found) in enumerate(run_ranks(4, load_on_rank, url, "world", dims)):
            expected = {
                name: tensor.chunk(4, dims[name])[rank] if name in dims else tensor for name, tensor in TENSORS.items()
            }
            assert found == described(expected)
            own = sum(expected[name].nbytes for name in dims)
            assert nbytes <= 1.02 * own + 66 * KiB
            assert nbytes <= 1.10 * own

    def test_with_another_type(self, url: str) -> None:
        for rank, (_, found) in enumerate(run_ranks(2, load_on_rank, url, "world", {"down": 1}, torch.float32)):
            wide = {name: tensor.float() for name, tensor in TENSORS.items()}
            assert found == described({**wide, "down": wide["down"].chunk(4, 1)[rank]})

    def test_per_node(self, fault_service: FaultService, url: str) -> None:
        """torchrun numbers its agents, one on each node."""
        total = sum(tensor.nbytes for tensor in TENSORS.values())
        nodes = [{"GROUP_RANK": str(rank // 2)} for rank in range(4)]
        for nbytes, found in run_ranks(4, load_on_rank, url, "node", None, env=nodes):
            assert found == described(TENSORS)
            assert nbytes <= total / 2 * 1.02 + 66 * KiB
        assert received(fault_service) <= 2 * total + 4 * 66 * KiB

    def test_a_folder(self, fault_service: FaultService) -> None:
        url = fault_service.blob_url("models", "folder")
        fault_service.create_container("models")
        save_folder(TENSORS, url, max_shard_size="17MB", credential=False)
        for found in run_ranks(2, load_folder_on_rank, url):
            assert found == described(TENSORS)

    def test_without_a_process_group(self, url: str) -> None:
        same(load_file(url, shared="world", credential=False), TENSORS)
        with pytest.raises(ValueError, match="shared must be one of"):
            load_file(url, shared="all", credential=False)

    def test_the_failure_of_one_is_the_failure_of_all(self, url: str) -> None:
        first, second = run_ranks(2, fail_on_rank, url)
        assert first.keys() == second.keys() == FAILURES.keys()
        for what in FAILURES:
            if what in ("names", "dtype"):
                assert "load other tensors" in first[what]
                assert "load other tensors" in second[what]
            else:
                assert "rank 1 of those" in first[what]
                assert "rank 1 of those" not in second[what]

    def test_a_read_that_fails_on_one_rank(self, fault_service: FaultService, url: str) -> None:
        """In the middle of the exchange: the others raise, too, and do not wait."""
        later = Match("get_blob", where=lambda request: "if-match" in request.headers)
        fault_service.script(later, [Status(403)])
        results = Ranks(2, load_on_rank, url, "world", None).results()
        assert all(isinstance(result, Exception) for result in results)
        assert any("of those that load together failed" in str(result) for result in results)


def load_folder_on_rank(rank: int, url: str) -> Any:
    return described(load_model_folder(url, shared="world", credential=False))


FAILURES: dict[str, dict[str, Any]] = {
    "missing": {"names": ["nothing"]},
    "names": {"names": ["up"]},
    "dtype": {"dtype": torch.float64},
    "shard": {"shard": lambda _name: (0, 5, 2)},
}


def fail_on_rank(rank: int, url: str) -> dict[str, str]:
    found = {}
    for what, options in FAILURES.items():
        try:
            load_file(url, shared="world", credential=False, **(options if rank == 1 else {}))
        except (SafetensorsError, ValueError) as error:
            found[what] = str(error)
    return found
