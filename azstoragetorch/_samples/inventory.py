"""Read the reports of Blob Inventory, which Azure writes daily: CSV or Parquet files, and a document that names them.

The rows of a report are in no particular order, and can be of several containers, snapshots, and versions. What is
read is the current blobs of one container.
"""

from __future__ import annotations

import codecs
import csv
import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from azure.core.exceptions import ResourceNotFoundError

from azstoragetorch._blob.client import BlobClient, ClientFactory
from azstoragetorch._blob.readahead import ReadAhead
from azstoragetorch._blob.url import BlobURL
from azstoragetorch._engine.config import MiB
from azstoragetorch._samples.names import NameFilter, NameRules
from azstoragetorch._samples.rows import Columns, parse_document
from azstoragetorch.exceptions import ManifestError

_PIECE = 4 * MiB
_NAME, _SIZE, _ETAG = "Name", "Content-Length", "Etag"
_STATE = ("hdi_isfolder", "Deleted", "Snapshot", "IsCurrentVersion")  # not a current blob, by these
_NEEDED = (_NAME, _SIZE)


@dataclass(frozen=True)
class Inventory:
    """One report of Blob Inventory."""

    document: BlobURL
    files: tuple[tuple[str, int], ...]
    """Names in the container of the document, and sizes."""
    format: str
    fields: tuple[str, ...]
    prefixes: tuple[str, ...]
    """Beginnings of ``container/name`` that the report is limited to; empty if it is of the whole account."""
    started: str

    @classmethod
    def open(cls, client: BlobClient) -> Inventory:
        """The report that the document of *client*, ``<rule>-manifest.json``, describes. One request.

        Raises:
            ManifestError: it is not such a document, or the run has failed, or the report lacks a field.
        """
        data, _ = client.read()
        where = str(client.url)
        document = parse_document(data, where)
        if not isinstance(document.get("ruleDefinition"), dict):
            raise ManifestError(f"{where}: it is not the document of a report of Blob Inventory")
        if document.get("status") != "Succeeded":
            raise ManifestError(f"{where}: the run of Blob Inventory has the status {document.get('status')!r}")
        rule = document["ruleDefinition"]
        try:
            files = tuple((str(entry["blob"]), int(entry["size"])) for entry in document["files"])
            fields, kind = tuple(map(str, rule["schemaFields"])), str(rule["format"]).lower()
            prefixes = tuple(map(str, (rule.get("filters") or {}).get("prefixMatch") or ()))
            started, about = str(document["inventoryStartTime"]), str(rule.get("objectType", "blob")).lower()
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ManifestError(f"{where}: the document is damaged ({type(error).__name__}: {error})") from error
        missing = [field for field in _NEEDED if field not in fields]
        if missing or about != "blob" or kind not in ("csv", "parquet"):
            raise ManifestError(
                f"{where}: the report lists {about}s as {kind} with the fields {', '.join(fields)}; it must list "
                f"blobs, as csv or parquet, with {' and '.join(_NEEDED)}, and should have {_ETAG}"
            )
        return cls(client.url, files, kind, fields, prefixes, started)

    @property
    def has_etags(self) -> bool:
        """Whether overwritten blobs can be noticed."""
        return _ETAG in self.fields

    def covers(self, container: str, prefix: str) -> bool:
        """Whether the report has all blobs of *container* whose names begin with *prefix*."""
        wanted = f"{container}/{prefix}"
        return not self.prefixes or any(wanted.startswith(limit) for limit in self.prefixes)

    def pages(self, clients: ClientFactory, container: BlobURL, prefix: str, rules: NameRules) -> Iterator[Columns]:
        """The current blobs of *container* below *prefix*, without what *rules* leave out, in the order of the report.

        Raises:
            ManifestError: a file is missing, truncated, or damaged.
            AzureError: the service refused the request, or could not be reached.
        """
        names_filter = NameFilter(container, rules)
        start = f"{container.container}/"
        for name, size in self.files:
            client = clients.blob(self.document.with_blob(name))
            for rows in self._rows(client, size):
                page = _current(rows, start, prefix)
                names, sizes, etags = names_filter.keep(page[0], page[1], page[2])
                yield names, sizes, [_quoted(etag) for etag in etags]
        names_filter.warn()

    def _rows(self, client: BlobClient, size: int) -> Iterator[Mapping[str, Sequence[Any]]]:
        """The fields of some rows at a time, as columns."""
        version = client.version()
        if version is None:
            raise ManifestError(f"{client.url}: this file of the report is missing")
        if version.size != size:
            raise ManifestError(
                f"{client.url}: the file of the report has {version.size} bytes, and should have {size}"
            )
        wanted = [field for field in (_NAME, _SIZE, _ETAG, *_STATE) if field in self.fields]
        reader = client.reader(version)
        try:
            if self.format == "csv":
                yield from _from_csv(reader, size, wanted, str(client.url))
            else:
                from azstoragetorch._samples.parquet import read_batches

                yield from read_batches(_File(reader, size), wanted, str(client.url))
        except ResourceNotFoundError as error:
            raise ManifestError(f"{client.url}: this file of the report is missing") from error
        finally:
            reader.close()


