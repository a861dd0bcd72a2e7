"""fsspec's own suite for file systems, on Azurite."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from fsspec.tests import abstract

from azstoragetorch.filesystem import AzureBlobFileSystem
from tests.azurite.container import Container
from tests.filesystem.places import on_azurite

if not hasattr(abstract, "AbstractPipeTests"):
    pytest.skip("the suite of this release of fsspec is older", allow_module_level=True)


class Fixtures(abstract.AbstractFixtures):  # type: ignore[misc]  # fsspec is not typed
    @pytest.fixture
    def fs(self, container: Container) -> Iterator[AzureBlobFileSystem]:
        return on_azurite(container)

    @pytest.fixture
    def fs_join(self) -> Callable[..., str]:
        return lambda *parts: "/".join(parts)

    @pytest.fixture
    def fs_path(self, container: Container) -> str:
        return container.name

    @pytest.fixture
    def supports_empty_directories(self) -> bool:
        return False


class TestCopy(abstract.AbstractCopyTests, Fixtures):  # type: ignore[misc]
    pass


class TestGet(abstract.AbstractGetTests, Fixtures):  # type: ignore[misc]
    pass


class TestPut(abstract.AbstractPutTests, Fixtures):  # type: ignore[misc]
    pass


class TestOpen(abstract.AbstractOpenTests, Fixtures):  # type: ignore[misc]
    pass


class TestPipe(abstract.AbstractPipeTests, Fixtures):  # type: ignore[misc]
    pass


def suites() -> Any:
    """The suites that this release of fsspec has."""
    return {name for name in vars(abstract) if name.startswith("Abstract") and name.endswith("Tests")}


def test_no_suite_is_missing() -> None:
    ours = {base.__name__ for test in (TestCopy, TestGet, TestPut, TestOpen, TestPipe) for base in test.__bases__}
    assert suites() == ours - {"Fixtures"}
