"""The conditions that must hold after every request, and after all actors have ended."""

from __future__ import annotations

import functools
from dataclasses import dataclass

from azure.core.exceptions import AzureError

from azstoragetorch._tensors.hashing import algorithm_of, digest_of
from azstoragetorch.checkpoint._fence import is_tombstone
from azstoragetorch.checkpoint._format import digests_of, load_digests, load_metadata
from azstoragetorch.exceptions import AZStorageTorchError, CheckpointConflictError

from .actors import Kind
from .explorer import State


@functools.lru_cache(maxsize=100_000)
def _needs(content: bytes) -> tuple[str | None, tuple[tuple[str, int, str], ...]]:
    """The id of the save with the metadata *content*, and its data blobs: names, minimal sizes, ETags."""
    metadata = load_metadata(content)
    needed: dict[str, tuple[int, str]] = {}
    for info in metadata.storage_data.values():
        size = max(needed.get(info.relative_path, (0, ""))[0], info.offset + info.length)
        needed[info.relative_path] = size, info.etag
    save_id = metadata.storage_meta.save_id if metadata.storage_meta is not None else None
    return save_id, tuple((path, size, etag) for path, (size, etag) in sorted(needed.items()))


@functools.lru_cache(maxsize=100_000)
def _digests(content: bytes) -> str | None:
    return digests_of(load_metadata(content))


@dataclass(frozen=True)
class Rules:
    """The checks of one combination of actors in one folder."""

    kinds: tuple[Kind, ...]
    folder: str
    had_one: bool  # the initial state

    @property
    def _prefix(self) -> str:
        return f"run/{self.folder}/"

    def _is_exposed(self, state: State, name: str, content: bytes) -> bool:
        """Whether *content* was committed where no checkpoint was, while the folder is cleaned.

        See the last point of the argument in `_commit`.
        """
        written = [other for where, other in state.memory.history if where == name]
        first = written.index(content)
        if not any(kind.sweeps for kind in self.kinds) or (first == 0 and self.had_one):
            return False
        return first == 0 or written[first - 1] is None or is_tombstone(written[first - 1] or b"")

    def _current(self, state: State) -> dict[str, bytes]:
        """The existing metadata, by name."""
        found = {name: state.memory.blobs[name].data for name in state.memory.blobs if name.endswith(".metadata")}
        return {name: data for name, data in found.items() if not is_tombstone(data)}

    def after_step(self, state: State) -> list[str]:
        """An existing checkpoint can be loaded completely, and exists until it is deleted on purpose."""
        return self._broken(state, is_strict=False)

    def _broken(self, state: State, *, is_strict: bool) -> list[str]:
        wrong = []
        current = self._current(state)
        for name, content in current.items():
            if not is_strict and self._is_exposed(state, name, content):
                continue
            wrong += self._undigested(state, name, content)
            for path, size, etag in _needs(content)[1]:
                stored = state.memory.blobs.get(name.rpartition("/")[0] + "/" + path)
                if stored is None or len(stored.data) < size or stored.etag != etag:
                    wrong.append(f"{name} does not load: {path} is {'missing' if stored is None else 'another'}")
        is_kept = self.had_one and not any(kind.deletes for kind in self.kinds)
        if is_kept and f"{self._prefix}.metadata" not in current:
            wrong.append("there is no checkpoint any more")
        return wrong

    def _undigested(self, state: State, name: str, content: bytes) -> list[str]:
        """What a checkpoint with digests says that is not so: its data, whoever has composed it, is what was saved."""
        digests = _digests(content)
        if digests is None:
            return []
        folder = name.rpartition("/")[0]
        side = state.memory.blobs.get(f"{folder}/{digests}")
        if side is None:
            return [f"{name}: its digests are missing"]
        return [
            f"{name}: {path} from {start} to {stop} is not what was saved"
            for (path, start, stop), digest in load_digests(side.data).by_place.items()
            if (stored := state.memory.blobs.get(f"{folder}/{path}")) is not None
            and digest_of([memoryview(stored.data)[start:stop]], algorithm_of(digest)) != digest
        ]

    def at_end(self, state: State) -> list[str]:
        """No reported success is false, errors are clear, and actors without conflicts succeed."""
        died = any(outcome.is_killed for outcome in state.outcomes.values())
        wrong = self._broken(state, is_strict=not died)
        committed = {
            _needs(content)[0]: number
            for number, (name, content) in enumerate(state.memory.history)
            if content is not None and name.startswith(self._prefix) and not is_tombstone(content)
        }
        current = {_needs(content)[0] for content in self._current(state).values()}
        for number, kind in enumerate(self.kinds):
            outcome = state.outcomes[number]
            if outcome.is_killed:
                continue
            error = outcome.error
            if error is not None and not isinstance(error, (AZStorageTorchError, AzureError)):
                wrong.append(f"{kind.name} {number} failed with {error!r}")
            if error is None and kind.saves:
                if outcome.result not in committed:
                    wrong.append(f"{kind.name} {number} succeeded and never was the checkpoint")
                elif outcome.result not in current and not _was_superseded(state, committed[outcome.result]):
                    wrong.append(f"{kind.name} {number} succeeded and its checkpoint is lost")
                elif self._is_hidden(state, committed[outcome.result]):
                    wrong.append(f"{kind.name} {number} succeeded and another checkpoint is loaded")
            if error is not None and "has no effect" in str(error) and number in map(_saver, current):
                wrong.append(f"{kind.name} {number} says that it has no effect and is the checkpoint")
            if error is not None and "is committed" in str(error) and number not in map(_saver, committed):
                wrong.append(f"{kind.name} {number} says that it is committed and never was the checkpoint")
        return wrong + self._unfair(state)

    def _is_hidden(self, state: State, number: int) -> bool:
        """Whether readers prefer a checkpoint of all ranks that existed before the change *number*."""
        of_all = f"{self._prefix}.metadata"
        before = [content for name, content in state.memory.history[:number] if name == of_all]
        is_other = state.memory.history[number][0] != of_all
        return is_other and bool(before) and before[-1] == self._current(state).get(of_all, b"")

    def _unfair(self, state: State) -> list[str]:
        if state.has_struck:
            return []
        results = [(state.outcomes[number], kind) for number, kind in enumerate(self.kinds)]
        saves = [outcome for outcome, kind in results if kind.saves]
        wrong = []
        if saves and not any(kind.sweeps for kind in self.kinds) and all(save.error is not None for save in saves):
            wrong.append(f"no save succeeded: {saves[0].error!r}")
        for outcome, kind in results:
            alone = not any(other.deletes or other.saves for other in self.kinds if other is not kind)
            if kind.loads and self.had_one and alone and outcome.error is not None:
                wrong.append(f"the load failed: {outcome.error!r}")
            is_fine = outcome.error is None or isinstance(outcome.error, CheckpointConflictError)
            if not kind.saves and not kind.loads and not is_fine:
                wrong.append(f"{kind.name} failed: {outcome.error!r}")
        return wrong


def _saver(save_id: str | None) -> int | None:
    """The number of the actor with the save *save_id*; see `actors.predictable`."""
    return int((save_id or "").rpartition("-")[2] or "0", 16) // 1000 - 1


def _was_superseded(state: State, number: int) -> bool:
    """Whether a later save or deletion replaced the metadata that was written as the change *number*."""
    name = state.memory.history[number][0]
    return any(later == name for later, _ in state.memory.history[number + 1 :])
