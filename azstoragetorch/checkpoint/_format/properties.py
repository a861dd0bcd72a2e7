"""What metadata says of a tensor apart from its shape, in the layouts that releases of torch have given it."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import TensorProperties

from azstoragetorch.checkpoint._format import records
from azstoragetorch.checkpoint._format.items import are_counts
from azstoragetorch.checkpoint._format.records import Call
from azstoragetorch.exceptions import CheckpointError

_FEWEST, _MOST = 5, 6  # fields; since torch 2.15 the last one is how the tensor lay when it was saved
_NAMES = [field.name for field in fields(TensorProperties)]
_HAS_STRIDES = "strides" in _NAMES
_LAYOUTS = {str(value): value for value in vars(torch).values() if type(value) is torch.layout}
_MEMORY_FORMATS = {
    0: torch.contiguous_format,
    1: torch.channels_last,
    2: torch.preserve_format,
    "TORCH_CONTIGUOUS_FORMAT": torch.contiguous_format,
    "TORCH_CHANNELS_LAST": torch.channels_last,
    "TORCH_PRESERVE_FORMAT": torch.preserve_format,
}


def values_of(properties: TensorProperties) -> tuple[Any, ...]:
    """All that *properties* says."""
    return tuple([getattr(properties, name) for name in _NAMES])


def read_properties(record: Any) -> tuple[Any, ...] | None:
    """The arguments of TensorProperties, or None if *record* is not one.

    Raises:
        CheckpointError: it has more fields than any release of torch that is known gives it.
    """
    if type(record) is not list or record[0] is not records.PROPERTIES or len(record) != 2:
        return None
    state = record[1]
    if type(state) is not tuple or len(state) < _FEWEST:
        return None
    if len(state) > _MOST:
        raise CheckpointError(
            f"the metadata has a TensorProperties with {len(state)} fields, of which only {_MOST} are known; a newer "
            "torch may have written it"
        )
    dtype, layout, requires_grad, memory_format, pin_memory, *strides = state
    layout, memory_format = _layout(layout), _memory_format(memory_format)
    is_right = (
        type(dtype) is torch.dtype
        and type(layout) is torch.layout
        and type(memory_format) is torch.memory_format
        and type(requires_grad) is type(pin_memory) is bool
        and all(value is None or are_counts(value) for value in strides)
    )
    if not is_right:
        return None
    return (dtype, layout, requires_grad, memory_format, pin_memory, *(strides if _HAS_STRIDES else ()))


def _layout(value: Any) -> Any:
    """The layout, from a constant or from a call that names it; anything else for what is not one."""
    if type(value) is Call and value[0] is records.LAYOUT and type(value[1]) is tuple and len(value[1]) == 1:
        name = value[1][0]
        return _LAYOUTS.get(name) if type(name) is str else None
    return value


def _memory_format(value: Any) -> Any:
    """The memory format, from the member of an enum; anything else for what is not one."""
    if type(value) is Call and type(value[1]) is tuple:
        function, arguments = value
        if function is records.MEMBER and len(arguments) == 2 and arguments[0] is records.MEMORY_FORMAT:
            arguments = arguments[1:]
        elif function is not records.MEMORY_FORMAT:
            return None
        if len(arguments) == 1 and type(arguments[0]) in (int, str):
            return _MEMORY_FORMATS.get(arguments[0])
    return None
