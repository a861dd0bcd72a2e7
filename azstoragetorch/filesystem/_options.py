"""Storage options: the account, its credential, and how to transfer. Unknown options are errors; secrets are not shown.

Options that are passed take precedence over the environment. A secret of the environment is used only for the account
that the environment names, and is never sent to a host outside Azure.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from azure.core.credentials import AzureNamedKeyCredential, AzureSasCredential

from azstoragetorch._blob.credentials import Credential, CredentialHolder, check_key
from azstoragetorch._blob.secret import Secret
from azstoragetorch._blob.url import ACCOUNT_VARIABLE, BlobURL, parse_url
from azstoragetorch._engine.config import TransferConfig

KEY_VARIABLE = "AZURE_STORAGE_ACCOUNT_KEY"
SAS_VARIABLE = "AZURE_STORAGE_SAS_TOKEN"
CONNECTION_VARIABLE = "AZURE_STORAGE_CONNECTION_STRING"

_PRINCIPAL = ("tenant_id", "client_id", "client_secret")
_SECRETS = ("account_key", "sas_token", "connection_string", "client_secret")
OF_FSSPEC = ("use_listings_cache", "listings_expiry_time", "max_paths")
_NO_EFFECT = ("asynchronous", "loop")  # for other file systems; zarr passes them to all
KNOWN = (
    "account_name",
    "account_host",
    "credential",
    "anon",
    "transfer",
    "tenant_id",
    "client_id",
    *_SECRETS,
    *OF_FSSPEC,
    *_NO_EFFECT,
    "skip_instance_cache",
)
_OF_ADLFS = {
    "blocksize": "pass transfer=TransferConfig(block_size=...)",
    "max_concurrency": "pass transfer=TransferConfig(max_concurrency=...)",
    "connection_timeout": "pass transfer=TransferConfig(connect_timeout=...)",
    "read_timeout": "pass transfer=TransferConfig(read_timeout=...)",
    "timeout": "pass transfer=TransferConfig(read_timeout=...)",
    "default_cache_type": "leave it out, since files read ahead as the access pattern needs",
    "default_fill_cache": "leave it out, since files read ahead as the access pattern needs",
    "version_aware": "leave it out, since a path can always end in ?versionid=...",
    "assume_container_exists": "leave it out, since containers are not checked",
    "location_mode": "pass account_host='<account>-secondary.blob.core.windows.net'",
    "request_session": "leave it out, since connections are pooled by this process",
    "socket_timeout": "leave it out, since it has no effect in adlfs either",
}
_FIELDS = {  # of a connection string
    name.lower()
    for name in ("AccountName", "AccountKey", "SharedAccessSignature", "BlobEndpoint", "DefaultEndpointsProtocol")
} | {"endpointsuffix", "usedevelopmentstorage"}


@dataclass(frozen=True)
class Hidden:
    """A secret option. Its digest distinguishes it from others; *public* is the part of it that is not secret."""

    secret: Secret
    digest: str
    public: str = ""

    def __repr__(self) -> str:
        return f"<hidden {self.digest}>"

    @property
    def value(self) -> str | None:
        """The secret; None if it was left out of a pickle."""
        try:
            return self.secret.reveal()
        except ValueError:
            return None


def check_names(options: Mapping[str, Any]) -> None:
    """Refuse unknown options.

    Raises:
        TypeError: an option is unknown; the message says what to write instead.
    """
    for name in options:
        if name in KNOWN:
            continue
        if name in _OF_ADLFS:
            raise TypeError(f"storage option {name!r} is one of adlfs: {_OF_ADLFS[name]}")
        nearest = get_close_matches(name, KNOWN, 1, cutoff=0.6)
        hint = f"did you mean {nearest[0]!r}?" if nearest else f"the options are {', '.join(KNOWN)}"
        raise TypeError(f"unknown storage option {name!r}: {hint}")


def hide(options: Mapping[str, Any]) -> dict[str, Any]:
    """*options* with every secret hidden."""
    hidden = {}
    for name, value in options.items():
        is_secret = isinstance(value, str) and (name in _SECRETS or name == "credential")
        hidden[name] = _hide(name, value) if is_secret else value
    return hidden


def _hide(name: str, value: str) -> Hidden:
    digest = hashlib.sha256(f"{name}={value}".encode()).hexdigest()[:16]
    public = ""
    if name == "connection_string":
        kept = ("AccountName", "BlobEndpoint", "DefaultEndpointsProtocol", "EndpointSuffix")
        found = _parse_connection_string(value)
        public = ";".join(f"{field}={found[field.lower()]}" for field in kept if field.lower() in found)
    return Hidden(Secret(value), digest, public)


def transfer_of(options: Mapping[str, Any]) -> TransferConfig | None:
    """The option ``transfer``, which can be a dict, as in configuration files."""
    transfer = options.get("transfer")
    return TransferConfig(**transfer) if isinstance(transfer, Mapping) else transfer


def credential_of(options: Mapping[str, Any], url: BlobURL) -> tuple[Credential | CredentialHolder, bool]:
    """The credential for the account *url*, from *options* (see `hide`) or the environment.

    The second value says whether it was passed together with the host.

    Raises:
        ValueError: options contradict each other; or a secret was left out of a pickle and is not in the environment
            either.
    """
    explicit = _explicit_credentials(options, url)
    if len(explicit) > 1:
        raise ValueError(f"storage options {' and '.join(explicit)} contradict each other: pass one of them")
    for credential in explicit.values():
        return credential, True
    found, is_trusted = _credential_of_environment(url)
    lost = [value for value in options.values() if isinstance(value, Hidden) and value.value is None]
    if found is None and lost:
        lost[0].secret.reveal()  # raises: it says what to do
    return found, is_trusted


def _check_types(options: Mapping[str, Any]) -> None:
    for name in KNOWN:
        if name in ("account_name", "account_host", "tenant_id", "client_id") or name in _SECRETS:
            value = options.get(name)
            if not (value is None or isinstance(value, (str, Hidden))):
                raise TypeError(f"storage option {name} must be a str, not {type(value).__name__}")


# -- the account -------------------------------------------------------------------------------------------------------


def account_url(options: Mapping[str, Any]) -> BlobURL:
    """The account that *options* (see `hide`) and the environment name, as a URL with an empty container.

    Raises:
        ValueError: no account is named, or two.
        TypeError: an option has the wrong type.
    """
    _check_types(options)
    connection = _connection(options)
    named, host = options.get("account_name"), options.get("account_host")
    name = named or connection.get("accountname")
    if named and connection.get("accountname", named) != named:
        raise ValueError(f"storage options account_name={named!r} and connection_string name two accounts")
    endpoint = host or _endpoint(connection)
    if not (name or endpoint):
        connection = _connection_of_environment()
        name, endpoint = connection.get("accountname"), _endpoint(connection)
    name = name or (os.environ.get(ACCOUNT_VARIABLE) if not endpoint else None)
    if not endpoint and name and _connection_of_environment().get("accountname") == name:
        endpoint = _endpoint(_connection_of_environment())
    if endpoint:
        return _url_of_endpoint(endpoint, name)
    if not name:
        raise ValueError(
            "no account: pass the storage option account_name or connection_string, write "
            "abfss://<container>@<account>.dfs.core.windows.net/<path>, or set the environment variable "
            f"{ACCOUNT_VARIABLE}"
        )
    return _url_of_endpoint(f"https://{name}.blob.core.windows.net", name)


def _url_of_endpoint(endpoint: str, name: str | None) -> BlobURL:
    base = (endpoint if "://" in endpoint else f"https://{endpoint}").rstrip("/")
    if "?" in base:
        raise ValueError("storage option account_host has a query: pass a SAS as sas_token")
    try:
        return _without_container(parse_url(f"{base}/container", argument="account_host"))
    except ValueError:
        if name is None or "/" in base.partition("://")[2]:
            raise
    return _without_container(parse_url(f"{base}/{name}/container", argument="account_host"))


def _without_container(url: BlobURL) -> BlobURL:
    return BlobURL(url.scheme, url.host, url.account_path, "")


# -- connection strings ------------------------------------------------------------------------------------------------


def _connection(options: Mapping[str, Any]) -> dict[str, str]:
    """The fields of the option ``connection_string``; without its secrets if they were left out of a pickle."""
    hidden = options.get("connection_string")
    return _parse_connection_string(hidden.value or hidden.public) if isinstance(hidden, Hidden) else {}


def _connection_of_environment() -> dict[str, str]:
    return _parse_connection_string(os.environ.get(CONNECTION_VARIABLE, ""))


def _parse_connection_string(text: str) -> dict[str, str]:
    fields = {}
    for item in filter(None, text.strip().split(";")):
        key, separator, value = item.partition("=")
        if not separator:
            raise ValueError(
                "the connection string is not a list of <name>=<value>, separated by semicolons: copy the whole string"
            )
        if key.strip().lower() in _FIELDS:
            fields[key.strip().lower()] = value.strip()
    return fields


def _endpoint(fields: Mapping[str, str]) -> str | None:
    if fields.get("usedevelopmentstorage", "").lower() == "true":
        return "http://127.0.0.1:10000/devstoreaccount1"
    if "blobendpoint" in fields:
        return fields["blobendpoint"]
    if "accountname" not in fields:
        return None
    suffix = fields.get("endpointsuffix", "core.windows.net")
    return f"{fields.get('defaultendpointsprotocol', 'https')}://{fields['accountname']}.blob.{suffix}"


# -- credentials -------------------------------------------------------------------------------------------------------


def _explicit_credentials(options: Mapping[str, Any], url: BlobURL) -> dict[str, Credential | CredentialHolder]:
    """The credentials in *options*, by the option."""
    found: dict[str, Credential | CredentialHolder] = {}
    name = options.get("account_name") or url.account_name
    key, sas = _revealed(options, "account_key"), _revealed(options, "sas_token")
    if key:
        found["account_key"] = _key(name, key, "storage option account_key")
    if sas:
        found["sas_token"] = AzureSasCredential(sas.lstrip("?"))
    of_connection = _credential_of_connection(_connection(options), url)
    if of_connection is not None:
        found["connection_string"] = of_connection
    credential = options.get("credential")
    if isinstance(credential, Hidden):
        text = credential.value
        if text:
            is_sas = "sig=" in text
            found["credential"] = AzureSasCredential(text.lstrip("?")) if is_sas else _key(name, text, "credential")
    elif credential is not None:
        found["credential"] = credential
    if any(options.get(part) is not None for part in _PRINCIPAL):
        principal = _service_principal(options)
        if principal is not None:
            found["client_secret"] = principal
    if options.get("anon"):
        found["anon=True"] = False
    return found


def _credential_of_environment(url: BlobURL) -> tuple[Credential, bool]:
    """The credential of the environment for the account *url*, and whether the environment names the host as well.

    None is DefaultAzureCredential.
    """
    named = os.environ.get(ACCOUNT_VARIABLE)
    if not named or named == url.account_name:
        if key := os.environ.get(KEY_VARIABLE):
            return _key(url.account_name, key, f"environment variable {KEY_VARIABLE}"), False
        if sas := os.environ.get(SAS_VARIABLE):
            return AzureSasCredential(sas.lstrip("?")), False
    connection = _connection_of_environment()
    endpoint = _endpoint(connection)
    if endpoint is not None and _url_of_endpoint(endpoint, connection.get("accountname")) == url:
        return _credential_of_connection(connection, url), True
    return None, False


def _credential_of_connection(fields: Mapping[str, str], url: BlobURL) -> Credential:
    if "accountkey" in fields:
        return _key(
            fields.get("accountname") or url.account_name, fields["accountkey"], "the connection string: the key"
        )
    if "sharedaccesssignature" in fields:
        return AzureSasCredential(fields["sharedaccesssignature"].lstrip("?"))
    return None


def _key(name: str, key: str, what: str) -> AzureNamedKeyCredential:
    if not name:
        raise ValueError(f"{what} needs the name of its account: pass account_name")
    return AzureNamedKeyCredential(name, check_key(key, what))


def _service_principal(options: Mapping[str, Any]) -> Any:
    """The credential for the three options of a service principal; None if its secret is not here any more."""
    missing = [name for name in _PRINCIPAL if not options.get(name)]
    if missing:
        raise ValueError(f"storage options {', '.join(_PRINCIPAL)} are needed together: pass {' and '.join(missing)}")
    secret = _revealed(options, "client_secret")
    if secret is None:
        return None
    from azure.identity import ClientSecretCredential

    return ClientSecretCredential(options["tenant_id"], options["client_id"], secret)


def _revealed(options: Mapping[str, Any], name: str) -> str | None:
    value = options.get(name)
    return value.value if isinstance(value, Hidden) else value
