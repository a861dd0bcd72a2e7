"""Inputs found by fuzzing are still handled right; plus a little fuzzing each time."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from .targets import CORPUS, TARGETS


@pytest.mark.parametrize("path", sorted(CORPUS.glob("*/*")), ids=lambda path: f"{path.parent.name}-{path.name}")
def test_what_was_kept(path: Path) -> None:
    TARGETS[path.parent.name].check(path.read_bytes())


@pytest.mark.parametrize("name", TARGETS)
def test_damaged_seeds(name: str) -> None:
    target = TARGETS[name]
    seeds = target.seeds()
    for seed in seeds:
        target.check(seed)

    @settings(max_examples=150, deadline=None)
    @given(st.sampled_from(seeds), st.data())
    def check(seed: bytes, data: st.DataObject) -> None:
        at = data.draw(st.integers(0, len(seed)))
        gone = data.draw(st.sampled_from([0, 1, 7, 600, len(seed)]))
        target.check(seed[:at] + data.draw(st.sampled_from([b"", *target.words])) + seed[at + gone :])

    check()
