"""Saved state is loaded bitwise: by us, by torch's reader, and from checkpoints of torch's writer."""

from __future__ import annotations

import io
import pickle
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from azure.core.credentials import AzureSasCredential
from torch.distributed.checkpoint._extension import ExtensionRegistry, StreamTransformExtension
from torch.distributed.checkpoint.staging import BlockingAsyncStager, DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict_from_keys
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType

from azstoragetorch import TransferConfig
from azstoragetorch._tensors.progress import ProgressCounter
from azstoragetorch.checkpoint import BlobStorageReader, BlobStorageWriter, TqdmProgress, load_keys
from tests.azurite.container import Container
from tests.checkpoint.states import alone, blank, load, reason, rich_state, same, save

KiB, MiB = 1 << 10, 1 << 20


def download(container: Container, folder: str, target: Path) -> Path:
    """Download the checkpoint, as azcopy does."""
    target.mkdir()
    for name in container.names():
        if name.startswith(f"{folder}/"):
            (target / name.removeprefix(f"{folder}/")).write_bytes(container.get(name))
    return target


def upload(source: Path, container: Container, folder: str) -> None:
    for path in source.iterdir():
        container.put(f"{folder}/{path.name}", path.read_bytes())


@pytest.fixture
def url(container: Container) -> str:
    return container.blob_url("run/step 1")


def writer(container: Container, url: str, **options: Any) -> BlobStorageWriter:
    return BlobStorageWriter(url, credential=container.key, **options)


def reader(container: Container, url: str, **options: Any) -> BlobStorageReader:
    return BlobStorageReader(url, credential=container.key, **options)


@pytest.mark.parametrize("options", [{}, {"blobs_per_rank": 3}, {"blobs_per_rank": 100}], ids=str)
def test_a_state_dict_of_all_kinds(container: Container, url: str, options: dict[str, Any]) -> None:
    save(rich_state(), writer(container, url, **options))
    same(rich_state(), load(blank(rich_state()), reader(container, url)))


@pytest.mark.parametrize(
    "transfer",
    [
        TransferConfig(block_size=64 * KiB, part_size=64 * KiB, memory_limit=MiB),
        TransferConfig(validate_content=True),
        TransferConfig(max_concurrency=1, max_connections=1),
    ],
    ids=["small", "validated", "one connection"],
)
def test_every_way_of_transferring(container: Container, url: str, transfer: TransferConfig) -> None:
    state = rich_state() | {"lazy conjugate": torch.randn(3000, dtype=torch.complex64).conj()}
    save(state, writer(container, url, transfer=transfer, blobs_per_rank=2))
    same(state, load(blank(state), reader(container, url, transfer=transfer)))


def test_sparse_and_quantised_tensors(container: Container, url: str) -> None:
    state = {
        "coo": torch.eye(5).to_sparse(),
        "quantised": torch.quantize_per_tensor(torch.randn(50), 0.1, 3, torch.qint8),
    }
    save(state, writer(container, url))
    target = {
        "coo": torch.zeros(5, 5).to_sparse(),
        "quantised": torch.quantize_per_tensor(torch.zeros(50), 0.1, 3, torch.qint8),
    }
    same(state, load(target, reader(container, url)))


def test_torchs_own_reader_loads_what_we_wrote(container: Container, url: str, tmp_path: Path) -> None:
    save(rich_state(), writer(container, url, blobs_per_rank=2))
    folder = download(container, "run/step 1", tmp_path / "down")
    same(rich_state(), load(blank(rich_state()), dcp.FileSystemReader(folder)))


@pytest.mark.parametrize("options", [{}, {"thread_count": 2}, {"single_file_per_rank": False}], ids=str)
def test_we_load_what_torchs_own_writer_wrote(
    container: Container, url: str, tmp_path: Path, options: dict[str, Any]
) -> None:
    save(rich_state(), dcp.FileSystemWriter(tmp_path, **options))
    upload(tmp_path, container, "run/step 1")
    same(rich_state(), load(blank(rich_state()), reader(container, url)))


