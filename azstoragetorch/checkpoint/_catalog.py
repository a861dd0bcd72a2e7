"""Find checkpoints, and keep the last ones, in one process."""

from __future__ import annotations

import logging

from azstoragetorch._blob.credentials import Credential
from azstoragetorch._engine.config import TransferConfig
from azstoragetorch.checkpoint._cleaning import delete_in
from azstoragetorch.checkpoint._folder import Folder
from azstoragetorch.checkpoint._order import all_but_last, in_order
from azstoragetorch.exceptions import CheckpointConflictError, CheckpointError

log = logging.getLogger("azstoragetorch")


def list_checkpoints(
    base_url: str, *, credential: Credential = None, transfer: TransferConfig | None = None
) -> list[str]:
    """Return the URLs of the complete checkpoints in the folders below *base_url*, oldest first.

    The order is that of the numbers in the names of the folders: ``step-900`` is older than ``step-1000``, and the
    number after ``step`` takes precedence over others. Names without a number, such as ``best``, come first. A
    checkpoint is complete if it has ``.metadata``. Checkpoints that ranks saved alone (``use_collectives=False``)
    cannot be distinguished from incomplete ones and are left out. The URLs have no SAS: to use the SAS of
    *base_url* with them, pass it as ``credential=``.

    Raises:
        AzureError: the service refused the request, or could not be reached.
    """
    base = Folder(base_url, credential, transfer)
    return [base.child(name).url for name in _complete(base)]


def latest_checkpoint(
    base_url: str, *, credential: Credential = None, transfer: TransferConfig | None = None
) -> str | None:
    """Return the URL of the newest checkpoint, the last of :func:`list_checkpoints`, or None."""
    base = Folder(base_url, credential, transfer)
    for name in reversed(names_in(base)):
        if base.child(name).is_complete():
            return base.child(name).url
    return None


def keep_last(
    base_url: str,
    count: int,
    *,
    dry_run: bool = False,
    credential: Credential = None,
    transfer: TransferConfig | None = None,
) -> list[str]:
    """Delete all complete checkpoints in the folders below *base_url* except the last *count*; return the deleted URLs.

    The last checkpoints are those with the highest steps: the number after ``step`` in the name of the folder,
    otherwise the number after ``iter`` or ``epoch``, otherwise the only number or a date. Folders without a number, and
    folders named ``last``, ``latest``, ``best``, or ``final``, are neither counted nor deleted, and are logged.
    Incomplete checkpoints are kept, because they may be saves in progress; see :func:`clean`. A checkpoint that is
    replaced in the meantime is kept too.

    Args:
        base_url: URL of the folder that contains the folders of the checkpoints.
        count: How many to keep, at least 1.
        dry_run: Delete nothing, and return what would be deleted.
        credential: Same as for :class:`~azstoragetorch.io.BlobIO`.
        transfer: Transfer settings; see :class:`azstoragetorch.TransferConfig`.

    Raises:
        ValueError: *count* is less than 1.
        CheckpointError: the names do not determine which checkpoints are the last; nothing was deleted.
        AzureError: the service refused the request, or could not be reached.
    """
    if count < 1:
        raise ValueError(f"count must be at least 1, not {count}: delete_checkpoint removes a checkpoint for good")
    base = Folder(base_url, credential, transfer)
    try:
        selection = all_but_last(_complete(base), count)
    except ValueError as error:
        raise CheckpointError(
            f"{base.url}: {error}. Nothing was deleted; rename the folders, or choose with delete_checkpoint",
            checkpoint=base.url,
        ) from None
    for name, reason in selection.skipped:
        log.info("%s is left alone: %s", base.child(name).url, reason)
    deleted = []
    for folder in map(base.child, selection.doomed):
        try:
            if not dry_run:
                delete_in(folder)
        except CheckpointConflictError as error:
            log.warning("%s is left alone: %s", folder.url, error)
            continue
        deleted.append(folder.url)
    return deleted


def names_in(base: Folder) -> list[str]:
    """The names of the folders in *base*, oldest first. The service may repeat one on the next page."""
    found = (
        prefix.removeprefix(base.prefix).rstrip("/") for page in base.listing(delimiter="/") for prefix in page.prefixes
    )
    return in_order([name for name in found if name])


def _complete(base: Folder) -> list[str]:
    names = names_in(base)
    is_complete = base.each(lambda name: base.child(name).is_complete(), names)
    return [name for name, complete in zip(names, is_complete, strict=True) if complete]
