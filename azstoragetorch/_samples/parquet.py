"""The parts of a manifest as Parquet files: names in order, sizes, and ETags. The only module that imports pyarrow.

A part is read whole and checked before any of it is used: its length, its columns, the order of its names, and its
digest, which is that of the contents and not of the file, so every version of pyarrow makes the same one.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterator, Sequence
from typing import Any

from azstoragetorch._samples.rows import PART_ROWS, Columns, Row, check_ascends
from azstoragetorch.exceptions import ManifestError

try:
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq
except ImportError as error:
    raise ImportError(f"manifests are Parquet files, which need pyarrow ({error}): pip install pyarrow") from error

_MAX_ROW = 8 << 10  # bytes that a row takes at most: a name of 1,024 characters and two short columns
_SCHEMA = pa.schema([pa.field("name", pa.string(), False), pa.field("size", pa.int64(), False), ("etag", pa.string())])
_DIGEST = 16  # bytes
_SPILLED_AT_ONCE = 1 << 12  # rows in memory of each file that is merged
_KINDS = {"H": pa.uint16(), "Q": pa.uint64()}
_EMPTY = pa.StringArray.from_buffers(1, pa.py_buffer(bytes(8)), pa.py_buffer(b""))[0]


class PartRows:
    """The rows of one part, as columns. Do not change afterwards."""

    def __init__(self, table: Any) -> None:
        self._columns = [table.column(name).chunk(0) for name in _SCHEMA.names]
        self.nbytes = int(table.nbytes)

    def __len__(self) -> int:
        return len(self._columns[0])

    def row(self, index: int) -> Row:
        """One row."""
        name, size, etag = (column[index].as_py() for column in self._columns)
        return Row(name, size, etag)

    def rows(self, start: int = 0) -> Iterator[Row]:
        """The rows from *start* on."""
        return map(Row, *(column.slice(start).to_pylist() for column in self._columns))

    def take(self, indices: array[int]) -> Columns:
        """The rows at *indices*, 16 bits each, as columns."""
        wanted = _numbers(indices)
        names, sizes, etags = (column.take(wanted).to_pylist() for column in self._columns)
        return names, sizes, etags

    @property
    def digest(self) -> str:
        """The digest of the contents."""
        names, sizes, etags = self._columns
        known = pc.coalesce(etags, _EMPTY)
        digest = hashlib.blake2b(digest_size=_DIGEST)
        for texts in (names, known):
            digest.update(_bytes(pc.binary_length(texts), 1))
            digest.update(_bytes(texts, 2))
        digest.update(_bytes(sizes, 1))
        return digest.hexdigest()


def _bytes(column: Any, buffer: int) -> bytes | memoryview:
    """The elements of a *column* without nulls, without what its buffers have around them."""
    if buffer == 2:
        offsets = memoryview(column.buffers()[1]).cast("i")
        start, stop = offsets[column.offset], offsets[column.offset + len(column)]
    else:
        width = column.type.bit_width // 8
        start, stop = column.offset * width, (column.offset + len(column)) * width
    data = column.buffers()[buffer]
    return b"" if data is None else memoryview(data)[start:stop]


def _numbers(values: array[int]) -> Any:
    """*values* as a column. (`pa.array` would import pandas, which takes 30 MiB.)"""
    return pa.Array.from_buffers(_KINDS[values.typecode], len(values), [None, pa.py_buffer(values)])


def _release() -> None:
    """Give back the memory that Arrow's allocator would keep for what comes next: some 30 MiB. Takes 0.1 ms."""
    pa.default_memory_pool().release_unused()


def encode(columns: Columns, where: str) -> tuple[bytes, PartRows]:
    """A part as a file, and as what reading it returns.

    Raises:
        ManifestError: the names are not in order.
    """
    table = pa.table([pa.array(column, field.type) for column, field in zip(columns, _SCHEMA, strict=True)], _SCHEMA)
    check_order(table.column("name").chunk(0), where)
    sink = pa.BufferOutputStream()
    pq.write_table(
        table,
        sink,
        compression="zstd",
        use_dictionary=False,
        column_encoding={"name": "DELTA_BYTE_ARRAY", "size": "DELTA_BINARY_PACKED", "etag": "PLAIN"},
        row_group_size=PART_ROWS,
    )
    return sink.getvalue().to_pybytes(), PartRows(table.combine_chunks())