def test_a_copy_elsewhere_loads(container: Container, url: str) -> None:
    """The recorded ETags are those of the original."""
    save(rich_state(), writer(container, url))
    for name in container.names():
        container.put(name.replace("run/step 1", "copy"), container.get(name))
    same(rich_state(), load(blank(rich_state()), reader(container, container.blob_url("copy"))))


def test_one_load_may_take_some_keys_only(container: Container, url: str) -> None:
    state = rich_state()
    save(state, writer(container, url))
    some = {key: blank(state[key]) for key in ("large", "step", "model")}
    same({key: state[key] for key in some}, load(some, reader(container, url)))


def test_torchs_loading_from_keys(container: Container, url: str) -> None:
    save(rich_state(), writer(container, url))
    found = _load_state_dict_from_keys({"large", "model"}, storage_reader=reader(container, url))
    same({key: rich_state()[key] for key in ("model", "large")}, dict(sorted(found.items(), reverse=True)))


def test_load_keys_builds_the_nested_state_dict(container: Container, url: str) -> None:
    state = rich_state()
    save(state, writer(container, url))
    # DCP does not distinguish a tuple from a list, or a Parameter from a tensor.
    whole = load_keys(url, credential=container.key)
    same(state, whole)
    some = load_keys(url, ["model.weight", "optimizer", "bf16"], credential=container.key)
    same({"bf16": state["bf16"], "model": {"weight": state["model"]["weight"]}, "optimizer": state["optimizer"]}, some)
    with pytest.raises(KeyError, match=r"model\.wei"):
        load_keys(url, "model.wei", credential=container.key)


def test_load_keys_runs_no_foreign_code(container: Container, url: str) -> None:
    save({"x": Path("/never")}, writer(container, url))
    with pytest.raises(Exception, match="x"):
        load_keys(url, credential=container.key)
    assert load_keys(url, weights_only=False, credential=container.key) == {"x": Path("/never")}


def test_flat_dicts_and_planners_without_flattening(container: Container, url: str) -> None:
    state = {"a.b": torch.ones(4), "c": 7}
    save(state, writer(container, url), planner=dcp.DefaultSavePlanner(flatten_state_dict=False))
    planner = dcp.DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    same(state, load(blank(state), reader(container, url), planner=planner))


def test_an_object_that_a_planner_makes_nothing_of(container: Container, url: str) -> None:
    class Hollow(dcp.DefaultSavePlanner):
        def resolve_data(self, write_item: Any) -> Any:
            return io.BytesIO() if write_item.index.fqn == "hollow" else super().resolve_data(write_item)

    taken: dict[str, bytes] = {}

    class Taking(dcp.DefaultLoadPlanner):
        def load_bytes(self, read_item: Any, value: Any) -> None:
            taken[read_item.dest_index.fqn] = value.read()

    state = {"hollow": 1, "x": torch.ones(2), "full": 2}
    save(state, writer(container, url), planner=Hollow())
    load({"hollow": 0, "x": torch.zeros(2), "full": 0}, reader(container, url), planner=Taking())
    assert taken["hollow"] == b""
    assert torch.load(io.BytesIO(taken["full"])) == 2


def test_values_are_converted_where_nothing_is_lost_in_kind(container: Container, url: str) -> None:
    values = torch.randn(100_000)
    save({"x": values}, writer(container, url))
    assert torch.equal(load({"x": torch.zeros(100_000).bfloat16()}, reader(container, url))["x"], values.bfloat16())
    with pytest.raises(dcp.CheckpointException, match=r"'x' is stored as torch\.float32, which torch\.int64"):
        load({"x": torch.zeros(100_000, dtype=torch.int64)}, reader(container, url))


