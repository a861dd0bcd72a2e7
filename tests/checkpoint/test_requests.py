"""The requests of a load: how many, which bytes, how much memory. Counted, not timed."""

from __future__ import annotations

import subprocess
import sys
import threading
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, ReadItem

from azstoragetorch import TransferConfig
from azstoragetorch._tensors import host
from azstoragetorch._tensors.pinned import scatter
from azstoragetorch._tensors.planning import Box, Piece, Request
from azstoragetorch.checkpoint import BlobStorageReader, BlobStorageWriter, _load
from tests.checkpoint.states import load, save
from tests.faults import FaultService, Match, Together

ROOT = Path(__file__).parents[2]
KiB, MiB = 1 << 10, 1 << 20


@pytest.fixture
def url(fault_service: FaultService) -> str:
    fault_service.create_container("data")
    return f"{fault_service.container_url('data')}/run"


def put(url: str, state: dict[str, Any], **options: Any) -> None:
    save(state, BlobStorageWriter(url, credential=False, **options))


def reads(service: FaultService) -> list[tuple[int, int]]:
    """The requested ranges of data."""
    found = []
    for request in service.requests("get_blob", path="distcp"):
        assert request.range is not None
        assert request.range[1] is not None
        found.append((request.range[0], request.range[1]))
    return sorted(found)


def take(url: str, wanted: list[tuple[tuple[int, ...], tuple[int, ...]]], key: str = "x", **options: Any) -> list[Any]:
    """Load boxes (offsets, lengths) of one tensor, like a planner that reshards."""
    targets = [torch.zeros(lengths) for _, lengths in wanted]

    class Boxes(dcp.DefaultLoadPlanner):
        def create_local_plan(self) -> LoadPlan:
            zero = torch.Size([0] * len(wanted[0][0]))
            return LoadPlan(
                [
                    ReadItem(
                        LoadItemType.TENSOR,
                        MetadataIndex(key, torch.Size([number, *zero[1:]])),
                        zero,
                        MetadataIndex(key, zero),
                        torch.Size(offsets),
                        torch.Size(lengths),
                    )
                    for number, (offsets, lengths) in enumerate(wanted)
                ]
            )

        def resolve_tensor(self, read_item: ReadItem) -> torch.Tensor:
            assert read_item.dest_index.offset is not None
            return targets[read_item.dest_index.offset[0]]

    load({key: torch.zeros(0)}, BlobStorageReader(url, credential=False, **options), planner=Boxes())
    return targets


def test_318_tensors_of_94_mib_are_16_requests_and_one_for_the_metadata(fault_service: FaultService, url: str) -> None:
    state = {f"layer{i}.weight": torch.randn(460_000) for i in range(53)}
    state |= {f"layer{i}.small": torch.randn(512) for i in range(265)}
    put(url, state)
    fault_service.log.clear()
    found = load(
        {key: torch.zeros_like(value) for key, value in state.items()}, BlobStorageReader(url, credential=False)
    )
    assert all(torch.equal(found[key], value) for key, value in state.items())
    assert len(fault_service.requests("get_blob", path="metadata")) == 1
    assert len(reads(fault_service)) <= 16
    assert len(fault_service.log) == len(reads(fault_service)) + 1
    wanted = sum(value.nbytes for value in state.values())
    assert sum(stop - start for start, stop in reads(fault_service)) < 1.01 * wanted + 318 * 2048


def test_metadata_is_fetched_again_only_if_it_changed(fault_service: FaultService, url: str) -> None:
    for step in (1.0, 2.0):
        put(url, {"x": torch.full((10,), step)})
        for _ in range(2):
            fault_service.log.clear()
            assert load({"x": torch.zeros(10)}, BlobStorageReader(url, credential=False))["x"].tolist() == [step] * 10
        assert not fault_service.requests("get_blob", path="metadata")


def test_rows_are_fetched_without_the_rest(fault_service: FaultService, url: str) -> None:
    values = torch.randn(1000, 256)
    put(url, {"x": values})
    fault_service.log.clear()
    (rows,) = take(url, [((300, 0), (100, 256))])
    assert torch.equal(rows, values[300:400])
    ((start, stop),) = reads(fault_service)
    assert stop - start == 100 * 256 * 4


