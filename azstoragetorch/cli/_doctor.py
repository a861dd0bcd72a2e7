"""``azstoragetorch doctor``: measure transfers from this machine, and find the best settings."""

from __future__ import annotations

import math
import os
import secrets
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, fields, replace
from itertools import takewhile
from typing import Any

import click
from azure.core.exceptions import AzureError, ClientAuthenticationError

from azstoragetorch import __version__
from azstoragetorch._blob.client import BlobClient, BlobVersion
from azstoragetorch._blob.credentials import Credential
from azstoragetorch._blob.url import BlobURL
from azstoragetorch._engine.config import KiB, MiB, TransferConfig
from azstoragetorch._engine.memory import new_buffer
from azstoragetorch._engine.ranges import ByteRange
from azstoragetorch._engine.scope import Scope
from azstoragetorch._engine.threads import engine_for
from azstoragetorch.cli import _sweep as sweep
from azstoragetorch.cli._access import TokenSource
from azstoragetorch.cli._output import Output, human
from azstoragetorch.cli._session import Session, Url, common, examples
from azstoragetorch.io import BlobIO

_LATENCIES = 20  # requests measured one after the other
_AT_ONCE = 16  # requests whose tails are measured
_MOST_TAILS = 10_000  # requests
_LONGEST_TAIL = 20.0  # seconds that one of them is waited for
_TAIL_SHARE = 4.0  # the tails are measured for this multiple of one measurement
_SMALL = 100 * KiB  # a typical image
_SUGGESTED = ("part_size", "block_size", "max_concurrency", "max_connections", "memory_limit", "read_ahead")
_BAR = 40  # characters of the longest bar


@dataclass(frozen=True)
class _Site:
    """The blobs used for measuring."""

    session: Session
    url: BlobURL
    read: BlobURL
    """The blob that is read."""
    write: BlobURL | None
    """The blob that is written; None if nothing may be written."""
    size: int

    @property
    def credential(self) -> Credential:
        return self.session.access.credential(self.url)

    def blob(self, url: BlobURL, config: TransferConfig) -> BlobClient:
        return self.session.access.blob(url, config)


@click.command(
    epilog=examples(
        "doctor https://ACCOUNT.blob.core.windows.net/CONTAINER\n"
        "doctor https://ACCOUNT.blob.core.windows.net/CONTAINER/large.bin --size 64 --rounds 1"
    )
)
@click.argument("url", type=Url())
@click.option(
    "--size", default=512, show_default=True, help="Maximum size of the test blob in MiB.", type=click.IntRange(8)
)
@click.option("--rounds", default=3, show_default=True, help="Measurements per setting.", type=click.IntRange(1))
@click.option(
    "--seconds", default=0.5, show_default=True, help="Duration of one measurement.", type=click.FloatRange(0.01)
)
@common
def doctor(session: Session, url: BlobURL, size: int, rounds: int, seconds: float) -> None:
    """Measure latency and throughput from this machine to URL, and suggest a TransferConfig.

    Writes test blobs to the container or folder URL, and deletes them at the end. If URL is a blob, reads that blob and
    writes nothing. Takes about a minute. On a fast network it transfers tens of GiB, so consider the price of traffic
    out of a region.
    """
    output = session.output
    _, kind = session.access.choose(url)
    with TokenSource() as source:
        version = session.access.blob(url, TransferConfig()).version() if url.blob and url.blob[-1] != "/" else None
        if version is None:
            _try_access(session, url)
    if source.found is not None:
        kind = f"{kind} ({source.found})"
    output.line(f"azstoragetorch {__version__}, {os.cpu_count()} CPUs")
    output.line(f"URL            {url}")
    output.line(f"credential     {kind}")
    with _site(session, url, version, size * MiB) as site:
        latencies = _latencies(site)
        words = ", ".join(f"{name} {value:.1f}" for name, value in latencies.items())
        output.line(f"latency in ms  {words}")
        tails = _tails(site, _TAIL_SHARE * seconds)
        words = ", ".join(f"{name} {value:.1f}" for name, value in tails.items())
        output.line(f"tails in ms    {words} ({_AT_ONCE} requests at once, without hedging)")
        report = {"url": str(url), "credential": kind, "cpus": os.cpu_count(), "latency_ms": latencies}
        report["tails_ms"] = tails
        with output.progress("measuring", None, unit="measurements") as bar:
            found = _Diagnosis(site, rounds, seconds, lambda: bar(1))
            bar.plan(found.at_most)
            found.run()
    _report(output, found, report)


