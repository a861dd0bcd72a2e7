"""Delete checkpoints, and data of interrupted saves. `_commit` explains why concurrent loads and saves are safe."""

from __future__ import annotations

import logging
import time

from azstoragetorch._blob.credentials import Credential
from azstoragetorch._engine.config import TransferConfig
from azstoragetorch.checkpoint._commit import fence, lift
from azstoragetorch.checkpoint._folder import Folder, Seen
from azstoragetorch.checkpoint._format import METADATA, is_rank_metadata, metadata_name, metadata_of, rank_of, saved_at
from azstoragetorch.exceptions import CheckpointConflictError, CheckpointError

log = logging.getLogger("azstoragetorch")

DEFAULT_MIN_AGE = 24 * 3600.0  # seconds; longer than a save takes
_TRIES = 8  # saves and cleaners that come in between; more is not chance


def delete_checkpoint(url: str, *, credential: Credential = None, transfer: TransferConfig | None = None) -> int:
    """Delete the checkpoint in the folder *url*, complete or not; return the number of deleted blobs.

    ``.metadata`` is deleted first, so that an interrupted deletion leaves no checkpoint that looks complete. Blobs that
    belong to no checkpoint, and subfolders, are kept. A save to the folder that is in progress fails. The credential
    must allow reading, writing, listing, and deleting.

    Raises:
        CheckpointConflictError: another checkpoint was saved here in the meantime; it is unchanged.
        AzureError: the service refused the request, or could not be reached.
    """
    return delete_in(Folder(url, credential, transfer))


def delete_in(folder: Folder) -> int:
    """Delete the checkpoint in *folder*; see `delete_checkpoint`."""
    count, present = delete_of_rank(folder, None)
    others = {metadata_of(name) for name in present if saved_at(name) is not None}
    others |= {name for name in present if is_rank_metadata(name)}
    return count + sum(delete_of_rank(folder, rank_of(name))[0] for name in sorted(others - {METADATA}))


def delete_of_rank(folder: Folder, rank: int | None) -> tuple[int, set[str]]:
    """Delete what the metadata of *rank* refers to or could ever refer to, and the metadata before that.

    Returns how many blobs that were, and the names of all blobs that were in the folder.
    """
    name = metadata_name(rank)
    first: Seen | None = None
    for _ in range(_TRIES):
        seen = folder.see(rank)
        first = first or seen
        if seen.exists and seen.content != first.content:
            break
        present = folder.names(uncommitted=True)
        referred = _referred(folder, rank, seen) & present
        others = {n for n in present if saved_at(n) is not None and metadata_of(n) == name} - referred
        etag = seen.etag
        if seen.exists or others:
            cutoff = max([time.time(), *(saved_at(n) or 0.0 for n in referred | others)])
            etag = fence(folder, rank, seen, cutoff, keeps=False)
            if etag is None:
                continue
        folder.each(lambda path: remove(folder, path), sorted(referred | others))
        if etag is not None:
            lift(folder, rank, etag)
        return len(referred | others) + seen.exists, present
    raise CheckpointConflictError(
        f"{folder.url}: another checkpoint was saved here while this one was to be deleted; it is unchanged",
        checkpoint=folder.url,
        rank=rank,
        other_save_id=folder.save_id(rank),
    )


def clean(
    url: str,
    *,
    min_age: float = DEFAULT_MIN_AGE,
    dry_run: bool = False,
    credential: Credential = None,
    transfer: TransferConfig | None = None,
) -> list[str]:
    """Delete data of interrupted saves in the folder *url* and in all folders below it; return the URLs of the blobs.

    These are data blobs of :class:`BlobStorageWriter` that no metadata in their folder refers to, and their staged
    blocks. Other blobs are kept. A checkpoint is never damaged, and no save that succeeds loses its data: a save in
    progress that started more than *min_age* ago fails, and the previous checkpoint stays.

    Args:
        url: URL of a folder.
        min_age: Seconds since the save began, by the clock of the process that saved. Data of younger saves is kept.
        dry_run: Delete nothing, and return what would be deleted.
        credential: Same as for :class:`~azstoragetorch.io.BlobIO`. It must allow reading, writing, listing, and
            deleting.
        transfer: Transfer settings; see :class:`azstoragetorch.TransferConfig`.

    Raises:
        CheckpointError: a ``.metadata`` cannot be read, so the blobs that it refers to are unknown; nothing was
            deleted.
        AzureError: the service refused the request, or could not be reached.
    """
    base = Folder(url, credential, transfer)
    cutoff = time.time() - min_age
    doomed = _leftovers(base, cutoff)
    if not dry_run:
        doomed = {place: _sweep(base, place, names, cutoff) for place, names in doomed.items()}
    return sorted(str(_folder(base, path).blob(name).url) for (path, _), names in doomed.items() for name in names)


def _folder(base: Folder, path: str) -> Folder:
    return base.child(path) if path else base


def _leftovers(base: Folder, cutoff: float) -> dict[tuple[str, str], set[str]]:
    """Data blobs up to *cutoff* that no metadata refers to, by folder and by the metadata that could refer to them."""
    folders: dict[str, set[str]] = {}
    for page in base.listing(uncommitted=True):
        for full in page.names:
            path, _, name = full.removeprefix(base.prefix).rpartition("/")
            folders.setdefault(path, set()).add(name)
    found: dict[tuple[str, str], set[str]] = {}
    for path, names in sorted(folders.items()):
        ours = {name for name in names if (begun := saved_at(name)) is not None and begun <= cutoff}
        if not ours:
            continue
        folder = _folder(base, path)
        for metadata in sorted(name for name in names if name == METADATA or is_rank_metadata(name)):
            rank = rank_of(metadata)
            content = folder.see(rank).content
            if content is not None:
                ours -= folder.paths_in(content, rank)
        for name in ours:
            found.setdefault((path, metadata_of(name)), set()).add(name)
    return found


def _sweep(base: Folder, place: tuple[str, str], names: set[str], cutoff: float) -> set[str]:
    """Delete those of *names* that cannot become part of a checkpoint any more; returns them."""
    folder, rank = _folder(base, place[0]), rank_of(place[1])
    for _ in range(_TRIES):
        seen = folder.see(rank)
        dead = names - (folder.paths_in(seen.content, rank) if seen.content is not None else frozenset())
        if not dead:
            return dead
        etag = fence(folder, rank, seen, cutoff)
        if etag is None:
            continue
        folder.each(lambda name: remove(folder, name), sorted(dead))
        if not seen.exists:
            lift(folder, rank, etag)
        return dead
    log.warning("%s: saves keep coming in between, so its leftovers stay; clean again later", folder.url)
    return set()


def _referred(folder: Folder, rank: int | None, seen: Seen) -> frozenset[str]:
    """The data blobs that the metadata refers to; none if it cannot be read."""
    try:
        return folder.paths_in(seen.content, rank) if seen.content is not None else frozenset()
    except CheckpointError:
        return frozenset()


def remove(folder: Folder, name: str) -> None:
    """Delete the blob *name*, or the staged blocks of one that was not committed."""
    blob = folder.blob(name)
    if not blob.delete():
        blob.put(b"")  # staged blocks go when there is a blob
        blob.delete()