def test_columns_of_short_rows_are_fetched_in_one_span_and_of_long_ones_alone(
    fault_service: FaultService, url: str
) -> None:
    short, long = torch.randn(500, 1000), torch.randn(4, 600_000)
    put(url, {"short": short, "long": long}, blobs_per_rank=1)
    fault_service.log.clear()
    (columns,) = take(url, [((0, 200), (500, 50))], "short")
    assert torch.equal(columns, short[:, 200:250])
    ((start, stop),) = reads(fault_service)
    assert stop - start == 499 * 4000 + 200
    fault_service.log.clear()
    (columns,) = take(url, [((0, 0), (4, 1000))], "long")
    assert torch.equal(columns, long[:, :1000])
    assert [stop - start for start, stop in reads(fault_service)] == [4000] * 4


def test_no_byte_is_fetched_twice(fault_service: FaultService, url: str) -> None:
    """Neither if boxes overlap nor if they are equal."""
    values = torch.randn(1000, 256)
    put(url, {"x": values})
    fault_service.log.clear()
    wanted = [((0, 0), (400, 256)), ((300, 0), (400, 256)), ((300, 0), (400, 256)), ((0, 10), (1000, 5))]
    for found, (offsets, lengths) in zip(take(url, wanted), wanted, strict=True):
        expected = values[offsets[0] : offsets[0] + lengths[0], offsets[1] : offsets[1] + lengths[1]]
        assert torch.equal(found, expected)
    ranges = reads(fault_service)
    assert all(one[1] <= two[0] for one, two in pairwise(ranges))


def test_parts_of_a_large_tensor_travel_together(fault_service: FaultService, url: str) -> None:
    values = torch.randn(5_000_000)
    put(url, {"x": values})
    fault_service.reset_log()
    fault_service.script(Match("get_blob", path=r"\.distcp$"), [Together(10)], repeat=True)
    found = load(
        {"x": torch.zeros(5_000_000)}, BlobStorageReader(url, credential=False, transfer=TransferConfig(part_size=MiB))
    )
    assert torch.equal(found["x"], values)
    assert len(reads(fault_service)) == 19  # of 20 MB in parts of 1 MiB
    assert fault_service.peak_active >= 10


def test_every_request_for_data_is_pinned(fault_service: FaultService, url: str, tmp_path: Path) -> None:
    """With the ETag that the save recorded; in a foreign checkpoint, all but the first request of each blob."""
    put(url, {"x": torch.randn(100_000)})
    fault_service.log.clear()
    load({"x": torch.zeros(100_000)}, BlobStorageReader(url, credential=False))
    assert all("if-match" in r.headers for r in fault_service.requests("get_blob", path="distcp"))
    state = {f"x{n}": torch.randn(100_000) for n in range(8)}
    save(state, dcp.FileSystemWriter(tmp_path))
    for path in tmp_path.iterdir():
        fault_service.put("data", f"stock/{path.name}", path.read_bytes())
    fault_service.log.clear()
    there = url.replace("run", "stock")
    found = load(
        {key: torch.zeros(100_000) for key in state},
        BlobStorageReader(there, credential=False, transfer=TransferConfig(part_size=MiB)),
    )
    assert all(torch.equal(found[key], value) for key, value in state.items())
    unpinned = [r for r in fault_service.requests("get_blob", path="distcp") if "if-match" not in r.headers]
    assert len(unpinned) == 1


def test_large_items_of_a_foreign_checkpoint_go_straight_to_their_tensors(
    fault_service: FaultService, url: str, tmp_path: Path
) -> None:
    """Their layout is read from both ends, so a slice needs only its rows."""
    values = torch.randn(1000, 1000)
    save({"x": values}, dcp.FileSystemWriter(tmp_path))
    for path in tmp_path.iterdir():
        fault_service.put("data", f"run/{path.name}", path.read_bytes())
    (rows,) = take(url, [((500, 0), (10, 1000))])
    assert torch.equal(rows, values[500:510])
    assert sum(stop - start for start, stop in reads(fault_service)) == 2 * 4096 + 40_000


