"""Listed blobs, or blobs given by URLs, as columns in a few large objects: a few dozen bytes per blob.

With a Python object per blob, a million blobs take gigabytes, and reference counts copy them in forked workers.
"""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import accumulate, islice
from typing import Any

from azstoragetorch._blob.url import BlobURL, needs_no_parsing, parse_blob_url

_HEAD = 8  # bytes that say how long the head of a packed catalog is


class Catalog:
    """Names of blobs in their containers, with sizes and ETags if they were listed. Grows by appending.

    Pickles as its columns: about 30 bytes a blob and its name.
    """

    def __init__(self, containers: Iterable[BlobURL] = ()) -> None:
        self.containers = list(containers)
        """Where the blobs are: addresses of containers, possibly with a snapshot or version."""
        self._names = bytearray()
        self._ends = array("Q")
        self._of: array[int] | None = None  # index into `containers`, if not all are in the first
        self._sizes = array("Q")  # as long as `_ends`, or empty
        self._etags = array("Q")
        self._odd_etags: dict[int, str] = {}  # those that are not hexadecimal numbers, as the service's are
        self._fingerprint: tuple[int, str] | None = None

    def __len__(self) -> int:
        return len(self._ends)

    def append_listed(self, names: Sequence[str], sizes: Sequence[int], etags: Sequence[str]) -> None:
        """Append listed blobs of the first container. ETags are quoted."""
        start = len(self)
        self._append_names(names)
        self._sizes.extend(sizes)
        for index, etag in enumerate(etags, start):
            try:
                value = int(etag[1:-1], 16)
            except ValueError:
                value = -1
            if not 0 <= value < 1 << 64 or f'"0x{value:X}"' != etag:
                self._odd_etags[index] = etag
                value = 0
            self._etags.append(value)

    def append_urls(self, urls: Iterable[str]) -> None:
        """Append the blobs that *urls* name.

        Raises:
            ValueError: a URL does not name a blob.
            TypeError: a URL is not a string.
        """
        of = array("I")
        names: list[str] = []
        known = {container: index for index, container in enumerate(self.containers)}
        base, current = "", 0
        for url in urls:
            if not isinstance(url, str):
                raise TypeError(f"blob_urls must be strings, not {type(url).__name__}")
            if base and url.startswith(base) and needs_no_parsing(url, len(base)):
                name = url[len(base) :]
            else:
                parsed = parse_blob_url(url)
                name = parsed.blob
                container = replace(parsed, blob="")
                current = known.setdefault(container, len(self.containers))
                if current == len(self.containers):
                    self.containers.append(container)
                base = "" if parsed.is_read_only or parsed.sas is not None else f"{container}/"
            names.append(name)
            of.append(current)
        self._append_names(names)
        self._of = of if self._of is None else self._of + of

    def append(self, other: Catalog) -> None:
        """Append what was listed in the same container."""
        start = len(self)
        base = len(self._names)
        self._names += other._names
        self._ends.extend(base + end for end in other._ends)
        self._sizes.extend(other._sizes)
        self._etags.extend(other._etags)
        self._odd_etags |= {start + index: etag for index, etag in other._odd_etags.items()}

    def truncate(self, length: int) -> None:
        """Forget all but the first *length* blobs."""
        del self._ends[length:], self._sizes[length:], self._etags[length:]
        del self._names[self._ends[-1] if length else 0 :]
        self._odd_etags = {index: etag for index, etag in self._odd_etags.items() if index < length}

    def name(self, index: int) -> str:
        """The name of a blob."""
        start = self._ends[index - 1] if index else 0
        return self._names[start : self._ends[index]].decode("utf-8")

    def url(self, index: int) -> BlobURL:
        """The address of a blob."""
        return self.containers[self.container_index(index)].with_checked_blob(self.name(index))

    def container_index(self, index: int) -> int:
        """Which of `containers` a blob is in."""
        return self._of[index] if self._of is not None else 0

    def size(self, index: int) -> int | None:
        """The length of a blob in bytes, if it was listed."""
        return self._sizes[index] if self._sizes else None

    def etag(self, index: int) -> str | None:
        """The ETag of a blob, with its quotes, if it was listed."""
        if not self._etags:
            return None
        return self._odd_etags.get(index) or f'"0x{self._etags[index]:X}"'

    @property
    def total_size(self) -> int | None:
        """Bytes of all blobs together, if they were listed."""
        return sum(self._sizes) if len(self._sizes) == len(self) else None

    @property
    def fingerprint(self) -> str:
        """Equal for two catalogs with the same names in the same order."""
        if self._fingerprint is None or self._fingerprint[0] != len(self):
            digest = hashlib.blake2b(self._names, digest_size=16)
            digest.update(self._ends.tobytes())
            if self._of is not None and len(self.containers) > 1:
                digest.update(self._of.tobytes())
                digest.update("\n".join(f"{c} {c.snapshot} {c.versionid}" for c in self.containers).encode())
            self._fingerprint = len(self), digest.hexdigest()
        return self._fingerprint[1]

    def _append_names(self, names: Sequence[str]) -> None:
        joined = "".join(names)
        encoded = joined.encode("utf-8")
        lengths = map(len, names) if len(encoded) == len(joined) else (len(name.encode("utf-8")) for name in names)
        ends = accumulate(lengths, initial=len(self._names))
        self._names += encoded
        self._ends.extend(islice(ends, 1, None))

    def _columns(self) -> tuple[Any, ...]:
        starts = [0, *self._ends[:-1]]
        # The service allows 1,024 characters a name, so a length fits into 16 bits.
        lengths = array("H", (end - start for start, end in zip(starts, self._ends, strict=False)))
        return bytes(self._names), lengths, self._of, self._sizes, self._etags, self._odd_etags

    @classmethod
    def _restore(cls, containers: Iterable[BlobURL], columns: tuple[Any, ...]) -> Catalog:
        self = cls(containers)
        names, lengths, self._of, self._sizes, self._etags, self._odd_etags = columns
        self._names += names
        self._ends.extend(accumulate(lengths))
        return self

    def to_bytes(self) -> bytes:
        """All but the containers, of what was listed, for a process of this job that knows them."""
        names, lengths, _, sizes, etags, odd = self._columns()
        sections = [names, lengths.tobytes(), sizes.tobytes(), etags.tobytes()]
        head = json.dumps({"sections": list(map(len, sections)), "odd": list(odd.items())}).encode()
        return b"".join([len(head).to_bytes(_HEAD, "little"), head, *sections])

    @classmethod
    def from_bytes(cls, containers: Iterable[BlobURL], data: bytes | memoryview) -> Catalog:
        """The catalog of which a process of this job made *data*.

        Raises:
            ValueError: *data* is something else.
        """
        view = memoryview(data)
        at = _HEAD + int.from_bytes(view[:_HEAD], "little")
        head = json.loads(bytes(view[_HEAD:at]))
        columns: list[array[int]] = [array("B"), array("H"), array("Q"), array("Q")]
        for column, length in zip(columns, head["sections"], strict=True):
            column.frombytes(view[at : at + length])
            at += length
        names, lengths, sizes, etags = columns
        if at != len(view) or sum(lengths) != len(names) or not len(lengths) == len(sizes) == len(etags):
            raise ValueError("a listing that another process made is damaged")
        return cls._restore(containers, (names.tobytes(), lengths, None, sizes, etags, dict(head["odd"])))

    def __reduce__(self) -> tuple[Any, ...]:
        return Catalog._restore, (self.containers, self._columns())
