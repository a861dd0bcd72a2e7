"""Pack a sample into the files of a tar in WebDataset's format. No I/O."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from azstoragetorch._samples.tar import entry, padding, split_name


def files_of(sample: Mapping[str, Any], url: str) -> list[bytes]:
    """Headers, contents and paddings of the files of *sample* in a tar, which *url* names in errors.

    Raises:
        ValueError: *sample* has no key or no data, or a name would not come back as it is.
        TypeError: an extension or a value has the wrong type.
    """
    key: Any = sample.get("__key__") if hasattr(sample, "get") else None
    if not isinstance(key, str) or not key:
        raise ValueError(f"{url}: a sample is a mapping with a '__key__', a text that is not empty")
    parts = []
    for extension, value in sample.items():
        if not isinstance(extension, str):
            raise TypeError(f"{url}: the sample {key!r} has the extension {extension!r}, which is not a string")
        if extension.startswith("__"):
            continue
        name = f"{key}.{extension}"
        if split_name(name) != (key, extension.lower()):
            raise ValueError(
                f"{url}: {name!r} would not come back as the extension {extension!r} of the sample {key!r}: "
                "the last segment of a key must be neither empty nor hold a dot, and an extension no slash"
            )
        data = value.encode() if isinstance(value, str) else as_bytes(value, f"{url}/{name}")
        parts += [entry(name, len(data)), data, padding(len(data))]
    if not parts:
        raise ValueError(f"{url}: the sample {key!r} has no data")
    return parts


def as_bytes(data: Any, where: str) -> bytes:
    """The bytes of *data*, which is to be written to *where*.

    Raises:
        TypeError: *data* is not bytes-like.
    """
    if isinstance(data, bytes):
        return data
    try:
        return memoryview(data).tobytes()
    except TypeError:
        raise TypeError(
            f"{where}: what is written must be bytes, an object with the buffer protocol or a binary stream, "
            f"not {type(data).__name__}" + ("; encode the text" if isinstance(data, str) else "")
        ) from None
