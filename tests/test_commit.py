"""The commit of a blob: once, under its condition, and looked after when its answer is lost."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import pytest
from azure.core.exceptions import HttpResponseError, ResourceExistsError, ResourceModifiedError
from hypothesis import given
from hypothesis import strategies as st

from azstoragetorch._blob.commit import parse_block_list
from azstoragetorch.exceptions import FatalBlobIOWriteError
from tests.azurite.container import Container
from tests.faults import FaultService, LostAnswer, Match, Reset, StaleConnection, Status, Torn
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


def write(url: str, data: bytes, **condition: Any) -> str:
    writer = blob_client(url).writer(**condition)
    try:
        writer.write(memoryview(data))
        return writer.commit()
    except BaseException:
        writer.abort()
        raise


class TestResult:
    @SIZES
    def test_the_etag_of_the_new_content_is_returned(self, container: Container, size: int) -> None:
        url = container.blob_sas_url("b")
        for data in (content(size), content(size, 1)):
            etag = write(url, data)
            version = blob_client(url).version()
            assert version is not None
            assert (version.etag, version.size) == (etag, size)
        assert blob_client(url).put(content(size)) != etag

    @SIZES
    @pytest.mark.parametrize("condition", ["none", "create", "etag"])
    def test_also_when_the_answer_was_lost(self, service: FaultService, size: int, condition: str) -> None:
        name = "new" if condition == "create" else "b"
        options = {"none": {}, "create": {"create_only": True}, "etag": {"etag": etag_of(service)}}[condition]
        service.script(commits(size), [LostAnswer()])
        etag = write(service.blob_url("c", name), content(size), **options)
        found = service.store.find("c", name)
        assert found is not None
        assert (found.data, found.etag) == (content(size), etag)
        assert service.unused_faults() == []


def etag_of(service: FaultService) -> str:
    found = service.store.find("c", "b")
    assert found is not None
    return found.etag


class TestOneVersion:
    """``etag=``: a version is replaced, or nothing is."""

    @SIZES
    def test_it_is_replaced(self, service: FaultService, size: int) -> None:
        write(service.blob_url("c", "b"), content(size), etag=etag_of(service))
        assert service.get("c", "b") == content(size)
        assert [entry.headers.get("if-match") is not None for entry in service.requests(commits(size))] == [True]

    @SIZES
    def test_another_one_stays(self, service: FaultService, size: int) -> None:
        etag = etag_of(service)
        service.put("c", "b", b"another writer's")
        with pytest.raises(ResourceModifiedError, match=r"/c/b is not the version .* any more; it is unchanged"):
            write(service.blob_url("c", "b"), content(size), etag=etag)
        assert service.get("c", "b") == b"another writer's"

    @SIZES
    def test_one_that_comes_after_the_lost_answer_stays(self, service: FaultService, size: int) -> None:
        """What was committed and then replaced by another writer is not put a second time."""
        etag = etag_of(service)
        service.script(commits(size), [LostAnswer()])
        service.script(Match(commits(size), nth=2), [])
        writer = blob_client(service.blob_url("c", "b")).writer(etag=etag)
        writer.write(memoryview(content(size)))
        service.script(Match(commits(size), nth=2), [Status(503)])
        real, replaced = service._answer, []

        def answer(entry: Any, body: Any) -> Any:
            if entry.operation == commits(size) and len(service.requests(commits(size))) == 3 and not replaced:
                replaced.append(service.put("c", "b", b"another writer's"))
            return real(entry, body)

        service._answer = answer  # type: ignore[method-assign]
        with pytest.raises(ResourceModifiedError):
            writer.commit()
        assert replaced
        assert service.get("c", "b") == b"another writer's"

    @SIZES
    @pytest.mark.parametrize("create_only", [False, True])
    def test_a_pooled_connection_that_dies_is_no_reason_to_send_it_twice_unseen(
        self, service: FaultService, size: int, create_only: bool
    ) -> None:
        name = "new" if create_only else "b"
        client = blob_client(service.blob_url("c", name))
        client.version()
        options: dict[str, Any] = {"create_only": True} if create_only else {"etag": etag_of(service)}
        service.script("head", [StaleConnection(on_next_request=True)])
        client.version()
        service.script(commits(size), [LostAnswer()])
        write(service.blob_url("c", name), content(size), **options)
        assert service.get("c", name) == content(size)

    @SIZES
    def test_a_lost_answer_that_nobody_may_look_after(self, service: FaultService, size: int) -> None:
        service.script(commits(size), [LostAnswer()])
        for look in ("head", "get_block_list"):
            service.script(look, [Status(403)], repeat=True)
        with pytest.raises(FatalBlobIOWriteError, match="does not say whether it was carried out"):
            write(service.blob_url("c", "b"), content(size), etag=etag_of(service))

    @SIZES
    def test_a_lease_is_not_taken_for_another_version(self, service: FaultService, size: int) -> None:
        service.script(commits(size), [Status(412, "LeaseIdMissing")], repeat=True)
        with pytest.raises(FatalBlobIOWriteError, match="LeaseIdMissing"):
            write(service.blob_url("c", "b"), content(size))

    @SIZES
    def test_on_azurite(self, container: Container, size: int) -> None:
        url = container.put("b", OLD)
        first = blob_client(url).version()
        assert first is not None
        second = write(url, content(size), etag=first.etag)
        with pytest.raises(ResourceModifiedError):
            write(url, content(size, 1), etag=first.etag)
        assert container.get("b") == content(size)
        write(url, content(size, 1), etag=second)
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
        """An MD5 takes 12 ms for 8 MiB."""
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
    """What the service sends is parsed; nothing in it is fetched or expanded."""

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
