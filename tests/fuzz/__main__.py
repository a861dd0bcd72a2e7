"""Fuzz: `python -m tests.fuzz [seconds for each target] [target ...]`.

Inputs that reach new lines of the package are mutated further, and stored in ``corpus`` if they are short. An input
that violates a check is stored as well, and ends the run with an error. The input that is checked is
always on disk too, for one that ends the process.
"""

from __future__ import annotations

import faulthandler
import hashlib
import random
import resource
import sys
import tempfile
import time
import traceback
from pathlib import Path
from types import FrameType
from typing import Any

from .targets import CORPUS, TARGETS, Target

_PACKAGE = str(Path(__file__).parent.parent.parent / "azstoragetorch")
_MEMORY = 8 << 30  # bytes of address space; an input must not need more
_SLOW = 5.0  # seconds
_HANG = 60  # seconds after which the process ends, with a traceback
_TRACED = 50_000  # bytes; longer inputs are not looked through for new lines, which takes long
_SHORT = 20_000  # bytes of a stored input
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
    """The lines of the package that are executed to check *data*."""
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
    """Whether no input violated a check."""
    target, folder = TARGETS[name], CORPUS / name
    folder.mkdir(parents=True, exist_ok=True)
    dice = random.Random()
    pool = [*target.seeds(), *(path.read_bytes() for path in sorted(folder.iterdir()))]
    reached: set[tuple[str, int]] = set()
    for data in pool:
        reached |= lines_reached(target, data)
    count, begun, last = 0, time.monotonic(), tempfile.NamedTemporaryFile(prefix=f"fuzz-{name}-", delete=False)  # noqa: SIM115
    sys.stdout.write(f"{name}: {len(pool)} inputs to begin with; the current one is in {last.name}\n")
    sys.stdout.flush()
    while time.monotonic() < begun + seconds:
        data = next_input(target, pool, dice)
        last.seek(0)
        last.truncate()
        last.write(data)
        last.flush()
        faulthandler.dump_traceback_later(_HANG, exit=True)
        begin = time.process_time()
        try:
            target.check(data)
            assert time.process_time() - begin < _SLOW, "takes too long"
            found = lines_reached(target, data) - reached if len(data) < _TRACED and not dice.randrange(4) else set()
        except Exception:  # noqa: BLE001 - any other error is a violation
            path = keep(folder, data, "broken-")
            traceback.print_exc()
            sys.stderr.write(f"{name}: broken by {path} after {count} inputs\n")
            return False
        faulthandler.cancel_dump_traceback_later()
        count += 1
        if found:
            reached |= found
            pool.append(data)
            if len(data) <= _SHORT and len(list(folder.iterdir())) < _KEPT:
                keep(folder, data, "")
    Path(last.name).unlink()
    spent = time.monotonic() - begun
    sys.stdout.write(
        f"{name}: {count} inputs in {spent:.0f} s, {len(pool)} worth keeping, {len(reached)} lines reached\n"
    )
    return True


def next_input(target: Target, pool: list[bytes], dice: random.Random) -> bytes:
    """An input of the pool, mutated: as what it is, or as any bytes."""
    data = dice.choice(pool)
    if target.mutate is not None and dice.randrange(4):
        return target.mutate(data, pool, dice)
    return mutated(data, pool, target.words, dice)


def keep(folder: Path, data: bytes, prefix: str) -> Path:
    path = folder / f"{prefix}{hashlib.sha256(data).hexdigest()[:16]}"
    path.write_bytes(data)
    return path


if __name__ == "__main__":
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))
    span = float(sys.argv[1]) if len(sys.argv) > 1 else 60.0
    results = [fuzz(name, span) for name in sys.argv[2:] or TARGETS]
    sys.exit(not all(results))
