"""Blob names with control characters: any name may be asked for, and none reaches a wire, a log or a terminal raw."""

from __future__ import annotations

import logging
import traceback
import warnings
from collections.abc import Callable
from urllib.parse import quote

import pytest
from azure.core.exceptions import AzureError

from azstoragetorch import TransferConfig, join_url
from azstoragetorch.checkpoint import BlobStorageWriter, list_checkpoints
from azstoragetorch.datapipes import AzureBlobFileLister, AzureBlobFileReader
from azstoragetorch.datasets import BlobDataset
from azstoragetorch.exceptions import AZStorageTorchError
from azstoragetorch.io import BlobIO
from tests.faults import FaultService, Status

ONE_TRY = TransferConfig(max_attempts=1)
NAMES = [
    "a\r\nX-Evil: 1\r\n\r\nGET /evil HTTP/1.1\r\n\r\n",
    "a\nb",
    "a\0b",
    "a\tb\x7f",
    "\x1b[2J\x1b]0;owned\x07",
    "c1 \x85\x9b2J",
    "right \u202e to left",
]


def is_plain(text: str) -> bool:
    return all(character.isprintable() or character == "\n" for character in text) and "\nX-Evil" not in text


def fail(action: Callable[[], object]) -> str:
    with pytest.raises((AzureError, AZStorageTorchError)) as caught:
        action()
    return "".join(traceback.format_exception(caught.value))


@pytest.mark.parametrize("name", NAMES)
def test_the_service_decides_and_sees_one_encoded_request(
    fault_service: FaultService, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    """The blob is written, listed, read and deleted under its name; what is shown has it encoded."""
    service, caplog.handler.level = fault_service, logging.DEBUG
    service.create_container("c")
    container, url = service.container_url("c"), service.blob_url("c", name)
    with caplog.at_level(logging.DEBUG), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert join_url(container, name) == url
        with BlobIO(url, "wb", credential=False) as blob:
            blob.write(b"data")
            shown = [repr(blob), blob.name]
        with BlobIO(url, "rb", credential=False) as blob:
            assert blob.read() == b"data"
        (sample,) = BlobDataset.from_container_url(container, credential=False)
        assert sample == {"url": url, "data": b"data"}
        pipe = AzureBlobFileReader(AzureBlobFileLister(container, credential=False), credential=False)
        assert list(pipe) == [(url, b"data")]
        for message in ("no such blob", "refused"):
            if message == "refused":
                body = f"<Error><Code>InvalidUri</Code><Message>{name!s} is not valid</Message></Error>"
                service.script("get_blob", [Status(400, "InvalidUri", body=body.encode())], repeat=True)
            shown += [
                fail(BlobIO(f"{url}-", "rb", credential=False, transfer=ONE_TRY).read),
                fail(lambda: BlobDataset.from_blob_urls(f"{url}-", credential=False, transfer=ONE_TRY)[0]),
            ]
        shown += [repr(BlobStorageWriter(url, credential=False)), *list_checkpoints(url, credential=False)]
    assert service.names("c") == [name]
    targets = {request.target for request in service.log}
    assert all(target.isascii() and target.isprintable() for target in targets)
    assert "evil" not in {request.headers.get("x-evil", "") or request.container for request in service.log}
    shown += [record.getMessage() for record in caplog.records] + [str(warning.message) for warning in caught]
    assert [text for text in shown if not is_plain(text)] == []
    assert any(quote(name, safe="/~") in text for text in shown)
