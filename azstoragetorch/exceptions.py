"""The errors of azstoragetorch.

::

    Exception
    └── AZStorageTorchError
        ├── FatalBlobIOWriteError          a write failed; nothing will be committed
        ├── BlobChangedError               a blob was overwritten while it was being read
        └── ClientRequestIdMismatchError   an answer belongs to another request

What the service refuses is raised as the matching ``azure.core.exceptions`` type
(``ResourceNotFoundError``, ``ClientAuthenticationError``, ``ServiceResponseError``, ...), since that is what
users of Azure catch. Every one of these errors survives pickling, so that DataLoader workers and distributed
jobs report it as it was raised.
"""

from __future__ import annotations

__all__ = [
    "AZStorageTorchError",
    "BlobChangedError",
    "ClientRequestIdMismatchError",
    "FatalBlobIOWriteError",
]


class AZStorageTorchError(Exception):
    """Base class of the errors that azstoragetorch itself defines."""


class FatalBlobIOWriteError(AZStorageTorchError):
    """A write failed for good: this writer commits nothing and takes no more data.

    The blob is what it was before the writer was opened. The cause is chained (``__cause__``) and named in the
    message. Open a new :class:`~azstoragetorch.io.BlobIO` and write everything again to retry.
    """


class BlobChangedError(AZStorageTorchError):
    """The blob was overwritten or deleted and made anew while it was being read.

    A read pins the version (ETag) that it saw first, so bytes of two versions are never mixed. Open the blob
    again to read the new version.
    """


class ClientRequestIdMismatchError(AZStorageTorchError):
    """The service echoed the id of another request, so the answer cannot be trusted.

    It is retried on a new connection first; seeing it means that a proxy mixes up answers.
    """
