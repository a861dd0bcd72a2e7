"""Reads with one fault at a time return the exact bytes, or raise a clear error within the time for retries."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import replace

import pytest
from azure.core.exceptions import (
    ClientAuthenticationError,
    HttpResponseError,
    ResourceExistsError,
    ResourceModifiedError,
    ResourceNotFoundError,
    ServiceResponseError,
)

from azstoragetorch._blob.download import BlobVersion, fetch_parallel, open_range
from azstoragetorch._engine.config import KiB, MiB
from azstoragetorch._engine.ranges import ByteRange
from azstoragetorch._engine.scope import Cancelled, Scope
from azstoragetorch.exceptions import BlobChangedError, ClientRequestIdMismatchError
from azstoragetorch.io import BlobIO
from tests.faults import (
    ChangedEtag,
    Chunked,
    ConnectionRefused,
    CorruptByte,
    Fault,
    FaultService,
    FullInsteadOfPartial,
    GarbageStatusLine,
    Hangup,
    Match,
    MissingHeader,
    Reset,
    ResetInHeaders,
    SlowBytes,
    Stall,
    Status,
    Together,
    Torn,
    TornReset,
    WrongContentRange,
    WrongHeader,
    WrongLength,
)
from tests.support import IMPATIENT, PERSISTENT, QUICK, blob_client, content, taking, wait_until

SIZE = 1_300_001  # twenty parts of the smallest size, the last one short
DATA = content(SIZE)


@pytest.fixture
def service(fault_service: FaultService) -> FaultService:
    fault_service.put("c", "b", DATA)
    return fault_service


def read_whole(blob: BlobIO) -> bytes:
    return blob.read()


def read_into(blob: BlobIO) -> bytes:
    buffer = bytearray(SIZE + 10)
    return bytes(buffer[: blob.readinto(buffer)])


def read_in_small_pieces(blob: BlobIO) -> bytes:
    return b"".join(iter(lambda: blob.read(7000), b""))


def read_backwards(blob: BlobIO) -> bytes:
    pieces = []
    for start in range(SIZE // 200_000 * 200_000, -1, -200_000):
        blob.seek(start)
        pieces.append(blob.read(200_000))
    return b"".join(reversed(pieces))


READS = [read_whole, read_into, read_in_small_pieces, read_backwards]

PASSING: list[Fault] = [
    Status(503),
    Status(503, retry_after_ms=50),
    Status(503, retry_after=0.05),
    Status(429),
    Status(500),
    Status(502),
    Status(504),
    Status(408),
    Status(503, body=b""),
    Reset(),
    Hangup(),
    ResetInHeaders(),
    GarbageStatusLine(),
    GarbageStatusLine(b"HTTP/1.1 abc\r\n\r\n"),
    GarbageStatusLine(b"HTTP/1.1 206 Partial Content\r\nno colon\r\n\r\n"),
    Torn(after=0),
    Torn(after=1),
    Torn(after=40_000),
    TornReset(after=40_000),
    Stall(60, after=None),
    Stall(60, after=0),
    Stall(60, after=40_000),
    WrongContentRange(),
    WrongContentRange(value="bytes 0-9/10"),
    WrongContentRange(value="rubbish"),
    WrongLength(+7),
    WrongLength(-7),
    WrongHeader("Content-Length", "-5"),
    WrongHeader("Content-Length", "many"),
    WrongHeader("Content-Length", "9" * 5000),
    WrongContentRange(value=f"bytes 0-{'9' * 5000}/{'9' * 5000}"),
    FullInsteadOfPartial(),
    MissingHeader("Content-Range"),
    MissingHeader("ETag"),
    WrongHeader("x-ms-client-request-id", "another's"),
]
HARMLESS: list[Fault] = [
    Chunked(),
    MissingHeader("Content-Length"),
    MissingHeader("x-ms-request-id"),
    SlowBytes(rate=1_000_000),
    Stall(0.05, after=40_000),
]


def shown(fault: Fault) -> str:
    return repr(fault)[:80]


def open_blob(service: FaultService, fault: Fault | None = None) -> BlobIO:
    transfer = PERSISTENT if isinstance(fault, Stall) else QUICK
    return BlobIO(service.blob_url("c", "b"), "rb", credential=False, transfer=transfer)


class TestOneFault:
    @pytest.mark.parametrize(
        ("read", "nth"), [(read_whole, 1), (read_into, 3), (read_in_small_pieces, 1), (read_backwards, 3)]
    )
    @pytest.mark.parametrize("fault", [*PASSING, *HARMLESS], ids=shown)
    def test_is_survived(self, service: FaultService, fault: Fault, read: Callable[[BlobIO], bytes], nth: int) -> None:
        """In the first request or in a later one."""
        rule = service.script(Match("get_blob", nth=nth), [fault])
        with open_blob(service, fault) as blob, taking():
            assert read(blob) == DATA
        assert rule.is_exhausted

    @pytest.mark.parametrize("fault", PASSING, ids=shown)
    def test_that_stays_is_an_error_when_no_try_is_left(self, service: FaultService, fault: Fault) -> None:
        service.script("get_blob", [fault], repeat=True)
        transfer = IMPATIENT if isinstance(fault, Stall) else QUICK
        with BlobIO(service.blob_url("c", "b"), "rb", credential=False, transfer=transfer) as blob, taking():
            with pytest.raises((HttpResponseError, ServiceResponseError, ClientRequestIdMismatchError)) as caught:
                blob.read()
            assert blob.tell() == 0
        assert "GET" in str(caught.value)
        assert "/c/b" in str(caught.value)

    @pytest.mark.parametrize(
        ("status", "kind"),
        [
            (400, HttpResponseError),
            (401, ClientAuthenticationError),
            (403, ClientAuthenticationError),
            (404, ResourceNotFoundError),
            (409, ResourceExistsError),
            (501, HttpResponseError),
        ],
    )
    @pytest.mark.parametrize("read", READS)
    def test_that_will_not_pass_is_an_error_at_once(
        self, service: FaultService, status: int, kind: type[Exception], read: Callable[[BlobIO], bytes]
    ) -> None:
        service.script("get_blob", [Status(status)], repeat=True)
        with open_blob(service) as blob, pytest.raises(kind, match=rf"GET .*/c/b: {status}"):
            read(blob)
        assert len(service.requests("get_blob")) == 1

    def test_a_service_that_is_away_for_a_moment(self, service: FaultService) -> None:
        service.script(Match("get_blob", nth=2), [ConnectionRefused(seconds=0.3)])
        transfer = replace(QUICK, max_attempts=20, max_backoff=0.1)
        with BlobIO(service.blob_url("c", "b"), "rb", credential=False, transfer=transfer) as blob:
            assert blob.read() == DATA

    def test_one_that_is_not_there(self, service: FaultService) -> None:
        refused = pytest.raises(ServiceResponseError, match="refused")
        with open_blob(service) as blob, service.refusing_connections(), taking(), refused:
            blob.read()

    def test_after_an_error_reading_continues_where_it_was(self, service: FaultService) -> None:
        """The position is the one before the failed call: nothing is skipped or returned twice."""
        data = DATA.replace(b"\n", b"x")  # a line would be served from what was read before
        service.put("c", "b", data)
        with open_blob(service) as blob:
            head = blob.read(100)
            service.script("get_blob", [Status(404)], repeat=True)
            service.drop_connections(reset=True)
            reads: list[Callable[[], object]] = [
                lambda: blob.read(200_000),
                lambda: blob.read(2_000_000),
                blob.read,
                lambda: blob.readinto(bytearray(200_000)),
                lambda: blob.readinto(bytearray(2_000_000)),
                lambda: blob.readline(400_000),
            ]
            for read in reads:
                with pytest.raises(ResourceNotFoundError):
                    read()
                assert blob.tell() == 100
            service.clear_script()
            assert head + blob.read() == data


class TestPauses:
    @pytest.mark.parametrize(
        ("fault", "seconds"),
        [
            (Status(503, retry_after=1), 1.0),
            (Status(429, retry_after=1), 1.0),
            (Status(503, retry_after_ms=300), 0.3),
            (Status(503, retry_after_ms=300, retry_after=10), 0.3),
        ],
        ids=shown,
    )
    def test_the_service_is_given_the_time_it_asks_for(
        self, service: FaultService, fault: Fault, seconds: float
    ) -> None:
        service.script("get_blob", [fault])
        with open_blob(service) as blob:
            assert blob.read(10) == DATA[:10]
        first, second = service.requests("get_blob")[:2]
        assert seconds <= second.time - first.time

    def test_a_pause_ends_when_the_reader_is_closed(self, service: FaultService) -> None:
        service.script(Match("get_blob", nth=2), [Status(503, retry_after=60)], repeat=True)
        blob = BlobIO(service.blob_url("c", "b"), "rb", credential=False, transfer=replace(QUICK, part_size=128 * KiB))
        blob.read(70_000)  # the read-ahead is in flight
        service.wait_for_requests(2)
        wait_until(lambda: len(service.requests(status=503)) > 0)
        engine = blob._client.engine
        with taking():
            blob.close()
            wait_until(lambda: engine.budget.in_flight == 0)


class TestResuming:
    """The whole blob is one part, so that every request is accounted for."""

    @pytest.fixture
    def client_read(self, service: FaultService) -> Callable[[], bytes]:
        return lambda: blob_client(service.blob_url("c", "b"), replace(QUICK, part_size=2 * MiB)).read()[0]

    def spans(self, service: FaultService) -> list[tuple[int, int]]:
        return [entry.range for entry in service.requests("get_blob")]  # type: ignore[misc]

    @pytest.mark.parametrize("after", [0, 1, 99_999, SIZE - 1])
    def test_a_torn_body_continues_at_the_byte_it_reached(
        self, service: FaultService, client_read: Callable[[], bytes], after: int
    ) -> None:
        service.script("get_blob", [Torn(after=after)])
        assert client_read() == DATA
        assert self.spans(service) == [(0, 2 * MiB), (after, SIZE)]
        assert sum(entry.sent for entry in service.log) == SIZE

    def test_as_often_as_it_gets_further(self, service: FaultService, client_read: Callable[[], bytes]) -> None:
        """Only attempts without progress count."""
        service.script("get_blob", [Torn(after=300_000)] * 4)
        assert client_read() == DATA
        assert [start for start, _ in self.spans(service)] == [0, 300_000, 600_000, 900_000, 1_200_000]

    def test_drops_are_not_retried_forever(self, service: FaultService, client_read: Callable[[], bytes]) -> None:
        service.script("get_blob", [Torn(after=10)], repeat=True)
        with pytest.raises(ServiceResponseError, match="ended the body after 30 of 1300001 bytes"):
            client_read()

    @pytest.mark.parametrize("fault", [TornReset(after=200_000), Stall(60, after=200_000)], ids=shown)
    def test_after_a_reset_or_a_stall_little_is_fetched_again(self, service: FaultService, fault: Fault) -> None:
        """At most the bytes of one receive are lost: half a mebibyte."""
        data = content(3_000_000)
        service.put("c", "b", data)
        service.script("get_blob", [replace(fault, after=2_000_000)])  # type: ignore[call-arg]
        assert blob_client(service.blob_url("c", "b"), replace(PERSISTENT, part_size=4 * MiB)).read()[0] == data
        (_, first), (again, _) = self.spans(service)
        assert first == 4 * MiB
        assert 2_000_000 - 512 * KiB <= again <= 2_000_000

    def test_a_part_that_breaks_concerns_no_other_part(self, service: FaultService) -> None:
        service.script(Match("get_blob", nth=3), [Torn(after=1000)])
        assert blob_client(service.blob_url("c", "b")).read()[0] == DATA
        assert sum(entry.sent for entry in service.log) == SIZE
        assert len(service.log) == 21


class TestVersions:
    """No read mixes two versions of a blob."""

    def test_every_request_after_the_first_is_pinned(self, service: FaultService) -> None:
        _, version = blob_client(service.blob_url("c", "b")).read()
        assert version == BlobVersion(SIZE, service.store.find("c", "b").etag)  # type: ignore[union-attr]
        first, *others = service.requests("get_blob")
        assert "if-match" not in first.headers
        assert {entry.headers["if-match"] for entry in others} == {version.etag}
        assert len(others) == 19

    @pytest.mark.parametrize("ignores_conditions", [False, True])
    @pytest.mark.parametrize("data", [None, content(100_000, 2)], ids=["same size", "shorter"])
    @pytest.mark.parametrize("read", READS)
    @pytest.mark.parametrize("nth", [2, 4])
    def test_a_blob_that_is_overwritten_meanwhile(
        self,
        service: FaultService,
        read: Callable[[BlobIO], bytes],
        data: bytes | None,
        ignores_conditions: bool,
        nth: int,
    ) -> None:
        service.script(Match("get_blob", nth=nth), [ChangedEtag(data, ignores_conditions)])
        with open_blob(service) as blob, pytest.raises(BlobChangedError, match=r"/c/b was overwritten.*open it again"):
            read(blob)

    def test_opened_again_it_is_the_new_one(self, service: FaultService) -> None:
        with open_blob(service) as blob:
            blob.read(10)
            service.put("c", "b", DATA[::-1])
            with pytest.raises(BlobChangedError):
                blob.read()
            with pytest.raises(BlobChangedError):
                blob.read()
        with open_blob(service) as blob:
            assert blob.read() == DATA[::-1]

    def test_what_is_here_stays_readable(self, service: FaultService) -> None:
        """A blob that fits into one part is in memory after the first read, even if it is then deleted."""
        transfer = replace(QUICK, part_size=2 * MiB)
        with BlobIO(service.blob_url("c", "b"), "rb", credential=False, transfer=transfer) as blob:
            blob.read(10)
            service.delete("c", "b")
            assert blob.read() == DATA[10:]

    def test_a_blob_that_is_deleted_meanwhile(self, service: FaultService) -> None:
        with open_blob(service) as blob:
            blob.read(10)
            service.wait_until_idle()
            service.delete("c", "b")
            with pytest.raises((ResourceNotFoundError, BlobChangedError)):
                blob.read()

    def test_precondition_failures_elsewhere_are_not_mistaken(self, service: FaultService) -> None:
        """A 412 for the first, unpinned request is raised with the explanation of the service."""
        service.script("get_blob", [Status(412, "LeaseIdMissing")])
        with open_blob(service) as blob, pytest.raises((ResourceModifiedError, BlobChangedError), match="/c/b"):
            blob.read()


class TestEnds:
    def test_an_empty_blob(self, service: FaultService) -> None:
        service.put("c", "b", b"")
        with open_blob(service) as blob:
            assert blob.read() == b""
            assert blob.read(10) == b""
            assert blob.readinto(bytearray(10)) == 0
            assert blob.size == 0
            assert blob.seek(0, io.SEEK_END) == 0
        assert len(service.log) == 1

    @pytest.mark.parametrize("place", [SIZE, SIZE + 1, 10 * SIZE])
    def test_beyond_the_end_there_is_nothing_and_before_it_everything(self, service: FaultService, place: int) -> None:
        """Even if reading starts there, before the version is known."""
        with open_blob(service) as blob:
            blob.seek(place)
            assert blob.read(10) == b""
            assert blob.read() == b""
            assert blob.readinto(bytearray(2 * MiB)) == 0
            assert blob.size == SIZE
            assert blob.etag == service.store.find("c", "b").etag  # type: ignore[union-attr]
            blob.seek(0)
            assert blob.read() == DATA

    @pytest.mark.parametrize("size", [1, 2, 64 * KiB - 1, 64 * KiB, 64 * KiB + 1, 128 * KiB, 128 * KiB + 1])
    def test_sizes_around_parts(self, service: FaultService, size: int) -> None:
        service.put("c", "b", DATA[:size])
        for read in (read_whole, read_into, read_in_small_pieces):
            with open_blob(service) as blob:
                assert read(blob) == DATA[:size]


class TestValidation:
    CONFIG = replace(QUICK, validate_content=True, part_size=8 * MiB, block_size=2 * MiB)

    def test_a_corrupted_part_is_fetched_again(self, service: FaultService) -> None:
        service.script("get_blob", [CorruptByte(at=1000), CorruptByte(at=-1)])
        assert blob_client(service.blob_url("c", "b"), self.CONFIG).read()[0] == DATA
        assert len(service.log) == 3
        assert {entry.headers["x-ms-range-get-content-md5"] for entry in service.log} == {"true"}

    def test_corruption_that_stays_is_an_error(self, service: FaultService) -> None:
        service.script("get_blob", [CorruptByte()], repeat=True)
        with pytest.raises(ServiceResponseError, match="MD5"):
            blob_client(service.blob_url("c", "b"), self.CONFIG).read()

    def test_bytes_without_an_md5_are_not_taken_for_checked(self, service: FaultService) -> None:
        service.script("get_blob", [MissingHeader("Content-MD5"), CorruptByte()], repeat=True)
        with pytest.raises(ServiceResponseError, match="MD5"):
            blob_client(service.blob_url("c", "b"), self.CONFIG).read()

    @pytest.mark.parametrize("fault", [Torn(after=1000), TornReset(after=1000), Status(503)], ids=shown)
    def test_together_with_other_faults(self, service: FaultService, fault: Fault) -> None:
        service.script("get_blob", [fault, CorruptByte(), fault])
        transfer = replace(self.CONFIG, max_attempts=5)
        assert blob_client(service.blob_url("c", "b"), transfer).read()[0] == DATA

    def test_parts_are_as_small_as_the_service_demands(self, service: FaultService) -> None:
        service.put("c", "b", content(9 * MiB))
        assert blob_client(service.blob_url("c", "b"), self.CONFIG).read()[0] == content(9 * MiB)
        assert all(stop - start <= 4 * MiB for start, stop in (entry.range for entry in service.log))  # type: ignore[misc]

    def test_without_it_nothing_is_asked_for(self, service: FaultService) -> None:
        service.script("get_blob", [CorruptByte(at=5)])
        assert blob_client(service.blob_url("c", "b")).read()[0] != DATA
        assert not any("content-md5" in name for entry in service.log for name in entry.headers)


class TestPieces:
    """The functions that other modules use."""

    def test_a_range_fills_several_pieces_of_memory_in_order(self, service: FaultService) -> None:
        client = blob_client(service.blob_url("c", "b"))
        etag = service.store.find("c", "b").etag  # type: ignore[union-attr]
        targets = [memoryview(bytearray(size)) for size in (1, 0, 70_000, 5)]
        service.script("get_blob", [Torn(after=30_000)])
        client.fetch(ByteRange(100, 70_106), targets, etag=etag, scope=Scope())
        assert b"".join(targets) == DATA[100:70_106]

    def test_ranges_are_fetched_at_once(self, service: FaultService) -> None:
        service.script("get_blob", [Together(QUICK.max_concurrency)], repeat=True)
        client = blob_client(service.blob_url("c", "b"))
        etag = service.store.find("c", "b").etag  # type: ignore[union-attr]
        target = memoryview(bytearray(4 * 64 * KiB))
        fetch_parallel(client.service, client.url, [(ByteRange(0, len(target)), target)], etag=etag, scope=Scope())
        assert target == DATA[: len(target)]
        assert service.peak_active == QUICK.max_concurrency

    def test_a_cancelled_scope_begins_nothing(self, service: FaultService) -> None:
        client, scope = blob_client(service.blob_url("c", "b")), Scope()
        scope.cancel()
        with pytest.raises(Cancelled):
            open_range(client.service, client.url, ByteRange(0, 10), scope=scope)
        assert service.log == []

    def test_the_head_is_one_request(self, service: FaultService) -> None:
        head = blob_client(service.blob_url("c", "b")).head()
        assert (head.data, head.version.size) == (DATA[: 64 * KiB], SIZE)
        assert len(service.log) == 1


class TestAddresses:
    def test_a_version_is_read_and_not_the_present_blob(self) -> None:
        with FaultService(versioning=True) as service:
            service.put("c", "b", b"old")
            version = service.store.find("c", "b").version_id  # type: ignore[union-attr]
            service.put("c", "b", DATA)
            with BlobIO(service.blob_url("c", "b", versionid=version), "rb", credential=False) as blob:
                assert blob.read() == b"old"
            with BlobIO(service.blob_url("c", "b"), "rb", credential=False) as blob:
                assert blob.read() == DATA

    def test_a_snapshot_too(self, service: FaultService) -> None:
        stamp = service.snapshot("c", "b")
        service.put("c", "b", b"new")
        url = service.blob_url("c", "b", snapshot=stamp)
        assert blob_client(url).read()[0] == DATA
        version = blob_client(url).version()
        assert version is not None
        assert version.size == SIZE

    @pytest.mark.parametrize("option", ["snapshot", "versionid"])
    def test_an_option_adds_nothing_else_to_the_query(self, service: FaultService, option: str) -> None:
        url = service.blob_url("c", "b", **{option: "2024&comp=list&sig=forged"})
        with pytest.raises((HttpResponseError, ResourceNotFoundError)):
            blob_client(url).read()
        assert service.log[0].query == {option: "2024&comp=list&sig=forged"}

    @pytest.mark.parametrize("name", ["a b%2F?#ü//x/", "..." * 300, "/", "a+b", "%", "\u2028"])
    def test_awkward_names(self, service: FaultService, name: str) -> None:
        service.put("c", name, DATA)
        assert blob_client(service.blob_url("c", name)).read()[0] == DATA
