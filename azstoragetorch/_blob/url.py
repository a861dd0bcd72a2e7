"""Parse the URLs of blobs and containers, in every form that users write, into one value.

Names are stored decoded and percent-encoded for requests, so every name round-trips. No string of the
value contains the SAS. This module also decides which names (`check_name`) and which hosts (`is_azure`) are accepted.
"""

from __future__ import annotations

import ipaddress
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from urllib.parse import SplitResult, parse_qsl, quote, unquote, unquote_to_bytes, urlsplit

from azstoragetorch._blob.secret import Secret

ACCOUNT_VARIABLE = "AZURE_STORAGE_ACCOUNT_NAME"  # the account of az://container/path, as in adlfs

_SAS_FIELDS = {"sig", "sv", "se", "st", "sp", "spr", "sr", "ss", "srt", "sip", "si", "skoid", "sktid", "skt", "ske"} | {
    "sks", "skv", "skdutid", "sdd", "sduoid", "srh", "srq", "saoid",
    "suoid", "scid", "ses", "rscc", "rscd", "rsce", "rscl", "rsct", "tn"
}  # fmt: skip
# These values can have a slash in a query that is not encoded.
_MAY_HOLD_SLASH = {"rscc", "rscd", "rsce", "rscl", "rsct", "srh", "srq"}

# Domains of Azure: the public cloud and its DNS zones, OneLake, and the sovereign clouds. Only Azure has hosts below
# them, so a host is Azure's if it ends with one of them.
_PUBLIC_CLOUD = (".blob.core.windows.net", ".blob.storage.azure.net", ".blob.fabric.microsoft.com")
_SOVEREIGN_CLOUDS = (
    ".blob.core.usgovcloudapi.net",
    ".blob.core.chinacloudapi.cn",
    ".blob.core.microsoft.scloud",
    ".blob.core.eaglex.ic.gov",
    ".blob.core.sovcloud-api.fr",
    ".blob.core.sovcloud-api.de",
    ".blob.core.sovcloud-api.sg",
)

EMULATOR_ACCOUNT = "devstoreaccount1"
_MAX_NAME = 1024  # characters that the service allows
_PLAIN = re.compile(r"[\w./-]*", re.ASCII)
_PLAIN_CONTAINER = re.compile(r"[\w.-]*", re.ASCII)
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
_PLAIN_NAME = re.compile(r"(?:[\w~-][\w.~-]*/)*[\w~-][\w.~-]*", re.ASCII)
_HOST = re.compile(r"[\w.:-]*")
_ACCOUNT = re.compile(r"[\w.~-]+", re.ASCII)
_SAS = re.compile(r"[!-~]*")
_SIGNATURE = re.compile(r"[A-Za-z0-9+/]{43}=")  # the base64 of 32 bytes
_PLACEHOLDER = re.compile(r"<[\w .-]+>|%3[Cc][\w .-]+%3[Ee]|\{[\w .-]*\}|\$\{?[A-Z_]{2,}\}?")
_SCHEMES = {
    "http": "http",
    "https": "https",
    "wasb": "https",
    "wasbs": "https",
    "abfs": "https",
    "abfss": "https",
    "az": "https",
    "azt": "https",
}
_FORMS = (
    "https://<account>.blob.core.windows.net/<container>/<blob>, http(s)://<host>[:port]/<account>/<container>/<blob>, "
    "abfss://<container>@<account>.dfs.core.windows.net/<blob>, "
    "wasbs://<container>@<account>.blob.core.windows.net/<blob>, az://<account host>/<container>/<blob> or, with "
    f"{ACCOUNT_VARIABLE} set, az://<container>/<blob>"
)


