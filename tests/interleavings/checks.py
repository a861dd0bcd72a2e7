"""What must hold after every request, and when all actors have ended."""

from __future__ import annotations

import functools
from dataclasses import dataclass

from azure.core.exceptions import AzureError

from azstoragetorch.checkpoint._fence import is_tombstone
from azstoragetorch.checkpoint._format import load_metadata
from azstoragetorch.exceptions import AZStorageTorchError, CheckpointConflictError

from .actors import Kind
from .explorer import Killed, Run


@functools.lru_cache(maxsize=100_000)
def _needs(content: bytes) -> tuple[str | None, tuple[tuple[str, int, str], ...]]:
    """The id of the save whose metadata *content* is, and its data blobs: names, least sizes, ETags."""
    metadata = load_metadata(content)
    needed: dict[str, tuple[int, str]] = {}
    for info in metadata.storage_data.values():
        size = max(needed.get(info.relative_path, (0, ""))[0], info.offset + info.length)
        needed[info.relative_path] = size, info.etag
    save_id = metadata.storage_meta.save_id if metadata.storage_meta is not None else None
    return save_id, tuple((path, size, etag) for path, (size, etag) in sorted(needed.items()))


@dataclass(frozen=True)
class Rules:
    """The checks of one combination of actors in one folder."""

    kinds: tuple[Kind, ...]
    folder: str
    had_one: bool  # at the beginning

    @property
    def _prefix(self) -> str:
        return f"run/{self.folder}/"

    @property
    def _is_exposed(self) -> bool:
        """A first save while its folder is swept: see the last point of the argument in `_commit`."""
        return not self.had_one and any(kind.sweeps for kind in self.kinds) and any(kind.saves for kind in self.kinds)

    def _current(self, run: Run) -> dict[str, bytes]:
        """The metadata that is there, by name."""
        found = {name: run.memory.blobs[name].data for name in run.memory.blobs if name.endswith(".metadata")}
        return {name: data for name, data in found.items() if not is_tombstone(data)}

    def after_step(self, run: Run) -> list[str]:
        """A checkpoint that is there loads whole, and is there as long as nobody deletes it on purpose."""
        if self._is_exposed:
            return []
        return self._broken(run)

    def _broken(self, run: Run) -> list[str]:
        wrong = []
        current = self._current(run)
        for name, content in current.items():
            for path, size, etag in _needs(content)[1]:
                stored = run.memory.blobs.get(name.rpartition("/")[0] + "/" + path)
                if stored is None or len(stored.data) < size or stored.etag != etag:
                    wrong.append(f"{name} does not load: {path} is {'missing' if stored is None else 'another'}")
        is_kept = self.had_one and not any(kind.deletes for kind in self.kinds)
        if is_kept and f"{self._prefix}.metadata" not in current:
            wrong.append("there is no checkpoint any more")
        return wrong

    def at_end(self, run: Run) -> list[str]:
        """No success is false, errors are clear, and who is not in the way of others succeeds."""
        died = any(actor.is_killed for actor in run.actors)
        wrong = [] if self._is_exposed and died else self._broken(run)
        committed = {
            _needs(content)[0]: number
            for number, (name, content) in enumerate(run.memory.history)
            if content is not None and name.startswith(self._prefix) and not is_tombstone(content)
        }
        current = {_needs(content)[0] for content in self._current(run).values()}
        for actor, kind in zip(run.actors, self.kinds, strict=True):
            if actor.is_killed:
                continue
            error = actor.error
            if error is not None and not isinstance(error, (AZStorageTorchError, AzureError)):
                wrong.append(f"{kind.name} {actor.number} failed with {error!r}")
            if error is None and kind.saves:
                if actor.result not in committed:
                    wrong.append(f"{kind.name} {actor.number} succeeded and never was the checkpoint")
                elif actor.result not in current and not self._was_superseded(run, committed[actor.result]):
                    wrong.append(f"{kind.name} {actor.number} succeeded and its checkpoint is lost")
            if isinstance(error, CheckpointConflictError) and error.save_id in current:
                wrong.append(f"{kind.name} {actor.number} says that it has no effect and is the checkpoint")
        return wrong + self._unfair(run)

    def _was_superseded(self, run: Run, number: int) -> bool:
        """Whether a later save or deletion took the place of the metadata that was written as the change *number*."""
        name = run.memory.history[number][0]
        return any(later == name for later, _ in run.memory.history[number + 1 :])

    def _unfair(self, run: Run) -> list[str]:
        if run.fault is not None and run.has_struck:
            return []
        results = list(zip(run.actors, self.kinds, strict=True))
        saves = [actor for actor, kind in results if kind.saves]
        wrong = []
        if saves and not any(kind.sweeps for kind in self.kinds) and all(actor.error is not None for actor in saves):
            wrong.append(f"no save succeeded: {saves[0].error!r}")
        for actor, kind in results:
            alone = not any(other.deletes or other.saves for other in self.kinds if other is not kind)
            if kind.loads and self.had_one and alone and actor.error is not None:
                wrong.append(f"the load failed: {actor.error!r}")
            is_fine = actor.error is None or isinstance(actor.error, (Killed, CheckpointConflictError))
            if not kind.saves and not kind.loads and not is_fine:
                wrong.append(f"{kind.name} failed: {actor.error!r}")
        return wrong
