"""Without faults the service behaves like Azure Blob Storage: over plain HTTP, and with the SDK."""

from __future__ import annotations

import base64
import hashlib
import http.client
import multiprocessing
import os
import socket
import ssl
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar
from urllib.parse import quote
from xml.etree import ElementTree

import pytest
from azure.core import MatchConditions
from azure.core.credentials import AccessToken, AzureSasCredential
from azure.core.exceptions import (
    ClientAuthenticationError,
    HttpResponseError,
    ResourceExistsError,
    ResourceModifiedError,
    ResourceNotFoundError,
)
from azure.storage.blob import BlobBlock, BlobServiceClient, ContainerClient

from .faults import Match, Status, Together
from .fixtures import LoopbackTls
from .service import FaultService
from .store import crc64_header

TEN = b"0123456789"
ODD_NAMES = [
    "a b%2F?#ü//x/",
    "../up/./here",
    "plus+and%20percent",
    "tab\there",
    "line\nand\rreturn",
    "control\x01",
    "noncharacter\ufffe",
    "<&>\"'",
    "uni\U0001f600code",
    "x" * 1024,
]


@dataclass(frozen=True, slots=True)
class Reply:
    status: int
    headers: http.client.HTTPMessage
    body: bytes

    @property
    def error_code(self) -> str | None:
        return self.headers["x-ms-error-code"]


@contextmanager
def open_connection(service: FaultService) -> Iterator[http.client.HTTPConnection]:
    connection = http.client.HTTPConnection(service.host, service.port, timeout=240)
    try:
        yield connection
    finally:
        connection.close()


def ask(
    service: FaultService,
    method: str,
    path: str,
    headers: Mapping[str, str] | None = None,
    body: bytes | None = None,
) -> Reply:
    """Send one request on a separate connection. *path* starts at the container."""
    with open_connection(service) as connection:
        connection.request(method, f"/{service.account}/{path}", body, dict(headers or {}))
        answer = connection.getresponse()
        return Reply(answer.status, answer.headers, answer.read())


@pytest.fixture
def service(fault_service: FaultService) -> FaultService:
    fault_service.put("data", "ten", TEN)
    return fault_service


@pytest.fixture
def sdk(service: FaultService) -> Iterator[ContainerClient]:
    """The SDK client of the container `data`, without retries."""
    with ContainerClient(service.url, "data", credential=None, retry_total=0) as client:
        yield client


