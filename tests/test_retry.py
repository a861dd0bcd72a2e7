"""What is retried and when, as pure decisions. Tests of requests check that they are followed."""

from __future__ import annotations

import http.client
import pickle
import ssl
import time
from datetime import datetime, timedelta, timezone
from email.utils import format_datetime

import pytest
from azure.core.exceptions import (
    ClientAuthenticationError,
    HttpResponseError,
    ResourceExistsError,
    ResourceModifiedError,
    ResourceNotFoundError,
    ServiceRequestError,
    ServiceResponseError,
)
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule

from azstoragetorch._blob.admission import Entry
from azstoragetorch._blob.errors import connection_error, service_error
from azstoragetorch._blob.retry import Retry, Transient, classify_refusal, is_connection_failure, retry_after, retrying
from azstoragetorch._engine.config import TransferConfig
from azstoragetorch._engine.scope import Cancelled, Scope
from tests.support import taking

BROKEN = ServiceResponseError("broken")


def in_an_hour() -> str:
    return format_datetime(datetime.now(timezone.utc) + timedelta(hours=1), usegmt=True)


class TestPauses:
    @pytest.mark.parametrize(
        ("headers", "seconds"),
        [
            ({"retry-after": "3"}, 3.0),
            ({"retry-after": "0.5"}, 0.5),
            ({"x-ms-retry-after-ms": "250"}, 0.25),
            ({"retry-after-ms": "250", "retry-after": "1"}, 0.25),
            ({"retry-after": "-5"}, 0.0),
            ({"retry-after": "Wed, 21 Oct 2015 07:28:00 GMT"}, 0.0),
            ({"retry-after": "soon"}, None),
            ({}, None),
        ],
    )
    def test_what_the_service_asks_for(self, headers: dict[str, str], seconds: float | None) -> None:
        assert retry_after(headers) == seconds

    def test_a_date_is_counted_from_now(self) -> None:
        assert retry_after({"retry-after": in_an_hour()}) == pytest.approx(3600, abs=5)

    def test_they_grow_up_to_the_limit_with_full_jitter(self) -> None:
        rows = []
        for _ in range(300):
            retry = Retry(TransferConfig(max_attempts=8, max_backoff=2.0))
            rows.append([retry.pause_after(Transient(BROKEN)) for _ in range(7)])
        for number, column in enumerate(zip(*rows, strict=True)):
            longest = min(2.0, 0.4 * 2**number)
            assert 0.9 * longest < max(column) <= longest
            assert min(column) < 0.1 * longest

    def test_at_least_what_was_asked_for_but_not_forever(self) -> None:
        config = TransferConfig(max_backoff=0.0)
        assert Retry(config).pause_after(Transient(BROKEN, 3.0)) == 3.0
        assert Retry(config).pause_after(Transient(BROKEN, 1e9)) == 120.0

    def test_no_try_is_left(self) -> None:
        retry = Retry(TransferConfig(max_attempts=3))
        for _ in range(2):
            retry.pause_after(Transient(BROKEN))
        with pytest.raises(ServiceResponseError, match="broken"):
            retry.pause_after(Transient(BROKEN))

    def test_progress_starts_the_count_again(self) -> None:
        retry = Retry(TransferConfig(max_attempts=2))
        for _ in range(10):
            retry.pause_after(Transient(BROKEN))
            retry.made_progress()


class RetryMachine(RuleBasedStateMachine):
    """Any order of failures and progress: as many attempts as allowed since the last progress, no more."""

    @initialize(attempts=st.integers(1, 6), longest=st.floats(0, 10))
    def begin(self, attempts: int, longest: float) -> None:
        self.config = TransferConfig(max_attempts=attempts, max_backoff=longest)
        self.retry = Retry(self.config)
        self.tried = 0

    @rule(asked=st.none() | st.floats(0, 1000))
    def fail(self, asked: float | None) -> None:
        error = ServiceResponseError("this one")
        self.tried += 1
        if self.tried >= self.config.max_attempts:
            with pytest.raises(ServiceResponseError) as caught:
                self.retry.pause_after(Transient(error, asked))
            assert caught.value is error
        else:
            least = min(asked or 0.0, 120.0)
            grown = min(self.config.max_backoff, 0.4 * 2 ** (self.tried - 1))
            assert least <= self.retry.pause_after(Transient(error, asked)) <= least + grown

    @rule()
    def get_further(self) -> None:
        self.retry.made_progress()
        self.tried = 0


TestRetryMachine = RetryMachine.TestCase


