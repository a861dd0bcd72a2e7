"""Listing: every blob once, in order, with any names and any pages."""

from __future__ import annotations

import pickle
import threading
import urllib.request
from dataclasses import replace
from email.utils import format_datetime
from urllib.parse import quote
from xml.sax.saxutils import escape

import pytest
from azure.core.exceptions import (
    ClientAuthenticationError,
    HttpResponseError,
    ResourceNotFoundError,
    ServiceResponseError,
)
from hypothesis import given
from hypothesis import strategies as st

from azstoragetorch._blob.listing import Page, _match_page, _next_marker, _parse_page, list_pages, parse_page
from azstoragetorch._blob.url import parse_container_url
from azstoragetorch._engine.threads import engine_for
from tests.azurite.container import Container
from tests.faults import (
    Chunked,
    EmptyPageWithMarker,
    Fault,
    FaultService,
    GarbageStatusLine,
    Hangup,
    MalformedXml,
    Match,
    RepeatedMarker,
    Reset,
    Stall,
    Status,
    Torn,
    TornReset,
    WrongLength,
)
from tests.support import IMPATIENT, PERSISTENT, QUICK, container_client, taking

CONTAINER = parse_container_url("https://account.blob.core.windows.net/c")
NAMES = [f"name-{number:03d}" for number in range(25)]


@pytest.fixture
def service(fault_service: FaultService) -> FaultService:
    for name in NAMES:
        fault_service.put("c", name, name.encode())
    return fault_service


def pages(service: FaultService, size: int = 10, transfer: object = QUICK, **options: str) -> list[Page]:
    client = container_client(service.container_url("c"), transfer)  # type: ignore[arg-type]
    return list(list_pages(client.service, client.url, page_size=size, **options))  # type: ignore[arg-type]


def names(found: list[Page]) -> list[str]:
    return [name for page in found for name in page.names]


