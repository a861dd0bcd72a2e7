"""Commit a save, and fence off saves whose data is to be deleted: by conditional writes of one metadata blob.

The service has atomic writes of single blobs, with conditions on their ETags, and nothing else. A checkpoint is many
blobs: data, and one metadata blob that makes the data count. The name of a data blob says when its save began (by the
clock of the rank that wrote it, which nothing below depends on) and which metadata blob can refer to it. No two saves
share a name, and ETags never return.

A save
  1. reads the metadata blob: what it `Seen`, perhaps nothing;
  2. uploads its data, on all ranks;
  3. checks that all its data is there;
  4. writes the metadata blob, on the condition that it still is what was seen;
  5. if nothing was seen, checks that one of its data blobs is still there, or else takes its metadata back;
  6. deletes the data that what was seen referred to.

A save of one rank alone writes the metadata blob of that rank, which readers use only without a checkpoint of all
ranks. After (4) it looks for one, and if there is one it deletes its metadata and fails: so it does not succeed with a
checkpoint that is not loaded. A save of all ranks that commits later replaces it.

Cleaning deletes data that no metadata refers to. It
  a. lists the folder; what began after a cutoff is left alone;
  b. reads the metadata blob, and leaves what that refers to alone;
  c. *fences*: writes the metadata blob, on the condition that it is what was read, with the same content and the
     cutoff as a property. Without a checkpoint it writes a tombstone, which readers take for nothing;
  d. deletes the data;
  e. after a tombstone: lists the folder again, and deletes the tombstone (on the condition that it is that one) if no
     data is left there that could be committed to it.

Deleting a checkpoint reads the metadata blob, lists the folder, writes a tombstone on the condition that the blob is
what was read, deletes the data that could be committed in its place, whatever its age, and ends as in (e).

Why data that counts is never deleted:
* Data that was referred to is deleted in 6 by the one save that replaced that metadata, and by the deletion that
  removed it. Either is one conditional write, and no later metadata refers to that data: names are not used twice.
* Data is deleted in d only if its save cannot commit any more. It was listed in (a), so its save had read the metadata
  blob (1) before the fence (c), and its write (4) fails after it. A write before the fence changes the ETag: the fence
  fails, and cleaning reads again (b). A save whose write fails because of a fence alone repeats it, if all its data is
  younger than the cutoff; such data is not deleted in (d). Cutoffs only grow while the content stays the same.
* None of that refers to time: a request may arrive late, and clocks may differ. A wrong clock makes a save fail or
  leaves garbage; it loses nothing.
* A tombstone that was deleted fences no more, for a save that had seen nothing before it. But it is deleted only when
  none of that save's data is left (e). If the check (3) came before the deletions (d), the write (4) after (e) makes a
  checkpoint without data; then all of it is gone, and looking for any one blob (5) shows it. The folder had
  no other checkpoint that could have been lost. If the save is killed between 4 and 5, its metadata stays: the one case
  that remains, for a folder without a checkpoint that is swept in the last instant of its first save.
* A write whose answer is lost may be repeated after it was carried out and undone: if nothing was seen, the checkpoint
  was deleted meanwhile and nothing is there again. That is why a deletion, too, ends with a tombstone.

An answer may be lost. No write is then sent again blindly: the blob is looked at (`BlobClient.replace`), and a content
that is there is known by its bytes, since the id of the save is in them.
"""

from __future__ import annotations

import logging
import math

from azure.core.exceptions import ResourceModifiedError

from azstoragetorch._blob.client import BlobProperties
from azstoragetorch.checkpoint._fence import (
    TOMBSTONE_SIZE,
    cleaned_headers,
    cleaned_until,
    new_tombstone,
)
from azstoragetorch.checkpoint._folder import Folder, Seen
from azstoragetorch.checkpoint._format import metadata_name, metadata_of, saved_at
from azstoragetorch.exceptions import CheckpointConflictError, CheckpointError

log = logging.getLogger("azstoragetorch")

_MOST_FENCES = 8  # that are put up while a save commits, or while another one is put up; more is not chance


def commit(
    folder: Folder, rank: int | None, content: bytes, paths: frozenset[str], *, seen: Seen, save_id: str
) -> None:
    """Make *content*, which refers to the data blobs *paths*, the metadata in the place of what was *seen*.

    Raises:
        CheckpointConflictError: something else is there by now, or the checkpoint of all ranks, which readers prefer to
            that of one; it is unchanged.
        CheckpointError: the data was deleted, and the metadata was taken back.
        FatalBlobIOWriteError: the service does not say whether it was done.
        AzureError: the service refused the request, or could not be reached.
    """
    blob = folder.blob(metadata_name(rank))
    begun = min((at for path in paths if (at := saved_at(path)) is not None), default=math.inf)
    etag = seen.etag
    found: BlobProperties | None = None
    for _ in range(_MOST_FENCES):
        is_ours, found = blob.replace(content, etag=etag)
        if is_ours:
            folder.remember(content, paths)
            if not seen.exists and paths:
                _check_kept(folder, rank, content, min(paths))
            if rank is not None:
                _check_preferred(folder, rank, content, save_id)
            return
        if not _is_only_fenced(folder, rank, found, seen, begun):
            break
        etag = found.version.etag if found is not None else None
    raise _conflict(folder, rank, found, seen, save_id)


