"""Splitting blobs into ranges: every record exactly once, nearly every byte once."""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from typing import Any

import pytest
from azure.core.exceptions import ClientAuthenticationError, ResourceNotFoundError
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader
from torchdata import nodes
from torchdata.nodes import Loader

from azstoragetorch import TransferConfig
from azstoragetorch._samples.records import read_records
from azstoragetorch.datapipes import AzureBlobInfoLister, BlobInfo, BlobRange
from azstoragetorch.datapipes._base import IterableWrapper
from azstoragetorch.exceptions import BlobChangedError
from azstoragetorch.nodes import BlobReader
from tests.azurite.container import Container
from tests.faults import FaultService, Hold, Match, Status

KiB, MiB = 1 << 10, 1 << 20


def lines_of(sample: tuple[str, bytes]) -> list[bytes]:
    return sample[1].splitlines(keepends=True)


def in_memory(data: bytes, chunk: int, delimiter: bytes) -> list[bytes]:
    """The records that the readers of all ranges return."""

    def read(start: int, stop: int) -> bytes:
        assert 0 <= start < stop <= len(data)
        return data[start:stop]

    return [
        read_records(start, min(start + chunk, len(data)), len(data), delimiter, read)
        for start in range(0, len(data), chunk)
    ]


@settings(max_examples=400, deadline=None)
@given(
    lines=st.lists(st.text(max_size=200), max_size=15),
    delimiter=st.sampled_from(["\n", "\r\n", "ab;"]),
    ends=st.booleans(),
    chunk=st.integers(1, 300),
)
def test_every_record_is_read_by_exactly_one_range(lines: list[str], delimiter: str, ends: bool, chunk: int) -> None:
    """Any lengths, boundaries inside multi-byte characters and delimiters, with or without a final delimiter."""
    end = delimiter.encode()
    records = [line.encode("utf-8", "replace").replace(end, b"") + end for line in lines]
    data = b"".join(records) if ends else b"".join(records)[: -len(end)]
    pieces = in_memory(data, chunk, end)
    assert b"".join(pieces) == data
    at = 0
    for number, piece in enumerate(pieces):
        if piece:
            assert number * chunk <= at < (number + 1) * chunk  # the range that its first record starts in
            assert at + len(piece) == len(data) or piece.endswith(end)
            assert piece.rfind(end, 0, -len(end)) + len(end) + at < (number + 1) * chunk or piece.count(end) <= 1
        at += len(piece)


@settings(max_examples=25, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 5000), max_size=60),
    newline=st.sampled_from(["\n", "\r\n"]),
    chunk=st.integers(200, 20_000),
    ends=st.booleans(),
)
def test_json_lines_over_the_wire(lengths: list[int], newline: str, chunk: int, ends: bool) -> None:
    lines = [
        json.dumps({"id": number, "text": "ü" * length}, ensure_ascii=False) for number, length in enumerate(lengths)
    ]
    data = newline.join([*lines, ""] if ends else lines).encode()
    with FaultService() as service:
        service.put("data", "a.jsonl", data)
        ranges = IterableWrapper([service.blob_url("data", "a.jsonl")]).split_blob_ranges(
            chunk, b"\n", credential=False
        )
        read = [line for sample in ranges.read_files_by_azure(credential=False) for line in lines_of(sample)]
    assert b"".join(read) == data
    assert [json.loads(line)["id"] for line in read] == list(range(len(lines)))


