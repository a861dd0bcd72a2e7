"""Errors that say what failed, where and why, without secrets, and that can be pickled.

azure-core's errors refer to the traceback and the response, which cannot be pickled: a DataLoader worker that raises
one can hang the job. The errors created here have the same types and attributes, without these references.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from datetime import datetime
from email.utils import parsedate_to_datetime
from html import unescape
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
_HINTS_OF_CODES = {
    "AuthenticationFailed": "The SAS, key or token was not accepted: it has expired, is for another account, or lost "
    "characters when it was copied.",
    "AuthorizationPermissionMismatch": "The credential is valid but lacks the permission: a SAS needs it in sp=, an "
    "identity needs the role Storage Blob Data Reader or, to write, Contributor.",
    "AuthorizationFailure": "Usually a firewall: the network rules of the account do not allow this machine. Or the "
    "SAS lacks the permission for this operation.",
    "AuthorizationSourceIPMismatch": "The SAS allows other IP addresses (sip=) than that of this machine.",
    "AuthorizationProtocolMismatch": "The SAS allows only https (spr=): use an https URL.",
    "AuthorizationResourceTypeMismatch": "The SAS is for another kind of resource (sr= or srt=).",
    "AuthorizationServiceMismatch": "The SAS is for another service than Blob Storage (ss=).",
    "KeyBasedAuthenticationNotPermitted": "The account accepts neither account keys nor a SAS signed with one: use an "
    "identity.",
    "CannotVerifyCopySource": "The service itself could not read the source of the copy: it does not exist, or the "
    "credential that was sent for it does not allow reading it.",
    "UnauthorizedBlobOverwrite": "The SAS allows creating blobs but not overwriting them: it needs the "
    "permission write (w).",
}
_HINTS_OF_DETAILS = {  # a part of AuthenticationErrorDetail
    "token is expired": "The token has expired: check the clock of this machine.",
    "not valid yet": "The token is not valid yet: check the clock of this machine.",
    "Audience validation failed": "The token is for another service or another cloud.",
    "Issuer validation failed": "The identity belongs to another tenant than the account.",
    "did not match": "The signature does not match: the SAS or key is for another account, the key was rotated, or "
    "characters were lost when it was copied.",
    "not the same as any computed": "The signature does not match: the key is for another account, or it was rotated.",
}
_TIME_FRAME = re.compile(r"Start \[(.*?)\] - Expiry \[(.*?)\] - Current \[(.*?)\]")
_EXPIRED_WITHOUT_START = re.compile(r"Signed expiry time \[(.*?)\] must be after signed start time \[(.*?)\]")
_LONG_CODE = re.compile(r"[A-Za-z0-9+/_-]{40,}={0,2}")  # possibly a signature or a part of a token
_HEAD_OF_BODY = 16 << 10  # bytes of a response that are searched for the error code and message
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
    """The error for a response that refuses the request."""
    code = headers.get("x-ms-error-code") or _tag(body, b"Code") or ""
    message = _line(_tag(body, b"Message"))
    detail = _LONG_CODE.sub("[redacted]", _line(_tag(body, b"AuthenticationErrorDetail")))
    if anonymous and status in (401, 403, 404) and code != "CannotVerifyCopySource":  # that is about another blob
        hint = _ANONYMOUS_HINT
    else:
        hint = _hint_of(detail) or _HINTS_OF_CODES.get(code) or _HINTS.get(status, "")
    text = (
        f"{verb} {url}: {status} {reason}"
        + (f" ({code})" if code else "")
        + (f": {message}." if message and message != reason else "")
        + (f" {detail}." if detail else "")
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
    return picklable(error)


def connection_error(verb: str, url: str, cause: BaseException, *, was_sent: bool) -> AzureError:
    """The error for a request without a complete response."""
    kind = ServiceResponseError if was_sent else ServiceRequestError
    return picklable(kind(redact(f"{verb} {url}: {type(cause).__name__}: {cause}")))


def not_found(what: str) -> ResourceNotFoundError:
    """The error for a blob that does not exist, with the message *what*."""
    error = ResourceNotFoundError(message=what)
    error.status_code = 404
    return picklable(error)


def picklable(error: E) -> E:
    """Remove the attributes of *error* that cannot be pickled; return it."""
    error.exc_value = error.exc_traceback = error.inner_exception = None
    error.exc_type = None
    return error


def _hint_of(detail: str) -> str:
    """A hint for *detail*, the reason of the service for rejecting a signature or token."""
    frame, expired = _TIME_FRAME.search(detail), _EXPIRED_WITHOUT_START.search(detail)
    if frame is not None:
        start, expiry, current = frame.groups()
    elif expired is not None:
        start, (expiry, current) = "", expired.groups()
    else:
        return next((hint for part, hint in _HINTS_OF_DETAILS.items() if part.lower() in detail.lower()), "")
    now, begin, end = _date(current), _date(start), _date(expiry)
    if now is not None and begin is not None and now < begin:
        return (
            f"The SAS is not valid yet: it starts at {start}, and the clock of the service says {current}. Wait, or "
            "create a SAS with an earlier start (st=). If the difference is a few minutes, the clock of the machine "
            "that created the SAS is fast."
        )
    if now is not None and end is not None and now >= end:
        return f"The SAS has expired: it was valid until {expiry}, and the clock of the service says {current}."
    return ""


def _date(text: str) -> datetime | None:
    try:
        return parsedate_to_datetime(text).replace(tzinfo=None)
    except (ValueError, TypeError):
        return None


def _line(text: str) -> str:
    """The first line of *text*, without control characters."""
    line = text.split("\n", 1)[0].strip().rstrip(".")
    return "".join(character if character.isprintable() else " " for character in line)[:400]


def _tag(body: bytes, name: bytes) -> str:
    match = re.search(b"<" + name + b">([^<]*)</" + name + b">", body[:_HEAD_OF_BODY])
    return unescape(match.group(1).decode("utf-8", "replace")).strip() if match else ""
