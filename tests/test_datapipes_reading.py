"""The pipes that open, load and read: bytes, order, limits, and their use with torch."""

from __future__ import annotations

import pickle
import subprocess
import sys
import tarfile
import threading
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed
import torch.multiprocessing
from azure.core.exceptions import ClientAuthenticationError, ResourceNotFoundError
from torch.utils.data import DataLoader

import azstoragetorch.datapipes as pipes
from azstoragetorch import TransferConfig
from azstoragetorch._engine.threads import engine_for
from azstoragetorch.datapipes._base import IterableWrapper, IterDataPipe, traverse_dps
from azstoragetorch.exceptions import BlobChangedError
from tests.azurite.container import Container
from tests.faults import FaultService, Hold, Match, Status, Together, Torn
from tests.support import collect_garbage, wait_until, watch_peak
from tests.test_datapipes_tar import make_tar

# Pipes of torch that are missing in the stand-ins for a torch without DataPipes.
needs_torchs_pipes = pytest.mark.skipif(
    IterDataPipe.__module__.startswith("azstoragetorch"), reason="this torch has no DataPipes"
)

KiB = 1 << 10
READERS = ["open_files_by_azure", "load_files_by_azure", "read_files_by_azure"]
SMALL = TransferConfig(part_size=64 * KiB, memory_limit=1 << 20, max_connections=8)


def content(number: int) -> bytes:
    return bytes([number % 251]) * (number * 7919 % 300_000)


def fill(service: FaultService, count: int) -> list[str]:
    for number in range(count):
        service.put("data", f"{number:04d}", content(number))
    return [service.blob_url("data", f"{number:04d}") for number in range(count)]


def data_of(value: Any) -> bytes:
    return value if isinstance(value, bytes) else value.read()


def url_and_length(sample: tuple[str, bytes]) -> tuple[str, int]:
    return sample[0], len(sample[1])


def first(sample: tuple[str, Any]) -> str:
    return sample[0]


def is_even(sample: tuple[str, bytes]) -> bool:
    return int(sample[0][-1]) % 2 == 0


def parity(sample: tuple[str, bytes]) -> int:
    return int(sample[0][-1]) % 2


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("with_info", [False, True])
def test_it_reads_every_blob_in_order(fault_service: FaultService, reader: str, with_info: bool) -> None:
    """Blobs of zero, one and several parts, from URLs and from a lister; twice."""
    urls = fill(fault_service, 30)
    source = IterableWrapper([fault_service.container_url("data")])
    listed = getattr(source, "list_blobs_by_azure" if with_info else "list_files_by_azure")(credential=False)
    pipe = getattr(listed, reader)(credential=False, transfer=SMALL)
    for _ in range(2):
        read = [(url, data_of(value)) for url, value in pipe]
        assert [url for url, _ in read] == urls
        assert [data for _, data in read] == [content(number) for number in range(30)]


@pytest.mark.parametrize("reader", READERS)
def test_many_are_in_progress_at_once_and_bounded(fault_service: FaultService, reader: str) -> None:
    urls = fill(fault_service, 40)
    fault_service.latency = 0.02
    fault_service.script("get_blob", [Together(4)], repeat=True)
    pipe = getattr(IterableWrapper(urls), reader)(credential=False, prefetch=7, transfer=SMALL)
    assert sum(1 for _ in pipe) == 40
    assert 4 <= fault_service.peak_active <= 8


def test_memory_is_bounded_by_bytes_and_one_oversized_blob_is_admitted(fault_service: FaultService) -> None:
    transfer = TransferConfig(part_size=64 * KiB, memory_limit=1 << 20, max_connections=16)
    for number in range(20):
        fault_service.put("data", f"{number:02d}", bytes([number]) * (300 * KiB if number != 7 else 3 << 20))
    budget = engine_for(transfer).budget
    peak = watch_peak(budget)
    listed = pipes.AzureBlobInfoLister(fault_service.container_url("data"), credential=False)
    for _, data in listed.read_files_by_azure(credential=False, transfer=transfer):
        assert len(data) in (300 * KiB, 3 << 20)
        assert budget.in_flight <= 1 << 20 or budget.in_flight == 3 << 20
    assert peak() <= 3 << 20
    assert budget.in_flight == 0


