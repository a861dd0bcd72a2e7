"""Sign and send requests to one account, and translate the errors.

Every request of this package is a `Request` that `Service.send` signs and sends. Errors are translated here and nowhere
else: a failure that may be retried is raised as `Transient`, a refusal of the service as the matching azure-core error.
The caller retries, since it knows how far the operation got.
"""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from http.client import HTTPException
from types import TracebackType
from typing import Any, NoReturn
from urllib.parse import quote

from azure.core.settings import settings
from azure.core.tracing import SpanKind
from azure.core.tracing.decorator import distributed_trace

from azstoragetorch._blob import transport
from azstoragetorch._blob.admission import Entry, admission_for
from azstoragetorch._blob.authorizers import Authorizer
from azstoragetorch._blob.connection import Body, Origin, length_of
from azstoragetorch._blob.credentials import CredentialHolder
from azstoragetorch._blob.errors import connection_error, service_error
from azstoragetorch._blob.head import HTTPResponse
from azstoragetorch._blob.retry import Transient, classify_refusal, is_connection_failure, retry_after
from azstoragetorch._blob.url import BlobURL
from azstoragetorch._engine.config import TransferConfig
from azstoragetorch._engine.hedging import hedging_for
from azstoragetorch._engine.metrics import THROTTLED
from azstoragetorch._engine.process import PerProcess
from azstoragetorch._engine.scope import Cancelled, Scope
from azstoragetorch.exceptions import ClientRequestIdMismatchError

# The oldest version with the features used here: versions, large blocks, encoded names in listings. It does not depend
# on the installed azure-storage-blob, so a service that does not know newer versions works with every release.
API_VERSION = "2023-11-03"

_OK = frozenset({200, 206})
_FAILURES = (OSError, HTTPException, ClientRequestIdMismatchError)  # what `transport` raises


@dataclass(frozen=True, slots=True)
class Request:
    """One request to the service, without its credential."""

    method: str
    url: BlobURL
    query: str = ""
    """Percent-encoded, without the snapshot or version, which are part of *url*."""
    headers: Mapping[str, str] | None = None
    body: Body = None
    accept: frozenset[int] = _OK
    """The statuses to return; any other status is raised as an error."""
    scope: Scope | None = None
    """Cancelling it interrupts the request."""
    purpose: str = ""
    """Named in errors after the method, if several operations use the same method."""
    on_repeat: Callable[[], None] | None = None
    """Called before the request is sent again because a pooled connection failed: it may have been carried out."""

    @property
    def can_be_hedged(self) -> bool:
        """Whether it may be sent twice at the same time: it reads, or stages a block, which is the same block then."""
        return self.method in ("GET", "HEAD") or self.purpose == "block"

    @property
    def verb(self) -> str:
        """The name of the operation in errors."""
        return f"{self.method} ({self.purpose})" if self.purpose else self.method


class ServiceResponse:
    """The response to a request, before its body is received. Leaving its ``with`` block releases the connection."""

    __slots__ = ("_request", "_response", "headers", "status")

    def __init__(self, request: Request, response: transport.Response) -> None:
        self._request = request
        self._response = response
        self.status = response.status
        self.headers = response.headers

    @property
    def length(self) -> int | None:
        """The number of bytes of the body still to be received, if the service has declared it."""
        return self._response.length

    def readinto(self, target: memoryview) -> int:
        """Receive up to ``len(target)`` bytes; fewer, or zero, only at the end of the body.

        Raises:
            Transient: the connection failed.
            Cancelled: the scope of the request was cancelled.
        """
        try:
            return self._response.readinto(target)
        except _FAILURES as error:
            _raise_translated(self._request, error)

    def read(self) -> bytes:
        """Receive the rest of the body. Raises the same errors as `readinto`."""
        try:
            return self._response.read()
        except _FAILURES as error:
            _raise_translated(self._request, error)

    def close(self, *, is_complete: bool = True) -> None:
        """Release the connection: return it to the pool, or close it if *is_complete* is false.

        If the rest of the body is small, it is received first, so that the connection can be reused.
        """
        if not is_complete:
            self._response.length = None
        self._response.close()

    def __enter__(self) -> ServiceResponse:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(is_complete=error is None)  # after an error the rest of the body is not trusted