class TestPages:
    @pytest.mark.parametrize("size", [1, 10, 24, 25, 26])
    def test_every_blob_comes_once_in_order(self, service: FaultService, size: int) -> None:
        found = pages(service, size)
        assert names(found) == NAMES
        assert len(found) == -(-25 // size)
        assert len(service.log) == len(found)

    def test_with_size_and_etag_as_a_read_sees_them(self, service: FaultService) -> None:
        (page,) = pages(service, 100)
        assert page.sizes == [8] * 25
        assert page.etags == [service.store.find("c", name).etag for name in NAMES]  # type: ignore[union-attr]

    def test_the_date_of_the_last_change_comes_where_it_is_asked_for(self, container: Container) -> None:
        """In the format of the service, by both parsers."""
        container.put("b", b"x")
        client = container_client(container.sas_url)
        modified = container.client.get_blob_client("b").get_blob_properties().last_modified
        expected = [format_datetime(modified, usegmt=True)]
        assert [page.modified for page in client.pages()] == [[]]
        assert [page.modified for page in client.pages(with_modified=True)] == [expected]
        container.client.upload_blob("d", b"", metadata={"hdi_isfolder": "true"})
        assert [page.modified for page in client.pages(with_modified=True)] == [expected]

    def test_the_next_page_is_fetched_while_one_is_read(self, service: FaultService) -> None:
        client = container_client(service.container_url("c"))
        iterator = list_pages(client.service, client.url, page_size=10)
        assert service.log == []
        next(iterator)
        service.wait_for_requests(2)
        assert len(service.log) == 2

    def test_leaving_early_ends_what_is_in_progress(self, service: FaultService) -> None:
        client = container_client(service.container_url("c"), replace(QUICK, read_timeout=240))
        service.script(Match("list_blobs", nth=2), [Stall(60)])
        iterator = list_pages(client.service, client.url, page_size=10)
        next(iterator)
        service.wait_for_requests(2)
        with taking():
            iterator.close()  # type: ignore[attr-defined]
            service.wait_until_idle()
        assert len(service.log) == 2

    def test_it_needs_no_thread_of_its_own(self, service: FaultService) -> None:
        """With every thread of the engine busy, the listing continues."""
        transfer = replace(QUICK, max_connections=1, memory_limit=3 << 20)
        gate = threading.Event()
        engine_for(transfer).submit(lambda: gate.wait(60) and None)
        try:
            with taking():
                assert names(pages(service, 10, transfer)) == NAMES
        finally:
            gate.set()

    def test_an_empty_container(self, fault_service: FaultService) -> None:
        fault_service.create_container("c")
        assert pages(fault_service) == [Page([], [], [], [], "")]

    def test_a_prefix_and_a_delimiter(self, service: FaultService) -> None:
        for name in ("a/1", "a/b/2", "a/b/3", "a&b/4"):
            service.put("c", name, b"")
        assert names(pages(service, prefix="a/")) == ["a/1", "a/b/2", "a/b/3"]
        (page,) = pages(service, prefix="a/", delimiter="/")
        assert (page.names, page.prefixes) == (["a/1"], ["a/b/"])
        (page,) = pages(service, 100, delimiter="/")
        assert page.prefixes == ["a&b/", "a/"]
        assert page.names == NAMES

    @pytest.mark.parametrize("nth", [1, 2, 3])
    def test_empty_pages_hide_nothing(self, service: FaultService, nth: int) -> None:
        service.script(Match("list_blobs", nth=nth), [EmptyPageWithMarker()] * 2)
        assert names(pages(service)) == NAMES

    @pytest.mark.parametrize("nth", [1, 2, 3])
    @pytest.mark.parametrize("repeat", [False, True])
    def test_a_repeated_page_is_an_error_and_no_endless_listing(
        self, service: FaultService, nth: int, repeat: bool
    ) -> None:
        service.script(Match("list_blobs", nth=nth), [RepeatedMarker()], repeat=repeat)
        with taking(), pytest.raises(ServiceResponseError, match="repeated"):
            pages(service)

    def test_folders_of_hierarchical_accounts_are_left_out(self) -> None:
        with FaultService(hierarchical=True) as service:
            service.put("c", "a/b/file", b"data")
            service.put("c", "file", b"data")
            assert names(pages(service)) == ["a/b/file", "file"]

    def test_so_are_their_markers_elsewhere(self, service: FaultService) -> None:
        service.put("c", "folder", b"", metadata={"hdi_isfolder": "true"})
        service.put("c", "no-folder", b"", metadata={"hdi_isfolder": "false"})
        assert names(pages(service, 100)) == [*NAMES, "no-folder"]

    @pytest.mark.parametrize(
        "key", ["NextMarker", "Name", "Etag", "Blob", "Blobs", "BlobPrefix", "Encoded", "ResourceType"]
    )
    def test_metadata_is_not_taken_for_anything_else(self, service: FaultService, key: str) -> None:
        """Everybody who can write a blob chooses its metadata."""
        for name in (NAMES[3], NAMES[9], NAMES[-1]):
            service.put("c", name, name.encode(), metadata={key: "3&<>true"})
        found = pages(service, 10)
        assert names(found) == NAMES
        assert [size for page in found for size in page.sizes] == [8] * 25
        assert len(found) == 3


AWKWARD = [
    "a b%2F?#ü//x/",
    "a&amp;b<c>'d\"",
    "&copy;&#65;",
    "line\nfeed",
    "carriage\rreturn",
    "tab\t",
    "control\x01\x1f",
    "c1\x80\x85\x9f",
    "\ufffe",
    "\U0001f600",
    " leading and trailing ",
    "]]>",
    "<!-- -->",
    'Encoded="true"',
]


class TestNames:
    def test_awkward_names_come_as_they_are(self, fault_service: FaultService) -> None:
        for name in AWKWARD:
            fault_service.put("c", name, name.encode())
        assert names(pages(fault_service)) == sorted(AWKWARD)

    @pytest.mark.parametrize("name", AWKWARD)
    def test_one_by_one(self, fault_service: FaultService, name: str) -> None:
        """Most pages have no name that needs the XML parser."""
        fault_service.put("c", name, b"123")
        assert pages(fault_service)[0].names == [name]
        assert pages(fault_service, prefix=name[:2])[0].names == [name]

    def test_on_azurite(self, container: Container) -> None:
        """We list the same blobs as the SDK."""
        written = ["a b%2F?#ü//x/", "a&b<c>", "plain", "x/y/z", "\U0001f600"]
        for name in written:
            container.put(name, name.encode())
        client = container_client(container.sas_url)
        found = list(list_pages(client.service, client.url, page_size=2))
        assert names(found) == container.names() == sorted(written)
        listed = {blob.name: (blob.size, f'"{blob.etag}"') for blob in container.client.list_blobs()}
        for page in found:
            for name, size, etag in zip(page.names, page.sizes, page.etags, strict=True):
                assert (size, etag) == listed[name]
                assert client.blob(name).read()[0] == name.encode()
                version = client.blob(name).version()
                assert version is not None
                assert version.etag == etag
        (page,) = client.pages(delimiter="/", prefix="x/")
        assert page.prefixes == ["x/y/"]


text = st.text(
    st.one_of(
        st.sampled_from("&<>'\"/ \t\n\r;#x%=!-ab"),
        st.characters(exclude_categories=["Cs"], exclude_characters="\0"),
    ),
    min_size=1,
    max_size=12,
)


def name_xml(tag: str, name: str) -> str:
    if any((ord(c) < 32 and c not in "\t\n\r") or c in "\ufffe\uffff" for c in name):
        return f'<{tag} Encoded="true">{quote(name)}</{tag}>'
    return f"<{tag}>{escape(name, {chr(13): '&#13;'})}</{tag}>"


def in_xml(value: str) -> str:
    return "".join(c for c in escape(value) if c in "\t\n" or (ord(c) >= 32 and c not in "\ufffe\uffff"))


@st.composite
def entries(draw: st.DrawFn) -> str:
    name = draw(text)
    if draw(st.booleans()) and draw(st.booleans()):
        return f"<BlobPrefix>{name_xml('Name', name)}</BlobPrefix>"
    etag = draw(st.sampled_from(["0x8D1", '"0x8D2"', "&quot;0x8D3&quot;"]))
    kind = draw(
        st.sampled_from(["", "", "<ResourceType>file</ResourceType>", "<ResourceType>directory</ResourceType>"])
    )
    keys = [
        "key",
        "hdi_isfolder",
        "Hdi_IsFolder",
        "Etag",
        "Name",
        "Blob",
        "BlobPrefix",
        "NextMarker",
        "Metadata",
        "Blobs",
    ]
    metadata = draw(st.dictionaries(st.sampled_from(keys), st.one_of(text, st.just("true"), st.just("")), max_size=3))
    return (
        f"<Blob>{name_xml('Name', name)}<Properties><Etag>{etag}</Etag>{kind}"
        f"<Content-Length>{draw(st.integers(0, 1 << 50))}</Content-Length><Content-MD5 /></Properties><Metadata>"
        + "".join(f"<{key}>{in_xml(value)}</{key}>" for key, value in metadata.items())
        + "</Metadata><OrMetadata /></Blob>"
    )


@given(st.lists(entries(), max_size=6), st.one_of(st.just(""), text), st.booleans())
def test_the_fast_way_and_the_parser_see_the_same_page(items: list[str], marker: str, has_prefix: bool) -> None:
    raw = (
        '\ufeff<?xml version="1.0" encoding="utf-8"?><EnumerationResults ServiceEndpoint="https://a/">'
        + ("<Prefix>a&amp;b</Prefix><Delimiter>/</Delimiter>" if has_prefix else "")
        + f"<Blobs>{''.join(items)}</Blobs>"
        + (f"<NextMarker>{in_xml(marker)}</NextMarker>" if marker else "<NextMarker />")
        + "</EnumerationResults>"
    ).encode()
    expected = _parse_page(raw, CONTAINER)
    fast = _match_page(raw)
    assert fast is None or fast == expected
    assert parse_page(raw, CONTAINER) == expected


def page_xml(items: str, end: str) -> bytes:
    return f"<EnumerationResults><Blobs>{items}</Blobs>{end}</EnumerationResults>".encode()


@pytest.mark.parametrize(
    "end",
    [
        "<NextMarker>m&amp;1</NextMarker>",
        "\n <NextMarker>m&#38;1</NextMarker>\n",
        "<NextMarker x='1'>m&amp;1</NextMarker>",
        "<NextMarker>m&amp;1</NextMarker >",
        "<NextMarker><![CDATA[m&1]]></NextMarker>",
        "<!-- <NextMarker>x</NextMarker> --><NextMarker>m&amp;1</NextMarker>",
        "<Other /><NextMarker>m&amp;1</NextMarker>",
    ],
)
def test_a_marker_in_any_form_is_the_one_of_the_next_page(end: str) -> None:
    """If it was overlooked the listing would end early, without an error."""
    item = "<Blob><Name>a</Name><Properties><Etag>0x1</Etag><Content-Length>1</Content-Length></Properties></Blob>"
    raw = page_xml(item, end)
    assert parse_page(raw, CONTAINER).marker == "m&1"
    assert _next_marker(raw, CONTAINER) == "m&1"
    before = page_xml(item, "").replace(b"<Blobs>", f"{end}<Blobs>".encode())
    assert _next_marker(before, CONTAINER) == "m&1"


@pytest.mark.parametrize("marker", [b"&#99999999;", b"&unknown;", b"\xff"])
def test_a_marker_that_cannot_be_read_is_an_error(marker: bytes) -> None:
    raw = page_xml("", "<NextMarker>here</NextMarker>").replace(b"here", marker)
    with pytest.raises(ServiceResponseError, match="listing that cannot be read"):
        _next_marker(raw, CONTAINER)


def test_an_odd_tag_does_not_hide_a_blob() -> None:
    sizes = "<Content-Length>1</Content-Length></Properties>"
    one = f"<Blob><Name>a</Name><Properties><Etag>0x1</Etag>{sizes}<Metadata><k>Blob></k></Metadata></Blob >"
    other = f"<Blob x='1'><Name>b</Name><Properties><Etag >0x1</Etag >{sizes.replace('Length>', 'Length >')}</Blob >"
    assert parse_page(page_xml(one + other, "<NextMarker />"), CONTAINER).names == ["a", "b"]


def test_the_fast_way_is_taken_for_ordinary_pages(service: FaultService) -> None:
    """Otherwise the test above would not compare two parsers."""
    service.put("c", "with & and < and !", b"", metadata={"key": "value"})
    with urllib.request.urlopen(f"{service.container_url('c')}?restype=container&comp=list&include=metadata") as answer:
        page = _match_page(answer.read())
    assert page is not None
    assert page.names == [*NAMES, "with & and < and !"]


PASSING: list[Fault] = [
    Status(503),
    Status(429, retry_after=0.05),
    Status(500),
    Reset(),
    Hangup(),
    GarbageStatusLine(),
    Torn(after=0),
    Torn(after=1000),
    TornReset(after=1000),
    WrongLength(+5),
    WrongLength(-5),
    MalformedXml(),
    MalformedXml(b"<html>a proxy's greeting</html>"),
    MalformedXml(b""),
    Stall(60, after=None),
    Stall(60, after=500),
]


def one_blob(name: bytes, size: bytes) -> bytes:
    properties = b"<Properties><Content-Length>" + size + b"</Content-Length><Etag>x</Etag></Properties>"
    blob = b"<Blob><Name>" + name + b"</Name>" + properties + b"</Blob>"
    return b"<EnumerationResults><Blobs>" + blob + b"</Blobs></EnumerationResults>"


class TestFaults:
    @pytest.mark.parametrize("nth", [1, 2])
    @pytest.mark.parametrize("fault", [*PASSING, Chunked()], ids=repr)
    def test_one_is_survived(self, service: FaultService, fault: Fault, nth: int) -> None:
        service.script(Match("list_blobs", nth=nth), [fault])
        with taking():
            assert names(pages(service, transfer=PERSISTENT)) == NAMES

    @pytest.mark.parametrize("fault", PASSING, ids=repr)
    def test_one_that_stays_is_an_error(self, service: FaultService, fault: Fault) -> None:
        service.script("list_blobs", [fault], repeat=True)
        with (
            taking(),
            pytest.raises((HttpResponseError, ServiceResponseError), match=r"GET.*/devstoreaccount1/c") as caught,
        ):
            pages(service, transfer=IMPATIENT)
        assert type(pickle.loads(pickle.dumps(caught.value))) is type(caught.value)

    @pytest.mark.parametrize(
        "page",
        [
            b"<Other></Other></EnumerationResults>",
            b"<EnumerationResults><Blobs><Blob></Blob></Blobs></EnumerationResults>",
            b"<EnumerationResults><Blobs><Blob><Name>a</Name></Blob></Blobs></EnumerationResults>",
            one_blob(b"a", b"-1"),
            one_blob(b"a", b"9" * 5000),
            one_blob(b"&copy;", b"1"),
            one_blob(b"\xff", b"1"),
        ],
    )
    def test_what_is_not_a_listing_is_an_error_and_not_an_empty_one(self, service: FaultService, page: bytes) -> None:
        service.script("list_blobs", [MalformedXml(page)], repeat=True)
        with pytest.raises(ServiceResponseError, match="listing that cannot be read"):
            pages(service)

    @pytest.mark.parametrize(("status", "kind"), [(403, ClientAuthenticationError), (404, ResourceNotFoundError)])
    def test_a_refusal_is_an_error_at_once(self, service: FaultService, status: int, kind: type[Exception]) -> None:
        service.script("list_blobs", [Status(status)], repeat=True)
        with pytest.raises(kind, match=str(status)):
            pages(service)
        assert len(service.log) == 1

    def test_a_container_that_is_not_there(self, fault_service: FaultService) -> None:
        with pytest.raises(ResourceNotFoundError, match="ContainerNotFound"):
            pages(fault_service)

    def test_an_error_comes_after_the_pages_before_it(self, service: FaultService) -> None:
        client = container_client(service.container_url("c"))
        service.script(Match("list_blobs", nth=2), [Status(403)], repeat=True)
        iterator = list_pages(client.service, client.url, page_size=10)
        assert next(iterator).names == NAMES[:10]
        with pytest.raises(ClientAuthenticationError):
            next(iterator)
