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
  5. if nothing was seen, checks that one of its data blobs is still there, with the same ETag, or else takes its
     metadata back;
  6. deletes the data that what was seen referred to.

A save of one rank alone writes the metadata blob of that rank, which readers use only without a checkpoint of all
ranks. After (4) it looks for one, and if there is one it takes its metadata back and fails: so it does not succeed with
a checkpoint that is not loaded. A save of all ranks that commits later replaces it.

To take metadata back is not to delete it: it may carry the fence of a cleaner, or stand in the place of a tombstone
that was one. A save lists the folder, writes a tombstone on the condition that its metadata is still there, with a
cutoff that covers all data in the listing that could be committed, deletes the rest of its data, and ends as in (e).

Cleaning deletes data that no metadata refers to. It
  a. lists the folder, and leaves alone what began after a cutoff;
  b. reads the metadata blob, and leaves alone what it refers to;
  c. *fences*: writes the metadata blob, on the condition that it is what was read, with the same content and the
     cutoff as a property. Without a checkpoint it writes a tombstone, which readers ignore;
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
* None of this depends on time: a request may arrive late, and clocks may differ. A wrong clock makes a save fail or
  leaves garbage; it loses nothing.
* A tombstone that was deleted no longer fences off a save that had seen nothing before it. But it is deleted only when
  none of that save's data is left (e). If the check (3) came before the deletions (d), the write (4) after (e) makes a
  checkpoint without data; then all of it is gone, and looking for any one blob (5) shows it. The folder had
  no other checkpoint that could have been lost. If the save is killed between 4 and 5, its metadata stays: the one case
  that remains, for a folder without a checkpoint that is swept in the last instant of its first save.
* Data that was fenced off stays so when metadata is taken back. If none of it is in the listing, what was to be deleted
  of it is deleted: its save finds that out in (3), or in (5) if all of it was there before. If some of it is, the new
  cutoff covers it, and the tombstone stays as long as it is there.
* A write whose response is lost may be repeated after it was carried out and undone: if nothing was seen, the
  checkpoint was deleted meanwhile and nothing is there again. That is why a deletion, too, ends with a tombstone.

A response may be lost. No write is then sent again blindly: the blob is read (`BlobClient.replace`), and content that
is there is recognized by its bytes, which contain the id of the save.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from azure.core.exceptions import AzureError, ResourceModifiedError

from azstoragetorch._blob.client import BlobProperties
from azstoragetorch.checkpoint._fence import (
    TOMBSTONE_SIZE,
    cleaned_headers,
    cleaned_until,
    new_tombstone,
)
from azstoragetorch.checkpoint._folder import Folder, Seen, describe, picklable
from azstoragetorch.checkpoint._format import metadata_name, metadata_of, saved_at
from azstoragetorch.exceptions import AZStorageTorchError, CheckpointConflictError, CheckpointError

log = logging.getLogger("azstoragetorch")

_SKEW = 24 * 3600.0  # seconds by which no clock is fast
_MOST_FENCES = 8  # that are put up while a save commits, or while another one is put up; more is not chance


