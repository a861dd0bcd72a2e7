"""Addresses of blobs and containers: every form that users write, parsed into one value.

Names are kept decoded and encoded again for the wire, so that any name round-trips. The SAS is kept apart from
the address and is in none of its texts.
"""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass, field
from urllib.parse import parse_qsl, quote, unquote_to_bytes, urlsplit

from azstoragetorch._blob.secret import Secret

_SAS_FIELDS = {"sig", "sv", "se", "st", "sp", "spr", "sr", "ss", "srt", "sip", "si", "skoid", "sktid", "skt", "ske"} | {
    "sks", "skv", "skdutid", "sdd", "sduoid", "srh", "srq", "saoid",
    "suoid", "scid", "ses", "rscc", "rscd", "rsce", "rscl", "rsct", "tn"
}  # fmt: skip
_PLAIN = re.compile(r"[\w./-]*", re.ASCII)
_HOST = re.compile(r"[\w.:-]*")
_FORMS = (
    "https://<account>.blob.core.windows.net/<container>/<blob>, http(s)://<host>[:port]/<account>/<container>/<blob>, "
    "abfss://<container>@<account>.dfs.core.windows.net/<blob> or az://<account host>/<container>/<blob>"
)


@dataclass(frozen=True, slots=True)
class BlobURL:
    """Where a blob or, with an empty *blob*, a container is.

    ``str()`` is the address without its query; ``snapshot`` and ``versionid`` choose an older state of a blob.
    """

    scheme: str
    host: str  # with the port, if one was given
    account_path: str  # "/devstoreaccount1" where the path names the account, else ""
    container: str
    blob: str = ""
    snapshot: str | None = None
    versionid: str | None = None
    sas: Secret | None = field(default=None, repr=False)

    @property
    def account_url(self) -> str:
        """The address of the account, without a trailing slash."""
        return f"{self.scheme}://{self.host}{self.account_path}"

    @property
    def path(self) -> str:
        """The percent-encoded path, as it goes on the wire."""
        container = f"{self.account_path}/{quote(self.container, safe='$')}"
        return f"{container}/{_encode_name(self.blob)}" if self.blob else container

    @property
    def account_name(self) -> str:
        """The account as the address names it."""
        return self.account_path[1:] or self.host.split(".", 1)[0]

    @property
    def is_read_only(self) -> bool:
        """Whether this is a snapshot or a version, which cannot be written."""
        return self.snapshot is not None or self.versionid is not None

    def __str__(self) -> str:
        return f"{self.scheme}://{self.host}{self.path}"

    def with_blob(self, name: str) -> BlobURL:
        """The blob *name* in the same container, with the same SAS.

        Raises:
            ValueError: *name* is none that the service can be asked for.
        """
        _check_name(name, "name")
        return BlobURL(self.scheme, self.host, self.account_path, self.container, name, sas=self.sas)


def parse_blob_url(url: str) -> BlobURL:
    """Parse the URL of a blob.

    Raises:
        ValueError: *url* is no URL of a blob; the message says what is missing.
        TypeError: *url* is no text.
    """
    parsed = parse_url(url, argument="blob_url")
    if not parsed.blob:
        raise ValueError(f"blob_url {str(parsed)!r} names a container but no blob: expected {_FORMS}")
    return parsed


def parse_container_url(url: str) -> BlobURL:
    """Parse the URL of a container, with or without a trailing slash.

    Raises:
        ValueError: *url* is no URL of a container; the message says what is wrong.
        TypeError: *url* is no text.
    """
    parsed = parse_url(url, argument="container_url")
    if parsed.blob:
        raise ValueError(
            f"container_url {str(parsed)!r} names a blob or a folder, not a container: pass the container's URL, "
            "and prefix= for a folder in it"
        )
    if parsed.is_read_only:
        raise ValueError(f"container_url {str(parsed)!r} has a snapshot or versionid; a container has neither")
    return parsed


