"""The modules that need a framework, with all frameworks installed: every public name is described."""

from __future__ import annotations

import importlib

import pytest

from tests import test_architecture as rules


@pytest.mark.frameworks
@pytest.mark.parametrize("name", sorted(rules.FRAMEWORKS))
def test_a_framework_module_is_described(name: str) -> None:
    """A framework that is missing here fails, where others skip."""
    importlib.import_module(name)
    rules.test_every_public_module_names_what_is_public(name)
    rules.test_every_public_name_is_described(name)
