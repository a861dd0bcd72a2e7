"""Secrets that are used but never shown: not in a repr, not in a plain pickle.

A secret travels to a child process (spawn, forkserver, multiprocessing queues and pipes), where it is needed.
In any other pickle, which may end up in a file, its place is taken by a marker that says what to do.
"""

from __future__ import annotations

import re
from multiprocessing.context import get_spawning_popen
from multiprocessing.reduction import ForkingPickler
from typing import Any

_SIGNATURE = re.compile(r"(?i)\b(sig|x-ms-signature|access_token|accountkey)(\"?\s*[=:]\s*\"?|%3d)[^&\s\"'<>;]+")
_BEARER = re.compile(r"(?i)\b(bearer|sharedkey(?:lite)?)\s+[a-z0-9._~+/:=-]{8,}")


def redact(text: str) -> str:
    """*text* without signatures and tokens."""
    return _BEARER.sub(r"\1 [redacted]", _SIGNATURE.sub(r"\1\2[redacted]", text))


class Secret:
    """A text that is kept out of sight. ``reveal()`` gives it."""

    __slots__ = ("_value",)

    def __init__(self, value: str | None) -> None:
        self._value = value

    def reveal(self) -> str:
        """The secret.

        Raises:
            ValueError: this object came out of a plain pickle, which never holds secrets.
        """
        if self._value is None:
            raise ValueError(
                "the SAS or key of this object was left out when it was pickled, since a pickle may be kept in a file: "
                "make the object again with its credential"
            )
        return self._value

    def __repr__(self) -> str:
        return "Secret(...)"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Secret) and self._value == other._value

    def __hash__(self) -> int:
        return hash((Secret, self._value))

    def __copy__(self) -> Secret:
        return self

    def __deepcopy__(self, _memo: object) -> Secret:
        return self  # a copy stays in this process

    def __reduce__(self) -> tuple[Any, ...]:
        # While a child process is being started its arguments may hold plain pickles: DataLoader wraps a pipe in one.
        return Secret, (self._value if get_spawning_popen() is not None else None,)


def _to_other_process(secret: Secret) -> tuple[Any, ...]:
    return Secret, (secret._value,)  # noqa: SLF001


ForkingPickler.register(Secret, _to_other_process)