class TestReading:
    def test_a_whole_blob(self, service: FaultService) -> None:
        reply = ask(service, "GET", "data/ten")
        assert (reply.status, reply.body) == (200, TEN)
        assert reply.headers["Content-Length"] == "10"
        assert reply.headers["ETag"].startswith('"0x8D')
        assert reply.headers["Last-Modified"].endswith(" GMT")
        assert reply.headers["x-ms-blob-type"] == "BlockBlob"

    @pytest.mark.parametrize("header", ["Range", "x-ms-range"])
    @pytest.mark.parametrize(("asked", "first", "last"), [("2-5", 2, 5), ("9-9", 9, 9), ("4-", 4, 9), ("3-999", 3, 9)])
    def test_a_range(self, service: FaultService, header: str, asked: str, first: int, last: int) -> None:
        reply = ask(service, "GET", "data/ten", {header: f"bytes={asked}"})
        assert (reply.status, reply.body) == (206, TEN[first : last + 1])
        assert reply.headers["Content-Range"] == f"bytes {first}-{last}/10"

    def test_x_ms_range_wins_over_range(self, service: FaultService) -> None:
        reply = ask(service, "GET", "data/ten", {"Range": "bytes=0-0", "x-ms-range": "bytes=5-6"})
        assert reply.body == b"56"

    @pytest.mark.parametrize(("name", "size"), [("ten", 10), ("empty", 0)])
    def test_a_range_behind_the_end_is_416_and_reports_the_size(
        self, service: FaultService, name: str, size: int
    ) -> None:
        service.put("data", "empty", b"")
        reply = ask(service, "GET", f"data/{name}", {"x-ms-range": f"bytes={size}-"})
        assert (reply.status, reply.error_code) == (416, "InvalidRange")
        assert reply.headers["Content-Range"] == f"bytes */{size}"

    def test_suffix_ranges_are_refused(self, service: FaultService) -> None:
        assert ask(service, "GET", "data/ten", {"Range": "bytes=-3"}).status == 400

    def test_head_has_the_headers_of_get_and_no_body(self, service: FaultService) -> None:
        reply = ask(service, "HEAD", "data/ten")
        assert (reply.status, reply.body, reply.headers["Content-Length"]) == (200, b"", "10")

    @pytest.mark.parametrize("method", ["GET", "HEAD", "DELETE"])
    def test_what_is_not_there_is_404_with_a_code(self, service: FaultService, method: str) -> None:
        reply = ask(service, method, "data/none")
        assert (reply.status, reply.error_code) == (404, "BlobNotFound")
        if method == "HEAD":
            assert reply.body == b""
        else:
            assert ElementTree.fromstring(reply.body).findtext("Code") == "BlobNotFound"
        assert ask(service, method, "nowhere/ten").error_code == "ContainerNotFound"

    def test_checksums_of_ranges(self, service: FaultService) -> None:
        reply = ask(service, "GET", "data/ten", {"x-ms-range": "bytes=0-8", "x-ms-range-get-content-md5": "true"})
        assert base64.b64decode(reply.headers["Content-MD5"]) == hashlib.md5(TEN[:9]).digest()
        service.put("data", "check", b"123456789")
        reply = ask(service, "GET", "data/check", {"x-ms-range": "bytes=0-8", "x-ms-range-get-content-crc64": "true"})
        crc = int.from_bytes(base64.b64decode(reply.headers["x-ms-content-crc64"]), "little")
        assert crc == 0xAE8B14860A799888  # the check value of CRC-64/NVME

    @pytest.mark.parametrize(("size", "status"), [(4 << 20, 206), ((4 << 20) + 1, 400)])
    def test_checksums_only_of_ranges_up_to_4_mib(self, service: FaultService, size: int, status: int) -> None:
        service.put("data", "large", bytes(5 << 20))
        headers = {"x-ms-range": f"bytes=0-{size - 1}", "x-ms-range-get-content-md5": "true"}
        assert ask(service, "GET", "data/large", headers).status == status

    def test_conditions(self, service: FaultService) -> None:
        etag = ask(service, "HEAD", "data/ten").headers["ETag"]
        assert ask(service, "GET", "data/ten", {"If-Match": etag}).status == 200
        assert ask(service, "GET", "data/ten", {"If-None-Match": '"other"'}).status == 200
        assert ask(service, "GET", "data/ten", {"If-None-Match": etag}).status == 304
        service.put("data", "ten", TEN)
        reply = ask(service, "GET", "data/ten", {"If-Match": etag})
        assert (reply.status, reply.error_code) == (412, "ConditionNotMet")

    def test_dates_as_conditions(self, service: FaultService) -> None:
        modified = ask(service, "HEAD", "data/ten").headers["Last-Modified"]
        long_ago = "Mon, 01 Jan 2001 00:00:00 GMT"
        assert ask(service, "GET", "data/ten", {"If-Modified-Since": modified}).status == 304
        assert ask(service, "GET", "data/ten", {"If-Modified-Since": long_ago}).status == 200
        assert ask(service, "GET", "data/ten", {"If-Unmodified-Since": modified}).status == 200
        assert ask(service, "GET", "data/ten", {"If-Unmodified-Since": long_ago}).status == 412

    def test_snapshots(self, service: FaultService) -> None:
        stamp = service.snapshot("data", "ten")
        service.put("data", "ten", b"new")
        assert ask(service, "GET", f"data/ten?snapshot={quote(stamp)}").body == TEN
        assert ask(service, "GET", "data/ten").body == b"new"
        assert ask(service, "GET", "data/ten?snapshot=2001-01-01T00:00:00.0000000Z").status == 404
        assert ask(service, "DELETE", "data/ten").error_code == "SnapshotsPresent"
        assert ask(service, "DELETE", "data/ten", {"x-ms-delete-snapshots": "include"}).status == 202
        assert ask(service, "GET", f"data/ten?snapshot={quote(stamp)}").status == 404

    def test_versions(self) -> None:
        with FaultService(versioning=True) as service:
            service.put("data", "blob", b"old")
            old = ask(service, "HEAD", "data/blob").headers["x-ms-version-id"]
            service.put("data", "blob", b"new")
            assert ask(service, "GET", f"data/blob?versionid={quote(old)}").body == b"old"
            assert ask(service, "DELETE", "data/blob").status == 202
            assert ask(service, "GET", "data/blob").status == 404
            assert ask(service, "GET", f"data/blob?versionid={quote(old)}").body == b"old"
            assert ask(service, "GET", "data/blob?versionid=2001-01-01T00:00:00.0000000Z").status == 404

    def test_path_style_and_root_style_name_the_same_blob(self, service: FaultService) -> None:
        with open_connection(service) as connection:
            connection.request("GET", "/data/ten")
            assert connection.getresponse().read() == TEN

    @pytest.mark.parametrize("name", ODD_NAMES)
    def test_odd_names(self, service: FaultService, sdk: ContainerClient, name: str) -> None:
        """The same name is written directly, read over plain HTTP, and listed and read with the SDK."""
        service.put("odd", name, b"odd")
        path = service.blob_url("odd", name).removeprefix(f"{service.url}/")
        assert ask(service, "GET", path).body == b"odd"
        with ContainerClient(service.url, "odd", retry_total=0) as client:
            assert [blob.name for blob in client.list_blobs()] == [name]
            if ".." not in name:  # `requests` resolves dots before it sends, so the SDK cannot read that blob
                assert client.download_blob(name).readall() == b"odd"


