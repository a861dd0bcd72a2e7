"""How the ranks of a save learn early that one of them has failed.

torch tells them when all have ended, which for a large job is minutes of uploading in vain. A rank that fails puts an
empty blob, whose name all have got with their plans; the others look for it once in a while. Its name is that of a
data blob, so `clean` removes it as what else an interrupted save leaves.
"""

from __future__ import annotations

import logging
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from azstoragetorch._engine.engine import Cancelled, Scope, start_thread
from azstoragetorch.checkpoint._folder import Folder
from azstoragetorch.checkpoint._format import data_name

log = logging.getLogger("azstoragetorch")

_PAUSE = 2.0  # seconds between two looks: a save that is over before costs no request
_uses: Counter[str] = Counter()  # in this process, of the plans of one planning; torch caches them


@contextmanager
def alarmed(folder: Folder, planning: object, scope: Scope) -> Iterator[None]:
    """While inside, cancel *scope* soon after another rank has failed, and tell the others if this one does.

    *planning* is the text that sets the plans of all ranks apart from others; anything else means that there is one
    rank. What cannot be told so, or heard, torch tells later.
    """
    if not isinstance(planning, str):
        yield
        return
    number, _uses[planning] = _uses[planning], _uses[planning] + 1  # ranks with cached plans count alike
    blob = folder.blob(data_name(0, number, planning))
    is_over = threading.Event()

    def ring() -> None:
        try:
            blob.put(b"")
        except Exception as error:  # noqa: BLE001 - torch tells the others later
            log.debug("other ranks are not told early: %s", error)

    def listen() -> None:
        while not is_over.wait(_PAUSE):
            try:
                has_rung = blob.version() is not None
            except Exception as error:  # noqa: BLE001 - torch tells this rank later
                log.debug("other ranks are not listened to: %s", error)
                return
            if has_rung:
                scope.cancel()
                return

    start_thread(listen)
    try:
        yield
    except Cancelled:
        raise
    except Exception:
        start_thread(ring)  # torch waits for the other ranks meanwhile
        raise
    finally:
        is_over.set()
