"""``doctor`` measures, suggests, and leaves nothing behind. Its suggestions are checked on simulated networks."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest
from azure.identity import ChainedTokenCredential
from hypothesis import given
from hypothesis import strategies as st

from azstoragetorch import TransferConfig
from azstoragetorch._blob.url import parse_url
from azstoragetorch.cli import _sweep as sweep
from azstoragetorch.cli._access import CredentialOptions, TokenSource
from azstoragetorch.cli._doctor import _Diagnosis, _report, _Site
from azstoragetorch.cli._output import Output
from azstoragetorch.cli._session import Session
from tests.azurite.container import Container
from tests.azurite.token import AzuriteTokenCredential
from tests.cli.conftest import Command
from tests.faults.faults import Stall
from tests.faults.service import FaultService
from tests.support import ROOT, content, wait_until

MiB = 1 << 20
QUICK = ("--size", "8", "--rounds", "1", "--seconds", "0.01")


def test_it_measures_and_suggests(container: Container, command: Command) -> None:
    """The JSON is complete, the suggestion can be used, and the container is empty again."""
    ended = command("doctor", f"{container.url}/folder", *QUICK, "--json")
    assert ended.code == 0, ended.err
    (report,) = ended.records
    assert report["credential"] == "account key in AZURE_STORAGE_KEY"
    assert 0 < report["tails_ms"]["p50"] <= report["tails_ms"]["p99"] <= report["tails_ms"]["p99.9"]
    assert 0 < report["latency_ms"]["least"] <= report["latency_ms"]["median"] <= report["latency_ms"]["p90"]
    for name, setting in [
        ("download", "max_concurrency"),
        ("upload", "max_concurrency"),
        ("small_blobs", "max_connections"),
    ]:
        assert len(report[name]) >= 2
        assert all(point[setting] >= 1 and point["per_second"] > 0 for point in report[name])
    suggested = TransferConfig(**report["suggested"])
    assert all(name == f"AZSTORAGETORCH_{name[15:]}" for name in report["environment"])
    for name, value in report["environment"].items():
        assert int(value) == getattr(suggested, name.removeprefix("AZSTORAGETORCH_").lower())
    assert container.names() == []


def test_for_people_it_draws(container: Container, command: Command) -> None:
    ended = command("doctor", container.url, *QUICK)
    assert ended.code == 0, ended.err
    for word in (
        "latency in ms",
        "tails in ms",
        "download, MiB/s by max_concurrency",
        "upload",
        "small blobs",
        "█",
        "suggested",
    ):
        assert word in ended.out


@pytest.mark.parametrize(
    ("other", "default", "is_suggested"),
    [
        ([[120, 118, 122]], [[100, 101, 99]], True),
        ([[120, 90, 122, 121, 119]], [[100, 101, 99, 100, 100]], True),  # one bad measurement
        ([[105, 106, 104]], [[100, 101, 99]], False),  # too small a gain
        ([[150, 95, 150, 94, 150]], [[100, 101, 99, 100, 100]], False),  # not in every measurement
        ([[797, 798, 796]], [[851, 850, 852]], False),
        ([[100, 100, 100]], [[100, 100, 100]], False),
        ([[150, 150, 150], [90, 90, 90]], [[100, 100, 100], [100, 100, 100]], False),  # uploads are slower
        ([[150, 150, 150], [99, 100, 98]], [[100, 100, 100], [100, 100, 100]], True),
    ],
)
def test_only_what_is_clearly_and_repeatedly_faster_is_suggested(
    other: list[list[float]], default: list[list[float]], is_suggested: bool
) -> None:
    assert sweep.earns_its_place(other, default) is is_suggested


def test_what_it_suggests_can_be_pasted(capfd: pytest.CaptureFixture[str]) -> None:
    """A line of Python that runs, and lines for a shell, with nothing before or after them."""
    place = parse_url("https://account.blob.core.windows.net/c/b")
    session = Session(CredentialOptions(print), Output())
    found = _Diagnosis(_Site(session, place, place, None, 8 * MiB), 1, 0.01, lambda: None)
    found.download = found.small = {1: 1.0}
    found.compared = {"default": {"download": 1.0}, "suggested": {"download": 2.0}}
    found.suggested = TransferConfig(max_concurrency=32, read_ahead=256 * MiB, max_connections=100)
    _report(session.output, found, {})
    lines = capfd.readouterr().out.splitlines()
    (python,) = [line for line in lines if "TransferConfig(" in line]
    names: dict[str, Any] = {}
    exec(python, names)
    assert names["transfer"] == found.suggested
    shell = [line for line in lines if "AZSTORAGETORCH" in line]
    ran = subprocess.run(
        ["sh", "-ec", "\n".join([*shell, "env"])], capture_output=True, text=True, check=True, env={}
    ).stdout
    assert {line for line in ran.splitlines() if line.startswith("AZSTORAGETORCH")} == {
        "AZSTORAGETORCH_MAX_CONCURRENCY=32",
        f"AZSTORAGETORCH_READ_AHEAD={256 * MiB}",
        "AZSTORAGETORCH_MAX_CONNECTIONS=100",
    }


def test_a_blob_is_only_read(container: Container, command: Command) -> None:
    container.put("blob", content(2 * MiB))
    before = container.client.get_blob_client("blob").get_blob_properties().etag
    ended = command("doctor", container.blob_url("blob"), *QUICK, "--json")
    assert ended.code == 0, ended.err
    assert "upload" not in ended.records[0]
    assert container.names() == ["blob"]
    assert container.client.get_blob_client("blob").get_blob_properties().etag == before


def test_who_may_not_write_is_told(container: Container, command: Command) -> None:
    ended = command("doctor", f"{container.url}?{container.sas('rl')}", *QUICK)
    assert ended.code == 4


def test_which_credential_had_a_token_is_heard() -> None:
    """From the log of azure-identity, as for DefaultAzureCredential, which is a chain."""
    with TokenSource() as source:
        assert source.found is None
        ChainedTokenCredential(AzuriteTokenCredential()).get_token("https://storage.azure.com/.default")
    assert source.found == "AzuriteTokenCredential"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_it_leaves_nothing_behind(fault_service: FaultService, number: signal.Signals) -> None:
    fault_service.allow_anonymous()
    fault_service.create_container("data")
    fault_service.script("get_blob", [Stall(seconds=120)], repeat=True)
    process = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "azstoragetorch.cli",
            "doctor",
            fault_service.container_url("data"),
            "--anonymous",
            *QUICK,
        ],
        cwd=ROOT,
        env=os.environ,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    fault_service.wait_for_requests(1, "get_blob", timeout=240)
    assert fault_service.names("data") != []
    process.send_signal(number)
    process.communicate(timeout=240)
    wait_until(lambda: fault_service.names("data") == [], timeout=240)


class Network:
    """A simulated network with a fixed rate in total and per connection, without noise."""

    def __init__(self, total: float, each: float, monkeypatch: pytest.MonkeyPatch) -> None:
        self.total, self.each, self.now = total, each, 0.0
        monkeypatch.setattr(sweep.time, "perf_counter", lambda: self.now)

    def rate(self, config: TransferConfig) -> float:
        return min(self.total, self.each * config.max_concurrency)

    def transfer(self, config: TransferConfig, amount: int) -> None:
        self.now += amount / self.rate(config)


@pytest.mark.parametrize("total", [50e6, 900e6, 5e9])
@pytest.mark.parametrize("each", [5e6, 60e6, 400e6])
def test_climbing_finds_the_smallest_concurrency_that_fills_the_network(
    total: float, each: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = Network(total, each, monkeypatch)
    gauge = sweep.Gauge(network.transfer, 512 * MiB)
    default = TransferConfig()
    rates = sweep.climb(gauge, sweep.CONCURRENCIES, lambda n: replace(default, max_concurrency=n), 2)
    found = sweep.smallest_good(rates)
    best = max(network.rate(replace(default, max_concurrency=n)) for n in sweep.CONCURRENCIES)
    assert network.rate(replace(default, max_concurrency=found)) >= sweep.ENOUGH * best
    assert not any(network.rate(replace(default, max_concurrency=n)) >= sweep.ENOUGH * best for n in rates if n < found)


def test_measuring_a_slow_place_takes_no_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    """The amount of data follows the rate: a setting takes about the requested time."""
    network = Network(2e6, 2e6, monkeypatch)
    gauge = sweep.Gauge(network.transfer, 512 * MiB, first=1 * MiB, seconds=0.5)
    sweep.climb(gauge, sweep.CONCURRENCIES, lambda n: TransferConfig(max_concurrency=n), 3)
    assert network.now < 15


@given(
    st.dictionaries(st.sampled_from(sweep.CONCURRENCIES), st.floats(1, 1e10), min_size=1),
    st.dictionaries(st.sampled_from(sweep.CONCURRENCIES), st.floats(1, 1e10), min_size=1),
)
def test_what_both_directions_share_is_a_share(down: dict[int, float], up: dict[int, float]) -> None:
    down[1], up[1] = down.get(1, 1.0), up.get(1, 1.0)
    shares = sweep.shared(down, up)
    assert set(shares) == set(down) | set(up)
    assert all(0 < share <= 1 for share in shares.values())
    assert sweep.smallest_good(shares) in shares


def test_a_suggestion_has_the_memory_that_it_needs() -> None:
    config = sweep.fitting(TransferConfig(max_concurrency=128, part_size=32 * MiB))
    assert config.read_ahead >= 128 * 32 * MiB
    assert config.memory_limit >= 2 * config.read_ahead
    assert config.max_connections >= 128
    assert sweep.fitting(TransferConfig()) == TransferConfig()


def test_errors_of_a_measurement_end_it(container: Container, command: Command) -> None:
    container.put("blob", b"tiny")
    ended = command("doctor", container.blob_url("blob"), *QUICK, "--json")
    assert ended.code == 2
    assert "1 MiB" in json.loads(ended.err)["error"]
