"""The door to azure-storage-blob, for every verb that is not hot: its public API over our own connections.

The SDK builds the requests and reads the answers; they are signed and sent as all others are, so that there is one
pool, one TLS setting, one token and one way to interrupt, and no secret in what the SDK logs. Retrying is ours too: the
SDK's default ignores ``Retry-After``. Redirects are not followed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar
from urllib.parse import urlsplit

from azure.core.exceptions import AzureError, HttpResponseError
from azure.core.pipeline.transport import HttpResponse, HttpTransport
from azure.storage.blob import BlobClient as SdkBlobClient
from azure.storage.blob import ExponentialRetry

from azstoragetorch._blob import transport
from azstoragetorch._blob.errors import service_error
from azstoragetorch._blob.retry import Transient, refusal, retrying
from azstoragetorch._blob.service import Service, fail
from azstoragetorch._blob.url import BlobURL
from azstoragetorch._engine.engine import Cancelled, Scope
from azstoragetorch.exceptions import ClientRequestIdMismatchError

T = TypeVar("T")


class SdkBlob:
    """One blob as the SDK sees it. *scope* interrupts what is under way."""

    def __init__(self, service: Service, url: BlobURL, scope: Scope | None = None) -> None:
        self._service = service
        self._url = url
        self._scope = scope
        self._client = SdkBlobClient(
            account_url=url.account_url,
            container_name=url.container,
            blob_name=url.blob,
            snapshot=url.snapshot,
            version_id=url.versionid,
            transport=_Transport(service, scope),
            retry_policy=ExponentialRetry(retry_total=0),
            permit_redirects=False,
            user_agent=transport.USER_AGENT,
        )

    def call(self, verb: str, operation: Callable[[SdkBlobClient], T]) -> T:
        """Run *operation* on the SDK's client, again where that helps.

        Raises:
            AzureError: the service refused, or could not be reached.
            Cancelled: the scope was cancelled.
        """
        return retrying(self._service.config, self.attempt(verb, operation), self._scope)

    def attempt(self, verb: str, operation: Callable[[SdkBlobClient], T]) -> Callable[[], T]:
        """What runs *operation* once, and raises what `retrying` understands."""

        def attempt() -> T:
            try:
                return operation(self._client)
            except Exception as error:  # noqa: BLE001 - sorted by _meaning
                meaning = self._meaning(verb, error)
                # Not from the SDK's error: it holds the request, and with it the memory that was to be sent.
                raise meaning from meaning.__cause__

        return attempt

    def _meaning(self, verb: str, error: Exception) -> BaseException:
        if isinstance(error, (Transient, Cancelled)):
            return error
        if isinstance(error, ClientRequestIdMismatchError):
            return Transient(error)
        response: Any = getattr(error, "response", None)
        if isinstance(error, HttpResponseError) and response is not None:
            refused = service_error(
                verb=verb,
                url=str(self._url),
                status=response.status_code,
                reason=response.reason or "",
                headers=response.headers,
                body=response.body(),
                anonymous=self._service.authorizer.is_anonymous,
            )
            return refusal(refused, response.headers)
        if isinstance(error, AzureError):
            return error
        try:
            fail(verb, self._url, error)
        except Exception as meaning:  # noqa: BLE001 - handed to the caller to raise
            return meaning


class _Transport(HttpTransport[Any, Any]):
    """Signs the SDK's requests and sends them over our pool, to the account and nowhere else."""

    def __init__(self, service: Service, scope: Scope | None) -> None:
        self._service = service
        self._scope = scope

    def __enter__(self) -> _Transport:
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()

    def open(self) -> None:
        """Nothing to open: connections come from the pool."""

    def close(self) -> None:
        """Nothing to close: connections go back to the pool."""

    def send(self, request: Any, **_options: Any) -> HttpResponse:
        """Send *request*; the body of the answer is read at once, since none of these verbs has a large one."""
        parts = urlsplit(request.url)
        content = request.content
        body = (
            list(content) if isinstance(content, Pieces) else content.encode() if isinstance(content, str) else content
        )
        response = self._service.exchange(request.method, parts.path, parts.query, request.headers, body, self._scope)
        with response:
            return _Response(request, response.status, response.reason, response.headers, response.read())


class _Response(HttpResponse):
    """An answer in the form that the SDK's pipeline reads."""

    def __init__(self, request: Any, status: int, reason: str, headers: Any, body: bytes) -> None:
        super().__init__(request, None)
        self.status_code = status
        self.reason = reason
        self.headers = headers
        self.content_type = headers.get("Content-Type", "")
        self._content = body

    def body(self) -> bytes:
        """The whole body."""
        return self._content

    def read(self) -> bytes:
        """The whole body."""
        return self._content

    def stream_download(self, pipeline: Any, **_options: Any) -> Iterator[bytes]:  # noqa: ARG002
        """The whole body, in one piece."""
        return iter([self._content])


class Pieces:
    """Several pieces of memory that together are one body; unlike a generator it can be sent again."""

    def __init__(self, pieces: Sequence[memoryview]) -> None:
        self._pieces = pieces

    def __iter__(self) -> Iterator[memoryview]:
        return iter(self._pieces)
