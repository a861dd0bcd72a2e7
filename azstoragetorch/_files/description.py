"""What the service says of a blob: its version, its MD5, and what a copy of it has to keep."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from azstoragetorch._blob.client import BlobClient
from azstoragetorch._blob.download import BlobVersion
from azstoragetorch._engine.scope import Scope

_CONTENT = ("Content-Type", "Content-Encoding", "Content-Language", "Content-Disposition", "Cache-Control")
_METADATA = "x-ms-meta-"


@dataclass(frozen=True, slots=True)
class Description:
    """A blob as the service describes it."""

    version: BlobVersion
    md5: bytes | None
    properties: Mapping[str, str]
    """Content headers and metadata, as headers of the request that commits a copy."""

    @property
    def is_folder(self) -> bool:
        """Whether it is the marker of a directory of an account with a hierarchical namespace."""
        return any(
            name.lower() == f"{_METADATA}hdi_isfolder" and value.lower() == "true"
            for name, value in self.properties.items()
        )


def describe(blob: BlobClient, scope: Scope) -> Description:
    """Ask the service for *blob*.

    Raises:
        AzureError: there is no such blob, or the service refused or could not be reached.
    """
    found = blob.get_properties(scope)
    return Description(found.version, found.md5, _properties(found.headers))


def _properties(headers: Mapping[str, str]) -> dict[str, str]:
    kept = {f"x-ms-blob-{name.lower()}": headers[name] for name in _CONTENT if headers.get(name)}
    return kept | {name: value for name, value in headers.items() if name.lower().startswith(_METADATA)}
