"""Decompress a stream as it is received: gzip, bzip2, xz, lzma, or zstd, recognized by the first bytes.

Memory is bounded, whatever the stream claims: output is produced in pieces, and windows are limited. Bytes after the
end of the compressed data are ignored, as gzip and tar do.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from importlib import import_module
from tarfile import CompressionError, ReadError
from typing import Any, NamedTuple

from azstoragetorch._engine.config import GiB, KiB

_PACKED = 256 * KiB  # taken from the stream at once
_MAX_WINDOW = 1 * GiB  # of xz and lzma; their strongest presets need 65 MiB


class _Codec(NamedTuple):
    make: Callable[[], Any]
    error: type[Exception]


class _Gzip:
    """zlib's decompressor with the interface that those of bz2, lzma and zstd share."""

    def __init__(self) -> None:
        self._zlib = zlib.decompressobj(16 + zlib.MAX_WBITS)

    @property
    def eof(self) -> bool:
        return self._zlib.eof

    @property
    def needs_input(self) -> bool:
        return not self._zlib.unconsumed_tail

    @property
    def unused_data(self) -> bytes:
        return self._zlib.unused_data

    def decompress(self, data: bytes, max_length: int) -> bytes:
        return self._zlib.decompress(self._zlib.unconsumed_tail + data, max_length)


def _gzip() -> _Codec:
    return _Codec(_Gzip, zlib.error)


def _bzip2() -> _Codec:
    return _Codec(import_module("bz2").BZ2Decompressor, OSError)


def _xz() -> _Codec:
    lzma = import_module("lzma")
    return _Codec(lambda: lzma.LZMADecompressor(memlimit=_MAX_WINDOW), lzma.LZMAError)


def _zstd() -> _Codec:
    try:
        zstd = import_module("compression.zstd")  # from Python 3.14 on
    except ImportError:
        zstd = import_module("backports.zstd")
    return _Codec(zstd.ZstdDecompressor, zstd.ZstdError)


_FORMATS: dict[bytes, tuple[str, Callable[[], _Codec]]] = {
    b"\x1f\x8b": ("gzip", _gzip),
    b"BZh": ("bzip2", _bzip2),
    b"\xfd7zXZ\0": ("xz", _xz),
    b"\x5d\0\0": ("lzma", _xz),
    b"\x28\xb5\x2f\xfd": ("zstd", _zstd),
    **{bytes([0x50 + n]) + b"\x2a\x4d\x18": ("zstd", _zstd) for n in range(16)},  # begins with a frame to skip
}


class Unpacked:
    """What a compressed stream holds. Can only be read."""

    def __init__(self, read: Callable[[int], bytes], begin: bytes, where: str) -> None:
        self._name, make_codec = _FORMATS[_magic_of(begin) or b""]
        try:
            self._codec = make_codec()
        except ImportError as error:
            remedy = (
                "pip install backports.zstd"
                if self._name == "zstd"
                else f"use a Python that was built with the module {error.name}"
            )
            raise CompressionError(f"{where}: the tar is compressed by {self._name}: {remedy}") from error
        self._read = read
        self._where = where
        self._rest = begin
        self._unpacker = self._codec.make()

    def read(self, size: int) -> bytes:
        """Up to *size* bytes; none at the end."""
        while True:
            if self._unpacker.eof and not self._begin_next():
                return b""
            packed = b""
            if self._unpacker.needs_input:
                packed, self._rest = self._rest or self._read(_PACKED), b""
                if not packed:
                    raise self._damaged("it ends in mid-stream")
            try:
                piece: bytes = self._unpacker.decompress(packed, size)
            except self._codec.error as error:
                raise self._damaged(str(error)) from error
            if piece:
                return piece

    def _begin_next(self) -> bool:
        """Go to the next compressed stream; False if only something else follows, or nothing."""
        rest = self._rest or self._unpacker.unused_data
        while len(rest := rest.lstrip(b"\0")) < max(map(len, _FORMATS)):
            more = self._read(_PACKED)
            if not more:
                break
            rest += more
        magic = _magic_of(rest)
        if magic is None or _FORMATS[magic][0] != self._name or self._name == "lzma":
            return False
        self._rest = rest
        self._unpacker = self._codec.make()
        return True

    def _damaged(self, why: str) -> ReadError:
        return ReadError(f"{self._where}: the compressed tar is truncated or damaged ({self._name}): {why}")


def is_packed(begin: bytes) -> bool:
    """Whether a stream that begins so may be compressed; what is a tar header, is not."""
    return _magic_of(begin) is not None


def _magic_of(begin: bytes) -> bytes | None:
    return next((magic for magic in _FORMATS if begin.startswith(magic)), None)