def _is_only_fenced(folder: Folder, rank: int | None, found: BlobProperties | None, seen: Seen, begun: float) -> bool:
    """Whether what was *found* differs from what was *seen* by fences alone, of which none is against our data."""
    if found is None:
        return not seen.exists
    cutoff = cleaned_until(found.headers)
    if cutoff is None or begun <= cutoff:
        return False
    if seen.content is None:
        return found.version.size == TOMBSTONE_SIZE
    return folder.blob(metadata_name(rank)).has_content(found, seen.content)


def _check_kept(folder: Folder, rank: int | None, content: bytes, path: str) -> None:
    """Take the metadata *content* back if the data blob *path*, which it refers to, is gone."""
    if folder.blob(path).version() is None and _take_back(folder, rank, content):
        raise CheckpointError(
            f"{folder.url}: {path} was deleted while the save was in progress, so the save has no effect. Clean with a "
            "min_age that is longer than a save takes",
            checkpoint=folder.url,
            rank=rank,
        )


def _check_preferred(folder: Folder, rank: int, content: bytes, save_id: str) -> None:
    """Take the metadata *content* of *rank* back if there is a checkpoint of all ranks."""
    if folder.is_complete():
        _take_back(folder, rank, content)
        other = folder.save_id()
        raise CheckpointConflictError(
            f"{folder.url}: while this save ({save_id}) of rank {rank} alone was in progress, a save of all ranks "
            f"({other or 'of an unknown id'}) was committed, which readers prefer. This save has no effect, and the "
            "other checkpoint is unchanged. Use separate folders for saves with and without collectives",
            checkpoint=folder.url,
            rank=rank,
            save_id=save_id,
            other_save_id=other,
        )


def _take_back(folder: Folder, rank: int | None, content: bytes) -> bool:
    """Delete the metadata *content*; False if it was replaced or deleted since."""
    for _ in range(_MOST_FENCES):
        now = folder.see(rank)
        if now.content != content:
            return False
        try:
            folder.blob(metadata_name(rank)).delete(etag=now.etag)
            break
        except ResourceModifiedError:
            continue
    return True


def _conflict(
    folder: Folder, rank: int | None, found: BlobProperties | None, seen: Seen, save_id: str
) -> CheckpointConflictError:
    other = None
    if found is None:
        what = "the checkpoint that this save was to replace was deleted"
    elif found.version.size == TOMBSTONE_SIZE:
        what = "data of this save was deleted by clean or delete_checkpoint"
    elif seen.content is not None and folder.blob(metadata_name(rank)).has_content(found, seen.content):
        other = folder.save_id(rank)
        what = f"data of this save was deleted by clean, which kept the checkpoint of save {other},"
    else:
        other = folder.save_id(rank)
        what = f"another save ({other or 'of an unknown id'}) was committed"
    return CheckpointConflictError(
        f"{folder.url}: {what} while this save ({save_id}) was in progress. This save has no effect, and what is there "
        "is unchanged. Save again; jobs that save at the same time need separate folders",
        checkpoint=folder.url,
        rank=rank,
        save_id=save_id,
        other_save_id=other,
    )


def fence(folder: Folder, rank: int | None, seen: Seen, cutoff: float, *, keeps: bool = True) -> str | None:
    """Make all saves fail that began up to *cutoff* and are in progress; the new ETag of the metadata blob.

    None if it is no longer what was *seen*. Without *keeps* the checkpoint, if there is one, is no more.
    """
    blob = folder.blob(metadata_name(rank))
    before = blob.find_properties()
    if (before.version.etag if before is not None else None) != seen.etag:
        return None
    earlier = cleaned_until(before.headers) if before is not None else None
    cutoff = max(math.floor(cutoff), earlier or 0)
    content = seen.content if keeps and seen.content is not None else new_tombstone()
    is_ours, found = blob.replace(content, etag=seen.etag, properties=cleaned_headers(cutoff))
    if not is_ours or found is None or cleaned_until(found.headers) != cutoff:
        return None
    return found.version.etag


def lift(folder: Folder, rank: int | None, etag: str) -> None:
    """Delete the tombstone *etag*, unless there is data that a save in progress could still commit in its place."""
    name = metadata_name(rank)
    if any(saved_at(found) is not None and metadata_of(found) == name for found in folder.names(uncommitted=True)):
        log.info("%s: %s stays, since there is data of a save in progress", folder.url, name)
        return
    try:
        folder.blob(name).delete(etag=etag)
    except ResourceModifiedError:
        log.debug("%s: %s was replaced", folder.url, name)
