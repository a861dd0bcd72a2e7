"""Headers: those of the package safetensors are read, and everything that it refuses is refused with the reason."""

from __future__ import annotations

import json
import pickle
import re
import struct
import tracemalloc
from typing import Any

import pytest
import safetensors
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from azstoragetorch.exceptions import SafetensorsError
from azstoragetorch.safetensors._dtypes import BITS, FROM_TORCH, header_shape
from azstoragetorch.safetensors._header import LARGEST, Header, build_header, header_length, parse_header
from tests.safetensors.models import entry, models, raw

patient = settings(suppress_health_check=[HealthCheck.too_slow])  # the machine can be busy
URL = "https://account.blob.core.windows.net/models/model.safetensors"
F32 = entry("F32", [2], 0, 8)


def read(data: bytes, size: int | None = None) -> Header:
    size = len(data) if size is None else size
    length = header_length(data, size, URL)
    return parse_header(data[8 : 8 + length], size, URL)


strings = st.text(st.characters(exclude_categories=["Cs"]))


@patient
@given(models(), st.none() | st.dictionaries(strings, strings, min_size=1, max_size=1))
def test_a_file_of_the_package_is_read_and_written_alike(tensors: Any, metadata: dict[str, str] | None) -> None:
    data = save(tensors, metadata)
    found = read(data)
    assert found.metadata == metadata
    assert {name: found.entries[name].stop - found.entries[name].start for name in found.entries} == {
        name: tensor.nbytes for name, tensor in tensors.items()
    }
    kinds = {
        name: (kind := FROM_TORCH[tensor.dtype], header_shape(kind, tuple(tensor.shape)))
        for name, tensor in tensors.items()
    }
    layout = build_header(kinds, metadata)
    assert data.startswith(layout.head)
    assert layout.size == len(data)
    assert layout.names == list(found.entries)


HOSTILE: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "only 0 bytes"),
    "shorter than a length": (b"\x08\0\0\0", "only 4 bytes"),
    "a length beyond the file": (raw(b"{}", length=1 << 40), "claims to have"),
    "the largest length": (b"\xff" * 8 + b"{}", "claims to have"),
    "a length of nothing": (raw(b""), "claims to have"),
    "not UTF-8": (raw(b'{"\xff":1}'), "not UTF-8"),
    "a list": (raw(b"[]"), "not a JSON object"),
    "not JSON": (raw(b"{a:1}"), "no string"),
    "unfinished": (raw(b'{"a":'), "not described by an object"),
    "an unfinished name": (raw(b'{"abc'), "string"),
    "a lone surrogate": (raw(b'{"\\ud800":{}}'), "string"),
    "text after it": (raw(b'{"__metadata__":{}} x'), "bytes follow"),
    "no colon": (raw(b'{"a" 1}'), "':' is missing"),
    "no comma": (raw(b'{"a":%s "b"}' % json.dumps(F32).encode(), bytes(8)), "',' is missing"),
    "a number for a tensor": (raw(b'{"a":1}'), "not described by an object"),
    "deep": (raw(b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}"), "not described by an object"),
    "deep inside": (raw(b'{"a":{"shape":' + b"[" * 4000 + b"]" * 4000 + b"}}"), "not"),
    "deep metadata": (raw(b'{"__metadata__":' + b'{"a":' * 50_000 + b"1" + b"}" * 50_001), "string"),
    "metadata of numbers": (raw({"__metadata__": {"a": 1}}), "string"),
    "metadata twice": (raw(b'{"__metadata__":{},"__metadata__":{}}'), "twice"),
    "a key of metadata twice": (raw(b'{"__metadata__":{"a":"1","a":"2"}}'), "twice"),
    "a tensor twice": (raw(b'{"a":%s,"a":%s}' % ((json.dumps(F32).encode(),) * 2), bytes(8)), "twice"),
    "an additional field": (raw({"a": {**F32, "more": 1}}, bytes(8)), "exactly"),
    "a field twice": (raw(b'{"a":{"dtype":"U8","dtype":"U8","shape":[8],"data_offsets":[0,8]}}', bytes(8)), "exactly"),
    "a missing field": (raw({"a": {"dtype": "F32", "shape": [2]}}, bytes(8)), "exactly"),
    "an unknown type": (raw({"a": {**F32, "dtype": "F33"}}, bytes(8)), "type 'F33'"),
    "a type that is a list": (raw({"a": {**F32, "dtype": ["F32"]}}, bytes(8)), "type"),
    "a shape that is a number": (raw({"a": {**F32, "shape": 2}}, bytes(8)), "shape"),
    "a negative length": (raw({"a": {**F32, "shape": [-2]}}, bytes(8)), "valid JSON"),
    "a fraction": (raw({"a": {**F32, "shape": [2.0]}}, bytes(8)), "valid JSON"),
    "infinity": (raw(b'{"a":{"dtype":"F32","shape":[Infinity],"data_offsets":[0,8]}}', bytes(8)), "valid JSON"),
    "a bool": (raw({"a": {**F32, "shape": [True]}}, bytes(8)), "integers"),
    "a huge number": (raw({"a": {**F32, "shape": [10**4000]}}, bytes(8)), "valid JSON"),
    "too many dimensions": (raw({"a": {**F32, "shape": [1] * 65}}, bytes(8)), "64"),
    "a product that overflows 64 bits": (raw({"a": {**F32, "shape": [1 << 62, 1 << 62]}}, bytes(8)), "does not have"),
    "one offset": (raw({"a": {**F32, "data_offsets": [8]}}, bytes(8)), "two integers"),
    "offsets out of order": (raw({"a": {**F32, "data_offsets": [8, 0]}}, bytes(8)), "not inside"),
    "offsets beyond the file": (raw({"a": entry("F32", [1 << 40], 0, 4 << 40)}, bytes(8)), "not inside"),
    "bytes that do not match the shape": (raw({"a": entry("F32", [3], 0, 8)}, bytes(8)), "does not have"),
    "half a byte": (raw({"a": entry("F4", [3], 0, 2)}, bytes(2)), "does not have"),
    "an overlap": (raw({"a": F32, "b": entry("F32", [2], 4, 12)}, bytes(12)), "overlaps"),
    "the same bytes": (raw({"a": F32, "b": F32}, bytes(8)), "overlaps"),
    "a gap": (raw({"a": F32, "b": entry("F32", [2], 12, 20)}, bytes(20)), "gap"),
    "a gap at the beginning": (raw({"a": entry("F32", [2], 4, 12)}, bytes(12)), "begin"),
    "data that no tensor has": (raw({"a": F32}, bytes(9)), "not complete"),
    "truncated": (raw({"a": F32}, bytes(7)), "not inside"),
}  # fmt: skip


