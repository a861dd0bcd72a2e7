"""The commit of a blob: once, under its condition, and checked if its response is lost."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import pytest
from azure.core.exceptions import HttpResponseError, ResourceExistsError
from hypothesis import given
from hypothesis import strategies as st

from azstoragetorch._blob.commit import parse_block_list
from azstoragetorch.exceptions import FatalBlobIOWriteError
from tests.azurite.container import Container
from tests.faults import FaultService, LostAnswer, Reset, StaleConnection, Status, Torn, WrongHeader
from tests.faults.wire import Answer
from tests.support import QUICK, blob_client, content

OLD = b"the old content"
SIZES = pytest.mark.parametrize("size", [100, 300_000], ids=["put blob", "block list"])


@pytest.fixture
def service(fault_service: FaultService) -> FaultService:
    fault_service.put("c", "b", OLD)
    return fault_service


def commits(size: int) -> str:
    return "put_blob" if size == 100 else "put_block_list"


def write(url: str, data: bytes, **condition: Any) -> None:
    writer = blob_client(url).writer(**condition)
    try:
        writer.write(memoryview(data))
        writer.commit()
    except BaseException:
        writer.abort()
        raise


class TestLostAnswers:
    @SIZES
    @pytest.mark.parametrize("create_only", [False, True])
    def test_what_was_carried_out_is_a_success(self, service: FaultService, size: int, create_only: bool) -> None:
        name = "new" if create_only else "b"
        service.script(commits(size), [LostAnswer()])
        write(service.blob_url("c", name), content(size), create_only=create_only)
        assert service.get("c", name) == content(size)
        assert service.unused_faults() == []

    @SIZES
    def test_a_pooled_connection_that_dies_is_not_a_reason_to_create_twice_unseen(
        self, service: FaultService, size: int
    ) -> None:
        client = blob_client(service.blob_url("c", "new"))
        service.script("head", [StaleConnection(on_next_request=True)])
        client.version()
        service.script(commits(size), [LostAnswer()])
        write(service.blob_url("c", "new"), content(size), create_only=True)
        assert service.get("c", "new") == content(size)

    def test_nor_to_replace_a_version_twice(self, service: FaultService) -> None:
        client = blob_client(service.blob_url("c", "b"))
        found = client.get_properties()
        service.script("put_blob", [LostAnswer()])
        is_ours, now = client.replace(b"new", etag=found.version.etag)
        assert (is_ours, now is not None and now.version.size) == (True, 3)
        assert len(service.requests("put_blob")) == 1

    @SIZES
    @pytest.mark.parametrize("status", [400, 403, 409, 412])
    def test_a_refusal_after_a_lost_response_does_not_hide_the_commit(
        self, service: FaultService, size: int, status: int
    ) -> None:
        """The SAS expires, or the blob is leased, after an attempt whose response was unusable and that took effect."""
        service.script(commits(size), [WrongHeader("x-ms-client-request-id", "another's"), Status(status)])
        write(service.blob_url("c", "b"), content(size))
        assert service.get("c", "b") == content(size)
        assert service.unused_faults() == []

    @SIZES
    @pytest.mark.parametrize("status", [400, 403, 409, 412])
    def test_nor_does_a_refusal_of_the_request_that_the_transport_repeats(
        self, service: FaultService, size: int, status: int
    ) -> None:
        """The response is lost on a pooled connection: the repeated request is the second attempt, not the first."""
        client = blob_client(service.blob_url("c", "b"))
        client.version()  # the first request on a connection is not repeated
        service.script(commits(size), [LostAnswer(), Status(status)])
        write(service.blob_url("c", "b"), content(size))
        assert service.get("c", "b") == content(size)
        assert service.unused_faults() == []

    @SIZES
    def test_a_refusal_of_a_repeated_request_that_was_not_carried_out_is_raised(
        self, service: FaultService, size: int
    ) -> None:
        blob_client(service.blob_url("c", "b")).version()
        service.script(commits(size), [Reset(), Status(403)])
        with pytest.raises(FatalBlobIOWriteError, match=r"nothing was committed.* 403"):
            write(service.blob_url("c", "b"), content(size))
        assert service.get("c", "b") == OLD
        assert service.unused_faults() == []

    @SIZES
    def test_a_refusal_after_an_attempt_that_was_not_carried_out_is_raised(
        self, service: FaultService, size: int
    ) -> None:
        service.script(commits(size), [Reset(), Status(403)], repeat=True)
        with pytest.raises(FatalBlobIOWriteError, match=r"nothing was committed.* 403"):
            write(service.blob_url("c", "b"), content(size))
        assert service.get("c", "b") == OLD

    @SIZES
    def test_a_lease_is_a_refusal(self, service: FaultService, size: int) -> None:
        service.script(commits(size), [Status(412, "LeaseIdMissing")], repeat=True)
        with pytest.raises(FatalBlobIOWriteError, match="LeaseIdMissing"):
            write(service.blob_url("c", "b"), content(size))

    @SIZES
    def test_on_azurite(self, container: Container, size: int) -> None:
        url = container.blob_sas_url("b")
        write(url, content(size), create_only=True)
        with pytest.raises(ResourceExistsError):
            write(url, content(size, 1), create_only=True)
        assert container.get("b") == content(size)
        write(url, content(size, 1))
        assert container.get("b") == content(size, 1)


class TestLooking:
    def test_a_block_list_that_breaks_off_is_asked_for_again(self, service: FaultService) -> None:
        service.script("put_block_list", [LostAnswer()])
        service.script("get_block_list", [Torn(after=30), Reset()])
        write(service.blob_url("c", "new"), content(300_000), create_only=True)
        assert service.get("c", "new") == content(300_000)
        assert service.unused_faults() == []

    def test_the_blocks_of_another_writer_are_not_ours(self, service: FaultService) -> None:
        service.script("put_block_list", [Reset()])
        writer = blob_client(service.blob_url("c", "new")).writer(create_only=True)
        writer.write(memoryview(content(300_000)))
        blob_client(service.blob_url("c", "new")).put(content(300_000))  # the same bytes in other blocks
        with pytest.raises(ResourceExistsError):
            writer.commit()

    def test_no_digest_is_computed_that_nobody_needs(
        self, service: FaultService, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The MD5 of 8 MiB takes 12 ms."""
        monkeypatch.setattr("azstoragetorch._blob.commit.md5_of", lambda _: pytest.fail("nobody asked for it"))
        for size in (100, 300_000):
            write(service.blob_url("c", "new"), content(size))

    def test_a_refusal_is_final(self, service: FaultService) -> None:
        for size in (100, 300_000):
            service.script(commits(size), [Status(400)], repeat=True)
            with pytest.raises(FatalBlobIOWriteError) as caught:
                write(service.blob_url("c", "b"), content(size))
            assert isinstance(caught.value.__cause__, HttpResponseError)
            assert len(service.requests(commits(size))) == 1
        assert service.get("c", "b") == OLD