class TestWriting:
    PUT: ClassVar = {"x-ms-blob-type": "BlockBlob"}

    def test_put_blob(self, service: FaultService) -> None:
        reply = ask(service, "PUT", "data/new", {**self.PUT, "Content-Type": "text/plain"}, b"text")
        assert reply.status == 201
        read = ask(service, "GET", "data/new")
        assert read.body == b"text" == service.get("data", "new")
        assert read.headers["ETag"] == reply.headers["ETag"]
        assert read.headers["Content-Type"] == "text/plain"
        assert base64.b64decode(read.headers["Content-MD5"]) == hashlib.md5(b"text").digest()

    def test_a_put_without_its_type_is_refused(self, service: FaultService) -> None:
        assert ask(service, "PUT", "data/new", body=b"text").status == 400
        assert not service.exists("data", "new")

    def test_a_chunked_body(self, service: FaultService) -> None:
        with open_connection(service) as connection:
            pieces = iter([b"one ", b"two ", b"three"])
            path = f"/{service.account}/data/new"
            connection.request("PUT", path, pieces, self.PUT, encode_chunked=True)
            assert connection.getresponse().status == 201
        assert service.get("data", "new") == b"one two three"

    def test_expect_100_continue(self, service: FaultService) -> None:
        with socket.create_connection((service.host, service.port), 60) as sock:
            head = "PUT /data/new HTTP/1.1\r\nx-ms-blob-type: BlockBlob\r\nContent-Length: 4\r\n"
            sock.sendall(f"{head}Expect: 100-continue\r\n\r\n".encode())
            assert sock.recv(1000) == b"HTTP/1.1 100 Continue\r\n\r\n"
            sock.sendall(b"text")
            assert sock.recv(1000).startswith(b"HTTP/1.1 201 ")
        assert service.get("data", "new") == b"text"

    def test_metadata_and_settings(self, service: FaultService) -> None:
        headers = {"x-ms-meta-colour": "red", "x-ms-blob-content-encoding": "gzip"}
        ask(service, "PUT", "data/new", {**self.PUT, **headers}, b"text")
        read = ask(service, "HEAD", "data/new")
        assert (read.headers["x-ms-meta-colour"], read.headers["Content-Encoding"]) == ("red", "gzip")

    def test_conditions(self, service: FaultService) -> None:
        def put(**conditions: str) -> tuple[int, str | None]:
            headers = {name.replace("_", "-"): value for name, value in conditions.items()}
            reply = ask(service, "PUT", "data/new", {**self.PUT, **headers}, b"text")
            return reply.status, reply.error_code

        assert put(if_match='"0x1"') == (412, "ConditionNotMet")
        assert put(if_none_match="*") == (201, None)
        assert put(if_none_match="*") == (409, "BlobAlreadyExists")
        assert put(if_match='"0x1"') == (412, "ConditionNotMet")
        assert put(if_match=ask(service, "HEAD", "data/new").headers["ETag"]) == (201, None)
        assert ask(service, "DELETE", "data/new", {"If-Match": '"0x1"'}).status == 412
        assert service.exists("data", "new")

    @pytest.mark.parametrize(
        ("header", "good", "code"),
        [
            ("Content-MD5", base64.b64encode(hashlib.md5(b"text").digest()).decode(), "Md5Mismatch"),
            ("x-ms-content-crc64", crc64_header(b"text"), "Crc64Mismatch"),
        ],
    )
    @pytest.mark.parametrize("query", ["", "?comp=block&blockid=QUE%3D"])
    def test_checksums_are_verified(self, service: FaultService, header: str, good: str, code: str, query: str) -> None:
        target = f"data/new{query}"
        wrong = ask(service, "PUT", target, {**self.PUT, header: good}, b"t3xt")
        assert (wrong.status, wrong.error_code) == (400, code)
        assert not service.exists("data", "new")
        assert not service.uncommitted("data", "new")
        assert ask(service, "PUT", target, {**self.PUT, header: good}, b"text").status == 201

    def test_blocks_are_nothing_until_they_are_committed(self, service: FaultService, sdk: ContainerClient) -> None:
        blob = sdk.get_blob_client("ten")
        blob.stage_block("a", b"AA")
        blob.stage_block("b", b"BB")
        assert list(service.uncommitted("data", "ten").values()) == [b"AA", b"BB"]
        assert service.get("data", "ten") == TEN
        blob.commit_block_list([BlobBlock("b"), BlobBlock("a"), BlobBlock("b")])
        assert service.get("data", "ten") == b"BBAABB"
        assert not service.uncommitted("data", "ten")

    def test_a_block_list_takes_from_where_it_says(self, service: FaultService) -> None:
        def stage(content: bytes) -> None:
            assert ask(service, "PUT", "data/new?comp=block&blockid=QUE%3D", body=content).status == 201

        def commit(place: str) -> Reply:
            body = f"<?xml version='1.0'?><BlockList><{place}>QUE=</{place}></BlockList>".encode()
            return ask(service, "PUT", "data/new?comp=blocklist", body=body)

        stage(b"first")
        assert commit("Committed").error_code == "InvalidBlockList"
        assert commit("Uncommitted").status == 201
        assert commit("Uncommitted").error_code == "InvalidBlockList"
        assert commit("Latest").status == 201  # so a commit whose response was lost can be sent again
        stage(b"second")
        assert commit("Committed").status == 201
        assert service.get("data", "new") == b"first"
        stage(b"second")
        assert commit("Latest").status == 201
        assert service.get("data", "new") == b"second"

    def test_block_ids_are_base64_of_one_length(self, service: FaultService) -> None:
        assert ask(service, "PUT", "data/new?comp=block&blockid=QUE%3D", body=b"x").status == 201
        longer = ask(service, "PUT", "data/new?comp=block&blockid=QUFBQQ%3D%3D", body=b"x")
        assert longer.error_code == "InvalidBlobOrBlock"
        assert ask(service, "PUT", "data/new?comp=block&blockid=!!", body=b"x").status == 400

    def test_put_blob_drops_staged_blocks(self, service: FaultService) -> None:
        ask(service, "PUT", "data/new?comp=block&blockid=QUE%3D", body=b"x")
        ask(service, "PUT", "data/new", self.PUT, b"whole")
        assert not service.uncommitted("data", "new")

    def test_conditions_hold_for_commits(self, service: FaultService, sdk: ContainerClient) -> None:
        blob = sdk.get_blob_client("ten")
        blob.stage_block("a", b"AA")
        with pytest.raises(ResourceExistsError):
            blob.commit_block_list([BlobBlock("a")], match_condition=MatchConditions.IfMissing)
        with pytest.raises(ResourceModifiedError):
            blob.commit_block_list([BlobBlock("a")], match_condition=MatchConditions.IfNotModified, etag='"0x1"')
        assert service.get("data", "ten") == TEN


