"""Plan which shard reads which of the positions 0..n-1, and in which order. No I/O, no torch, and random only by seed.

These functions are integer arithmetic in almost constant memory. Every process computes the same plan separately, and
can start at any position of it, which makes resuming exact and cheap.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from array import array
from collections.abc import Sequence
from typing import Literal, TypeAlias, overload

Even: TypeAlias = Literal["none", "drop", "pad"]
"""What to do when shards cannot have the same length: leave it, drop the surplus, or repeat from the beginning."""

EVEN: tuple[Even, ...] = ("none", "drop", "pad")

_MASK = (1 << 64) - 1
_ROUNDS = 6  # four hide the structure of a Feistel network; two more for halves of a few bits
_SMALL = 1024  # a network over so few elements reaches only some of their orders: they are shuffled in a table


def shard_range(length: int, shards: int, shard: int, even: Even = "none") -> range:
    """The positions of *shard* among *shards* that stripe a sequence of *length*: ``shard, shard + shards, ...``.

    With ``even="pad"`` positions from *length* on stand for ``position % length``: the sequence begins again.
    """
    if not 0 <= shard < shards:
        raise ValueError(f"shard must be between 0 and {shards - 1}, not {shard}")
    return range(shard, even_length(length, shards, even), shards)


DEFAULT_GROUP = 1  # the value of torch's SHARDING_PRIORITIES.DEFAULT


class Shardable:
    """A pipe that is told which shard it is: by DataLoader, or by torch's ``graph_settings.apply_sharding``."""

    _shard_groups: dict[int, tuple[int, int]] | None = None  # number of shards, and which one it is, by group

    def apply_sharding(self, num_of_instances: int, instance_id: int, sharding_group: int = DEFAULT_GROUP) -> None:
        """Be shard *instance_id* of *num_of_instances*, within the shards of other groups; DataLoader calls it."""
        groups = self._shard_groups or {}
        if not 0 <= instance_id < num_of_instances:
            raise ValueError(f"instance_id({instance_id}) should be between 0 and {num_of_instances - 1}")
        if any((group == DEFAULT_GROUP) != (sharding_group == DEFAULT_GROUP) for group in groups):
            raise RuntimeError(f"{type(self).__name__} cannot mix DEFAULT and non DEFAULT groups")
        self._shard_groups = {**groups, int(sharding_group): (num_of_instances, instance_id)}

    def _shard_over_groups(self) -> tuple[int, int] | None:
        """The number of shards over all groups, and which one it is; None if it was not told."""
        if self._shard_groups is None:
            return None
        shards, shard = 1, 0
        for _, (others, other) in sorted(self._shard_groups.items(), reverse=True):
            shard += shards * other
            shards *= others
        return shards, shard


def even_length(length: int, shards: int, even: Even) -> int:
    """*length* with the surplus dropped, or with what is missing for equal shards added, as *even* says."""
    if even == "drop":
        return length - length % shards
    if even == "pad":
        return -(-length // shards) * shards
    return length


class _Positions(Sequence[int], ABC):
    """A sequence that computes its elements."""

    @abstractmethod
    def _at(self, index: int) -> int:
        """The element at *index*, which may be out of range, but not negative."""

    @overload
    def __getitem__(self, index: int) -> int: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[int]: ...
    def __getitem__(self, index: int | slice) -> int | Sequence[int]:
        if isinstance(index, slice):
            return [self._at(i) for i in range(*index.indices(len(self)))]
        return self._at(index)


class Permutation(_Positions):
    """A permutation of ``range(length)`` by (seed, epoch), the same on every machine and version of Python.

    A Feistel network over pairs (i // columns, i % columns): no memory, and any element costs a few microseconds.
    Short sequences are a table, so that each of their orders is equally likely.
    """

    def __init__(self, length: int, seed: int, epoch: int = 0) -> None:
        self._length = length
        self._rows = max(1, math.isqrt(length))
        self._columns = -(-length // self._rows)
        state = _mix((_mix(seed & _MASK) + (epoch + 1) * 0x9E3779B97F4A7C15) & _MASK)
        self._keys = [_mix((state + turn * 0xD1342543DE82EF95) & _MASK) for turn in range(_ROUNDS)]
        self._table = array("Q", range(length)) if length <= _SMALL else None
        if self._table is not None:
            for last in range(length - 1, 0, -1):  # Fisher and Yates
                other = _mix((state + last) & _MASK) % (last + 1)
                self._table[last], self._table[other] = self._table[other], self._table[last]

    def __len__(self) -> int:
        return self._length

    def _at(self, index: int) -> int:
        if not 0 <= index < self._length:
            raise IndexError(index)
        if self._table is not None:
            return self._table[index]
        rows, columns, keys = self._rows, self._columns, self._keys
        while True:
            row, column = divmod(index, columns)
            for turn in range(0, _ROUNDS, 2):
                row = (row + _mix(column ^ keys[turn])) % rows
                column = (column + _mix(row ^ keys[turn + 1])) % columns
            index = row * columns + column
            if index < self._length:  # else an element of the rectangle that the sequence does not fill: walk on
                return index


class Remaining(_Positions):
    """The positions of a sequence of *length* that its shards have not consumed, in order.

    Shard s of ``len(consumed)`` has consumed the first ``consumed[s]`` of its positions. What remains can be striped
    over any number of shards: no position is lost and none comes twice.
    """

    def __init__(self, length: int, consumed: Sequence[int]) -> None:
        shards = len(consumed)
        if not shards or min(consumed) < 0:
            raise ValueError(f"not a list of positions of shards: {list(consumed)!r}")
        low = min(min(consumed) * shards, length)  # all before it is consumed
        high = min(max(consumed) * shards, length)  # nothing from here on is
        self._ragged = array("Q", (i for i in range(low, high) if i // shards >= consumed[i % shards]))
        self._rest = range(high, length)

    def __len__(self) -> int:
        return len(self._ragged) + len(self._rest)

    def _at(self, index: int) -> int:
        if not 0 <= index < len(self):
            raise IndexError(index)
        ragged = len(self._ragged)
        return self._ragged[index] if index < ragged else self._rest[index - ragged]


class Order(_Positions):
    """The sequence of one epoch, or what is left of it.

    Args:
        length: Number of items.
        seed: Shuffle the whole sequence by it; None leaves it in order.
        epoch: Chooses another shuffle.
        consumed: What was consumed already, by one list of shard positions for each time that the number of shards
            changed (see `Remaining`); each is about what the lists before it left.
    """

    def __init__(
        self, length: int, seed: int | None = None, epoch: int = 0, consumed: Sequence[Sequence[int]] = ()
    ) -> None:
        self._layers: list[Sequence[int]] = [range(length) if seed is None else Permutation(length, seed, epoch)]
        for positions in consumed:
            self._layers.append(Remaining(len(self._layers[-1]), positions))

    def __len__(self) -> int:
        return len(self._layers[-1])

    def _at(self, index: int) -> int:
        for layer in reversed(self._layers):
            index = layer[index]
        return index


def _mix(value: int) -> int:
    """SplitMix64's finalizer: every bit of *value* changes half of the result's."""
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)
