"""Tests that need the frameworks; `make frameworks` installs all of them."""

from __future__ import annotations

from importlib.util import find_spec

import pytest

NEEDED = ("lightning", "transformers", "webdataset", "litdata", "torch_checkpointing", "ray")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    missing = [name for name in NEEDED if find_spec(name) is None]
    for item in items:
        if missing and item.get_closest_marker("frameworks") is not None:
            item.add_marker(pytest.mark.skip(reason=f"{', '.join(missing)}: not installed; run `make frameworks`"))