def _from_csv(reader: ReadAhead, size: int, wanted: list[str], where: str) -> Iterator[Mapping[str, Sequence[Any]]]:
    rows = csv.reader(_lines(reader, size), strict=True)
    try:
        header = next(rows, [])
        places = {field: header.index(field) for field in wanted if field in header}
        if not set(_NEEDED) <= set(places):
            raise ManifestError(f"{where}: the first line of the report has no {' and '.join(_NEEDED)}")
        batch: list[list[str]] = []
        for row in rows:
            if len(row) != len(header):
                raise ManifestError(
                    f"{where}: line {rows.line_num} of the report has {len(row)} fields instead of {len(header)}: the "
                    "file is truncated or damaged"
                )
            batch.append(row)
            if len(batch) == 5000:
                yield {field: [each[place] for each in batch] for field, place in places.items()}
                batch.clear()
        yield {field: [each[place] for each in batch] for field, place in places.items()}
    except (csv.Error, UnicodeDecodeError) as error:
        raise ManifestError(f"{where}: the file of the report is truncated or damaged ({error})") from error


def _lines(reader: ReadAhead, size: int) -> Iterator[str]:
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    rest = ""
    for start in range(0, size, _PIECE):
        stop = min(size, start + _PIECE)
        text = rest + decoder.decode(reader.read(start, stop - start), final=stop == size)
        *lines, rest = text.split("\n")
        yield from (f"{line}\n" for line in lines)
    if rest:
        yield rest


class _File(io.RawIOBase):
    """A reader as a file, for pyarrow."""

    def __init__(self, reader: ReadAhead, size: int) -> None:
        super().__init__()
        self._reader = reader
        self._size = size
        self._at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = 0) -> int:
        self._at = offset + (0, self._at, self._size)[whence]
        return self._at

    def read(self, size: int | None = -1) -> bytes:
        left = max(0, self._size - self._at)
        data = self._reader.read(self._at, left if size is None or size < 0 else min(size, left))
        self._at += len(data)
        return data


def _current(columns: Mapping[str, Sequence[Any]], start: str, prefix: str) -> tuple[list[str], list[int], list[str]]:
    """Name, size, and ETag of the current blobs whose ``container/name`` begins with *start* and *prefix*."""
    names, sizes = columns[_NAME], columns[_SIZE]
    wanted = start + prefix
    kept = [index for index, name in enumerate(names) if name and name.startswith(wanted)]
    for field in _STATE:
        if field in columns:
            values = columns[field]
            kept = [index for index in kept if _is_current(field, values[index])]
    etags = columns.get(_ETAG)
    try:
        return (
            [names[index][len(start) :] for index in kept],
            [int(sizes[index]) for index in kept],
            ["" if etags is None else etags[index] or "" for index in kept],
        )
    except (TypeError, ValueError) as error:
        raise ManifestError(f"a row of the report of Blob Inventory has no size ({error})") from error


def _is_current(field: str, value: Any) -> bool:
    text = "" if value is None else str(value).lower()
    if field == "IsCurrentVersion":  # empty without versioning
        return text != "false"
    if field == "Snapshot":
        return text in ("", "none")
    return text != "true"  # hdi_isfolder, Deleted


def _quoted(etag: str) -> str | None:
    return None if not etag else etag if etag.startswith('"') else f'"{etag}"'
