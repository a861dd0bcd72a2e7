"""Messages of refusals distinguish the reasons for a 403, and contain no secrets."""

from __future__ import annotations

import pytest

from azstoragetorch._blob.errors import service_error
from azstoragetorch.io import BlobIO
from tests.faults import FaultService, Status
from tests.support import QUICK

SIGNATURE = "c2VjcmV0LXNpZ25hdHVyZS1vZi1hLXNhcy1pbi1oZXJlPT0="
FRAME = "Signature not valid in the specified time frame: Start [{}] - Expiry [{}] - Current [{}]"
EARLY, MIDDLE, LATE = (f"Mon, 01 Jan 2024 0{hour}:00:00 GMT" for hour in (1, 2, 3))


def refusal(code: str, detail: str = "", status: int = 403, *, anonymous: bool = False) -> str:
    tag = f"<AuthenticationErrorDetail>{detail}</AuthenticationErrorDetail>" if detail else ""
    body = f"<Error><Code>{code}</Code><Message>Refused.\nRequestId:1</Message>{tag}</Error>".encode()
    refused = {"status": status, "reason": "Forbidden", "headers": {}, "body": body, "anonymous": anonymous}
    return str(service_error(verb="GET", url="https://h/c/b", **refused))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("detail", "words"),
    [
        (FRAME.format(EARLY, MIDDLE, LATE), ["has expired", EARLY, MIDDLE, LATE]),
        (FRAME.format(MIDDLE, LATE, EARLY), ["not valid yet", "st=", "clock", EARLY, MIDDLE]),
        (f"Signed expiry time [{EARLY}] must be after signed start time [{LATE}]", ["has expired", EARLY, LATE]),
        ("Lifetime validation failed. The token is expired.", ["token has expired", "clock"]),
        ("Audience validation failed. Audience did not match.", ["another cloud"]),
        ("Issuer validation failed. Issuer did not match.", ["another tenant"]),
        ("Signature did not match. String to sign used was r\n2024\n/blob/account/c\n", ["does not match", "copied"]),
        (FRAME.format("a", "b", "c"), ["[b]", "has expired, is for another account"]),
        ("", ["has expired, is for another account"]),
    ],
)
def test_why_a_signature_or_token_was_not_accepted(detail: str, words: list[str]) -> None:
    """They show start, expiry and the time of the service, and distinguish expired, not yet valid and changed."""
    text = refusal("AuthenticationFailed", detail)
    assert all(word in text for word in words), text
    assert "firewall" not in text
    assert "lacks the permission" not in text
    assert "\n" not in text


@pytest.mark.parametrize("status", [401, 403, 404])
def test_a_source_that_the_service_cannot_read_is_not_about_the_request_itself(status: int) -> None:
    assert "No credential was sent" in refusal("BlobNotFound", status=status, anonymous=True)
    text = refusal("CannotVerifyCopySource", status=status, anonymous=True)
    assert "could not read the source" in text
    assert "No credential was sent" not in text


@pytest.mark.parametrize(
    ("code", "word"),
    [
        ("AuthorizationPermissionMismatch", "lacks the permission"),
        ("AuthorizationFailure", "firewall"),
        ("AuthorizationSourceIPMismatch", "sip="),
        ("AuthorizationProtocolMismatch", "https"),
        ("AuthorizationResourceTypeMismatch", "srt="),
        ("AuthorizationServiceMismatch", "ss="),
        ("KeyBasedAuthenticationNotPermitted", "use an identity"),
        ("UnauthorizedBlobOverwrite", "write (w)"),
        ("SomethingNew", "firewall"),
    ],
)
def test_the_other_reasons_for_a_403(code: str, word: str) -> None:
    text = refusal(code)
    assert f"({code})" in text
    assert word in text
    assert "expired" not in text


@pytest.mark.parametrize(
    "detail",
    [
        f"The MAC signature found in the HTTP request '{SIGNATURE}' is not the same as any computed signature",
        f"Signature did not match: sig={SIGNATURE}&amp;se=1",
        f"The token eyJ0eXAiOiJKV1QiLCJhbGciOiJub25lIn0.{SIGNATURE} is expired",
        f"&quot;{SIGNATURE}&quot; \x1b[31m",
    ],
)
def test_a_detail_shows_no_secret_and_moves_no_cursor(detail: str) -> None:
    text = refusal("AuthenticationFailed", detail)
    assert SIGNATURE[:20] not in text
    assert text.isprintable()


def test_a_detail_is_read_from_an_answer(fault_service: FaultService) -> None:
    fault_service.put("c", "b", b"x")
    detail = FRAME.format(EARLY, MIDDLE, LATE)
    body = f"<Error><Message>No</Message><AuthenticationErrorDetail>{detail}</AuthenticationErrorDetail></Error>"
    fault_service.script("get_blob", [Status(403, error_code="AuthenticationFailed", body=body.encode())], repeat=True)
    with (
        pytest.raises(Exception, match=f"The SAS has expired: it was valid until {MIDDLE}"),
        BlobIO(fault_service.blob_url("c", "b", sv="1", sig="x"), "rb", transfer=QUICK) as blob,
    ):
        blob.read()
