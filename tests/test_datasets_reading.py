"""Which requests datasets send, in which order, and how they handle failures."""

from __future__ import annotations

import gc
import itertools
import threading
import traceback
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from azure.core.exceptions import AzureError, ClientAuthenticationError, HttpResponseError, ResourceNotFoundError
from torch.utils.data import DataLoader

from azstoragetorch._engine.config import KiB
from azstoragetorch._engine.threads import engine_for
from azstoragetorch.datasets import Blob, BlobDataset, IterableBlobDataset
from tests.faults import FaultService, Hold, Match, Redirect, Status, Together, Torn
from tests.support import QUICK, collect_garbage, content, in_time, wait_until, watch_peak

MANY = replace(QUICK, max_connections=16, memory_limit=4 << 20)


def fill(service: FaultService, count: int, size: int = 1000) -> list[str]:
    service.create_container("data")
    names = [f"{index:05d}" for index in range(count)]
    for index, name in enumerate(names):
        service.put("data", name, content(size, index))
    return names


def iterable(service: FaultService, **options: Any) -> Any:
    options = {"credential": False, "transfer": MANY, **options}
    return IterableBlobDataset.from_container_url(service.container_url("data"), **options)


def map_style(service: FaultService, **options: Any) -> Any:
    options = {"credential": False, "transfer": MANY, **options}
    return BlobDataset.from_container_url(service.container_url("data"), **options)


def read(blob: Blob) -> bytes:
    with blob.reader() as reader:
        return reader.read()


def test_a_small_blob_is_one_request_and_listing_happens_once(fault_service: FaultService) -> None:
    names = fill(fault_service, 50)
    dataset = iterable(fault_service)
    assert fault_service.log == []
    for _ in range(2):
        assert [sample["data"] for sample in dataset] == [content(1000, i) for i in range(50)]
    assert len(fault_service.requests("list_blobs")) == 1
    assert sorted(r.blob for r in fault_service.requests("get_blob")) == sorted(names * 2)
    assert len(fault_service.log) == 101


def test_reads_run_ahead_in_one_process_and_stay_in_order(fault_service: FaultService) -> None:
    """The first blob is held back until the service has received requests for many others."""
    names = fill(fault_service, 40)
    gate = threading.Event()
    fault_service.script(Match("get_blob", path="/00000$"), [Hold(gate)])
    dataset = iterable(fault_service)
    samples = iter(dataset)
    first: list[Any] = []
    reader = threading.Thread(target=lambda: first.append(next(samples)))
    reader.start()
    fault_service.wait_for_requests(16, "get_blob")
    assert not first
    assert dataset.state_dict()["position"] <= 1
    gate.set()
    reader.join(240)
    rest = [sample["url"].rpartition("/")[2] for sample in samples]
    assert [first[0]["url"].rpartition("/")[2], *rest] == names


def test_what_is_ahead_is_bounded_by_bytes_and_a_larger_blob_goes_alone(fault_service: FaultService) -> None:
    size = 60 * KiB
    fill(fault_service, 60, size)
    transfer = replace(QUICK, max_connections=60, memory_limit=1 << 20)
    peak = watch_peak(engine_for(transfer).budget)
    samples = iter(iterable(fault_service, transfer=transfer))
    next(samples)
    fault_service.wait_for_requests(2, "get_blob")
    fault_service.wait_until_idle()
    ahead = len(fault_service.requests("get_blob"))
    assert 2 <= ahead <= (1 << 20) // size + 1
    assert sum(1 for _ in samples) == 59
    assert engine_for(transfer).budget.in_flight == 0
    assert peak() <= 1 << 20


@pytest.mark.parametrize("make", [iterable, map_style])
def test_what_a_transform_does_not_read_is_not_fetched(fault_service: FaultService, make: Any) -> None:
    fill(fault_service, 30)
    dataset = make(fault_service, transform=lambda blob: (blob.url, blob.size, blob.etag))
    samples = dataset.__getitems__(range(30)) if make is map_style else list(dataset)
    assert [size for _, size, _ in samples] == [1000] * 30
    assert all(etag.startswith('"') for _, _, etag in samples)
    assert fault_service.requests("get_blob") == []


