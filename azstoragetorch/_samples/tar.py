"""Read a tar from a stream: the names and contents of its files, in order.

Supports ustar, PAX, and GNU headers. The whole structure is checked: a wrong checksum of a header or a missing end
marker is an error, because otherwise files could be missing without an error.
"""

from __future__ import annotations

import io
import re
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from tarfile import ReadError, TarInfo
from typing import IO, Any

from azstoragetorch._engine.config import MiB
from azstoragetorch._engine.scope import on_error
from azstoragetorch._samples import tar_header
from azstoragetorch._samples.tar_header import BLOCK, DamagedHeaderError, Header, Holes
from azstoragetorch._samples.unpack import Unpacked, is_packed

END = bytes(2 * BLOCK)
_CHUNK = 4 * MiB  # read from the stream at once
_SPOOL = 16 * MiB  # a file up to this size comes as bytes, a larger one as a stream
_COPY = 1 * MiB
_MAX_HEADER = 1 * MiB  # bytes of one extended header; real ones have some hundred
_MAX_PIECES = 1 << 17  # of a file with holes; bounds the memory for its map
_REGULAR = frozenset(b"07\0S")
_EXTENDED = frozenset(b"xgXLK")
_WITHOUT_DATA = frozenset(b"123456")
_ZEROS = bytes(BLOCK)
_SAMPLE_FILE = re.compile(r"(?!__[^/]*__/)((?:.*/)?[^./]+)\.([^/]*)", re.DOTALL)  # key and extension


@dataclass(frozen=True, slots=True)
class Member:
    """A file in a tar: its name, and its content as bytes or, if it is large, as a stream."""

    name: str
    data: bytes | IO[bytes]


def walk(stream: Any, where: str, open_slice: Callable[[int, int], IO[bytes]] | None = None) -> Iterator[Member]:
    """The regular files of the tar in the binary *stream*, which *where* names in errors.

    Links, directories and devices are passed over. Names come as they are stored: check them before you use them as
    paths. A stream that is compressed by gzip, bzip2, xz, lzma or zstd is decompressed. Holes of sparse files are
    filled with zeros.

    Args:
        stream: Read from its position to the end marker of the tar, forward only.
        where: The URL of the stream.
        open_slice: Opens a number of bytes from an offset in the tar on, for large files. Without it, or in a
            compressed tar, these go through a temporary file.

    Raises:
        tarfile.ReadError: the stream is not a tar, is truncated or damaged.
        tarfile.CompressionError: the module that decompresses it is missing.
        TypeError: the stream yields no bytes.
    """
    if isinstance(stream, io.TextIOBase):
        raise TypeError(f"{where}: a tar needs a binary stream, not text: open it with mode='rb'")
    begin = _begin_of(stream, where)
    if tar_header.parse(begin) is None and is_packed(begin):
        unpacked = Unpacked(stream.read, begin, where)
        return _Walker(_Source(unpacked, b"", where), where, None).members()
    return _Walker(_Source(stream, begin, where), where, open_slice).members()


def entry(name: str, size: int) -> bytes:
    """The header of a file of *size* bytes; the same for the same name and size, whenever and by whomever made."""
    info = TarInfo(name)
    info.size = size
    return info.tobuf()


def padding(size: int) -> bytes:
    """What follows *size* bytes of content."""
    return bytes(-size % BLOCK)


def split_name(name: str) -> tuple[str, str] | None:
    """The key of the sample that the file *name* belongs to, and its extension in lower case; None if to no sample."""
    parts = _SAMPLE_FILE.fullmatch(name)
    return (parts[1], parts[2].lower()) if parts is not None else None


