"""Pytest fixtures over the fault service and the proxy; tests/conftest.py names this module in `pytest_plugins`."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from .service import FaultService


@pytest.fixture
def fault_service() -> Iterator[FaultService]:
    """A fault service over plain HTTP, anonymous, empty."""
    with FaultService() as service:
        yield service
