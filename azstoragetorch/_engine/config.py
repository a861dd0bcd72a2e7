"""The configuration of transfers: sizes, concurrency, memory, and timeouts, validated when it is created."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from functools import lru_cache
from typing import Any, Literal

from azstoragetorch._engine.growth import FIRST

KiB = 1 << 10
MiB = 1 << 20
GiB = 1 << 30

MAX_BLOCK_SIZE = 4000 * MiB  # the service's limit for one block
MAX_VALIDATED_RANGE = 4 * MiB  # the service returns an MD5 only for ranges up to this size


_REAL_NUMBERS = {
    "connect_timeout": "a number of seconds",
    "read_timeout": "a number of seconds",
    "max_backoff": "a number of seconds",
    "hedge_after": '"auto", None or a number of seconds',
    "hedge_budget": "a number",
}  # the other settings are integers
_PREFIX = "AZSTORAGETORCH_"
TRUSTED_HOSTS = f"{_PREFIX}TRUSTED_HOSTS"
FILE_SYSTEM = f"{_PREFIX}FSSPEC"  # whether importing the package calls `filesystem.install`
HEDGE_AFTER = f"{_PREFIX}HEDGE_AFTER"
MAX_CONCURRENCY = f"{_PREFIX}MAX_CONCURRENCY"
_HOST = re.compile(r"\.?(?:[\w-]+(?:\.[\w-]+)*\.?|\[[0-9a-f:.]+\])(?::\d+)?", re.ASCII | re.IGNORECASE)


def _setting(name: str, default: Any) -> Any:
    """A field whose default an operator can override with ``AZSTORAGETORCH_<NAME>``."""
    variable = f"{_PREFIX}{name.upper()}"

    def resolve() -> Any:
        text = os.environ.get(variable)
        if text is None:
            return default
        try:
            if isinstance(default, bool):
                return {"1": True, "true": True, "yes": True, "0": False, "false": False, "no": False}[text.lower()]
            return type(default)(text)
        except (ValueError, KeyError):
            raise ValueError(
                f"environment variable {variable}={text!r} is not a valid {type(default).__name__}"
            ) from None

    return field(default_factory=resolve)


def _hedge_after_of_environment() -> float | Literal["auto"] | None:
    text = os.environ.get(HEDGE_AFTER, "auto").lower()
    if text == "auto":
        return "auto"
    if text == "none":
        return None
    try:
        return float(text)
    except ValueError:
        raise ValueError(f'environment variable {HEDGE_AFTER}={text!r} is not "auto", "none" or a number') from None


def _concurrency_of_environment() -> int | Literal["auto"]:
    text = os.environ.get(MAX_CONCURRENCY, "auto").lower()
    if text == "auto":
        return "auto"
    try:
        return int(text)
    except ValueError:
        raise ValueError(f'environment variable {MAX_CONCURRENCY}={text!r} is not "auto" or an integer') from None


def _hosts_of_environment() -> tuple[str, ...]:
    text = os.environ.get(TRUSTED_HOSTS, "")
    names = [name for name in re.split(r"[\s,]+", text) if name] if text else []
    return _checked_hosts(names, f"environment variable {TRUSTED_HOSTS}") if names else ()


def _checked_hosts(names: Sequence[str], source: str) -> tuple[str, ...]:
    """*names* of hosts in the form in which they are compared; errors begin with *source*."""
    if not isinstance(names, (list, tuple)) or not all(isinstance(name, str) for name in names):
        raise TypeError(f'{source} must be a list or tuple of strings such as ["data.example.com"], not {names!r}')
    hosts = tuple(name.lower().removeprefix("*") for name in names)
    for name, host in zip(names, hosts, strict=True):
        if not _HOST.fullmatch(host):
            raise ValueError(
                f"{source}: {name!r} is not a host: write data.example.com, data.example.com:8443 or, for all hosts of "
                "a domain, .example.com"
            )
    return hosts


@lru_cache(maxsize=1)
def _warn_about_misspelt_variables() -> None:
    """Warn about each ``AZSTORAGETORCH_*`` variable that nothing reads, once for each process."""
    known = {f"{_PREFIX}{setting.name.upper()}" for setting in fields(TransferConfig)} | {FILE_SYSTEM}
    for name in sorted({name for name in os.environ if name.startswith(_PREFIX)} - known):
        from difflib import get_close_matches

        (nearest,) = get_close_matches(name, sorted(known), 1, cutoff=0.0)
        what = f"environment variable {name} is not a setting and is ignored; did you mean {nearest}?"
        warnings.warn(what, UserWarning, stacklevel=4)


@dataclass(frozen=True)
class TransferConfig:
    """How blobs are transferred. Accepted everywhere as ``transfer=``; immutable and picklable.

    Defaults suit a VM in the region of the account. Each can be overridden for a whole process with an
    environment variable ``AZSTORAGETORCH_<NAME>``, for example ``AZSTORAGETORCH_MAX_CONCURRENCY=32``.

    Args:
        part_size: Bytes of one ranged read. 8 MiB keeps the cost of a request below 1%, and fetches most samples and
            shards of an index in one request.
        block_size: Initial size of a staged block in bytes; it grows with the length written, because the service
            accepts at most 50,000 blocks per blob.
        max_concurrency: Concurrent requests of one transfer. One blob serves about 60 MB/s per connection, and 16
            connections fill most NICs. ``"auto"`` begins with 16. While a long transfer shows that single connections
            are slow and that more of them add bandwidth, it makes up to ``max_connections`` requests at once, and so do
            later transfers of the process.
        max_connections: Threads, and so connections, of all transfers that share this configuration. 64 small
            blobs in flight hide a latency of 20 ms at 3,000 blobs/s.
        memory_limit: Bytes that read-ahead, prefetching and staged blocks may hold at once, over all transfers
            of the process that share this configuration. One oversized piece is always admitted alone.
        read_ahead: Bytes fetched ahead of a sequential reader; 0 turns read-ahead off.
        connect_timeout: Seconds to establish a connection.
        read_timeout: Seconds without receiving a byte before a request is retried.
        max_attempts: Attempts of a request that makes no progress, including the first one. A refusal because the
            service throttles (503, 429) is not an attempt while the service accepts other requests.
        max_backoff: Longest pause between two attempts in seconds; a longer ``Retry-After`` is honored.
        hedge_after: Seconds without a byte after which a request that can be repeated is sent once more, on another
            connection; the response that begins first is used. ``"auto"`` derives them from the times that other
            requests took, None turns it off. In the environment variable: ``auto``, ``none`` or seconds.
        hedge_budget: The maximum share of requests that are sent once more; 0 turns it off.
        validate_content: Check an MD5 of every part read, and let the service check one of every block written.
            Parts are then at most 4 MiB. TLS already protects bytes in flight.
        trusted_hosts: Hosts outside Azure that get the credential even if only a list of URLs, a listing, or a
            checkpoint names them: ``"data.example.com"``, ``"data.example.com:8443"``, or ``".example.com"`` for all
            hosts of a domain. Commas separate them in the environment variable. The host of a URL that is passed
            together with the credential gets it anyway.

    Raises:
        ValueError: a value is out of range or not a host; the message names it.
        TypeError: a value has the wrong type.
    """

    part_size: int = _setting("part_size", 8 * MiB)
    block_size: int = _setting("block_size", 8 * MiB)
    max_concurrency: int | Literal["auto"] = field(default_factory=_concurrency_of_environment)
    max_connections: int = _setting("max_connections", 64)
    memory_limit: int = _setting("memory_limit", 512 * MiB)
    read_ahead: int = _setting("read_ahead", 128 * MiB)
    connect_timeout: float = _setting("connect_timeout", 10.0)
    read_timeout: float = _setting("read_timeout", 60.0)
    max_attempts: int = _setting("max_attempts", 6)
    max_backoff: float = _setting("max_backoff", 20.0)
    hedge_after: float | Literal["auto"] | None = field(default_factory=_hedge_after_of_environment)
    hedge_budget: float = _setting("hedge_budget", 0.02)
    validate_content: bool = _setting("validate_content", False)
    trusted_hosts: Sequence[str] = field(default_factory=_hosts_of_environment)

    def __post_init__(self) -> None:
        _warn_about_misspelt_variables()
        if self.trusted_hosts != ():
            object.__setattr__(self, "trusted_hosts", _checked_hosts(self.trusted_hosts, "trusted_hosts"))
        limits: dict[str, tuple[float, float]] = {
            "part_size": (64 * KiB, 4 * GiB),
            "block_size": (64 * KiB, MAX_BLOCK_SIZE),
            "max_concurrency": (1, 1024),
            "max_connections": (1, 4096),
            "memory_limit": (1 * MiB, 1 << 50),
            "read_ahead": (0, 1 << 50),
            "connect_timeout": (0.001, 86_400),
            "read_timeout": (0.001, 86_400),
            "max_attempts": (1, 1000),
            "max_backoff": (0, 86_400),
            "hedge_budget": (0, 1),
        }
        if isinstance(self.hedge_after, str) and self.hedge_after != "auto":
            raise ValueError(f"hedge_after must be {_REAL_NUMBERS['hedge_after']}, not {self.hedge_after!r}")
        if self.hedge_after not in (None, "auto"):
            limits["hedge_after"] = (0.001, 86_400)
        if isinstance(self.max_concurrency, str):
            if self.max_concurrency != "auto":
                raise ValueError(f'max_concurrency must be "auto" or an integer, not {self.max_concurrency!r}')
            del limits["max_concurrency"]
        if not isinstance(self.validate_content, bool):
            raise TypeError(f"validate_content must be True or False, not {self.validate_content!r}")
        for name, (low, high) in limits.items():
            value = getattr(self, name)
            is_count = name not in _REAL_NUMBERS
            if isinstance(value, bool) or not isinstance(value, int if is_count else (int, float)):
                kind = "an integer" if is_count else _REAL_NUMBERS[name]
                raise TypeError(f"{name} must be {kind}, not {value!r}")
            if not low <= value <= high:
                raise ValueError(f"{name} must be between {low:g} and {high:g}, not {value!r}")

    @property
    def initial_concurrency(self) -> int:
        """Concurrent requests with which a transfer begins. This is ``max_concurrency`` if that is a number."""
        return min(FIRST, self.max_connections) if isinstance(self.max_concurrency, str) else self.max_concurrency

    @property
    def effective_part_size(self) -> int:
        """Bytes of one ranged read, given that validated ranges are limited by the service."""
        return min(self.part_size, MAX_VALIDATED_RANGE) if self.validate_content else self.part_size
