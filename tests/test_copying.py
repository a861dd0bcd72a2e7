"""Copies that the service makes by itself: the exact bytes of one version, with its description, or an error."""

from __future__ import annotations

import pytest
from azure.core.exceptions import AzureError, ClientAuthenticationError, ResourceNotFoundError

from azstoragetorch._blob.client import BlobClient, ClientFactory, CopyRange, CopySource
from azstoragetorch._blob.url import parse_blob_url
from azstoragetorch._engine.ranges import ByteRange
from azstoragetorch.exceptions import BlobChangedError, FatalBlobIOWriteError
from tests.azurite.container import Container
from tests.azurite.token import AzuriteTokenCredential
from tests.faults import FaultService, LostAnswer, Match, Status
from tests.support import QUICK, blob_client, content

NAME = "a b%2F?#ü//x"


def source_of(blob: BlobClient) -> CopySource:
    version = blob.version()
    assert version is not None
    return blob.copy_source(version.etag)


def put(service: FaultService, name: str, data: bytes) -> BlobClient:
    service.put("c", name, data)
    return blob_client(service.blob_url("c", name))


class TestWholeBlobs:
    @pytest.mark.parametrize("size", [0, 1, 300_000])
    def test_on_azurite_with_its_description(self, container: Container, size: int) -> None:
        container.put(NAME, content(size))
        source = container.client.get_blob_client(NAME)
        source.set_blob_metadata({"owner": "me"})
        target = blob_client(container.blob_sas_url("copy"))
        target.copy_from(source_of(blob_client(container.blob_sas_url(NAME))))
        found = container.client.get_blob_client("copy").get_blob_properties()
        assert container.get("copy") == content(size)
        assert found.metadata == {"owner": "me"}

    def test_with_a_token(self, https_container: Container, token_credential: AzuriteTokenCredential) -> None:
        https_container.put("a", b"data")
        parsed = parse_blob_url(https_container.blob_url("a"))
        factory = ClientFactory(token_credential, QUICK, parsed)
        container = factory.container(parsed)
        container.blob("b").copy_from(source_of(container.blob("a")))
        assert https_container.get("b") == b"data"

    def test_an_overwritten_source_is_not_copied(self, fault_service: FaultService) -> None:
        blob = put(fault_service, "a", b"old")
        source = source_of(blob)
        fault_service.put("c", "a", b"new")
        with pytest.raises(BlobChangedError, match="overwritten while it was being copied"):
            blob_client(fault_service.blob_url("c", "b")).copy_from(source)
        assert not fault_service.exists("c", "b")

    def test_a_missing_source(self, fault_service: FaultService) -> None:
        source = source_of(put(fault_service, "a", b"data"))
        fault_service.delete("c", "a")
        with pytest.raises(ResourceNotFoundError, match=r"PUT \(copy from .*/c/a\) .*/c/b: 404"):
            blob_client(fault_service.blob_url("c", "b")).copy_from(source)

    def test_a_lost_response_and_a_busy_service_are_retried(self, fault_service: FaultService) -> None:
        source = source_of(put(fault_service, "a", b"data"))
        fault_service.script(Match("copy_blob"), [LostAnswer(), Status(503)])
        blob_client(fault_service.blob_url("c", "b")).copy_from(source)
        assert fault_service.get("c", "b") == b"data"
        assert len(fault_service.requests("copy_blob")) == 3

    def test_the_sas_of_the_source_is_in_no_error(self, fault_service: FaultService) -> None:
        service = fault_service
        service.put("c", "a", b"data")
        service.require_sas("right")
        found = blob_client(f"{service.blob_url('c', 'a')}?sv=1&sig=right")
        target = blob_client(f"{service.blob_url('c', 'b')}?sv=1&sig=right")
        target.copy_from(source_of(found))
        wrong = blob_client(f"{service.blob_url('c', 'a')}?sv=1&sig=wrong").copy_source('"0x1"')
        with pytest.raises(ClientAuthenticationError) as raised:
            target.copy_from(wrong)
        assert "wrong" not in str(raised.value)

    def test_a_credential_is_not_sent_to_another_host(self, fault_service: FaultService) -> None:
        source = source_of(put(fault_service, "a", b"data"))
        other = blob_client("http://blobs.example.com/devstoreaccount1/c/b")
        with pytest.raises(ValueError, match="would be sent to a host that is not one of Azure Storage"):
            other.copy_from(source)


class TestBlocks:
    def test_copied_and_uploaded_blocks_mix_in_order(self, fault_service: FaultService) -> None:
        source = source_of(put(fault_service, "a", content(1000)))
        writer = blob_client(fault_service.blob_url("c", "b")).writer()
        writer.write(memoryview(b"first "))
        staged: list[int] = []
        blocks = [
            CopyRange(source, ByteRange(10, 20)),
            [memoryview(b"in "), memoryview(b"between")],
            CopyRange(source, ByteRange(500, 1000)),
        ]
        writer.write_blocks(blocks, concurrency=3, staged=staged.append)
        writer.write(memoryview(b" last"))
        assert writer.written == 6 + 10 + 10 + 500 + 5
        writer.commit()
        data = content(1000)
        assert fault_service.get("c", "b") == b"first " + data[10:20] + b"in between" + data[500:] + b" last"
        assert sorted(staged) == [10, 10, 500]
        uploaded = [request.body_length for request in fault_service.requests("put_block_from_url")]
        assert uploaded == [0, 0]

    def test_lost_responses_are_retried(self, fault_service: FaultService) -> None:
        source = source_of(put(fault_service, "a", content(1000)))
        fault_service.script(Match("put_block_from_url"), [LostAnswer(), Status(503)])
        writer = blob_client(fault_service.blob_url("c", "b")).writer()
        writer.write_blocks([CopyRange(source, ByteRange(0, 1000))], concurrency=1)
        writer.commit()
        assert fault_service.get("c", "b") == content(1000)

    def test_nothing_is_committed_if_the_source_changed(self, fault_service: FaultService) -> None:
        source = source_of(put(fault_service, "a", content(1000)))
        put(fault_service, "a", content(1000, 1))
        writer = put(fault_service, "b", b"old").writer()
        with pytest.raises(FatalBlobIOWriteError, match="overwritten while it was being copied") as raised:
            writer.write_blocks([CopyRange(source, ByteRange(0, 1000))], concurrency=1)
        assert isinstance(raised.value.__cause__, BlobChangedError)
        with pytest.raises(FatalBlobIOWriteError):
            writer.commit()
        writer.abort()
        assert fault_service.get("c", "b") == b"old"

    def test_a_range_beyond_the_end_is_refused(self, fault_service: FaultService) -> None:
        source = source_of(put(fault_service, "a", content(1000)))
        writer = blob_client(fault_service.blob_url("c", "b")).writer()
        with pytest.raises(FatalBlobIOWriteError) as raised:
            writer.write_blocks([CopyRange(source, ByteRange(0, 1001))], concurrency=1)
        assert isinstance(raised.value.__cause__, AzureError)
