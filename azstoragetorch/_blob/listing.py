"""List the blobs of a container page by page, with the name, size and ETag of each.

A page of 5,000 blobs is 3 MB of XML, of which three fields matter. Pages in the form that the service sends are parsed
with regular expressions; any other well-formed page with an XML parser, with the same result.
"""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from urllib.parse import quote, unquote

from azure.core.exceptions import ServiceResponseError

from azstoragetorch._blob.errors import picklable
from azstoragetorch._blob.head import number_in
from azstoragetorch._blob.retry import Transient, retrying
from azstoragetorch._blob.service import Request, Service
from azstoragetorch._blob.url import BlobURL
from azstoragetorch._engine.job import Job
from azstoragetorch._engine.scope import Scope
from azstoragetorch._engine.threads import engine_for

_NAME = re.compile(rb"<Blob><Name>([^<]+)</Name>")
_SIZE = re.compile(rb"<Content-Length>(\d+)</Content-Length>")
_ETAG = re.compile(rb"<Etag>([^<]*)</Etag>")
_MODIFIED = re.compile(rb"<Last-Modified>([^<]*)</Last-Modified>")
_PREFIX = re.compile(rb"<BlobPrefix><Name>([^<]+)</Name>")
_END = re.compile(rb"</Blobs>\s*(?:<NextMarker>([^<\r]*)</NextMarker>|<NextMarker ?/>)\s*</EnumerationResults>\s*")
_DIRECTORY_MARKS = (b"hdi_isfolder", b"<resourcetype>directory")  # in lower case
_ODD_REFERENCE = re.compile("&(?!amp;|lt;|gt;|quot;|apos;)")
_REFERENCE = re.compile("&(?:#([0-9]+)|#x([0-9a-fA-F]+)|(amp|lt|gt|quot|apos));")
_CHARACTERS = {"amp": "&", "lt": "<", "gt": ">", "quot": '"', "apos": "'"}


@dataclass(frozen=True, slots=True)
class Page:
    """One response of List Blobs as columns; the same index is the same blob in each.

    A page can have few or zero blobs and still have a marker. ETags are quoted, as in headers. Directory markers are
    not blobs: their names are in ``directories``. ``modified`` is filled only on request, with Last-Modified in the
    format of the service.
    """

    names: list[str]
    sizes: list[int]
    etags: list[str]
    prefixes: list[str]
    marker: str
    modified: list[str] = field(default_factory=list)
    directories: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class ContainerEntry:
    """One container of an account; *modified* is its Last-Modified in the format of the service."""

    name: str
    etag: str
    modified: str


def list_pages(
    service: Service,
    container: BlobURL,
    *,
    prefix: str = "",
    delimiter: str = "",
    page_size: int = 5000,
    uncommitted: bool = False,
    with_modified: bool = False,
    fetches_ahead: bool = True,
) -> Iterator[Page]:
    """The pages of a listing in the order of the service; the next page is fetched while the caller uses one.

    Without *fetches_ahead* it is requested when the caller asks for it.

    With a *delimiter*, names that contain it after *prefix* are grouped into ``prefixes``. *uncommitted* also lists
    blobs that have only staged blocks. *with_modified* fills the column ``modified``.

    Raises:
        AzureError: the service refused, could not be reached, or sent something that is not a listing.
    """
    query = f"restype=container&comp=list&include=metadata{',uncommittedblobs' if uncommitted else ''}"
    for key, value in (("prefix", prefix), ("delimiter", delimiter)):
        if value:
            query += f"&{key}={quote(value, safe='')}"
    if page_size != 5000:
        query += f"&maxresults={page_size}"
    scope = Scope()
    markers, firsts = {""}, set[str]()
    fetching: Job[bytes] | None = Job(partial(_fetch, service, container, query, "", scope))
    try:
        while fetching is not None:
            raw = fetching.result()
            fetching = None
            following = _next_marker(raw, container)
            if following:
                if following in markers:
                    raise _repeated(container)
                markers.add(following)
                # If no thread is free, `result` above fetches it: a listing never waits for other transfers.
                fetching = Job(partial(_fetch, service, container, query, following, scope))
                if fetches_ahead:
                    engine_for(service.config).submit(fetching.run)
            page = parse_page(raw, container, with_modified=with_modified)
            # A prefix can be repeated, if a page ends inside it; a blob cannot.
            if not firsts.isdisjoint(page.names[:1]):
                raise _repeated(container)  # the same page under another marker
            firsts.update(page.names[:1])
            yield page
    finally:
        scope.cancel()
        if fetching is not None:
            fetching.give_up()