class Service:
    """Sends requests to the account of *url* with one credential."""

    def __init__(self, url: BlobURL, credential: CredentialHolder, config: TransferConfig) -> None:
        self.config = config
        self.origin = Origin.of(url.scheme, url.host, config)
        self.hedging = hedging_for(url.scheme, url.host, config)
        self.authorizer: Authorizer = credential.authorizer(url, config.trusted_hosts)
        self.admission = admission_for(url.host, config)

    def send(self, request: Request) -> ServiceResponse:
        """Sign and send *request*; return when the response headers have arrived.

        If azure-core's tracing is enabled, the request is a span, like the requests of the SDK.

        Raises:
            Transient: the request failed and may be retried.
            AzureError: the service refused the request.
            Cancelled: the scope of *request* was cancelled.
        """
        if not is_tracing():
            return self._send(request)
        attributes = {"http.method": request.method, "http.url": str(request.url)}
        return self._send_traced(request, tracing_attributes=attributes)

    @distributed_trace(name_of_span="azstoragetorch.request", kind=SpanKind.CLIENT)
    def _send_traced(self, request: Request, **_of_the_span: Any) -> ServiceResponse:
        return self._send(request)

    def _send(self, request: Request) -> ServiceResponse:
        try:
            response, entry = self._exchange(request)
        except _FAILURES as error:
            _raise_translated(request, error)
        if response.status not in request.accept:
            self._refuse(request, response, entry)
        return ServiceResponse(request, response)

    def _exchange(self, request: Request) -> tuple[transport.Response, Entry]:
        """Sign and send *request*. If the credential is rejected, renew it and send the request once more."""
        query = "&".join(filter(None, (request.query, _version_query(request.url))))
        headers = {**_common_headers(), **(request.headers or {})}
        if request.body is not None:
            headers["Content-Length"] = str(length_of(request.body))
        has_renewed = False
        while True:
            entry = self.admission.enter(self.config, request.scope)
            proof, sas = self.authorizer.headers(), self.authorizer.query()
            response = transport.send(
                self.origin,
                request.method,
                _target(request.url.path, query, sas),
                {**headers, **proof},
                body=request.body,
                scope=request.scope,
                hedging=self.hedging if request.can_be_hedged and self.admission.pacing.is_free else None,
                kind=request.verb,
                on_repeat=request.on_repeat,
                note=self._note_rival,
            )
            self.note_status(entry.began, response.status, response.reason, response.headers)
            # A token is rejected with 401, an expired SAS with 403.
            if has_renewed or response.status not in ((401,) if proof else (401, 403)):
                return response, entry
            if not self.authorizer.renew(proof, sas, response.headers.get("WWW-Authenticate", "")):
                return response, entry
            has_renewed = True
            response.close()

    def note_status(self, began: float, status: int, reason: str, headers: Mapping[str, str]) -> None:
        """Report to the admission how a request was answered that was admitted, or sent once more, at *began*."""
        if status in THROTTLED:
            answer = f"{status} {headers.get('x-ms-error-code') or reason}"
            self.admission.refused(began, answer, retry_after(headers), self.config.max_connections)
            if self.hedging is not None and not self.admission.pacing.is_free:
                self.hedging.throttled()
        elif status < 500:
            self.admission.accepted(began)

    def _note_rival(self, began: float, raw: HTTPResponse) -> None:
        self.note_status(began, raw.status, raw.reason, raw.fields)

    def sign(self, url: BlobURL, headers: Mapping[str, str]) -> tuple[str, dict[str, str]]:
        """The request target and headers of a signed GET, for a caller that sends it itself.

        Raises:
            AzureError: the credential did not provide a token.
        """
        target = _target(url.path, _version_query(url), self.authorizer.query())
        return target, {**_common_headers(), **headers, **self.authorizer.headers()}

    def source_headers(self, url: BlobURL) -> dict[str, str]:
        """The headers of a request, to any account, that makes the service itself read the blob at *url*.

        They contain the credential: a SAS in the URL of the source, or a token.

        Raises:
            AzureError: the credential did not provide a token.
        """
        target = _target(url.path, _version_query(url), self.authorizer.query())
        headers = {"x-ms-copy-source": f"{url.scheme}://{url.host}{target}"}
        if token := self.authorizer.headers().get("Authorization"):
            headers["x-ms-copy-source-authorization"] = token
        return headers

    def _refuse(self, request: Request, response: transport.Response, entry: Entry) -> NoReturn:
        with response:
            try:
                body = response.read()
            except Exception as error:  # noqa: BLE001 - the status is enough for an error
                body = repr(error).encode()
        # Not stored in a variable: its traceback refers to this frame, and the reference cycle would keep the memory of
        # every waiting caller alive.
        raise classify_refusal(
            service_error(
                verb=request.verb,
                url=str(request.url),
                status=response.status,
                reason=response.reason,
                headers=response.headers,
                body=body,
                anonymous=self.authorizer.is_anonymous,
            ),
            response.headers,
            self.admission.refusal_of(entry),
        )


def _raise_translated(request: Request, error: Exception) -> NoReturn:
    """Translate *error*, one of `_FAILURES`, and raise it.

    Raises:
        Transient: the connection failed, or the response belongs to another request.
        Cancelled: the connection failed because the scope was cancelled.
        AzureError: the request failed and a retry cannot help.
    """
    if isinstance(error, ClientRequestIdMismatchError):
        raise Transient(error) from None
    if is_connection_failure(error):
        if request.scope is not None and request.scope.is_cancelled:
            raise Cancelled from None
        raise Transient(connection_error(request.verb, str(request.url), error, was_sent=True)) from error
    raise connection_error(request.verb, str(request.url), error, was_sent=False) from error


def _target(path: str, query: str, sas: str) -> str:
    sign = "&".join(filter(None, (query, sas)))
    return f"{path}?{sign}" if sign else path


def _version_query(url: BlobURL) -> str:
    """The part of the query that selects a snapshot or version."""
    if url.versionid:
        return f"versionid={quote(url.versionid)}"
    return f"snapshot={quote(url.snapshot)}" if url.snapshot else ""


def _common_headers() -> dict[str, str]:
    return {
        "x-ms-version": API_VERSION,
        "x-ms-client-request-id": f"{_prefix.get()}{next(_numbers):016x}",
        "User-Agent": transport.USER_AGENT,
    }


def _new_prefix() -> str:
    return os.urandom(8).hex()


_prefix = PerProcess(_new_prefix)  # a prefix and a number identify a request without a system call for each
_numbers = itertools.count()


class _Tracing:
    """Whether azure-core's tracing is enabled, checked once a second: a check costs as much as sending a request."""

    def __init__(self) -> None:
        self._found = (float("-inf"), False)  # time and result of the last check

    def is_on(self) -> bool:
        looked_up, is_on = self._found
        if time.monotonic() - looked_up > 1.0:
            is_on = bool(settings.tracing_implementation() or settings.tracing_enabled())
            self._found = time.monotonic(), is_on
        return is_on


_tracing = _Tracing()


def is_tracing() -> bool:
    """Whether azure-core's tracing is enabled, so that requests are spans."""
    return _tracing.is_on()