@dataclass(frozen=True, slots=True)
class BlobURL:
    """The URL of a blob or, with an empty *blob*, of a container.

    ``str()`` returns the URL without its query. ``snapshot`` and ``versionid`` select an older state of the blob.
    """

    scheme: str
    host: str  # including the port, if the URL has one
    account_path: str  # "/devstoreaccount1" if the account is in the path, otherwise ""
    container: str
    blob: str = ""
    snapshot: str | None = None
    versionid: str | None = None
    sas: Secret | None = field(default=None, repr=False)

    @property
    def account_url(self) -> str:
        """The URL of the account, without a trailing slash."""
        return f"{self.scheme}://{self.host}{self.account_path}"

    @property
    def path(self) -> str:
        """The percent-encoded path, as in requests."""
        container = f"{self.account_path}/{_encode_container(self.container)}"
        return f"{container}/{_encode_name(self.blob)}" if self.blob else container

    @property
    def hostname(self) -> str:
        """The host without its port, and without brackets if it is an IPv6 address."""
        return (urlsplit(f"//{self.host}").hostname or "").removesuffix(".")

    @property
    def account_name(self) -> str:
        """The name of the account, from the path or from the first label of a host of Azure; '' if it is in neither.

        The first label of another host, such as ``account.example.com``, is not an account name.
        """
        if self.account_path:
            return self.account_path[1:]
        # Endpoints of one account have suffixes: -secondary, -ipv6, -internetrouting. Account names have no hyphens.
        return self.hostname.partition(".")[0].partition("-")[0] if self.is_azure else ""

    @property
    def is_azure(self) -> bool:
        """Whether the host belongs to Azure Storage, in any cloud, including private links and DNS zones."""
        return self.hostname.endswith(_PUBLIC_CLOUD + _SOVEREIGN_CLOUDS)

    @property
    def is_loopback(self) -> bool:
        """Whether the host is this machine, as for emulators."""
        hostname = self.hostname
        return hostname == "localhost" or ((address := _ip_address(hostname)) is not None and address.is_loopback)

    @property
    def is_emulator(self) -> bool:
        """Whether this is the account that Azurite has by default, on this machine, over plain HTTP."""
        return self.scheme == "http" and self.account_path == f"/{EMULATOR_ACCOUNT}" and self.is_loopback

    @property
    def audience(self) -> str:
        """The resource for which a token is requested.

        In the public cloud one resource covers all accounts. In a sovereign cloud it is the account in the domain of
        that cloud, so that a token is not valid in another cloud.
        """
        hostname = self.hostname
        domain = next((domain for domain in _SOVEREIGN_CLOUDS if hostname.endswith(domain)), None)
        return "https://storage.azure.com" if domain is None else f"https://{self.account_name}{domain}"

    @property
    def is_read_only(self) -> bool:
        """Whether this is the URL of a snapshot or version, which cannot be written."""
        return self.snapshot is not None or self.versionid is not None

    def __str__(self) -> str:
        return f"{self.scheme}://{self.host}{self.path}"

    def with_blob(self, name: str) -> BlobURL:
        """The blob *name* in the same container, with the same SAS.

        Raises:
            ValueError: *name* is refused (see `check_name`).
        """
        check_name(name, "name")
        return BlobURL(self.scheme, self.host, self.account_path, self.container, name, sas=self.sas)

    def with_checked_blob(self, name: str) -> BlobURL:
        """The blob *name*, which is not refused, in the same snapshot or version, with the same SAS."""
        # Not dataclasses.replace, which takes twice as long: every sample needs this.
        version = self.snapshot, self.versionid
        return BlobURL(self.scheme, self.host, self.account_path, self.container, name, *version, self.sas)


def parse_blob_url(url: str) -> BlobURL:
    """Parse the URL of a blob.

    Raises:
        ValueError: *url* is not the URL of a blob; the message says what is missing.
        TypeError: *url* is not a str.
    """
    parsed = parse_url(url, argument="blob_url")
    if not parsed.blob:
        raise ValueError(f"blob_url {str(parsed)!r} is the URL of a container, not of a blob: expected {_FORMS}")
    return parsed


def parse_container_url(url: str) -> BlobURL:
    """Parse the URL of a container, with or without a trailing slash.

    Raises:
        ValueError: *url* is not the URL of a container; the message says what is wrong.
        TypeError: *url* is not a str.
    """
    parsed = parse_url(url, argument="container_url")
    if parsed.blob:
        raise ValueError(
            f"container_url {str(parsed)!r} is the URL of a blob or folder, not of a container: pass the URL of the "
            "container, and prefix= for a folder in it"
        )
    if parsed.is_read_only:
        raise ValueError(
            f"container_url {str(parsed)!r} has a snapshot or versionid, which a container cannot have: remove it"
        )
    return parsed


