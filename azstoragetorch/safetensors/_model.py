"""A model: the tensors of one file or of the files of a folder, and where the bytes of each are. No bytes are read."""

from __future__ import annotations

import itertools
import json
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any, NamedTuple

import torch

from azstoragetorch._engine.config import TransferConfig
from azstoragetorch._tensors.host import select
from azstoragetorch._tensors.planning import Box
from azstoragetorch.exceptions import SafetensorsError
from azstoragetorch.safetensors._dtypes import TORCH, torch_shape
from azstoragetorch.safetensors._files import TensorFile
from azstoragetorch.safetensors._header import Entry

SHARDING = "DCP_SHARDING_INFO"  # the metadata in which torch notes which part of a tensor a file holds
OFFSETS = "saved_offsets"
SAVE = "azstoragetorch_save"  # the metadata in which a save of several ranks has its id and its number of files
_CELLS = 1 << 20  # of the grid that the chunks of one tensor make; no mesh of ranks makes so many


class Chunk(NamedTuple):
    """A dense part of a tensor in a file: ``base`` is the byte of its first element, ``box`` its place in the whole."""

    file: TensorFile
    base: int
    box: Box


@dataclass(frozen=True, slots=True)
class Stored:
    """A tensor of a model, with its shape in torch. Usually it is one chunk."""

    name: str
    kind: str  # as in the header
    shape: tuple[int, ...]
    chunks: tuple[Chunk, ...]

    @property
    def url(self) -> str:
        """The file that it is in, or begins in."""
        return self.chunks[0].file.url

    @property
    def dtype(self) -> torch.dtype:
        """Its type.

        Raises:
            SafetensorsError: this release of torch does not have it.
        """
        found = TORCH.get(self.kind)
        if found is None:
            raise SafetensorsError(
                f"{self.url}: {self.name!r} has the type {self.kind}, which torch {torch.__version__} does not have",
                url=self.url,
                tensor=self.name,
            )
        return found

    @property
    def nbytes(self) -> int:
        """Bytes of the whole tensor."""
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def whole(self) -> Box:
        """All of it."""
        return Box((0,) * len(self.shape), self.shape)

    def new(self, box: Box, dtype: torch.dtype | None, device: torch.device) -> torch.Tensor:
        """Memory for *box*, as *dtype* if that is not None, with arbitrary contents.

        Raises:
            SafetensorsError: there is not enough memory.
        """
        try:
            return torch.empty(box.lengths, dtype=dtype or self.dtype, device=device)
        except (RuntimeError, MemoryError) as error:  # torch has no other for too little memory on the CPU
            raise SafetensorsError(
                f"{self.url}: no memory for {self.name!r}, {self.kind} of the shape {list(box.lengths)}: "
                f"{error!s:.200}",
                url=self.url,
                tensor=self.name,
            ) from None


@dataclass(slots=True, eq=False)
class Read:
    """A box of a chunk, which is stored as *dtype* and *shape*, and the tensor that it is for."""

    name: str
    file: TensorFile
    base: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    box: Box
    target: torch.Tensor


def reads_of(stored: Stored, box: Box, target: torch.Tensor) -> list[Read]:
    """What to read so that *target* holds *box* of the tensor *stored*."""
    reads = []
    for chunk in stored.chunks:
        begins, lengths = [], []
        for offset, length, start, size in zip(*box, *chunk.box, strict=True):
            low, high = max(offset, start), min(offset + length, start + size)
            begins.append(low)
            lengths.append(max(0, high - low))
        if not all(lengths):
            continue
        inside = Box(tuple(at - start for at, start in zip(begins, chunk.box.offsets, strict=True)), tuple(lengths))
        place = Box(tuple(at - offset for at, offset in zip(begins, box.offsets, strict=True)), tuple(lengths))
        part = select(target, place)
        reads.append(Read(stored.name, chunk.file, chunk.base, stored.dtype, chunk.box.lengths, inside, part))
    return reads


