"""Without Ray its module says what to install. Nothing else imports it, which the architecture test checks."""

from __future__ import annotations

import sys

import pytest


def test_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)  # as if it were not installed
    monkeypatch.delitem(sys.modules, "azstoragetorch.ray", raising=False)
    with pytest.raises(ImportError, match=r"azstoragetorch\.ray needs Ray Data .*: pip install 'ray\[data\]'$"):
        import azstoragetorch.ray  # noqa: F401
