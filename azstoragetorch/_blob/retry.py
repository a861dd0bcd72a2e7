"""Decide what is retried and when: exponential backoff with full jitter, and ``Retry-After`` of the service."""

from __future__ import annotations

import http.client
import logging
import random
import ssl
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from email.utils import parsedate_to_datetime
from typing import TypeVar

from azure.core.exceptions import AzureError, HttpResponseError

from azstoragetorch._engine.config import TransferConfig
from azstoragetorch._engine.metrics import THROTTLED, count
from azstoragetorch._engine.scope import Scope
from azstoragetorch._engine.threads import start_thread
from azstoragetorch.exceptions import ClientRequestIdMismatchError

T = TypeVar("T")
log = logging.getLogger("azstoragetorch")

RETRYABLE_STATUS = frozenset({408, 429, 500, 502, 503, 504})
_BASE = 0.4  # seconds; the first pause is 0.2 s on average
_WARN_EVERY = 60.0  # seconds between two warnings about throttling
_LONGEST_REQUESTED_PAUSE = 120.0  # seconds; a service that asks for more is treated as unavailable


# What is retried, and by whom
# ----------------------------
# Every failed request is of one of three kinds (`service._raise_translated`, `classify_refusal`):
#
#     transient   the connection failed or timed out, the response was incomplete or belongs to another request, or its
#                 status is in RETRYABLE_STATUS. Raised as `Transient`, which is never seen outside of `_blob`.
#     refused     any other status: the service would answer the same again. Raised at once.
#     impossible  a retry cannot help: a certificate that is not trusted, for example. Raised at once.
#
# The operation has the loop, since only it knows where to resume: a ranged read continues at the byte that it reached,
# a page of a listing or a block is sent again from its start (`retrying`), and a commit has to find out whether an
# attempt without a response took effect (`commit`). `Retry` counts. A read that made real progress since its last
# failure starts counting from zero: a long download may fail many times without being stuck.
#
# A timeout or a failed connection is transient for writes too, although the service may have carried out the request,
# because every request of this package can be sent twice: reads and staged blocks are idempotent, the delete of a
# missing blob is not an error, and commits check. A new operation must keep that property.


class Transient(Exception):  # noqa: N818 - it carries an error and is not one
    """A failure that may be retried. *error* is raised if no attempt is left."""

    def __init__(self, error: AzureError | ClientRequestIdMismatchError, retry_after: float | None = None) -> None:
        super().__init__(str(error))
        self.error = error
        self.retry_after = retry_after


class Retry:
    """Counts the attempts of one operation."""

    def __init__(self, config: TransferConfig) -> None:
        self._config = config
        self.made_progress()

    def made_progress(self) -> None:
        """Start counting from zero: an operation that makes progress is not stuck."""
        self._failures = 0
        self._began = time.monotonic()

    def pause_after(self, failure: Transient) -> float:
        """Seconds to wait before the next attempt.

        Raises:
            AzureError: no attempt is left.
        """
        self._failures += 1
        if isinstance(failure.error, HttpResponseError) and failure.error.status_code in THROTTLED:
            _note_throttling(failure.error)
        if self._failures >= self._config.max_attempts:
            _add_tries(failure.error, self._failures, time.monotonic() - self._began)
            try:
                raise failure.error from failure.__cause__
            finally:
                # Break a reference cycle, which would keep the memory of every waiting caller alive: the traceback of
                # the error refers to this frame, and the failure, which is its context, refers to the error.
                failure.error.__context__ = None
                del failure
        pause = random.uniform(0, min(self._config.max_backoff, _BASE * 2 ** (self._failures - 1)))
        if failure.retry_after is not None:
            pause += min(failure.retry_after, _LONGEST_REQUESTED_PAUSE)
        count("retries")
        log.debug("attempt %d failed, retrying in %.2f s: %s", self._failures, pause, failure)
        return pause


def _add_tries(error: AzureError | ClientRequestIdMismatchError, tries: int, seconds: float) -> None:
    """Add the number of attempts to the message of *error*."""
    if tries > 1:
        message = f"{error} (after {tries} attempts in {seconds:.1f} s)"
        error.args = message, *error.args[1:]
        if isinstance(error, AzureError):
            error.message = message


_throttled: deque[str] = deque(maxlen=100_000)  # responses since the last warning
_warned: dict[str, float] = {}


def _note_throttling(error: HttpResponseError) -> None:
    """Warn that the service throttles, at once and then at most once a minute, with the number of responses."""
    _throttled.append(f"{error.status_code} {getattr(error, 'error_code', '') or error.reason}")
    now = time.monotonic()
    since = now - _warned.get("at", now - _WARN_EVERY)
    if since < _WARN_EVERY:
        return
    _warned["at"] = now
    answers: Counter[str] = Counter()
    with suppress(IndexError):  # another thread also takes from it
        while _throttled:
            answers[_throttled.popleft()] += 1

    def warn() -> None:
        log.warning(
            "the service is throttling requests: it refused %d in the last %.0f s (%s). They are retried; a lower "
            "max_connections in TransferConfig, or fewer processes, can be faster",
            sum(answers.values()),
            max(since, _WARN_EVERY),
            ", ".join(f"{number} x {answer}" for answer, number in answers.most_common()),
        )

    # On another thread: a logging handler can hold a lock, and this thread must not wait, since others wait for it.
    start_thread(warn)


def retrying(config: TransferConfig, operation: Callable[[], T], scope: Scope | None = None) -> T:
    """Run *operation* until it succeeds, raises something other than `Transient`, or no attempt is left.

    Raises:
        Cancelled: *scope* was cancelled between two attempts.
    """
    retry = Retry(config)
    while True:
        try:
            return operation()
        except Transient as failure:
            pause = retry.pause_after(failure)
        (scope or Scope()).pause(pause)


def is_connection_failure(error: BaseException) -> bool:
    """Whether *error* means that the connection failed, so that another connection may work."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return False
    return isinstance(error, (OSError, http.client.HTTPException))


def classify_refusal(error: HttpResponseError, headers: Mapping[str, str]) -> HttpResponseError | Transient:
    """*error*, as a `Transient` if its status is retryable."""
    if error.status_code in RETRYABLE_STATUS:
        return Transient(error, retry_after(headers))
    return error


def retry_after(headers: Mapping[str, str]) -> float | None:
    """The seconds that the service asks to wait, from its response headers; None if it does not."""
    for name, scale in (("retry-after-ms", 1000.0), ("x-ms-retry-after-ms", 1000.0), ("retry-after", 1.0)):
        text = headers.get(name)
        if text is None:
            continue
        try:
            return max(0.0, float(text) / scale)
        except ValueError:
            try:
                return max(0.0, parsedate_to_datetime(text).timestamp() - time.time())
            except ValueError:
                continue
    return None