@pytest.mark.parametrize("reader", READERS)
def test_leaving_early_gives_everything_back(fault_service: FaultService, reader: str) -> None:
    urls = fill(fault_service, 40)
    budget = engine_for(SMALL).budget
    samples = iter(getattr(IterableWrapper(urls), reader)(credential=False, transfer=SMALL))
    next(samples)
    del samples
    collect_garbage()
    wait_until(lambda: budget.in_flight == 0)


@pytest.mark.parametrize("reader", READERS[:2])
def test_streams_stay_readable_after_the_pipe_is_reset(fault_service: FaultService, reader: str) -> None:
    urls = fill(fault_service, 12)
    pipe = getattr(IterableWrapper(urls), reader)(credential=False, transfer=SMALL)
    samples = iter(pipe)
    kept = [next(samples) for _ in range(5)]
    again = [data_of(value) for _, value in pipe]
    assert again == [content(number) for number in range(12)]
    assert [data_of(value) for _, value in kept] == again[:5]
    with pytest.raises(RuntimeError, match="invalidated"):
        next(samples)


def test_opened_streams_are_files(container: Container) -> None:
    """Seekable, wrapped like those of torch, one version of the blob, text on request."""
    container.put("a", "zwölf\nBoxkämpfer\n".encode())
    source = IterableWrapper([container.blob_url("a")])
    ((url, stream),) = source.open_files_by_azure(credential=container.key)
    assert (url, type(stream).__name__) == (container.blob_url("a"), "StreamWrapper")
    assert stream.seekable()
    assert stream.seek(7) == 7
    assert list(stream) == ["Boxkämpfer\n".encode()]
    for mode in ("r", "rt"):
        ((_, text),) = source.open_files_by_azure(mode, credential=container.key)
        assert text.read() == "zwölf\nBoxkämpfer\n"
    container.put("a", b"short")
    stream.seek(0)
    assert stream.read() == "zwölf\nBoxkämpfer\n".encode()


@pytest.mark.parametrize("mode", ["r:*", "r|*"])
@pytest.mark.parametrize("reader", READERS[:2])
def test_tarfile_takes_the_streams(fault_service: FaultService, reader: str, mode: Any) -> None:
    fault_service.put("data", "a.tar", make_tar({"0.txt": content(7), "1.txt": b"end"}))
    source = IterableWrapper([fault_service.blob_url("data", "a.tar")])
    ((_, stream),) = getattr(source, reader)(credential=False, transfer=SMALL)
    with tarfile.open(fileobj=stream, mode=mode) as tar:
        assert [tar.extractfile(info).read() for info in tar] == [content(7), b"end"]  # type: ignore[union-attr]


def test_an_opened_blob_is_pinned_to_what_was_fetched_first(fault_service: FaultService) -> None:
    fault_service.put("data", "a", b"1" * 500 * KiB)
    source = IterableWrapper([fault_service.blob_url("data", "a")])
    ((_, stream),) = source.open_files_by_azure(credential=False, transfer=SMALL)
    fault_service.put("data", "a", b"2" * 500 * KiB)
    with pytest.raises(BlobChangedError, match="data/a"):
        stream.read()


@needs_torchs_pipes
def test_read_from_stream_reads_to_the_end_and_in_chunks(container: Container) -> None:
    """torch's reader calls ``read(None)``."""
    container.put("a", b"0123456789")
    opened = IterableWrapper([container.blob_url("a")]).open_files_by_azure(credential=container.key)
    assert [data for _, data in opened.read_from_stream()] == [b"0123456789"]
    assert [data for _, data in opened.read_from_stream(chunk=4)] == [b"0123", b"4567", b"89"]
    loaded = IterableWrapper([container.blob_url("a")]).load_files_by_azure(credential=container.key)
    assert [data for _, data in loaded.read_from_stream()] == [b"0123456789"]


@pytest.mark.parametrize("reader", READERS)
def test_an_error_comes_in_its_turn_and_names_the_blob(fault_service: FaultService, reader: str) -> None:
    urls = fill(fault_service, 6)
    urls.insert(3, fault_service.blob_url("data", "missing"))
    samples = iter(getattr(IterableWrapper(urls), reader)(credential=False, transfer=SMALL))
    assert [next(samples)[0] for _ in range(3)] == urls[:3]
    with pytest.raises(ResourceNotFoundError, match="data/missing"):
        next(samples)


