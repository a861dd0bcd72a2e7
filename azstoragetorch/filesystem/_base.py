"""What all operations share: the storage options, the clients, the cache of listings, and the state that is pickled."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from fsspec import AbstractFileSystem
from fsspec.utils import tokenize

from azstoragetorch._blob.client import AccountClient, BlobClient, ClientFactory, ContainerClient
from azstoragetorch._blob.credentials import Credential, CredentialHolder
from azstoragetorch._blob.secret import is_sharing
from azstoragetorch._blob.url import BlobURL, check_name
from azstoragetorch._engine.config import TransferConfig
from azstoragetorch._engine.threads import Engine, engine_for
from azstoragetorch.filesystem._options import Hidden, account_url, check_names, credential_of, hide, transfer_of
from azstoragetorch.filesystem._paths import PROTOCOLS, Place, account_of, parent, strip


class _Strip:
    """`AbstractFileSystem._strip_protocol`: of an instance, it also checks that a path is in the instance's account."""

    def __get__(self, instance: Base | None, _owner: type[Base]) -> Any:
        return _strip_any if instance is None else instance.strip


def _strip_any(path: Any) -> Any:
    return [strip(item) for item in path] if isinstance(path, list) else strip(path)


class _StorageOptions:
    """`AbstractFileSystem.storage_options`, which fsspec sets to what was passed: with its secrets hidden."""

    def __get__(self, instance: Base | None, _owner: type[Base]) -> Any:
        return self if instance is None else instance.__dict__["storage_options"]

    def __set__(self, instance: Base, options: Mapping[str, Any]) -> None:
        instance.__dict__["storage_options"] = hide(options)


class _IsSharing:
    """Whether a file system that is created now is to have its secrets in pickles; an attribute of the class."""

    def __get__(self, _instance: Base | None, _owner: type[Base]) -> bool:
        return is_sharing()


