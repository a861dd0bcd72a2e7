"""All operations use requests of this package: one service version, one transport, one translation of errors."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator

import pytest
from azure.core.credentials import AzureNamedKeyCredential
from azure.core.exceptions import HttpResponseError
from azure.storage.blob import BlobServiceClient

from azstoragetorch._blob.service import API_VERSION
from azstoragetorch.io import BlobIO
from recipes.azurite import Azurite, run_azurite
from tests.faults import FaultService, LostAnswer, Match, Status, WrongLength
from tests.support import QUICK, ROOT, blob_client, container_client, content, run_python

PROGRAM = """
import sys
{block}
from dataclasses import replace
from azstoragetorch._blob.client import BlobClient, ContainerClient
from azstoragetorch._blob.credentials import CredentialHolder
from azstoragetorch._blob.url import parse_blob_url, parse_container_url
from azstoragetorch._engine.config import TransferConfig
from azstoragetorch.io import BlobIO

url, transfer = sys.argv[1], TransferConfig(block_size=65536, part_size=65536, max_attempts=3, max_backoff=0.01)
data = bytes(range(256)) * 1200
for mode, new in (("wb", data), ("xb", data[::-1]), ("wb", b"small")):
    name = url + "/" + mode + str(len(new))
    with BlobIO(name, mode, credential=False, transfer=transfer) as blob:
        blob.write(new)
    with BlobIO(name, "rb", credential=False, transfer=transfer) as blob:
        assert blob.read() == new
holder = CredentialHolder(False)
container = ContainerClient(parse_container_url(url), holder, transfer)
names = [name for page in container.pages() for name in page.names]
assert len(names) == 3, names
for name in names:
    assert container.blob(name).version() is not None
    assert container.blob(name).delete()
    assert container.blob(name).version() is None
"""
BLOCK = """
import azure.core  # which loads some of these itself, and uses none unless it is asked to
for prefix in {blocked!r}:
    for name in [*sys.modules, prefix]:
        if name == prefix or name.startswith(prefix + "."):
            module = sys.modules.get(name)
            if module is not None:
                vars(module).clear()
            sys.modules[name] = None
"""
LEGACY = ("azure.core.pipeline.transport", "azure.core.rest", "azure.storage.blob")


@pytest.fixture
def service(fault_service: FaultService) -> FaultService:
    fault_service.put("c", "b", content(1000))
    return fault_service


@pytest.fixture(scope="module")
def strict_azurite() -> Iterator[Azurite]:
    """Azurite that refuses unknown service versions."""
    with run_azurite(strict=True) as azurite:
        yield azurite


class TestTransport:
    @pytest.mark.parametrize("blocked", [*[(name,) for name in LEGACY], LEGACY], ids=str)
    def test_no_type_of_the_sdks_transport_is_used(self, service: FaultService, blocked: tuple[str, ...]) -> None:
        """Reading, writing, creating, listing and deleting work without these modules."""
        service.create_container("new")
        service.script(Match("put_block_list", nth=2), [LostAnswer()])  # so that the block list is read as well
        run_python(PROGRAM.format(block=BLOCK.format(blocked=blocked)), service.container_url("new"))
        assert {entry.operation for entry in service.log} >= {
            "put_blob",
            "put_block",
            "put_block_list",
            "get_block_list",
            "get_blob",
            "head",
            "list_blobs",
            "delete",
        }


class TestVersion:
    def test_every_request_names_the_one_version(self, service: FaultService) -> None:
        service.create_container("new")
        run_python(PROGRAM.format(block=""), service.container_url("new"))
        assert {entry.headers["x-ms-version"] for entry in service.log} == {API_VERSION}

    @pytest.mark.parametrize("size", [1000, 300_000])
    def test_a_service_that_is_older_than_the_newest_sdk(self, strict_azurite: Azurite, size: int) -> None:
        """Requests of the installed SDK can be refused there; ours are not, including large writes."""
        credential = AzureNamedKeyCredential(strict_azurite.account_name, strict_azurite.account_key)
        with BlobServiceClient(strict_azurite.account_url, credential=credential, api_version=API_VERSION) as client:
            client.create_container(f"size{size}")
        url = f"{strict_azurite.account_url}/size{size}"
        with BlobIO(f"{url}/b", "xb", credential=credential, transfer=QUICK) as blob:
            blob.write(content(size))
        with BlobIO(f"{url}/b", "rb", credential=credential, transfer=QUICK) as blob:
            assert blob.read() == content(size)
        container = container_client(url, credential=credential)
        assert [name for page in container.pages() for name in page.names] == ["b"]
        assert container.blob("b").delete()


class TestErrors:
    @pytest.mark.parametrize(
        ("operation", "verb"),
        [
            ("get_blob", "GET"),
            ("head", "HEAD"),
            ("list_blobs", r"GET \(list\)"),
            ("delete", "DELETE"),
            ("put_blob", "PUT"),
            ("put_block", r"PUT \(block\)"),
            ("put_block_list", r"PUT \(block list\)"),
        ],
    )
    def test_each_verb_names_itself_the_url_and_the_answer(
        self, service: FaultService, operation: str, verb: str
    ) -> None:
        service.script(operation, [Status(400, "InvalidHeaderValue")], repeat=True)
        blob = blob_client(service.blob_url("c", "b"))
        calls = {
            "get_blob": blob.read,
            "head": blob.version,
            "list_blobs": lambda: list(container_client(service.container_url("c")).pages()),
            "delete": blob.delete,
            "put_blob": lambda: blob.put(b"new"),
        }
        with pytest.raises(Exception, match=rf"{verb} http://.*/c(/b)?: 400 .*InvalidHeaderValue") as caught:
            calls.get(operation, lambda: blob.put(content(300_000)))()
        error = caught.value if isinstance(caught.value, HttpResponseError) else caught.value.__cause__
        assert isinstance(error, HttpResponseError)
        assert error.status_code == 400

    def test_a_listing_whose_body_breaks_off_is_asked_for_again(self, service: FaultService) -> None:
        service.script("list_blobs", [WrongLength(5)])
        pages = list(container_client(service.container_url("c"), QUICK).pages())
        assert [page.names for page in pages] == [["b"]]
        assert len(service.requests("list_blobs")) == 2


def test_the_package_does_not_import_the_sdks_client() -> None:
    """It takes a fifth of a second, and only signing with account keys needs it."""
    program = "import sys, azstoragetorch.io, azstoragetorch._blob.client; print('azure.storage.blob' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout == "False\n"
