"""`share_credentials`: what is created inside takes its secrets along in every pickle, and nothing else does."""

from __future__ import annotations

import pickle
import threading
from collections.abc import Callable
from typing import Any

import pytest
from azure.core.credentials import AzureNamedKeyCredential, AzureSasCredential

import azstoragetorch
from azstoragetorch.datasets import BlobDataset
from azstoragetorch.filesystem import AzureBlobFileSystem
from azstoragetorch.io import BlobIO
from tests.azurite.container import Container

SECRET = "c2VjcmV0c2VjcmV0c2VjcmV0"  # Base64, as an account key
URL = "https://account.blob.core.windows.net/container"
MAKERS: dict[str, Callable[[], Any]] = {
    "SAS in the URL": lambda: BlobDataset.from_blob_urls([f"{URL}/a?sv=1&sig={SECRET}"]),
    "SAS": lambda: BlobDataset.from_blob_urls([f"{URL}/a"], credential=AzureSasCredential(f"sv=1&sig={SECRET}")),
    "key": lambda: BlobDataset.from_blob_urls([f"{URL}/a"], credential=AzureNamedKeyCredential("account", SECRET)),
    "file system": lambda: AzureBlobFileSystem("account", credential=AzureNamedKeyCredential("account", SECRET)),
    "option of a file system": lambda: AzureBlobFileSystem("account", account_key=SECRET),
}


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_only_what_is_created_inside_takes_its_secret_along(make: Callable[[], Any]) -> None:
    """Whenever it is pickled, and again where it was unpickled: an engine pickles late, and sends tasks on."""
    before = make()
    with azstoragetorch.share_credentials():
        inside = make()
        assert SECRET.encode() not in pickle.dumps(before)
    after = make()
    assert SECRET.encode() not in pickle.dumps(after)
    there = pickle.loads(pickle.dumps(inside))
    assert SECRET.encode() in pickle.dumps(inside)
    assert SECRET.encode() in pickle.dumps(there)
    assert SECRET not in repr(inside) + repr(there) + str(vars(inside)) + str(vars(there))


def test_it_holds_for_one_thread_and_nests() -> None:
    found: list[bytes] = []
    make = MAKERS["SAS"]
    with azstoragetorch.share_credentials():
        with azstoragetorch.share_credentials():
            pass
        thread = threading.Thread(target=lambda: found.append(pickle.dumps(make())))
        thread.start()
        thread.join()
        found.append(pickle.dumps(make()))
    assert [SECRET.encode() in pickled for pickled in found] == [False, True]


@pytest.mark.parametrize("kind", ["key", "sas_credential", "sas_url"])
def test_a_shared_credential_works_and_one_that_is_not_says_what_to_do(container: Container, kind: str) -> None:
    container.put("a", b"content")

    def open_blob() -> BlobIO:
        if kind == "sas_url":
            return BlobIO(container.blob_sas_url("a"), "rb")
        return BlobIO(container.blob_url("a"), "rb", credential=getattr(container, kind))

    with azstoragetorch.share_credentials(), open_blob() as blob, pickle.loads(pickle.dumps(blob)) as there:
        assert there.read() == b"content"
    with open_blob() as blob:
        pickled = pickle.dumps(blob)
    with pytest.raises(ValueError, match=r"share_credentials\(\):.*AZURE_CLIENT_ID.*credential=None"):
        pickle.loads(pickled)