class _Walker:
    """The state between two headers: what extended headers said about the files that follow."""

    def __init__(self, source: _Source, where: str, open_slice: Callable[[int, int], IO[bytes]] | None) -> None:
        self._source = source
        self._where = where
        self._open_slice = open_slice
        self._of_all: dict[str, str] = {}
        self._of_next: dict[str, str] = {}

    def members(self) -> Iterator[Member]:
        source = self._source
        while True:
            at = source.position
            block = source.take(BLOCK, "a header")
            if block == _ZEROS:
                return
            header = tar_header.parse(block)
            if header is None:
                raise self._no_header(at, block)
            try:
                if header.kind in _EXTENDED:
                    self._extend(header)
                    continue
                fields = {**self._of_all, **self._of_next}
                self._of_next = {}
                member = self._member(header, fields)
            except DamagedHeaderError as error:
                raise ReadError(f"{self._where} is a damaged tar: the header at byte {at} is wrong: {error}") from error
            if member is not None:
                yield member

    def _no_header(self, at: int, block: bytes) -> ReadError:
        if not at:
            return ReadError(f"{self._where} is not a tar: it begins with {block[:16]!r}")
        return ReadError(f"{self._where} is a damaged tar: the header at byte {at} is wrong")

    def _extend(self, header: Header) -> None:
        if header.size > _MAX_HEADER:
            raise DamagedHeaderError(f"this extended header claims {header.size} bytes")
        data = self._source.take(header.size, "an extended header")
        self._source.skip(-header.size % BLOCK)
        if header.kind == ord("g"):
            self._of_all.update(tar_header.records(data))
        elif header.kind in b"xX":
            self._of_next.update(tar_header.records(data))
        elif header.kind == ord("L"):
            self._of_next["path"] = tar_header.text(data)

    def _member(self, header: Header, fields: dict[str, str]) -> Member | None:
        """The file that *header* announces; None if it is something else, which is passed over."""
        kind, source = header.kind, self._source
        name = fields.get("GNU.sparse.name") or fields.get("path") or header.name
        size = tar_header.decimal(fields["size"], "its size") if fields.get("size") else header.size
        if kind in _WITHOUT_DATA:
            return None
        if kind not in _REGULAR or (kind == 0 and name.endswith("/")):
            source.skip(size + -size % BLOCK)
            return None
        if tar_header.is_sparse(header, fields):
            return Member(name, self._sparse(header, fields, size, repr(name)))
        if size <= _SPOOL:
            data: bytes | IO[bytes] = source.take(size, repr(name))
        elif self._open_slice is not None:
            begin = source.position
            source.skip(size + -size % BLOCK)
            return Member(name, self._open_slice(begin, size))
        else:
            data = source.spool(Holes(size, [(0, size)]), repr(name))
        source.skip(-size % BLOCK)
        return Member(name, data)

    def _sparse(self, header: Header, fields: dict[str, str], size: int, what: str) -> bytes | IO[bytes]:
        source = self._source
        begin = source.position
        if header.kind == ord("S"):
            holes = self._old_map(header.block)
            begin = source.position  # the size does not count these blocks
        else:
            holes = tar_header.holes_in_fields(fields) or self._map_in_data(tar_header.sparse_size(fields), size)
        stored = size - (source.position - begin)
        holes.check(stored)
        data = source.fill_in(holes, what)
        source.skip(stored - sum(length for _, length in holes.pieces) + -size % BLOCK)
        return data

    def _old_map(self, block: bytes) -> Holes:
        """The map that begins in the header *block*; the blocks behind it that hold the rest are taken."""
        pieces, has_more = tar_header.pieces_in(block, is_first=True)
        blocks = 0
        while has_more:
            blocks += 1
            if blocks > _MAX_PIECES // 21:
                raise DamagedHeaderError("its map of holes does not end")
            more, has_more = tar_header.pieces_in(self._source.take(BLOCK, "a map of holes"), is_first=False)
            pieces += more
        return Holes(tar_header.old_sparse_size(block), pieces)

    def _map_in_data(self, whole: int, size: int) -> Holes:
        """The map in front of the data: the number of pieces and their offsets and lengths, a line for each number."""
        numbers: list[int] = []
        wanted, taken, rest = 1, 0, b""
        while len(numbers) < wanted:
            taken += BLOCK
            if taken > size or len(rest) > BLOCK or wanted > 2 * _MAX_PIECES:
                raise DamagedHeaderError("its map of holes does not end")
            *lines, rest = (rest + self._source.take(BLOCK, "a map of holes")).split(b"\n")
            numbers += [tar_header.decimal(tar_header.text(line), "its map of holes") for line in lines]
            wanted = 1 + 2 * numbers[0] if numbers else 1
        return Holes(whole, tar_header.pairs(numbers[1:wanted]))