def parse_url(url: str, *, argument: str = "url") -> BlobURL:
    """Parse the URL of a container, folder or blob. *argument* is its name in errors.

    Raises:
        ValueError: *url* is not a valid URL; the message says what to write instead.
        TypeError: *url* is not a str.
    """
    if not isinstance(url, str):
        raise TypeError(f"{argument} must be a str, not {type(url).__name__}")
    scheme, parts = _split(url, argument)
    hostname, port = parts.hostname or "", parts.port
    # Errors quote only the scheme and host: a malformed URL can have a secret anywhere.
    what = f"{argument} {f'{scheme}://{hostname}'!r}"
    host, path = f"[{hostname}]" if ":" in hostname else hostname, parts.path.removeprefix("/")
    if scheme not in ("http", "https"):
        host, path = _resolve_scheme(scheme, host, parts.username, path, what)
    account_path = ""
    if _names_account_in_path(host, path):
        account, _, path = path.partition("/")
        if not _ACCOUNT.fullmatch(account):
            raise ValueError(f"{what} has no account in its path: {_advice(account)}")
        account_path = f"/{account}"
    host = f"{host}:{port}" if port is not None else host
    # The dfs endpoint of an account serves the same blobs. In DNS zones and with private links, one more label comes
    # before "dfs".
    host = re.sub(r"^([\w-]+(?:\.(?!dfs\.|blob\.)[\w-]+)?)\.dfs\.", r"\1.blob.", host)
    container, _, blob = path.partition("/")
    if not container or _PLACEHOLDER.search(container):
        raise ValueError(f"{what} has no container: {_advice(container)}")
    if "&sig=" in parts.path:
        raise ValueError(
            f"{what} has a SAS in its path: put a '?' before the SAS, and write a '&' in a blob name as %26"
        )
    name = _decode(blob, argument)
    check_name(name, argument)
    place = BlobURL(_SCHEMES[scheme], host, account_path, _decode(container, argument), name)
    return _with_query(place, parts.query, what) if parts.query else place


def _split(url: str, argument: str) -> tuple[str, SplitResult]:
    """The scheme and the other parts of *url*, whose host is valid."""
    if _CONTROL.search(url):  # urlsplit removes some of them, which would change the name
        raise ValueError(
            f"{argument} contains a control character, such as a tab or line break: remove it, or percent-encode it"
        )
    scheme, separator, rest = url.partition("://")
    scheme = scheme.lower()
    if not separator or scheme not in _SCHEMES:
        raise ValueError(f"{argument} is not a URL of Azure Blob Storage: {_explain_unknown_scheme(url)}")
    try:
        # These URLs have no fragments: an unencoded "#" is part of a name.
        parts = urlsplit("//" + rest.replace("#", "%23"))
        _ = parts.port
    except ValueError:
        raise ValueError(f"{argument} is not a valid URL: {_advice(url)}") from None
    hostname = parts.hostname or ""
    if not _HOST.fullmatch(hostname):
        raise ValueError(f"{argument} has invalid characters in its host: {_advice(parts.netloc)}")
    if not hostname:
        raise ValueError(f"{argument} is not a URL of Azure Blob Storage: {scheme}:// has no host. {_advice(url)}")
    if parts.password is not None or (parts.username is not None and scheme in ("http", "https")):
        raise ValueError(f"{argument} has a user name or password before its host ({hostname}): remove it")
    return scheme, parts


