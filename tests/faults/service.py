"""The fault service: enough of the Azure Blob REST API over real sockets, with scripted faults.

    with FaultService() as service:
        service.put("data", "blob", b"0123456789")
        service.script("get_blob", [Torn(after=3), Status(503)])
        ...  # read service.blob_url("data", "blob") with a client
        assert service.requests("get_blob")[1].status == 503

Blobs are in the memory of this process. A request without a fault gets the response of the real service.
"""

from __future__ import annotations

import itertools
import ssl
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from urllib.parse import quote, unquote

from . import faults as f
from .effects import End, Send, Until, Wait, alter_answer, alter_page, delivery, inverted
from .store import BlobStore, Request, ServiceError, error_xml, parse_range
from .wire import Answer, Bytes, Connection, Head, LoopbackServer

SERVICE_VERSION = "2025-05-05"
_LAST_SEND = 1 << 16  # bytes; a request counts as in flight until at most these are left to send

_ERROR_CODES = {
    400: "InvalidInput",
    401: "InvalidAuthenticationInfo",
    403: "AuthorizationFailure",
    404: "BlobNotFound",
    408: "RequestTimeout",
    409: "BlobAlreadyExists",
    412: "ConditionNotMet",
    429: "TooManyRequests",
    500: "InternalError",
    503: "ServerBusy",
}
_CHALLENGE = (
    "Bearer authorization_uri=https://login.microsoftonline.com/"
    "00000000-0000-0000-0000-000000000000/oauth2/authorize "
    "resource_id=https://storage.azure.com"
)


@dataclass(slots=True, eq=False)
class LoggedRequest:
    """One received request and its outcome, which is updated while the request is in flight."""

    number: int  # from 1, in order of arrival
    connection: int
    time: float  # time.monotonic() when the headers were received
    operation: str
    method: str
    target: str
    headers: Mapping[str, str]  # names in lower case
    query: Mapping[str, str]
    container: str
    blob: str
    body_length: int = 0  # bytes of body received
    fault: f.Fault | None = None
    status: int | None = None  # None if no status line was sent
    is_carried_out: bool = False  # as far as the fault lets it be; the answer may still have to be sent
    sent: int = 0  # bytes of body handed to the socket, or about to be
    finished: float | None = None  # time.monotonic() just before the last bytes of the response

    @property
    def path(self) -> str:
        """The path as it was sent, percent-encoded."""
        return self.target.partition("?")[0]

    @property
    def decoded_path(self) -> str:
        return unquote(self.path)

    @property
    def range(self) -> tuple[int, int | None] | None:
        """The first byte and the one after the last (None: to the end) of the range; None without a valid range."""
        try:
            return parse_range(self.headers)
        except ServiceError:
            return None


