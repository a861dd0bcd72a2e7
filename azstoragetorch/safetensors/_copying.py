"""Tensors of a model as the bytes of a file that is written, fetched when they are needed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch

from azstoragetorch._engine.config import MiB
from azstoragetorch._tensors.host import view_of
from azstoragetorch._tensors.planning import boxes
from azstoragetorch.safetensors._dtypes import header_shape
from azstoragetorch.safetensors._fetch import fetch
from azstoragetorch.safetensors._header import Layout, build_header
from azstoragetorch.safetensors._model import Model, reads_of

_AT_ONCE = 32 * MiB  # bytes of a tensor that are fetched at once


def layout_of_model(model: Model, names: list[str], metadata: Mapping[str, str]) -> Layout:
    """The layout of a file with the whole tensors *names* of *model*."""
    kinds = {name: model.tensors[name].kind for name in names}
    shapes = {name: (kind, header_shape(kind, model.tensors[name].shape)) for name, kind in kinds.items()}
    return build_header(shapes, metadata)


def bytes_of_model(model: Model, names: list[str]) -> Iterator[memoryview]:
    """The elements of the tensors *names* of *model*, fetched when they are drawn, some MiB at a time."""
    for name in names:
        stored = model.tensors[name]
        for box in boxes(stored.shape, stored.dtype.itemsize, _AT_ONCE):
            part = stored.new(box, None, torch.device("cpu"))
            fetch(reads_of(stored, box, part), model.transfer)
            yield view_of(part)
