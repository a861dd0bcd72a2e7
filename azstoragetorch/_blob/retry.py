"""What is tried again, and when: exponential backoff with full jitter, honouring what the service asks for."""

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
_WARN_EVERY = 60.0  # seconds between two warnings that the service throttles
_LONGEST_REQUESTED_PAUSE = 120.0  # seconds; a server that asks for more is as good as down


class Transient(Exception):  # noqa: N818 - it carries an error and is not one
    """Wraps an error that is worth another try; *error* is raised when no try is left."""

    def __init__(self, error: AzureError | ClientRequestIdMismatchError, retry_after: float | None = None) -> None:
        super().__init__(str(error))
        self.error = error
        self.retry_after = retry_after


class Retry:
    """Counts the tries of one operation."""

    def __init__(self, config: TransferConfig) -> None:
        self._config = config
        self.made_progress()

    def made_progress(self) -> None:
        """Count from 0 again: an operation that gets further is not stuck."""
        self._failures = 0
        self._began = time.monotonic()

    def pause_after(self, failure: Transient) -> float:
        """Seconds to wait before the next try.

        Raises:
            AzureError: no try is left.
        """
        self._failures += 1
        if isinstance(failure.error, HttpResponseError) and failure.error.status_code in THROTTLED:
            _note_throttling(failure.error)
        if self._failures >= self._config.max_attempts:
            _add_tries(failure.error, self._failures, time.monotonic() - self._began)
            try:
                raise failure.error from failure.__cause__
            finally:
                # A circle would keep all that waits for the answer: the error's traceback refers to this frame, and
                # its context, the failure, to the error.
                failure.error.__context__ = None
                del failure
        pause = random.uniform(0, min(self._config.max_backoff, _BASE * 2 ** (self._failures - 1)))
        if failure.retry_after is not None:
            pause += min(failure.retry_after, _LONGEST_REQUESTED_PAUSE)
        count("retries")
        log.debug("try %d failed, next in %.2f s: %s", self._failures, pause, failure)
        return pause


def _add_tries(error: AzureError | ClientRequestIdMismatchError, tries: int, seconds: float) -> None:
    """Say in *error* how often it was met."""
    if tries > 1:
        message = f"{error} (after {tries} tries in {seconds:.1f} s)"
        error.args = message, *error.args[1:]
        if isinstance(error, AzureError):
            error.message = message


_throttled: deque[str] = deque(maxlen=100_000)  # answers since the last warning
_warned: dict[str, float] = {}


def _note_throttling(error: HttpResponseError) -> None:
    """Warn that the service throttles, at once and then once a minute, with how often it did."""
    _throttled.append(f"{error.status_code} {getattr(error, 'error_code', '') or error.reason}")
    now = time.monotonic()
    since = now - _warned.get("at", now - _WARN_EVERY)
    if since < _WARN_EVERY:
        return
    _warned["at"] = now
    answers: Counter[str] = Counter()
    with suppress(IndexError):  # another thread takes from it, too
        while _throttled:
            answers[_throttled.popleft()] += 1

    def warn() -> None:
        log.warning(
            "the service throttles. Requests that it refused in the last %.0f s: %d (%s). They are tried again; fewer "
            "max_connections (TransferConfig) or fewer processes at once may be faster",
            max(since, _WARN_EVERY),
            sum(answers.values()),
            ", ".join(f"{number} x {answer}" for answer, number in answers.most_common()),
        )

    # A handler of the logging package may hold a lock that this thread, which others wait for, must not wait for.
    start_thread(warn)


def retrying(config: TransferConfig, operation: Callable[[], T], scope: Scope | None = None) -> T:
    """Run *operation* until it succeeds, fails for good, or has used up its tries.

    Raises:
        Cancelled: *scope* was cancelled between two tries.
    """
    retry = Retry(config)
    while True:
        try:
            return operation()
        except Transient as failure:
            pause = retry.pause_after(failure)
        (scope or Scope()).pause(pause)


def is_connection_failure(error: BaseException) -> bool:
    """Whether *error* says that a connection broke: another one may work."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return False
    return isinstance(error, (OSError, http.client.HTTPException))


def classify_refusal(error: HttpResponseError, headers: Mapping[str, str]) -> HttpResponseError | Transient:
    """*error*, wrapped if its status is worth another try."""
    if error.status_code in RETRYABLE_STATUS:
        return Transient(error, retry_after(headers))
    return error


def retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds that the service asks to wait, from the headers of its answer."""
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