def _try_access(session: Session, url: BlobURL) -> None:
    """Fail early, with a clear error, if the container cannot be accessed."""
    try:
        next(iter(session.access.container(url, TransferConfig()).pages(prefix=url.blob)), None)
    except ClientAuthenticationError as error:
        if getattr(error, "status_code", None) != 403:
            raise
        session.output.note(f"listing is not permitted; doctor continues without it: {error}")


@contextmanager
def _site(session: Session, url: BlobURL, version: BlobVersion | None, size: int) -> Iterator[_Site]:
    """Create the test blobs, and delete them at the end."""
    if version is not None:
        if version.size < MiB:
            raise ValueError(f"{url} has only {version.size} bytes: choose a blob of at least 1 MiB")
        yield _Site(session, url, url, None, min(size, version.size))
        return
    folder = f"{url.blob}/" if url.blob and not url.blob.endswith("/") else url.blob
    name = f"{folder}azstoragetorch-doctor-{secrets.token_hex(8)}"
    read, write = url.with_blob(f"{name}-read"), url.with_blob(f"{name}-write")
    config = TransferConfig()
    try:
        # As many bytes as can be written in about two seconds.
        data = new_buffer(size)
        data[: 1 * MiB] = os.urandom(MiB)
        length, begin = min(size, 8 * MiB), time.perf_counter()
        credential = session.access.credential(url)
        while True:
            with BlobIO(str(read), "wb", credential=credential) as blob:
                blob.write(data[:length])
            if length == size or time.perf_counter() - begin > 0.7:
                break
            length, begin = min(size, 4 * length), time.perf_counter()
        yield _Site(session, url, read, write, length)
    finally:
        failures = []
        for place in (read, write):
            client = session.access.blob(place, config)
            try:
                client.put(b"")  # drops staged blocks of an interrupted write, which deleting does not do
                client.delete()
            except AzureError as error:
                failures.append(str(error))
        if failures:
            session.output.note(f"the test blobs {name}-* could not be deleted: {failures[0]}")


def _latencies(site: _Site) -> dict[str, float]:
    """Milliseconds until the first byte of a blob, by sequential requests on one connection."""
    client = site.blob(site.read, TransferConfig())
    version = client.version()
    assert version is not None
    buffer, scope = memoryview(bytearray(1)), Scope()
    times = []
    for _ in range(_LATENCIES):
        begin = time.perf_counter()
        client.fetch(ByteRange(0, 1), [buffer], etag=version.etag, scope=scope)
        times.append((time.perf_counter() - begin) * 1000)
    times.sort()
    return {
        "least": round(times[0], 2),
        "median": round(statistics.median(times), 2),
        "p90": round(times[math.ceil(len(times) * 0.9) - 1], 2),
    }


def _tails(site: _Site, seconds: float) -> dict[str, float]:
    """Milliseconds until the first byte of a blob, of many requests that are sent for *seconds*.

    Nothing is sent once more here, so that a request that stalls is seen. One that fails counts with its time.
    """
    config = replace(TransferConfig(), hedge_after=None, read_timeout=_LONGEST_TAIL, max_attempts=1)
    client = site.blob(site.read, config)
    version = client.version()
    assert version is not None
    until = time.perf_counter() + seconds

    def measure(_number: int, scope: Scope) -> float:
        begin = time.perf_counter()
        with suppress(AzureError):
            client.fetch(ByteRange(0, 1), [memoryview(bytearray(1))], etag=version.etag, scope=scope)
        return (time.perf_counter() - begin) * 1000

    numbers = takewhile(lambda _: time.perf_counter() < until, range(_MOST_TAILS))
    times = sorted(engine_for(config).map(measure, numbers, _AT_ONCE))
    return {
        name: round(times[math.ceil(len(times) * share) - 1], 2)
        for name, share in (("p50", 0.5), ("p99", 0.99), ("p99.9", 0.999))
    }