def test_targets_of_any_layout_in_memory(container: Container, url: str) -> None:
    values = torch.randn(40, 50, 60)
    save({"x": values}, writer(container, url))
    for target in (
        torch.zeros(60, 50, 40).permute(2, 1, 0),
        torch.zeros(80, 50, 60)[::2],
        torch.zeros(40, 50, 61)[..., :60],
        torch.nn.Parameter(torch.zeros(40, 50, 60)),
    ):
        assert torch.equal(load({"x": target}, reader(container, url))["x"], values)


def test_tied_weights_are_fetched_once_and_reach_every_target(container: Container, url: str) -> None:
    """Two reads of the same bytes, for which AWS's reader raises an error."""
    values = torch.randn(1000)
    save({"x": values}, writer(container, url))

    class Twice(dcp.DefaultLoadPlanner):
        extra = torch.zeros(1000).double()

        def create_local_plan(self) -> dcp.LoadPlan:
            plan = super().create_local_plan()
            return dcp.LoadPlan([*plan.items, *plan.items])

        def resolve_tensor(self, read_item: Any) -> torch.Tensor:
            self.calls = getattr(self, "calls", 0) + 1
            return super().resolve_tensor(read_item) if self.calls == 1 else self.extra

    planner = Twice()
    assert torch.equal(load({"x": torch.zeros(1000)}, reader(container, url), planner=planner)["x"], values)
    assert torch.equal(planner.extra, values.double())


class Inverting(StreamTransformExtension):
    """A transformation in the place of compression, without a library."""

    @staticmethod
    def registry_name() -> str:
        return "test.invert"

    @staticmethod
    def from_descriptor(version: str) -> Inverting:
        return Inverting()

    def get_descriptor(self) -> str:
        return "test.invert/1"

    def transform_to(self, output: Any) -> Any:
        class Sink(io.RawIOBase):
            def writable(self) -> bool:
                return True

            def write(self, data: Any) -> int:
                output.write(bytes(255 - byte for byte in bytes(data)))
                return len(bytes(data))

            def close(self) -> None:
                output.close()
                super().close()

        return Sink()

    def transform_from(self, source: Any) -> Any:
        return io.BytesIO(bytes(255 - byte for byte in source.read()))


def test_extensions_transform_both_ways_and_as_torch_does(container: Container, url: str, tmp_path: Path) -> None:
    state = {"x": torch.randn(100), "n": 5}
    registry = ExtensionRegistry()
    registry.register(Inverting)
    save(state, writer(container, url, extensions=[Inverting()]))
    same(state, load(blank(state), reader(container, url, extension_registry=registry)))
    folder = download(container, "run/step 1", tmp_path / "down")
    same(state, load(blank(state), dcp.FileSystemReader(folder, _extension_registry=registry)))
    save(state, dcp.FileSystemWriter(tmp_path / "stock", _extensions=[Inverting()]))
    upload(tmp_path / "stock", container, "stock")
    there = container.blob_url("stock")
    same(state, load(blank(state), reader(container, there, extension_registry=registry)))
    with pytest.raises(dcp.CheckpointException, match=r"test\.invert"):
        load(blank(state), reader(container, there))


# -- what else torch requires of a writer and a reader -----------------------------------------------------------------


def test_checkpoint_id_names_another_folder_and_none_keeps_the_last(container: Container) -> None:
    base = container.blob_url("runs")
    one = writer(container, base)
    save({"x": torch.ones(1)}, one, checkpoint_id=f"{base}/1")
    save({"x": torch.ones(1) * 2}, one, checkpoint_id=f"{base}/2")
    save({"x": torch.ones(1) * 3}, one)
    assert one.checkpoint_id == f"{base}/2"
    got = reader(container, base)
    assert load({"x": torch.zeros(1)}, got, checkpoint_id=f"{base}/1")["x"].item() == 1
    assert load({"x": torch.zeros(1)}, got, checkpoint_id=f"{base}/2")["x"].item() == 3


