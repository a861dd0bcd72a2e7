"""Errors that say what, where and why, without secrets, and that survive pickling.

azure-core's own errors keep the traceback and the response, neither of which can be pickled; a worker that
raises one has hung jobs. The errors made here have the same types and attributes and none of these.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TypeVar

from azure.core.exceptions import (
    AzureError,
    ClientAuthenticationError,
    HttpResponseError,
    ResourceExistsError,
    ResourceModifiedError,
    ResourceNotFoundError,
    ServiceRequestError,
    ServiceResponseError,
)

from azstoragetorch._blob.secret import redact

E = TypeVar("E", bound=AzureError)

_TYPES: dict[int, type[HttpResponseError]] = {
    401: ClientAuthenticationError,
    403: ClientAuthenticationError,
    404: ResourceNotFoundError,
    409: ResourceExistsError,
    412: ResourceModifiedError,
}
_HINTS = {
    401: "The credential was not accepted.",
    403: "The identity, SAS or key lacks the permission, or a firewall rule refuses it.",
    404: "",
}
_ANONYMOUS_HINT = "No credential was sent: pass credential=, or a URL with a SAS."


def service_error(
    *,
    verb: str,
    url: str,
    status: int,
    reason: str,
    headers: Mapping[str, str],
    body: bytes = b"",
    anonymous: bool = False,
) -> HttpResponseError:
    """The error for an answer that refuses the request."""
    code = headers.get("x-ms-error-code") or _tag(body, b"Code") or ""
    message = _tag(body, b"Message").split("\n", 1)[0]
    hint = _ANONYMOUS_HINT if anonymous and status in (401, 403, 404) else _HINTS.get(status, "")
    text = (
        f"{verb} {url}: {status} {reason}"
        + (f" ({code})" if code else "")
        + (f": {message}" if message and message != reason else "")
        + (f" {hint}" if hint else "")
        + f" [request id {headers.get('x-ms-request-id', '-')}, "
        + f"client request id {headers.get('x-ms-client-request-id', '-')}]"
    )
    is_conflict_of_names = status != 409 or code.endswith("AlreadyExists") or not code
    kind = _TYPES.get(status, HttpResponseError) if is_conflict_of_names else HttpResponseError
    error = kind(message=redact(text))
    error.status_code = status
    error.reason = reason
    error.error_code = code  # type: ignore[attr-defined]  # the SDK sets it too
    return portable(error)


def connection_error(verb: str, url: str, cause: BaseException, *, was_sent: bool) -> AzureError:
    """The error for a request that got no answer, or a broken one."""
    kind = ServiceResponseError if was_sent else ServiceRequestError
    return portable(kind(redact(f"{verb} {url}: {type(cause).__name__}: {cause}")))


def not_found(what: str) -> ResourceNotFoundError:
    """The error for a blob that a listing or a look at its version did not find."""
    error = ResourceNotFoundError(message=what)
    error.status_code = 404
    return portable(error)


def portable(error: E) -> E:
    """*error* without what cannot be pickled."""
    error.exc_value = error.exc_traceback = error.inner_exception = None
    error.exc_type = None
    return error


def _tag(body: bytes, name: bytes) -> str:
    match = re.search(b"<" + name + b">([^<]*)</" + name + b">", body[:4096])
    return match.group(1).decode("utf-8", "replace").strip() if match else ""
