"""Which of several checkpoints is newer, by the names of their folders. No I/O.

A name counts steps, iterations or epochs. The number behind the word ``step`` is the one that counts, whatever other
numbers there are; then the one behind ``iter`` or ``iteration``, then the one behind ``epoch``; then the only number in
the name, or a date. Where that does not say which number it is, a name is `Place` without a number and a reason.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

_UNITS = ("step", "iter", "epoch")
# A word that ends in the unit, such as global_step, then the number with a separator or none.
_COUNTED = {unit: re.compile(rf"{unit}s?(?:ation|ations)?[-_=. ]*(\d+)", re.IGNORECASE) for unit in _UNITS}
_NUMBER = re.compile(r"\d+")
_DATE = re.compile(r"(?:19|20)\d\d[-_.]?[01]\d[-_.]?[0-3]\d(?:[-_.T]?\d\d){0,3}Z?")
_NAMED = re.compile(r"(?:^|[^a-z])(last|latest|best|final)(?:$|[^a-z])", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Place:
    """Where a name stands: by which unit, and at which number of it; or *reason*, why that is not known."""

    unit: str = ""
    number: int = -1
    reason: str = ""
    is_ambiguous: bool = False
    """There are numbers, and nothing says which of them counts."""


def place_of(name: str) -> Place:
    """Where the folder *name* stands among its likes."""
    named = _NAMED.search(name)
    if named is not None:
        return Place(reason=f"it is called {named.group(1)!r}, whatever its number")
    for unit in _UNITS:
        counted = _COUNTED[unit].findall(name)
        if counted:
            if len(set(map(int, counted))) > 1:
                return Place(reason=f"it has several numbers of {unit}s", is_ambiguous=True)
            return Place(unit, int(counted[0]))
    date = _DATE.search(name)
    if date is not None:
        digits = "".join(_NUMBER.findall(date.group()))
        return Place("date", int(digits.ljust(14, "0")))
    numbers = _NUMBER.findall(name)
    if not numbers:
        return Place(reason="it has no number")
    if len(numbers) > 1:
        return Place(reason="it has several numbers, and none behind 'step', 'iter' or 'epoch'", is_ambiguous=True)
    return Place("", int(numbers[0]))


def in_order(names: Sequence[str]) -> list[str]:
    """*names*, each once, oldest first. Those without a known number come first, since others count steps."""
    return sorted(set(names), key=_key)


def _key(name: str) -> tuple[bool, int, int, list[tuple[int, int, str]]]:
    place = place_of(name)
    rank = -_UNITS.index(place.unit) if place.unit in _UNITS else -len(_UNITS)
    return not place.reason, rank if not place.reason else 0, place.number, _natural(name)


def _natural(name: str) -> list[tuple[int, int, str]]:
    parts = re.split(r"(\d+)", name)
    return [(0, int(part), "") if part.isdecimal() else (1, 0, part) for part in parts if part]


@dataclass(frozen=True, slots=True)
class Selection:
    """Names that may be deleted, oldest first, and why others are left alone."""

    doomed: tuple[str, ...]
    skipped: tuple[tuple[str, str], ...]


def all_but_last(names: Sequence[str], count: int) -> Selection:
    """Choose all of *names* but the last *count*, and none whose place is not known.

    Raises:
        ValueError: the names do not say which are the last; the message says why.
    """
    ordered = in_order(names)
    places = {name: place_of(name) for name in ordered}
    places |= _by_what_varies([name for name in ordered if places[name].is_ambiguous])
    unclear = [name for name in ordered if places[name].is_ambiguous]
    if unclear:
        raise ValueError(f"which are the last is not clear: of {unclear[0]!r}, {places[unclear[0]].reason}")
    numbered = [name for name in ordered if not places[name].reason]
    units = {places[name].unit: name for name in numbered}
    if len(units) > 1:
        first, second = sorted(units.values())[:2]
        raise ValueError(f"which are the last is not clear: {first!r} and {second!r} count different things")
    kept = numbered[-count:]
    # Names of one step are kept or deleted together.
    doomed = [name for name in numbered[:-count] if places[name].number < places[kept[0]].number]
    skipped = [(name, places[name].reason) for name in ordered if places[name].reason]
    return Selection(tuple(doomed), tuple(skipped))


def _by_what_varies(names: Sequence[str]) -> dict[str, Place]:
    """Places of *names* that are alike but for one number, by that number; none otherwise."""
    numbers = [list(map(int, _NUMBER.findall(name))) for name in names]
    if len({_NUMBER.sub("#", name) for name in names}) != 1:
        return {}
    varying = [at for at, column in enumerate(zip(*numbers, strict=True)) if len(set(column)) > 1]
    return {name: Place("", found[varying[0]]) for name, found in zip(names, numbers, strict=True) if len(varying) == 1}
