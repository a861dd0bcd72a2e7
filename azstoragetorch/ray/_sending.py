"""What is sent to workers of Ray, and whether it can be."""

from __future__ import annotations

import pickle

from azstoragetorch._blob.client import ClientFactory
from azstoragetorch._blob.credentials import Credential, CredentialHolder
from azstoragetorch._blob.url import BlobURL, parse_url
from azstoragetorch._engine.config import TransferConfig


def clients_below(url: str, credential: Credential, transfer: TransferConfig | None) -> tuple[BlobURL, ClientFactory]:
    """*url*, and the clients for blobs below it, which can be sent to a worker. A SAS in *url* is used for all of them.

    Raises:
        ValueError: *url* is not valid, or is a snapshot or version.
        TypeError: *credential* or *transfer* has the wrong type, or cannot be sent to a worker.
    """
    place = parse_url(url)
    if place.is_read_only:
        raise ValueError(f"url {str(place)!r} is a snapshot or version: pass the URL of a folder or of a blob")
    clients = ClientFactory(credential, transfer, place)
    if place.sas is not None:
        clients = ClientFactory(CredentialHolder(None, place.sas), transfer)
    check_sendable(clients)
    return place, clients


def check_sendable(clients: ClientFactory) -> None:
    """Check that *clients* can be sent to a worker; whether with their secrets depends on `share_credentials`.

    Raises:
        TypeError: the credential cannot be pickled.
    """
    try:
        pickle.dumps(clients)
    except (TypeError, AttributeError, pickle.PicklingError) as error:
        raise TypeError(
            f"credential: it cannot be sent to a worker of Ray ({error}): pass credential=None, with which each worker "
            "signs in from its environment (DefaultAzureCredential)"
        ) from error