@dataclass(frozen=True, slots=True)
class Model:
    """The tensors at *url* by name, in the order of the files and of the bytes in them."""

    url: str
    files: tuple[TensorFile, ...]
    tensors: dict[str, Stored]
    index: str | None = field(default=None)

    @property
    def transfer(self) -> TransferConfig:
        """How its files are transferred."""
        return self.files[0].client.config

    def select(self, names: Iterable[str] | None) -> dict[str, Stored]:
        """Those called *names*, in the order of the model; None is all.

        Raises:
            SafetensorsError: one of *names* is not in the model.
        """
        if names is None:
            return dict(self.tensors)
        wanted = [names] if isinstance(names, str) else list(names)
        for name in wanted:
            if name not in self.tensors:
                raise self.missing(name)
        chosen = frozenset(wanted)
        return {name: stored for name, stored in self.tensors.items() if name in chosen}

    def missing(self, name: Any) -> SafetensorsError:
        """The error for *name*, which is not in the model."""
        near = get_close_matches(str(name), self.tensors, 1) if len(self.tensors) <= 10_000 else []
        hint = f"; did you mean {near[0]!r}?" if near else ""
        return SafetensorsError(
            f"{self.url} has no tensor {name!r:.200}, among {len(self.tensors):,}{hint}",
            url=self.url,
            tensor=str(name),
        )


def model_of_file(file: TensorFile) -> Model:
    """The tensors of one file."""
    tensors = {name: _stored(name, file, entry) for name, entry in file.header.entries.items()}
    return Model(file.url, (file,), tensors)


def model_of_files(url: str, files: Sequence[TensorFile]) -> Model:
    """The tensors of all *files*, of which those that torch has sharded are put together.

    Raises:
        SafetensorsError: two files have the same tensor, or a part of a tensor or a file of a save is missing.
    """
    _check_saves(url, files)
    tensors: dict[str, Stored] = {}
    parts: dict[str, list[Stored]] = {}
    for file in files:
        offsets = sharding_of(file)
        for name, entry in file.header.entries.items():
            stored = _stored(name, file, entry, offsets.get(name))
            if offsets:
                parts.setdefault(name, []).append(stored)
            elif name in tensors:
                raise _twice(stored, tensors[name].url)
            else:
                tensors[name] = stored
    for name, pieces in parts.items():
        if name in tensors:
            raise _twice(pieces[0], tensors[name].url)
        tensors[name] = _assembled(name, pieces)
    return Model(url, tuple(files), tensors)


def model_of_index(url: str, index: str, files: dict[str, TensorFile], weight_map: dict[str, str]) -> Model:
    """The tensors that *weight_map* places in *files*.

    Raises:
        SafetensorsError: a file does not have a tensor that the index places there.
    """
    tensors: dict[str, Stored] = {}
    by_file: dict[str, list[str]] = {}
    for name, path in weight_map.items():
        by_file.setdefault(path, []).append(name)
    for path, file in files.items():
        placed = frozenset(by_file.get(path, ()))
        for name, entry in file.header.entries.items():
            if name in placed:
                tensors[name] = _stored(name, file, entry)
        for name in by_file.get(path, ()):
            if name not in file.header.entries:
                raise SafetensorsError(
                    f"{file.url} has no tensor {name!r:.200}, which {index} says is there",
                    url=file.url,
                    tensor=name,
                )
    return Model(url, tuple(files.values()), tensors, index)


def _check_saves(url: str, files: Sequence[TensorFile]) -> None:
    """Raise unless all files of a save of several ranks are there, and of one save only."""
    saves = Counter((file.header.metadata or {}).get(SAVE) for file in files)
    del saves[None]
    for save, count in saves.items():
        if save is not None and (len(saves) > 1 or save.rpartition("/")[2] != str(count)):
            raise SafetensorsError(
                f"{url}: of a save of several ranks, {count} of {save.rpartition('/')[2][:20]} files are here, with "
                f"those of {len(saves) - 1} other saves: it is in progress, was interrupted, or files are missing",
                url=url,
            )