class TestSdkRoundTrip:
    def test_upload_download_delete(self, service: FaultService, sdk: ContainerClient) -> None:
        blob = sdk.upload_blob("dir/new", b"some text", metadata={"colour": "red"})
        assert service.get("data", "dir/new") == b"some text"
        assert sdk.download_blob("dir/new").readall() == b"some text"
        assert sdk.download_blob("dir/new", offset=5, length=4).readall() == b"text"
        properties = blob.get_blob_properties()
        assert (properties.size, properties.metadata) == (9, {"colour": "red"})
        with pytest.raises(ResourceExistsError):
            sdk.upload_blob("dir/new", b"other")
        sdk.upload_blob("dir/new", b"other", overwrite=True)
        blob.delete_blob()
        with pytest.raises(ResourceNotFoundError):
            sdk.download_blob("dir/new")

    def test_a_large_blob_in_blocks_and_parts(self, service: FaultService) -> None:
        content = os.urandom(1 << 20) * 3
        with ContainerClient(
            service.url,
            "data",
            retry_total=0,
            max_single_put_size=1 << 18,
            max_block_size=1 << 18,
            max_single_get_size=1 << 18,
            max_chunk_get_size=1 << 18,
        ) as client:
            client.upload_blob("large", content, max_concurrency=4)
            assert service.get("data", "large") == content
            assert len(service.requests("put_block")) == 12
            assert client.download_blob("large", max_concurrency=4).readall() == content
            assert len(service.requests("get_blob")) == 12

    def test_checked_transfers(self, sdk: ContainerClient) -> None:
        sdk.upload_blob("new", b"some text", validate_content=True)
        assert sdk.download_blob("new", validate_content=True).readall() == b"some text"

    def test_an_empty_blob(self, sdk: ContainerClient) -> None:
        sdk.upload_blob("empty", b"")
        assert sdk.download_blob("empty").readall() == b""

    def test_copy(self, service: FaultService, sdk: ContainerClient) -> None:
        target = sdk.get_blob_client("copy of ten")
        assert target.start_copy_from_url(service.blob_url("data", "ten"))["copy_status"] == "success"
        assert service.get("data", "copy of ten") == TEN
        assert target.get_blob_properties().copy.status == "success"
        with pytest.raises(ResourceNotFoundError):
            target.start_copy_from_url(service.blob_url("data", "none"))

    def test_a_copy_of_a_snapshot(self, service: FaultService, sdk: ContainerClient) -> None:
        stamp = str(sdk.get_blob_client("ten").create_snapshot()["snapshot"])
        service.put("data", "ten", b"new")
        sdk.get_blob_client("copy").start_copy_from_url(service.blob_url("data", "ten", snapshot=stamp))
        assert service.get("data", "copy") == TEN

    def test_metadata_of_a_blob_that_is_there(self, service: FaultService, sdk: ContainerClient) -> None:
        blob = sdk.get_blob_client("ten")
        blob.stage_block("a", b"AA")
        before = blob.get_blob_properties().etag
        assert blob.set_blob_metadata({"colour": "red"})["etag"] != before
        assert blob.get_blob_properties().metadata == {"colour": "red"}
        assert service.get("data", "ten") == TEN
        assert [len(blocks) for blocks in blob.get_block_list("all")] == [0, 1]

    def test_containers_and_the_account(self, service: FaultService) -> None:
        with BlobServiceClient(service.url, retry_total=0) as client:
            container = client.create_container("fresh")
            with pytest.raises(ResourceExistsError):
                client.create_container("fresh")
            assert [item.name for item in client.list_containers()] == ["data", "fresh"]
            assert container.exists()
            container.delete_container()
            assert not container.exists()
            assert not client.get_account_information()["is_hns_enabled"]