class Base(AbstractFileSystem):  # type: ignore[misc]  # fsspec is not typed
    """One account, and its clients."""

    protocol = PROTOCOLS
    root_marker = ""
    storage_options = _StorageOptions()
    storage_args: tuple[Any, ...] = ()
    _strip_protocol = _Strip()
    _is_sharing = _IsSharing()
    _extra_tokenize_attributes = ("_is_sharing",)  # fsspec returns the same object for the same arguments and these
    _epoch = object()  # another one after each change; listings that are older are not cached

    def __init__(
        self,
        account_name: str | None = None,
        *,
        account_key: str | None = None,
        sas_token: str | None = None,
        connection_string: str | None = None,
        credential: Credential | str = None,
        anon: bool | None = None,
        tenant_id: str | None = None,
        client_id: str | None = None,
        client_secret: str | None = None,
        account_host: str | None = None,
        transfer: TransferConfig | Mapping[str, Any] | None = None,
        **options: Any,
    ) -> None:
        passed = {
            "account_name": account_name,
            "account_key": account_key,
            "sas_token": sas_token,
            "connection_string": connection_string,
            "credential": credential,
            "anon": anon,
            "tenant_id": tenant_id,
            "client_id": client_id,
            "client_secret": client_secret,
            "account_host": account_host,
            "transfer": transfer,
            **options,
        }
        check_names(passed)
        self._is_shared = is_sharing()
        super().__init__(**options)
        self._options = hide({name: value for name, value in passed.items() if value is not None})
        self.__dict__["storage_options"] = self._options  # fsspec replaces it
        self._token: str = tokenize(type(self).__name__, *sorted(map(_describe, self._options.items())))
        if all(not isinstance(value, Hidden) or value.value is not None for value in self._options.values()):
            _ = self.clients  # checks the options

    @property
    def clients(self) -> ClientFactory:
        """The clients of this account."""
        found: ClientFactory | None = self.__dict__.get("_clients")
        if found is None:
            credential, is_trusted = credential_of(self._options, self.account)
            trusted = self.account if is_trusted else None
            found = self.__dict__.setdefault("_clients", ClientFactory(credential, transfer_of(self._options), trusted))
        assert found is not None
        return found

    @property
    def account(self) -> BlobURL:
        """The URL of this account, with an empty container."""
        found: BlobURL | None = self.__dict__.get("_account")
        return found or self.__dict__.setdefault("_account", account_url(self._options))

    @property
    def engine(self) -> Engine:
        """The threads of this process for these transfers."""
        return engine_for(self.clients.config)

    @property
    def transfer(self) -> TransferConfig:
        """How this file system transfers."""
        return self.clients.config

    # -- paths ------------------------------------------------------------------------------------------------------

    def strip(self, path: Any) -> Any:
        """*path*, or each path of a list, without its protocol.

        Raises:
            ValueError: the path names another account than the one of this file system.
        """
        if isinstance(path, list):
            return [self.strip(item) for item in path]
        named = account_of(path)
        if named is not None and named.host != self.account.host:
            ours = self._options.get("account_name") or self.account.account_name
            if not ours or named.account_name != ours:
                raise ValueError(
                    f"path: it is in the account {named.host}, but this file system is for {self.account.host}: create "
                    "another one with fsspec.url_to_fs(path)"
                )
        return strip(path)

    @staticmethod
    def _get_kwargs_from_urls(path: Any) -> dict[str, str]:
        named = account_of(path)
        if named is None:
            return {}
        if named.host == f"{named.account_name}.blob.core.windows.net":
            return {"account_name": named.account_name}
        return {"account_host": named.host}

    @classmethod
    def _parent(cls, path: Any) -> str:
        return parent(strip(path))

    def place(self, path: Any) -> Place:
        """The place of *path*."""
        return Place.of(self.strip(path))

    def account_client(self) -> AccountClient:
        """The client for this account."""
        return self.clients.account(self.account)

    def container(self, place: Place) -> ContainerClient:
        """The client for the container of *place*."""
        url = self.account
        return self.clients.container(BlobURL(url.scheme, url.host, url.account_path, place.container))

    def blob(self, place: Place) -> BlobClient:
        """The client for the blob at *place*.

        Raises:
            ValueError: it is not a valid name of a blob.
        """
        check_name(place.name, "path")
        container = self.container(place)
        url = container.url.with_blob(place.name)
        return container.at(dataclasses.replace(url, snapshot=place.snapshot, versionid=place.versionid))

    # -- the cache of listings --------------------------------------------------------------------------------------

    def invalidate_cache(self, path: Any = None) -> None:
        """Forget the cached listings of *path*, of everything below it, and of the directories above it; or all."""
        self._epoch = object()
        super().invalidate_cache(path)
        if path is None:
            self.dircache.clear()
            return
        place = strip(path)
        below = f"{place}/"
        stale = [key for key in list(self.dircache) if key.startswith(below)] if len(self.dircache) else []
        while True:
            stale.append(place)
            if not place:
                break
            place = parent(place)
        for key in stale:
            with suppress(KeyError):  # another thread was first
                del self.dircache[key]

    # -- what is shown and pickled ----------------------------------------------------------------------------------

    @property
    def fsid(self) -> str:
        """An identifier of the account."""
        return f"azt_{self.account.account_url}"

    @property
    def _fs_token(self) -> str:
        return self._token

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.account.account_url}>"

    def to_dict(self, *, include_password: bool = True) -> dict[str, Any]:  # noqa: ARG002
        """The class and its options, without secrets and credential objects, whatever *include_password* is.

        A file system that is created from it takes its credential from the environment.
        """
        options: dict[str, Any] = {}
        for name, value in self._options.items():
            if isinstance(value, Hidden):
                if value.public:
                    options["account_host"] = self.account.account_url
            elif name == "transfer":
                config = transfer_of(self._options)
                assert config is not None
                options[name] = {**dataclasses.asdict(config), "trusted_hosts": list(config.trusted_hosts)}
            elif name not in ("credential", "tenant_id", "client_id"):
                options[name] = value
        cls = type(self)
        return {"cls": f"{cls.__module__}:{cls.__name__}", "protocol": self.protocol[0], "args": [], **options}

    def __reduce__(self) -> tuple[Any, ...]:
        options = dict(self._options)
        credential = options.pop("credential", None)
        if credential is not None and not isinstance(credential, (Hidden, CredentialHolder)):
            # It knows which secrets a pickle may contain.
            credential = CredentialHolder(credential, is_shared=self._is_shared)
        return _restore, (type(self), options, credential)


def _restore(cls: type[Base], options: dict[str, Any], credential: Any) -> Base:
    if credential is None:
        return cls(**options)
    # fsspec would take holders of two credentials for the same.
    return cls(**options, credential=credential, skip_instance_cache=True)


def _describe(item: tuple[str, Any]) -> str:
    """An option in the token of a file system: equal for a copy in another process, and without secrets."""
    name, value = item
    if name == "credential" and not isinstance(value, (bool, Hidden)):
        return name
    return f"{name}={value!r}"