def test_a_sas_is_in_no_id_repr_pickle_or_blob(container: Container) -> None:
    url = container.blob_sas_url("secret", "rwdl")
    signature = url.partition("sig=")[2].partition("&")[0]
    mine = BlobStorageWriter(url)
    save(rich_state(), mine)
    got = BlobStorageReader(url)
    same(rich_state(), load(blank(rich_state()), got))
    told = [repr(mine), mine.checkpoint_id, repr(got), got.checkpoint_id, repr(mine.storage_meta())]
    kept = [pickle.dumps(mine), pickle.dumps(got), *(container.get(name) for name in container.names())]
    assert all(signature not in text and "sig=" not in text for text in told)
    assert all(b"sig=" not in data and signature.encode() not in data for data in kept)


def test_both_pickle_after_use_and_work(container: Container, url: str) -> None:
    mine = BlobStorageWriter(url, credential=AzureSasCredential(container.sas()))
    save({"x": torch.ones(3)}, mine)
    from multiprocessing.reduction import ForkingPickler

    again = pickle.loads(bytes(ForkingPickler.dumps(mine)))
    save({"x": torch.ones(3) * 2}, again)
    got = BlobStorageReader(url, credential=AzureSasCredential(container.sas()))
    got = pickle.loads(bytes(ForkingPickler.dumps(got)))
    assert load({"x": torch.zeros(3)}, got)["x"].tolist() == [2, 2, 2]


@pytest.mark.parametrize(
    ("wrong", "error"),
    [
        ("not a url", ValueError),
        ("https://a.blob.core.windows.net", ValueError),
        ("https://a.blob.core.windows.net/c/x?snapshot=2020-01-01T00:00:00Z", ValueError),
        (Path("https://a.blob.core.windows.net/c/x"), TypeError),
        (None, TypeError),
    ],
)
def test_a_wrong_url_is_said_at_once(wrong: Any, error: type[Exception]) -> None:
    for make in (BlobStorageWriter, BlobStorageReader):
        with pytest.raises(error):
            make(wrong, credential=False)
        assert not make.validate_checkpoint_id(wrong)
        assert make.validate_checkpoint_id("https://a.blob.core.windows.net/c/x")


def test_wrong_arguments_are_said_at_once() -> None:
    url = "https://a.blob.core.windows.net/c/x"
    for options, error in (
        ({"blobs_per_rank": 0}, ValueError),
        ({"blobs_per_rank": True}, TypeError),
        ({"transfer": 5}, TypeError),
        ({"overwrit": False}, TypeError),
    ):
        with pytest.raises(error):
            BlobStorageWriter(url, credential=False, **options)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="load_once_per"):
        BlobStorageReader(url, credential=False, load_once_per="job")


def test_a_credential_is_not_sent_to_another_account() -> None:
    mine = BlobStorageReader("https://a.blob.core.windows.net/c/x", credential=AzureSasCredential("sig=secret"))
    with pytest.raises(ValueError, match="another account"):
        mine.reset("https://evil.example/c/x")


def test_plan_caching_over_several_saves(container: Container, url: str) -> None:
    """Plans that torch reuses do not contain where a save puts its data, so they cannot become stale."""
    mine = writer(container, url)
    for step in range(3):
        state = {"x": torch.full((1000,), float(step)), "step": step}
        save(state, mine, planner=dcp.DefaultSavePlanner(enable_plan_caching=True))
        same(state, load(blank(state), reader(container, url)))


def test_asynchronous_saves_of_one_process(container: Container, url: str) -> None:
    """Without a process group, as is possible with torch's thread executor."""
    mine = writer(container, url, progress=TqdmProgress(disable=True))
    for step in range(2):
        value = torch.full((1000,), float(step))
        with alone():
            future: Any = dcp.async_save(
                {"x": value, "step": step},
                storage_writer=mine,
                async_checkpointer_type=AsyncCheckpointerType.THREAD,
                no_dist=True,
            )
        value.fill_(-1)
        future.result()
        same(
            {"x": torch.full((1000,), float(step)), "step": step},
            load({"x": torch.zeros(1000), "step": -1}, reader(container, url)),
        )


