"""What signs requests: a SAS, what an account key signs, and tokens, each shared by all requests that use it.

No thread waits for a lock here. What is computed is kept by one assignment. A token is fetched by a thread that does
nothing else, and every thread that needs it waits for that one: a thread that fetched it itself could be interrupted by
a signal handler, which would need the token too.
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

_RENEW_BEFORE = 300.0  # seconds before expiry; azure-identity itself renews at this point
_RENEW_AGAIN = 30.0  # seconds after a renewal that failed, while the old token is still valid
_KEY_SAS_LIFETIME = timedelta(hours=1)
_CLOCK_SKEW = timedelta(minutes=15)
VISIBLE = re.compile(r"[!-~]*")  # ASCII without spaces and control characters: all that a header or query may hold
_TENANT = re.compile(r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}", re.IGNORECASE)
_AUTHORIZATION_URI = re.compile(r"""\bauthorization(?:_uri)?\s*=\s*["']?https://[\w.-]+/([^/"',\s]+)""", re.IGNORECASE)
_NO_CREDENTIAL_FOUND = (
    "no credential was found: run `az login`; or pass a SAS, in the URL or as AzureSasCredential (command line: "
    "--sas-env); or the account's key, as AzureNamedKeyCredential (command line: AZURE_STORAGE_KEY); or, for public "
    "data, credential=False (command line: --anonymous). What DefaultAzureCredential tried:"
)


class Authorizer(Protocol):
    """Signs requests of one credential."""

    is_anonymous: bool

    def headers(self) -> dict[str, str]:
        """The headers that prove who is asking."""
        ...

    def query(self) -> str:
        """What is appended to the query, without a leading separator."""
        ...

    def renew(self, refused: Mapping[str, str], query: str = "", challenge: str = "") -> bool:
        """Whether to ask again, after the service refused the headers *refused* and *query*.

        *challenge* is its ``WWW-Authenticate``. A proof that is still at hand is forgotten.
        """
        ...


class SignedBySas:
    """Anonymous requests, with an empty SAS, and those with a SAS that may be updated at any time."""

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
    """Mints account SAS tokens from a key, which the SDK does with public functions only."""

    def __init__(self, credential: AzureNamedKeyCredential) -> None:
        self._key = credential
        self._generated = _GeneratedSas(None, 0.0, "")

    def sas(self) -> str:
        """A SAS that is valid for half of its lifetime at least."""
        generated = self._generated
        named_key = self._key.named_key  # may be updated while running
        if time.monotonic() < generated.renew_at and named_key == generated.named_key:
            return generated.sas
        from azure.storage.blob import AccountSasPermissions, ResourceTypes, generate_account_sas

        now = datetime.now(timezone.utc)
        sas = generate_account_sas(
            account_name=named_key.name,
            account_key=check_key(named_key.key, f"credential: the account key of {named_key.name!r}"),
            resource_types=ResourceTypes(container=True, object=True),
            permission=AccountSasPermissions(
                read=True, write=True, delete=True, list=True, add=True, create=True, tag=True
            ),
            start=now - _CLOCK_SKEW,
            expiry=now + _KEY_SAS_LIFETIME,
        )
        self._generated = _GeneratedSas(named_key, time.monotonic() + _KEY_SAS_LIFETIME.total_seconds() / 2, sas)
        return sas


class _CachedToken:
    """A token in the cache."""

    def __init__(self, token: AccessToken, renew_at: float) -> None:
        self.token = token
        self.renew_at = renew_at  # by time.time(), as expires_on; 0 after the service has refused it


_Key: TypeAlias = "tuple[str, str | None]"  # audience and tenant
_Outcome: TypeAlias = "AccessToken | BaseException"


class Tokens:
    """The tokens of one credential, by audience and tenant: one cache, and one fetch at a time for each."""

    def __init__(self, credential: TokenCredential | None) -> None:
        self._credential = credential
        self._cached: dict[_Key, _CachedToken] = {}
        # A reader that was opened before a fork signs with this in the child, where no thread of the parent will end.
        self._fetches: PerProcess[dict[_Key, tuple[Job[_Outcome], Bell]]] = PerProcess(dict)

    def get(self, audience: str, tenant: str | None) -> AccessToken:
        """The token at hand, or a new one.

        Raises:
            Exception: what the credential raised.
        """
        cached = self._cached.get((audience, tenant))
        if cached is not None and time.time() < cached.renew_at:
            return cached.token
        outcome = self._new((audience, tenant))
        if not isinstance(outcome, BaseException):
            return outcome
        try:
            # Each thread that waited raises its own: they add tracebacks to it.
            raise copy(outcome) if isinstance(outcome, AzureError) else outcome
        finally:
            del outcome  # it would refer to itself by way of this frame

    def _new(self, key: _Key) -> _Outcome:
        """Wait for a new token, which one thread fetches for all."""
        bell = Bell()
        job, bell = self._fetches.get().setdefault(key, (Job(partial(self._outcome, key), bell), bell))

        def fetch() -> None:
            job.run()

        # A signal handler may come in before the thread is started, and then starts one itself: the first works.
        if job.is_open and not start_thread(fetch):
            fetch()  # the interpreter is about to exit
        bell.wait_until(lambda: job.is_over)
        return job.result()

    def _outcome(self, key: _Key) -> _Outcome:
        try:
            return self._renew(key)
        except BaseException as error:  # noqa: BLE001 - raised by all that wait
            return error.with_traceback(None)
        finally:
            self._fetches.get().pop(key, None)

    def forget(self, audience: str, tenant: str | None, refused: Mapping[str, str]) -> None:
        """Do not use the token in *refused* again; a newer one stays."""
        cached = self._cached.get((audience, tenant))
        if cached is not None and proof(cached.token) == refused:
            cached.renew_at = 0.0

    def _renew(self, key: _Key) -> AccessToken:
        cached = self._cached.get(key)
        if cached is not None and time.time() < cached.renew_at:
            return cached.token  # another thread was faster
        try:
            token = self._fetch(*key)
        except AzureError:
            now = time.time()
            if cached is None or not cached.renew_at or cached.token.expires_on <= now:
                raise
            cached.renew_at = now + _RENEW_AGAIN
            return cached.token
        # A token that lives shorter than the margin is used for half its life.
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
                    raise ValueError(f"credential: {type(credential).__name__} gave a token with a space or line break")
                return token
            except AzureError as error:
                # Managed identity throttles when all workers of a node start at once.
                is_busy = isinstance(error, HttpResponseError) and error.status_code in RETRYABLE_STATUS
                if not is_busy or attempt == 4:
                    raise _redacted(error, is_default=is_default) from None
            time.sleep(random.uniform(0.1, 1.0) * 2**attempt)
        raise AssertionError("unreachable")


class TokenForAccount:
    """Tokens for one account: it may be in another tenant than the identity, which the service says once."""

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
        # Of the challenge only the tenant is used. What it says of where to ask, and for what, could be anything.
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
    """The account key *key*, which *what* names in errors.

    Raises:
        ValueError: it is not base64.
    """
    try:
        if base64.b64decode(key.strip(), validate=True):
            return key.strip()
    except (binascii.Error, ValueError):
        pass
    raise ValueError(f"{what} is not base64, as every account key is: copy it whole, as the portal shows it")


def token_method(credential: Any) -> Any:
    """How *credential* is asked for a token, or None if it is not one that can be."""
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

    # It logs as a warning what its error says as well. Without any handler Python would print that.
    logging.getLogger("azure.identity").addHandler(logging.NullHandler())
    return DefaultAzureCredential()


def _redacted(error: AzureError, *, is_default: bool) -> AzureError:
    """A copy of *error* of an identity, without secrets and what cannot be pickled."""
    text = redact(str(error))
    if is_default and isinstance(error, ClientAuthenticationError):
        text = f"{_NO_CREDENTIAL_FOUND}\n{text}".replace("\t", "  ")
    try:
        return picklable(type(error)(message=text))
    except TypeError:  # a type with other arguments
        return picklable(ClientAuthenticationError(message=text))