class TestListing:
    @pytest.fixture
    def names(self, service: FaultService) -> list[str]:
        names = ["a/1", "a/2", "a/b/3", "a0", "b", "ten"]
        for name in names:
            service.put("data", name, name.encode())
        return names

    def test_all_of_it_in_order(self, sdk: ContainerClient, names: list[str]) -> None:
        assert [(blob.name, blob.size) for blob in sdk.list_blobs()] == [(name, len(name)) for name in names]

    def test_page_by_page(self, service: FaultService, sdk: ContainerClient, names: list[str]) -> None:
        for size in range(1, len(names) + 2):
            service.reset_log()
            assert [blob.name for blob in sdk.list_blobs(results_per_page=size)] == names
            assert len(service.requests("list_blobs")) == -(-len(names) // size)

    def test_a_blob_deleted_between_pages_does_not_hide_others(
        self, service: FaultService, sdk: ContainerClient, names: list[str]
    ) -> None:
        pages = sdk.list_blobs(results_per_page=2).by_page()
        found = [blob.name for blob in next(pages)]
        service.delete("data", names[2])
        found += [blob.name for page in pages for blob in page]
        assert found == names[:2] + names[3:]

    def test_prefix(self, sdk: ContainerClient, names: list[str]) -> None:
        assert [blob.name for blob in sdk.list_blobs(name_starts_with="a/")] == names[:3]
        assert list(sdk.list_blobs(name_starts_with="zzz")) == []

    @pytest.mark.parametrize("size", [1, 2, 5000])
    def test_delimiter(self, sdk: ContainerClient, names: list[str], size: int) -> None:
        # The SDK returns the prefixes of a page before its blobs.
        top = [item.name for item in sdk.walk_blobs(results_per_page=size)]
        assert sorted(top) == ["a/", "a0", "b", "ten"]
        below = [item.name for item in sdk.walk_blobs("a/", results_per_page=size)]
        assert sorted(below) == ["a/1", "a/2", "a/b/"]

    def test_prefixes_and_blobs_come_in_one_order(self, service: FaultService, names: list[str]) -> None:
        page = ElementTree.fromstring(ask(service, "GET", "data?restype=container&comp=list&prefix=a&delimiter=/").body)
        assert [item.findtext("Name") for item in page.findall("Blobs/*")] == ["a/", "a0"]
        page = ElementTree.fromstring(
            ask(service, "GET", "data?restype=container&comp=list&prefix=a/&delimiter=/").body
        )
        assert [item.tag for item in page.findall("Blobs/*")] == ["Blob", "Blob", "BlobPrefix"]

    def test_etags_are_quoted_in_headers_and_bare_in_listings(self, service: FaultService) -> None:
        page = ElementTree.fromstring(ask(service, "GET", "data?restype=container&comp=list").body)
        etag = page.findtext("Blobs/Blob/Properties/Etag")
        assert f'"{etag}"' == ask(service, "HEAD", "data/ten").headers["ETag"]

    def test_names_that_xml_cannot_hold_are_encoded(self, service: FaultService) -> None:
        service.put("odd", "control\x01/ü", b"")
        page = ElementTree.fromstring(ask(service, "GET", "odd?restype=container&comp=list").body)
        name = page.find("Blobs/Blob/Name")
        assert name is not None
        assert (name.get("Encoded"), name.text) == ("true", "control%01/%C3%BC")

    def test_metadata_comes_when_it_is_asked_for(self, service: FaultService, sdk: ContainerClient) -> None:
        service.put("data", "dir", b"", metadata={"hdi_isfolder": "true"})
        folder, ten = sdk.list_blobs(include=["metadata"])
        assert (folder.metadata, ten.metadata or {}) == ({"hdi_isfolder": "true"}, {})
        assert b"hdi_isfolder" not in ask(service, "GET", "data?restype=container&comp=list").body

    def test_hierarchical_accounts_list_their_directories(self) -> None:
        with FaultService(hierarchical=True) as service:
            service.put("data", "a/b/file", b"x")
            with ContainerClient(service.url, "data", retry_total=0) as client:
                folders = [blob.name for blob in client.list_blobs(include=["metadata"]) if blob.metadata]
            assert folders == ["a", "a/b"]
            assert service.names("data") == ["a", "a/b", "a/b/file"]
            page = ElementTree.fromstring(ask(service, "GET", "data?restype=container&comp=list").body)
            kinds = [blob.findtext("Properties/ResourceType") for blob in page.iter("Blob")]
            assert kinds == ["directory", "directory", "file"]

    @pytest.mark.parametrize("query", ["maxresults=x", "maxresults=0", "marker=nonsense"])
    def test_bad_parameters_are_refused(self, service: FaultService, query: str) -> None:
        assert ask(service, "GET", f"data?restype=container&comp=list&{query}").status == 400


class TestCredentials:
    class Token:
        """A credential whose token a test can change."""

        def __init__(self, token: str) -> None:
            self.token = token

        def get_token(self, *scopes: str, **_: object) -> AccessToken:
            return AccessToken(self.token, int(time.time()) + 3600)

    def test_tokens(self, service: FaultService) -> None:
        service.require_token("good", "better")
        for header, status in [("Bearer good", 200), ("Bearer better", 200), ("Bearer bad", 401)]:
            assert ask(service, "GET", "data/ten", {"Authorization": header}).status == status
        reply = ask(service, "GET", "data/ten")
        assert (reply.status, reply.error_code) == (401, "NoAuthenticationInformation")
        assert reply.headers["WWW-Authenticate"].startswith("Bearer ")
        service.require_token("newest")
        assert ask(service, "GET", "data/ten", {"Authorization": "Bearer good"}).status == 401

    def test_the_sdk_with_a_token_over_https(self, https_fault_service: FaultService) -> None:
        service = https_fault_service
        service.put("data", "ten", TEN)
        service.require_token("good")
        for token in ("good", "bad"):
            with ContainerClient(service.url, "data", credential=self.Token(token), retry_total=0) as client:
                if token == "good":
                    assert client.download_blob("ten").readall() == TEN
                else:
                    with pytest.raises(ClientAuthenticationError):
                        client.download_blob("ten")

    def test_a_signature(self, service: FaultService) -> None:
        service.require_sas("a+b/c=")
        assert ask(service, "GET", "data/ten?sig=a%2Bb%2Fc%3D").body == TEN
        assert ask(service, "GET", "data/ten").error_code == "AuthenticationFailed"
        assert ask(service, "GET", "data/ten?sig=other").status == 403
        # As in the service, an unencoded plus in a query is a space.
        assert ask(service, "GET", "data/ten?sig=a+b%2Fc%3D").status == 403

    def test_the_sdk_with_a_signature(self, service: FaultService) -> None:
        service.require_sas("a+b/c=")
        credential = AzureSasCredential("sv=2025-05-05&sp=rl&sig=a%2Bb%2Fc%3D")
        with ContainerClient(service.url, "data", credential=credential, retry_total=0) as client:
            assert [blob.name for blob in client.list_blobs()] == ["ten"]
            target = client.get_blob_client("copy")
            with pytest.raises(HttpResponseError) as refused:
                target.start_copy_from_url(service.blob_url("data", "ten"))
            assert refused.value.status_code == 403
            target.start_copy_from_url(service.blob_url("data", "ten", sig="a+b/c="))
        service.allow_anonymous()
        assert ask(service, "GET", "data/copy").body == TEN


class TestLog:
    def test_it_has_every_request(self, service: FaultService, sdk: ContainerClient) -> None:
        sdk.upload_blob("dir/a b", b"1234")
        assert ask(service, "GET", "data/ten", {"x-ms-range": "bytes=2-5", "X-Odd": "1"}).body == b"2345"
        assert ask(service, "GET", "data/none").status == 404
        service.wait_until_idle()
        put, get, missing = service.log
        assert (put.operation, put.container, put.blob) == ("put_blob", "data", "dir/a b")
        assert (put.method, put.path) == ("PUT", "/devstoreaccount1/data/dir/a%20b")
        assert (put.status, put.body_length, put.sent) == (201, 4, 0)
        assert (get.status, get.sent, get.range, get.headers["x-odd"]) == (206, 4, (2, 6), "1")
        assert (missing.status, missing.range) == (404, None)
        assert [entry.number for entry in service.log] == [1, 2, 3]
        assert all(entry.finished is not None and entry.finished >= entry.time for entry in service.log)

    def test_it_can_be_searched_and_reset(self, service: FaultService) -> None:
        for name in ("ten", "none", "ten"):
            ask(service, "GET", f"data/{name}")
        ask(service, "HEAD", "data/ten")
        assert len(service.requests()) == 4
        assert len(service.requests("get_blob")) == 3
        assert len(service.requests(method="HEAD")) == 1
        assert len(service.requests(path="/ten$", status=200)) == 3
        service.reset_log()
        assert service.requests() == []

    def test_it_can_be_turned_off(self, service: FaultService) -> None:
        service.keeps_log = False
        rule = service.script("get_blob", [Status(500)])
        assert [ask(service, "GET", "data/ten").status for _ in range(2)] == [500, 200]
        assert (service.log, rule.seen) == ([], 2)

    def test_ids_come_back(self, service: FaultService) -> None:
        replies = [ask(service, "GET", f"data/{name}", {"x-ms-client-request-id": "mine"}) for name in ("ten", "none")]
        assert [reply.headers["x-ms-client-request-id"] for reply in replies] == ["mine", "mine"]
        assert len({reply.headers["x-ms-request-id"] for reply in replies}) == 2

    def test_connections_are_kept_alive_and_told_apart(self, service: FaultService) -> None:
        with open_connection(service) as connection:
            for _ in range(3):
                connection.request("GET", f"/{service.account}/data/ten")
                assert connection.getresponse().read() == TEN
            assert service.open_connections == service.connections_opened == 1
        ask(service, "GET", "data/ten")
        assert [entry.connection for entry in service.log] == [1, 1, 1, 2]

    def test_connection_close_is_honoured(self, service: FaultService) -> None:
        with socket.create_connection((service.host, service.port), 60) as sock:
            sock.sendall(b"GET /data/ten HTTP/1.1\r\nConnection: close\r\n\r\n")
            answer = b"".join(iter(lambda: sock.recv(1000), b""))
        assert answer.endswith(TEN)
        assert b"\r\nConnection: close\r\n" in answer


class TestLife:
    def test_many_connections_at_once(self, service: FaultService) -> None:
        """All are served at the same time, and closing leaves neither threads nor connections."""
        barrier = threading.Barrier(96)
        bodies: list[bytes] = []

        def read() -> None:
            with open_connection(service) as connection:
                connection.connect()
                barrier.wait(60)
                for _ in range(10):
                    connection.request("GET", f"/{service.account}/data/ten")
                    bodies.append(connection.getresponse().read())

        threads = [threading.Thread(target=read) for _ in range(96)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(240)
        assert bodies == [TEN] * 960
        assert service.connections_opened == 96
        service.close()
        assert service.open_connections == 0
        assert not [thread for thread in threading.enumerate() if service.address in thread.name]

    def test_latency_passes_for_many_at_once(self, service: FaultService) -> None:
        service.latency = 0.3
        service.script("get_blob", [Together(10)], repeat=True)
        start = time.monotonic()
        threads = [threading.Thread(target=ask, args=(service, "GET", "data/ten")) for _ in range(10)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(240)
        assert time.monotonic() - start >= 0.3
        assert service.peak_active == 10
        service.wait_until_idle()

    def test_close_does_not_wait_for_clients(self, service: FaultService) -> None:
        """Idle, slow and incomplete requests end at once, and their sockets are closed."""
        service.latency = 60.0
        socks = [socket.create_connection((service.host, service.port), 60) for _ in range(3)]
        try:
            socks[1].sendall(b"GET /data/ten HTTP/1.1\r\n\r\n")
            socks[2].sendall(b"PUT /data/new HTTP/1.1\r\nContent-Length: 100\r\n\r\nfew")
            service.wait_for_requests(2)
            start = time.monotonic()
            service.close()
            assert time.monotonic() - start < 30
            assert [sock.recv(1) for sock in socks] == [b""] * 3
        finally:
            for sock in socks:
                sock.close()
        assert service.open_connections == 0
        service.close()

    def test_a_client_that_gives_up_frees_its_connection(self, service: FaultService) -> None:
        service.latency = 60.0
        with socket.create_connection((service.host, service.port), 60) as sock:
            sock.sendall(b"GET /data/ten HTTP/1.1\r\n\r\n")
            service.wait_for_requests(1)
        service.wait_until_idle()

    def test_idle_connections_can_be_dropped(self, service: FaultService) -> None:
        with open_connection(service) as connection:
            connection.request("GET", f"/{service.account}/data/ten")
            assert connection.getresponse().read() == TEN
            while not service.drop_idle_connections():
                time.sleep(0.001)  # the response can arrive before its thread waits for the next request
            connection.sock.settimeout(60)
            assert connection.sock.recv(1) == b""

    def test_refused_and_back_on_the_same_port(self, service: FaultService) -> None:
        with open_connection(service) as connection:
            connection.request("GET", f"/{service.account}/data/ten")
            connection.getresponse().read()
            with service.refusing_connections():
                with pytest.raises(ConnectionRefusedError):
                    ask(service, "GET", "data/ten")
                connection.sock.settimeout(60)
                with pytest.raises(ConnectionResetError):
                    connection.sock.recv(1)
        assert ask(service, "GET", "data/ten").body == TEN

    def test_refused_and_back_while_a_forked_child_has_the_listener(self, service: FaultService) -> None:
        """A child that was just forked has not closed its copies yet; the service refuses and accepts all the same."""
        copy = service._listener.dup()
        try:
            for _ in range(2):
                with service.refusing_connections(), pytest.raises(ConnectionRefusedError):
                    ask(service, "GET", "data/ten")
                assert ask(service, "GET", "data/ten").body == TEN
        finally:
            copy.close()

    def test_a_forked_child_does_not_keep_connections_open(self, service: FaultService) -> None:
        """A client sees the end of its connection although a child has copies of the sockets."""
        with open_connection(service) as connection:
            connection.request("GET", f"/{service.account}/data/ten")
            connection.getresponse().read()
            child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,))
            child.start()
            try:
                service.drop_connections(reset=True)
                connection.sock.settimeout(60)
                with pytest.raises(ConnectionResetError):
                    connection.sock.recv(1)
            finally:
                child.terminate()
                child.join()

    def test_https(self, https_fault_service: FaultService, loopback_tls: LoopbackTls) -> None:
        service = https_fault_service
        service.put("data", "ten", TEN)
        context = ssl.create_default_context(cafile=str(loopback_tls.ca_path))
        connection = http.client.HTTPSConnection(service.host, service.port, context=context, timeout=240)
        connection.request("GET", "/data/ten")
        assert connection.getresponse().read() == TEN
        connection.close()
        with pytest.raises(ssl.SSLCertVerificationError):
            http.client.HTTPSConnection(service.host, service.port, timeout=240).connect()

    def test_close_does_not_wait_for_a_handshake(self, https_fault_service: FaultService) -> None:
        service = https_fault_service
        with socket.create_connection((service.host, service.port), 60) as sock:
            while not service.open_connections:
                time.sleep(0.001)
            start = time.monotonic()
            service.close()
            assert time.monotonic() - start < 30
            assert sock.recv(1) == b""


class TestScript:
    def test_rules_match_by_operation_method_and_path(self, service: FaultService) -> None:
        service.put("data", "other", TEN)
        by_operation = service.script("head", [Status(500)])
        by_method = service.script(Match(method="DELETE"), [Status(501)])
        by_path = service.script(Match("get_blob", path="/oth"), [Status(502)])
        assert ask(service, "GET", "data/ten").status == 200
        assert ask(service, "GET", "data/other").status == 502
        assert ask(service, "GET", "data/other").status == 200
        assert ask(service, "DELETE", "data/ten").status == 501
        assert service.exists("data", "ten")
        assert service.unused_faults() == [by_operation]
        assert ask(service, "HEAD", "data/ten").status == 500
        assert service.unused_faults() == []
        assert (by_operation.seen, by_method.fired, by_path.seen) == (1, 1, 2)

    def test_nth_and_every(self, service: FaultService) -> None:
        service.script(Match("get_blob", nth=2, every=3), [Status(500), Status(503)])
        statuses = [ask(service, "GET", "data/ten").status for _ in range(8)]
        assert statuses == [200, 500, 200, 200, 503, 200, 200, 200]

    def test_where(self, service: FaultService) -> None:
        """Parts of one blob differ only in their ranges, and arrive in any order."""
        service.script(Match("get_blob", where=lambda request: request.range == (4, 8)), [Status(500)])
        parts = ["bytes=0-3", "bytes=8-9", "bytes=4-7", "bytes=4-7"]
        assert [ask(service, "GET", "data/ten", {"Range": part}).status for part in parts] == [206, 206, 500, 206]

    def test_repeat_and_cancel(self, service: FaultService) -> None:
        rule = service.script("get_blob", [Status(500), Status(503)], repeat=True)
        assert [ask(service, "GET", "data/ten").status for _ in range(5)] == [500, 503, 500, 503, 500]
        rule.cancel()
        assert ask(service, "GET", "data/ten").status == 200
        service.script("get_blob", [Status(500)], repeat=True)
        service.clear_script()
        assert ask(service, "GET", "data/ten").status == 200

    def test_two_rules_take_turns(self, service: FaultService) -> None:
        service.script("get_blob", [Status(500)])
        service.script(Match(path="ten"), [Status(503)])
        assert [ask(service, "GET", "data/ten").status for _ in range(3)] == [500, 503, 200]

    def test_a_misspelt_operation_is_refused(self, service: FaultService) -> None:
        with pytest.raises(ValueError, match="get_blbo"):
            service.script("get_blbo", [Status(500)])
