"""Choose the credential of a command. Secrets come from the environment or the URL, never from an option."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from azure.core.credentials import AzureNamedKeyCredential, AzureSasCredential

from azstoragetorch._blob.client import BlobClient, ClientFactory, ContainerClient
from azstoragetorch._blob.credentials import Credential, check_key, is_trusted
from azstoragetorch._blob.url import BlobURL
from azstoragetorch._engine.config import TRUSTED_HOSTS, TransferConfig

ACCOUNT, KEY, SAS = "AZURE_STORAGE_ACCOUNT", "AZURE_STORAGE_KEY", "AZURE_STORAGE_SAS_TOKEN"


@dataclass(frozen=True)
class CredentialOptions:
    """The options of a command that concern credentials."""

    warn: Callable[[str], None]
    is_anonymous: bool = False
    sas_variable: str | None = None
    trusted_hosts: Sequence[str] = ()

    def choose(self, url: BlobURL) -> tuple[Credential, str]:
        """The credential for *url* and a description of its origin.

        A SAS in the URL comes first, then the options, then the environment, then DefaultAzureCredential. A key or SAS
        of the environment belongs to one account: it is not used if AZURE_STORAGE_ACCOUNT names another, and not sent
        to a host that is not known to belong to Azure.

        Raises:
            ValueError: the variable of ``--sas-env`` is not set; the host is not trusted; or the key is not base64.
        """
        if url.sas is not None:
            return AzureSasCredential(url.sas.reveal()), "SAS in the URL"
        if self.is_anonymous:
            return False, "none (anonymous)"
        if self.sas_variable is not None:
            token = os.environ.get(self.sas_variable)
            if not token:
                raise ValueError(f"--sas-env: the environment variable {self.sas_variable} is not set")
            return AzureSasCredential(token), f"SAS in {self.sas_variable}"
        key, token = os.environ.get(KEY), os.environ.get(SAS)
        if not key and not token:
            return None, "the published key of Azurite" if url.is_emulator else "DefaultAzureCredential"
        account = self._account_of(url)
        named = os.environ.get(ACCOUNT) or account
        if named == account:
            if key:
                return AzureNamedKeyCredential(account, check_key(key, KEY)), f"account key in {KEY}"
            return AzureSasCredential(token or ""), f"SAS in {SAS}"
        unused = [name for name in (KEY, SAS) if os.environ.get(name)]
        self.warn(
            f"{' and '.join(unused)} not used: {ACCOUNT} is {named}, but {url.account_url} is the account "
            f"{account}. Set {ACCOUNT}={account} if the key belongs to it, or unset {ACCOUNT}"
        )
        return None, "DefaultAzureCredential"

    def credential(self, url: BlobURL) -> Credential:
        """The credential for *url*."""
        return self.choose(url)[0]

    def for_both(self, source: BlobURL, target: BlobURL) -> Credential:
        """The credential for both, except those that have a SAS in the URL.

        Raises:
            ValueError: they are in different accounts.
        """
        plain = [url for url in (source, target) if url.sas is None]
        if len({url.account_url for url in plain}) > 1:
            raise ValueError(f"{source} and {target} are in different accounts: give one of the URLs a SAS")
        return self.credential(plain[0]) if plain else False

    def blob(self, url: BlobURL, config: TransferConfig) -> BlobClient:
        """The blob at *url*."""
        return ClientFactory(self.credential(url), config, url).blob(url)

    def container(self, url: BlobURL, config: TransferConfig) -> ContainerClient:
        """The container that *url* is in."""
        return ClientFactory(self.credential(url), config, url).container(url)

    def _account_of(self, url: BlobURL) -> str:
        """The account that *url* belongs to.

        On another host, a path can name any account. So hosts that are not Azure's need the user's trust.
        """
        account = url.account_name or os.environ.get(ACCOUNT)
        if account and (url.is_azure or url.is_loopback or is_trusted(url, self.trusted_hosts)):
            return account
        set_account = "" if url.account_name else f"set {ACCOUNT} to the account and "
        raise ValueError(
            f"{url.host!r} is not a host of Azure Storage, so the key or SAS in the environment is not sent to it. If "
            f"it serves your account, {set_account}pass --trusted-host {url.host} (or set {TRUSTED_HOSTS}). Otherwise "
            f"unset {KEY} and {SAS}, or pass --anonymous"
        )


def with_sas(url: BlobURL) -> str:
    """*url* as a string, with its SAS."""
    return str(url) if url.sas is None else f"{url}?{url.sas.reveal()}"


class TokenSource(logging.Handler):
    """Reads azure-identity's log to find out which of its credentials returned a token; *found* is None until then."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.found: str | None = None
        self._logger = logging.getLogger("azure.identity")
        self._level = self._logger.level

    def emit(self, record: logging.LogRecord) -> None:
        """Keep the name in ``... acquired a token from ...``, a message that the SDK documents."""
        if "acquired a token from" in record.msg and isinstance(record.args, tuple) and record.args:
            self.found = str(record.args[-1])

    def __enter__(self) -> TokenSource:
        self._logger.setLevel(logging.INFO)
        self._logger.addHandler(self)
        return self

    def __exit__(self, *_error: object) -> None:
        self._logger.removeHandler(self)
        self._logger.setLevel(self._level)
