"""Clients for blobs and containers: cheap, lazy, and usable in every process."""

from __future__ import annotations

import pickle
from multiprocessing.reduction import ForkingPickler
from typing import Any

import pytest
from azure.core.credentials import AccessToken
from azure.core.exceptions import (
    HttpResponseError,
    ResourceExistsError,
    ResourceModifiedError,
    ResourceNotFoundError,
    ServiceResponseError,
)

from azstoragetorch._blob.client import BlobClient, ClientFactory, ContainerClient
from azstoragetorch.exceptions import FatalBlobIOWriteError
from tests.azurite.container import Container
from tests.faults import Fault, FaultService, LostAnswer, Match, MissingHeader, Status, WrongHeader
from tests.support import QUICK, blob_client, container_client, content

NAME = "a b%2F?#ü//x/"


class TestOnAzurite:
    """The SDK reads what we write, and the reverse."""

    @pytest.mark.parametrize("size", [0, 1, 65535, 65536, 65537, 400_000])
    @pytest.mark.parametrize("name", ["blob", NAME])
    def test_both_ways(self, container: Container, name: str, size: int) -> None:
        blob = blob_client(container.blob_sas_url(name))
        blob.put(content(size))
        assert container.get(name) == content(size)
        assert container.names() == [name]
        container.put(name, content(size, 1))
        data, version = blob.read()
        assert (data, version.size) == (content(size, 1), size)
        assert [page.names for page in container_client(container.sas_url).pages()] == [[name]]
        properties = container.client.get_blob_client(name).get_blob_properties()
        assert blob.version() == type(version)(size, properties.etag)

    def test_a_snapshot(self, container: Container) -> None:
        url = container.put("b", b"old")
        stamp = container.client.get_blob_client("b").create_snapshot()["snapshot"]
        container.put("b", b"new")
        assert blob_client(f"{url}&snapshot={stamp}").read()[0] == b"old"
        assert blob_client(url).read()[0] == b"new"

    def test_deleting(self, container: Container) -> None:
        blob = blob_client(container.put("b", b"data"))
        assert blob.delete()
        assert container.names() == []
        assert not blob.delete()
        assert blob.version() is None

    def test_deleting_one_version_only(self, container: Container) -> None:
        blob = blob_client(container.put("b", b"old"))
        version = blob.version()
        assert version is not None
        container.put("b", b"new")
        with pytest.raises(ResourceModifiedError):
            blob.delete(etag=version.etag)
        assert container.get("b") == b"new"

    def test_creating_only(self, container: Container) -> None:
        blob = blob_client(container.blob_sas_url("b"))
        blob.put(b"first", create_only=True)
        with pytest.raises(ResourceExistsError):
            blob.put(b"second", create_only=True)
        assert container.get("b") == b"first"

    def test_a_container_hands_out_its_blobs(self, container: Container) -> None:
        client = container_client(container.sas_url)
        client.blob(NAME).put(b"data")
        assert container.get(NAME) == b"data"
        assert str(client.blob(NAME).url).endswith("/a%20b%252F%3F%23%C3%BC//x/")

    def test_validated_content(self, container: Container) -> None:
        """The service sends the MD5 of each range, and checks that of each block."""
        from dataclasses import replace

        transfer = replace(QUICK, validate_content=True, part_size=1 << 20)
        blob = blob_client(container.blob_sas_url("b"), transfer)
        blob.put(content(400_000))
        blob.put(content(1000))
        container.put("b", content(3_000_000))
        assert blob.read()[0] == content(3_000_000)

    def test_one_that_is_not_there(self, container: Container) -> None:
        with pytest.raises(ResourceNotFoundError, match=r"GET .*/nowhere: 404 .*BlobNotFound"):
            blob_client(container.blob_sas_url("nowhere")).read()
        gone = container.blob_sas_url("b").replace(container.name, "gone")
        with pytest.raises(ResourceNotFoundError, match="ContainerNotFound"):
            blob_client(gone).read()
        with pytest.raises(FatalBlobIOWriteError, match="ContainerNotFound"):
            blob_client(gone).put(b"x")


