"""A folder for a model."""

from __future__ import annotations

import pytest

from tests.faults import FaultService


@pytest.fixture
def service(fault_service: FaultService) -> FaultService:
    fault_service.create_container("models")
    return fault_service


@pytest.fixture
def url(service: FaultService) -> str:
    return service.blob_url("models", "llm")