@pytest.mark.parametrize("workers", [0, 1])
def test_an_error_in_a_worker_keeps_its_type_and_url(fault_service: FaultService, workers: int) -> None:
    fault_service.put("data", "a", b"x")
    fault_service.require_sas("wanted")
    pipe = IterableWrapper([fault_service.blob_url("data", "a")]).read_files_by_azure(credential=False)
    with pytest.raises(ClientAuthenticationError, match=r"data/a.*No credential was sent"):
        list(DataLoader(pipe, num_workers=workers, batch_size=None))


def test_broken_answers_are_repaired(fault_service: FaultService) -> None:
    urls = fill(fault_service, 10)
    fault_service.script("get_blob", [Torn(after=30), Status(503), Torn(after=0)])
    pipe = IterableWrapper(urls).read_files_by_azure(credential=False, transfer=SMALL)
    assert [data for _, data in pipe] == [content(number) for number in range(10)]


def test_other_credentials_do_not_leak_into_a_pipe(container: Container) -> None:
    """No pipe uses the credential of another, and a SAS in a URL is not in the items."""
    container.put("a", b"x")
    listed = pipes.AzureBlobFileLister(container.url, credential=container.key)
    with pytest.raises((ClientAuthenticationError, ResourceNotFoundError), match="No credential was sent"):
        list(listed.read_files_by_azure(credential=False))
    read = IterableWrapper([container.blob_sas_url("a")]).read_files_by_azure(credential=False)
    assert list(read) == [(container.blob_url("a"), b"x")]


