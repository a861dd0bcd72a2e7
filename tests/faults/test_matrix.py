"""Every fault in every operation: exact bytes or the named error, in time, nothing partial, nothing left open."""

from __future__ import annotations

import itertools
import time
import traceback
from collections.abc import Callable

import pytest

from azstoragetorch._blob import transport
from azstoragetorch._engine.config import KiB, MiB, TransferConfig
from azstoragetorch._engine.threads import engine_for
from tests.support import collect_garbage, idle_connections, wait_until

from .fixtures import LoopbackTls
from .matrix import (
    OUTERMOST,
    READ_TIMEOUT,
    RIGHT,
    ROWS,
    TARGETS,
    Cell,
    Row,
    cells,
    is_save,
    right_results,
    serving,
    stored,
)
from .operations import CONTAINER, OPERATIONS, Place, Tokens, names_of
from .service import FaultService

QUICK = {
    "part_size": 64 * KiB,
    "block_size": 64 * KiB,
    "max_concurrency": 4,
    "max_connections": 8,
    "memory_limit": 4 * MiB,
    "read_ahead": 512 * KiB,
    "connect_timeout": 60.0,
    "read_timeout": READ_TIMEOUT,
    "max_backoff": 0.02,
    "hedge_after": None,  # except in rows of hedging: a stall ends by the read timeout
}
_TRIES = 6  # of what always fails
_MANY_TRIES = 25  # of what has to end well: a busy machine may refuse and time out more often than it is told to
_SLACK = 50.0  # seconds; for a busy machine

_QUICK_ROWS = {"503", "reset before the response", "body cut short", "403", "commit with a lost response", "no ETag"}


def _is_slow(row: Row, operation: str) -> bool:
    """Cells that start processes, wait, or write and check checkpoints run only with the slow tests, except a few."""
    if "workers" in operation or "Retry-After" in row.name:
        return True
    takes_long = operation.startswith("dcp") or "stall" in row.name or "hedged" in row.name
    return row.name not in _QUICK_ROWS and takes_long


_SIMILAR = {"readinto", "small reads", "torch.save, one block", "epoch"}  # to "read all", "torch.save", and "pipes"
_slow = itertools.count()


def _marks(row: Row, operation: str) -> list[pytest.MarkDecorator]:
    """Cells are many: of the slow ones four of five, and of similar ones all but one, run when the page is written."""
    if not _is_slow(row, operation):
        return [pytest.mark.exhaustive] if row.name not in _QUICK_ROWS and operation in _SIMILAR else []
    return [pytest.mark.slow] if next(_slow) % 5 == 0 else [pytest.mark.slow, pytest.mark.exhaustive]


PAIRS = [
    pytest.param(row, operation, id=f"{row.name}-{operation}", marks=_marks(row, operation))
    for row in ROWS
    for operation in TARGETS
    if any(True for _ in cells(row, operation))
]


@pytest.mark.parametrize(("row", "operation"), PAIRS)
def test_cell(
    row: Row,
    operation: str,
    loopback_tls: LoopbackTls,
    monkeypatch: pytest.MonkeyPatch,
    record_property: Callable[[str, object], None],
) -> None:
    """The outcome is the one in the matrix."""
    if row.needs_token:
        monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(loopback_tls.ca_path))
    for cell in cells(row, operation):
        with serving(cell, lambda: loopback_tls.server_context) as (service, rule):
            begin = time.monotonic()
            outcome = run(cell, service)
            seconds = time.monotonic() - begin
            assert rule.fired, f"{cell.kind}: the fault befell nothing"
            service.clear_script()
        frequency = "always" if cell.is_always else "now and then"
        record_property(f"{frequency}: {cell.kind}", f"{outcome} in {seconds:.2f} s")


def run(cell: Cell, service: FaultService) -> str:
    """Run *cell* and check everything about it; return the outcome."""
    tries = (cell.row.few_tries or _TRIES) if cell.is_always else _MANY_TRIES
    transfer = TransferConfig(**{**QUICK, "max_attempts": tries, **cell.row.transfer})  # type: ignore[arg-type]
    credential = Tokens("good", "fresh") if cell.row.needs_token else False
    place = Place(service.container_url(CONTAINER), credential, {"transfer": transfer})
    begin = time.monotonic()
    try:
        result = OPERATIONS[cell.operation](place)
    except BaseException as error:  # noqa: BLE001 - torch raises it; compared with the expected error
        chain, text = names_of(error), "".join(traceback.format_exception(error))
        seconds = time.monotonic() - begin
        del error
        outcome = check_error(cell, chain, text)
    else:
        seconds = time.monotonic() - begin
        assert result in right_results(cell.operation), f"{cell.kind}: WRONG BYTES ({len(result)})"
        outcome = RIGHT
        assert cell.may_be_right, f"{cell.kind}: ended well instead of with {cell.expected}"
    assert seconds <= _SLACK, f"{cell.kind}: took {seconds:.1f} s"  # less than one READ_TIMEOUT
    if is_save(cell.operation):
        assert stored(service, cell.operation) == ("new" if outcome == RIGHT else "old")
    check_nothing_left(service, transfer)
    return outcome


def check_error(cell: Cell, chain: list[str], text: str) -> str:
    assert cell.expected != RIGHT, f"{cell.kind}: {chain} {text}"
    assert cell.expected in chain, f"{cell.kind}: {cell.expected} is not in {chain} {text}"
    outermost = OUTERMOST.get(cell.operation, chain[:1])
    assert chain[0] in outermost, f"{cell.kind}: {chain} {text}"
    assert outermost[0] in chain, f"{cell.kind}: {chain} {text}"
    assert "AssertionError" not in chain, text  # torch's, for metadata that cannot be read
    return cell.expected


def check_nothing_left(service: FaultService, transfer: TransferConfig) -> None:
    """All memory is given back, and each connection is in the pool or closed."""
    collect_garbage()
    service.wait_until_idle()
    wait_until(lambda: engine_for(transfer).budget.in_flight == 0)
    wait_until(lambda: service.open_connections <= idle_connections())
    transport.close_idle_connections()
    wait_until(lambda: service.open_connections == 0)
