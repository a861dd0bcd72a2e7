"""Blobs that must still have the version that a manifest lists."""

from __future__ import annotations

from collections.abc import Callable

from azstoragetorch._blob.client import BlobClient, BlobVersion, Head
from azstoragetorch._blob.readahead import ReadAhead
from azstoragetorch._engine.job import IsStuck
from azstoragetorch._engine.scope import Scope
from azstoragetorch.exceptions import BlobChangedError


class ExpectedBlobClient(BlobClient):
    """Reads a blob only if its version is *expected*, which was listed at the time *since*.

    The first response shows the version: the check makes no request.
    """

    def __init__(self, client: BlobClient, expected: BlobVersion, since: str = "") -> None:
        self.__dict__.update(client.__dict__)
        self._client = client
        self._expected = expected
        self._since = since

    def head(self, scope: Scope | None = None) -> Head:
        """The first part.

        Raises:
            BlobChangedError: it is of another version.
        """
        head = self._client.head(scope)
        if not self._is_expected(head.version):
            when = f", which was made at {self._since}" if self._since else ""
            found = head.version.etag or "that of an empty blob"
            raise BlobChangedError(
                f"{self.url} was overwritten after it was listed: its ETag is {found}, and "
                f"{self._expected.etag} in the manifest{when}. Make the manifest again, or pass if_changed='read'"
            )
        return head

    def start_head(self, scope: Scope, done: Callable[[Head], None], failed: Callable[[], None]) -> IsStuck | None:
        """Like `BlobClient.start_head`; another version is a failure, after which `head` raises the error."""

        def check(head: Head) -> None:
            if self._is_expected(head.version):
                done(head)
            else:
                failed()

        return self._client.start_head(scope, check, failed)

    def _is_expected(self, version: BlobVersion) -> bool:
        # The service refuses a range of an empty blob, and that response has no ETag.
        return version.etag == self._expected.etag if version.etag else version.size == self._expected.size

    def reader(self, version: BlobVersion | None = None, head: bytes = b"") -> ReadAhead:
        """Random access; without *version*, the first part is fetched now, and checked."""
        if version is None:
            first = self.head()
            version, head = first.version, first.data
        return self._client.reader(version, head)
