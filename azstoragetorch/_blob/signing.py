"""URLs that give access to one blob for a while: with a SAS that is signed with the account key or for an identity."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from dataclasses import replace
from datetime import datetime, timedelta, timezone
from typing import Any

from azure.core.credentials import AzureNamedKeyCredential
from azure.core.exceptions import ServiceResponseError

from azstoragetorch._blob.authorizers import check_key
from azstoragetorch._blob.errors import picklable
from azstoragetorch._blob.retry import retrying
from azstoragetorch._blob.service import Request, Service
from azstoragetorch._blob.url import BlobURL

_CLOCK_SKEW = timedelta(minutes=15)
_KEY_FIELDS = {  # in the response -> of the SDK's key
    "SignedOid": "signed_oid",
    "SignedTid": "signed_tid",
    "SignedStart": "signed_start",
    "SignedExpiry": "signed_expiry",
    "SignedService": "signed_service",
    "SignedVersion": "signed_version",
    "Value": "value",
}


def sign_with_key(url: BlobURL, key: AzureNamedKeyCredential, lifetime: timedelta) -> str:
    """The URL of the blob with a SAS that allows reading it for *lifetime*, signed with the account key."""
    named_key = key.named_key
    secret = check_key(named_key.key, f"credential: the account key of {named_key.name!r}")
    return _signed(url, named_key.name, lifetime, {"account_key": secret})


def sign_for_identity(service: Service, url: BlobURL, lifetime: timedelta) -> str:
    """The same, signed with a key that the service creates for the identity of *service*: at most seven days.

    Raises:
        AzureError: the service refused: the identity needs the permission to create such a key.
    """
    from azure.storage.blob import UserDelegationKey

    now = datetime.now(timezone.utc)
    body = (
        f"<KeyInfo><Start>{_stamp(now - _CLOCK_SKEW)}</Start><Expiry>{_stamp(now + lifetime)}</Expiry></KeyInfo>"
    ).encode()
    account = replace(url, container="", blob="", snapshot=None, versionid=None)
    query = "restype=service&comp=userdelegationkey"
    request = Request("POST", account, query, {"Content-Type": "application/xml"}, body, purpose="user delegation key")

    def ask() -> bytes:
        with service.send(request) as response:
            return response.read()

    raw = retrying(service.config, ask)
    key = UserDelegationKey()  # type: ignore[no-untyped-call]
    try:
        root = ET.fromstring(raw)  # noqa: S314 - as in `listing`
    except (ET.ParseError, LookupError, ValueError) as error:
        what = f"POST (user delegation key) {account}: the response is not XML: {error}"
        raise picklable(ServiceResponseError(what)) from None
    for element, attribute in _KEY_FIELDS.items():
        setattr(key, attribute, root.findtext(element))
    return _signed(url, url.account_name, lifetime, {"user_delegation_key": key})


def _signed(url: BlobURL, account: str, lifetime: timedelta, proof: dict[str, Any]) -> str:
    from azure.storage.blob import BlobSasPermissions, generate_blob_sas

    now = datetime.now(timezone.utc)
    sas = generate_blob_sas(
        account,
        url.container,
        url.blob,
        snapshot=url.snapshot,
        version_id=url.versionid,
        permission=BlobSasPermissions(read=True),
        start=now - _CLOCK_SKEW,
        expiry=now + lifetime,
        **proof,
    )
    version = f"snapshot={url.snapshot}&" if url.snapshot else f"versionid={url.versionid}&" if url.versionid else ""
    return f"{url}?{version}{sas}"


def _stamp(moment: datetime) -> str:
    return moment.strftime("%Y-%m-%dT%H:%M:%SZ")
