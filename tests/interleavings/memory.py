"""A blob service in memory that replaces `transport.send`: one call is one request, carried out at once."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import TracebackType
from urllib.parse import parse_qs, unquote
from xml.sax.saxutils import escape

ACCOUNT = "account"


@dataclass(frozen=True)
class Stored:
    data: bytes
    etag: str
    notes: tuple[tuple[str, str], ...] = ()
    blocks: tuple[str, ...] = ()


@dataclass(frozen=True)
class Wire:
    """One request."""

    method: str
    name: str  # of the blob, or the prefix of a listing
    query: Mapping[str, list[str]]
    headers: Mapping[str, str]
    body: bytes

    @property
    def is_listing(self) -> bool:
        return self.query.get("comp") == ["list"]

    @property
    def is_write(self) -> bool:
        return self.method in ("PUT", "DELETE")

    @property
    def is_staging(self) -> bool:
        return self.method == "PUT" and self.query.get("comp") == ["block"]

    def __str__(self) -> str:
        return f"{'LIST' if self.is_listing else 'STAGE' if self.is_staging else self.method} {self.name}"


class Answer:
    """What `transport.send` returns."""

    def __init__(self, status: int, headers: Mapping[str, str], body: bytes = b"") -> None:
        self.status = status
        self.reason = ""
        self.headers = {name.lower(): value for name, value in headers.items()}
        self.headers = _Headers(self.headers)
        self.length: int | None = len(body)
        self._body = memoryview(body)

    def readinto(self, target: memoryview) -> int:
        count = min(len(target), len(self._body))
        target[:count] = self._body[:count]
        self._body = self._body[count:]
        self.length = len(self._body)
        return count

    def read(self) -> bytes:
        data, self._body, self.length = bytes(self._body), memoryview(b""), 0
        return data

    def close(self) -> None:
        """Do nothing: connections do not exist here."""

    def __enter__(self) -> Answer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Do nothing: connections do not exist here."""


class _Headers(dict[str, str]):
    def __getitem__(self, name: str) -> str:
        return super().__getitem__(name.lower())

    def get(self, name: str, default: str | None = None) -> str | None:  # type: ignore[override]
        return super().get(name.lower(), default)

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and super().__contains__(name.lower())


def wire(method: str, target: str, headers: Mapping[str, str], body: object) -> Wire:
    path, _, query = target.partition("?")
    parsed = parse_qs(query, keep_blank_values=True)
    name = unquote(path.split("/", 3)[3]) if path.count("/") > 2 else parsed.get("prefix", [""])[0]
    if isinstance(body, (bytes, memoryview)):
        data = bytes(body)
    else:
        data = b"".join(bytes(piece) for piece in body or ())  # type: ignore[attr-defined]
    return Wire(method, name, parsed, {key.lower(): value for key, value in headers.items()}, data)


@dataclass(frozen=True)
class Reply:
    """The reply to one request; without a status the response is lost. Equal replies have the same effect."""

    status: int
    headers: tuple[tuple[str, str], ...] = ()
    body: bytes = b""
    is_head: bool = False

    def answer(self) -> Answer:
        """The response for the client, which consumes it."""
        if not self.status:
            raise ConnectionResetError("the answer was lost")
        found = Answer(self.status, dict(self.headers), self.body)
        if self.is_head:
            found.length = 0
        return found


LOST = Reply(0)


