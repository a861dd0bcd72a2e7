"""Blobs in memory with the semantics of the Azure Blob service: all operations, without faults."""

from __future__ import annotations

import base64
import bisect
import hashlib
import re
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from email.utils import format_datetime, parsedate_to_datetime
from urllib.parse import quote
from xml.etree import ElementTree
from xml.sax.saxutils import escape

from .wire import Answer, Bytes

MAX_COMMITTED_BLOCKS = 50_000
MAX_UNCOMMITTED_BLOCKS = 100_000
MAX_RANGE_CHECKSUM = 4 << 20  # bytes; the service refuses a checksum of a longer range
MAX_PAGE = 5_000

# request header of a write -> property, which is also the response header of a read
_SETTINGS = {
    "x-ms-blob-content-type": "Content-Type",
    "x-ms-blob-content-encoding": "Content-Encoding",
    "x-ms-blob-content-language": "Content-Language",
    "x-ms-blob-content-md5": "Content-MD5",
    "x-ms-blob-cache-control": "Cache-Control",
    "x-ms-blob-content-disposition": "Content-Disposition",
}
_INVALID_IN_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")

_MESSAGES = {
    "AuthenticationFailed": "Server failed to authenticate the request.",
    "BlobAlreadyExists": "The specified blob already exists.",
    "BlobNotFound": "The specified blob does not exist.",
    "ConditionNotMet": "The condition specified using HTTP conditional header(s) is not met.",
    "ContainerNotFound": "The specified container does not exist.",
    "InvalidBlobOrBlock": "The specified blob or block content is invalid.",
    "InvalidBlockList": "The specified block list is invalid.",
    "InvalidRange": "The range specified is invalid for the current size of the resource.",
    "Md5Mismatch": "The MD5 value specified in the request did not match the value calculated by the server.",
    "ServerBusy": "The server is busy.",
}


