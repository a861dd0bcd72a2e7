"""Mutate metadata by what it consists of: the instructions of its pickle, and the objects that these describe."""

from __future__ import annotations

import copy
import functools
import pathlib
import pickle
import pickletools
import random
import struct
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

_LONG = 1 << 20  # bytes of an input made by repetition
_KNOWN = 1 << 14  # bytes of an input whose instructions are kept
_NUMBERS = (-1, 0, 1, 2, 5, 255, 256, 65535, (1 << 31) - 1, 1 << 31, (1 << 63) - 1, 1 << 63, -(1 << 63), 1 << 70)
_DCP = "torch.distributed.checkpoint.metadata"
_NAMES = (
    (_DCP, "Metadata"),
    (_DCP, "TensorStorageMetadata"),
    (_DCP, "BytesStorageMetadata"),
    (_DCP, "ChunkStorageMetadata"),
    (_DCP, "TensorProperties"),
    (_DCP, "MetadataIndex"),
    (_DCP, "StorageMeta"),
    (_DCP, "_MEM_FORMAT_ENCODING"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch.serialization", "_get_layout"),
    ("torch", "Size"),
    ("torch", "float32"),
    ("torch", "strided"),
    ("torch", "device"),
    ("collections", "OrderedDict"),
    ("builtins", "getattr"),
    ("pathlib", "PurePosixPath"),
    ("pathlib", "PureWindowsPath"),
    ("os", "system"),
    ("builtins", "eval"),
    ("copyreg", "_reconstructor"),
)
_STRINGS = (
    "", "a", "d/..", "../x", "/x", "http://h/x", ".metadata", "__0.metadata", "x\r\ny: z", "\x00", "\ud800", "ä" * 90,
    '"0x8D"', '"\r\n"', "torch._inductor",
    "torch.strided", "TORCH_CHANNELS_LAST", "__class__", "__dict__", "__init__", "fqn", "offset", "index",
    "relative_path", "length",
    "payload", "etag", "transform_descriptors", "state_dict_metadata", "storage_data", "planner_data", "version",
    "properties", "size", "chunks", "offsets", "sizes", "1" * 255,
)  # fmt: skip
_WORDS = (
    b"}", b"]", b")", b"(", b"t", b"\x85", b"\x86", b"\x87", b"R", b"\x81", b"b", b"u", b"s", b"a", b"e", b"N",
    b"\x88", b"\x89", b"\x94", b"\x93", b"0", b"1", b"2", b"Q", b"o", b"l", b"d", b".", b"\x82\x01", b"G" + b"\x7f" * 8,
    b")\x81\x94}\x94(", b")\x81\x94", b"\x85\x94R\x94", b"\x94\x85\x94R\x94", b"ub", b"\x95" + b"\xff" * 8,
    b"\x80\x04", b"\x8f", b"\x90", b"\x92", b"\x8d" + b"\x00" * 8, b"\x8e" + b"\x00" * 8, b"C\x01x", b"\x97",
)  # fmt: skip


def mutated(data: bytes, others: list[bytes], dice: random.Random) -> bytes:
    """A pickle like *data* that is wrong in a few places, or forged from objects."""
    if dice.random() < 1 / 3:
        return forged(dice)
    parts = list(instructions(data))
    if not parts:
        return data
    for _ in range(dice.choice((1, 1, 2, 3, 6))):
        dice.choice(_MUTATIONS)(parts, others, dice)
        if not parts:
            break
    return b"".join(parts)[: 2 * _LONG]


def instructions(data: bytes) -> tuple[bytes, ...]:
    """The instructions of a pickle, as far as it is intact; FRAME is left out, since it says what changes."""
    # Those of a long one take a hundred times its length.
    return _known_instructions(data) if len(data) <= _KNOWN else _instructions(data)


@functools.lru_cache(maxsize=512)
def _known_instructions(data: bytes) -> tuple[bytes, ...]:
    return _instructions(data)


def _instructions(data: bytes) -> tuple[bytes, ...]:
    starts = []
    try:
        for opcode, _, at in pickletools.genops(data):
            assert at is not None
            starts.append((at, opcode.name))
    except ValueError:
        pass
    ends = [at for at, _ in starts[1:]] + [len(data)]
    return tuple(data[at:end] for (at, name), end in zip(starts, ends, strict=True) if name != "FRAME")


def _text(value: str) -> bytes:
    raw = value.encode("utf-8", "surrogatepass")
    return b"\x8c" + bytes([len(raw)]) + raw if len(raw) < 256 else b"X" + struct.pack("<I", len(raw)) + raw


def _number(value: int) -> bytes:
    return pickle.dumps(value, 2)[2:-1]


def _span(parts: list[bytes], dice: random.Random) -> tuple[int, int]:
    """A run of instructions: an object that begins with a mark, or any few."""
    at = dice.randrange(len(parts))
    depth = 0
    if dice.random() < 0.7:
        while at and parts[at] != b"(":
            at -= 1
        for end in range(at, len(parts)):
            depth += (parts[end] == b"(") - (parts[end] in (b"t", b"u", b"e"))
            if depth <= 0:
                return at, end + 1
    return at, min(len(parts), at + dice.choice((1, 2, 5, 20)))


def _operand(parts: list[bytes], _others: list[bytes], dice: random.Random) -> None:
    """Change what an instruction pushes, in kind."""
    at = dice.randrange(len(parts))
    for number in (*range(at, len(parts)), *range(at)):
        code = parts[number][:1]
        if code in b"hj":
            target = dice.randrange(parts.count(b"\x94") + 2)
            parts[number] = b"h" + bytes([target]) if target < 256 else b"j" + struct.pack("<I", target)
        elif code in b"KMJ\x8a":
            parts[number] = _number(dice.choice((*_NUMBERS, dice.randrange(1 << 33))))
        elif code in b"X\x8c":
            texts = [part for part in parts if part[:1] == b"\x8c"]
            parts[number] = dice.choice((_text(dice.choice(_STRINGS)), dice.choice(texts or [b"N"])))
        elif code == b"\x93":
            module, name = dice.choice(_NAMES)
            parts[number] = b"00" * (dice.random() < 0.1) + _text(module) + _text(name) + b"\x93"
        elif code == b"c":
            parts[number] = "c{}\n{}\n".format(*dice.choice(_NAMES)).encode()
        elif code in b"qr":
            parts[number] = b"r" + struct.pack("<I", dice.choice((0, 1, dice.randrange(500), 0x7FFFFFFF)))
        else:
            continue
        return


def _swap(parts: list[bytes], _others: list[bytes], dice: random.Random) -> None:
    first, second = dice.randrange(len(parts)), dice.randrange(len(parts))
    parts[first], parts[second] = parts[second], parts[first]


def _delete(parts: list[bytes], _others: list[bytes], dice: random.Random) -> None:
    at, end = _span(parts, dice)
    del parts[at:end]


def _duplicate(parts: list[bytes], _others: list[bytes], dice: random.Random) -> None:
    at, end = _span(parts, dice)
    to = dice.randrange(len(parts) + 1)
    parts[to:to] = parts[at:end]


def _insert(parts: list[bytes], _others: list[bytes], dice: random.Random) -> None:
    at = dice.randrange(len(parts) + 1)
    parts[at:at] = [dice.choice(_WORDS)]


def _replace(parts: list[bytes], _others: list[bytes], dice: random.Random) -> None:
    parts[dice.randrange(len(parts))] = dice.choice(_WORDS)


def _nest(parts: list[bytes], _others: list[bytes], dice: random.Random) -> None:
    """Put an object inside of others, to any depth."""
    at, end = _span(parts, dice)
    depth = dice.choice((1, 3, 65, 1000))
    before, after = dice.choice(((b"(", b"t"), (b"]", b"a"), (b"", b"\x85"), (b"](", b"e"), (b"}K\x01", b"s")))
    parts[end:end] = [after] * depth
    parts[at:at] = [before] * depth


def _repeat(parts: list[bytes], _others: list[bytes], dice: random.Random) -> None:
    at, end = _span(parts, dice)
    size = sum(map(len, parts[at:end]))
    count = min(dice.choice((2, 10, 100, 1000, 100_000)), _LONG // max(size, 1))
    if dice.random() < 0.5:
        count = min(count, 200)
    parts[at:end] = [b"".join(parts[at:end]) * count]


def _splice(parts: list[bytes], others: list[bytes], dice: random.Random) -> None:
    other = instructions(dice.choice(others))
    if other:
        at, end = _span(list(other), dice)
        to, until = _span(parts, dice)
        parts[to:until] = other[at:end]


def _truncate(parts: list[bytes], _others: list[bytes], dice: random.Random) -> None:
    del parts[dice.randrange(len(parts)) :]
    parts.append(b".")


_MUTATIONS = (_operand, _operand, _operand, _swap, _delete, _duplicate, _insert, _replace, _nest, _repeat, _splice,
              _truncate)  # fmt: skip


# -- objects ----------------------------------------------------------------------------------------------------------


def example() -> Metadata:
    """Metadata with every kind of field."""
    size = torch.Size([4, 6])
    halves = [ChunkStorageMetadata(torch.Size([at, 0]), torch.Size([2, 6])) for at in (0, 2)]
    first: Any = _StorageInfo("__0_0.distcp", 0, 900)
    first.payload, first.etag = (704, torch.float32, (2, 6), (6, 1)), '"0x8D"'
    return Metadata(
        {
            "a.b": TensorStorageMetadata(TensorProperties(torch.float32), size, halves),
            "c": TensorStorageMetadata(
                TensorProperties(torch.bfloat16, memory_format=torch.channels_last, requires_grad=True),
                torch.Size([]),
                [ChunkStorageMetadata(torch.Size([]), torch.Size([]))],
            ),
            "d": BytesStorageMetadata(),
        },
        {"a.b": ("a", "b"), "c": ("c",), "d": ("d", 0)},
        {
            MetadataIndex("a.b", torch.Size([0, 0]), 0): first,
            MetadataIndex("a.b", torch.Size([2, 0]), 1): copy.copy(first),
            MetadataIndex("c", torch.Size([])): _StorageInfo("y/__1_0.distcp", 0, 100),
            MetadataIndex("d"): _StorageInfo("x", 1 << 40, 1 << 20, ["stream.zstd/1"]),
        },
        StorageMeta(checkpoint_id=pathlib.PurePosixPath("/tmp/x"), save_id="1", modules=["m"]),
        "1.0.0",
    )


def forged(dice: random.Random) -> bytes:
    """A pickle of metadata some of whose fields are something else."""
    root = example()
    for _ in range(dice.choice((1, 1, 2, 4))):
        owners = _owners(root)
        owner = dice.choice(owners)
        value = _value(owners, dice)
        if isinstance(owner, list):
            owner[:] = dice.choice(([*owner, value], [value], owner * 3, []))
        elif isinstance(owner, dict):
            key = dice.choice([*owner, *_STRINGS, 7, None])
            owner[key] = value
        else:
            state = vars(owner)
            state[dice.choice([*state, *state, *state, *_STRINGS])] = value
    try:
        return pickle.dumps(root, dice.choice((2, 3, 4, 4, 5)))
    except Exception:  # noqa: BLE001 - torch's classes do not pickle with everything in them
        return forged(dice)


def _owners(root: Any) -> list[Any]:
    """All of *root* that can be changed."""
    found: dict[int, Any] = {}
    waiting = [root]
    while waiting:
        value = waiting.pop()
        if id(value) in found:
            continue
        if isinstance(value, dict):
            waiting += [*value.keys(), *value.values()]
        elif isinstance(value, (list, tuple)):
            waiting += value
        elif hasattr(value, "__dict__") and type(value).__module__.startswith("torch.distributed.checkpoint"):
            waiting += vars(value).values()
        else:
            continue
        found[id(value)] = value
    return [value for value in found.values() if not isinstance(value, tuple)]


def _value(owners: list[Any], dice: random.Random) -> Any:
    kind = dice.randrange(8)
    if kind == 0:
        return dice.choice(owners)
    if kind <= 2:
        return dice.choice(_STRINGS)
    if kind <= 4:
        return dice.choice(_NUMBERS)
    if kind == 5:
        return torch.Size([dice.choice(_NUMBERS[1:10]) for _ in range(dice.choice((0, 1, 2, 3, 65)))])
    if kind == 6:
        value: Any = dice.choice(_STRINGS)
        pair = dice.choice((list, tuple))
        for _ in range(dice.choice((1, 5, 17, 40))):
            value = pair([value, value])
        return value
    return dice.choice(
        (None, True, 0.5, float("nan"), 1e308, (), [], {}, {"a": 1}, {1: {2: [3]}}, torch.float32, torch.strided,
         torch.channels_last, pathlib.PurePosixPath("/a/../b"), (0, torch.int8, (1 << 62, 4), (4, 1)),
         (0, torch.int8, (), ()), ("a", -1), ("x",) * 200)
    )  # fmt: skip
