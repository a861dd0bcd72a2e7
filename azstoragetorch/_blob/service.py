"""Signed requests to one account, and the meaning of its answers.

Whatever is worth another try is raised as `Transient`; what the service refuses, as the azure-core error that it
stands for. Retrying is the caller's, who knows how far it got.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import NoReturn

from azstoragetorch._blob import transport
from azstoragetorch._blob.config import TransferConfig
from azstoragetorch._blob.credentials import Authorizer, CredentialHolder
from azstoragetorch._blob.engine import Cancelled, Scope
from azstoragetorch._blob.errors import connection_error, service_error
from azstoragetorch._blob.retry import Transient, is_connection_failure, refusal
from azstoragetorch._blob.transport import Body, Origin, Response
from azstoragetorch._blob.url import BlobURL
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

        Raises:
            Transient: worth another try.
            AzureError: the service refused.
            Cancelled: *scope* was cancelled.
        """
        response = self._send(method, url, query, headers, body, scope)
        if response.status == 401 and self.authorizer.renew():
            response.close()  # a token that was revoked, or expired on the way: once more with a new one
            response = self._send(method, url, query, headers, body, scope)
        if response.status not in accept:
            self._refuse(method, url, response)
        return response

    def _send(
        self,
        method: str,
        url: BlobURL,
        query: str,
        headers: Mapping[str, str] | None,
        body: Body,
        scope: Scope | None,
    ) -> Response:
        state = f"snapshot={url.snapshot}" if url.snapshot else f"versionid={url.versionid}" if url.versionid else ""
        query = "&".join(filter(None, (query, state, self.authorizer.query())))
        signed = {
            "x-ms-version": API_VERSION,
            "x-ms-client-request-id": os.urandom(16).hex(),
            "User-Agent": transport.USER_AGENT,
            **(headers or {}),
            **self.authorizer.headers(),
        }
        target = f"{url.path}?{query}" if query else url.path
        try:
            return transport.send(self.origin, method, target, signed, body=body, scope=scope)
        except ClientRequestIdMismatchError as error:
            raise Transient(error) from error
        except BaseException as error:  # noqa: BLE001 - sorted by fail
            fail(method, url, error, scope)

    def _refuse(self, method: str, url: BlobURL, response: Response) -> NoReturn:
        with response:
            try:
                body = response.read()
            except Exception as error:  # noqa: BLE001 - the status alone has to do
                body = repr(error).encode()
            refused = service_error(
                verb=method,
                url=str(url),
                status=response.status,
                reason=response.reason,
                headers=response.headers,
                body=body,
                anonymous=self.authorizer.is_anonymous,
            )
        raise refusal(refused, response.headers)


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
    raise error
