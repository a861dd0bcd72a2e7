"""Walk through a tar that streams in: names and contents of its files, in order, at the speed of the stream.

Understands ustar, PAX and GNU headers. The whole structure is checked: a header without its checksum, or an end without
the end marker, is an error, since what is missing after it would be missing silently.
"""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import re
import tempfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from tarfile import ReadError, TarInfo
from typing import IO, Any

from azstoragetorch._engine.config import MiB

BLOCK = 512
END = bytes(2 * BLOCK)
_CHUNK = 4 * MiB  # read from the stream at once
_SPOOL = 16 * MiB  # a file up to this size comes as bytes, a larger one as a stream
_COPY = 1 * MiB
_MAX_HEADER = 1 * MiB  # bytes of one extended header; real ones have some hundred
_MAX_SIZE = 1 << 60  # bytes of one file; beyond it a header is damaged
_REGULAR = frozenset(b"07\0")
_WITHOUT_DATA = frozenset(b"123456")
_ZEROS = bytes(BLOCK)
_SAMPLE_FILE = re.compile(r"(?!__[^/]*__/)((?:.*/)?[^./]+)\.([^/]*)", re.DOTALL)  # key and extension
_COMPRESSED: dict[bytes, Callable[[IO[bytes]], Any]] = {
    b"\x1f\x8b": lambda stream: gzip.GzipFile(fileobj=stream),
    b"BZh": bz2.BZ2File,
    b"\xfd7zXZ\0": lzma.LZMAFile,
}


@dataclass(frozen=True, slots=True)
class Member:
    """A file in a tar: its name, and its content as bytes or, if it is large, as a stream."""

    name: str
    data: bytes | IO[bytes]


def walk(stream: Any, where: str, open_slice: Callable[[int, int], IO[bytes]] | None = None) -> Iterator[Member]:
    """The regular files of the tar in the binary *stream*, which *where* names in errors.

    Links, directories and devices are passed over. A gzip, bzip2 or xz stream is decompressed if it is seekable.

    Args:
        stream: Read from its position to the end marker of the tar, forward only.
        where: The URL of the stream.
        open_slice: Opens a number of bytes from an offset in *stream* on, for large files. Without it, or in a
            compressed tar, these go through a temporary file.

    Raises:
        tarfile.ReadError: the stream is no tar, is truncated or damaged.
        TypeError: the stream yields no bytes.
    """
    if isinstance(stream, io.TextIOBase):
        raise TypeError(f"{where}: a tar needs a binary stream, not text: open it with mode='rb'")
    unpacked = _decompressed(stream)
    source = _Source(unpacked, where)
    if unpacked is not stream:
        open_slice = None
    globals_: dict[str, str] = {}
    extended: dict[str, str] = {}
    while True:
        at = source.position
        header = source.take(BLOCK, "a header")
        if header == _ZEROS:
            return
        kind, size = header[156], _check(header, at, where)
        if kind in b"xgXLK":
            if size > _MAX_HEADER:
                raise ReadError(f"{where}: the extended header at byte {at} claims {size} bytes: the tar is damaged")
            data = source.take(size, "an extended header")
            source.skip(-size % BLOCK)
            if kind == ord("g"):
                globals_.update(_records(data, at, where))
            elif kind in b"xX":
                extended.update(_records(data, at, where))
            elif kind == ord("L"):
                extended["path"] = _text(data)
            continue
        fields = {**globals_, **extended}
        extended = {}
        if kind == ord("S") or any(key.startswith("GNU.sparse") for key in fields):
            raise ReadError(f"{where}: the file at byte {at} is sparse, which is not supported: pack it without -S")
        name = fields.get("path") or _name(header)
        if "size" in fields:
            size = _pax_size(fields["size"], at, where)
        if kind in _WITHOUT_DATA:
            continue
        if kind not in _REGULAR or (kind == 0 and name.endswith("/")):
            source.skip(size + -size % BLOCK)
            continue
        if size <= _SPOOL:
            yield Member(name, source.take(size, repr(name)))
            source.skip(-size % BLOCK)
        elif open_slice is not None:
            begin = source.position
            source.skip(size + -size % BLOCK)
            yield Member(name, open_slice(begin, size))
        else:
            yield Member(name, source.spool(size, repr(name)))
            source.skip(-size % BLOCK)


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


