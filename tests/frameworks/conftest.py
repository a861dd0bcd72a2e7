"""Tests that need the frameworks; `make frameworks` installs all of them but Ray, which `make ray` installs."""

from __future__ import annotations

from importlib.util import find_spec

import pytest

NEEDED = ("lightning", "transformers", "webdataset", "litdata", "torch_checkpointing")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        command, needed = ("make ray", ("ray",)) if "ray" in item.nodeid else ("make frameworks", NEEDED)
        missing = [name for name in needed if find_spec(name) is None]
        if missing and item.get_closest_marker("frameworks") is not None:
            item.add_marker(pytest.mark.skip(reason=f"{', '.join(missing)}: not installed; run `{command}`"))