@pytest.mark.parametrize("workers", [0, 2])
def test_without_shards_every_worker_reads_everything(fault_service: FaultService, workers: int) -> None:
    fill(fault_service, 5)
    dataset = iterable(fault_service, transform=read, shard_by="none")
    samples = list(DataLoader(dataset, None, num_workers=workers))
    assert sorted(samples) == sorted([content(1000, i) for i in range(5)] * max(workers, 1))


def test_a_transform_that_reads_few_blobs_fetches_few(fault_service: FaultService) -> None:
    fill(fault_service, 200)
    dataset = iterable(fault_service, transform=lambda blob: read(blob) if blob.blob_name.endswith("00") else None)
    assert sum(1 for data in dataset if data) == 2
    assert len(fault_service.requests("get_blob")) <= 2 * 6


def test_a_transform_that_reads_all_is_read_ahead_for(fault_service: FaultService) -> None:
    fill(fault_service, 64)
    fault_service.script(Match("get_blob", path=r"/000[2-6]\d$"), [Together(8)], repeat=True)  # from the 20th on
    assert list(iterable(fault_service, transform=read)) == [content(1000, i) for i in range(64)]
    assert len(fault_service.requests("get_blob")) == 64
    assert fault_service.peak_active >= 8


def test_of_a_large_blob_only_the_first_part_is_ahead(fault_service: FaultService) -> None:
    size, part = 1000 * KiB, QUICK.part_size
    fill(fault_service, 5, size)
    seen: list[int] = []

    def first_bytes(blob: Blob) -> bytes:
        with blob.reader() as reader:
            assert (reader.size, blob.size) == (size, size)
            seen.append(len(fault_service.requests("get_blob")))
            return reader.read(100)

    quiet = replace(MANY, read_ahead=0)
    assert list(iterable(fault_service, transform=first_bytes, transfer=quiet)) == [
        content(size, i)[:100] for i in range(5)
    ]
    spans = [request.range for request in fault_service.requests("get_blob")]
    assert spans == [(0, part)] * 5
    fault_service.reset_log()
    assert list(iterable(fault_service, transform=read)) == [content(size, i) for i in range(5)]
    read_once = sum(request.sent for request in fault_service.requests("get_blob"))
    assert read_once == 5 * size


def test_a_batch_of_a_map_style_dataset_is_fetched_at_once(fault_service: FaultService) -> None:
    fill(fault_service, 40)
    dataset = map_style(fault_service)
    fault_service.reset_log()
    fault_service.script("get_blob", [Together(6)], repeat=True)
    indices = [31, 5, 17, 5, 39, 0, -1, 2]
    assert [sample["data"] for sample in dataset.__getitems__(indices)] == [content(1000, i % 40) for i in indices]
    assert fault_service.peak_active >= 6
    assert len(fault_service.log) == len(indices)


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_in_sequence_are_read_ahead_and_only_once(fault_service: FaultService, workers: int) -> None:
    fill(fault_service, 101)
    dataset = map_style(fault_service, transform=read)
    for _ in range(2):
        fault_service.reset_log()
        loader = DataLoader(dataset, batch_size=8, num_workers=workers, collate_fn=list)
        assert [data for batch in loader for data in batch] == [content(1000, i) for i in range(101)]
        assert len(fault_service.requests("get_blob")) == 101
        assert fault_service.requests("list_blobs") == []


def test_batches_at_random_fetch_nothing_else(fault_service: FaultService) -> None:
    fill(fault_service, 64)
    dataset = map_style(fault_service)
    seen = [sample["url"] for batch in DataLoader(dataset, 8, shuffle=True, collate_fn=list) for sample in batch]
    assert len(set(seen)) == 64
    assert len(fault_service.requests("get_blob")) == 64


@pytest.mark.parametrize("batch", [[31, 5, 17], [7], list(range(32, 40))])
def test_a_batch_after_which_none_is_foreseen_holds_no_memory(fault_service: FaultService, batch: list[int]) -> None:
    fill(fault_service, 40)
    transfer = replace(MANY, max_connections=11)
    dataset = map_style(fault_service, transfer=transfer)
    dataset.__getitems__(batch)
    assert engine_for(transfer).budget.in_flight == 0


def test_batches_that_jump_are_right_whatever_was_foreseen(fault_service: FaultService) -> None:
    fill(fault_service, 60)
    dataset = map_style(fault_service)
    for start in (0, 8, 16, 0, 8, 40, 48, 56, 8):
        indices = [i for i in range(start, start + 8) if i < 60]
        assert [s["data"] for s in dataset.__getitems__(indices)] == [content(1000, i) for i in indices]


