"""Who we are to the service: every accepted credential becomes one `Authorizer`.

A token is fetched once per process and credential, renewed before it expires, and never sent over plain HTTP.
An account key never leaves the process: it signs short-lived SAS tokens instead. Nothing here is created
before a request needs it, and what is created does not survive fork or pickling.
"""

from __future__ import annotations

import os
import random
import threading
import time
from collections.abc import Mapping
from datetime import datetime, timedelta, timezone
from functools import lru_cache
from typing import Any, Protocol, TypeAlias

from azure.core.credentials import AccessToken, AzureNamedKeyCredential, AzureSasCredential, TokenCredential
from azure.core.exceptions import AzureError, ClientAuthenticationError, HttpResponseError

from azstoragetorch._blob.errors import portable
from azstoragetorch._blob.retry import RETRYABLE_STATUS
from azstoragetorch._blob.secret import Secret, redact
from azstoragetorch._blob.url import BlobURL

Credential: TypeAlias = "TokenCredential | AzureSasCredential | AzureNamedKeyCredential | bool | None"
"""What ``credential=`` accepts: ``None`` (DefaultAzureCredential), ``False`` (anonymous), or a credential object."""

SCOPE = "https://storage.azure.com/.default"
_RENEW_BEFORE = 300.0  # seconds before expiry; azure-identity itself renews at this point
_KEY_SAS_LIFETIME = timedelta(hours=1)
_CLOCK_SKEW = timedelta(minutes=15)
_ACCEPTED = (
    "None (DefaultAzureCredential), False (anonymous), a TokenCredential, an AzureSasCredential "
    "or an AzureNamedKeyCredential"
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

    def forget_parent(self) -> None:
        """In a forked child: no thread of the parent that was at it will ever finish."""
        ...

    def renew(self, refused: Mapping[str, str]) -> bool:
        """Forget the proof in the headers *refused*, if it is the one at hand; whether asking again can help."""
        ...


class _Anonymous:
    is_anonymous = True

    def headers(self) -> dict[str, str]:
        return {}

    def query(self) -> str:
        return ""

    def forget_parent(self) -> None:
        pass

    def renew(self, refused: Mapping[str, str]) -> bool:  # noqa: ARG002
        return False


class _Sas:
    is_anonymous = False

    def __init__(self, credential: AzureSasCredential) -> None:
        self._credential = credential

    def headers(self) -> dict[str, str]:
        return {}

    def query(self) -> str:
        return str(self._credential.signature).lstrip("?")

    def forget_parent(self) -> None:
        pass

    def renew(self, refused: Mapping[str, str]) -> bool:  # noqa: ARG002
        return False


class _AccountKey(_Sas):
    """Mints account SAS tokens from a key, which the SDK does with public functions only."""

    def __init__(self, credential: AzureNamedKeyCredential) -> None:
        super().__init__(AzureSasCredential("pending"))
        self._key = credential
        self._minted_from: object = None
        self._renew_at = 0.0
        self._lock = threading.Lock()

    def query(self) -> str:
        self._refresh()
        return super().query()

    def forget_parent(self) -> None:
        self._lock = threading.Lock()

    def _refresh(self) -> None:
        from azure.storage.blob import AccountSasPermissions, ResourceTypes, generate_account_sas

        with self._lock:
            name_and_key = self._key.named_key  # may be updated while running
            if time.monotonic() < self._renew_at and name_and_key == self._minted_from:
                return
            now = datetime.now(timezone.utc)
            self._credential.update(
                generate_account_sas(
                    account_name=name_and_key.name,
                    account_key=name_and_key.key,
                    resource_types=ResourceTypes(container=True, object=True),
                    permission=AccountSasPermissions(
                        read=True, write=True, delete=True, list=True, add=True, create=True, tag=True
                    ),
                    start=now - _CLOCK_SKEW,
                    expiry=now + _KEY_SAS_LIFETIME,
                )
            )
            self._minted_from = name_and_key
            self._renew_at = time.monotonic() + _KEY_SAS_LIFETIME.total_seconds() / 2


class _Token:
    """One cache and one refresh for all users of a token credential."""

    is_anonymous = False

    def __init__(self, credential: TokenCredential | None) -> None:
        self._credential = credential
        self._token: AccessToken | None = None
        self._renew_at = 0.0
        self._lock = threading.Lock()

    def headers(self) -> dict[str, str]:
        return self._proof(self._get_token())

    def query(self) -> str:
        return ""

    def forget_parent(self) -> None:
        self._lock = threading.Lock()

    def renew(self, refused: Mapping[str, str]) -> bool:
        with self._lock:
            # Another thread may have fetched a new one since.
            if self._token is not None and self._proof(self._token) == refused:
                self._token = None
        return True

    @staticmethod
    def _proof(token: AccessToken) -> dict[str, str]:
        return {"Authorization": f"Bearer {token.token}"}

    def _get_token(self) -> AccessToken:
        token = self._token
        if token is not None and time.time() < self._renew_at:
            return token
        with self._lock:
            token = self._token
            if token is None or time.time() >= self._renew_at:
                token = self._refresh(token)
            return token

    def _refresh(self, old: AccessToken | None) -> AccessToken:
        try:
            token = self._fetch()
        except AzureError:
            if old is None or old.expires_on <= time.time():
                raise
            self._renew_at = time.time() + 30  # the old one is good still; ask again soon
            return old
        self._token = token
        # A token that lives shorter than the margin is used for half its life.
        life = token.expires_on - time.time()
        self._renew_at = time.time() + max(life - _RENEW_BEFORE, life / 2)
        return token

    def _fetch(self) -> AccessToken:
        if self._credential is None:
            from azure.identity import DefaultAzureCredential

            self._credential = DefaultAzureCredential()
        for attempt in range(5):
            try:
                token: AccessToken = _asking(self._credential)(SCOPE)
                return token
            except AzureError as error:
                # Managed identity throttles when all workers of a node start at once.
                is_busy = isinstance(error, HttpResponseError) and error.status_code in RETRYABLE_STATUS
                if not is_busy or attempt == 4:
                    raise _as_told(error) from None
            time.sleep(random.uniform(0.1, 1.0) * 2**attempt)
        raise AssertionError("unreachable")


class CredentialHolder:
    """A user's credential, kept as given until a request needs it.

    Picklable: a SAS or account key goes to child processes only (see ``secret``); a token credential goes as it is.
    """

    def __init__(self, credential: Credential, sas: Secret | None = None) -> None:
        checked = check_credential(credential)
        # A SAS in the URL wins, as it does in the SDK.
        self._sas = sas
        self._credential = checked if sas is None else None

    def authorizer(self, url: BlobURL) -> Authorizer:
        """The authorizer for requests to *url*, shared by all of this process that use the same credential.

        Raises:
            ValueError: a token would be sent over plain HTTP.
        """
        if self._sas is not None:
            return _Sas(AzureSasCredential(self._sas.reveal()))
        credential = self._credential
        if isinstance(credential, AzureSasCredential):
            return _Sas(credential)
        if credential is False:
            return _ANONYMOUS
        if not isinstance(credential, AzureNamedKeyCredential) and url.scheme != "https":
            raise ValueError(
                f"credential: a token is never sent over plain http ({url.scheme}://{url.host}); use an https URL, "
                "a SAS, an account key, or credential=False for a public container"
            )
        return _shared(credential)

    def __repr__(self) -> str:
        kind = "SAS in URL" if self._sas is not None else type(self._credential).__name__
        return f"CredentialHolder({kind})"

    def __copy__(self) -> CredentialHolder:
        return self

    def __deepcopy__(self, _memo: object) -> CredentialHolder:
        return self  # a credential is shared by all that was copied: one cache, and updates reach everybody

    def __getstate__(self) -> dict[str, Any]:
        credential = self._credential
        packed: tuple[Any, ...]
        if isinstance(credential, AzureSasCredential):
            packed = ("sas", Secret(credential.signature))
        elif isinstance(credential, AzureNamedKeyCredential):
            packed = ("key", credential.named_key.name, Secret(credential.named_key.key))
        else:
            packed = ("object", credential)
        return {"sas": self._sas, "packed": packed}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._sas = state["sas"]
        kind, *values = state["packed"]
        if kind == "sas":
            # Resolved on use: unpickling in a place that never reads needs no secret.
            self._sas, self._credential = values[0], None
        elif kind == "key":
            self._credential = _unpickled_key(values[0], values[1])
        else:
            self._credential = values[0]


class _LazyKey(AzureNamedKeyCredential):
    """An account key that came out of a pickle: it may be missing, which is said when it is used."""

    def __init__(self, name: str, key: Secret) -> None:
        super().__init__(name, "unset")
        self._name_and_secret = name, key

    @property
    def named_key(self) -> Any:
        name, key = self._name_and_secret
        self.update(name, key.reveal())
        return super().named_key


@lru_cache(maxsize=64)
def _unpickled_key(name: str, key: Secret) -> _LazyKey:
    """One object for all that came out of pickles with the same key, so that they share an authorizer."""
    return _LazyKey(name, key)


def check_credential(credential: Any) -> Any:
    """*credential* if it is one that we accept.

    Raises:
        TypeError: it is not; the message lists what is accepted.
    """
    if (
        credential is None
        or credential is False
        or isinstance(credential, (AzureSasCredential, AzureNamedKeyCredential))
    ):
        return credential
    if isinstance(credential, type) or not callable(_asking(credential)):
        hint = "; pass an instance" if isinstance(credential, type) else ""
        hint = "; wrap a SAS in AzureSasCredential" if isinstance(credential, str) else hint
        raise TypeError(f"credential must be {_ACCEPTED}, not {type(credential).__name__}{hint}")
    if _is_async(credential):
        raise TypeError("credential must be synchronous: use azure.identity, not azure.identity.aio")
    return credential


def _asking(credential: Any) -> Any:
    """How *credential* is asked for a token, or None if it is not one that can be."""
    return getattr(credential, "get_token", None) or getattr(credential, "get_token_info", None)


def _is_async(credential: Any) -> bool:
    from inspect import iscoroutinefunction

    return iscoroutinefunction(_asking(credential))


def _as_told(error: AzureError) -> AzureError:
    """*error* of an identity anew, without secrets and what cannot be pickled."""
    text = redact(str(error))
    try:
        return portable(type(error)(message=text))
    except TypeError:  # a type with arguments of its own
        return portable(ClientAuthenticationError(message=text))


_ANONYMOUS = _Anonymous()
_registry: dict[int, tuple[Any, Authorizer]] = {}  # by identity; keeps the credential alive, so ids stay unique
_registry_lock = threading.Lock()


def _shared(credential: Any) -> Authorizer:
    with _registry_lock:
        entry = _registry.get(id(credential))
        if entry is None:
            kind = _AccountKey if isinstance(credential, AzureNamedKeyCredential) else _Token
            entry = _registry[id(credential)] = (credential, kind(credential))
        return entry[1]


def _forget_parent() -> None:
    global _registry_lock
    for _, authorizer in _registry.values():
        authorizer.forget_parent()
    _registry.clear()
    _registry_lock = threading.Lock()  # another thread of the parent may have held it


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_parent)