class _Source:
    """The stream, in chunks of which pieces are cut."""

    def __init__(self, stream: Any, where: str) -> None:
        self._stream = stream
        self._where = where
        self._readinto = getattr(stream, "readinto", None)
        self._buffer = memoryview(bytearray(_CHUNK)) if self._readinto is not None else None
        self._chunk = memoryview(b"")
        self._at = 0
        self._start: int | None = None
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
            count = 1  # one that is read tells whether the stream goes that far
        while count:
            piece = self._some(min(count, _COPY))
            if not piece:
                self._end_early(0, count, "a file")
            count -= len(piece)

    def spool(self, count: int, what: str) -> IO[bytes]:
        """The next *count* bytes in a temporary file, at its beginning."""
        file = tempfile.TemporaryFile()  # noqa: SIM115 - handed out
        try:
            missing = count
            while missing:
                piece = self._some(min(missing, _COPY))
                if not piece:
                    self._end_early(count - missing, count, what)
                file.write(piece)
                missing -= len(piece)
            file.seek(0)
        except BaseException:
            file.close()
            raise
        return file

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
        except (EOFError, OSError, lzma.LZMAError, zlib.error) as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise  # of the stream, not of what is in it
            raise ReadError(f"{self._where}: the compressed tar is truncated or damaged: {error}") from error
        except TypeError as error:
            raise TypeError(f"{self._where}: a tar needs a binary stream: {error}") from error

    def _end_early(self, got: int, count: int, what: str) -> None:
        if not self.position:
            raise ReadError(f"{self._where} is empty, and no tar")
        raise ReadError(
            f"{self._where} is a truncated tar: it ends at byte {self.position}, {got} of {count} bytes into {what}"
        )


def _decompressed(stream: Any) -> Any:
    if not (hasattr(stream, "seekable") and stream.seekable()):
        return stream
    start = stream.tell()
    magic = stream.read(6)
    stream.seek(start)
    if isinstance(magic, bytes):
        for begin, opener in _COMPRESSED.items():
            if magic.startswith(begin):
                return opener(stream)
    return stream


def _check(header: bytes, at: int, where: str) -> int:
    """The size that *header* tells, if its checksum is right."""
    try:
        if len(header) == BLOCK and sum(header) - sum(header[148:156]) + 256 == _number(header[148:156]):
            size = _number(header[124:136])
            if 0 <= size <= _MAX_SIZE:
                return size
    except ValueError:
        pass
    if not at:
        raise ReadError(f"{where} is no tar: it begins with {header[:16]!r}")
    raise ReadError(f"{where} is a damaged tar: there is no header at byte {at}")


def _pax_size(text: str, at: int, where: str) -> int:
    if not (text.isascii() and text.isdigit()) or len(text) > 19 or int(text) > _MAX_SIZE:
        raise ReadError(f"{where}: the extended header before byte {at} claims a size of {text[:30]!r} bytes")
    return int(text)


def _number(field: bytes) -> int:
    if field[0] & 0x80:
        value = int.from_bytes(field, "big", signed=False)
        return value - (1 << (8 * len(field) - 1)) if field[0] == 0x80 else value - (1 << 8 * len(field))
    return int(field.rstrip(b"\0 ").lstrip() or b"0", 8)


def _name(header: bytes) -> str:
    name = _text(header[:100])
    prefix = _text(header[345:500]) if header[257:263] == b"ustar\0" else ""
    return f"{prefix}/{name}" if prefix else name


def _text(field: bytes) -> str:
    return field.partition(b"\0")[0].decode("utf-8", "surrogateescape")


def _records(data: bytes, at: int, where: str) -> dict[str, str]:
    """The keywords of a PAX header: lines of ``<length> <key>=<value>``."""
    found = {}
    while data:
        digits, space, _ = data.partition(b" ")
        length = int(digits) if space and digits.isdigit() else 0
        key, equals, value = data[len(digits) + 1 : length].partition(b"=")
        if not equals or not value.endswith(b"\n"):
            raise ReadError(f"{where}: the PAX header at byte {at} is damaged")
        found[key.decode("utf-8", "surrogateescape")] = value[:-1].decode("utf-8", "surrogateescape")
        data = data[length:]
    return found
