"""Authorize requests with a SAS, an account key or a token, shared by all requests with the same credential.

No thread waits for a lock here: results are stored with one assignment. A token is fetched on a separate thread, and
every thread that needs it waits for that one. A thread that fetched the token itself could be interrupted by a signal
handler that needs the token too and would wait forever.
"""

from __future__ import annotations

import base64
import binascii
import logging
import random
import re
import time
from collections.abc import Callable, Mapping
from copy import copy
from datetime import datetime, timedelta, timezone
from functools import partial
from typing import Any, NamedTuple, Protocol, TypeAlias

from azure.core.credentials import AccessToken, AzureNamedKeyCredential, TokenCredential
from azure.core.exceptions import AzureError, ClientAuthenticationError, HttpResponseError

from azstoragetorch._blob.errors import picklable
from azstoragetorch._blob.retry import RETRYABLE_STATUS
from azstoragetorch._blob.secret import redact
from azstoragetorch._engine.job import Bell, Job
from azstoragetorch._engine.process import PerProcess
from azstoragetorch._engine.threads import start_thread

_RENEW_BEFORE = 300.0  # seconds before expiry, as in azure-identity
_RENEW_AGAIN = 30.0  # seconds after a failed renewal, while the old token is still valid
_KEY_SAS_LIFETIME = timedelta(hours=1)
_CLOCK_SKEW = timedelta(minutes=15)
VISIBLE = re.compile(r"[!-~]*")  # printable ASCII without spaces: what headers and queries can hold
_TENANT = re.compile(r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}", re.IGNORECASE)
_AUTHORIZATION_URI = re.compile(r"""\bauthorization(?:_uri)?\s*=\s*["']?https://[\w.-]+/([^/"',\s]+)""", re.IGNORECASE)
_NO_CREDENTIAL_FOUND = (
    "no credential was found: run `az login`; or pass a SAS, in the URL or as AzureSasCredential (command line: "
    "--sas-env); or the account key, as AzureNamedKeyCredential (command line: AZURE_STORAGE_KEY); or, for public "
    "data, credential=False (command line: --anonymous). DefaultAzureCredential tried:"
)


class Authorizer(Protocol):
    """Authorizes requests with one credential."""

    is_anonymous: bool

    def headers(self) -> dict[str, str]:
        """The headers that authorize a request."""
        ...

    def query(self) -> str:
        """The SAS to append to the query, without a leading separator."""
        ...

    def renew(self, refused: Mapping[str, str], query: str = "", challenge: str = "") -> bool:
        """Return whether to send a request again after the service rejected the headers *refused* and *query*.

        *challenge* is the ``WWW-Authenticate`` header of the response. A rejected token is dropped from the cache.
        """
        ...


class SignedBySas:
    """Authorizes with a SAS, which can be updated at any time; anonymous requests have an empty one."""

    def __init__(self, signature: Callable[[], str], *, is_anonymous: bool = False) -> None:
        self._signature = signature
        self.is_anonymous = is_anonymous

    def headers(self) -> dict[str, str]:
        return {}

    def query(self) -> str:
        return self._signature()

    def renew(self, refused: Mapping[str, str], query: str = "", challenge: str = "") -> bool:  # noqa: ARG002
        return self._signature() != query


class _GeneratedSas(NamedTuple):
    named_key: object
    renew_at: float
    sas: str


class AccountKey:
    """Creates account SAS from an account key. The SDK has no public function to sign requests with a key."""

    def __init__(self, credential: AzureNamedKeyCredential) -> None:
        self._key = credential
        self._generated = _GeneratedSas(None, 0.0, "")

    def sas(self) -> str:
        """A SAS that is valid for at least half of its lifetime."""
        generated = self._generated
        named_key = self._key.named_key  # may be updated while running
        if time.monotonic() < generated.renew_at and named_key == generated.named_key:
            return generated.sas
        from azure.storage.blob import AccountSasPermissions, ResourceTypes, generate_account_sas

        now = datetime.now(timezone.utc)
        sas = generate_account_sas(
            account_name=named_key.name,
            account_key=check_key(named_key.key, f"credential: the account key of {named_key.name!r}"),
            resource_types=ResourceTypes(service=True, container=True, object=True),
            permission=AccountSasPermissions(
                read=True, write=True, delete=True, list=True, add=True, create=True, tag=True
            ),
            start=now - _CLOCK_SKEW,
            expiry=now + _KEY_SAS_LIFETIME,
        )
        self._generated = _GeneratedSas(named_key, time.monotonic() + _KEY_SAS_LIFETIME.total_seconds() / 2, sas)
        return sas


class _CachedToken:
    """A token in the cache, and when to renew it."""

    def __init__(self, token: AccessToken, renew_at: float) -> None:
        self.token = token
        self.renew_at = (
            renew_at  # compared with time.time(), as expires_on is; 0 after the service has rejected the token
        )


_Key: TypeAlias = "tuple[str, str | None]"  # audience and tenant
_Outcome: TypeAlias = "AccessToken | BaseException"


