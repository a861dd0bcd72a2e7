from __future__ import annotations

import os
import signal

from hypothesis import settings

pytest_plugins = ["tests.azurite.fixtures", "tests.faults.fixtures"]


def pytest_configure() -> None:
    # No deadline: the machine can be busy.
    settings.register_profile("patient", deadline=None)
    settings.load_profile("patient")
    # Tests count requests, and on a busy machine any request can be silent for a while. Tests of hedging turn it on.
    os.environ.setdefault("AZSTORAGETORCH_HEDGE_AFTER", "none")
    # A shell starts background jobs, and with them their children, with SIGINT ignored.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