class _Source:
    """The stream, in chunks of which pieces are cut."""

    def __init__(self, stream: Any, begin: bytes, where: str) -> None:
        self._stream = stream
        self._where = where
        self._readinto = getattr(stream, "readinto", None)
        self._buffer = memoryview(bytearray(_CHUNK)) if self._readinto is not None else None
        self._chunk = memoryview(begin)
        self._at = 0
        self.position = 0

    def take(self, count: int, what: str) -> bytes:
        """The next *count* bytes."""
        stop = self._at + count
        if stop <= self._chunk.nbytes:
            piece = bytes(self._chunk[self._at : stop])
            self._at = stop
            self.position += count
            return piece
        pieces = []
        missing = count
        while missing:
            piece = self._some(missing)
            if not piece:
                self._end_early(count - missing, count, what)
            pieces.append(piece)
            missing -= len(piece)
        return b"".join(pieces)

    def skip(self, count: int) -> None:
        """Pass over *count* bytes, by a seek if that saves reading."""
        here = min(count, self._chunk.nbytes - self._at)
        self._at += here
        self.position += here
        count -= here
        if count > _CHUNK and self._buffer is not None and self._stream.seekable():
            self._stream.seek(count - 1, 1)
            self.position += count - 1
            count = 1  # reading one shows whether the stream goes that far
        while count:
            piece = self._some(min(count, _COPY))
            if not piece:
                self._end_early(0, count, "a file")
            count -= len(piece)

    def fill_in(self, holes: Holes, what: str) -> bytes | IO[bytes]:
        """A file whose pieces come next, with zeros between them: bytes, or a temporary file if it is large."""
        if holes.size > _SPOOL:
            return self.spool(holes, what)
        whole = bytearray(holes.size)
        for offset, count in holes.pieces:
            whole[offset : offset + count] = self.take(count, what)
        return bytes(whole)

    def spool(self, holes: Holes, what: str) -> IO[bytes]:
        """The same in a temporary file, at its beginning."""
        file = tempfile.TemporaryFile()  # noqa: SIM115 - handed out
        with on_error(file.close):
            try:
                file.truncate(holes.size)
            except OSError as error:
                raise DamagedHeaderError(
                    f"{what} has {holes.size} bytes, which no temporary file can hold: {error}"
                ) from error
            for offset, count in holes.pieces:
                file.seek(offset)
                self._copy(file, count, what)
            file.seek(0)
        return file

    def _copy(self, file: IO[bytes], count: int, what: str) -> None:
        missing = count
        while missing:
            piece = self._some(min(missing, _COPY))
            if not piece:
                self._end_early(count - missing, count, what)
            file.write(piece)
            missing -= len(piece)

    def _some(self, limit: int) -> bytes:
        if self._at == self._chunk.nbytes:
            self._fill()
        piece = bytes(self._chunk[self._at : self._at + limit])
        self._at += len(piece)
        self.position += len(piece)
        return piece

    def _fill(self) -> None:
        self._at = 0
        try:
            if self._buffer is not None:
                assert self._readinto is not None
                self._chunk = self._buffer[: self._readinto(self._buffer)]
            else:
                self._chunk = memoryview(self._stream.read(_CHUNK))
        except TypeError as error:
            raise TypeError(f"{self._where}: a tar needs a binary stream: {error}") from error

    def _end_early(self, got: int, count: int, what: str) -> None:
        if not self.position:
            raise ReadError(f"{self._where} is empty, which is not a tar")
        raise ReadError(
            f"{self._where} is a truncated tar: it ends at byte {self.position}, {got} of {count} bytes into {what}"
        )


def _begin_of(stream: Any, where: str) -> bytes:
    """The first block of *stream*, or all if it is shorter."""
    begin = b""
    while len(begin) < BLOCK:
        data = stream.read(BLOCK - len(begin))
        if not isinstance(data, (bytes, bytearray, memoryview)):
            raise TypeError(f"{where}: a tar needs a binary stream, and this one yields {type(data).__name__}")
        if not data:
            break
        begin += data
    return begin
