"""Fuzz for a while: `python -m tests.fuzz [seconds for each target] [target ...]`.

Inputs that reach lines of the package that none reached before are mutated further, and kept in ``corpus`` when they
are short; one that breaks a promise is kept there as well, and ends the run with an error.
"""

from __future__ import annotations

import hashlib
import random
import resource
import sys
import time
import traceback
from pathlib import Path
from types import FrameType
from typing import Any

from .targets import CORPUS, TARGETS, Target

_PACKAGE = str(Path(__file__).parent.parent.parent / "azstoragetorch")
_MEMORY = 8 << 30  # bytes of address space; an input that asks for more breaks a promise
_SLOW = 5.0  # seconds
_SHORT = 20_000  # bytes of an input that is kept on disk
_KEPT = 60  # files for each target


def mutated(data: bytes, others: list[bytes], words: tuple[bytes, ...], dice: random.Random) -> bytes:
    out = bytearray(data)
    for _ in range(dice.choice((1, 1, 2, 3, 8))):
        at = dice.randrange(len(out) + 1)
        match dice.randrange(7):
            case 0 if out:
                out[at % len(out)] ^= 1 << dice.randrange(8)
            case 1:
                out[at:at] = dice.choice(words)
            case 2:
                word = dice.choice(words)
                out[at : at + len(word)] = word
            case 3:
                del out[at : at + dice.choice((1, 4, 32, 512))]
            case 4:
                out = out[:at]
            case 5:
                piece = out[at : at + dice.choice((4, 64, 512))]
                to = dice.randrange(len(out) + 1)
                out[to:to] = piece
            case 6:
                other = dice.choice(others)
                out[at:] = other[dice.randrange(len(other) + 1) :]
    return bytes(out)


def lines_reached(target: Target, data: bytes) -> set[tuple[str, int]]:
    """The lines of the package that checking *data* runs through."""
    reached: set[tuple[str, int]] = set()

    def trace(frame: FrameType, event: str, _argument: Any) -> Any:
        if not frame.f_code.co_filename.startswith(_PACKAGE):
            return None
        if event == "line":
            reached.add((frame.f_code.co_filename, frame.f_lineno))
        return trace

    sys.settrace(trace)
    try:
        target.check(data)
    finally:
        sys.settrace(None)
    return reached


def fuzz(name: str, seconds: float) -> bool:
    """Whether all inputs were dealt with as promised."""
    target, folder = TARGETS[name], CORPUS / name
    folder.mkdir(parents=True, exist_ok=True)
    dice = random.Random()
    pool = [*target.seeds(), *(path.read_bytes() for path in sorted(folder.iterdir()))]
    reached: set[tuple[str, int]] = set()
    for data in pool:
        reached |= lines_reached(target, data)
    count, deadline = 0, time.monotonic() + seconds
    while time.monotonic() < deadline:
        data = mutated(dice.choice(pool), pool, target.words, dice)
        begin = time.monotonic()
        try:
            found = lines_reached(target, data) - reached
            assert time.monotonic() - begin < _SLOW, "takes too long"
        except Exception:  # noqa: BLE001 - whatever it is, it is not what was promised
            path = keep(folder, data, "broken-")
            traceback.print_exc()
            sys.stderr.write(f"{name}: broken by {path}\n")
            return False
        count += 1
        if found:
            reached |= found
            pool.append(data)
            if len(data) <= _SHORT and len(list(folder.iterdir())) < _KEPT:
                keep(folder, data, "")
    sys.stdout.write(f"{name}: {count} inputs, {len(pool)} worth keeping, {len(reached)} lines reached\n")
    return True


def keep(folder: Path, data: bytes, prefix: str) -> Path:
    path = folder / f"{prefix}{hashlib.sha256(data).hexdigest()[:16]}"
    path.write_bytes(data)
    return path


if __name__ == "__main__":
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))
    span = float(sys.argv[1]) if len(sys.argv) > 1 else 60.0
    results = [fuzz(name, span) for name in sys.argv[2:] or TARGETS]
    sys.exit(not all(results))