def _resolve_scheme(scheme: str, host: str, user: str | None, path: str, what: str) -> tuple[str, str]:
    """The host and path of a URL whose scheme is not http(s); it can have the container before an '@'."""
    if user is not None and "." in host:
        return host, f"{user}/{path}"
    if "." not in host:
        account = os.environ.get(ACCOUNT_VARIABLE, "")
        if user is not None:
            raise ValueError(f"{what} has no host of an account: expected {_FORMS}")
        if not account:
            raise ValueError(
                f"{what} has no host of an account: set the environment variable {ACCOUNT_VARIABLE}, or write "
                f"az://<account>.blob.core.windows.net/{host}/... Expected {_FORMS}"
            )
        if not re.fullmatch(r"[a-z0-9]{3,24}", account):
            raise ValueError(
                f"environment variable {ACCOUNT_VARIABLE}={account!r} is not a valid account name: expected 3 to 24 "
                "lower-case letters and digits"
            )
        return f"{account}.blob.core.windows.net", f"{host}/{path}"
    if scheme not in ("az", "azt"):
        raise ValueError(f"{what} has no container before an '@': expected {_FORMS}")
    return host, path


def _with_query(place: BlobURL, text: str, what: str) -> BlobURL:
    """*place* with the SAS, snapshot and version from the query *text*."""
    items = text.split("&")
    for item in items:
        _check_parameter(item, place, what)
    options = {key.lower(): value for key, value in parse_qsl(text, keep_blank_values=True, separator="&")}
    known = _SAS_FIELDS | {"snapshot", "versionid"}
    if not place.blob:
        known |= {"restype", "comp"}  # left in the URL by tools that list containers
    if unknown := sorted(key for key in options if key not in known):
        raise ValueError(
            f"{what} has the unknown query parameter {unknown[0]!r}: remove it, or write a '?' in a blob name as %3F"
        )
    if (options.get("restype", "container"), options.get("comp", "list")) != ("container", "list"):
        raise ValueError(f"{what} is not the URL of a container: remove restype= and comp= from its query")
    sas = "&".join(item for item in items if item.partition("=")[0].lower() in _SAS_FIELDS)
    if sas and "sig" not in options:
        raise ValueError(f"{what} has a SAS without a signature (sig=): copy the whole SAS")
    if not _SAS.fullmatch(sas):
        raise ValueError(f"{what} has a SAS with a space or another invalid character: copy it again")
    snapshot, version = options.get("snapshot") or None, options.get("versionid") or None
    return replace(place, snapshot=snapshot, versionid=version, sas=Secret(sas) if sas else None)


def _check_parameter(item: str, place: BlobURL, what: str) -> None:
    """Refuse a path that was appended to the query: ``url?sas/step-1``."""
    key, _, value = item.partition("=")
    may_hold_it = key.lower() in _MAY_HOLD_SLASH or key.lower() not in _SAS_FIELDS | {"snapshot", "versionid"}
    if "/" not in value or may_hold_it or (key.lower() == "sig" and _SIGNATURE.fullmatch(unquote(value))):
        return
    # The path is not quoted: it can be part of the signature.
    raise ValueError(
        f"{what} has a path after its query: write {place}/<name>?<SAS>, or use azstoragetorch.join_url(url, name)"
    )


def join_url(url: str, *names: str) -> str:
    """*url* with *names* appended to its path, before its query; see `azstoragetorch.join_url`."""
    if not isinstance(url, str):
        raise TypeError(f"url must be a str, not {type(url).__name__}")
    base, mark, query = url.partition("?")
    for name in names:
        if not isinstance(name, str):
            raise TypeError(f"a name must be a str, not {type(name).__name__}")
        if not name.strip("/") or name.startswith("/"):
            raise ValueError(f"names must not be empty or start with '/': {name!r}")
        check_name(name, "names")
        base = f"{base.removesuffix('/')}/{_encode_name(name)}"
    return f"{base}{mark}{query}"


def url_of_name(container_url: str, name: str) -> str:
    """The URL of the blob *name* in the container *container_url*, which has no query."""
    return f"{container_url}/{_encode_name(name)}"


def needs_no_parsing(url: str, start: int) -> bool:
    """Whether *url* from *start* on is a blob name with nothing to decode or refuse."""
    return len(url) - start <= _MAX_NAME and _PLAIN_NAME.fullmatch(url, start) is not None


