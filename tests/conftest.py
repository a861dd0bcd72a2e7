from __future__ import annotations

pytest_plugins = ["tests.azurite.fixtures", "tests.faults.fixtures"]