class TestFaults:
    @pytest.fixture
    def service(self, fault_service: FaultService) -> FaultService:
        fault_service.put("c", "b", b"data")
        return fault_service

    @pytest.mark.parametrize("fault", [Status(503), Status(429, retry_after=0.05), Status(500)], ids=repr)
    def test_properties_and_deletion_are_tried_again(self, service: FaultService, fault: Any) -> None:
        service.script("head", [fault])
        service.script("delete", [fault])
        blob = blob_client(service.blob_url("c", "b"))
        version = blob.version()
        assert version is not None
        assert version.size == 4
        assert blob.delete()
        assert service.names("c") == []
        assert service.unused_faults() == []

    @pytest.mark.parametrize(
        "fault",
        [MissingHeader("ETag"), MissingHeader("Content-Length"), WrongHeader("Content-Length", "9" * 5000)],
        ids=["no ETag", "no length", "a length of 5000 digits"],
    )
    def test_properties_that_are_not_all_there_are_asked_for_again(self, service: FaultService, fault: Fault) -> None:
        blob = blob_client(service.blob_url("c", "b"))
        service.script("head", [fault])
        version = blob.version()
        assert version is not None
        assert version.size == 4
        assert len(service.log) == 2
        service.script("head", [fault], repeat=True)
        with pytest.raises(ServiceResponseError, match=r"HEAD .*/c/b: the service sent no valid length and ETag"):
            blob.version()

    def test_a_deletion_whose_answer_is_lost_has_happened(self, service: FaultService) -> None:
        service.script("delete", [LostAnswer()])
        blob_client(service.blob_url("c", "b")).delete()
        assert service.names("c") == []

    @pytest.mark.parametrize("operation", ["head", "delete"])
    def test_refusals_are_errors_at_once(self, service: FaultService, operation: str) -> None:
        service.script(operation, [Status(403)], repeat=True)
        blob = blob_client(service.blob_url("c", "b"))
        with pytest.raises(HttpResponseError, match=r"/c/b: 403"):
            blob.version() if operation == "head" else blob.delete()
        assert len(service.log) == 1
        assert service.names("c") == ["b"]

    def test_an_error_without_a_body_is_reported_by_its_headers(self, service: FaultService) -> None:
        """Responses to HEAD have no body."""
        service.script(Match("head"), [Status(403, "AuthorizationPermissionMismatch")], repeat=True)
        with pytest.raises(HttpResponseError, match="AuthorizationPermissionMismatch"):
            blob_client(service.blob_url("c", "b")).version()


class TestLazy:
    def test_making_one_costs_nothing(self, fault_service: FaultService) -> None:
        blob = container_client(fault_service.container_url("c")).blob("b")
        assert (repr(blob), fault_service.connections_opened) == (
            f"BlobClient('{fault_service.blob_url('c', 'b')}')",
            0,
        )

    @pytest.mark.parametrize("dump", [pickle.dumps, ForkingPickler.dumps])
    def test_it_pickles_without_anything_live(self, fault_service: FaultService, dump: Any) -> None:
        fault_service.put("c", "b", b"data")
        container = container_client(fault_service.container_url("c"))
        blob = container.blob("b")
        blob.read()
        for client in (blob, container):
            copy: BlobClient | ContainerClient = pickle.loads(dump(client))
            assert (copy.url, copy.config) == (client.url, client.config)
            assert copy._services.peek() is None
        assert pickle.loads(dump(blob)).read()[0] == b"data"
        assert pickle.loads(dump(container)).blob("b").read()[0] == b"data"


def test_tags_with_an_unusable_token() -> None:
    """The error is that of the token, not that a response cannot be read."""

    class Spaced:
        def get_token(self, *_scopes: str, **_options: Any) -> AccessToken:
            return AccessToken("a b", 2**33)

    blob = ClientFactory(Spaced(), QUICK).blob("https://account.blob.core.windows.net/c/b")
    with pytest.raises(ValueError, match="token with a space"):
        blob.tags()
