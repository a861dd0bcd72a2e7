"""Skip listed blobs whose names cannot be requested, and markers of folders.

The URL type decides which names cannot be requested. This module decides whether such a blob is skipped or an error.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from azstoragetorch._blob.url import BlobURL, find_refused, why_refused

InvalidNames: TypeAlias = Literal["skip", "raise"]

Columns: TypeAlias = tuple[list[str], list[int], list[str]]
"""Names, sizes and ETags of listed blobs."""


@dataclass(frozen=True, slots=True)
class NameRules:
    """What users say about listed blobs that are not plain samples."""

    invalid_names: InvalidNames = "skip"
    include_folder_markers: bool = False

    @classmethod
    def of(cls, invalid_names: Any, include_folder_markers: Any) -> NameRules:
        """Check the arguments that users give.

        Raises:
            ValueError: *invalid_names* is unknown.
            TypeError: *include_folder_markers* is not a bool.
        """
        if invalid_names not in ("skip", "raise"):
            raise ValueError(f"invalid_names must be 'skip' or 'raise', not {invalid_names!r}")
        if not isinstance(include_folder_markers, bool):
            raise TypeError(f"include_folder_markers must be a bool, not {type(include_folder_markers).__name__}")
        return cls(invalid_names, include_folder_markers)


DEFAULT_RULES = NameRules()


class NameFilter:
    """Leaves out of one listing of *container* what *rules* say. Threads may share it."""

    def __init__(self, container: BlobURL, rules: NameRules) -> None:
        self._container = container
        self._rules = rules
        self._refused: set[str] = set()  # a set, since a name may be listed twice: flat and by its folder

    def keep(self, names: list[str], sizes: list[int], etags: list[str]) -> Columns:
        """What is left of the columns.

        Raises:
            ValueError: there is an invalid name, and that is an error.
        """
        out = set(find_refused(names))
        if out and self._rules.invalid_names == "raise":
            raise ValueError(
                f"{self._container}: a listed {_why(names[min(out)])}. invalid_names='skip' leaves such blobs out"
            )
        self._refused.update(names[index] for index in out)
        if not self._rules.include_folder_markers and 0 in sizes:
            out.update(index for index, size in enumerate(sizes) if not size and names[index][-1:] == "/")
        if not out:
            return names, sizes, etags
        left = [index for index in range(len(names)) if index not in out]
        return [names[i] for i in left], [sizes[i] for i in left], [etags[i] for i in left]

    def warn(self) -> None:
        """At the end of the listing: one warning for all blobs that were skipped for their names."""
        if self._refused:
            count = len(self._refused)
            warnings.warn(
                f"{self._container}: skipped {count:,} listed blob{'s' * (count > 1)} whose name cannot be requested. "
                f"The first {_why(min(self._refused))}. Pass invalid_names='raise' to make this an error",
                UserWarning,
                stacklevel=2,
            )


def _why(name: str) -> str:
    shown = name if len(name) < 200 else f"{name[:200]}..."
    return f"blob name {shown!r} {why_refused(name)}"