PEAK = """
import sys, threading, warnings, torch, torch.distributed.checkpoint as dcp
from azstoragetorch import TransferConfig
from azstoragetorch.checkpoint import BlobStorageReader
warnings.filterwarnings("ignore")
torch.set_num_threads(1)
url, limit, kind = sys.argv[1], int(sys.argv[2]), sys.argv[3]

def status(name):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(name)) << 10

dtype = torch.float64 if kind == "converted" else torch.float32
state = {f"x{n}": torch.zeros(8 << 10, 1 << 10, dtype=dtype) for n in range(4)}
if kind == "transposed":
    state = {key: torch.zeros(1 << 10, 8 << 10).t() for key in state}
if kind == "shared":
    torch.distributed.init_process_group("gloo", init_method=sys.argv[4], rank=int(sys.argv[5]), world_size=2)
for value in state.values():
    value.fill_(1)  # its pages are there before
transfer = TransferConfig(memory_limit=limit)
sharing = {"load_once_per": "world" if kind == "shared" else "rank"}
reader = BlobStorageReader(url, credential=False, transfer=transfer, **sharing)
dcp.load({"small": torch.zeros(1000)}, storage_reader=reader)
open("/proc/self/clear_refs", "w").write("5")
before = status("VmRSS")
dcp.load(state, storage_reader=reader)
assert all(value[0, 0] == value[-1, -1] == n for n, value in enumerate(state.values()))
print(status("VmHWM") - before)
"""


@pytest.mark.parametrize(
    "kind",
    ["in place", *(pytest.param(k, marks=pytest.mark.slow) for k in ("converted", "transposed", "decoded", "shared"))],
)
def test_a_load_takes_no_more_than_the_limit_in_addition_to_its_tensors(
    fault_service: FaultService, url: str, kind: str, tmp_path: Path
) -> None:
    """128 MiB and more. Items of torch's writer that are stored in another order than that of indices are decoded."""
    limit = 32 * MiB
    state = {f"x{n}": torch.full((8 << 10, 1 << 10), float(n)) for n in range(4)} | {"small": torch.zeros(1000)}
    if kind == "decoded":
        stored = {key: value.reshape(value.shape[::-1]).t() for key, value in state.items() if value.dim() == 2}
        save(state | stored, dcp.FileSystemWriter(tmp_path))
        for path in tmp_path.iterdir():
            fault_service.put("data", f"run/{path.name}", path.read_bytes())
    else:
        put(url, state)
    meeting = (tmp_path / "meeting").as_uri()
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PEAK, url, str(limit), kind, meeting, str(rank)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        )
        for rank in range(2 if kind == "shared" else 1)
    ]
    for process in processes:
        out, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
        assert int(out) <= limit + 64 * MiB


def test_a_save_takes_no_more_than_the_limit_in_addition_to_its_tensors(fault_service: FaultService, url: str) -> None:
    """128 MiB that must be copied, since their memory layout is not the saved one."""
    program = (
        "import sys, warnings, torch, torch.distributed.checkpoint as dcp\n"
        "from azstoragetorch import TransferConfig\n"
        "from azstoragetorch.checkpoint import BlobStorageWriter\n"
        "warnings.filterwarnings('ignore'); torch.set_num_threads(1)\n"
        "status = lambda n: next(int(l.split()[1]) for l in open('/proc/self/status') if l.startswith(n)) << 10\n"
        "state = {f'x{n}': torch.ones(4096, 2048).t() for n in range(4)}\n"
        "writer = BlobStorageWriter(sys.argv[1], credential=False, "
        "transfer=TransferConfig(memory_limit=32 << 20, block_size=4 << 20))\n"
        "dcp.save({'y': torch.ones(9)}, storage_writer=writer)\n"
        "open('/proc/self/clear_refs', 'w').write('5'); before = status('VmRSS')\n"
        "dcp.save(state, storage_writer=writer)\n"
        "print(status('VmHWM') - before)\n"
    )
    done = subprocess.run([sys.executable, "-c", program, url], capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) <= 32 * MiB + 64 * MiB


# -- parts ------------------------------------------------------------------------------------------------------------


def test_scattering_leaves_out_gaps_and_copies_overlaps() -> None:
    content = bytes(range(100))
    spans = [(10, 20), (15, 30), (15, 18), (40, 45), (40, 45), (41, 60)]
    pieces = tuple(Piece("b", start, stop, n, Box((), ())) for n, (start, stop) in enumerate(spans))
    targets = [memoryview(bytearray(stop - start)) for start, stop in spans]
    parts, copies = scatter(Request("b", 10, 60, pieces), targets)
    at = 10
    for part in parts:
        part[:] = content[at : at + part.nbytes]
        at += part.nbytes
    assert at == 60
    for target, source in copies:
        target[:] = source
    assert [bytes(target) for target in targets] == [content[start:stop] for start, stop in spans]