@pytest.mark.parametrize(
    ("build", "error", "match"),
    [
        (lambda source: source.open_files_by_azure("wb"), ValueError, "mode"),
        (lambda source: source.open_files_by_azure(prefetch=-1), ValueError, "prefetch"),
        (lambda source: source.read_files_by_azure(prefetch="8"), TypeError, "prefetch"),
        (lambda source: source.read_files_by_azure(transfer=8), TypeError, "transfer"),
        (lambda source: source.load_files_by_azure(credential="key"), TypeError, "credential"),
        (lambda source: source.load_files_by_azure(credentail=None), TypeError, "credentail"),
    ],
)
def test_wrong_arguments_fail_at_once(build: Any, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        build(IterableWrapper([]))


@pytest.mark.parametrize("reader", READERS)
def test_what_names_no_blob_is_refused_in_its_turn(fault_service: FaultService, reader: str) -> None:
    urls = fill(fault_service, 5)
    transfer = replace(SMALL, max_connections=31)  # a separate engine
    for wrong, error, message in (
        (7, TypeError, "URL of a blob"),
        (fault_service.container_url("data"), ValueError, "is the URL of a container, not of a blob"),
    ):
        samples = iter(getattr(IterableWrapper([*urls, wrong]), reader)(credential=False, transfer=transfer))
        assert [data_of(next(samples)[1]) for _ in urls] == [content(number) for number in range(5)]
        with pytest.raises(error, match=message):
            next(samples)
    wait_until(lambda: engine_for(transfer).budget.in_flight == 0)


@pytest.mark.parametrize("reader", READERS)
def test_the_length_is_that_of_the_source(reader: str) -> None:
    assert len(getattr(IterableWrapper(["a", "b"]), reader)()) == 2
    unknown = getattr(pipes.AzureBlobFileLister("https://account.blob.core.windows.net/c"), reader)()
    with pytest.raises(TypeError, match="length"):
        len(unknown)


# -- together with torch -----------------------------------------------------------------------------------------------


@needs_torchs_pipes
def test_it_composes_with_torchs_own_pipes(fault_service: FaultService) -> None:
    urls = fill(fault_service, 20)

    def read() -> Any:
        listed = pipes.AzureBlobFileLister(fault_service.container_url("data"), credential=False)
        return listed.read_files_by_azure(credential=False, transfer=SMALL)

    lengths = [(url, len(content(number))) for number, url in enumerate(urls)]
    assert list(read().map(url_and_length)) == lengths
    assert [len(batch) for batch in read().batch(8)] == [8, 8, 4]
    assert [first(sample) for sample in read().filter(is_even)] == urls[::2]
    assert sorted(map(url_and_length, read().shuffle())) == lengths
    one, two = read().fork(2)
    assert [a == b for a, b in one.zip(two)] == [True] * 20
    even, odd = read().demux(2, parity)
    assert [first(sample) for sample in even] == urls[::2]
    assert [first(sample) for sample in odd] == urls[1::2]
    assert len(list(read().concat(read()))) == 40


def test_readers_collate(fault_service: FaultService) -> None:
    urls = fill(fault_service, 4)
    listed = pipes.AzureBlobInfoLister(fault_service.container_url("data"), credential=False)
    ((names, data),) = DataLoader(listed.read_files_by_azure(credential=False), batch_size=4)
    assert list(names) == urls
    assert list(data) == [content(number) for number in range(4)]
    (infos,) = DataLoader(listed, batch_size=4)
    assert infos.size.tolist() == [len(content(number)) for number in range(4)]


@pytest.mark.parametrize(
    ("method", "shuffle"),
    [("fork", False), ("fork", True), ("spawn", False), pytest.param("forkserver", False, marks=pytest.mark.slow)],
)
def test_workers_read_each_sample_once_with_their_credential(container: Container, method: str, shuffle: bool) -> None:
    """With every start method, also while the parent uses the pipe; the key reaches the worker."""
    for number in range(9):
        container.put(f"{number:04d}", content(number))
    listed = pipes.AzureBlobFileLister(container.url, credential=container.key)
    listed = listed.shuffle().sharding_filter() if shuffle else listed.shard_blobs()
    pipe = listed.read_files_by_azure(credential=container.key, transfer=SMALL)
    samples = iter(pipe)
    next(samples)
    loader = DataLoader(pipe, batch_size=2, num_workers=2, multiprocessing_context=method, collate_fn=list)
    read = Counter(sample for batch in loader for sample in batch)
    assert read == Counter((container.blob_url(f"{number:04d}"), content(number)) for number in range(9))


@needs_torchs_pipes
@pytest.mark.parametrize(
    "method",
    ["fork", pytest.param("spawn", marks=pytest.mark.slow), pytest.param("forkserver", marks=pytest.mark.slow)],
)
@pytest.mark.parametrize("workers", [1, 2])
def test_workers_that_live_on_read_each_sample_once_in_each_epoch(
    fault_service: FaultService, method: str, workers: int
) -> None:
    """In another order after a shuffle; also with pipes that share a source, and with ranges."""
    urls = fill(fault_service, 12)
    listed = pipes.AzureBlobInfoLister(fault_service.container_url("data"), credential=False).shuffle()
    ranges = listed.split_blob_ranges(100_000, credential=False).shard_blobs()
    even, odd = ranges.read_files_by_azure(credential=False, transfer=SMALL).demux(2, parity)
    pipe = even.concat(odd).map(url_and_length)
    loader = DataLoader(
        pipe, batch_size=None, num_workers=workers, multiprocessing_context=method, persistent_workers=True
    )
    epochs = [list(loader), list(loader)]
    assert epochs[0] != epochs[1]
    for epoch in epochs:
        lengths = Counter[str]()
        for url, length in epoch:
            lengths[url] += length
        assert lengths == Counter({url: len(content(number)) for number, url in enumerate(urls) if content(number)})
        assert len(epoch) == sum(-(-len(content(number)) // 100_000) for number in range(12))


def test_open_streams_come_out_of_workers(container: Container) -> None:
    """A worker can yield the stream itself: the receiver opens it again, at the same version."""
    container.put("a", b"0123456789")
    opened = IterableWrapper([container.blob_url("a")]).open_files_by_azure(credential=container.key)
    ((_, stream),) = DataLoader(opened, num_workers=1, batch_size=None)
    assert stream.read() == b"0123456789"


def read_shard(rank: int, world: int, store: str, url: str, key: Any, workers: int, out: str) -> None:
    torch.distributed.init_process_group("gloo", f"file://{store}", rank=rank, world_size=world)
    listed = pipes.AzureBlobFileLister(url, credential=key).shuffle().sharding_filter()
    read = listed.read_files_by_azure(credential=key).map(first)
    for _ in range(2):
        urls = list(DataLoader(read, batch_size=None, num_workers=workers))
        with Path(out, f"{rank}").open("a") as file:
            file.writelines(f"{url}\n" for url in urls)
    torch.distributed.destroy_process_group()


@needs_torchs_pipes  # its DataLoader gives all ranks one seed for `shuffle`; the stand-in requests it
@pytest.mark.timeout(600)  # every worker is spawned in every epoch, and imports torch
@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.exhaustive)])
def test_two_ranks_read_each_sample_once(container: Container, tmp_path: Path, workers: int) -> None:
    for number in range(10):
        container.put(f"{number:04d}", b"x")
    run = torch.multiprocessing.start_processes
    sas = container.sas_url
    run(read_url_shard, (2, str(tmp_path / "store"), sas, workers, str(tmp_path)), nprocs=2, start_method="spawn")
    read = Counter("".join((tmp_path / rank).read_text() for rank in "01").split())
    assert read == Counter(dict.fromkeys((container.blob_url(f"{number:04d}") for number in range(10)), 2))


