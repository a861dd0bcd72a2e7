"""How the recipes get access: by a SAS in the URL, by an account key in the environment, or by ``az login``."""

from __future__ import annotations

import os
from typing import Any

from azure.core.credentials import AzureNamedKeyCredential, AzureSasCredential


def split_sas(url: str, credential: Any = None) -> tuple[str, Any]:
    """*url* without its SAS, and the credential for it."""
    place, _, sas = url.partition("?")
    return place, AzureSasCredential(sas) if sas and credential is None else credential


def credential_of_environment() -> Any:
    """The account key in ``AZURE_STORAGE_KEY``; without one None: a SAS in the URL or ``DefaultAzureCredential``."""
    if "AZURE_STORAGE_KEY" not in os.environ:
        return None
    return AzureNamedKeyCredential(os.environ["AZURE_STORAGE_ACCOUNT"], os.environ["AZURE_STORAGE_KEY"])
