from __future__ import annotations

import os
import signal

import pytest
from hypothesis import settings

pytest_plugins = ["tests.azurite.fixtures", "tests.faults.fixtures"]


def pytest_configure(config: pytest.Config) -> None:
    # No deadline: the machine can be busy. The same examples in each run, unless one searches for others.
    settings.register_profile("steady", deadline=None, derandomize=True)
    settings.register_profile("searching", deadline=None, max_examples=1000)
    settings.load_profile(config.getoption("--hypothesis-profile") or "steady")
    # Tests count requests, and on a busy machine any request can be silent for a while. Tests of hedging turn it on.
    os.environ.setdefault("AZSTORAGETORCH_HEDGE_AFTER", "none")
    # A shell starts background jobs, and with them their children, with SIGINT ignored.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