def decode(data: bytes, *, rows: int, digest: str, where: str) -> PartRows:
    """The rows in the file *data*, which is at *where*.

    Raises:
        ManifestError: the file is damaged, has other contents than it should, or names that are out of order.
    """
    try:
        file = pq.ParquetFile(pa.BufferReader(data))
        if file.metadata.num_rows != rows:
            raise ManifestError(f"{where}: it has {file.metadata.num_rows} rows, and the manifest says {rows}")
        expanded = sum(file.metadata.row_group(group).total_byte_size for group in range(file.num_row_groups))
        if expanded > rows * _MAX_ROW:
            raise ManifestError(f"{where}: its rows are longer than names of blobs can be")
        if not file.schema_arrow.equals(_SCHEMA):
            raise ManifestError(f"{where}: its columns are not name, size, and etag")
        table = file.read(use_threads=False).combine_chunks()
        table.validate(full=True)
    except (pa.ArrowException, OSError, ValueError) as error:
        if isinstance(error, ManifestError):
            raise
        raise ManifestError(f"{where}: it is not a Parquet file, or is damaged ({error})") from error
    part = PartRows(table)
    check_order(table.column("name").chunk(0), where)
    if part.digest != digest:
        raise ManifestError(f"{where}: its contents are not those that the manifest was made with (digest)")
    _release()
    return part


def check_order(names: Any, where: str) -> None:
    """Check that the names ascend, by their UTF-8 bytes.

    Raises:
        ManifestError: they do not; the message says whether a name is there twice.
    """
    if len(names) and not names[0].as_py():
        raise ManifestError(f"{where}: a row has no name")
    before, after = names.slice(0, len(names) - 1), names.slice(1)
    if not len(after) or pc.all(pc.less(before, after)).as_py():
        return
    at = pc.index(pc.less(before, after), False).as_py()
    check_ascends(where, before[at].as_py(), after[at].as_py())


def spill(columns: Columns, path: str) -> None:
    """Write rows to a local file, sorted by name."""
    table = pa.table([pa.array(column, field.type) for column, field in zip(columns, _SCHEMA, strict=True)], _SCHEMA)
    with pa.OSFile(path, "wb") as sink, pa.ipc.new_file(sink, _SCHEMA) as writer:
        writer.write_table(table.sort_by("name"), max_chunksize=_SPILLED_AT_ONCE)


def spilled(path: str) -> Iterator[Row]:
    """The rows that `spill` wrote, in their order."""
    with pa.memory_map(path) as source, pa.ipc.open_file(source) as reader:
        for number in range(reader.num_record_batches):
            batch = reader.get_batch(number)
            yield from map(Row, *(column.to_pylist() for column in batch.columns))


def read_batches(file: Any, wanted: Sequence[str], where: str) -> Iterator[dict[str, list[Any]]]:
    """The columns *wanted* of a Parquet file of any origin, some rows at a time; without those that it lacks.

    Raises:
        ManifestError: *file* is truncated or damaged.
    """
    try:
        table = pq.ParquetFile(pa.PythonFile(file, "r"))
        columns = [name for name in wanted if name in table.schema_arrow.names]
        for batch in table.iter_batches(PART_ROWS, columns=columns, use_threads=False):
            yield batch.to_pydict()
    except (pa.ArrowException, OSError) as error:
        raise ManifestError(f"{where}: it is not a Parquet file, or is damaged ({error})") from error


def ranks_of(indices: array[int]) -> tuple[array[int], array[int]]:
    """*indices* in ascending order, and the place of each of them in that order."""
    values = _numbers(indices)
    order = pc.sort_indices(values)
    ordered, ranks = array("Q"), array("I")
    ordered.frombytes(_bytes(values.take(order), 1))
    ranks.frombytes(_bytes(pc.sort_indices(order).cast(pa.uint32()), 1))
    del values, order
    _release()
    return ordered, ranks
