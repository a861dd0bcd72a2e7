"""What a copy needs to know about a blob: its version, its MD5, and the properties to copy."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from urllib.parse import quote, urlencode

from azstoragetorch._blob.client import BlobClient, BlobProperties
from azstoragetorch._blob.download import BlobVersion
from azstoragetorch._blob.head import number_in
from azstoragetorch._engine.scope import Scope

_CONTENT = ("Content-Type", "Content-Encoding", "Content-Language", "Content-Disposition", "Cache-Control")
_METADATA = "x-ms-meta-"
_TIERS = ("Hot", "Cool", "Cold")  # the tiers of block blobs that can be read


@dataclass(frozen=True, slots=True)
class Description:
    """The version, the MD5 and the copied properties of a blob."""

    version: BlobVersion
    md5: bytes | None
    properties: Mapping[str, str]
    """Content headers and metadata, as request headers for the commit of a copy."""
    tier: str | None
    """The access tier, unless it is the default of the account."""
    tag_count: int
    """The number of index tags."""

    @property
    def is_folder(self) -> bool:
        """Whether the blob is a directory marker of an account with a hierarchical namespace."""
        return any(
            name.lower() == f"{_METADATA}hdi_isfolder" and value.lower() == "true"
            for name, value in self.properties.items()
        )


def describe(blob: BlobClient, scope: Scope) -> Description:
    """Request the description of *blob*.

    Raises:
        AzureError: the blob does not exist, or the service refused or could not be reached.
    """
    return describe_found(blob.get_properties(scope))


def describe_found(found: BlobProperties) -> Description:
    """The description in the properties *found*."""
    tier = found.headers.get("x-ms-access-tier")
    is_set = tier in _TIERS and found.headers.get("x-ms-access-tier-inferred", "").lower() != "true"
    return Description(
        found.version,
        found.md5,
        _properties(found.headers),
        tier if is_set else None,
        number_in(found.headers.get("x-ms-tag-count")) or 0,
    )


def headers_of_copy(
    blob: BlobClient, found: Description, scope: Scope, *, keeps_tier: bool, keeps_tags: bool
) -> dict[str, str]:
    """The headers of the request that commits a copy of *blob*, which is described by *found*.

    Raises:
        AzureError: the tags cannot be read.
    """
    headers = dict(found.properties)
    if keeps_tier and found.tier is not None:
        headers["x-ms-access-tier"] = found.tier
    if keeps_tags and found.tag_count:
        headers["x-ms-tags"] = urlencode(blob.tags(scope), quote_via=quote)
    return headers


def _properties(headers: Mapping[str, str]) -> dict[str, str]:
    kept = {f"x-ms-blob-{name.lower()}": headers[name] for name in _CONTENT if headers.get(name)}
    return kept | {name: value for name, value in headers.items() if name.lower().startswith(_METADATA)}
