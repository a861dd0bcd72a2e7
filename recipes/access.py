"""A SAS in a URL, as portals hand it out, taken apart: a URL to append names to, and the SAS as a credential."""

from __future__ import annotations

from typing import Any

from azure.core.credentials import AzureSasCredential


def split_sas(url: str, credential: Any = None) -> tuple[str, Any]:
    """*url* without its SAS, and the credential for it."""
    place, _, sas = url.partition("?")
    return place, AzureSasCredential(sas) if sas and credential is None else credential
