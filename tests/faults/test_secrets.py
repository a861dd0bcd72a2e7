"""A full run with every kind of credential, with and without faults: afterwards its secrets are found nowhere."""

from __future__ import annotations

import base64
import logging
import pickle
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote, quote_plus

import pytest
from azure.core.credentials import AzureNamedKeyCredential, AzureSasCredential

from azstoragetorch._engine.config import TransferConfig
from azstoragetorch.checkpoint import BlobStorageReader, BlobStorageWriter
from azstoragetorch.datapipes import AzureBlobFileLister, AzureBlobFileReader, AzureBlobSaver
from azstoragetorch.datasets import BlobDataset, IterableBlobDataset
from azstoragetorch.io import BlobIO

from .faults import Fault, GarbageStatusLine, MalformedXml, Redirect, Reset, Status, WrongHeader
from .fixtures import LoopbackTls
from .matrix import TARGETS, fill
from .operations import BLOB, CHECKPOINT, CONTAINER, FOLDER, OPERATIONS, Place, Tokens
from .service import FaultService
from .test_matrix import QUICK

TRANSFER = TransferConfig(**{**QUICK, "max_attempts": 2})  # type: ignore[arg-type]
SIGNATURE = "c2VjcmV0LXNpZ25hdHVyZS1vZi1hLXNhcw+/8="
SAS = f"sv=2023-11-03&st=2024-01-01T00%3A00%3A00Z&se=2034-01-01&sr=c&sp=rwdl&sig={quote(SIGNATURE, safe='')}"
KEY = base64.b64encode(b"the account key of this test, which nobody may see").decode()
TOKEN = "eyJ0eXAiOiJKV1QiLCJhbGciOiJub25lIn0.secret-claims-of-the-token.secret-signature-of-it"
FAULTS: list[Fault] = [
    Status(403),
    Status(503),
    Reset(),
    GarbageStatusLine(),
    Redirect("http://127.0.0.1:9"),
    WrongHeader("x-ms-client-request-id", "other"),
    MalformedXml(b"<EnumerationResults><Blobs><Blob></Blobs></EnumerationResults>"),
]


@dataclass
class SignedPlace(Place):
    """A place whose URLs contain a SAS."""

    sas: str = ""

    def blob(self, name: str) -> str:
        return f"{self.url.partition('?')[0]}/{name}?{self.sas}"


@dataclass
class Evidence:
    """Everything that a run leaves behind, as bytes, with its location."""

    folder: Path
    found: dict[str, bytes] = field(default_factory=dict)

    def add(self, where: str, what: str | bytes) -> None:
        self.found[f"{where} #{len(self.found)}"] = what.encode() if isinstance(what, str) else what

    def add_object(self, thing: Any) -> None:
        self.add(f"repr of {type(thing).__name__}", repr(thing))
        self.add(f"str of {type(thing).__name__}", f"{thing}")
        with suppress(TypeError, pickle.PicklingError):
            self.add(f"pickle of {type(thing).__name__}", pickle.dumps(thing))

    def add_error(self, error: BaseException) -> None:
        self.add("traceback", "".join(traceback.format_exception(error)))
        todo: list[Any] = [error]
        seen: list[BaseException] = []
        while todo:
            this = todo.pop()
            if isinstance(this, BaseException) and this not in seen:
                seen.append(this)
                self.add_object(this)
                self.add("members", repr(vars(this)) + repr(this.args))
                todo += [this.__cause__, this.__context__]
                todo += [failure[0] for failure in getattr(this, "failures", {}).values()]

    def add_files(self) -> None:
        for path in self.folder.rglob("*"):
            self.add(f"name of {path.name}", str(path))
            if path.is_file():
                self.add(f"file {path.name}", path.read_bytes())

    def search(self, secret: str) -> list[str]:
        """Where *secret* is, in any encoding."""
        plain = secret.encode()
        forms = {plain, quote(secret, safe="").encode(), quote_plus(secret).encode(), plain.hex().encode()}
        forms |= {base64.b64encode(plain).rstrip(b"="), repr(secret)[1:-1].encode(), secret.encode("utf-16-le")}
        forms |= {quote(quote(secret, safe=""), safe="").encode()}
        return [where for where, data in self.found.items() if any(form in data for form in forms)]


@contextmanager
def everything_logged(evidence: Evidence) -> Iterator[None]:
    """Log all loggers at DEBUG, and warnings, to a file, including those of workers."""
    handler = logging.FileHandler(evidence.folder / "log.txt")
    handler.setFormatter(logging.Formatter("%(name)s %(levelname)s %(message)s"))
    loggers = [logging.getLogger(), *(logging.getLogger(name) for name in list(logging.root.manager.loggerDict))]
    levels = [logger.level for logger in loggers]
    logging.getLogger().addHandler(handler)
    for logger in loggers:
        logger.setLevel(logging.DEBUG)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            yield
        for warning in caught:
            evidence.add("warning", str(warning.message))
    finally:
        logging.getLogger().removeHandler(handler)
        handler.close()
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def use_everything(place: Place, evidence: Evidence, operations: list[str]) -> None:
    """Run *operations*, and collect reprs, pickles and errors."""
    for name in operations:
        try:
            OPERATIONS[name](place)
        except BaseException as error:
            if isinstance(error, (KeyboardInterrupt, AssertionError)):
                raise
            evidence.add_error(error)