def commit(
    folder: Folder,
    rank: int | None,
    content: bytes,
    paths: frozenset[str],
    *,
    sample: tuple[str, str] | None,
    seen: Seen,
    save_id: str,
) -> None:
    """Make *content*, which refers to the blobs *paths*, the metadata in the place of what was *seen*.

    *sample* is one of the data blobs, if there are any, with its ETag.

    Raises:
        CheckpointConflictError: something else is there by now, or the checkpoint of all ranks, which readers prefer to
            that of one; it is unchanged.
        CheckpointError: the data was deleted, and the metadata was taken back; or the save is committed, but a look
            afterwards failed. The message says which.
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
            mine = _Committed(folder, rank, content, paths, save_id)
            if not seen.exists and sample is not None:
                mine.check_kept(*sample)
            if rank is not None:
                mine.check_preferred()
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


@dataclass(frozen=True)
class _Committed:
    """A save whose metadata *content* was written."""

    folder: Folder
    rank: int | None
    content: bytes
    paths: frozenset[str]
    save_id: str

    def check_kept(self, path: str, etag: str) -> None:
        """Take the save back if its data is gone; any one blob *path*, which had *etag*, shows it.

        A cleaner may put an empty blob in its place for a moment: see `_cleaning.remove`.
        """
        folder = self.folder
        with self._explaining(
            f"whether its data is still there could not be checked after that (HEAD {path}); load the checkpoint to "
            "find out, or save again"
        ):
            found = folder.blob(path).version()
        if found is not None and found.etag == etag:
            return
        with self._explaining(
            f"{path} had been deleted while it was in progress, so it cannot be loaded, and its metadata could not be "
            "taken back; delete the checkpoint, save again, and clean with a min_age that is longer than a save takes"
        ):
            is_gone = self._take_back()
        if is_gone:
            raise self._error(
                f"{path} was deleted while the save was in progress, so the save has no effect. Clean with a min_age "
                "that is longer than a save takes"
            )

    def check_preferred(self) -> None:
        """Take the save of one rank back if there is a checkpoint of all ranks."""
        folder, rank = self.folder, self.rank
        with self._explaining(
            "whether there is a checkpoint of all ranks, which readers prefer, could not be checked after that (HEAD "
            f"{metadata_name()}); save again, and use separate folders for saves with and without collectives"
        ):
            if not folder.is_complete():
                return
        with self._explaining(
            "a save of all ranks was committed while it was in progress, which readers load instead, and its metadata "
            f"could not be taken back; delete {metadata_name(rank)}, and use separate folders for saves with and "
            "without collectives"
        ):
            self._take_back()
        other = folder.save_id()
        raise CheckpointConflictError(
            f"{folder.url}: while this save ({self.save_id}) of rank {rank} alone was in progress, a save of all ranks "
            f"({other or 'of an unknown id'}) was committed, which readers prefer. This save has no effect, and the "
            "other checkpoint is unchanged. Use separate folders for saves with and without collectives",
            checkpoint=folder.url,
            rank=rank,
            save_id=self.save_id,
            other_save_id=other,
        )

    def _take_back(self) -> bool:
        """Put a tombstone in the place of the metadata and end the save; False if another save has replaced it."""
        folder, rank = self.folder, self.rank
        name = metadata_name(rank)
        for _ in range(_MOST_FENCES):
            now = folder.see(rank)
            if now.content != self.content:
                return not now.exists
            etag = fence(folder, rank, now, self._latest_begin(), keeps=False)
            if etag is not None:
                break
        else:
            raise CheckpointError(f"other processes have changed {name} {_MOST_FENCES} times")
        try:
            folder.each(lambda path: folder.blob(path).delete(), sorted(self.paths))
            lift(folder, rank, etag)
        except (AzureError, AZStorageTorchError) as error:
            log.warning("%s: data of a save without effect was not deleted, clean will: %s", folder.url, error)
        return True

    def _latest_begin(self) -> float:
        """When the latest save began that has data in the folder; later than any if the folder cannot be listed."""
        try:
            names = _committable(self.folder, self.rank)
        except AzureError as error:
            log.debug("%s: the folder could not be listed: %s", self.folder.url, error)
            return time.time() + _SKEW
        return max((saved_at(name) or 0.0 for name in names), default=0.0)

    @contextmanager
    def _explaining(self, what: str) -> Iterator[None]:
        """Say of an error of the service that the save is committed, and *what* is wrong."""
        try:
            yield
        except (AzureError, AZStorageTorchError) as error:
            state = f"this save ({self.save_id}) is committed, but {what}: {describe(error)}"
            raise self._error(state) from picklable(error)

    def _error(self, what: str) -> CheckpointError:
        return CheckpointError(f"{self.folder.url}: {what}", checkpoint=self.folder.url, rank=self.rank)


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

    None if it is no longer what was *seen*. Without *keeps*, the checkpoint, if there is one, ends.
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
    if _committable(folder, rank):
        log.info("%s: %s stays, since there is data of a save in progress", folder.url, name)
        return
    try:
        folder.blob(name).delete(etag=etag)
    except ResourceModifiedError:
        log.debug("%s: %s was replaced", folder.url, name)


def _committable(folder: Folder, rank: int | None) -> list[str]:
    """The data blobs in *folder*, also uncommitted ones, that the metadata of *rank* could refer to."""
    name = metadata_name(rank)
    return [n for n in folder.names(uncommitted=True) if saved_at(n) is not None and metadata_of(n) == name]