def test_indices_are_those_of_a_list(fault_service: FaultService) -> None:
    fill(fault_service, 3)
    dataset = map_style(fault_service)
    assert dataset[-1]["data"] == content(1000, 2)
    for wrong in (3, -4):
        with pytest.raises(IndexError, match=f"index {wrong} is out of range for a dataset of 3 blobs"):
            dataset[wrong]
        with pytest.raises(IndexError, match=f"index {wrong}"):
            dataset.__getitems__([0, wrong])
    with pytest.raises(TypeError):
        dataset["0"]


def test_an_iterator_that_is_dropped_gives_everything_back(fault_service: FaultService) -> None:
    fill(fault_service, 64)
    transfer = replace(MANY, max_connections=13)
    samples = iter(iterable(fault_service, transfer=transfer))
    next(samples)
    del samples
    collect_garbage()
    fault_service.wait_until_idle()
    wait_until(lambda: engine_for(transfer).budget.in_flight == 0)
    assert len(fault_service.requests("get_blob")) <= 14


def test_what_the_service_stumbles_over_is_tried_again(fault_service: FaultService) -> None:
    fill(fault_service, 30)
    faults = [Status(503), Torn(after=10), Status(500)]
    fault_service.script(Match("get_blob", nth=3, every=4), faults)
    fault_service.script("list_blobs", [Status(503)])
    assert [s["data"] for s in iterable(fault_service)] == [content(1000, i) for i in range(30)]
    assert fault_service.unused_faults() == []


def lose(service: FaultService, dataset: Any, *indices: int) -> None:
    _ = dataset.metadata
    for index in indices:
        service.delete("data", f"{index:05d}")


def test_an_error_is_raised_in_its_turn_and_the_next_blob_follows(fault_service: FaultService) -> None:
    fill(fault_service, 10)
    dataset = iterable(fault_service)
    lose(fault_service, dataset, 4)
    samples = iter(dataset)
    assert len(list(itertools.islice(samples, 4))) == 4
    with pytest.raises(ResourceNotFoundError, match="00004"):
        next(samples)
    assert dataset.state_dict()["position"] == 5
    assert [s["data"] for s in samples] == [content(1000, i) for i in range(5, 10)]


@pytest.mark.parametrize("on_error", ["skip", "warn", "call"])
def test_errors_can_be_skipped_and_count_as_consumed(fault_service: FaultService, on_error: str) -> None:
    fill(fault_service, 10)
    told: list[tuple[str, Exception]] = []
    handler: Any = (lambda url, error: told.append((url, error))) if on_error == "call" else on_error

    def picky(blob: Blob) -> bytes:
        if blob.blob_name == "00007":
            raise KeyError("not an image")
        return read(blob)

    dataset = iterable(fault_service, on_error=handler, transform=picky)
    lose(fault_service, dataset, 0, 9)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert list(dataset) == [content(1000, i) for i in (1, 2, 3, 4, 5, 6, 8)]
    assert dataset.state_dict()["position"] == 10
    texts = [str(entry.message) for entry in caught if entry.category is RuntimeWarning]
    assert len(texts) == (3 if on_error == "warn" else 0)
    assert all(name in text for name, text in zip(("00000", "KeyError", "00009"), texts, strict=False))
    if on_error == "call":
        assert [(url[-5:], type(error)) for url, error in told] == [
            ("00000", ResourceNotFoundError),
            ("00007", KeyError),
            ("00009", ResourceNotFoundError),
        ]


def test_what_a_handler_raises_is_raised(fault_service: FaultService) -> None:
    fill(fault_service, 3)

    def refuse(url: str, error: Exception) -> None:
        raise RuntimeError(url) from error

    dataset = iterable(fault_service, on_error=refuse)
    lose(fault_service, dataset, 1)
    with pytest.raises(RuntimeError, match="00001"):
        list(dataset)