@pytest.mark.parametrize(
    "stager",
    [
        BlockingAsyncStager,
        lambda: DefaultStager(
            StagingOptions(
                use_pinned_memory=False, use_shared_memory=True, use_async_staging=True, use_non_blocking_copy=False
            )
        ),
    ],
    ids=["blocking", "shared memory, in the background"],
)
def test_every_way_of_staging(container: Container, url: str, stager: Any) -> None:
    staging = stager()
    for step in range(2):
        state = {"x": torch.full((1000,), float(step)), "view": torch.arange(100.0)[10:20] + step, "step": step}
        with alone():
            started: Any = dcp.async_save(
                state, storage_writer=writer(container, url), async_stager=staging, no_dist=True
            )
        getattr(started, "upload_completion", started).result()
        same(state, load(blank(state), reader(container, url)))
    staging.close()


def test_progress_counts_all_bytes_planned(container: Container, url: str) -> None:
    calls: dict[str, list[tuple[int, int]]] = {"save": [], "load": []}
    state = {"x": torch.randn(1_000_000), "y": torch.ones(10)}
    save(state, writer(container, url, progress=lambda *call: calls["save"].append(call)))
    load(blank(state), reader(container, url, progress=lambda *call: calls["load"].append(call)))
    for seen in calls.values():
        assert seen[0][0] == 0
        assert seen[-1][0] == seen[-1][1] >= 4_000_040
        assert [done for done, _ in seen] == sorted(done for done, _ in seen)


def test_no_thread_waits_for_the_progress_callback() -> None:
    """A thread that counts while another one reports leaves its count to that one, and nothing is left behind."""
    inside, leave = threading.Event(), threading.Event()
    calls = []

    def report(done: int, planned: int) -> None:
        calls.append((done, planned))
        if done == 1:
            inside.set()
            assert leave.wait(60)

    counter = ProgressCounter(report, 10)
    slow = threading.Thread(target=counter.add, args=(1,))
    slow.start()
    assert inside.wait(60)
    for _ in range(9):
        counter.add(1)
    assert calls == [(0, 10), (1, 10)]
    leave.set()
    slow.join(240)
    assert calls == [(done, 10) for done in range(11)]


def test_an_error_of_the_progress_callback_is_a_warning_and_nothing_else(
    container: Container, url: str, caplog: pytest.LogCaptureFixture
) -> None:
    """A display must not cost hours of training."""
    calls = []

    def report(done: int, planned: int) -> None:
        calls.append((done, planned))
        raise RuntimeError("the screen is gone")

    save({"x": torch.ones(1000)}, writer(container, url, progress=report))
    assert len(calls) == 1
    state = {"x": torch.zeros(1000)}
    load(state, reader(container, url, progress=report))
    assert len(calls) == 2
    assert torch.equal(state["x"], torch.ones(1000))
    warnings = [record for record in caplog.records if "progress callback" in record.message]
    assert len(warnings) == 2


def test_the_tqdm_adapter_without_tqdm_fails_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("tqdm", "tqdm.auto"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match="pip install tqdm"):
        TqdmProgress()


def test_the_tqdm_adapter_draws_and_pickles(container: Container, url: str) -> None:
    out = io.StringIO()
    bar = TqdmProgress(file=out, desc="saving")
    save({"x": torch.randn(1000)}, writer(container, url, progress=bar))
    assert "saving: 100%" in out.getvalue()
    pickle.loads(pickle.dumps(TqdmProgress(desc="x")))


def test_an_unknown_key_is_torchs_error(container: Container, url: str) -> None:
    save({"x": torch.ones(3)}, writer(container, url))
    with pytest.raises(dcp.CheckpointException) as caught:
        load({"y": torch.zeros(3)}, reader(container, url))
    assert "y" in str(reason(caught.value))
