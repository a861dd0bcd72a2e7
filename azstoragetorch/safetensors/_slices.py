"""What an index of a tensor needs of it: a box to read, and an index into that box. Pure functions."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

from azstoragetorch._tensors.planning import Box

Shard = tuple[int, int, int]
"""A part of a tensor: the dimension that is divided, the number of the part, and the number of parts."""


def box_of_index(index: Any, shape: Sequence[int]) -> tuple[Box, tuple[Any, ...]]:
    """The smallest box that holds what *index* selects of a tensor of *shape*, and the index that selects it there.

    Raises:
        IndexError: *index* is out of bounds, or has too many dimensions.
        ValueError: a step is not positive.
        TypeError: *index* has something else than integers, slices, ``...``, ``None`` and lists of integers.
    """
    steps = _expanded(index if isinstance(index, tuple) else (index,), len(shape))
    offsets: list[int] = []
    lengths: list[int] = []
    rest: list[Any] = []
    for step in steps:
        if step is None:
            rest.append(None)
            continue
        dim = len(offsets)
        offset, length, inside = _of_dimension(step, dim, shape[dim])
        offsets.append(offset)
        lengths.append(length)
        rest.append(inside)
    return Box(tuple(offsets), tuple(lengths)), tuple(rest)


def _expanded(steps: tuple[Any, ...], dimensions: int) -> list[Any]:
    """*steps* with one for each dimension."""
    is_dots = [step is Ellipsis for step in steps]
    given = sum(step is not None and not dots for step, dots in zip(steps, is_dots, strict=True))
    if given > dimensions:
        raise IndexError(f"too many indices for a tensor of {dimensions} dimensions: {given}")
    if sum(is_dots) > 1:
        raise IndexError("an index can have only one '...'")
    filled = [slice(None)] * (dimensions - given)
    if not any(is_dots):
        return [*steps, *filled]
    at = is_dots.index(True)
    return [*steps[:at], *filled, *steps[at + 1 :]]


def _of_dimension(step: Any, dim: int, size: int) -> tuple[int, int, Any]:
    """Of one dimension: the first index to read, how many, and what to select of these."""
    if isinstance(step, slice):
        start, stop, stride = step.indices(size)
        if stride <= 0:
            raise ValueError(f"the step of a slice must be positive, not {step.step!r}")
        length = max(0, stop - start)
        return (start if length else 0), length, slice(0, length, stride)
    if isinstance(step, (list, tuple)):
        numbers = [_number(number, dim, size) for number in step]
        first = min(numbers, default=0)
        return first, max(numbers, default=first - 1) + 1 - first, [number - first for number in numbers]
    return _number(step, dim, size), 1, 0


def _number(value: Any, dim: int, size: int) -> int:
    if isinstance(value, bool):
        raise TypeError("an index must be an integer, a slice, '...', None or a list of integers, not a bool")
    try:
        number = operator.index(value)
    except TypeError:
        raise TypeError(
            f"an index must be an integer, a slice, '...', None or a list of integers, not {type(value).__name__}"
        ) from None
    if not -size <= number < size:
        raise IndexError(f"index {number} is out of bounds for dimension {dim} of {size}")
    return number % size


def check_shard(shard: Any) -> Shard | None:
    """*shard* as one, or None.

    Raises:
        TypeError: it is not three integers.
        ValueError: there is no such part.
    """
    if shard is None:
        return None
    is_right = isinstance(shard, (tuple, list)) and len(shard) == 3
    if not is_right or not all(isinstance(part, int) and not isinstance(part, bool) for part in shard):
        raise TypeError(f"shard must be (dim, rank, world), three integers, not {shard!r:.100}")
    dim, rank, world = shard
    if not 0 <= rank < world:
        raise ValueError(f"shard {tuple(shard)}: rank must be at least 0 and less than world")
    return dim, rank, world


def box_of_shard(shard: Shard | None, shape: Sequence[int]) -> Box:
    """The box of *shard* in a tensor of *shape*; all of it if that does not have the dimension.

    Parts are those of `torch.chunk` and of DTensor: of equal length, rounded up, so that the last ones can be shorter
    or empty.
    """
    offsets, lengths = [0] * len(shape), list(shape)
    if shard is not None and -len(shape) <= shard[0] < len(shape):
        dim, rank, world = shard
        size = shape[dim]
        length = -(-size // world)
        offsets[dim] = min(size, rank * length)
        lengths[dim] = min(length, size - offsets[dim])
    return Box(tuple(offsets), tuple(lengths))