def test_the_way_of_accelerators_works_on_the_cpu_too() -> None:
    """The same code: slices of limited size through the buffers of a copier, waited for one later."""
    copier = host.Copier(torch.device("cpu"))
    assert not copier.is_pinned
    for tensor in (
        torch.randn(300, 70).t(),
        torch.randn(5, 6, 7, 8).permute(3, 1, 0, 2),
        torch.randn(100, dtype=torch.complex64).conj(),
        torch.arange(1000)[::3],
    ):
        pieces = list(host.host_bytes(tensor, copier, 1000))
        assert all(piece.nbytes <= 1000 for piece in pieces)
        expected = tensor.resolve_conj().contiguous().reshape(-1).view(torch.uint8)
        assert b"".join(pieces) == bytes(expected.tolist())


class LateCopier(host.Copier):
    """As late as an accelerator can be: copied data is there only after waiting for it."""

    is_pinned = True

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self._begun: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._done = 0

    def buffer(self, nbytes: int) -> torch.Tensor:
        return torch.full((nbytes,), 0xEE, dtype=torch.uint8)

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        self._begun.append((target, source))

    def mark(self) -> int:
        return self._done + len(self._begun)

    def wait(self, mark: int | None = None) -> None:
        count = len(self._begun) if mark is None else mark - self._done
        for target, source in self._begun[:count]:
            with torch.no_grad():
                target.copy_(source)
        self._done += count
        del self._begun[:count]


def test_copies_are_waited_for_before_what_they_are_of_is_used(
    fault_service: FaultService, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Everything that uses copiers; without an accelerator, that is data with another memory layout than stored."""
    monkeypatch.setattr(host, "Copier", LateCopier)
    monkeypatch.setattr(_load, "Copier", LateCopier)
    state = {
        "transposed": torch.randn(3000, 500).t(),
        "sparse": torch.eye(50).to_sparse(),
        "converted": torch.randn(700_000),
        "small": torch.randn(30, 2)[:, 1],
    }
    quick = TransferConfig(part_size=64 * KiB, block_size=64 * KiB, memory_limit=MiB)
    put(url, state, transfer=quick)
    target = {key: torch.zeros_like(value) for key, value in state.items()}
    target |= {"converted": torch.zeros(700_000, dtype=torch.float64), "transposed": torch.zeros(3000, 500).t()}
    seen: dict[str, torch.Tensor] = {}

    class Watching(dcp.DefaultLoadPlanner):
        def commit_tensor(self, read_item: ReadItem, tensor: torch.Tensor) -> None:
            seen[read_item.dest_index.fqn] = tensor.to_dense().clone()

    load(target, BlobStorageReader(url, credential=False, transfer=quick), planner=Watching())
    assert seen.keys() == state.keys()
    for key, value in state.items():
        assert torch.equal(seen[key], value.to_dense().to(seen[key].dtype)), key


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_tensors_on_an_accelerator_go_through_pinned_memory(fault_service: FaultService, url: str) -> None:
    state = {"x": torch.randn(3000, 1000, device="cuda"), "t": torch.randn(300, 100, device="cuda").t()}
    put(url, state)
    found = load(
        {key: torch.zeros_like(value) for key, value in state.items()}, BlobStorageReader(url, credential=False)
    )
    assert all(torch.equal(found[key], value) for key, value in state.items())
    assert host.Copier(torch.device("cuda")).is_pinned


def test_tensors_beyond_4_gib_are_planned_in_the_metadata_without_their_bytes() -> None:
    """The sizes that a save declares and the pieces that a load plans are exact integers."""
    from torch.distributed.checkpoint.metadata import TensorProperties
    from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

    from azstoragetorch.checkpoint._encoding import size_hint

    shape = torch.Size([50_000, 60_000])
    chunk = ChunkStorageMetadata(torch.Size([0, 0]), shape)
    data = TensorWriteData(chunk, TensorProperties(torch.float32), torch.Size([100_000, 60_000]))
    item = WriteItem(MetadataIndex("x"), WriteItemType.SHARD, tensor_data=data)
    assert size_hint(item) == 12_000_000_000


def test_a_load_leaves_no_thread_waiting_after_an_error(fault_service: FaultService, url: str) -> None:
    put(url, {f"x{n}": torch.randn(300_000) for n in range(20)})
    name = next(name for name in fault_service.names("data") if name.endswith("distcp"))
    fault_service.delete("data", name)
    before = threading.active_count()
    for _ in range(3):
        with pytest.raises(dcp.CheckpointException):
            load({f"x{n}": torch.zeros(300_000) for n in range(20)}, BlobStorageReader(url, credential=False))
    assert threading.active_count() <= max(before, TransferConfig().max_connections + 5)