@pytest.mark.parametrize("status", [401, 403])
@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("on_error", ["skip", "warn", lambda url, error: None])
def test_a_refusal_is_never_skipped(fault_service: FaultService, status: int, workers: int, on_error: Any) -> None:
    fill(fault_service, 10)
    dataset = iterable(fault_service, on_error=on_error)
    fault_service.script(Match("get_blob", path="00003"), [Status(status)] * 2)
    with pytest.raises(ClientAuthenticationError, match=f"00003: {status}.*No credential was sent"):
        list(DataLoader(dataset, batch_size=None, num_workers=workers))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_listing_that_is_refused_is_raised_on_first_use(fault_service: FaultService, workers: int) -> None:
    fill(fault_service, 3)
    fault_service.script("list_blobs", [Status(403)], repeat=True)
    dataset = iterable(fault_service, on_error="skip")
    assert "not listed yet" in repr(dataset)
    with pytest.raises(ClientAuthenticationError, match=r"403.*No credential was sent"):
        list(DataLoader(dataset, batch_size=None, num_workers=workers))
    with pytest.raises(ClientAuthenticationError, match="403"):
        map_style(fault_service)


def test_a_listing_that_failed_is_tried_again(fault_service: FaultService) -> None:
    fill(fault_service, 3)
    rule = fault_service.script("list_blobs", [Status(403)])
    dataset = iterable(fault_service)
    with pytest.raises(HttpResponseError):
        iter(dataset)
    assert rule.is_exhausted
    assert len(list(dataset)) == 3


@pytest.mark.parametrize("make", [iterable, map_style])
def test_a_transform_that_raises_stop_iteration_does_not_end_the_epoch(fault_service: FaultService, make: Any) -> None:
    fill(fault_service, 5)
    dataset = make(fault_service, transform=lambda blob: next(iter([])))
    with pytest.raises(RuntimeError, match="the transform raised StopIteration"):
        list(DataLoader(dataset, batch_size=2))


def test_urls_may_come_from_a_generator_with_states_and_signatures_of_their_own(fault_service: FaultService) -> None:
    service = fault_service
    service.put("data", "a", b"old")
    snapshot = service.snapshot("data", "a")
    service.put("data", "a", b"new")
    service.put("other", "b c", b"other")
    urls = [
        service.blob_url("data", "a"),
        service.blob_url("data", "a", snapshot=snapshot),
        service.blob_url("other", "b c"),
        service.blob_url("data", "a") + "?sv=2020-01-01&sig=secret%2B",
    ]
    for kind in (BlobDataset, IterableBlobDataset):
        dataset: Any = kind.from_blob_urls((url for url in urls), credential=False, transfer=QUICK)
        for _ in range(2):
            samples = list(dataset) if kind is IterableBlobDataset else dataset.__getitems__(range(4))
            assert [sample["data"] for sample in samples] == [b"new", b"old", b"other", b"new"]
            assert [sample["url"] for sample in samples] == [url.partition("?")[0] for url in urls]
    assert [r.query.get("sig") for r in service.requests("get_blob")].count("secret+") == 4
    (single,) = IterableBlobDataset.from_blob_urls(urls[0], credential=False)
    assert single["data"] == b"new"


