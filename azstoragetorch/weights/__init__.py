"""Weights that change, published by a trainer and followed by any number of processes, bit for bit.

A `Publisher` writes full weights at intervals and differences in between; a `Subscriber` follows. They coordinate
through one pointer blob. :doc:`The guide </guide/deltas>` has an example.
"""

# `_delta` computes differences, `_format` knows what the blobs consist of, and `_place` where they are.

from __future__ import annotations

from azstoragetorch._blob.credentials import Credential
from azstoragetorch._engine.config import TransferConfig
from azstoragetorch.weights._publisher import Published, Publisher
from azstoragetorch.weights._subscriber import Subscriber

__all__ = ["Published", "Publisher", "Subscriber", "subscribe"]


def subscribe(url: str, *, credential: Credential = None, transfer: TransferConfig | None = None) -> Subscriber:
    """Follow the weights that a :class:`Publisher` publishes to the folder *url*. Makes no request.

    Args:
        url: URL of the folder.
        credential: Same as for :class:`~azstoragetorch.io.BlobIO`. It must allow reading.
        transfer: Transfer settings; see :class:`azstoragetorch.TransferConfig`.

    Raises:
        ValueError: *url* is not a valid URL, or names a snapshot.
        TypeError: an argument has the wrong type.
    """
    return Subscriber(url, credential=credential, transfer=transfer)
