"""How the ranks of a save learn early that one of them has failed.

torch tells them when all have ended, which for a large job is minutes of uploading in vain. A rank that fails puts an
empty blob, whose name all have got with their plans; the others look for it once in a while. Its name is that of a
data blob, so `clean` removes it as what else an interrupted save leaves.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from azstoragetorch._blob.client import BlobClient
from azstoragetorch._blob.engine import Scope, start_thread

log = logging.getLogger("azstoragetorch")

_PAUSE = 2.0  # seconds between two looks: a save that is over before costs no request


class Alarm:
    """Rung by the rank that fails, heard by the others."""

    def __init__(self, blob: BlobClient) -> None:
        self._blob = blob

    def ring(self) -> None:
        """Tell the other ranks. Where that cannot be done, they learn it from torch."""
        try:
            self._blob.put(b"")
        except Exception as error:  # noqa: BLE001 - torch tells them later
            log.debug("other ranks are not told early: %s", error)

    @contextmanager
    def cancelling(self, scope: Scope) -> Iterator[None]:
        """While inside, cancel *scope* soon after another rank has rung."""
        is_over = threading.Event()

        def listen() -> None:
            while not is_over.wait(_PAUSE):
                try:
                    has_rung = self._blob.version() is not None
                except Exception as error:  # noqa: BLE001 - torch tells this one later
                    log.debug("other ranks are not listened to: %s", error)
                    return
                if has_rung:
                    scope.cancel()
                    return

        start_thread(listen)
        try:
            yield
        finally:
            is_over.set()