@pytest.mark.parametrize(
    ("make", "error", "match"),
    [
        (
            lambda url: BlobDataset.from_blob_urls([url]),
            ValueError,
            "blob_url .* is the URL of a container, not of a blob",
        ),
        (lambda url: BlobDataset.from_blob_urls(7), TypeError, "blob_urls must be a URL or an iterable"),  # type: ignore[call-overload]
        (lambda url: BlobDataset.from_blob_urls([7]), TypeError, "blob_urls must be strings"),  # type: ignore[list-item]
        (lambda url: BlobDataset.from_container_url(f"{url}/blob"), ValueError, "container_url .* not of a container"),
        (
            lambda url: IterableBlobDataset.from_container_url("https://x.y"),
            ValueError,
            "container_url .* no container",
        ),
        (lambda url: IterableBlobDataset.from_container_url(url, even="both"), ValueError, "even must be one of"),
        (lambda url: IterableBlobDataset.from_container_url(url, shard_by="gpu"), ValueError, "shard_by must be one"),
        (lambda url: IterableBlobDataset.from_container_url(url, on_error="log"), ValueError, "on_error must be"),
        (lambda url: IterableBlobDataset.from_container_url(url, seed=1.5), TypeError, "seed must be an int"),
        (lambda url: IterableBlobDataset.from_container_url(url, prefix=b""), TypeError, "prefix must be a str"),
        (lambda url: BlobDataset.from_container_url(url, prefix=0), TypeError, "prefix must be a str"),  # type: ignore[call-overload]
        (lambda url: IterableBlobDataset.from_container_url(url, progress="bar"), TypeError, "progress must be"),
        (lambda url: IterableBlobDataset.from_container_url(url, cache_dir=7), TypeError, "cache_dir must be a path"),
        (
            lambda url: IterableBlobDataset.from_container_url(url, cache_dir=""),
            ValueError,
            "cache_dir must not be empty",
        ),
        (lambda url: IterableBlobDataset.from_container_url(url, rank=0), ValueError, "go together"),
        (
            lambda url: IterableBlobDataset.from_container_url(url, shard_by="rank_and_worker", rank="0", world_size=2),
            TypeError,
            "rank must be an int, not str",
        ),
        (
            lambda url: IterableBlobDataset.from_container_url(url, shard_by="rank_and_worker", rank=0, world_size=2.0),
            TypeError,
            "world_size must be an int, not float",
        ),
        (lambda url: IterableBlobDataset.from_container_url(url, shufle=True), TypeError, "shufle"),
        (
            lambda url: IterableBlobDataset.from_container_url(url, shard_by="rank_and_worker", rank=2, world_size=2),
            ValueError,
            "rank must be between 0 and world_size - 1 = 1, not 2",
        ),
        (
            lambda url: IterableBlobDataset.from_container_url(url, rank=0, world_size=2),
            ValueError,
            "need shard_by='rank_and_worker'",
        ),
    ],
)
def test_bad_input_is_named(make: Any, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        make("https://account.blob.core.windows.net/container")


@pytest.mark.parametrize("make", [iterable, map_style])
def test_leaving_early_gives_everything_back(fault_service: FaultService, make: Any) -> None:
    fill(fault_service, 60, 10_000)
    transfer = replace(MANY, max_connections=23)  # a separate engine
    budget = engine_for(transfer).budget
    samples = iter(DataLoader(make(fault_service, transfer=transfer), batch_size=8, collate_fn=list))
    assert [sample["data"] for sample in next(samples)] == [content(10_000, index) for index in range(8)]
    assert budget.in_flight > 0
    del samples
    collect_garbage()
    wait_until(lambda: budget.in_flight == 0)


@pytest.mark.parametrize("fault", [Status(404), Status(500), Torn(100), Redirect("http://127.0.0.1:9")], ids=repr)
def test_an_epoch_that_fails_gives_everything_back_without_a_garbage_collection(
    fault_service: FaultService, fault: Any
) -> None:
    fill(fault_service, 60, 10_000)
    fault_service.script(Match("get_blob", path="/00003$"), [fault], repeat=True)
    transfer = replace(MANY, max_connections=29)  # a separate engine
    collect_garbage()
    gc.disable()
    try:
        with pytest.raises(AzureError):
            list(iterable(fault_service, transfer=transfer))
        fault_service.wait_until_idle()
        wait_until(lambda: engine_for(transfer).budget.in_flight == 0)
    finally:
        gc.enable()


def test_a_read_that_failed_is_tried_again_when_it_is_asked_for_again(fault_service: FaultService) -> None:
    def read_twice(blob: Blob) -> bytes:
        try:
            return read(blob)
        except ResourceNotFoundError:
            return b"second: " + read(blob)

    fill(fault_service, 3)
    fault_service.script(Match("get_blob", path="/00001$"), [Status(404), Status(404)])  # read ahead, by a thread
    samples = list(iterable(fault_service, transform=read_twice))
    assert samples == [content(1000, 0), b"second: " + content(1000, 1), content(1000, 2)]


# -- transforms that fail, or ask for more -----------------------------------------------------------------------------


class TwoArgumentsError(Exception):
    def __init__(self, what: str, where: int) -> None:
        super().__init__(what, where)


def failing(blob: Blob) -> None:
    if blob.blob_name == "00002":
        raise KeyError("label")


def failing_oddly(blob: Blob) -> None:
    raise TwoArgumentsError("broken", 7)


def shown(error: BaseException) -> str:
    return "".join(traceback.format_exception(type(error), error, error.__traceback__))


@pytest.mark.parametrize("make", [iterable, map_style])
@pytest.mark.parametrize("workers", [0, 1])
def test_an_error_of_a_transform_names_the_blob(fault_service: FaultService, make: Any, workers: int) -> None:
    """Its type does not change, also in workers."""
    fill(fault_service, 4)
    with pytest.raises(KeyError) as caught:
        list(DataLoader(make(fault_service, transform=failing), 2, num_workers=workers, collate_fn=list))
    assert f"the transform failed on {fault_service.blob_url('data', '00002')}" in shown(caught.value)


def test_an_error_whose_class_wants_more_than_a_message_names_the_blob_too(fault_service: FaultService) -> None:
    fill(fault_service, 1)
    with pytest.raises((TwoArgumentsError, RuntimeError)) as caught:
        map_style(fault_service, transform=failing_oddly)[0]
    assert f"the transform failed on {fault_service.blob_url('data', '00000')}" in shown(caught.value)


def test_on_error_gets_the_named_error(fault_service: FaultService) -> None:
    fill(fault_service, 4)
    seen: list[tuple[str, Exception]] = []
    dataset = iterable(fault_service, transform=failing, on_error=lambda url, error: seen.append((url, error)))
    assert len(list(dataset)) == 3
    ((url, error),) = seen
    assert isinstance(error, KeyError)
    assert url in shown(error)


@pytest.mark.parametrize("access", ["one", "batch"])
def test_a_transform_can_take_more_samples_of_its_dataset(fault_service: FaultService, access: str) -> None:
    """Mixup: each sample is mixed with others, which are read as a batch or one by one."""
    fill(fault_service, 6)
    depth: list[int] = []

    def mix(blob: Blob) -> int:
        if depth:
            return read(blob)[0]
        depth.append(1)
        try:
            more = dataset.__getitems__([1, 3, 4, 5]) if access == "batch" else [dataset[i] for i in (1, 3, 4, 5)]
            return read(blob)[0] + sum(more)
        finally:
            depth.clear()

    dataset = map_style(fault_service, transform=mix)
    first = [content(1000, index)[0] for index in range(6)]
    extra = sum(first[index] for index in (1, 3, 4, 5))
    assert in_time(lambda: dataset.__getitems__(range(6))) == [value + extra for value in first]
    assert in_time(lambda: list(DataLoader(dataset, 3, collate_fn=list))) == [
        [value + extra for value in first[:3]],
        [value + extra for value in first[3:]],
    ]
    assert in_time(lambda: dataset.__getitems__([0])) == [first[0] + extra]  # which ends the read-ahead
    wait_until(lambda: engine_for(MANY).budget.in_flight == 0)


def test_an_iterator_that_is_asked_from_within_says_so(fault_service: FaultService) -> None:
    fill(fault_service, 3)
    samples: Any = None
    dataset = iterable(fault_service, transform=lambda _: next(samples))
    samples = iter(dataset)
    with pytest.raises(ValueError, match="already running"):
        next(samples)


def test_a_length_that_is_not_known_points_to_the_count(fault_service: FaultService) -> None:
    fill(fault_service, 3)
    dataset = iterable(fault_service, transform=read)
    for measured in (dataset, DataLoader(dataset, None)):
        with pytest.raises(TypeError, match=r"dataset\.metadata\.count"):
            len(measured)
    assert dataset
    assert len(list(dataset)) == dataset.metadata.count == 3


# -- what reads the same again without being asked to ------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("persistent", [False, True])
def test_a_forgotten_set_epoch_is_warned_of_once(
    fault_service: FaultService, workers: int, persistent: bool, tmp_path: Path
) -> None:
    """Reading the first samples does not count as an epoch, and setting the same epoch again is allowed."""
    fill(fault_service, 4)
    options: dict[str, Any] = {"num_workers": workers, "persistent_workers": persistent and workers > 0}
    seen = tmp_path / "seen"

    def note(message: Any, *_: Any, **__: Any) -> None:
        with seen.open("a") as file:  # also by forked workers
            file.write(f"{message}\n")

    def said(epochs: list[int | None]) -> int:
        seen.write_text("")
        dataset = iterable(fault_service, transform=name, shuffle=True)
        loader = DataLoader(dataset, None, **options)
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            warnings.showwarning = note
            for epoch in epochs:
                if epoch is not None:
                    dataset.set_epoch(epoch)
                list(loader)
        return seen.read_text().count("Call dataset.set_epoch(epoch) before each epoch")

    assert said([None, None, None]) == 1
    assert said([0, 1, 2]) == 0
    assert said([3, 3]) == 0
    dataset = iterable(fault_service, transform=name, shuffle=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        next(iter(dataset))
        assert len(list(dataset)) == 4


def name(blob: Blob) -> str:
    return blob.blob_name