class TestRetrying:
    def test_until_it_succeeds(self) -> None:
        failures = [Transient(BROKEN)] * 2

        def operation() -> str:
            if failures:
                raise failures.pop()
            return "done"

        assert retrying(TransferConfig(max_attempts=3, max_backoff=0), operation) == "done"

    def test_the_error_is_raised_with_its_cause(self) -> None:
        def operation() -> None:
            raise Transient(BROKEN) from ConnectionResetError("reset")

        with pytest.raises(ServiceResponseError) as caught:
            retrying(TransferConfig(max_attempts=2, max_backoff=0), operation)
        assert isinstance(caught.value.__cause__, ConnectionResetError)

    def test_another_error_is_not_tried_again(self) -> None:
        tries = []

        def operation() -> None:
            tries.append(1)
            raise KeyError

        with pytest.raises(KeyError):
            retrying(TransferConfig(), operation)
        assert len(tries) == 1

    def test_a_cancelled_scope_ends_the_wait(self) -> None:
        scope = Scope()

        def operation() -> None:
            scope.cancel()
            raise Transient(BROKEN, 60.0)

        with taking(), pytest.raises(Cancelled):
            retrying(TransferConfig(), operation, scope)


class TestThrottling:
    def busy(self) -> HttpResponseError:
        return error_of(503, "ServerBusy")

    def test_the_last_error_says_how_often_it_was_tried(self) -> None:
        """And in how many seconds; the type of the error does not change, also in a pickle."""
        error = self.busy()

        def operation() -> None:
            raise Transient(error)

        with pytest.raises(HttpResponseError, match=r"503.*\(after 3 attempts in \d+\.\d s\)$") as caught:
            retrying(TransferConfig(max_attempts=3, max_backoff=0.01), operation)
        assert caught.value is error
        assert str(pickle.loads(pickle.dumps(error))) == str(error) == error.message

    def test_one_try_is_not_counted(self) -> None:
        with pytest.raises(HttpResponseError) as caught:
            Retry(TransferConfig(max_attempts=1)).pause_after(Transient(self.busy()))
        assert "attempts" not in str(caught.value)

    def throttled(self, *, is_early: bool) -> Transient:
        return Transient(self.busy(), None, Entry(0.0, is_early))

    def test_a_refusal_of_a_request_that_was_sent_early_is_not_an_attempt(self) -> None:
        """Except for the first one: one attempt is one. The admission makes the request wait, not the pause."""
        retry = Retry(TransferConfig(max_attempts=2))
        for _ in range(50):
            assert retry.pause_after(self.throttled(is_early=True)) == 0.0
        with pytest.raises(HttpResponseError, match="after 2 attempts"):
            retry.pause_after(self.throttled(is_early=False))
        with pytest.raises(HttpResponseError):
            Retry(TransferConfig(max_attempts=1)).pause_after(self.throttled(is_early=True))

    def test_a_request_that_is_refused_among_others_pauses_from_the_second_time_on(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Once can be chance. The service is not paced then, so the pause is not left to the admission."""
        monkeypatch.setattr("azstoragetorch._blob.retry.random.uniform", lambda _low, high: high)
        retry = Retry(TransferConfig(max_attempts=2, max_backoff=1.0))
        alone = Transient(self.busy(), None, Entry(0.0, is_early=True, is_alone=True))
        assert [retry.pause_after(alone) for _ in range(5)] == [0.0, 0.4, 0.8, 1.0, 1.0]

    def test_a_request_that_alone_is_refused_does_not_wait_forever(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """After six times the longest pause since the first refusal, every refusal is an attempt."""
        now = 1000.0
        monkeypatch.setattr("azstoragetorch._blob.retry.time.monotonic", lambda: now)
        retry = Retry(TransferConfig(max_attempts=3, max_backoff=10.0))
        retry.pause_after(self.throttled(is_early=True))
        now = 1059.0
        for _ in range(50):
            retry.pause_after(self.throttled(is_early=True))
        now = 1061.0
        retry.pause_after(self.throttled(is_early=True))
        with pytest.raises(HttpResponseError):
            retry.pause_after(self.throttled(is_early=True))


class TestSorting:
    @pytest.mark.parametrize(
        ("error", "is_one"),
        [
            (ConnectionRefusedError(), True),
            (ConnectionResetError(), True),
            (TimeoutError(), True),
            (OSError("no route to host"), True),
            (ssl.SSLEOFError(), True),
            (http.client.RemoteDisconnected(), True),
            (http.client.IncompleteRead(b""), True),
            (ssl.SSLCertVerificationError(), False),
            (ValueError(), False),
            (KeyboardInterrupt(), False),
            (MemoryError(), False),
        ],
    )
    def test_what_another_connection_may_cure(self, error: BaseException, is_one: bool) -> None:
        assert is_connection_failure(error) is is_one

    @pytest.mark.parametrize("status", [408, 429, 500, 502, 503, 504])
    def test_statuses_that_pass(self, status: int) -> None:
        refused = classify_refusal(error_of(status), {"retry-after": "2"})
        assert isinstance(refused, Transient)
        assert refused.retry_after == 2.0

    @pytest.mark.parametrize("status", [307, 400, 401, 403, 404, 409, 412, 416, 501])
    def test_statuses_that_stay(self, status: int) -> None:
        assert isinstance(classify_refusal(error_of(status), {}), HttpResponseError)


def error_of(status: int, code: str = "", body: bytes = b"", *, anonymous: bool = False) -> HttpResponseError:
    return service_error(
        verb="GET",
        url="https://account.blob.core.windows.net/c/b",
        status=status,
        reason="Reason",
        headers={
            "x-ms-request-id": "id-1",
            "x-ms-client-request-id": "id-2",
            **({"x-ms-error-code": code} if code else {}),
        },
        body=body,
        anonymous=anonymous,
    )


class TestErrors:
    @pytest.mark.parametrize(
        ("status", "code", "kind"),
        [
            (401, "InvalidAuthenticationInfo", ClientAuthenticationError),
            (403, "AuthorizationFailure", ClientAuthenticationError),
            (404, "BlobNotFound", ResourceNotFoundError),
            (409, "BlobAlreadyExists", ResourceExistsError),
            (409, "LeaseIdMissing", HttpResponseError),
            (412, "ConditionNotMet", ResourceModifiedError),
            (400, "InvalidBlockList", HttpResponseError),
            (500, "InternalError", HttpResponseError),
        ],
    )
    def test_a_refusal_is_the_type_that_users_of_azure_catch(
        self, status: int, code: str, kind: type[HttpResponseError]
    ) -> None:
        error = error_of(status, code)
        assert type(error) is kind
        assert (error.status_code, error.reason, error.error_code) == (status, "Reason", code)  # type: ignore[attr-defined]

    def test_it_says_what_where_and_why(self) -> None:
        body = b"<Error><Code>ServerBusy</Code><Message>The server is busy.\nRequestId:x\nTime:y</Message></Error>"
        text = str(error_of(503, body=body))
        for part in (
            "GET",
            "https://account.blob.core.windows.net/c/b",
            "503",
            "ServerBusy",
            "is busy.",
            "id-1",
            "id-2",
        ):
            assert part in text
        assert "Time:y" not in text

    def test_it_hints_at_the_missing_credential(self) -> None:
        assert "credential=" in str(error_of(404, "ResourceNotFound", anonymous=True))
        assert "credential=" not in str(error_of(404, "BlobNotFound"))

    def test_it_shows_no_secret(self) -> None:
        error = service_error(
            verb="GET",
            url="https://h/c/b?sig=topsecret",
            status=403,
            reason="x",
            headers={},
            body=b"<Message>Signature did not match: sig=topsecret, Bearer topsecretandlong</Message>",
        )
        assert "topsecret" not in str(error)

    @pytest.mark.parametrize(
        "error",
        [
            error_of(404, "BlobNotFound"),
            error_of(503, "ServerBusy"),
            connection_error("GET", "https://h/c/b", TimeoutError("timed out"), was_sent=True),
            connection_error("GET", "https://h/c/b", OSError("refused"), was_sent=False),
        ],
        ids=repr,
    )
    def test_it_survives_pickling(self, error: HttpResponseError) -> None:
        try:
            raise error from ConnectionResetError(104, "reset")
        except (HttpResponseError, ServiceResponseError, ServiceRequestError) as raised:
            copy = pickle.loads(pickle.dumps(raised))
        assert type(copy) is type(error)
        assert str(copy) == str(error)
        assert getattr(copy, "status_code", None) == getattr(error, "status_code", None)

    def test_an_error_page_of_somebody_else_is_not_an_obstacle(self) -> None:
        assert "502" in str(error_of(502, body=b"<html>\xff\xfe<Code>" + b"x" * 100_000))


def test_a_pause_is_real() -> None:
    begin = time.monotonic()
    failures = [Transient(BROKEN, 0.2)]

    def operation() -> None:
        if failures:
            raise failures.pop()

    retrying(TransferConfig(max_backoff=0), operation)
    assert time.monotonic() - begin >= 0.2
