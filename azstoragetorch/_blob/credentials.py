"""Check the user's credential, keep it, and decide to which hosts it is sent.

A token is never sent over plain HTTP. An account key never leaves the process: it signs short-lived SAS instead.
Credentials are sent only to hosts of Azure and to hosts that the user trusts. Authorizers belong to one process: they
are created when a request needs them, and are neither pickled nor used in a forked child.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence, Set
from functools import lru_cache, partial
from typing import Any, TypeAlias
from urllib.parse import urlsplit

from azure.core.credentials import AzureNamedKeyCredential, AzureSasCredential, TokenCredential

from azstoragetorch._blob.authorizers import (
    VISIBLE,
    AccountKey,
    Authorizer,
    SignedBySas,
    TokenForAccount,
    Tokens,
    token_method,
)
from azstoragetorch._blob.authorizers import (
    check_key as check_key,
)
from azstoragetorch._blob.secret import Secret, SharedString, is_sharing
from azstoragetorch._blob.url import EMULATOR_ACCOUNT, BlobURL
from azstoragetorch._engine.config import TRUSTED_HOSTS
from azstoragetorch._engine.process import PerProcess

Credential: TypeAlias = "TokenCredential | AzureSasCredential | AzureNamedKeyCredential | bool | None"
"""What ``credential=`` accepts: ``None`` (DefaultAzureCredential), ``False`` (anonymous), or a credential object."""

_ACCEPTED = (
    "None (DefaultAzureCredential), False (anonymous), a TokenCredential, an AzureSasCredential "
    "or an AzureNamedKeyCredential"
)


class CredentialHolder:
    """The credential of a user, as it was given.

    It can be pickled. A SAS or account key is included only for child processes, or if it is shared (see ``secret``).

    Args:
        credential: The credential.
        sas: The SAS of the URL, which takes precedence, as in the SDK.
        trusted_url: The URL that the user passed together with *credential*, so it may be sent to its host.
        is_shared: Same as for `Secret`.
    """

    def __init__(
        self,
        credential: Credential,
        sas: Secret | None = None,
        *,
        trusted_url: BlobURL | None = None,
        is_shared: bool | None = None,
    ) -> None:
        self._is_shared = is_sharing() if is_shared is None else is_shared
        checked = check_credential(credential)
        self._sas = sas
        self._credential = kept = checked if sas is None else None
        if trusted_url is not None and kept is not False and not _is_always_allowed(trusted_url, kept):
            _allow(kept, [_origin(trusted_url)])

    def authorizer(self, url: BlobURL, trusted_hosts: Sequence[str] = ()) -> Authorizer:
        """The authorizer for requests to *url*, shared by all clients of this process with the same credential.

        *trusted_hosts* are those of the `TransferConfig`.

        Raises:
            ValueError: a token would be sent over plain HTTP, or a credential to a host that does not belong to Azure
                and that the user does not trust.
        """
        if self._sas is not None:
            sas = self._sas.reveal()
            return SignedBySas(lambda: sas)
        credential = self._credential
        if credential is False:
            return _ANONYMOUS
        if credential is None and url.is_emulator:
            return _authorizer(_EMULATOR_KEY, url)
        if not isinstance(credential, (AzureSasCredential, AzureNamedKeyCredential)) and url.scheme != "https":
            raise ValueError(
                f"credential: a token is never sent over plain http ({url.scheme}://{url.host}); use an https URL, "
                "a SAS, an account key, or credential=False for a public container"
            )
        if _is_always_allowed(url, credential) or _origin(url) in _allowed_origins(credential):
            return _authorizer(credential, url)
        if is_trusted(url, trusted_hosts):
            return _authorizer(credential, url)
        raise ValueError(
            f"credential: not sent to the host {url.host!r} of {url}, which is not one of Azure Storage: the host "
            "comes from a list of URLs, a listing or a checkpoint. If you trust it, pass "
            f'transfer=TransferConfig(trusted_hosts=["{url.host}"]) or set the environment variable '
            f"{TRUSTED_HOSTS}={url.host}; for public data pass credential=False"
        )

    def account_key(self, url: BlobURL) -> AzureNamedKeyCredential | None:
        """The account key for *url*, if the credential is one."""
        if self._sas is None and isinstance(self._credential, AzureNamedKeyCredential):
            return self._credential
        return _EMULATOR_KEY if self._sas is None and self._credential is None and url.is_emulator else None

    def __repr__(self) -> str:
        kind = "SAS in URL" if self._sas is not None else type(self._credential).__name__
        return f"CredentialHolder({kind})"

    def __copy__(self) -> CredentialHolder:
        return self

    def __deepcopy__(self, _memo: object) -> CredentialHolder:
        return self  # copies share the credential, its tokens and its updates

    def __getstate__(self) -> dict[str, Any]:
        credential = self._credential
        packed: tuple[Any, ...] = "object", credential
        if isinstance(credential, AzureSasCredential):
            packed = "sas", Secret(credential.signature, self._is_shared), _handle_of(credential)
        elif isinstance(credential, AzureNamedKeyCredential):
            key = Secret(credential.named_key.key, self._is_shared)
            packed = "key", credential.named_key.name, key, _handle_of(credential)
        allowed = frozenset(_allowed_origins(credential))
        return {"sas": self._sas, "packed": packed, "allowed": allowed, "is_shared": self._is_shared}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._sas = state["sas"]
        self._is_shared = state["is_shared"]
        kind, *values = state["packed"]
        # Secrets are looked up on use, so that objects can be unpickled where they are never used.
        makers: dict[str, Callable[..., Any]] = {"sas": _unpickled_sas, "key": _unpickled_key}
        self._credential = makers[kind](*values) if kind in makers else values[0]
        if state["allowed"]:
            _allow(self._credential, state["allowed"])


# -- credentials that processes share ----------------------------------------------------------------------------------


class SharedSas(AzureSasCredential):
    """A SAS whose updates reach the child processes that were started with it."""

    shared: SharedString

    @property
    def signature(self) -> str:
        """The SAS that was set last, in any of the processes."""
        return self.shared.get()

    def update(self, signature: str) -> None:
        """Set the SAS in all processes."""
        super().update(signature)
        self.shared.set(signature)
        _warn_of_copies(self.shared)

    def __reduce__(self) -> tuple[Any, ...]:
        return AzureSasCredential, (self.signature,)


class SharedKey(AzureNamedKeyCredential):
    """An account key whose updates reach the child processes that were started with it."""

    shared: SharedString

    @property
    def named_key(self) -> Any:
        """The name and key that were set last, in any of the processes."""
        name, _, key = self.shared.get().partition("\0")
        if super().named_key != (name, key):
            super().update(name, key)
        return super().named_key

    def update(self, name: str, key: str) -> None:
        """Set the name and key in all processes."""
        super().update(name, key)
        self.shared.set(f"{name}\0{key}")
        _warn_of_copies(self.shared)

    def __reduce__(self) -> tuple[Any, ...]:
        return AzureNamedKeyCredential, tuple(self.named_key)


def _warn_of_copies(shared: SharedString) -> None:
    if shared.was_copied:
        warnings.warn(
            "credential: this update does not reach processes that were started with the credential by spawn or "
            "forkserver, since this system cannot share memory with them: start them again, with a new DataLoader for "
            "example, or use fork",
            RuntimeWarning,
            stacklevel=3,
        )


def _share(credential: Any) -> Any:
    """Make `update` of *credential* reach child processes that get it later; return the same object.

    The user keeps this object and calls `update` on it, so its class is replaced with a subclass that overrides
    `update`.
    """
    if type(credential) is AzureSasCredential:
        vars(credential).setdefault("shared", SharedString(credential.signature))
        credential.__class__ = SharedSas
    elif type(credential) is AzureNamedKeyCredential:
        vars(credential).setdefault("shared", SharedString("\0".join(credential.named_key)))
        credential.__class__ = SharedKey
    return credential


def _handle_of(credential: Any) -> Any:
    return credential.shared.handle() if isinstance(credential, (SharedSas, SharedKey)) else None


class _LazySas(AzureSasCredential):
    """A SAS from a pickle. If it was left out of the pickle, using it raises an error."""

    def __init__(self, secret: Secret) -> None:
        super().__init__("unset")
        self._secret = secret

    @property
    def signature(self) -> str:
        return self._secret.reveal()


class _LazyKey(AzureNamedKeyCredential):
    """An account key from a pickle. If it was left out of the pickle, using it raises an error."""

    def __init__(self, name: str, key: Secret) -> None:
        super().__init__(name, "unset")
        self._name_and_secret = name, key

    @property
    def named_key(self) -> Any:
        name, key = self._name_and_secret
        self.update(name, key.reveal())
        return super().named_key


# Unpickling the same secret returns the same object, so that all clients that use it share an authorizer.


@lru_cache(maxsize=64)
def _unpickled_sas(secret: Secret, handle: Any) -> AzureSasCredential:
    if handle is None:
        return _LazySas(secret)
    credential = SharedSas("unset")
    credential.shared = SharedString.attach(handle)
    return credential


@lru_cache(maxsize=64)
def _unpickled_key(name: str, key: Secret, handle: Any) -> AzureNamedKeyCredential:
    if handle is None:
        return _LazyKey(name, key)
    credential = SharedKey(name, "unset")
    credential.shared = SharedString.attach(handle)
    return credential


# -- which credentials are accepted, and to which hosts they are sent --------------------------------------------------


def check_credential(credential: Any) -> Any:
    """Check and return *credential*.

    Raises:
        TypeError: *credential* is not accepted; the message lists what is.
        ValueError: *credential* is a SAS with invalid characters.
    """
    if isinstance(credential, AzureSasCredential):
        if not isinstance(credential, _LazySas):
            _signature_of(credential)
        return _share(credential)
    if credential is None or credential is False or isinstance(credential, AzureNamedKeyCredential):
        return _share(credential)
    if isinstance(credential, type) or not callable(token_method(credential)):
        hint = "; pass an instance" if isinstance(credential, type) else ""
        hint = "; wrap a SAS in AzureSasCredential" if isinstance(credential, str) else hint
        raise TypeError(f"credential must be {_ACCEPTED}, not {type(credential).__name__}{hint}")
    if _is_async(credential):
        raise TypeError("credential must be synchronous: use azure.identity, not azure.identity.aio")
    return credential


def is_trusted(url: BlobURL, trusted_hosts: Sequence[str]) -> bool:
    """Whether the host of *url* is one of *trusted_hosts*, to which any credential may be sent."""
    port = urlsplit(f"//{url.host}").port or {"http": 80, "https": 443}[url.scheme]
    for entry in trusted_hosts:
        parts = urlsplit(f"//{entry}")
        name = (parts.hostname or "").removesuffix(".")
        is_host = url.hostname == name or (name.startswith(".") and url.hostname.endswith(name))
        if is_host and parts.port in (None, port):
            return True
    return False


def _is_always_allowed(url: BlobURL, credential: Any) -> bool:
    """Whether *credential* may be sent to the host of any URL: one of Azure or, except for tokens, this machine."""
    # Emulators run on this machine and use keys and SAS. A token gives access to more than one account.
    is_token = not isinstance(credential, (AzureSasCredential, AzureNamedKeyCredential))
    return url.is_azure or (url.is_loopback and not is_token)


_allowed: dict[int, tuple[object, set[str]]] = {}  # by id of a credential, which is kept alive


def _allow(credential: Any, origins: Iterable[str]) -> None:
    _allowed.setdefault(id(credential), (credential, set()))[1].update(origins)


def _allowed_origins(credential: Any) -> Set[str]:
    entry = _allowed.get(id(credential))
    return frozenset() if entry is None else entry[1]


def _origin(url: BlobURL) -> str:
    return f"{url.scheme}://{url.host}"


def _signature_of(credential: AzureSasCredential) -> str:
    signature = str(credential.signature).lstrip("?")
    if not VISIBLE.fullmatch(signature):
        raise ValueError(
            "credential: the SAS has a space, a line break or another invalid character: copy it again, without the "
            "text around it"
        )
    return signature


def _is_async(credential: Any) -> bool:
    from inspect import iscoroutinefunction

    return iscoroutinefunction(token_method(credential))


# -- what the requests of one process share ----------------------------------------------------------------------------


class _SharedAuthorizers:
    """The authorizers and tokens that all requests with one credential share."""

    def __init__(self, credential: Any) -> None:
        self.credential = credential  # kept alive, so that no other object gets its id
        self.key: Authorizer | None = None
        if isinstance(credential, AzureNamedKeyCredential):
            self.key = SignedBySas(AccountKey(credential).sas)
        self.tokens = Tokens(credential)
        self.accounts: dict[str, Authorizer] = {}


_registry: PerProcess[dict[int, _SharedAuthorizers]] = PerProcess(dict)
_ANONYMOUS = SignedBySas(str, is_anonymous=True)
# Microsoft publishes it for every emulator, so it is not a secret and opens nothing but data on this machine. It stands
# in where DefaultAzureCredential cannot work at all, because a token is never sent over plain HTTP.
_EMULATOR_KEY = AzureNamedKeyCredential(
    EMULATOR_ACCOUNT, "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="
)


def _authorizer(credential: Any, url: BlobURL) -> Authorizer:
    """The authorizer of this process for *credential* and the account of *url*."""
    if isinstance(credential, AzureSasCredential):
        _signature_of(credential)
        return SignedBySas(partial(_signature_of, credential))
    shared = _registry.get().setdefault(id(credential), _SharedAuthorizers(credential))
    if shared.key is None:
        return shared.accounts.setdefault(url.account_url, TokenForAccount(shared.tokens, url.audience))
    check_key(credential.named_key.key, f"credential: the account key of {credential.named_key.name!r}")
    return shared.key