def objects(place: Place, evidence: Evidence) -> list[Any]:
    access: dict[str, Any] = {"credential": place.credential, "transfer": TRANSFER}
    cache = {"cache_dir": evidence.folder / "cache"}
    lister = AzureBlobFileLister(place.blob(FOLDER), **access)
    return [
        BlobIO(place.blob(BLOB), "rb", **access),
        BlobDataset.from_blob_urls([place.blob(f"{FOLDER}02")], **access, **cache),
        IterableBlobDataset.from_container_url(place.url, prefix=FOLDER, **access, **cache),
        IterableBlobDataset.from_blob_urls([place.blob(f"{FOLDER}02")], **access),
        lister,
        AzureBlobFileReader(lister, **access),
        AzureBlobSaver([(place.url.partition("?")[0] + "/new", b"data")], **access),
        BlobStorageWriter(place.blob(CHECKPOINT), **access),
        BlobStorageReader(place.blob(CHECKPOINT), **access),
    ]


def sas_in_urls(service: FaultService) -> Place:
    service.require_sas(SIGNATURE)
    return SignedPlace(f"{service.container_url(CONTAINER)}?{SAS}", AzureSasCredential(SAS), sas=SAS)


def sas_credential(service: FaultService) -> Place:
    service.require_sas(SIGNATURE)
    return Place(service.container_url(CONTAINER), AzureSasCredential(SAS))


def account_key(service: FaultService) -> Place:
    return Place(service.container_url(CONTAINER), AzureNamedKeyCredential("devstoreaccount1", KEY))


class Provider(Tokens):
    """A credential that pickles without a token, like those of azure-identity."""

    def __init__(self) -> None:
        super().__init__(TOKEN)

    def __reduce__(self) -> tuple[type[Provider], tuple[()]]:
        return Provider, ()


def token(service: FaultService) -> Place:
    service.require_token(TOKEN)
    return Place(service.container_url(CONTAINER), Provider())


@pytest.mark.parametrize("way_in", [sas_in_urls, sas_credential, account_key, token])
@pytest.mark.parametrize(
    "operations",
    [[name for name in TARGETS if "workers" not in name], pytest.param(["epoch, 2 workers"], marks=pytest.mark.slow)],
    ids=["one process", "workers"],
)
def test_no_secret_is_left_anywhere(
    way_in: Callable[[FaultService], Place],
    operations: list[str],
    loopback_tls: LoopbackTls,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Not in DEBUG logs, reprs, pickles, errors with their chains, output, or files, local or in the container."""
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(loopback_tls.ca_path))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    evidence = Evidence(tmp_path)
    with (
        everything_logged(evidence),
        FaultService(ssl_context=loopback_tls.server_context if way_in is token else None) as service,
    ):
        for operation in TARGETS:
            fill(service, operation)
        place = way_in(service)
        place.options = {"transfer": TRANSFER}
        use_everything(place, evidence, operations)
        assert not any("traceback" in where for where in evidence.found), "without faults all goes well"
        for thing in (live := objects(place, evidence)):
            evidence.add_object(thing)
            if hasattr(thing, "state_dict"):
                evidence.add("state", repr(thing.state_dict()))
        live[0].read()
        live[1][0]
        list(live[2])
        with suppress(ValueError, TypeError):
            BlobIO(place.blob("") + "#" + place.blob(BLOB), "zz")  # type: ignore[arg-type]
        for thing in live:
            evidence.add_object(thing)
        live[0].close()
        for fault in FAULTS:
            rule = service.script(_any_operation(fault), [fault], repeat=True)
            use_everything(place, evidence, operations)
            assert rule.fired
            service.clear_script()
        secrets = {SIGNATURE, KEY, TOKEN}
        secrets |= {request.query["sig"] for request in service.log if "sig" in request.query}
        secrets |= {
            request.headers["authorization"].split()[-1]
            for request in service.log
            if "authorization" in request.headers
        }
        for name in service.names(CONTAINER):
            evidence.add(f"blob {name}", service.get(CONTAINER, name))
    evidence.add("output", "".join(capfd.readouterr()))
    evidence.add_files()
    log = (tmp_path / "log.txt").read_text()
    assert "azstoragetorch DEBUG" in log
    assert "[redacted]" in log or way_in is token, "the log has the requests, without what is secret in them"
    assert len(secrets) > 2
    for secret in secrets:
        assert not evidence.search(secret), secret[:6]


def _any_operation(fault: Fault) -> str:
    return "list_blobs" if isinstance(fault, MalformedXml) else "get_blob"
