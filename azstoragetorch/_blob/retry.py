"""Decide what is retried and when: exponential backoff with full jitter, and ``Retry-After`` of the service."""

from __future__ import annotations

import http.client
import logging
import random
import ssl
import time
from collections.abc import Callable, Mapping
from email.utils import parsedate_to_datetime
from typing import TypeVar

from azure.core.exceptions import AzureError, HttpResponseError

from azstoragetorch._blob.admission import LONGEST_HOLD, Entry
from azstoragetorch._engine.config import TransferConfig
from azstoragetorch._engine.metrics import THROTTLED, count
from azstoragetorch._engine.scope import Scope
from azstoragetorch.exceptions import ClientRequestIdMismatchError

T = TypeVar("T")
log = logging.getLogger("azstoragetorch")

RETRYABLE_STATUS = frozenset({408, 429, 500, 502, 503, 504})
_BASE = 0.4  # seconds; the first pause is 0.2 s on average
_PATIENCE = 6  # times `max_backoff`: how long refusals of requests that were sent early are not counted


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
# A refusal because the service throttles (503, 429) is different in two ways. `admission` decides when the request is
# sent again, since it knows what the service does with all other requests. And it is an attempt only if the request was
# sent as late as a failed one would have been: a service that accepts others at its own pace is not down. That has a
# limit, too, for a service that accepts all requests except for this one. A service that accepts most requests is not
# taken to throttle: one that it refuses (`Entry.is_alone`) is sent again at once, and then after growing pauses.
#
# A timeout or a failed connection is transient for writes too, although the service may have carried out the request,
# because every request of this package can be sent twice: reads and staged blocks are idempotent, the delete of a
# missing blob is not an error, and commits check. A new operation must keep that property.


class Transient(Exception):  # noqa: N818 - it carries an error and is not one
    """A failure that may be retried. *error* is raised if no attempt is left."""

    def __init__(
        self,
        error: AzureError | ClientRequestIdMismatchError,
        retry_after: float | None = None,
        throttled: Entry | None = None,
    ) -> None:
        super().__init__(str(error))
        self.error = error
        self.retry_after = retry_after
        self.throttled = throttled  # how the request was admitted, if it was refused because the service throttles


class Retry:
    """Counts the attempts of one operation."""

    def __init__(self, config: TransferConfig) -> None:
        self._config = config
        self.made_progress()

    def made_progress(self) -> None:
        """Start counting from zero: an operation that makes progress is not stuck."""
        self._failures = 0
        self._refusals = 0  # that were not attempts
        self._began = time.monotonic()
        self._patient_until = 0.0  # refusals of requests that were sent early are not counted before this time

    def pause_after(self, failure: Transient) -> float:
        """Seconds to wait before the next attempt.

        Raises:
            AzureError: no attempt is left.
        """
        now, throttled = time.monotonic(), failure.throttled
        if throttled is not None and throttled.is_early and self._failures and now < self._patient_until:
            count("retries")
            log.debug("refused, to be sent again: %s", failure)
            self._refusals += 1
            return self._backoff(self._refusals) if throttled.is_alone else 0.0
        if not self._failures:
            self._patient_until = now + _PATIENCE * self._config.max_backoff
        self._failures += 1
        if self._failures >= self._config.max_attempts:
            _add_tries(failure.error, self._failures, now - self._began)
            try:
                raise failure.error from failure.__cause__
            finally:
                # Break a reference cycle, which would keep the memory of every waiting caller alive: the traceback of
                # the error refers to this frame, and the failure, which is its context, refers to the error.
                failure.error.__context__ = None
                del failure
        pause = 0.0
        if throttled is None or (throttled.is_alone and self._refusals):
            pause = self._backoff(self._failures)
            pause += min(failure.retry_after or 0.0, LONGEST_HOLD)
        count("retries")
        log.debug("attempt %d failed, retrying in %.2f s: %s", self._failures, pause, failure)
        return pause

    def _backoff(self, failures: int) -> float:
        return random.uniform(0, min(self._config.max_backoff, _BASE * 2 ** (failures - 1)))


def _add_tries(error: AzureError | ClientRequestIdMismatchError, tries: int, seconds: float) -> None:
    """Add the number of attempts to the message of *error*."""
    if tries > 1:
        message = f"{error} (after {tries} attempts in {seconds:.1f} s)"
        error.args = message, *error.args[1:]
        if isinstance(error, AzureError):
            error.message = message


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


def classify_refusal(
    error: HttpResponseError, headers: Mapping[str, str], entry: Entry | None = None
) -> HttpResponseError | Transient:
    """*error*, as a `Transient` if its status is retryable. *entry* is how the request was admitted."""
    if error.status_code in RETRYABLE_STATUS:
        return Transient(error, retry_after(headers), entry if error.status_code in THROTTLED else None)
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