def why_refused(name: str) -> str | None:
    """Why requests for the blob *name* are refused, as a phrase that follows "the blob name ..."; None if they are not.

    Listings can contain such names. Code that lists skips them with a warning, or raises an error.
    """
    if (name[:1] == "." or "/." in name) and not {".", ".."}.isdisjoint(name.split("/")):
        return "has a '.' or '..' segment, which servers and proxies resolve to another blob: rename the blob"
    if len(name) > _MAX_NAME:
        return f"has {len(name)} characters; the service allows {_MAX_NAME:,}"
    if not name.isascii() and not _is_encodable(name):
        return "cannot be encoded as UTF-8: it has a lone surrogate"
    return None


def find_refused(names: Sequence[str]) -> list[int]:
    """The indices of the names that are refused (see `why_refused`). Fast if none is refused."""
    joined = "/".join(names)
    if joined.isascii() and joined[:1] != "." and "/." not in joined and max(map(len, names), default=0) <= _MAX_NAME:
        return []
    return [index for index, name in enumerate(names) if why_refused(name) is not None]


def check_name(name: str, argument: str) -> None:
    """Raise `ValueError` if requests for the blob *name* are refused."""
    if (reason := why_refused(name)) is not None:
        shown = repr(name if len(name) < 200 else f"{name[:200]}...")
        raise ValueError(f"{argument}: the blob name {shown} {reason}")


def _is_encodable(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def _names_account_in_path(host: str, path: str) -> bool:
    if "." not in host or ":" in host or _ip_address(host) is not None:
        return True
    # An emulator behind a DNS name also has its account in the path.
    return path.partition("/")[0] == "devstoreaccount1"


def _ip_address(hostname: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(hostname)
    except ValueError:
        return None


def _explain_unknown_scheme(url: str) -> str:
    """Why *url*, whose scheme is unknown, is not valid, and what to write instead. Does not quote its query."""
    scheme, separator, _ = url.partition(":")
    shown = url.partition("?")[0]
    first = shown.partition("/")[0]
    if not re.fullmatch(r"[\w./ ~-]{1,80}", shown, re.ASCII):
        shown = ""  # it can be a secret
    if scheme.lower() == "azureml" and separator:
        return (
            "azureml:// is the URL of a datastore or asset of Azure ML: look up its account and container (`az ml "
            "datastore show --name <datastore>`) and pass https://<account>.blob.core.windows.net/<container>/<path>, "
            "where <path> is the part after paths/"
        )
    if re.fullmatch(r"[\w.-]+\.[\w-]+(?::\d+)?", first) and "/" in url and ".blob." in f".{first}":
        return f"it has no scheme: write https://{first}/..."
    if scheme.lower() == "file" or url[:1] in ("/", ".", "~", "\\") or re.match(r"[A-Za-z]:[\\/]", url):
        return f"{shown or 'it'} is a local path: use open() for files. Expected {_FORMS}"
    if re.fullmatch(r"[A-Za-z][\w+.-]*", scheme) and url.startswith("//", len(scheme) + 1):
        return f"{scheme}:// is not a supported scheme. Expected {_FORMS}"
    return (
        f"{shown!r} does not start with https://. {_advice(url)}"
        if shown
        else f"it does not start with https://. {_advice(url)}"
    )


def _advice(text: str) -> str:
    """The expected forms of URLs, and a hint if *text* still has a placeholder."""
    found = _PLACEHOLDER.search(text)
    left = f"{found.group()!r} is a placeholder: replace it with the real name. " if found is not None else ""
    return f"{left}Expected {_FORMS}"


@lru_cache(maxsize=256)  # a sample needs it for the request and for its URL
def _encode_name(name: str) -> str:
    return name if _PLAIN.fullmatch(name) else quote(name, safe="~/")  # faster than quote for most names


@lru_cache(maxsize=256)
def _encode_container(name: str) -> str:
    return name if _PLAIN_CONTAINER.fullmatch(name) else quote(name, safe="$")


def _decode(text: str, argument: str) -> str:
    try:
        return unquote_to_bytes(text).decode("utf-8")
    except UnicodeDecodeError:
        raise ValueError(f"{argument} has a percent-encoded name that is not UTF-8: encode it again") from None
