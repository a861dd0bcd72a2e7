"""The fuzz targets: seeds, and a check that raises if an input is handled wrong."""

from __future__ import annotations

import io
import random
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

from azure.core.exceptions import AzureError

from azstoragetorch._blob.listing import _match_page, _parse_page, parse_page
from azstoragetorch._blob.url import parse_blob_url, parse_container_url, parse_url
from azstoragetorch._samples.tar import walk
from azstoragetorch._samples.unpack import is_packed
from tests.faults.store import BlobStore, Request

from . import pickles
from .metadata import check_metadata, metadata_seeds

CORPUS = Path(__file__).parent / "corpus"
_CONTAINER = parse_container_url("https://account.blob.core.windows.net/container")
_MOST_MEMBERS = 200
_SECRET = "c2VjcmV0"


@dataclass(frozen=True)
class Target:
    """*check* gets an input and raises if it is handled wrong; mutations insert *words*.

    *mutate* knows what inputs consist of; without it, they are mutated as bytes alone.
    """

    check: Callable[[bytes], None]
    seeds: Callable[[], list[bytes]]
    words: tuple[bytes, ...]
    mutate: Callable[[bytes, list[bytes], random.Random], bytes] | None = None


def check_listing(raw: bytes) -> None:
    """The result is a page with columns of one length, or an error; both parsers agree."""
    try:
        page = parse_page(raw, _CONTAINER)
    except AzureError:
        page = None
    if page is not None:
        assert len(page.names) == len(page.sizes) == len(page.etags)
        assert all(name for name in (*page.names, *page.prefixes))
        assert all(size >= 0 for size in page.sizes)
        for name in page.names:
            name.encode("utf-8")
    quick = _match_page(raw)
    try:
        ElementTree.fromstring(raw.removeprefix(b"\xef\xbb\xbf"))
    except (ElementTree.ParseError, LookupError, ValueError):
        return
    if quick is not None:
        try:
            slow = _parse_page(raw, _CONTAINER)
        except AzureError:
            return
        assert quick == slow, (quick, slow)


def listing_seeds() -> list[bytes]:
    store = BlobStore(hierarchical=True)
    for name in ("a", "b c", "dir/x", "dir/y", "ü", "&<>\"'", "100%"):
        store.put("container", name, name.encode(), metadata={"key": "value"})
    pages = []
    for query in ({}, {"maxresults": "3"}, {"delimiter": "/"}, {"include": "metadata", "prefix": "d"}):
        page = store.list_page(Request("list_blobs", "container", "", query, {}))
        pages.append(bytes(store.render(page, "https://account.blob.core.windows.net").body))
    return pages


def check_url(raw: bytes) -> None:
    """The result is a URL that parses to itself, or ValueError; neither contains the SAS."""
    text = raw.decode("utf-8", "surrogateescape")
    for parse in (parse_url, parse_blob_url, parse_container_url):
        error, parsed = None, None
        try:
            parsed = parse(text)
        except ValueError as refused:
            error = refused
        assert f"&sig={_SECRET}" not in f"{error!r} {parsed!r}"
        if parsed is None:
            continue
        again = parse_url(str(parsed))
        assert (again.account_url, again.container, again.blob) == (parsed.account_url, parsed.container, parsed.blob)


def url_seeds() -> list[bytes]:
    account = "https://account.blob.core.windows.net"
    return [
        text.encode()
        for text in (
            f"{account}/c/b?sv=2023&sp=r&sig={_SECRET}",
            f"{account}/c/d/e%2Ff?snapshot=2024-01-01T00:00:00.0Z",
            "http://127.0.0.1:10000/devstoreaccount1/c/b#x",
            "abfss://c@account.dfs.core.windows.net/d/b",
            "az://account.blob.core.windows.net/c/a b",
            "http://[::1]:10000/account/c/ü",
        )
    ]


def check_tar(raw: bytes) -> None:
    """The result is members with no more bytes than the input, except for holes and compression, or ReadError."""
    total = 0
    try:
        for number, member in enumerate(walk(io.BytesIO(raw), "the tar")):
            total += len(member.data) if isinstance(member.data, bytes) else member.data.seek(0, 2)
            if number > _MOST_MEMBERS:
                break
    except tarfile.ReadError:
        pass
    has_holes = b"GNU.sparse." in raw or b"S" in raw[156::512]
    assert is_packed(raw) or has_holes or total <= len(raw)


def tar_seeds() -> list[bytes]:
    seeds = []
    for form in (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        for mode in ("w", "w:gz", "w:bz2", "w:xz"):
            sink = io.BytesIO()
            with tarfile.open(fileobj=sink, mode=mode, format=form) as archive:  # type: ignore[call-overload]
                for name in ("a.txt", "ü" * 40, "d/" * 60 + "deep", "empty"):
                    info = tarfile.TarInfo(name)
                    info.size = 0 if name == "empty" else 700
                    archive.addfile(info, io.BytesIO(b"x" * 700))
                link = tarfile.TarInfo("link")
                link.type, link.linkname = tarfile.SYMTYPE, "a.txt"
                archive.addfile(link)
            seeds.append(sink.getvalue())
    return seeds


TARGETS = {
    "listing": Target(
        check_listing,
        listing_seeds,
        (b"<Blob>", b"</Blob>", b"<Name>", b"</Name>", b"<NextMarker>", b"<![CDATA[", b"<!--", b"-->", b"&amp;",
         b"&#0;", b' Encoded="true"', b"<Content-Length>", b"99999999999999999999", b"<!DOCTYPE a>", b"<BlobPrefix>",
         b"\x00"),
    ),
    "url": Target(
        check_url,
        url_seeds,
        (b"://", b"/", b"//", b"..", b"%2F", b"%00", b"?", b"#", b"@", b":", b"&sig=", b"[", b"]", b"\n", b"\xff"),
    ),
    "metadata": Target(
        check_metadata,
        metadata_seeds,
        (b"cos\nsystem\n", b"cbuiltins\neval\n", b"(S'id'\ntR.", b"../", b"http://host/", b"\x80\x04", b"\x8c\x02os",
         b"\x93", b"R", b"b", b"0", b"2", b"c__main__\n", b"\x8d\xff\xff\xff\xff\xff\xff\xff\x7f", b"]", b"(", b".",
         b")\x81\x94}\x94(", b"ub", b"\x85", b"\x86", b"\x87", b"t", b"\x94", b"h\x00", b"h\x05", b"}", b"s", b"u",
         b"e", b"a", b"N", b"\x89", b"K\x07", b"J\xff\xff\xff\xff", b"\x8a\x09" + b"\x7f" * 9, b".metadata", b"\r\n",
         b"\x8c\x07pathlib\x8c\x09PosixPath\x93", b"(" * 70, b")" + b"\x85" * 500),
        pickles.mutated,
    ),
    "tar": Target(
        check_tar,
        tar_seeds,
        (b"\0" * 512, b"ustar\0", b"ustar  \0", b"7777777", b"\x80\xff\xff\xff\xff\xff\xff\xff", b"L", b"x", b"g", b"S",
         b"GNU.sparse.major=1\n", b"path=../../x\n", b"size=99999999999\n", b"12 path=abc\n", b"-1"),
    ),
}  # fmt: skip
