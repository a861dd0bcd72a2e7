"""metrics() and tracing, compared with what the service received."""

from __future__ import annotations

import math
import os

import pytest
from azure.core.settings import settings

import azstoragetorch
from azstoragetorch import Metrics, TransferConfig, metrics
from azstoragetorch._blob.service import _Tracing
from azstoragetorch.datasets import BlobDataset
from azstoragetorch.io import BlobIO
from tests.faults.faults import Match, Status
from tests.faults.service import FaultService

QUICK = TransferConfig(part_size=64 << 10, block_size=64 << 10, max_backoff=0.01)


def test_counts_are_those_of_the_service(fault_service: FaultService) -> None:
    """Requests, refusals, throttles, retries and bytes are exactly those on the wire."""
    data = os.urandom(300_000)
    fault_service.put("box", "blob", data)
    fault_service.script(Match("get_blob"), [Status(503), Status(500)])
    before = metrics()
    with BlobIO(fault_service.blob_url("box", "blob"), "rb", credential=False, transfer=QUICK) as file:
        assert file.read() == data
    with BlobIO(fault_service.blob_url("box", "new"), "wb", credential=False, transfer=QUICK) as file:
        file.write(data)
    seen = metrics() - before
    assert seen.requests == len(fault_service.requests())
    assert (seen.refusals, seen.throttles, seen.retries) == (2, 1, 2)
    assert seen.bytes_received >= len(data)
    uploaded = sum(r.body_length for r in fault_service.requests() if r.method == "PUT")
    assert seen.bytes_sent == uploaded
    assert seen.connections == fault_service.connections_opened
    assert seen.blocked_seconds > 0
    assert sum(seen.latencies) == seen.requests


def test_latency_percentiles_follow_the_service(fault_service: FaultService) -> None:
    """A service that responds in 50 ms has a median latency of 50 ms, to the precision of a bucket."""
    fault_service.put("box", "blob", b"x")
    fault_service.latency = 0.05
    before = metrics()
    for _ in range(5):
        with BlobIO(fault_service.blob_url("box", "blob"), "rb", credential=False) as file:
            file.read()
    seen = metrics() - before
    assert seen.latency(0.5) >= 0.05
    assert seen.latency(0) <= seen.latency(0.5) <= seen.latency(1)


def test_time_in_transform_is_counted(fault_service: FaultService) -> None:
    """The time in the transform of a dataset is separate from that of transfers."""
    fault_service.put("box", "blob", b"x")
    dataset = BlobDataset.from_blob_urls(
        [fault_service.blob_url("box", "blob")], credential=False, transform=lambda blob: blob.blob_name
    )
    before = metrics()
    assert dataset[0] == "blob"
    seen = metrics() - before
    assert seen.transform_seconds > 0
    assert seen.bytes_received == 0


def test_no_answers_no_latency() -> None:
    """Percentiles of nothing are NaN, and an invalid share is refused."""
    assert math.isnan(Metrics().latency(0.5))
    with pytest.raises(ValueError, match="share"):
        Metrics().latency(2)


def test_a_forked_child_starts_at_zero(fault_service: FaultService) -> None:
    """A worker counts its own transfers only."""
    fault_service.put("box", "blob", b"x")
    with BlobIO(fault_service.blob_url("box", "blob"), "rb", credential=False) as file:
        file.read()
    assert azstoragetorch.metrics().requests > 0
    child = os.fork()
    if child == 0:
        os._exit(0 if metrics() == Metrics() else 1)
    assert os.waitpid(child, 0)[1] == 0


def test_requests_are_spans_where_tracing_is_on(fault_service: FaultService, monkeypatch: pytest.MonkeyPatch) -> None:
    """With azure-core's tracing on, a read is a client span with the redacted URL."""
    pytest.importorskip("azure.core.tracing.ext.opentelemetry_span")
    from opentelemetry import trace
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    spans = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(spans))
    trace.set_tracer_provider(provider)
    monkeypatch.setattr("azstoragetorch._blob.service._tracing", _Tracing())
    settings.tracing_implementation = "opentelemetry"
    try:
        fault_service.put("box", "blob", b"x")
        with BlobIO(fault_service.blob_url("box", "blob") + "?sv=1&sig=secret", "rb") as file:
            file.read()
    finally:
        settings.tracing_implementation = None
        monkeypatch.setattr("azstoragetorch._blob.service._tracing", _Tracing())
    ours = [span for span in spans.get_finished_spans() if span.name == "azstoragetorch.request"]
    assert len(ours) == 1
    assert "secret" not in str(ours[0].to_json())