@dataclass
class Memory:
    """The blobs of one container, and every change of metadata.

    Nothing in it depends on the order of writes to different data blobs, so orders that differ in that alone lead to
    equal memories.
    """

    blobs: dict[str, Stored] = field(default_factory=dict)
    staged: dict[str, tuple[tuple[str, bytes], ...]] = field(default_factory=dict)  # uncommitted blocks of each blob
    history: tuple[tuple[str, bytes | None], ...] = ()  # of metadata blobs
    writes: dict[str, int] = field(default_factory=dict)  # of each blob

    def copy(self) -> Memory:
        return Memory(dict(self.blobs), dict(self.staged), self.history, dict(self.writes))

    @property
    def key(self) -> object:
        """A key that is equal for equal memories."""
        return (
            frozenset(self.blobs.items()),
            frozenset(self.staged.items()),
            self.history,
            frozenset(self.writes.items()),
        )

    def serve(self, request: Wire) -> Reply:
        if request.is_listing:
            return Reply(200, (), self._page(request))
        stored = self.blobs.get(request.name)
        is_new_only = request.headers.get("if-none-match") == "*"
        wanted = request.headers.get("if-match")
        if request.is_staging:
            return self._stage(request)
        if request.method == "PUT":
            if is_new_only and stored is not None:
                return _refusal(409, "BlobAlreadyExists")
            if wanted is not None and (stored is None or stored.etag != wanted):
                return _refusal(412, "ConditionNotMet")
            number = self.writes.get(request.name, 0) + 1
            notes = tuple((key, value) for key, value in request.headers.items() if key.startswith("x-ms-meta-"))
            data, blocks = request.body, ()
            if request.query.get("comp") == ["blocklist"]:
                blocks = tuple(re.findall("<Latest>(.*?)</Latest>", request.body.decode()))
                staged = dict(self.staged.get(request.name, ()))
                if not all(block in staged for block in blocks):
                    return _refusal(400, "InvalidBlockList")
                data = b"".join(staged[block] for block in blocks)
            stored = Stored(data, f'"0x{number}"', notes, blocks)
            self._set(request.name, stored)
            return Reply(201, (("ETag", stored.etag),))
        if stored is None:
            return _refusal(404, "BlobNotFound")
        if wanted is not None and stored.etag != wanted:
            return _refusal(412, "ConditionNotMet")
        if request.method == "DELETE":
            self._set(request.name, None)
            return Reply(202)
        headers = (("ETag", stored.etag), *stored.notes)
        if request.query.get("comp") == ["blocklist"]:
            names = "".join(f"<Block><Name>{block}</Name></Block>" for block in stored.blocks)
            whole = f"<BlockList><CommittedBlocks>{names}</CommittedBlocks></BlockList>"
            return Reply(200, headers, whole.encode())
        if request.method == "HEAD":
            return Reply(200, (*headers, ("Content-Length", str(len(stored.data)))), is_head=True)
        found = re.fullmatch(r"bytes=(\d+)-(\d+)", request.headers["x-ms-range"])
        assert found is not None
        start, stop = int(found[1]), min(int(found[2]) + 1, len(stored.data))
        if start >= len(stored.data):
            return Reply(416, (("Content-Range", f"bytes */{len(stored.data)}"),))
        span = f"bytes {start}-{stop - 1}/{len(stored.data)}"
        return Reply(206, (*headers, ("Content-Range", span)), stored.data[start:stop])

    def _stage(self, request: Wire) -> Reply:
        """Put Block, or Put Block From URL."""
        data = request.body
        source = request.headers.get("x-ms-copy-source")
        if source is not None:
            found = self.blobs.get(unquote(source.partition("?")[0].split("/", 5)[5]))
            if found is None:
                return _refusal(404, "CannotVerifyCopySource")
            if request.headers.get("x-ms-source-if-match", found.etag) != found.etag:
                return _refusal(412, "SourceConditionNotMet")
            first, last = request.headers["x-ms-source-range"].removeprefix("bytes=").split("-")
            if int(last) >= len(found.data):
                return _refusal(416, "InvalidRange")
            data = found.data[int(first) : int(last) + 1]
        (block_id,) = request.query["blockid"]
        blocks = {**dict(self.staged.get(request.name, ())), block_id: data}
        self.staged[request.name] = tuple(sorted(blocks.items()))
        return Reply(201)

    def _set(self, name: str, stored: Stored | None) -> None:
        if stored is not None:
            self.writes[name] = self.writes.get(name, 0) + 1
            self.staged.pop(name, None)
        if name.endswith(".metadata"):
            self.history += ((name, stored.data if stored is not None else None),)
        if stored is None:
            self.blobs.pop(name, None)
        else:
            self.blobs[name] = stored

    def _page(self, request: Wire) -> bytes:
        delimiter = request.query.get("delimiter", [""])[0]
        entries: dict[str, str] = {}
        is_with_staged = "uncommittedblobs" in request.query.get("include", [""])[0]
        for name in sorted({*self.blobs, *(self.staged if is_with_staged else ())}):
            if not name.startswith(request.name):
                continue
            head, found, _ = name[len(request.name) :].partition(delimiter or "\0")
            if found:
                folder = request.name + head + delimiter
                entries[folder] = f"<BlobPrefix><Name>{escape(folder)}</Name></BlobPrefix>"
            else:
                stored = self.blobs.get(name, Stored(b"", ""))
                entries[name] = (
                    f"<Blob><Name>{escape(name)}</Name><Properties><Content-Length>{len(stored.data)}</Content-Length>"
                    f"<Etag>{stored.etag}</Etag></Properties></Blob>"
                )
        return (
            f'<?xml version="1.0" encoding="utf-8"?><EnumerationResults><Blobs>{"".join(entries.values())}</Blobs>'
            "<NextMarker /></EnumerationResults>"
        ).encode()


def _refusal(status: int, code: str) -> Reply:
    return Reply(status, (("x-ms-error-code", code),))