class _Diagnosis:
    """Measures step by step, and chooses settings."""

    def __init__(self, site: _Site, rounds: int, seconds: float, tick: Callable[[], None]) -> None:
        self._site = site
        self._rounds = rounds
        self._data = new_buffer(site.size)
        self.default = TransferConfig()
        self.suggested = self.default
        self._down = sweep.Gauge(self._read, site.size, min(sweep.FIRST, site.size), seconds, tick)
        self._up = sweep.Gauge(self._write, site.size, min(sweep.FIRST, site.size), seconds, tick)
        self._requests = sweep.Gauge(self._read_small, 20_000, 50, seconds, tick)
        self.download: dict[int, float] = {}
        self.upload: dict[int, float] = {}
        self.small: dict[int, float] = {}
        self.compared: dict[str, dict[str, float]] = {}

    @property
    def writes(self) -> bool:
        """Whether uploads were measured."""
        return self._site.write is not None

    @property
    def at_most(self) -> int:
        """The number of measurements that `run` makes, unless a sweep ends early."""
        settings = len(sweep.CONCURRENCIES) + len(sweep.PART_SIZES)
        settings += len(sweep.CONCURRENCIES) + len(sweep.BLOCK_SIZES) if self.writes else 0
        finals = 7 * (2 if self.writes else 1) + 2
        return self._rounds * (settings + len(sweep.CONNECTIONS)) + (self._rounds + 2) * finals

    def run(self) -> None:
        """Measure, choose settings, and compare them with the defaults."""

        def with_concurrency(count: int) -> TransferConfig:
            return sweep.fitting(replace(self.default, max_concurrency=count))

        self.download = sweep.climb(self._down, sweep.CONCURRENCIES, with_concurrency, self._rounds)
        directions = [self.download]
        if self.writes:
            self.upload = sweep.climb(self._up, sweep.CONCURRENCIES, with_concurrency, self._rounds)
            directions.append(self.upload)
        chosen = with_concurrency(sweep.smallest_good(sweep.shared(*directions)))
        parts = {size: sweep.fitting(replace(chosen, part_size=size)) for size in sweep.PART_SIZES}
        part_size = sweep.smallest_good(sweep.take_turns(self._down, parts, self._rounds))
        tuned = replace(chosen, part_size=part_size)
        if self.writes:
            blocks = {size: sweep.fitting(replace(chosen, block_size=size)) for size in sweep.BLOCK_SIZES}
            block_size = sweep.smallest_good(sweep.take_turns(self._up, blocks, self._rounds))
            tuned = replace(tuned, block_size=block_size)
        self.small = sweep.climb(
            self._requests, sweep.CONNECTIONS, lambda count: replace(self.default, max_connections=count), self._rounds
        )
        connections = self._connections()
        # Include the neighbors: noise may have hidden the best one.
        count = tuned.initial_concurrency
        near = [replace(tuned, max_concurrency=max(1, count * step // 2)) for step in (1, 2, 4)]
        self._decide([self.default, chosen, *near], connections)

    def _connections(self) -> int:
        """The number of connections for small blobs: more than the default only if that is clearly faster, twice."""
        usual = self.default.max_connections
        wanted = sweep.smallest_good(self.small)
        if wanted <= usual:
            return usual
        configs = {count: replace(self.default, max_connections=count) for count in (usual, wanted)}
        measured = sweep.measure_in_turns(self._requests, configs, self._rounds + 2)
        return wanted if sweep.is_clearly_faster(measured[wanted], measured[usual]) else usual

    def _decide(self, candidates: list[TransferConfig], connections: int) -> None:
        """Measure *candidates* in alternation, then the best against the defaults again. The defaults win a tie."""
        candidates = [sweep.fitting(config) for config in dict.fromkeys(candidates)]
        measured = self._measured(candidates)
        chosen = sweep.smallest_good(sweep.shared(*map(sweep.medians, measured)))
        winner, shown = candidates[0], measured  # the first one has the defaults
        if sweep.earns_its_place(*_sides(measured, chosen)):
            again = self._measured([candidates[0], candidates[chosen]])
            if sweep.earns_its_place(*_sides(again, 1)):
                winner, shown = candidates[chosen], again
        self.suggested = replace(winner, max_connections=max(connections, winner.max_connections))
        for name, number in (("default", 0), ("suggested", 1))[: 1 + (shown is not measured)]:
            directions = zip(("download", "upload"), shown, strict=False)
            self.compared[name] = {direction: statistics.median(rates[number]) for direction, rates in directions}

    def _measured(self, configs: list[TransferConfig]) -> list[dict[int, list[float]]]:
        """The rates of each of *configs* for downloads and, if anything may be written, uploads."""
        numbered = dict(enumerate(configs))
        gauges = [self._down, self._up] if self.writes else [self._down]
        return [sweep.measure_in_turns(gauge, numbered, self._rounds + 2) for gauge in gauges]

    def _read(self, config: TransferConfig, amount: int) -> None:
        url = self._site.read
        with BlobIO(str(url), "rb", credential=self._site.credential, transfer=config) as blob:
            done = 0
            while done < amount:
                count = blob.readinto(self._data[done:amount])
                if not count:
                    raise OSError(f"{url} ended after {done} of {amount} bytes: another program has overwritten it")
                done += count

    def _write(self, config: TransferConfig, amount: int) -> None:
        with BlobIO(str(self._site.write), "wb", credential=self._site.credential, transfer=config) as blob:
            blob.write(self._data[:amount])

    def _read_small(self, config: TransferConfig, count: int) -> None:
        client = self._site.blob(self._site.read, config)
        version = client.version()
        assert version is not None
        size = min(_SMALL, version.size)
        buffers = [memoryview(bytearray(size)) for _ in range(config.max_connections)]

        def read(_number: int, scope: Scope) -> None:
            buffer = buffers.pop()
            client.fetch(ByteRange(0, size), [buffer], etag=version.etag, scope=scope)
            buffers.append(buffer)

        engine_for(config).map(read, range(count), config.max_connections)


def _sides(measured: list[dict[int, list[float]]], number: int) -> tuple[list[list[float]], list[list[float]]]:
    """The measurements of one setting, and those of the defaults, by direction."""
    return [rates[number] for rates in measured], [rates[0] for rates in measured]


def _report(output: Output, found: _Diagnosis, report: dict[str, Any]) -> None:
    plots = [("download", "max_concurrency", found.download, "MiB/s", MiB)]
    if found.writes:
        plots.append(("upload", "max_concurrency", found.upload, "MiB/s", MiB))
    plots.append(("small blobs", "max_connections", found.small, "blobs/s", 1))
    for title, setting, rates, unit, scale in plots:
        output.line("")
        output.line(f"{title}, {unit} by {setting}")
        best = max(rates.values())
        for value, rate in rates.items():
            output.line(f"{value:>5}  {'█' * max(1, round(rate / best * _BAR)):<{_BAR}}  {rate / scale:,.0f}")
        report[title.replace(" ", "_")] = [{setting: value, "per_second": round(rate)} for value, rate in rates.items()]
    changed = {
        name: getattr(found.suggested, name)
        for name in _SUGGESTED
        if getattr(found.suggested, name) != getattr(found.default, name)
    }
    report["suggested"] = {setting.name: getattr(found.suggested, setting.name) for setting in fields(found.suggested)}
    report["environment"] = {f"AZSTORAGETORCH_{name.upper()}": str(value) for name, value in changed.items()}
    report["compared"] = {name: {k: round(v) for k, v in rates.items()} for name, rates in found.compared.items()}
    rows = [
        [direction, *(f"{rates[direction] / MiB:,.0f}" for rates in found.compared.values())]
        for direction in found.compared["default"]
    ]
    if changed:
        output.line("")
        output.table("MiB/s, measured in alternation", ["", *found.compared], rows)
        arguments = ", ".join(f"{name}={_expression(value)}" for name, value in changed.items())
        output.line("")
        output.line("suggested settings, in Python")
        output.line(f"from azstoragetorch import TransferConfig; transfer = TransferConfig({arguments})")
        output.line("")
        output.line("or for the whole process, in the shell")
        for name, text in report["environment"].items():
            output.line(f"export {name}={text}")
        output.line("")
        memory = human(found.suggested.memory_limit)
        output.line(f"They limit memory to {memory} per process, and so per DataLoader worker.")
    else:
        output.line("")
        output.line("suggested      the defaults: no other settings were clearly and repeatedly faster")
    output.record(report)


def _expression(value: int) -> str:
    return f"{value // MiB} << 20" if value >= MiB and value % MiB == 0 else str(value)