class TestBlockLists:
    """Responses are parsed; nothing in them is fetched or expanded."""

    def test_the_ids_of_committed_blocks(self) -> None:
        xml = (
            b'\xef\xbb\xbf<?xml version="1.0" encoding="utf-8"?><BlockList><CommittedBlocks><Block><Name>YQ==</Name>'
            b"<Size>1</Size></Block><Block><Name>Yg==</Name><Size>2</Size></Block></CommittedBlocks>"
            b"<UncommittedBlocks><Block><Name>Yw==</Name></Block></UncommittedBlocks></BlockList>"
        )
        assert parse_block_list(xml) == ["YQ==", "Yg=="]
        assert parse_block_list(b"<BlockList/>") == []

    @pytest.mark.parametrize(
        "raw",
        [
            b"",
            b"<BlockList>",
            b"<Error><Code>x</Code></Error>",
            b"\xff\xfe<\x00B\x00l\x00o\x00c\x00k\x00L\x00i\x00s\x00t\x00/\x00>\x00",
            b'<!DOCTYPE b [<!ENTITY a "aaaa"><!ENTITY c "&a;&a;">]><BlockList>&c;</BlockList>',
            b'<!DOCTYPE b SYSTEM "http://evil.example/"><BlockList/>',
            b'<!DOCTYPE b [<!ENTITY a SYSTEM "file:///etc/passwd">]><BlockList>&a;</BlockList>',
        ],
    )
    def test_anything_else_is_refused(self, raw: bytes) -> None:
        with pytest.raises(ValueError):
            parse_block_list(raw)

    @given(st.binary(max_size=60))
    def test_any_bytes(self, raw: bytes) -> None:
        with suppress(ValueError):
            assert isinstance(parse_block_list(raw), list)

    def test_one_that_cannot_be_read_does_not_mean_that_nothing_was_committed(self, service: FaultService) -> None:
        real = service._answer

        def answer(entry: Any, body: Any) -> Any:
            raw = b"<!DOCTYPE b []><BlockList/>"
            found = real(entry, body)
            return Answer(200, {"ETag": '"1"'}, raw) if entry.operation == "get_block_list" else found

        service._answer = answer  # type: ignore[method-assign]
        service.script("put_block_list", [LostAnswer()])
        with pytest.raises(FatalBlobIOWriteError, match="does not say whether it was carried out"):
            write(service.blob_url("c", "new"), content(300_000), create_only=True)


def test_quick_has_blocks_that_make_two_kinds_of_commit() -> None:
    assert 100 < QUICK.block_size < 300_000
