"""A container for one test, with the SDK as a second way in: it reads what we write, and the reverse."""

from __future__ import annotations

import datetime
from dataclasses import dataclass, field
from urllib.parse import quote

from azure.core.credentials import AzureNamedKeyCredential, AzureSasCredential
from azure.storage.blob import (
    AccountSasPermissions,
    BlobServiceClient,
    ContainerClient,
    ResourceTypes,
    generate_account_sas,
    generate_container_sas,
)

from recipes.azurite import Azurite


@dataclass
class Container:
    """A new container, with every kind of credential."""

    service: Azurite
    name: str
    client: ContainerClient = field(repr=False)
    """The SDK's client, with the account key."""

    @property
    def url(self) -> str:
        """The URL without a query: it needs a credential, unless the container is public."""
        return f"{self.service.account_url}/{self.name}"

    @property
    def key(self) -> AzureNamedKeyCredential:
        return AzureNamedKeyCredential(self.service.account_name, self.service.account_key)

    @property
    def sas_credential(self) -> AzureSasCredential:
        return AzureSasCredential(self.sas())

    def sas_that_copies(self, permission: str = "rwdl") -> AzureSasCredential:
        """For the container: Azurite does not let a SAS for the account, as keys sign it, copy from a URL."""
        return AzureSasCredential(
            generate_container_sas(
                self.service.account_name,
                self.name,
                account_key=self.service.account_key,
                permission=permission,
                expiry=datetime.datetime.now(datetime.timezone.utc) + datetime.timedelta(hours=1),
            )
        )

    @property
    def sas_url(self) -> str:
        return f"{self.url}?{self.sas()}"

    def sas(self, permission: str = "rwdlac", *, valid_for: float = 3600.0) -> str:
        """A SAS for everything in the account, valid for *valid_for* seconds."""
        return generate_account_sas(
            self.service.account_name,
            self.service.account_key,
            ResourceTypes(container=True, object=True),
            AccountSasPermissions.from_string(permission),
            expiry=datetime.datetime.now(datetime.timezone.utc) + datetime.timedelta(seconds=valid_for),
        )

    def blob_url(self, blob: str) -> str:
        """The URL of *blob*, without a query."""
        return f"{self.url}/{quote(blob, safe='/')}"

    def blob_sas_url(self, blob: str, permission: str = "rwdlac") -> str:
        return f"{self.blob_url(blob)}?{self.sas(permission)}"

    def put(self, blob: str, data: bytes) -> str:
        """Store *data* with the SDK; return the URL of the blob with a SAS."""
        self.client.upload_blob(blob, data, overwrite=True)
        return self.blob_sas_url(blob)

    def get(self, blob: str) -> bytes:
        """Read the blob with the SDK."""
        return self.client.download_blob(blob).readall()

    def names(self) -> list[str]:
        """The names of all blobs, listed with the SDK."""
        return list(self.client.list_blob_names())

    def uncommitted(self, blob: str) -> int:
        """The number of uncommitted blocks of *blob*."""
        return len(self.client.get_blob_client(blob).get_block_list("uncommitted")[1])


def open_service(azurite: Azurite) -> BlobServiceClient:
    """The SDK client of the account."""
    key = AzureNamedKeyCredential(azurite.account_name, azurite.account_key)
    verify = str(azurite.ca_path) if azurite.ca_path else True
    return BlobServiceClient(azurite.account_url, credential=key, connection_verify=verify)
