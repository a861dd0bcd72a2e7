"""One Azurite for each test process, a separate container for each test."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from azure.storage.blob import BlobServiceClient

from recipes.azurite import Azurite, run_azurite
from tests.azurite.container import Container, open_service
from tests.azurite.emulator import run_emulator
from tests.azurite.token import AzuriteTokenCredential


@pytest.fixture(scope="session")
def azurite() -> Iterator[Azurite]:
    """The service over http: account key, SAS, anonymous."""
    with run_azurite(timeout=180) as service:
        yield service


@pytest.fixture(scope="session")
def azurite_https() -> Iterator[Azurite]:
    """The service over https, with a certificate of a test authority: also bearer tokens."""
    with run_azurite(https=True, oauth=True, timeout=180) as service:
        yield service


@pytest.fixture(scope="session")
def azurite_client(azurite: Azurite) -> Iterator[BlobServiceClient]:
    with open_service(azurite) as client:
        yield client


@pytest.fixture(scope="session")
def azurite_https_client(azurite_https: Azurite) -> Iterator[BlobServiceClient]:
    with open_service(azurite_https) as client:
        yield client


@pytest.fixture
def container(azurite: Azurite, azurite_client: BlobServiceClient) -> Iterator[Container]:
    """A new private container over http."""
    with _fresh_container(azurite, azurite_client) as fresh:
        yield fresh


@pytest.fixture
def public_container(azurite: Azurite, azurite_client: BlobServiceClient) -> Iterator[Container]:
    """A new container over http that everybody can list and read."""
    with _fresh_container(azurite, azurite_client, public_access="container") as fresh:
        yield fresh


@pytest.fixture
def https_container(
    azurite_https: Azurite, azurite_https_client: BlobServiceClient, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Container]:
    """A new private container over https; this process and its children trust its authority."""
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(azurite_https.ca_path))
    with _fresh_container(azurite_https, azurite_https_client) as fresh:
        yield fresh


@pytest.fixture(scope="session")
def emulator(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Azurite]:
    """The service as the command ``azstoragetorch azurite`` runs it, with the published key."""
    with run_emulator(tmp_path_factory.mktemp("emulator")) as service:
        yield service


@pytest.fixture
def emulator_container(emulator: Azurite) -> Iterator[Container]:
    """A new private container in an emulator, which accepts only the published key."""
    with open_service(emulator) as client, _fresh_container(emulator, client) as fresh:
        yield fresh


@pytest.fixture
def token_credential() -> AzuriteTokenCredential:
    """A credential for `https_container`."""
    return AzuriteTokenCredential()


@contextmanager
def _fresh_container(
    service: Azurite, client: BlobServiceClient, *, public_access: str | None = None
) -> Iterator[Container]:
    name = f"test-{uuid.uuid4().hex}"
    made = client.create_container(name, public_access=public_access)
    try:
        yield Container(service, name, made)
    finally:
        client.delete_container(name)
