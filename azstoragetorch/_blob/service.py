"""Signed requests to one account, and the meaning of its answers.

Whatever is worth another try is raised as `Transient`; what the service refuses, as the azure-core error that it
stands for. Retrying is the caller's, who knows how far it got.
"""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Mapping
from typing import Any, NoReturn
from urllib.parse import quote

from azure.core.settings import settings
from azure.core.tracing import SpanKind
from azure.core.tracing.decorator import distributed_trace

from azstoragetorch._blob import transport
from azstoragetorch._blob.credentials import Authorizer, CredentialHolder
from azstoragetorch._blob.errors import connection_error, service_error
from azstoragetorch._blob.retry import Transient, is_connection_failure, refusal
from azstoragetorch._blob.transport import Body, Origin, Response
from azstoragetorch._blob.url import BlobURL
from azstoragetorch._engine.config import TransferConfig
from azstoragetorch._engine.engine import Cancelled, Scope
from azstoragetorch.exceptions import ClientRequestIdMismatchError

API_VERSION = "2023-11-03"  # the oldest with all that is used: versions, large blocks, encoded names in listings


class Service:
    """Requests to the account of *url* with one credential."""

    def __init__(self, url: BlobURL, credential: CredentialHolder, config: TransferConfig) -> None:
        self.config = config
        self.origin = Origin.of(url.scheme, url.host, config)
        self.authorizer: Authorizer = credential.authorizer(url)

    def send(
        self,
        method: str,
        url: BlobURL,
        *,
        query: str = "",
        headers: Mapping[str, str] | None = None,
        body: Body = None,
        accept: frozenset[int] = frozenset({200, 206}),
        scope: Scope | None = None,
    ) -> Response:
        """Send one signed request; an answer whose status is not in *accept* is raised.

        Where azure-core's tracing is on it is a span, as the SDK's own requests are.

        Raises:
            Transient: worth another try.
            AzureError: the service refused.
            Cancelled: *scope* was cancelled.
        """
        if not is_tracing():
            return self._send(method, url, query, headers, body, accept, scope)
        return self._send_traced(
            method,
            url,
            query,
            headers,
            body,
            accept,
            scope,
            tracing_attributes={"http.method": method, "http.url": str(url)},
        )

    def _send(
        self,
        method: str,
        url: BlobURL,
        query: str,
        headers: Mapping[str, str] | None,
        body: Body,
        accept: frozenset[int],
        scope: Scope | None,
    ) -> Response:
        query = "&".join(filter(None, (query, _state(url))))
        try:
            response = self.exchange(method, url.path, query, {**_own_headers(), **(headers or {})}, body, scope)
        except ClientRequestIdMismatchError as error:
            raise Transient(error) from None
        except BaseException as error:  # noqa: BLE001 - sorted by fail
            fail(method, url, error, scope)
        if response.status not in accept:
            self._refuse(method, url, response)
        return response

    @distributed_trace(name_of_span="azstoragetorch.request", kind=SpanKind.CLIENT)
    def _send_traced(self, *arguments: Any, **_of_the_span: Any) -> Response:
        return self._send(*arguments)

    def exchange(
        self, method: str, path: str, query: str, headers: Mapping[str, str], body: Body, scope: Scope | None
    ) -> Response:
        """Sign and send one request; once more with a new token if the service does not accept the one at hand.

        Raises:
            OSError, http.client.HTTPException: the connection failed.
            ClientRequestIdMismatchError: the answer belongs to another request.
            AzureError: no token could be had.
            Cancelled: *scope* was cancelled.
        """
        has_renewed = False
        while True:
            proof = self.authorizer.headers()
            target = self._target(path, query)
            response = transport.send(self.origin, method, target, {**headers, **proof}, body=body, scope=scope)
            if response.status != 401 or has_renewed or not self.authorizer.renew(proof):
                return response
            has_renewed = True  # it was revoked, or expired on the way
            response.close()

    def signed(self, url: BlobURL, headers: Mapping[str, str]) -> tuple[str, dict[str, str]]:
        """The target and the headers of a signed GET, for those who send it themselves.

        Raises:
            AzureError: no token could be had.
        """
        return self._target(url.path, _state(url)), {**_own_headers(), **headers, **self.authorizer.headers()}

    def _target(self, path: str, query: str) -> str:
        signed = "&".join(filter(None, (query, self.authorizer.query())))
        return f"{path}?{signed}" if signed else path

    def _refuse(self, method: str, url: BlobURL, response: Response) -> NoReturn:
        with response:
            try:
                body = response.read()
            except Exception as error:  # noqa: BLE001 - the status alone has to do
                body = repr(error).encode()
        # In no variable: its traceback refers to this frame, and a circle would keep what waits for the answer.
        raise refusal(
            service_error(
                verb=method,
                url=str(url),
                status=response.status,
                reason=response.reason,
                headers=response.headers,
                body=body,
                anonymous=self.authorizer.is_anonymous,
            ),
            response.headers,
        )


def _state(url: BlobURL) -> str:
    """The part of the query that chooses an older state of the blob."""
    if url.versionid:
        return f"versionid={quote(url.versionid)}"
    return f"snapshot={quote(url.snapshot)}" if url.snapshot else ""


def _own_headers() -> dict[str, str]:
    return {
        "x-ms-version": API_VERSION,
        "x-ms-client-request-id": f"{_process}{next(_numbers):016x}",
        "User-Agent": transport.USER_AGENT,
    }


_process = os.urandom(8).hex()  # and a number name a request: that costs no system call each time
_numbers = itertools.count()


def _forget_parent() -> None:
    global _process
    _process = os.urandom(8).hex()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_parent)

_tracing = (0.0, False)  # when it was looked up last, and what was found: it costs as much as the rest of a request


def is_tracing() -> bool:
    global _tracing
    looked_up, is_on = _tracing
    if time.monotonic() - looked_up > 1.0:
        is_on = bool(settings.tracing_implementation() or settings.tracing_enabled())
        _tracing = time.monotonic(), is_on
    return is_on


def fail(method: str, url: BlobURL, error: BaseException, scope: Scope | None = None) -> NoReturn:
    """Raise what *error*, seen while talking to the service, means.

    Raises:
        Transient: a connection broke.
        Cancelled: it broke because *scope* was cancelled.
        AzureError: it cannot be made, now or later.
    """
    if scope is not None and scope.is_cancelled and is_connection_failure(error):
        raise Cancelled from None
    if is_connection_failure(error):
        raise Transient(connection_error(method, str(url), error, was_sent=True)) from error
    if isinstance(error, OSError):
        raise connection_error(method, str(url), error, was_sent=False) from error
    try:
        raise error
    finally:
        del error  # its traceback refers to this frame: a reference cycle would keep what waits for the answer