LENIENT = {"a tensor twice", "a key of metadata twice", "an additional field"}  # what the package lets pass


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_header_is_refused_with_the_reason(case: str) -> None:
    data, reason = HOSTILE[case]
    with pytest.raises(SafetensorsError, match=re.escape(reason)) as caught:
        read(data)
    assert URL in str(caught.value)
    assert caught.value.url == URL
    assert len(str(caught.value)) < 1000
    again = pickle.loads(pickle.dumps(caught.value))
    assert (str(again), again.url, again.tensor) == (str(caught.value), URL, caught.value.tensor)
    if case not in LENIENT:
        with pytest.raises(safetensors.SafetensorError):
            safetensors.deserialize(data)


def test_the_error_names_the_tensor() -> None:
    with pytest.raises(SafetensorsError, match=r"'model\.weight'") as caught:
        read(raw({"model.weight": entry("F32", [3], 0, 8)}, bytes(8)))
    assert caught.value.tensor == "model.weight"


@pytest.mark.parametrize(
    "text",
    [
        b'{"a":' + b"[" * 3_000_000,
        b'{"__metadata__":{"a":[' + b"1," * 1_500_000,
        b'{"a":1,' * 430_000,
        b'{"a":{' * 500_000,
    ],
    ids=["deep", "a list of numbers", "not tensors", "objects"],
)  # fmt: skip
def test_a_hostile_header_takes_memory_in_proportion(text: bytes) -> None:
    """The memory is that of the text, whatever is in it."""
    data = raw(text)
    tracemalloc.start()
    try:
        with pytest.raises(SafetensorsError):
            read(data)
        assert tracemalloc.get_traced_memory()[1] < 3 * len(text)
    finally:
        tracemalloc.stop()


@patient
@given(st.binary(max_size=200))
def test_any_bytes_are_read_or_refused(data: bytes) -> None:
    try:
        read(data)
    except SafetensorsError:
        with pytest.raises(safetensors.SafetensorError):
            safetensors.deserialize(data)
    else:
        safetensors.deserialize(data)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.sampled_from(["F32", "U8", ""]) | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(st.sampled_from(["dtype", "shape", "data_offsets", "a"]), inner),
    max_leaves=8,
)  # fmt: skip
entries = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(sorted(BITS)) | json_values,
        "shape": st.lists(st.integers(-1, 4), max_size=3) | json_values,
        "data_offsets": st.lists(st.integers(0, 16), min_size=2, max_size=2) | json_values,
    }
)


@patient
@given(st.dictionaries(st.sampled_from(["a", "b", "__metadata__"]), entries | json_values), st.integers(0, 16))
def test_what_is_accepted_is_what_the_package_accepts(header: Any, rest: int) -> None:
    data = raw(header, bytes(rest))
    try:
        found = read(data)
    except SafetensorsError:
        return  # some of what the package lets pass is refused: fields that are there twice, or that are not known
    assert {name for name, _ in safetensors.deserialize(data)} == set(found.entries)


def test_a_header_of_the_largest_length_is_not_requested_from_a_short_file() -> None:
    assert header_length(struct.pack("<Q", LARGEST), LARGEST + 8, URL) == LARGEST
    with pytest.raises(SafetensorsError):
        header_length(struct.pack("<Q", LARGEST), LARGEST + 7, URL)
    with pytest.raises(SafetensorsError):
        header_length(struct.pack("<Q", LARGEST + 1), LARGEST + 9, URL)


def test_all_types_of_torch_have_a_name() -> None:
    """But those that the format does not have: wide complex ones, quantized ones, and integers of odd widths."""
    found = {dtype for dtype in vars(torch).values() if isinstance(dtype, torch.dtype)} - FROM_TORCH.keys()
    beside = ("q", "complex32", "complex128", "bits", "uint", "int")
    assert [dtype for dtype in found if not str(dtype).removeprefix("torch.").startswith(beside)] == []
    assert {torch.uint8, torch.uint16, torch.uint32, torch.uint64, torch.int8, torch.int64} <= FROM_TORCH.keys()