class ServiceError(Exception):
    """An operation that the service refuses."""

    def __init__(self, status: int, code: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(status, code)
        self.status = status
        self.code = code
        self.headers = dict(headers or {})


def error_xml(code: str, request_id: str) -> bytes:
    message = _MESSAGES.get(code, f"{code}.")
    now = datetime.now(timezone.utc).isoformat()
    return (
        '\ufeff<?xml version="1.0" encoding="utf-8"?>'
        f"<Error><Code>{code}</Code><Message>{message}\nRequestId:{request_id}\nTime:{now}</Message></Error>"
    ).encode()


@dataclass(frozen=True, slots=True)
class Request:
    """One operation with its body."""

    operation: str
    container: str
    blob: str
    query: Mapping[str, str]
    headers: Mapping[str, str]
    body: Bytes = b""
    source: tuple[str, str, str, Mapping[str, str]] | None = None  # of a copy: URL, container, blob, query


@dataclass(frozen=True, slots=True)
class StoredBlob:
    """One version of a blob. Immutable: a write creates a new one."""

    data: Bytes
    etag: str  # with its quotes
    modified: datetime
    version_id: str
    settings: Mapping[str, str] = field(default_factory=dict)
    metadata: Mapping[str, str] = field(default_factory=dict)
    blocks: tuple[tuple[str, int], ...] = ()  # id, size
    copy_headers: Mapping[str, str] = field(default_factory=dict)

    @property
    def is_folder(self) -> bool:
        return self.metadata.get("hdi_isfolder", "").lower() == "true"


@dataclass(slots=True)
class _Slot:
    """All versions under one name."""

    current: StoredBlob | None = None
    uncommitted: dict[str, Bytes] = field(default_factory=dict)
    versions: dict[str, StoredBlob] = field(default_factory=dict)
    snapshots: dict[str, StoredBlob] = field(default_factory=dict)


@dataclass(slots=True)
class _Container:
    etag: str
    modified: datetime
    slots: dict[str, _Slot] = field(default_factory=dict)
    names: list[str] = field(default_factory=list)  # of slots with a current blob, sorted


@dataclass(frozen=True, slots=True)
class ListPage:
    """One page of List Blobs before it is serialized as XML. An item without a blob is a BlobPrefix."""

    container: str
    prefix: str
    delimiter: str
    marker: str
    max_results: int
    items: tuple[tuple[str, StoredBlob | None], ...]
    next_marker: str
    with_metadata: bool


class BlobStore:
    """Containers and blobs. Thread-safe.

    *versioning* keeps overwritten and deleted blobs readable by `versionid`. *hierarchical* simulates an account with a
    hierarchical namespace: writing `a/b` also creates the directory `a`, an empty blob with `hdi_isfolder`.
    """

    def __init__(self, *, versioning: bool = False, hierarchical: bool = False) -> None:
        self.versioning = versioning
        self.hierarchical = hierarchical
        self.max_copied_at_once = 256 << 20  # bytes; the service copies a larger blob only in blocks
        self._lock = threading.RLock()
        self._containers: dict[str, _Container] = {}
        self._last_tick = 0

    # ---- directly

    def create_container(self, name: str) -> None:
        with self._lock:
            tick = self._tick()
            self._containers.setdefault(name, _Container(_etag(tick), _moment(tick)))

    def put(
        self,
        container: str,
        name: str,
        data: Bytes,
        *,
        metadata: Mapping[str, str] | None = None,
        settings: Mapping[str, str] | None = None,
        blocks: tuple[tuple[str, int], ...] = (),
        copy_headers: Mapping[str, str] | None = None,
    ) -> StoredBlob:
        """Set the content of the blob and drop uncommitted blocks; create the container if it does not exist."""
        with self._lock:
            self.create_container(container)
            tick = self._tick()
            blob = StoredBlob(
                data=data,
                etag=_etag(tick),
                modified=_moment(tick),
                version_id=_stamp(tick),
                settings={"Content-Type": "application/octet-stream", **(settings or {})},
                metadata=dict(metadata or {}),
                blocks=blocks,
                copy_headers=dict(copy_headers or {}),
            )
            if self.hierarchical and "/" in name.rstrip("/"):
                parent = name.rstrip("/").rpartition("/")[0]
                if parent and self.find(container, parent) is None:
                    self.put(container, parent, b"", metadata={"hdi_isfolder": "true"})
            self._set_current(container, name, blob)
            return blob

    def find(self, container: str, name: str) -> StoredBlob | None:
        with self._lock:
            slot = self._slot(container, name)
            return slot.current if slot else None

    def delete(self, container: str, name: str) -> None:
        """Delete the blob with its snapshots; its versions stay."""
        with self._lock:
            holder = self._containers[container]
            slot = holder.slots[name]
            if slot.current is None:
                raise KeyError(name)
            slot.current = None
            slot.snapshots.clear()
            del holder.names[bisect.bisect_left(holder.names, name)]
            if not slot.versions and not slot.uncommitted:
                del holder.slots[name]

    def names(self, container: str) -> list[str]:
        with self._lock:
            return list(self._containers[container].names)

    def uncommitted(self, container: str, name: str) -> dict[str, bytes]:
        """The uncommitted blocks, by id."""
        with self._lock:
            slot = self._slot(container, name)
            return {block_id: bytes(data) for block_id, data in slot.uncommitted.items()} if slot else {}

    def snapshot(self, container: str, name: str) -> str:
        with self._lock:
            slot = self._slot(container, name)
            if slot is None or slot.current is None:
                raise KeyError(name)
            stamp = _stamp(self._tick())
            slot.snapshots[stamp] = slot.current
            return stamp

    # ---- over HTTP

    def carry_out(self, request: Request) -> Answer:
        """Carry out *request*; raise ServiceError if the service would refuse it."""
        with self._lock:
            return getattr(self, f"_do_{request.operation}")(request)  # type: ignore[no-any-return]

    def list_page(self, request: Request) -> ListPage:
        with self._lock:
            holder = self._holder(request)
            query = request.query
            try:
                max_results = int(query.get("maxresults", MAX_PAGE))
            except ValueError:
                raise ServiceError(400, "InvalidQueryParameterValue") from None
            if max_results < 1:
                raise ServiceError(400, "OutOfRangeQueryParameterValue")
            max_results = min(max_results, MAX_PAGE)
            prefix, delimiter, marker = (query.get(name, "") for name in ("prefix", "delimiter", "marker"))
            items: list[tuple[str, StoredBlob | None]] = []
            next_marker = ""
            at = bisect.bisect_left(holder.names, max(prefix, _read_marker(marker)))
            while at < len(holder.names) and holder.names[at].startswith(prefix):
                name = holder.names[at]
                if len(items) == max_results:
                    next_marker = self.new_marker(name)
                    break
                cut = name.find(delimiter, len(prefix)) if delimiter else -1
                if cut >= 0:
                    name = name[: cut + len(delimiter)]
                    items.append((name, None))
                    while at < len(holder.names) and holder.names[at].startswith(name):
                        at += 1
                else:
                    items.append((name, holder.slots[name].current))
                    at += 1
            return ListPage(
                container=request.container,
                prefix=prefix,
                delimiter=delimiter,
                marker=marker,
                max_results=max_results,
                items=tuple(items),
                next_marker=next_marker,
                with_metadata="metadata" in query.get("include", "").split(","),
            )

    def new_marker(self, start: str) -> str:
        """A unique marker with which the listing continues at *start*."""
        with self._lock:
            return f"{self._tick()}!{base64.urlsafe_b64encode(start.encode()).decode()}"

    def same_place(self, marker: str) -> str:
        """A new marker for the same position as *marker*."""
        return self.new_marker(_read_marker(marker))

    def render(self, page: ListPage, endpoint: str) -> Answer:
        parts = [
            '\ufeff<?xml version="1.0" encoding="utf-8"?>',
            f'<EnumerationResults ServiceEndpoint="{escape(endpoint)}" ContainerName="{page.container}">',
            _name_xml("Prefix", page.prefix) if page.prefix else "",
            f"<Marker>{escape(page.marker)}</Marker>" if page.marker else "",
            f"<MaxResults>{page.max_results}</MaxResults>",
            _name_xml("Delimiter", page.delimiter) if page.delimiter else "",
            "<Blobs>",
            *(self._item_xml(name, blob, page.with_metadata) for name, blob in page.items),
            f"</Blobs><NextMarker>{escape(page.next_marker)}</NextMarker></EnumerationResults>",
        ]
        return Answer(200, {"Content-Type": "application/xml"}, "".join(parts).encode())

    def _item_xml(self, name: str, blob: StoredBlob | None, with_metadata: bool) -> str:
        if blob is None:
            return f"<BlobPrefix>{_name_xml('Name', name)}</BlobPrefix>"
        modified = _http_date(blob.modified)
        properties = {
            "Creation-Time": modified,
            "Last-Modified": modified,
            "Etag": blob.etag.strip('"'),  # unquoted in listings, quoted in headers
            **({"ResourceType": "directory" if blob.is_folder else "file"} if self.hierarchical else {}),
            "Content-Length": str(len(blob.data)),
            **{name: blob.settings.get(name, "") for name in _SETTINGS.values()},
            "BlobType": "BlockBlob",
            "AccessTier": "Hot",
            "AccessTierInferred": "true",
            "LeaseStatus": "unlocked",
            "LeaseState": "available",
            "ServerEncrypted": "true",
        }
        parts = [f"<Blob>{_name_xml('Name', name)}"]
        if self.versioning:
            parts.append(f"<VersionId>{blob.version_id}</VersionId><IsCurrentVersion>true</IsCurrentVersion>")
        parts += [
            "<Properties>",
            *(f"<{key}>{escape(value)}</{key}>" for key, value in properties.items()),
            "</Properties>",
        ]
        if with_metadata:
            parts += [
                "<Metadata>",
                *(f"<{key}>{escape(value)}</{key}>" for key, value in blob.metadata.items()),
                "</Metadata>",
            ]
        return "".join([*parts, "<OrMetadata /></Blob>"])

    # ---- operations on blobs

    def _do_get_blob(self, request: Request) -> Answer:
        blob = self._read_target(request)
        size = len(blob.data)
        span = parse_range(request.headers)
        md5, crc64 = (
            request.headers.get(f"x-ms-range-get-content-{kind}", "").lower() == "true" for kind in ("md5", "crc64")
        )
        if span is None:
            if md5 or crc64:
                raise ServiceError(400, "InvalidHeaderValue")
            return Answer(200, self._blob_headers(blob), blob.data)
        start, end = span[0], size if span[1] is None else min(span[1], size)
        if start >= size:
            raise ServiceError(416, "InvalidRange", {"Content-Range": f"bytes */{size}"})
        body = memoryview(blob.data)[start:end]
        headers = self._blob_headers(blob)
        whole_md5 = headers.pop("Content-MD5", None)
        if whole_md5:
            headers["x-ms-blob-content-md5"] = whole_md5
        if (md5 or crc64) and len(body) > MAX_RANGE_CHECKSUM:
            raise ServiceError(400, "OutOfRangeInput")
        if md5:
            headers["Content-MD5"] = md5_header(body)
        if crc64:
            headers["x-ms-content-crc64"] = crc64_header(body)
        return Answer(206, {**headers, "Content-Range": f"bytes {start}-{end - 1}/{size}"}, body)

    def _do_head(self, request: Request) -> Answer:
        blob = self._read_target(request)
        return Answer(200, {**self._blob_headers(blob), "Content-Length": str(len(blob.data))})

    def _do_put_blob(self, request: Request) -> Answer:
        self._holder(request)
        if request.headers.get("x-ms-blob-type") != "BlockBlob":
            raise ServiceError(400, "InvalidHeaderValue")
        checks = _verify_checksums(request)
        self._check_write_conditions(request)
        settings = _settings(request)
        md5 = md5_header(request.body)
        if settings.setdefault("Content-MD5", md5) != md5:
            raise ServiceError(400, "Md5Mismatch")
        if "Content-Type" not in settings and "content-type" in request.headers:
            settings["Content-Type"] = request.headers["content-type"]
        blob = self.put(request.container, request.blob, request.body, metadata=_metadata(request), settings=settings)
        return Answer(201, {**self._written_headers(blob), "Content-MD5": md5, **checks})

    def _do_put_block(self, request: Request) -> Answer:
        return self._stage(request, request.body)

    def _do_put_block_from_url(self, request: Request) -> Answer:
        self._holder(request)
        data = self._copy_source(request).data
        span = parse_range({"x-ms-range": request.headers.get("x-ms-source-range", "bytes=0-")})
        assert span is not None
        stop = len(data) if span[1] is None else span[1]
        if stop > len(data):
            raise ServiceError(416, "InvalidRange")
        return self._stage(request, memoryview(data)[span[0] : stop])

    def _stage(self, request: Request, data: Bytes) -> Answer:
        holder = self._holder(request)
        block_id = request.query.get("blockid", "")
        try:
            length = len(base64.b64decode(block_id, validate=True))
        except ValueError:
            length = 0
        if not 1 <= length <= 64:
            raise ServiceError(400, "InvalidQueryParameterValue")
        if not len(data):
            raise ServiceError(400, "InvalidHeaderValue", {"x-ms-error-detail": "Content-Length"})
        checks = _verify_checksums(request)
        slot = holder.slots.setdefault(request.blob, _Slot())
        if any(len(other) != len(block_id) for other in slot.uncommitted):
            raise ServiceError(400, "InvalidBlobOrBlock")
        if len(slot.uncommitted) >= MAX_UNCOMMITTED_BLOCKS and block_id not in slot.uncommitted:
            raise ServiceError(409, "BlockCountExceedsLimit")
        slot.uncommitted[block_id] = data
        return Answer(201, checks)

    def _do_put_block_list(self, request: Request) -> Answer:
        self._holder(request)
        checks = _verify_checksums(request)
        try:
            wanted = [(element.tag, element.text or "") for element in ElementTree.fromstring(bytes(request.body))]
        except ElementTree.ParseError:
            raise ServiceError(400, "InvalidXmlDocument") from None
        if len(wanted) > MAX_COMMITTED_BLOCKS:
            raise ServiceError(400, "BlockListTooLong")
        self._check_write_conditions(request)
        slot = self._slot(request.container, request.blob) or _Slot()
        committed: dict[str, Bytes] = {}
        if slot.current is not None:
            data, at = memoryview(slot.current.data), 0
            for block_id, size in slot.current.blocks:
                committed[block_id] = data[at : at + size]
                at += size
        sources = {
            "Committed": committed,
            "Uncommitted": slot.uncommitted,
            "Latest": {**committed, **slot.uncommitted},
        }
        try:
            pieces = [(block_id, sources[tag][block_id]) for tag, block_id in wanted]
        except KeyError:
            raise ServiceError(400, "InvalidBlockList") from None
        blob = self.put(
            request.container,
            request.blob,
            b"".join(piece for _, piece in pieces),
            metadata=_metadata(request),
            settings=_settings(request),
            blocks=tuple((block_id, len(piece)) for block_id, piece in pieces),
        )
        return Answer(201, {**self._written_headers(blob), **checks})

    def _do_get_block_list(self, request: Request) -> Answer:
        slot = self._slot(request.container, request.blob)
        if slot is None:
            raise ServiceError(404, "BlobNotFound")
        kind = request.query.get("blocklisttype", "committed").lower()
        committed = slot.current.blocks if slot.current else ()
        uncommitted = [(block_id, len(data)) for block_id, data in slot.uncommitted.items()]
        parts = ['<?xml version="1.0" encoding="utf-8"?><BlockList>']
        for tag, blocks in (("Committed", committed), ("Uncommitted", uncommitted)):
            if kind in (tag.lower(), "all"):
                rows = (f"<Block><Name>{block_id}</Name><Size>{size}</Size></Block>" for block_id, size in blocks)
                parts += [f"<{tag}Blocks>", *rows, f"</{tag}Blocks>"]
        headers = {"Content-Type": "application/xml"}
        if slot.current:
            headers |= {"ETag": slot.current.etag, "x-ms-blob-content-length": str(len(slot.current.data))}
        return Answer(200, headers, "".join([*parts, "</BlockList>"]).encode())

    def _do_delete(self, request: Request) -> Answer:
        blob = self._read_target(request)
        slot = self._slot(request.container, request.blob)
        assert slot is not None
        if stamp := request.query.get("snapshot"):
            del slot.snapshots[stamp]
        elif version := request.query.get("versionid"):
            if slot.current is blob:
                raise ServiceError(403, "OperationNotAllowedOnRootBlob")
            del slot.versions[version]
        elif slot.snapshots and "x-ms-delete-snapshots" not in request.headers:
            raise ServiceError(409, "SnapshotsPresent")
        elif request.headers.get("x-ms-delete-snapshots") == "only":
            slot.snapshots.clear()
        else:
            self.delete(request.container, request.blob)
        return Answer(202, {"x-ms-delete-type-permanent": "true"})

    def _do_copy_blob(self, request: Request) -> Answer:
        self._holder(request)
        assert request.source is not None
        source_url = request.source[0]
        found = self._copy_source(request)
        if "x-ms-requires-sync" in request.headers and len(found.data) > self.max_copied_at_once:
            raise ServiceError(409, "CopySourceTooLarge")
        self._check_write_conditions(request)
        copy = {"x-ms-copy-id": f"copy-{self._tick()}", "x-ms-copy-status": "success"}
        blob_made = self.put(
            request.container,
            request.blob,
            found.data,
            metadata=_metadata(request) or found.metadata,
            settings=found.settings,
            blocks=found.blocks,
            copy_headers={
                **copy,
                "x-ms-copy-source": source_url,
                "x-ms-copy-progress": f"{len(found.data)}/{len(found.data)}",
                "x-ms-copy-completion-time": _http_date(datetime.now(timezone.utc)),
            },
        )
        return Answer(202, {**self._written_headers(blob_made), **copy})

    def _copy_source(self, request: Request) -> StoredBlob:
        assert request.source is not None
        _, container, blob, query = request.source
        conditions = {
            name.removeprefix("x-ms-source-"): value
            for name, value in request.headers.items()
            if name.startswith("x-ms-source-if-")
        }
        try:
            return self._read_target(Request("copy_source", container, blob, query, conditions))
        except ServiceError as error:
            raise ServiceError(error.status, "CannotVerifyCopySource") from error

    def _do_set_metadata(self, request: Request) -> Answer:
        blob = self._read_target(request)
        tick = self._tick()
        changed = replace(
            blob,
            metadata=_metadata(request),
            etag=_etag(tick),
            modified=_moment(tick),
            version_id=_stamp(tick),
        )
        slot = self._slot(request.container, request.blob)
        assert slot is not None
        self._set_current(request.container, request.blob, changed, keep_uncommitted=True)
        return Answer(200, self._written_headers(changed))

    def _do_snapshot_blob(self, request: Request) -> Answer:
        blob = self._read_target(request)
        stamp = self.snapshot(request.container, request.blob)
        return Answer(201, {**self._written_headers(blob), "x-ms-snapshot": stamp})

    # ---- operations on containers and the account

    def _do_create_container(self, request: Request) -> Answer:
        if request.container in self._containers:
            raise ServiceError(409, "ContainerAlreadyExists")
        self.create_container(request.container)
        return Answer(201, self._container_headers(request))

    def _do_get_container(self, request: Request) -> Answer:
        return Answer(200, self._container_headers(request))

    def _do_delete_container(self, request: Request) -> Answer:
        self._holder(request)
        del self._containers[request.container]
        return Answer(202)

    def _do_list_containers(self, request: Request) -> Answer:
        prefix = request.query.get("prefix", "")
        rows = "".join(
            f"<Container><Name>{name}</Name><Properties><Last-Modified>{_http_date(holder.modified)}</Last-Modified>"
            f"<Etag>{escape(holder.etag)}</Etag></Properties></Container>"
            for name, holder in sorted(self._containers.items())
            if name.startswith(prefix)
        )
        body = (
            '<?xml version="1.0" encoding="utf-8"?>'
            f"<EnumerationResults><Containers>{rows}</Containers><NextMarker /></EnumerationResults>"
        )
        return Answer(200, {"Content-Type": "application/xml"}, body.encode())

    def _do_get_account_information(self, request: Request) -> Answer:
        return Answer(
            200,
            {
                "x-ms-sku-name": "Standard_LRS",
                "x-ms-account-kind": "StorageV2",
                "x-ms-is-hns-enabled": str(self.hierarchical).lower(),
            },
        )

    def _do_get_user_delegation_key(self, request: Request) -> Answer:
        info = ElementTree.fromstring(bytes(request.body))
        fields = {
            "SignedOid": "oid",
            "SignedTid": "tid",
            "SignedStart": info.findtext("Start") or "",
            "SignedExpiry": info.findtext("Expiry") or "",
            "SignedService": "b",
            "SignedVersion": "2023-11-03",
            "Value": base64.b64encode(bytes(32)).decode(),
        }
        rows = "".join(f"<{name}>{escape(value)}</{name}>" for name, value in fields.items())
        body = f'<?xml version="1.0" encoding="utf-8"?><UserDelegationKey>{rows}</UserDelegationKey>'
        return Answer(200, {"Content-Type": "application/xml"}, body.encode())

    def _do_unknown(self, request: Request) -> Answer:
        raise ServiceError(405, "UnsupportedHttpVerb")

    # ---- parts

    def _tick(self) -> int:
        """The time in units of 100 ns, never the same twice."""
        self._last_tick = max(self._last_tick + 1, time.time_ns() // 100)
        return self._last_tick

    def _holder(self, request: Request) -> _Container:
        try:
            return self._containers[request.container]
        except KeyError:
            raise ServiceError(404, "ContainerNotFound") from None

    def _container_headers(self, request: Request) -> dict[str, str]:
        holder = self._holder(request)
        return {"ETag": holder.etag, "Last-Modified": _http_date(holder.modified)}

    def _slot(self, container: str, name: str) -> _Slot | None:
        holder = self._containers.get(container)
        return holder.slots.get(name) if holder else None

    def _set_current(self, container: str, name: str, blob: StoredBlob, *, keep_uncommitted: bool = False) -> None:
        holder = self._containers[container]
        slot = holder.slots.setdefault(name, _Slot())
        if slot.current is None:
            bisect.insort(holder.names, name)
        slot.current = blob
        if self.versioning:
            slot.versions[blob.version_id] = blob
        if not keep_uncommitted:
            slot.uncommitted = {}

    def _read_target(self, request: Request) -> StoredBlob:
        """The requested version, if the conditions of *request* hold."""
        self._holder(request)
        slot = self._slot(request.container, request.blob)
        blob = slot.current if slot else None
        if slot and "snapshot" in request.query:
            blob = slot.snapshots.get(request.query["snapshot"])
        elif slot and "versionid" in request.query:
            blob = slot.versions.get(request.query["versionid"])
        if blob is None:
            raise ServiceError(404, "BlobNotFound")
        if request.operation in ("get_blob", "head") and _is_unmodified_for_reader(blob, request.headers):
            raise ServiceError(304, "ConditionNotMet", {"ETag": blob.etag})
        if not _may_proceed(blob, request.headers):
            raise ServiceError(412, "ConditionNotMet")
        return blob

    def _check_write_conditions(self, request: Request) -> None:
        current = self.find(request.container, request.blob)
        if current is not None and request.headers.get("if-none-match") == "*":
            raise ServiceError(409, "BlobAlreadyExists")
        if not _may_proceed(current, request.headers):
            raise ServiceError(412, "ConditionNotMet")

    def _written_headers(self, blob: StoredBlob) -> dict[str, str]:
        headers = {
            "ETag": blob.etag,
            "Last-Modified": _http_date(blob.modified),
            "x-ms-request-server-encrypted": "true",
        }
        if self.versioning:
            headers["x-ms-version-id"] = blob.version_id
        return headers

    def _blob_headers(self, blob: StoredBlob) -> dict[str, str]:
        headers = {
            **blob.settings,
            "ETag": blob.etag,
            "Last-Modified": _http_date(blob.modified),
            "Accept-Ranges": "bytes",
            "x-ms-blob-type": "BlockBlob",
            "x-ms-creation-time": _http_date(blob.modified),
            "x-ms-lease-status": "unlocked",
            "x-ms-lease-state": "available",
            "x-ms-server-encrypted": "true",
            **{f"x-ms-meta-{name}": value for name, value in blob.metadata.items()},
            **blob.copy_headers,
        }
        if self.hierarchical:
            headers["x-ms-resource-type"] = "directory" if blob.is_folder else "file"
        if self.versioning:
            headers["x-ms-version-id"] = blob.version_id
        return headers


def parse_range(headers: Mapping[str, str]) -> tuple[int, int | None] | None:
    """The first byte and the one after the last (None: to the end) of the range, or None for the whole blob.

    As in the service, x-ms-range takes precedence over Range, and suffix ranges are not supported.
    """
    value = headers.get("x-ms-range") or headers.get("range")
    if value is None:
        return None
    found = re.fullmatch(r"bytes=(\d+)-(\d*)", value.strip())
    if found is None:
        raise ServiceError(400, "InvalidHeaderValue")
    start, last = int(found[1]), int(found[2]) if found[2] else None
    if last is not None and last < start:
        raise ServiceError(400, "InvalidHeaderValue")
    return start, None if last is None else last + 1


def md5_header(data: Bytes) -> str:
    return base64.b64encode(hashlib.md5(data, usedforsecurity=False).digest()).decode()


def crc64_header(data: Bytes) -> str:
    """The CRC-64 of the service (polynomial of NVMe), little-endian. Takes about a second for 10 MB."""
    crc = 0xFFFFFFFFFFFFFFFF
    for byte in bytes(data):
        crc = _CRC64[(crc ^ byte) & 0xFF] ^ (crc >> 8)
    return base64.b64encode((crc ^ 0xFFFFFFFFFFFFFFFF).to_bytes(8, "little")).decode()


def _crc64_table() -> Iterator[int]:
    for value in range(256):
        for _ in range(8):
            value = (value >> 1) ^ (0x9A6C9329AC4BC9B5 if value & 1 else 0)
        yield value


_CRC64 = tuple(_crc64_table())


def _verify_checksums(request: Request) -> dict[str, str]:
    """Compare the body with the checksums of the request, which are also those of the response."""
    checks = {}
    if sent := request.headers.get("content-md5"):
        if sent != md5_header(request.body):
            raise ServiceError(400, "Md5Mismatch")
        checks["Content-MD5"] = sent
    if sent := request.headers.get("x-ms-content-crc64"):
        if sent != crc64_header(request.body):
            raise ServiceError(400, "Crc64Mismatch")
        checks["x-ms-content-crc64"] = sent
    return checks


def _may_proceed(blob: StoredBlob | None, headers: Mapping[str, str]) -> bool:
    """Check If-Match and If-Unmodified-Since, and for writes If-None-Match and If-Modified-Since."""
    if (wanted := headers.get("if-match")) is not None and (blob is None or not _names(wanted, blob)):
        return False
    if blob is None:
        return True
    if (unwanted := headers.get("if-none-match")) is not None and _names(unwanted, blob):
        return False
    modified = blob.modified.replace(microsecond=0)
    if (since := headers.get("if-modified-since")) is not None and modified <= parsedate_to_datetime(since):
        return False
    since = headers.get("if-unmodified-since")
    return since is None or modified <= parsedate_to_datetime(since)


def _is_unmodified_for_reader(blob: StoredBlob, headers: Mapping[str, str]) -> bool:
    """Reads respond with 304 where writes respond with 412."""
    only = {name: headers[name] for name in ("if-none-match", "if-modified-since") if name in headers}
    return not _may_proceed(blob, only)


def _names(header: str, blob: StoredBlob) -> bool:
    return header.strip() == "*" or blob.etag in (etag.strip() for etag in header.split(","))


def _settings(request: Request) -> dict[str, str]:
    return {name: request.headers[header] for header, name in _SETTINGS.items() if request.headers.get(header)}


def _metadata(request: Request) -> dict[str, str]:
    prefix = "x-ms-meta-"
    return {name[len(prefix) :]: value for name, value in request.headers.items() if name.startswith(prefix)}


def _name_xml(tag: str, name: str) -> str:
    if _INVALID_IN_XML.search(name):
        return f'<{tag} Encoded="true">{quote(name)}</{tag}>'
    # An unescaped carriage return would be read as a line feed.
    return f"<{tag}>{escape(name, {chr(13): '&#13;'})}</{tag}>"


def _read_marker(marker: str) -> str:
    if not marker:
        return ""
    serial, separator, start = marker.partition("!")
    try:
        if not (serial.isdigit() and separator):
            raise ValueError(marker)
        return base64.urlsafe_b64decode(start).decode()
    except ValueError:
        raise ServiceError(400, "InvalidQueryParameterValue") from None


def _etag(tick: int) -> str:
    return f'"0x8D{tick & 0xFFFFFFFFFFFFF:013X}"'


def _moment(tick: int) -> datetime:
    return datetime.fromtimestamp(tick / 1e7, timezone.utc)


def _stamp(tick: int) -> str:
    """A snapshot or version id: a time with seven decimal places."""
    return f"{datetime.fromtimestamp(tick // 10**7, timezone.utc):%Y-%m-%dT%H:%M:%S}.{tick % 10**7:07d}Z"


def _http_date(moment: datetime) -> str:
    return format_datetime(moment, usegmt=True)