def parse_url(url: str, *, argument: str = "url") -> BlobURL:
    """Parse the URL of a container, a folder or a blob. *argument* is the name that errors give it."""
    if not isinstance(url, str):
        raise TypeError(f"{argument} must be a str, not {type(url).__name__}")
    scheme, separator, rest = url.partition("://")
    scheme = scheme.lower()
    if any(character in url for character in "\t\r\n"):  # urlsplit drops them, which would make it another name
        raise ValueError(f"{argument} has a control character (tab or line break): remove it, or percent-encode it")
    try:
        # Fragments do not exist here: an unencoded "#" in a name is part of the name.
        parts = urlsplit("//" + rest.replace("#", "%23"))
        port = parts.port
    except ValueError:
        raise ValueError(f"{argument} is not a valid URL: expected {_FORMS}") from None
    hostname, user = parts.hostname or "", parts.username
    if not _HOST.fullmatch(hostname):
        raise ValueError(f"{argument} has a host with characters that no host has: expected {_FORMS}")
    # Only the shape is quoted here: what is malformed may hold a secret anywhere.
    shape = f"{scheme}://{hostname}" if separator and hostname else "the given text"
    if not separator or scheme not in ("http", "https", "abfs", "abfss", "az") or not hostname:
        raise ValueError(f"{argument} is not a URL of Azure Blob Storage ({shape}): expected {_FORMS}")
    if parts.password is not None or (user is not None and scheme in ("http", "https")):
        raise ValueError(f"{argument} has a user name or password before its host ({hostname}): remove it")
    host = f"[{hostname}]" if ":" in hostname else hostname
    host = f"{host}:{port}" if port is not None else host
    path = parts.path.removeprefix("/")
    if scheme in ("abfs", "abfss", "az"):
        if "." not in hostname:
            raise ValueError(f"{argument} {shape!r} does not name the account's host: expected {_FORMS}")
        if user is not None:
            path = f"{user}/{path}"
        elif scheme != "az":
            raise ValueError(f"{argument} {shape!r} names no container before the '@': expected {_FORMS}")
        scheme = "https"
    # The hierarchical endpoint of an account serves the same blobs under another name.
    # In DNS zones and behind private links one more label comes before "dfs".
    host = re.sub(r"^([\w-]+(?:\.(?!dfs\.|blob\.)[\w-]+)?)\.dfs\.", r"\1.blob.", host)
    account_path = ""
    if _names_account_in_path(hostname, path):
        account, _, path = path.partition("/")
        if not account:
            raise ValueError(f"{argument} {shape!r} names no account in its path: expected {_FORMS}")
        account_path = f"/{account}"
    container, _, blob = path.partition("/")
    if not container:
        raise ValueError(f"{argument} {shape!r} names no container: expected {_FORMS}")
    if "&sig=" in parts.path:
        raise ValueError(
            f"{argument} {shape!r} has a SAS in its path: put a '?' before the SAS; a '&' in a blob name is written %26"
        )
    name = _decode(blob, argument)
    _check_name(name, argument)
    query = parse_qsl(parts.query, keep_blank_values=True, separator="&")
    options = {key.lower(): value for key, value in query}
    known = _SAS_FIELDS | {"snapshot", "versionid"}
    if unknown := sorted(key for key, _ in query if key.lower() not in known):
        raise ValueError(
            f"{argument} {shape!r} has the unknown query parameter {unknown[0]!r}; a '?' in a blob name is written %3F"
        )
    sas = "&".join(item for item in parts.query.split("&") if item.partition("=")[0].lower() in _SAS_FIELDS)
    if sas and "sig" not in options:
        raise ValueError(f"{argument} {shape!r} has a SAS without its signature ('sig'): copy the whole token")
    return BlobURL(
        scheme=scheme,
        host=host,
        account_path=account_path,
        container=_decode(container, argument),
        blob=name,
        snapshot=options.get("snapshot") or None,
        versionid=options.get("versionid") or None,
        sas=Secret(sas) if sas else None,
    )


def join_url(container_url: str, name: str) -> str:
    """The URL of the blob *name* in the container at *container_url* (without a query)."""
    return f"{container_url}/{_encode_name(name)}"


def _names_account_in_path(hostname: str, path: str) -> bool:
    if "." not in hostname or hostname.startswith("[") or ":" in hostname:
        return True
    try:
        ipaddress.ip_address(hostname)
    except ValueError:
        # An emulator behind a DNS name of its own still puts its one account into the path.
        return path.partition("/")[0] == "devstoreaccount1"
    return True


def _check_name(name: str, argument: str) -> None:
    if (name[:1] == "." or "/." in name) and not {".", ".."}.isdisjoint(name.split("/")):
        raise ValueError(
            f"{argument}: the blob name {name!r} has a '.' or '..' segment, which servers and proxies resolve to "
            "another blob: rename the blob"
        )
    if len(name) > 1024:
        raise ValueError(f"{argument}: the blob name has {len(name)} characters; the service allows 1,024")


def _encode_name(name: str) -> str:
    return name if _PLAIN.fullmatch(name) else quote(name, safe="~/")  # most names: less than half of quote's cost


def _decode(text: str, argument: str) -> str:
    try:
        return unquote_to_bytes(text).decode("utf-8")
    except UnicodeDecodeError:
        raise ValueError(f"{argument}: a percent-encoded name is not UTF-8") from None