def sharding_of(file: TensorFile) -> dict[str, tuple[int, ...]]:
    """Where in the whole tensors those of *file* are, if torch wrote it as one rank's part; else nothing.

    Raises:
        SafetensorsError: the metadata that says so is not valid.
    """
    text = (file.header.metadata or {}).get(SHARDING)
    if text is None:
        return {}
    offsets: dict[str, tuple[int, ...]] = {}
    try:
        found: Any = json.loads(text)
        for name, entry in file.header.entries.items():
            numbers = found[name][OFFSETS]
            is_right = type(numbers) is list and len(numbers) == len(entry.shape)
            if not is_right or not all(type(number) is int and 0 <= number < 1 << 62 for number in numbers):
                raise ValueError(f"the offsets of {name!r:.100}")
            offsets[name] = tuple(numbers)
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise SafetensorsError(
            f"{file.url}: the metadata {SHARDING}, which says which parts of tensors the file has, is not valid: "
            f"{type(error).__name__}: {error!s:.200}",
            url=file.url,
        ) from None
    return offsets


def _stored(name: str, file: TensorFile, entry: Entry, offsets: tuple[int, ...] | None = None) -> Stored:
    shape = torch_shape(entry.dtype, entry.shape)
    if shape is None:
        raise SafetensorsError(
            f"{file.url}: {name!r:.200} has the type {entry.dtype} and the shape {list(entry.shape)}; torch has no "
            "tensors of this type with an odd number of elements in a row",
            url=file.url,
            tensor=name,
        )
    chunk = Chunk(file, entry.start, Box(offsets or (0,) * len(shape), shape))
    return Stored(name, entry.dtype, shape, (chunk,))


def _assembled(name: str, parts: list[Stored]) -> Stored:
    """The tensor that *parts*, of several files, make up."""
    first = parts[0]
    boxes = [part.chunks[0].box for part in parts]
    if any(part.kind != first.kind or len(part.shape) != len(first.shape) for part in parts):
        raise SafetensorsError(
            f"{first.url}: parts of {name!r:.200} differ in type or in their number of dimensions",
            url=first.url,
            tensor=name,
        )
    shape = tuple(max(box.offsets[dim] + box.lengths[dim] for box in boxes) for dim in range(len(first.shape)))
    if not _tile(boxes, shape):
        raise SafetensorsError(
            f"{first.url}: the files with parts of {name!r:.200} do not make up all of it, or overlap: a file is "
            "missing, or files of two saves are in one folder",
            url=first.url,
            tensor=name,
        )
    return Stored(name, first.kind, shape, tuple(part.chunks[0] for part in parts))


def _tile(boxes: Sequence[Box], shape: tuple[int, ...]) -> bool:
    """Whether *boxes* cover an array of *shape* exactly once."""
    boxes = [box for box in boxes if all(box.lengths)]
    if not all(shape):
        return not boxes
    if sum(math.prod(box.lengths) for box in boxes) != math.prod(shape):
        return False
    marks = [
        sorted({box.offsets[dim] for box in boxes} | {box.offsets[dim] + box.lengths[dim] for box in boxes})
        for dim in range(len(shape))
    ]
    if math.prod(len(line) - 1 for line in marks) > _CELLS:
        return False
    covered: set[tuple[int, ...]] = set()
    for box in boxes:
        cells = [
            [mark for mark in line[:-1] if offset <= mark < offset + length]
            for line, offset, length in zip(marks, box.offsets, box.lengths, strict=True)
        ]
        for cell in itertools.product(*cells):
            if cell in covered:
                return False
            covered.add(cell)
    return True  # disjoint, and as large as the whole


def _twice(stored: Stored, other: str) -> SafetensorsError:
    return SafetensorsError(
        f"{stored.name!r:.200} is in {other} and in {stored.url}: they are not of one model. A folder without an index "
        "must have the files of one model only",
        url=stored.url,
        tensor=stored.name,
    )