def parse_page(raw: bytes, container: BlobURL, *, with_modified: bool = False) -> Page:
    """The page in the XML document *raw*.

    Raises:
        AzureError: *raw* is not a listing.
    """
    page = _match_page(raw) if not with_modified else _match_dates(raw)
    return page or _parse_page(raw, container, with_modified=with_modified)


def _fetch(service: Service, container: BlobURL, query: str, marker: str, scope: Scope) -> bytes:
    return retrying(service.config, lambda: _fetch_once(service, container, query, marker, scope), scope)


def _fetch_once(service: Service, container: BlobURL, query: str, marker: str, scope: Scope) -> bytes:
    if marker:
        query += f"&marker={quote(marker, safe='')}"
    return _fetch_list(service, container, query, scope)


def _fetch_list(service: Service, container: BlobURL, query: str, scope: Scope | None = None) -> bytes:
    with service.send(Request("GET", container, query, scope=scope, purpose="list")) as response:
        raw = response.read()
    if not raw.rstrip().endswith(b"</EnumerationResults>"):
        raise Transient(_malformed(container, "the document ends early"))
    return raw


def _match_page(raw: bytes) -> Page | None:
    """The page, parsed with the expressions; None if it has another form than the one that they are made for."""
    # Only the XML parser handles markup that hides text from the expressions, and directory markers. It also gets pages
    # that have elements with attributes, such as encoded names: the expressions do not match those.
    # Searching 3 MB takes longer than anything else here, and longest for a string that begins with a frequent byte.
    if b"\r" in raw or b"\0" in raw or (b"!" in raw and b"<!" in raw):
        return None
    lower = raw.lower()
    if any(mark in lower for mark in _DIRECTORY_MARKS):
        return None
    names, sizes, etags = _NAME.findall(raw), _SIZE.findall(raw), _ETAG.findall(raw)
    if not len(names) == len(sizes) == len(etags) == raw.count(b"</Blob>") == raw.count(b"Blob>") - len(names):
        return None
    prefixes: list[bytes] = []
    if b"BlobPrefix" in raw:
        prefixes = _PREFIX.findall(raw)
        if not len(prefixes) == raw.count(b"<BlobPrefix") == raw.count(b"</BlobPrefix>"):
            return None
    marker = _match_marker(raw)
    if marker is None or not (names or prefixes):
        return None
    try:
        return Page(_texts(names), list(map(int, sizes)), _quoted(_texts(etags)), _texts(prefixes), marker)
    except ValueError:  # not UTF-8, or an odd reference
        return None


def _match_dates(raw: bytes) -> Page | None:
    """Like `_match_page`, with the dates; None if a blob has none."""
    page = _match_page(raw)
    if page is None:
        return None
    page.modified.extend(_texts(_MODIFIED.findall(raw)))
    return page if len(page.modified) == len(page.names) else None


def _texts(values: list[bytes]) -> list[str]:
    if not values:
        return []
    joined = b"\0".join(values).decode("utf-8")  # XML cannot contain a NUL
    if "&" in joined:
        if _ODD_REFERENCE.search(joined):
            raise ValueError("a reference that only the XML parser can resolve or reject")
        joined = _unescape(joined)
    return joined.split("\0")


def _unescape(text: str) -> str:
    """Resolve the references in *text* by the rules of XML, which differ from those of HTML."""
    return _REFERENCE.sub(
        lambda found: _CHARACTERS[found[3]] if found[3] else chr(int(found[1]) if found[1] else int(found[2], 16)), text
    )


