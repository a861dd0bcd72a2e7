"""The fault matrix as data: the faults, the affected requests, and the required outcomes.

A row is a fault; a column is an operation of `operations`. In each cell the fault affects every kind of request that
the operation sends and the row selects, one kind at a time: sometimes, where the result must be right or the named
error, and always, where the named error must be raised within the time for retries.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.distributed.checkpoint as dcp

from .effects import inverted
from .faults import (
    ChangedEtag,
    Chunked,
    ConnectionRefused,
    EmptyPageWithMarker,
    Fault,
    FullInsteadOfPartial,
    GarbageStatusLine,
    Hangup,
    LostAnswer,
    MalformedXml,
    Match,
    MissingHeader,
    Redirect,
    RepeatedMarker,
    Reset,
    ResetInHeaders,
    ResetUpload,
    Rule,
    SlowBytes,
    StaleConnection,
    Stall,
    Status,
    Torn,
    TornReset,
    WrongBytes,
    WrongContentRange,
    WrongHeader,
    WrongLength,
)
from .operations import BLOB, CHECKPOINT, CONTAINER, FOLDER, MODEL, NUMEL, SET_SIZES, SIZE, bytes_of, content, state
from .service import FaultService

RIGHT = "right"

GET, META, LIST, HEAD, PUT, COMMIT = "get", "get metadata", "list", "head", "put", "commit"
READ = (GET, META)
ANSWERED = (*READ, LIST)  # requests whose responses have a body
ALL = (*ANSWERED, HEAD, PUT, COMMIT)

READ_TIMEOUT = 60.0  # seconds, of the tested transfers; above what a busy machine needs for an answer
SHORT_TIMEOUT = 0.5  # the same where something stalls
STALL = 60.0  # ends with the client's connection


@dataclass(frozen=True)
class Row:
    """A fault, its required outcomes, and settings of its transfers.

    ``sometimes`` and ``always`` are `RIGHT` or the name of the error that must be in the chain. ``always`` is None if
    the fault makes no sense for every request.
    """

    name: str
    fault: Fault
    sometimes: str
    always: str | None
    kinds: tuple[str, ...] = ALL
    nth: int = 1  # the first affected request, for ``sometimes``
    times: int = 3  # every how many requests
    transfer: dict[str, Any] = field(default_factory=dict)
    few_tries: int | None = None  # what *always* makes, where each takes long
    needs_token: bool = False
    overrides: dict[tuple[str, str], str] = field(default_factory=dict)  # (operation, kind) -> instead of sometimes
    is_carried_out: bool = False  # only the response is affected, so a commit with this fault has taken effect
    is_ours_alone: bool = False  # needs an option that the published connector lacks

    def expected(self, operation: str, kind: str, *, is_always: bool) -> str:
        if kind == COMMIT and is_always and self.is_carried_out:
            return RIGHT
        special = self.overrides.get((operation, kind))
        outcome = special or (self.always if is_always else self.sometimes)
        assert outcome is not None
        return outcome


RESPONSE, HTTP, AUTH = "ServiceResponseError", "HttpResponseError", "ClientAuthenticationError"
_STALLS: dict[str, Any] = {"transfer": {"read_timeout": SHORT_TIMEOUT}, "few_tries": 2}
_HEDGED: dict[str, Any] = {"transfer": {"hedge_after": 0.05, "hedge_budget": 0.5}, "is_ours_alone": True}
_SMALL = ("epoch", "epoch, 2 workers", "pipes")  # one request for each blob
_CHANGED = {(operation, GET): RIGHT for operation in _SMALL}

ROWS = [
    Row("503", Status(503), RIGHT, HTTP),
    Row("503 with Retry-After: 1", Status(503, retry_after=1), RIGHT, HTTP, times=1, few_tries=2),
    Row("429", Status(429), RIGHT, HTTP),
    Row("throttled account", Status(503), RIGHT, None, times=40),  # every other request
    Row("throttled account with Retry-After", Status(503, retry_after_ms=30), RIGHT, None, times=40),
    Row("500", Status(500), RIGHT, HTTP),
    Row("408", Status(408), RIGHT, HTTP),
    Row("connection refused", ConnectionRefused(0.01), RIGHT, RESPONSE, transfer={"max_backoff": 0.4}),
    Row("reset before the response", Reset(), RIGHT, RESPONSE),
    Row("connection closed before the response", Hangup(), RIGHT, RESPONSE),
    Row("reset in the headers", ResetInHeaders(), RIGHT, RESPONSE, is_carried_out=True),
    Row("reset in the body", TornReset(5000), RIGHT, RESPONSE, ANSWERED),
    Row("reset while sending", ResetUpload(1000), RIGHT, RESPONSE, (PUT, COMMIT)),
    Row("closed after the body", StaleConnection(), RIGHT, RIGHT),
    Row("reset after the body", StaleConnection(reset=True), RIGHT, RIGHT),
    Row("closed on the next request", StaleConnection(on_next_request=True), RIGHT, RIGHT),
    Row("body cut short", Torn(5000), RIGHT, RESPONSE, ANSWERED),
    Row("stall before the response", Stall(STALL, None), RIGHT, RESPONSE, times=1, is_carried_out=True, **_STALLS),
    Row("stall in the body", Stall(STALL, 300), RIGHT, RESPONSE, ANSWERED, times=1, **_STALLS),
    Row("stall before the answer, hedged", Stall(STALL, None), RIGHT, None, (*ANSWERED, HEAD, PUT), times=1, **_HEDGED),
    Row("stall in the body, hedged", Stall(STALL, 300), RIGHT, None, ANSWERED, times=1, **_HEDGED),
    Row("slow drip, hedged", SlowBytes(30_000), RIGHT, None, ANSWERED, times=2, **_HEDGED),
    Row("everything is late, hedged", Stall(0.15, None), RIGHT, RIGHT, (*ANSWERED, HEAD, PUT), **_HEDGED),
    Row("slow bytes", SlowBytes(300_000), RIGHT, RIGHT, ANSWERED),
    Row("wrong Content-Range", WrongContentRange(), RIGHT, RESPONSE, READ),
    Row("Content-Length too long", WrongLength(10), RIGHT, RESPONSE, ANSWERED),
    Row("Content-Length too short", WrongLength(-10), RIGHT, RESPONSE, ANSWERED),
    Row("no Content-Length", MissingHeader("Content-Length"), RIGHT, RIGHT, ANSWERED),
    Row("chunked", Chunked(), RIGHT, RIGHT, ANSWERED),
    Row("200 instead of 206", FullInsteadOfPartial(), RIGHT, RESPONSE, READ),
    Row("no ETag", MissingHeader("ETag"), RIGHT, RESPONSE, READ),
    Row("overwritten before it is read", ChangedEtag(), RIGHT, None, READ, times=1, overrides={
        ("torch.load", GET): "UnpicklingError",  # inverted bytes are not an archive
        ("dcp.load", GET): "CheckpointError",
        ("dcp.load", META): "CheckpointError",
    }),
    Row("overwritten between parts", ChangedEtag(), "BlobChangedError", None, (GET,), 2, 1, overrides=_CHANGED),
    Row("overwritten, If-Match ignored", ChangedEtag(ignores_conditions=True), "BlobChangedError", None, (GET,), 2, 1,
        overrides=_CHANGED),
    Row("response to another request", WrongHeader("x-ms-client-request-id", "other"), RIGHT,
        "ClientRequestIdMismatchError", is_carried_out=True),
    Row("401 until the token is renewed", Status(401), RIGHT, AUTH, times=1, needs_token=True),
    Row("403", Status(403), AUTH, AUTH),
    Row("404", Status(404), "ResourceNotFoundError", "ResourceNotFoundError", (*READ, LIST, PUT, COMMIT), overrides={
        ("dcp.load", META): "CheckpointNotFoundError",
    }),
    Row("409", Status(409, "LeaseIdMismatchWithBlobOperation"), HTTP, HTTP),
    Row("412", Status(412), "ResourceModifiedError", "ResourceModifiedError", (LIST, HEAD, PUT, COMMIT)),
    Row("412 to a read", Status(412), "BlobChangedError", "BlobChangedError", READ),
    Row("redirect to another host", Redirect("http://127.0.0.1:9"), HTTP, HTTP),
    Row("malformed list XML", MalformedXml(), RIGHT, RESPONSE, (LIST,)),
    Row("incomplete list XML", MalformedXml(b"<EnumerationResults><Blobs><Blob></Blobs></EnumerationResults>"),
        RESPONSE, RESPONSE, (LIST,)),
    Row("empty page with marker", EmptyPageWithMarker(), RIGHT, None, (LIST,), times=4),
    Row("repeated marker", RepeatedMarker(), RESPONSE, RESPONSE, (LIST,)),
    Row("commit with a lost response", LostAnswer(), RIGHT, RIGHT, (COMMIT,), is_carried_out=True),
    Row("block with a lost response", LostAnswer(), RIGHT, RESPONSE, (PUT,), is_carried_out=True),
    Row("garbage status line", GarbageStatusLine(), RIGHT, RESPONSE, is_carried_out=True),
    Row("other bytes, same length", WrongBytes(), RIGHT, RESPONSE, READ, transfer={"validate_content": True},
        is_ours_alone=True),
]  # fmt: skip
"""Every fault of the specification, and a few more that services and proxies were seen to have."""


# The requests of an operation by kind. A row does not test kinds that the operation lacks.
_DATASET = {GET: Match("get_blob"), LIST: Match("list_blobs")}
TARGETS: dict[str, dict[str, Match]] = {
    "read all": {GET: Match("get_blob")},
    "readinto": {GET: Match("get_blob")},
    "small reads": {GET: Match("get_blob")},
    "torch.load": {GET: Match("get_blob")},
    "torch.save": {PUT: Match("put_block"), COMMIT: Match("put_block_list")},
    "torch.save, one block": {COMMIT: Match("put_blob")},
    "epoch": _DATASET,
    "epoch, 2 workers": _DATASET,
    "pipes": _DATASET,
    "dcp.save": {
        HEAD: Match("head"),
        PUT: Match(method="PUT", path=r"\.distcp$"),
        COMMIT: Match(method="PUT", path=r"\.metadata$"),
    },
    "dcp.load": {GET: Match("get_blob", path=r"\.distcp$"), META: Match("get_blob", path=r"\.metadata$")},
}
OUTERMOST = {
    "torch.save": ("FatalBlobIOWriteError", "RuntimeError"),  # torch can raise another error about its file
    "torch.save, one block": ("FatalBlobIOWriteError",),
    "dcp.save": ("CheckpointException",),
    "dcp.load": ("CheckpointException",),
}
"""The errors that the user sees, where it is not the cause itself. The first is in the chain in any case."""


@dataclass(frozen=True)
class Cell:
    """One fault in one kind of request of one operation."""

    row: Row
    operation: str
    kind: str
    is_always: bool

    @property
    def expected(self) -> str:
        return self.row.expected(self.operation, self.kind, is_always=self.is_always)

    @property
    def may_be_right(self) -> bool:
        """Whether it may end well. One thread reads many small blobs; what it is refused, another thread asks again."""
        return self.expected == RIGHT or (not self.is_always and self.kind == GET and self.operation in _SMALL)

    @property
    def name(self) -> str:
        return f"{self.row.name}, {'always' if self.is_always else 'now and then'}"

    def script(self, service: FaultService) -> Rule:
        match = TARGETS[self.operation][self.kind]
        if self.is_always:
            return service.script(match, [self.row.fault], repeat=True)
        spaced = replace(match, nth=self.row.nth, every=2)
        return service.script(spaced, [self.row.fault] * self.row.times)


def cells(row: Row, operation: str) -> Iterator[Cell]:
    for kind in row.kinds:
        if kind in TARGETS[operation]:
            yield Cell(row, operation, kind, False)
            if row.always is not None:
                yield Cell(row, operation, kind, True)


def fill(service: FaultService, operation: str) -> None:
    """Create the blobs for *operation*."""
    service.create_container(CONTAINER)
    if operation in ("read all", "readinto", "small reads"):
        service.put(CONTAINER, BLOB, content(SIZE))
    elif operation.startswith("torch."):
        service.put(CONTAINER, MODEL, saved(state(1)))
    elif operation.startswith("dcp."):
        for name, data in old_checkpoint().items():
            service.put(CONTAINER, f"{CHECKPOINT}/{name}", data)
    else:
        for number, size in enumerate(SET_SIZES):
            service.put(CONTAINER, f"{FOLDER}{number:02d}", content(size, number))


def saved(values: dict[str, torch.Tensor]) -> bytes:
    sink = io.BytesIO()
    torch.save(values, sink)
    return sink.getvalue()


def old_checkpoint() -> dict[str, bytes]:
    """A checkpoint written by torch itself."""
    if not _old_checkpoint:
        with TemporaryDirectory() as folder:
            dcp.save(state(1), storage_writer=dcp.FileSystemWriter(folder), no_dist=True)
            for path in sorted(Path(folder).iterdir()):
                _old_checkpoint[path.name] = path.read_bytes()
    return _old_checkpoint


_old_checkpoint: dict[str, bytes] = {}


def right_results(operation: str) -> list[bytes]:
    """The right results of *operation*: the old content of the blobs, or what they were overwritten with."""
    if operation in ("read all", "readinto", "small reads"):
        return [content(SIZE), inverted(content(SIZE))]
    if operation in ("torch.load", "dcp.load"):
        return [bytes_of(state(1))]
    if operation.endswith(("save", "block")):
        return [b""]
    sets = [content(size, number) for number, size in enumerate(SET_SIZES)]
    overwritten = [inverted(data) for data in sets]
    return [
        b"".join(sets),
        *(b"".join([*sets[:at], overwritten[at], *sets[at + 1 :]]) for at in range(len(sets))),
    ]


def stored(service: FaultService, operation: str) -> str:
    """The state after a save, read with torch: ``"old"``, ``"new"`` or what is wrong with it."""
    numel = 100 if operation.endswith("block") else NUMEL
    known = {bytes_of(state(1)): "old", bytes_of(state(2, numel)): "new"}
    try:
        if operation.startswith("torch."):
            values = torch.load(io.BytesIO(service.get(CONTAINER, MODEL)), weights_only=True)
        else:
            values = {key: torch.zeros_like(value) for key, value in state(1).items()}
            with TemporaryDirectory() as folder:
                for name in service.names(CONTAINER):
                    (Path(folder) / name.rpartition("/")[2]).write_bytes(service.get(CONTAINER, name))
                dcp.load(values, storage_reader=dcp.FileSystemReader(folder), no_dist=True)
        return known.get(bytes_of(values), "other values")
    except BaseException as error:  # noqa: BLE001 - any error means that the save has damaged the checkpoint
        return f"{type(error).__name__}: {error}"


def is_save(operation: str) -> bool:
    return OUTERMOST.get(operation) is not None and operation != "dcp.load"


@contextmanager
def serving(cell: Cell, context: Callable[[], Any]) -> Iterator[tuple[FaultService, Rule]]:
    """A service with the blobs and the fault of *cell*; *context* creates the TLS context if tokens are needed."""
    with FaultService(ssl_context=context() if cell.row.needs_token else None) as service:
        fill(service, cell.operation)
        if cell.row.needs_token:
            service.require_token("good", "fresh")
        yield service, cell.script(service)
