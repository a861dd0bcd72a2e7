"""The file system, and the protocols that lead to it."""

from __future__ import annotations

from fsspec import register_implementation

from azstoragetorch.filesystem._changes import Changes
from azstoragetorch.filesystem._paths import PROTOCOLS


class AzureBlobFileSystem(Changes):
    """The blobs of one account as a file system of fsspec.

    Paths are ``container/name``, with or without a protocol: ``azt://container/name``, and the URLs of adlfs. Names
    are not percent-encoded. A path that names another account is refused. A path can end in ``?versionid=...`` or
    ``?snapshot=...`` with the time that the service shows, to read an older state.

    Instances can be shared between threads and used in forked processes. A pickle contains the credential, but
    a secret only if it is for a child process that is being started. Elsewhere, account keys, SAS, and client secrets
    are read from the environment again.

    Args:
        account_name: The name of the account. Default: the environment variable ``AZURE_STORAGE_ACCOUNT_NAME``.
        account_key: The account key, or ``AZURE_STORAGE_ACCOUNT_KEY``.
        sas_token: A SAS, or ``AZURE_STORAGE_SAS_TOKEN``.
        connection_string: A connection string, or ``AZURE_STORAGE_CONNECTION_STRING``.
        credential: A ``TokenCredential``, ``AzureSasCredential`` or ``AzureNamedKeyCredential``, ``False`` for
            anonymous access, or a SAS or account key as a string. Without any credential,
            :class:`azure.identity.DefaultAzureCredential` is used.
        anon: ``True`` for anonymous access.
        tenant_id: The tenant of a service principal; *client_id* and *client_secret* are needed, too.
        client_id: Its client id.
        client_secret: Its secret.
        account_host: The host of the account, if it is not ``<account_name>.blob.core.windows.net``; also a URL such
            as ``http://127.0.0.1:10000/devstoreaccount1``.
        transfer: Transfer settings: a :class:`azstoragetorch.TransferConfig`, or a dict of its arguments.
        options: ``use_listings_cache``, ``listings_expiry_time`` and ``max_paths`` of fsspec's cache of listings, which
            only `ls` and `walk` use, and ``skip_instance_cache``.

    Raises:
        ValueError: no account is named, or options contradict each other.
        TypeError: an option is unknown or has the wrong type.
    """


def install() -> None:
    """Make the protocols ``az``, ``abfs``, ``abfss``, ``wasb``, ``wasbs``, and ``azt`` lead to this file system.

    It replaces adlfs in this process. File systems that exist already stay as they are. Setting the environment
    variable ``AZSTORAGETORCH_FSSPEC=1`` does the same when ``azstoragetorch`` is imported.
    """
    for protocol in PROTOCOLS:
        register_implementation(protocol, AzureBlobFileSystem, clobber=True)