def _quoted(etags: list[str]) -> list[str]:
    return [etag if etag.startswith('"') else f'"{etag}"' for etag in etags]


def _next_marker(raw: bytes, container: BlobURL) -> str:
    found = _match_marker(raw)
    return found if found is not None else _parse_xml(raw, container).findtext("NextMarker") or ""


def _match_marker(raw: bytes) -> str | None:
    """The marker of the next page; None if the end of the page has another form than the expression is made for."""
    found = _END.fullmatch(raw, max(0, raw.rfind(b"</Blobs>")))
    if found is None:
        return None
    with suppress(ValueError):  # not UTF-8, or an odd reference
        return _texts([found[1]])[0] if found[1] else ""
    return None


def list_containers(service: Service, account: BlobURL) -> list[ContainerEntry]:
    """The containers of *account*.

    Raises:
        AzureError: the service refused, could not be reached, or sent something that is not a listing.
    """
    found: dict[str, ContainerEntry] = {}
    marker, markers = "", {""}
    while True:
        query = "comp=list" + (f"&marker={quote(marker, safe='')}" if marker else "")
        raw = retrying(service.config, partial(_fetch_list, service, account, query))
        root = _parse_xml(raw, account)
        for item in root.iterfind("Containers/Container"):
            name = item.findtext("Name")
            if not name:
                raise _malformed(account, "an entry has no name")
            etag = item.findtext("Properties/Etag") or ""
            found[name] = ContainerEntry(name, etag, item.findtext("Properties/Last-Modified") or "")
        marker = root.findtext("NextMarker") or ""
        if not marker:
            return list(found.values())
        if marker in markers:
            raise _repeated(account)
        markers.add(marker)


def _parse_xml(raw: bytes, container: BlobURL) -> ET.Element:
    try:
        root = ET.fromstring(raw.removeprefix(b"\xef\xbb\xbf"))  # noqa: S314 - entities are off in expat's defaults here
    except (ET.ParseError, LookupError, ValueError) as error:  # the last two for an unknown encoding
        raise _malformed(container, f"it is not XML: {error}") from error
    if root.tag != "EnumerationResults":
        raise _malformed(container, f"its root is {root.tag!r}")
    return root


def _parse_page(raw: bytes, container: BlobURL, *, with_modified: bool = False) -> Page:
    root = _parse_xml(raw, container)
    page = Page([], [], [], [], root.findtext("NextMarker") or "")
    for item in root.iterfind("Blobs/*"):
        name_element = item.find("Name")
        name = name_element.text if name_element is not None else None
        if name_element is None or not name:
            raise _malformed(container, "an entry has no name")
        if name_element.get("Encoded") == "true":
            name = unquote(name)
        if item.tag == "BlobPrefix":
            page.prefixes.append(name)
            continue
        if _is_directory(item):
            page.directories.append(name)
            continue
        size = number_in(item.findtext("Properties/Content-Length"))
        if size is None:
            raise _malformed(container, f"the entry {name!r} has no size")
        page.names.append(name)
        page.sizes.append(size)
        page.etags.append(item.findtext("Properties/Etag") or "")
        if with_modified:
            page.modified.append(item.findtext("Properties/Last-Modified") or "")
    return replace(page, etags=_quoted(page.etags))


def _is_directory(item: ET.Element) -> bool:
    if item.findtext("Properties/ResourceType") == "directory":
        return True
    metadata = item.find("Metadata")
    entries = [] if metadata is None else list(metadata)
    return any(entry.tag.lower() == "hdi_isfolder" and (entry.text or "").lower() == "true" for entry in entries)


def _repeated(container: BlobURL) -> ServiceResponseError:
    return picklable(ServiceResponseError(f"GET {container}: the service repeated a page of its listing"))


def _malformed(container: BlobURL, what: str) -> ServiceResponseError:
    return picklable(ServiceResponseError(f"GET {container}: the service sent a listing that cannot be read: {what}"))
