from __future__ import annotations

import signal

pytest_plugins = ["tests.azurite.fixtures", "tests.faults.fixtures"]


def pytest_configure() -> None:
    """Heed SIGINT: a shell starts its background jobs, and all their children, with SIGINT ignored."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
