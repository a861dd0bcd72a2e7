"""The service of a soak, in a separate process: for every line on stdin it prints a line of counters."""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Sequence

from tests.faults import (
    ChangedEtag,
    ConnectionRefused,
    Fault,
    FaultService,
    Fine,
    FullInsteadOfPartial,
    GarbageStatusLine,
    LostAnswer,
    MalformedXml,
    Match,
    Reset,
    ResetInHeaders,
    ResetUpload,
    Rule,
    SlowBytes,
    StaleConnection,
    Stall,
    Status,
    Torn,
    TornReset,
    WrongContentRange,
    WrongLength,
)

from .work import CHANGING, CONTAINER, MOVING, NAMES, content_of

_STALL = 4.0  # seconds, longer than the read timeout of the soak
ANY: list[Fault] = [Status(503), Status(429), Status(500), Reset(), ResetInHeaders(), GarbageStatusLine()]
ANY += [Stall(_STALL, None), StaleConnection(), StaleConnection(on_next_request=True)]
BODY: list[Fault] = [Torn(500), TornReset(500), Stall(_STALL, 100), SlowBytes(20_000), WrongLength(10)]
RANGE: list[Fault] = [WrongContentRange(), FullInsteadOfPartial(), WrongLength(-10)]
PUT: list[Fault] = [*ANY, ResetUpload(100), LostAnswer()]


def scripts(service: FaultService) -> list[Rule]:
    """Repeat faults forever, in a separate random order for each kind of request."""
    dice = random.Random()

    def mixed(faults: Sequence[Fault], share: float, length: int = 4000) -> list[Fault]:
        return [dice.choice(faults) if dice.random() < share else Fine() for _ in range(length)]

    return [
        service.script(Match("get_blob", path=f"/{MOVING}$"), mixed([ChangedEtag()], 0.05), repeat=True),
        service.script(Match("get_blob", path=CHANGING), mixed([ChangedEtag()], 0.003), repeat=True),
        service.script(
            Match("get_blob"), mixed([*ANY * 4, *BODY * 4, *RANGE * 4, ConnectionRefused(0.01)], 0.03), repeat=True
        ),
        service.script(Match("list_blobs"), mixed([*ANY, Torn(500), MalformedXml()], 0.1, 400), repeat=True),
        service.script(Match(method="PUT"), mixed(PUT, 0.05), repeat=True),
        service.script(Match("head"), mixed(ANY, 0.05), repeat=True),
        service.script(Match("delete"), mixed([Status(503), Status(500), Reset()], 0.05), repeat=True),
    ]


def fired(rule: Rule) -> int:
    """The number of faults of *rule* that occurred."""
    rounds, rest = divmod(rule.fired, len(rule.faults))
    return sum((rounds + (number < rest)) for number, fault in enumerate(rule.faults) if not isinstance(fault, Fine))


def main() -> None:
    with FaultService() as service:
        service.keeps_log = False
        for name in (*NAMES, MOVING):
            service.put(CONTAINER, name, content_of(name))
        rules = scripts(service)
        for _ in sys.stdin:
            figures = {
                "url": service.container_url(CONTAINER),
                "requests": sum(rule.seen for rule in rules[2:]),
                "faults": sum(map(fired, rules)),
                "blobs": len(service.names(CONTAINER)),
            }
            sys.stdout.write(json.dumps(figures) + "\n")
            sys.stdout.flush()


if __name__ == "__main__":
    main()