class Tokens:
    """A cache of the tokens of one credential, by audience and tenant, with one fetch at a time for each."""

    def __init__(self, credential: TokenCredential | None) -> None:
        self._credential = credential
        self._cached: dict[_Key, _CachedToken] = {}
        # Per process: a forked child can use this cache, but the threads of the parent never finish there.
        self._fetches: PerProcess[dict[_Key, tuple[Job[_Outcome], Bell]]] = PerProcess(dict)

    def get(self, audience: str, tenant: str | None) -> AccessToken:
        """The cached token, or a new one.

        Raises:
            Exception: the error that the credential raised.
        """
        cached = self._cached.get((audience, tenant))
        if cached is not None and time.time() < cached.renew_at:
            return cached.token
        outcome = self._new((audience, tenant))
        if not isinstance(outcome, BaseException):
            return outcome
        try:
            # Each waiting thread raises a copy, since raising adds a traceback.
            raise copy(outcome) if isinstance(outcome, AzureError) else outcome
        finally:
            del outcome  # its traceback refers to this frame: a reference cycle

    def _new(self, key: _Key) -> _Outcome:
        """Wait for a new token. One thread fetches it for all that wait."""
        bell = Bell()
        job, bell = self._fetches.get().setdefault(key, (Job(partial(self._outcome, key), bell), bell))

        def fetch() -> None:
            job.run()

        # A signal handler can start a thread before this one does: only one of them does the work.
        if job.is_open and not start_thread(fetch):
            fetch()  # no thread can be started, as at interpreter exit
        bell.wait_until(lambda: job.is_over)
        return job.result()

    def _outcome(self, key: _Key) -> _Outcome:
        try:
            return self._renew(key)
        except BaseException as error:  # noqa: BLE001 - raised by all waiting threads
            return error.with_traceback(None)
        finally:
            self._fetches.get().pop(key, None)

    def forget(self, audience: str, tenant: str | None, refused: Mapping[str, str]) -> None:
        """Do not use the token in *refused* again; a newer token stays in the cache."""
        cached = self._cached.get((audience, tenant))
        if cached is not None and proof(cached.token) == refused:
            cached.renew_at = 0.0

    def _renew(self, key: _Key) -> AccessToken:
        cached = self._cached.get(key)
        if cached is not None and time.time() < cached.renew_at:
            return cached.token  # another thread has renewed it
        try:
            token = self._fetch(*key)
        except AzureError:
            now = time.time()
            if cached is None or not cached.renew_at or cached.token.expires_on <= now:
                raise
            cached.renew_at = now + _RENEW_AGAIN
            return cached.token
        # A token with a lifetime shorter than the margin is used for half of its lifetime.
        life = token.expires_on - time.time()
        self._cached[key] = _CachedToken(token, time.time() + max(life - _RENEW_BEFORE, life / 2))
        return token

    def _fetch(self, audience: str, tenant: str | None) -> AccessToken:
        credential = self._credential
        is_default = credential is None
        if credential is None:
            credential = _default_credential()
            self._credential = credential
        for attempt in range(5):
            try:
                token = _request_token(credential, f"{audience}/.default", tenant)
                if not VISIBLE.fullmatch(token.token):
                    raise ValueError(
                        f"credential: {type(credential).__name__} returned a token with a space or line break"
                    )
                return token
            except AzureError as error:
                # Managed identity throttles if all workers of a node start at once.
                is_busy = isinstance(error, HttpResponseError) and error.status_code in RETRYABLE_STATUS
                if not is_busy or attempt == 4:
                    raise _redacted(error, is_default=is_default) from None
            time.sleep(random.uniform(0.1, 1.0) * 2**attempt)
        raise AssertionError("unreachable")


class TokenForAccount:
    """Authorizes with tokens for one account. The service can name another tenant in its first response."""

    is_anonymous = False

    def __init__(self, tokens: Tokens, audience: str) -> None:
        self._tokens = tokens
        self._audience = audience
        self._tenant: str | None = None

    def headers(self) -> dict[str, str]:
        return proof(self._tokens.get(self._audience, self._tenant))

    def query(self) -> str:
        return ""

    def renew(self, refused: Mapping[str, str], query: str = "", challenge: str = "") -> bool:  # noqa: ARG002
        # Only the tenant of the challenge is used. Its authority and resource are not trusted.
        found = _AUTHORIZATION_URI.search(challenge)
        tenant = found.group(1).lower() if found is not None and _TENANT.fullmatch(found.group(1)) else self._tenant
        if tenant == self._tenant:
            self._tokens.forget(self._audience, tenant, refused)
        self._tenant = tenant
        return True


def proof(token: AccessToken) -> dict[str, str]:
    """The headers that carry *token*."""
    return {"Authorization": f"Bearer {token.token}"}


def check_key(key: str, what: str) -> str:
    """Check and return the account key *key*, which errors call *what*.

    Raises:
        ValueError: *key* is not base64.
    """
    try:
        if base64.b64decode(key.strip(), validate=True):
            return key.strip()
    except (binascii.Error, ValueError):
        pass
    raise ValueError(f"{what} is not base64, as every account key is: copy the whole key from the portal")


def token_method(credential: Any) -> Any:
    """The method of *credential* that returns a token; None if it has none."""
    return getattr(credential, "get_token", None) or getattr(credential, "get_token_info", None)


def _request_token(credential: Any, scope: str, tenant: str | None) -> AccessToken:
    if tenant is None:
        token: AccessToken = token_method(credential)(scope)
    elif hasattr(credential, "get_token"):
        token = credential.get_token(scope, tenant_id=tenant)
    else:
        token = credential.get_token_info(scope, options={"tenant_id": tenant})
    return token


def _default_credential() -> TokenCredential:
    from azure.identity import DefaultAzureCredential

    # It logs a warning with the same text as its error. Without a handler, Python would print it.
    logging.getLogger("azure.identity").addHandler(logging.NullHandler())
    return DefaultAzureCredential()


def _redacted(error: AzureError, *, is_default: bool) -> AzureError:
    """A copy of *error*, raised by an identity, that has no secrets and can be pickled."""
    text = redact(str(error))
    if is_default and isinstance(error, ClientAuthenticationError):
        text = f"{_NO_CREDENTIAL_FOUND}\n{text}".replace("\t", "  ")
    try:
        return picklable(type(error)(message=text))
    except TypeError:  # its constructor has other parameters
        return picklable(ClientAuthenticationError(message=text))