def read_url_shard(rank: int, world: int, store: str, sas_url: str, workers: int, out: str) -> None:
    from azure.core.credentials import AzureSasCredential

    url, _, sas = sas_url.partition("?")
    read_shard(rank, world, store, url, AzureSasCredential(sas), workers, out)


def copied(url: str) -> str:
    return url.replace("/data/", "/copies/")


def sized(sample: dict[str, Any]) -> dict[str, Any]:
    return {"__key__": sample["__key__"], "size": str(len(sample[""]))}


def keyed(sample: tuple[str, bytes]) -> tuple[str, bytes]:
    return f"{sample[0]}.", sample[1]


GRAPHS: dict[str, Any] = {
    "list": lambda _infos, url, access: pipes.AzureBlobFileLister(url, **access),
    "list of roots": lambda _infos, url, access: IterableWrapper([url]).list_blobs_by_azure(**access),
    "shard": lambda infos, _url, _access: infos.shard_blobs(by="size"),
    "open": lambda infos, _url, access: infos.open_files_by_azure(**access).read_from_stream(),
    "load": lambda infos, _url, access: infos.load_files_by_azure(**access).read_from_stream(),
    "split": lambda infos, _url, access: infos.split_blob_ranges(50_000, **access).read_files_by_azure(**access),
    "save": lambda infos, _url, access: infos.read_files_by_azure(**access).save_by_azure(copied, **access),
    "group": lambda infos, _url, access: infos.read_files_by_azure(**access).map(keyed).group_blob_samples(),
    "pack": lambda infos, url, access: (
        infos.read_files_by_azure(**access)
        .map(keyed)
        .group_blob_samples()
        .map(sized)
        .write_blob_tar_shards(copied(f"{url}/{{shard}}.tar"), max_count=1, **access)
    ),
    "expand": lambda _infos, url, access: (
        pipes.AzureBlobFileLister(url.replace("/data", "/tars"), **access)
        .open_files_by_azure(**access)
        .expand_blob_tar()
        .read_from_stream()
    ),
}


@needs_torchs_pipes
@pytest.mark.parametrize("graph", GRAPHS)
def test_nothing_alive_is_in_a_pipe(fault_service: FaultService, graph: str) -> None:
    """Traversal, pickling and copying work during an iteration, for every pipe."""
    fill(fault_service, 6)
    fault_service.create_container("copies")
    fault_service.put("tars", "a.tar", make_tar({f"{number}.txt": content(number) for number in range(1, 4)}))
    url = fault_service.container_url("data")
    infos = pipes.AzureBlobInfoLister(url, credential=False)
    pipe = GRAPHS[graph](infos, url, {"credential": False, "transfer": SMALL})
    samples = iter(pipe)
    first = next(samples)
    assert len(traverse_dps(pipe)) == 1
    again = list(pickle.loads(pickle.dumps(pipe)))
    assert again[0] == first
    assert again[1:] == list(samples)
    assert len(again) > 2


