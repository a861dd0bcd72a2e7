"""Shared by the tests of the core: small and fast transfers, test content, child processes."""

from __future__ import annotations

import gc
import os
import random
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, TypeVar

import pytest

from azstoragetorch._blob import transport
from azstoragetorch._blob.client import BlobClient, ContainerClient
from azstoragetorch._blob.credentials import Credential, CredentialHolder
from azstoragetorch._blob.url import parse_blob_url, parse_container_url
from azstoragetorch._engine.budget import Budget, Loan
from azstoragetorch._engine.config import KiB, MiB, TransferConfig

T = TypeVar("T")
ROOT = Path(__file__).parent.parent

QUICK = TransferConfig(
    part_size=64 * KiB,
    block_size=64 * KiB,
    max_concurrency=4,
    max_connections=8,
    memory_limit=1 * MiB,
    read_ahead=512 * KiB,
    connect_timeout=30.0,
    read_timeout=30.0,
    max_attempts=3,
    max_backoff=0.01,
)
"""The smallest parts and blocks there are, so that small blobs have many; three tries with next to no pause."""

IMPATIENT = replace(QUICK, read_timeout=0.8)
"""The same, for what stalls."""

PERSISTENT = replace(IMPATIENT, max_attempts=20)
"""The same, for what stalls once and has to end well: on a busy machine other requests may take too long as well."""


@lru_cache(maxsize=16)
def content(size: int, seed: int = 0) -> bytes:
    """*size* bytes in which every shift or repetition is detected."""
    return random.Random(seed).randbytes(size)


def blob_client(url: str, transfer: TransferConfig = QUICK, credential: Credential = False) -> BlobClient:
    parsed = parse_blob_url(url)
    return BlobClient(parsed, CredentialHolder(credential, parsed.sas, trusted_url=parsed), transfer)


def container_client(url: str, transfer: TransferConfig = QUICK, credential: Credential = False) -> ContainerClient:
    parsed = parse_container_url(url)
    return ContainerClient(parsed, CredentialHolder(credential, parsed.sas, trusted_url=parsed), transfer)


def run_python(program: str, *arguments: str, timeout: float = 100.0, **environment: str) -> str:
    """Run *program* in a new interpreter and return its output; the test fails if the program does."""
    result = subprocess.run(
        [sys.executable, "-c", program, *arguments],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    assert result.returncode == 0, f"exit code {result.returncode}\n{result.stdout}\n{result.stderr}"
    return result.stdout


@contextmanager
def taking(at_least: float = 0.0, at_most: float = 30.0) -> Iterator[None]:
    """The block takes about this many seconds; what must not be waited for takes twice the upper bound."""
    begin = time.monotonic()
    yield
    assert at_least <= time.monotonic() - begin < at_most


def watch_peak(budget: Budget) -> Callable[[], int]:
    """Watch *budget* from now on; the function returns the most bytes that were on loan at once."""
    amounts = [0]
    lend = partial(Budget._lend, budget)  # not what an earlier test has put there

    def lend_and_look(amount: int) -> Loan | None:
        loan = lend(amount)
        if loan is not None:
            amounts.append(budget.in_flight)
        return loan

    budget._lend = lend_and_look  # type: ignore[method-assign]
    return lambda: max(amounts)


def idle_connections() -> int:
    """The number of connections of this process that wait for a request."""
    return sum(map(len, transport._pool.get()._idle.values()))


def run_threads(count: int, action: Callable[[int], T], timeout: float = 240.0) -> list[T]:
    """Run *action* in *count* threads that start together; raise the first error."""
    start = threading.Barrier(count)
    results: list[Any] = [None] * count
    errors: list[BaseException] = []

    def run(number: int) -> None:
        try:
            start.wait(timeout)
            results[number] = action(number)
        except BaseException as error:  # noqa: BLE001 - raised below
            errors.append(error)

    threads = [threading.Thread(target=run, args=(number,), daemon=True) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout)
    assert not any(thread.is_alive() for thread in threads), "threads are stuck"
    if errors:
        raise errors[0]
    return results


def in_time(action: Callable[[], T], seconds: float = 60.0) -> T:
    """Run *action* in another thread; fail if it does not end. For code that must not hang."""
    return run_threads(1, lambda _: action(), seconds)[0]


@contextmanager
def interrupted_once(holds: Callable[[], bool]) -> Iterator[None]:
    """Raise KeyboardInterrupt in the main thread, which is in the block, once *holds*."""
    is_over = threading.Event()

    def interrupt(*_: object) -> None:
        if not is_over.is_set():
            is_over.set()
            raise KeyboardInterrupt

    def send() -> None:
        wait_until(holds)
        # Again and again: a signal that comes just before a system call does not end it.
        while not is_over.wait(0.02):
            os.kill(os.getpid(), signal.SIGALRM)

    previous = signal.signal(signal.SIGALRM, interrupt)
    sender = threading.Thread(target=send, daemon=True)
    sender.start()
    try:
        yield
    finally:
        is_over.set()
        sender.join()
        signal.signal(signal.SIGALRM, previous)


def wait_until(holds: Callable[[], bool], timeout: float = 240.0) -> None:
    deadline = time.monotonic() + timeout
    while not holds():
        if time.monotonic() > deadline:
            pytest.fail(f"did not come about within {timeout:g} s")
        time.sleep(0.005)


class _Mark:
    """Garbage that only the collector frees."""

    def __init__(self) -> None:
        self.itself = self


def collect_garbage() -> None:
    """Collect all garbage that there is now.

    `gc.collect` alone does nothing while another thread is collecting, for example in a finalizer that runs slowly.
    """
    is_enabled = gc.isenabled()
    gc.disable()  # a collection of young objects could take the mark alone
    try:
        mark = weakref.ref(_Mark())
        while True:
            gc.collect()
            if mark() is None:
                return
            time.sleep(0.001)
    finally:
        if is_enabled:
            gc.enable()


class Killed(BaseException):
    """The process ends here."""


@contextmanager
def struck(nth: int, kind: str) -> Iterator[list[int]]:
    """Make the request number *nth* of this thread fail: its response is lost, or the process dies before or after."""
    original, thread, sent = transport.send, threading.get_ident(), [0]

    def send(*arguments: Any, **options: Any) -> Any:
        if threading.get_ident() == thread:
            sent[0] += 1
            if sent[0] - 1 == nth and kind != "none":
                if kind == "killed before":
                    raise Killed
                answer = original(*arguments, **options)
                answer.close()
                raise Killed if kind == "killed after" else ConnectionResetError("lost")
        return original(*arguments, **options)

    transport.send = send  # type: ignore[assignment]
    try:
        yield sent
    finally:
        transport.send = original
