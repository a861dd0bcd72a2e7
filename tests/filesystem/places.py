"""File systems for tests: over Azurite, and over the fault service."""

from __future__ import annotations

from typing import Any

from azstoragetorch.filesystem import AzureBlobFileSystem
from tests.azurite.container import Container
from tests.faults import FaultService
from tests.support import QUICK


def connection_string(container: Container) -> str:
    service = container.service
    return (
        f"DefaultEndpointsProtocol=http;AccountName={service.account_name};AccountKey={service.account_key};"
        f"BlobEndpoint={service.account_url};"
    )


def on_azurite(container: Container, **options: Any) -> AzureBlobFileSystem:
    options = {"connection_string": connection_string(container), "skip_instance_cache": True, **options}
    return AzureBlobFileSystem(**options)


def on_faults(service: FaultService, **options: Any) -> AzureBlobFileSystem:
    """A file system over *service*, with small parts and blocks and the container ``c``."""
    service.create_container("c")
    endpoint = service.container_url("c").removesuffix("/c")
    options = {"anon": True, "transfer": QUICK, "skip_instance_cache": True, **options}
    return AzureBlobFileSystem(account_host=endpoint, **options)
