"""List the blobs below a root: a container, a folder, a blob, or a prefix of names.

A listing is lazy: it holds one page, and fetches the next one while that page is read.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

from azstoragetorch._blob.client import ClientFactory, ContainerClient, Page
from azstoragetorch._blob.errors import not_found
from azstoragetorch._blob.url import BlobURL, parse_url, url_of_name
from azstoragetorch._samples.items import BlobInfo, plain_url
from azstoragetorch._samples.names import DEFAULT_RULES, Columns, InvalidNames, NameFilter, NameRules


@dataclass(frozen=True, slots=True)
class Listing:
    """What to list below one root.

    The root is a container, a folder (its URL ends in a slash, or is the name of a folder), a single blob (which
    wins over a folder of the same name), or else the beginning of names.

    *masks* are `fnmatch` patterns, of which a blob has to match one: on the last segment of its name, or on the whole
    name if the mask has a slash.
    """

    masks: tuple[str, ...] = ()
    recursive: bool = True
    rules: NameRules = DEFAULT_RULES

    @classmethod
    def of(
        cls, masks: str | Sequence[str], recursive: bool, invalid_names: InvalidNames, include_folder_markers: bool
    ) -> Listing:
        """Check the arguments that users give.

        Raises:
            ValueError: *invalid_names* is unknown.
            TypeError: a mask is not a str.
        """
        chosen = (masks,) if isinstance(masks, str) else tuple(masks)
        for mask in chosen:
            if not isinstance(mask, str):
                raise TypeError(f"masks must be a str or a sequence of them, not of {type(mask).__name__}")
        return cls(tuple(filter(None, chosen)), bool(recursive), NameRules.of(invalid_names, include_folder_markers))

    def blobs(self, clients: ClientFactory, root: str | BlobURL) -> Iterator[BlobInfo]:
        """The blobs below *root* in the service's order (lexicographic), a page at a time.

        Raises:
            ResourceNotFoundError: nothing is there, or nothing matches the masks. (A container without any blob
                and no masks is empty, which is not an error.)
            ValueError: a name is invalid, and that is an error.
        """
        url = parse_url(root, argument="root") if isinstance(root, str) else root
        if url.is_read_only:
            yield self._snapshot(clients, url)
            return
        container = clients.container(url)
        base = str(container.url)
        names_filter = NameFilter(container.url, self.rules)
        has_any = is_one = False
        for page in self._pages(container, url.blob):
            if url.blob and not has_any and page.names[:1] == [url.blob] and not url.blob.endswith("/"):
                is_one = True
                page = Page(page.names[:1], page.sizes[:1], page.etags[:1], [], "")
            for name, size, etag in zip(*names_filter.keep(*self.matching(page)), strict=True):
                has_any = True
                yield BlobInfo(url_of_name(base, name), size, etag)
            if is_one:
                break
        names_filter.warn()
        if not has_any and (url.blob or self.masks):
            what = f"no blob below {url} matches {', '.join(map(repr, self.masks))}"
            place = "below it" if self.recursive else "directly below it (recursive=False)"
            raise not_found(what if self.masks else f"{url} is not a blob, and no blobs are {place}")

    def _pages(self, container: ContainerClient, name: str) -> Iterator[Page]:
        delimiter = "" if self.recursive else "/"
        if not name or name.endswith("/"):
            yield from container.pages(prefix=name, delimiter=delimiter)
            return
        pages = container.pages(prefix=name, delimiter=delimiter)
        first = next(pages, None)
        # The shortest name comes first, so the blob itself, if it exists, heads the first page that has any.
        while first is not None and not first.names and not first.prefixes and first.marker:
            first = next(pages, None)
        if first is not None and first.names[:1] != [name]:
            folder = _drop_empty(container.pages(prefix=f"{name}/", delimiter=delimiter))
            page = next(folder, None)
            if page is not None:
                yield page
                yield from folder
                return
        if first is not None:
            yield first
            yield from pages

    def _snapshot(self, clients: ClientFactory, url: BlobURL) -> BlobInfo:
        version = clients.blob(url).version()
        if version is None:
            raise not_found(f"there is no blob {plain_url(url)}")
        return BlobInfo(plain_url(url), version.size, version.etag)

    def matching(self, page: Page) -> Columns:
        """The blobs of *page* that the masks choose."""
        if not self.masks:
            return page.names, page.sizes, page.etags
        whole = _one_of(tuple(mask for mask in self.masks if "/" in mask))
        last = _one_of(tuple(mask for mask in self.masks if "/" not in mask))
        left = [i for i, name in enumerate(page.names) if whole(name) or last(name.rpartition("/")[2])]
        return [page.names[i] for i in left], [page.sizes[i] for i in left], [page.etags[i] for i in left]


@lru_cache(maxsize=64)
def _one_of(masks: tuple[str, ...]) -> Callable[[str], re.Match[str] | None]:
    return re.compile("|".join(map(fnmatch.translate, masks)) or r"(?!)").match


def _drop_empty(pages: Iterator[Page]) -> Iterator[Page]:
    return (page for page in pages if page.names or page.prefixes)