class FaultService(LoopbackServer):
    """A blob service on loopback whose faults are scripted.

    Tests can access everything: blobs, uncommitted blocks, every request, every connection.
    """

    def __init__(
        self,
        *,
        ssl_context: ssl.SSLContext | None = None,
        account: str = "devstoreaccount1",
        host: str = "127.0.0.1",
        versioning: bool = False,
        hierarchical: bool = False,
    ) -> None:
        self.account = account
        self.store = BlobStore(versioning=versioning, hierarchical=hierarchical)
        self.latency = 0.0  # seconds before every response
        self.log: list[LoggedRequest] = []
        self.keeps_log = True  # turned off by tests that measure memory over many requests
        self.active = 0  # requests in flight now
        self.peak_active = 0  # the maximum since the log was reset
        self._rules: list[f.Rule] = []
        self._tokens: set[str] | None = None
        self._sas: str | None = None
        self.challenge = _CHALLENGE  # WWW-Authenticate of responses to a missing or rejected token
        self._numbers = itertools.count(1)
        self._book = threading.Lock()  # of the log, the rules and the counters
        super().__init__(ssl_context=ssl_context, host=host)
        self.origin = f"{'https' if ssl_context else 'http'}://{self.address}"
        self.url = f"{self.origin}/{account}"

    # ---- URLs

    def container_url(self, container: str) -> str:
        return f"{self.url}/{container}"

    def blob_url(self, container: str, name: str, **query: str) -> str:
        tail = "&".join(f"{key}={quote(value, safe='')}" for key, value in query.items())
        return f"{self.url}/{container}/{quote(name, safe='/~')}" + (f"?{tail}" if tail else "")

    # ---- blobs

    def create_container(self, container: str) -> None:
        """Create the container if it does not exist. `put` calls this too."""
        self.store.create_container(container)

    def put(self, container: str, name: str, data: Bytes, *, metadata: Mapping[str, str] | None = None) -> str:
        """Set the content of the blob, bypassing scripts and log; return its quoted ETag."""
        return self.store.put(container, name, bytes(data), metadata=metadata).etag

    def get(self, container: str, name: str) -> bytes:
        """The content of the committed blob; KeyError if it does not exist."""
        blob = self.store.find(container, name)
        if blob is None:
            raise KeyError(f"{container}/{name}")
        return bytes(blob.data)

    def exists(self, container: str, name: str) -> bool:
        return self.store.find(container, name) is not None

    def delete(self, container: str, name: str) -> None:
        self.store.delete(container, name)

    def names(self, container: str) -> list[str]:
        """The sorted names of the committed blobs."""
        return self.store.names(container)

    def uncommitted(self, container: str, name: str) -> dict[str, bytes]:
        """The uncommitted blocks, by block id."""
        return self.store.uncommitted(container, name)

    def snapshot(self, container: str, name: str) -> str:
        """Create a snapshot; return its id, for `snapshot=` in a URL."""
        return self.store.snapshot(container, name)

    # ---- authorization

    def allow_anonymous(self) -> None:
        """The default: credentials are neither required nor checked."""
        self._tokens = self._sas = None

    def require_token(self, *accepted: str) -> None:
        """Respond with 401 unless the bearer token is one of *accepted*. Can be called again while requests run."""
        self._tokens, self._sas = set(accepted), None

    def require_sas(self, sig: str) -> None:
        """Respond with 403 unless the decoded `sig` of the query is *sig*."""
        self._tokens, self._sas = None, sig

    # ---- script and log

    def script(self, match: f.Match | str, faults: Iterable[f.Fault], *, repeat: bool = False) -> f.Rule:
        """Apply *faults* to the requests that *match* selects, one each, in order; later requests have none.

        A string is the name of an operation. With *repeat* the faults repeat forever. If several rules match a request,
        the oldest applies and the others wait for their next request.
        """
        rule = f.Rule(f.Match(match) if isinstance(match, str) else match, tuple(faults), repeat)
        with self._book:
            self._rules.append(rule)
        return rule

    def clear_script(self) -> None:
        with self._book:
            self._rules.clear()

    def unused_faults(self) -> list[f.Rule]:
        """Rules with unused faults: usually the test does not test what it says."""
        with self._book:
            return [rule for rule in self._rules if not rule.is_exhausted]

    def requests(
        self,
        operation: str | None = None,
        *,
        method: str | None = None,
        path: str | None = None,
        status: int | None = None,
    ) -> list[LoggedRequest]:
        """The logged requests that match all given arguments; *path* is a regex for the decoded path."""
        match = f.Match(operation, method, path)
        with self._book:
            log = list(self.log)
        return [entry for entry in log if match.covers(entry) and status in (None, entry.status)]

    def reset_log(self) -> None:
        with self._book:
            self.log = []
            self.peak_active = self.active

    def wait_until_idle(self, timeout: float = 240.0) -> None:
        """Wait until no request is in flight; TimeoutError after *timeout* seconds."""
        _wait_until(lambda: self.active == 0, timeout, "requests are still in flight")

    def wait_for_requests(self, count: int, operation: str | None = None, timeout: float = 240.0) -> None:
        """Wait until *count* requests have arrived; TimeoutError after *timeout* seconds."""
        _wait_until(lambda: len(self.requests(operation)) >= count, timeout, f"fewer than {count} requests arrived")

    # ---- serving

    def serve(self, connection: Connection) -> None:
        while (head := connection.read_head()) is not None:
            entry = self._begin(connection, head)
            try:
                keeps_alive = self._respond(connection, head, entry)
            finally:
                self._finish(entry)
            if not keeps_alive or head.headers.get("connection", "").lower() == "close":
                return

    def _begin(self, connection: Connection, head: Head) -> LoggedRequest:
        container, blob = self._split(head.raw_path)
        query = head.query
        entry = LoggedRequest(
            number=next(self._numbers),
            connection=connection.number,
            time=time.monotonic(),
            operation=_operation(head, query, container, blob),
            method=head.method,
            target=head.target,
            headers=head.headers,
            query=query,
            container=container,
            blob=blob,
        )
        with self._book:
            if self.keeps_log:
                self.log.append(entry)
            self.active += 1
            self.peak_active = max(self.peak_active, self.active)
            for rule in self._rules:
                fault = rule.next_fault(entry, already_hit=entry.fault is not None)
                entry.fault = entry.fault or fault
        return entry

    def _finish(self, entry: LoggedRequest) -> None:
        with self._book:
            if entry.finished is None:
                entry.finished = time.monotonic()
                self.active -= 1

    def _respond(self, connection: Connection, head: Head, entry: LoggedRequest) -> bool:
        """Carry out one request and send the response; return False if the connection must end."""
        fault = entry.fault
        if isinstance(fault, f.ResetUpload):
            entry.body_length = len(connection.read_body(head, limit=fault.after))
            connection.reset_at_end()
            return False
        if isinstance(fault, f.Status) and fault.before_body:
            self._send(connection, entry, self._complete(entry, self._error_answer(entry, fault)))
            return False
        body = connection.read_body(head)
        entry.body_length = len(body)
        if self.latency:
            connection.wait(self.latency)
        if isinstance(fault, f.ConnectionRefused):
            connection.reset_at_end()
            connection.close()
            self.refuse_for(fault.seconds)
            return False
        if isinstance(fault, f.Together):
            while self.peak_active < fault.count:
                connection.wait(0.005)
        if isinstance(fault, f.Hold):
            while not fault.gate.wait(0.01):
                connection.wait(0)
        answer = alter_answer(fault, self._complete(entry, self._answer(entry, body)))
        entry.is_carried_out = True
        return self._send(connection, entry, answer)

    def _send(self, connection: Connection, entry: LoggedRequest, answer: Answer) -> bool:
        steps = list(delivery(entry.fault, answer))
        last = max((number for number, step in enumerate(steps) if isinstance(step, Send)), default=-1)
        for number, step in enumerate(steps):
            match step:
                case Send(data, body_bytes, status):
                    # The log is updated first: a client that has the response must find it complete.
                    entry.status = entry.status or status
                    entry.sent += body_bytes
                    if number == last:
                        split = max(0, len(data) - _LAST_SEND)
                        if split:
                            connection.send(memoryview(data)[:split])
                            data = memoryview(data)[split:]
                        self._finish(entry)
                    connection.send(data)
                case Wait(seconds):
                    connection.wait(seconds)
                case Until(gate):
                    while not gate.wait(0.01):
                        connection.wait(0)
                case End.FIN:
                    return False
                case End.RST:
                    connection.reset_at_end()
                    return False
                case End.FIN_ON_NEXT_REQUEST:
                    connection.wait_for_input()
                    return False
        return "close" not in answer.headers.get("Connection", "")

    def _answer(self, entry: LoggedRequest, body: Bytes) -> Answer:
        """Carry out the operation, as far as the fault of the request allows."""
        fault = entry.fault
        headers = entry.headers
        match fault:
            case f.Status():
                return self._error_answer(entry, fault)
            case f.Redirect(to, status):
                return Answer(status, {"Location": to.rstrip("/") + entry.target})
            case f.Reset() | f.Hangup():
                return Answer(500)
            case f.ChangedEtag(data, ignores_conditions):
                old = self.store.find(entry.container, entry.blob)
                if old is not None:
                    self.store.put(
                        entry.container,
                        entry.blob,
                        inverted(old.data) if data is None else data,
                        metadata=old.metadata,
                        settings={name: value for name, value in old.settings.items() if name != "Content-MD5"},
                    )
                if ignores_conditions:
                    headers = {name: value for name, value in headers.items() if not name.startswith("if-")}
            case f.FullInsteadOfPartial():
                dropped = (
                    "range",
                    "x-ms-range",
                    "x-ms-range-get-content-md5",
                    "x-ms-range-get-content-crc64",
                )
                headers = {name: value for name, value in headers.items() if name not in dropped}
        source = None
        if entry.operation in ("copy_blob", "put_block_from_url"):
            url, _, tail = headers["x-ms-copy-source"].partition("?")
            container, blob = self._split("/" + url.partition("://")[2].partition("/")[2])
            source = (url, container, blob, Head("GET", f"?{tail}", {}).query)
        request = Request(entry.operation, entry.container, entry.blob, entry.query, headers, body, source)
        try:
            self._check_credentials(request)
            if request.operation == "list_blobs":
                page = alter_page(fault, self.store.list_page(request), self.store)
                return self.store.render(page, self.url)
            return self.store.carry_out(request)
        except ServiceError as error:
            return self._error(entry, error)

    def _check_credentials(self, request: Request) -> None:
        if self._tokens is not None:
            scheme, _, token = request.headers.get("authorization", "").partition(" ")
            if scheme != "Bearer":
                raise ServiceError(401, "NoAuthenticationInformation", {"WWW-Authenticate": self.challenge})
            if token not in self._tokens:
                raise ServiceError(401, "InvalidAuthenticationInfo", {"WWW-Authenticate": self.challenge})
            is_copy = request.operation == "put_block_from_url" or "x-ms-requires-sync" in request.headers
            scheme, _, token = request.headers.get("x-ms-copy-source-authorization", "").partition(" ")
            if is_copy and (scheme != "Bearer" or token not in self._tokens):
                raise ServiceError(401, "CannotVerifyCopySource")
        if self._sas is not None:
            if request.query.get("sig") != self._sas:
                raise ServiceError(403, "AuthenticationFailed")
            if request.source is not None and request.source[3].get("sig") != self._sas:
                raise ServiceError(403, "CannotVerifyCopySource")

    def _error_answer(self, entry: LoggedRequest, fault: f.Status) -> Answer:
        headers = {}
        if fault.retry_after is not None:
            headers["Retry-After"] = f"{fault.retry_after:g}"
        if fault.retry_after_ms is not None:
            headers["x-ms-retry-after-ms"] = str(fault.retry_after_ms)
        if fault.code == 401:
            headers["WWW-Authenticate"] = _CHALLENGE
        if fault.before_body:
            headers["Connection"] = "close"
        code = fault.error_code or _ERROR_CODES.get(fault.code, f"Status{fault.code}")
        answer = self._error(entry, ServiceError(fault.code, code, headers))
        if fault.body is None or not answer.body:
            return answer
        return replace(answer, body=fault.body)

    def _error(self, entry: LoggedRequest, error: ServiceError) -> Answer:
        headers = {"x-ms-error-code": error.code, **error.headers}
        if entry.method == "HEAD" or error.status == 304:
            return Answer(error.status, headers)
        headers["Content-Type"] = "application/xml"
        return Answer(error.status, headers, error_xml(error.code, _request_id(entry)))

    def _complete(self, entry: LoggedRequest, answer: Answer) -> Answer:
        """Add the headers that every response has."""
        headers = {
            "Content-Length": str(len(answer.body)),
            "Server": "Windows-Azure-Blob/1.0 Microsoft-HTTPAPI/2.0",
            "x-ms-request-id": _request_id(entry),
            "x-ms-version": entry.headers.get("x-ms-version", SERVICE_VERSION),
            "Date": time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime()),
            **answer.headers,
        }
        if (client_id := entry.headers.get("x-ms-client-request-id")) is not None:
            headers["x-ms-client-request-id"] = client_id
        if entry.headers.get("connection", "").lower() == "close":
            headers["Connection"] = "close"
        if answer.status == 304:
            del headers["Content-Length"]
        return Answer(answer.status, headers, answer.body)

    def _split(self, raw_path: str) -> tuple[str, str]:
        """The container and blob of a path, with or without the account before them."""
        path = raw_path.removeprefix("/")
        account, _, rest = path.partition("/")
        if account == self.account:
            path = rest
        container, _, blob = path.partition("/")
        return unquote(container), unquote(blob)