def test_secrets_are_in_no_plain_pickle_but_the_rest_is(container: Container) -> None:
    pipe = IterableWrapper([container.blob_url("a")]).read_files_by_azure(credential=container.key)
    pickled = pickle.dumps(pipe)
    assert container.service.account_key.encode() not in pickled
    with pytest.raises(ValueError, match="left out when it was pickled"):
        list(pickle.loads(pickled))


def test_a_local_function_gets_torchs_own_words(container: Container) -> None:
    def filepath(name: str) -> str:
        return f"{container.url}/{name}"

    with pytest.warns(UserWarning, match="Local function is not supported by pickle"):
        pipe = IterableWrapper([("a", b"")]).save_by_azure(filepath, credential=False)
    with pytest.raises((AttributeError, pickle.PicklingError), match="local"):
        list(DataLoader(pipe, num_workers=1, multiprocessing_context="spawn"))


@pytest.mark.parametrize("reader", READERS)
def test_re_iterating_while_reads_block(fault_service: FaultService, reader: str) -> None:
    """Reads in flight are cancelled at once; the new iteration starts from the beginning and misses nothing."""
    urls = fill(fault_service, 8)
    gate = threading.Event()
    rule = fault_service.script(Match("get_blob", path="0002"), [Hold(gate)], repeat=True)
    pipe = getattr(IterableWrapper(urls), reader)(credential=False, transfer=SMALL)
    samples = iter(pipe)
    next(samples)
    deadline = time.monotonic() + 60
    while not rule.fired:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    fault_service.clear_script()
    assert [data_of(value) for _, value in pipe] == [content(number) for number in range(8)]
    gate.set()


# -- the module --------------------------------------------------------------------------------------------------------


def test_it_never_imports_torchdata() -> None:
    program = (
        "import sys, azstoragetorch.datapipes; sys.exit(any(n.partition('.')[0] == 'torchdata' for n in sys.modules))"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=100)


# Registered on IterDataPipe by torchdata 0.9, in addition to torch; registering a name twice raises an error.
# fmt: off
TORCHDATA_NAMES = {
    "add_index", "async_map_batches", "bucketbatch", "check_hash", "cycle", "dataframe", "decompress", "drop",
    "end_caching", "enumerate", "extract", "flatmap", "flatten", "fullsync", "header", "in_batch_shuffle",
    "in_memory_cache", "lines_to_paragraphs", "list_files_by_ais", "list_files_by_fsspec", "list_files_by_iopath",
    "list_files_by_s3", "load_files_by_ais", "load_files_by_s3", "load_from_bz2", "load_from_rar", "load_from_tar",
    "load_from_tfrecord", "load_from_xz", "load_from_zip", "load_parquet_as_df", "map_batches",
    "max_token_bucketize", "memory_cell", "mux_longest", "on_disk_cache", "open_files_by_fsspec",
    "open_files_by_iopath", "parse_csv", "parse_csv_as_dict", "parse_json_files", "pin_memory", "prefetch",
    "random_split", "read_from_gdrive", "read_from_http", "read_from_remote", "readlines", "repeat",
    "round_robin_demux", "rows2columnar", "save_by_fsspec", "save_by_iopath", "save_to_disk", "set_length",
    "shard_expand", "sharding_round_robin_dispatch", "shuffled_flatmap", "slice", "threadpool_map",
    "to_map_datapipe", "unzip", "webdataset", "zip_longest", "zip_with_iter", "zip_with_map",
}
# fmt: on


def test_functional_names_are_registered_and_nobody_elses() -> None:
    names = {
        "list_files_by_azure", "list_blobs_by_azure", "open_files_by_azure", "load_files_by_azure",
        "read_files_by_azure", "save_by_azure", "shard_blobs", "split_blob_ranges", "expand_blob_tar",
        "group_blob_samples", "write_blob_tar_shards", "to_resumable",
    }  # fmt: skip
    assert names <= set(IterDataPipe.functions)
    assert not names & TORCHDATA_NAMES


def test_aliases_follow_torchs_convention() -> None:
    long = [name for name in pipes.__all__ if name.endswith("IterDataPipe")]
    assert len(long) == 12
    for name in long:
        assert getattr(pipes, name) is getattr(pipes, name.removesuffix("IterDataPipe"))