@pytest.mark.parametrize("record", [1, 7, 1000])
@pytest.mark.parametrize("chunk", [1, 999, 1000, 2500, 1 << 20])
def test_records_of_fixed_length_are_never_cut(fault_service: FaultService, record: int, chunk: int) -> None:
    if chunk == record == 1:
        chunk = 600
    data = b"".join(number.to_bytes(record, "big") for number in range(250 if record > 1 else 200))
    data = data[: len(data) // record * record]
    fault_service.put("data", "a", data)
    source = IterableWrapper([fault_service.blob_url("data", "a")])
    ranges = list(source.split_blob_ranges(chunk, record, credential=False))
    assert all((piece.stop - piece.start) % record == 0 for piece in ranges)
    assert all(piece.stop - piece.start <= max(chunk, record) for piece in ranges)
    read = IterableWrapper(ranges[:100]).read_files_by_azure(credential=False)
    assert b"".join(piece for _, piece in read) == data[: ranges[:100][-1].stop]


def test_a_blob_that_is_not_a_whole_number_of_records_is_refused(fault_service: FaultService) -> None:
    fault_service.put("data", "a", b"12345")
    source = IterableWrapper([fault_service.blob_url("data", "a")])
    with pytest.raises(ValueError, match=r"data/a has 5 bytes, which is not a multiple of the record length 2"):
        list(source.split_blob_ranges(10, 2, credential=False))


@pytest.mark.parametrize("reader", ["open_files_by_azure", "load_files_by_azure", "read_files_by_azure"])
def test_readers_take_ranges(container: Container, reader: str) -> None:
    container.put("a", b"one\ntwo\nthree\n")
    container.put("b", b"")
    listed = AzureBlobInfoLister(container.url, credential=container.key)
    for align, expected in ((None, [b"one\ntw", b"o\nthre", b"e\n"]), (b"\n", [b"one\ntwo\n", b"three\n", b""])):
        ranges = listed.split_blob_ranges(6, align, credential=container.key)
        read = list(getattr(ranges, reader)(credential=container.key))
        assert [data if isinstance(data, bytes) else data.read() for _, data in read] == expected
        assert {url for url, _ in read} == {container.blob_url("a")}


@pytest.mark.parametrize("part_size", [64 * KiB, 8 * MiB])
@pytest.mark.parametrize("workers", [0, 2])
def test_several_workers_read_every_line_once_and_every_byte_about_once(
    fault_service: FaultService, part_size: int, workers: int
) -> None:
    lines = [b"%06d %s\n" % (number, b"x" * (number * 7919 % 2000)) for number in range(16_000)]
    data = b"".join(lines)
    fault_service.put("data", "a.txt", data)
    transfer = TransferConfig(part_size=part_size)
    listed = AzureBlobInfoLister(fault_service.blob_url("data", "a.txt"), credential=False)
    ranges = listed.split_blob_ranges(1 * MiB, b"\n", credential=False).sharding_filter()
    pipe = ranges.read_files_by_azure(credential=False, transfer=transfer).map(lines_of).unbatch()
    assert Counter(DataLoader(pipe, batch_size=None, num_workers=workers)) == Counter(lines)
    assert sum(request.sent for request in fault_service.requests("get_blob")) <= 1.02 * len(data)


def test_a_range_is_of_the_version_that_was_split(fault_service: FaultService) -> None:
    fault_service.put("data", "a", b"old\nold\n")
    source = IterableWrapper([fault_service.blob_url("data", "a")])
    ranges = list(source.split_blob_ranges(4, b"\n", credential=False))
    fault_service.put("data", "a", b"new\nnew\n")
    with pytest.raises(BlobChangedError, match="data/a"):
        list(IterableWrapper(ranges).read_files_by_azure(credential=False))


@pytest.mark.parametrize("kind", ["range", "large"])
@pytest.mark.parametrize("with_node", [False, True])
def test_an_item_that_fails_does_not_disturb_those_before_it(
    fault_service: FaultService, kind: str, with_node: bool
) -> None:
    """Both are in flight; the second fails first, and its error is raised second."""
    transfer = TransferConfig(part_size=64 * KiB, max_attempts=1)
    size = 300 * KiB
    items: list[Any] = [BlobInfo(fault_service.blob_url("data", n), size, "") for n in "ab"]
    for name in "ab":
        fault_service.put("data", name, name.encode() * size)
    if kind == "range":
        items = list(IterableWrapper(items).split_blob_ranges(size, credential=False))
        items = [item._replace(etag=fault_service.store.find("data", item.url[-1]).etag) for item in items]
    gate = threading.Event()
    fault_service.script(Match("get_blob", path="data/a", nth=2), [Hold(gate)])
    failing = fault_service.script(Match("get_blob", path="data/b", nth=2), [Status(403)], repeat=True)
    source = IterableWrapper(items)
    samples: Any = iter(source.read_files_by_azure(credential=False, transfer=transfer))
    if with_node:
        samples = iter(Loader(BlobReader(nodes.IterableWrapper(items), credential=False, transfer=transfer)))
    found: list[Any] = []
    reader = threading.Thread(target=lambda: found.append(next(samples)))
    reader.start()
    deadline = time.monotonic() + 60
    while not failing.fired:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    time.sleep(0.2)  # the failure was noticed by then
    gate.set()
    reader.join(240)
    assert [(url[-1], data) for url, data in found] == [("a", b"a" * size)]
    with pytest.raises(ClientAuthenticationError, match="data/b"):
        next(samples)


def test_what_is_listed_needs_no_request_to_be_split(fault_service: FaultService) -> None:
    etag = fault_service.put("data", "a", b"0123456789")
    url = fault_service.blob_url("data", "a")
    listed = AzureBlobInfoLister(fault_service.container_url("data"), credential=False)
    fault_service.reset_log()
    assert list(listed.split_blob_ranges(6, credential=False)) == [
        BlobRange(url, 0, 6, 10, etag),
        BlobRange(url, 6, 10, 10, etag),
    ]
    assert [request.operation for request in fault_service.requests()] == ["list_blobs"]


def test_a_missing_blob_is_named(container: Container) -> None:
    with pytest.raises(ResourceNotFoundError, match=f"{container.url}/missing"):
        list(IterableWrapper([f"{container.url}/missing"]).split_blob_ranges(10, credential=container.key))


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ((0,), ValueError, "chunk_size"),
        ((1.5,), TypeError, "chunk_size"),
        ((10, b""), ValueError, "align"),
        ((10, b"\n\n"), ValueError, "overlap itself"),
        ((10, 0), ValueError, "align"),
        ((10, "\n"), TypeError, "align"),
    ],
)
def test_wrong_arguments_fail_at_once(arguments: tuple[Any, ...], error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        IterableWrapper([]).split_blob_ranges(*arguments)


def test_the_number_of_ranges_is_not_known() -> None:
    with pytest.raises(TypeError):
        len(IterableWrapper(["a"]).split_blob_ranges(10))