def _request_id(entry: LoggedRequest) -> str:
    return f"00000000-0000-0000-0000-{entry.number:012d}"


def _operation(head: Head, query: Mapping[str, str], container: str, blob: str) -> str:
    comp, method = query.get("comp", ""), head.method
    if blob:
        names = {
            ("GET", ""): "get_blob",
            ("GET", "blocklist"): "get_block_list",
            ("HEAD", ""): "head",
            ("DELETE", ""): "delete",
            ("PUT", ""): "copy_blob" if "x-ms-copy-source" in head.headers else "put_blob",
            ("PUT", "block"): "put_block_from_url" if "x-ms-copy-source" in head.headers else "put_block",
            ("PUT", "blocklist"): "put_block_list",
            ("PUT", "metadata"): "set_metadata",
            ("PUT", "snapshot"): "snapshot_blob",
        }
    elif query.get("restype") == "account":
        names = {
            ("GET", "properties"): "get_account_information",
            ("HEAD", "properties"): "get_account_information",
        }
    elif container:
        names = {
            ("GET", "list"): "list_blobs",
            ("GET", ""): "get_container",
            ("HEAD", ""): "get_container",
            ("PUT", ""): "create_container",
            ("DELETE", ""): "delete_container",
        }
    else:
        names = {("GET", "list"): "list_containers", ("POST", "userdelegationkey"): "get_user_delegation_key"}
    return names.get((method, comp), "unknown")


def _wait_until(holds: Callable[[], bool], timeout: float, complaint: str) -> None:
    deadline = time.monotonic() + timeout
    while not holds():
        if time.monotonic() > deadline:
            raise TimeoutError(f"after {timeout} s {complaint}")
        time.sleep(0.002)
