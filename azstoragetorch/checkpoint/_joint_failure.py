"""How the ranks of a save notice early that one of them has failed.

torch reports it when all have ended, which for a large job is minutes of uploading in vain. A rank that fails puts an
empty blob, whose name all ranks have received with their plans; the others look for it every few seconds. Its name is
that of a data blob, so `clean` removes it with the rest of an interrupted save.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator
from contextlib import contextmanager

from azstoragetorch._engine.scope import Cancelled, Scope
from azstoragetorch._engine.threads import start_thread
from azstoragetorch.checkpoint._folder import Folder
from azstoragetorch.checkpoint._format import data_name

log = logging.getLogger("azstoragetorch")

_PAUSE = 2.0  # seconds between two looks: a save that is over before costs no request
_uses: dict[str, Iterator[int]] = {}  # in this process, of the plans of one planning; torch caches them


@contextmanager
def fail_together(folder: Folder, planning: object, scope: Scope) -> Iterator[None]:
    """While inside, cancel *scope* soon after another rank has failed, and signal the others if this one does.

    *planning* is a string that the plans of all ranks share, and no other plans; anything else means that the save has
    one rank. torch reports later what cannot be signaled or seen this way.
    """
    if not isinstance(planning, str):
        yield
        return
    number = next(_uses.setdefault(planning, itertools.count()))  # ranks with cached plans count alike
    blob = folder.blob(data_name(0, number, planning))
    listening = Scope()

    def signal() -> None:
        try:
            blob.put(b"")
        except Exception as error:  # noqa: BLE001 - torch reports it later
            log.debug("other ranks do not learn early that this one has failed: %s", error)

    def listen() -> None:
        try:
            while True:
                listening.pause(_PAUSE)
                if blob.version() is not None:
                    scope.cancel()
                    return
        except Cancelled:
            return
        except Exception as error:  # noqa: BLE001 - torch reports it later
            log.debug("this rank does not look for failures of others any more: %s", error)

    start_thread(listen)
    try:
        yield
    except Exception:
        start_thread(signal)  # torch waits for the other ranks meanwhile
        raise
    finally:
        listening.cancel()
