"""``azstoragetorch checkpoint export`` and ``import``: convert between a checkpoint and a file of `torch.save`."""

from __future__ import annotations

import os
import pickle
import shutil
import tempfile
import warnings
import zipfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from azure.core.exceptions import AzureError

from azstoragetorch._blob.url import BlobURL, parse_blob_url
from azstoragetorch._files.paths import atomic_write, has_unknown_length, is_stream_target, open_to_read
from azstoragetorch.cli._output import Bar
from azstoragetorch.cli._places import Standard
from azstoragetorch.cli._session import Session, Url, common, examples
from azstoragetorch.exceptions import AZStorageTorchError, CheckpointError
from azstoragetorch.io import BlobIO

if TYPE_CHECKING:
    from azstoragetorch.checkpoint import ProgressCallback

_RUN = "https://ACCOUNT.blob.core.windows.net/CONTAINER/run"

trust = click.option("--trust", is_flag=True, help="Also unpickle entries that are not tensors. This can run any code.")


@click.command(
    epilog=examples(
        f"checkpoint export {_RUN}/step-1000 model.pt\ncheckpoint export {_RUN}/step-1000 model.pt --key model"
    )
)
@click.argument("url", type=Url())
@click.argument("target")
@click.option("--key", "keys", multiple=True, help="Export only this entry or the entries below it. Can be repeated.")
@trust
@common
def export(session: Session, url: BlobURL, target: str, keys: tuple[str, ...], trust: bool) -> None:
    """Write the checkpoint in the folder URL to TARGET, as one file or blob for torch.load.

    The state dict must fit into memory. An existing TARGET is replaced only after everything is written. '-' is
    standard output. If TARGET is a fifo or device, the data is written to it.
    """
    import torch

    place = _place(target, "/dev/stdout")
    if isinstance(place, Standard) and session.output.is_json:
        raise click.UsageError("--json prints to standard output, which is also TARGET: omit --json or choose a file")
    if isinstance(place, Path):
        is_stream_target(place)  # fails before the checkpoint is read if a file cannot replace TARGET
    with session.output.progress("reading", None) as bar:
        state = _loaded(session, url, keys, trust, steps(bar))
    session.output.note(f"writing {place}")
    with session.output.progress("writing", bar.total) as bar, _open_target(session, place) as file:
        torch.save(state, _Watched(file, bar))
    session.output.record({"url": str(url), "target": str(place), "entries": len(state)})


@click.command(
    "import",
    epilog=examples(
        f"checkpoint import model.pt {_RUN}/step-0\n"
        f"checkpoint import https://ACCOUNT.blob.core.windows.net/CONTAINER/model.pt {_RUN}/step-0 --overwrite"
    ),
)
@click.argument("source")
@click.argument("url", type=Url())
@click.option("--overwrite", is_flag=True, help="Replace an existing checkpoint.")
@trust
@common
def import_(session: Session, source: str, url: BlobURL, overwrite: bool, trust: bool) -> None:
    """Write SOURCE, a file or blob of torch.save, as a checkpoint in the folder URL.

    A local file is mapped into memory. From other sources, the state dict must fit into memory. '-' is standard input.
    """
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.state_dict_saver import save

    from azstoragetorch.checkpoint import BlobStorageWriter

    place = _place(source, "/dev/stdin")
    with _as_checkpoint_errors(place):
        state = _read_source(session, place, trust)
    if not isinstance(state, dict):
        raise CheckpointError(
            f"{place} contains a {type(state).__name__}, but a checkpoint can only be made from a dict"
        )
    with session.output.progress("writing", None) as bar, warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is")  # saving in one process is intended
        writer = BlobStorageWriter(
            str(url), credential=session.access.credential(url), overwrite=overwrite, progress=steps(bar)
        )
        try:
            save(state, storage_writer=writer, no_dist=True)
        except CheckpointException as error:
            raise next(iter(_causes(error)), CheckpointError(str(error))) from None
    session.output.note(f"saved {len(state):,} entr{'y' if len(state) == 1 else 'ies'} to {url}")
    session.output.record({"source": str(place), "url": str(url), "entries": len(state)})


def _place(text: str, stream: str) -> Path | BlobURL | Standard:
    if text in ("-", stream):
        return Standard.STREAM
    try:
        return parse_blob_url(text) if "://" in text else Path(text)
    except ValueError as error:
        raise click.UsageError(str(error)) from None


def _loaded(
    session: Session, url: BlobURL, keys: tuple[str, ...], trust: bool, progress: ProgressCallback
) -> dict[str, Any]:
    from azstoragetorch.checkpoint import load_keys

    credential = session.access.credential(url)
    try:
        return load_keys(str(url), keys or None, weights_only=not trust, credential=credential, progress=progress)
    except KeyError as error:
        raise FileNotFoundError(str(error.args[0])) from None
    except (CheckpointError, pickle.UnpicklingError) as error:
        if not needs_trust(error):
            raise
        raise CheckpointError(_untrusted(str(url), error.__cause__ or error)) from None


@contextmanager
def _open_target(session: Session, place: Path | BlobURL | Standard) -> Iterator[Any]:
    """A file whose bytes go to *place*: all or none of them, unless it is a stream."""
    if isinstance(place, BlobURL):
        with BlobIO(str(place), "wb", credential=session.access.credential(place)) as blob:
            yield blob
    elif isinstance(place, Path):
        with atomic_write(place) as file:
            yield file
    else:
        with os.fdopen(os.dup(1), "wb") as stream:
            yield stream


def _read_source(session: Session, place: Path | BlobURL | Standard, trust: bool) -> Any:
    """The object that `torch.save` wrote to *place*."""
    if isinstance(place, BlobURL):
        with (
            BlobIO(str(place), "rb", credential=session.access.credential(place)) as blob,
            session.output.progress("reading", blob.size) as bar,
        ):
            return _load(_Watched(blob, bar), trust)
    if isinstance(place, Path) and not has_unknown_length(place, place.stat()):
        # Releases before 1.6 did not write zip files, and only those can be mapped.
        if zipfile.is_zipfile(place):
            return _load(place, trust, mmap=True)
        with place.open("rb") as file:
            return _load(file, trust)
    stream = open_to_read(place) if isinstance(place, Path) else os.fdopen(os.dup(0), "rb")
    with stream, tempfile.TemporaryFile() as file:  # torch.load seeks
        shutil.copyfileobj(stream, file)
        file.seek(0)
        return _load(file, trust)


def _load(file: Any, trust: bool, *, mmap: bool = False) -> Any:
    """The object that `torch.save` wrote to *file*.

    Raises:
        ValueError: another program wrote it.
    """
    import torch

    try:
        return torch.load(file, map_location="cpu", mmap=mmap, weights_only=not trust)
    except (AzureError, AZStorageTorchError, OSError, MemoryError):
        raise
    except Exception:
        # torch.load also tries to unpickle a file that is not a pickle, and trusting that file would not help.
        if not mmap and file.seek(0) == 0 and file.read(1) not in (b"P", b"\x80"):
            raise ValueError("it is neither a zip archive nor a pickle") from None
        raise


@contextmanager
def _as_checkpoint_errors(place: Path | BlobURL | Standard) -> Iterator[None]:
    """Translate errors: for a file that `torch.save` did not write, `torch.load` can raise almost anything."""
    try:
        yield
    except pickle.UnpicklingError as error:
        raise CheckpointError(_untrusted(str(place), error)) from None
    except (AzureError, AZStorageTorchError, OSError, MemoryError):
        raise
    except Exception as error:
        first = str(error).strip().split("\n", 1)[0]
        raise CheckpointError(
            f"{place} cannot be read as a file of torch.save: {type(error).__name__}: {first}"
        ) from error


class _Watched:
    """A file that reports bytes read and written to *bar*."""

    def __init__(self, file: Any, bar: Bar) -> None:
        self._file = file
        self._bar = bar

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def read(self, size: int = -1) -> bytes:
        data: bytes = self._file.read(size)
        self._bar(len(data))
        return data

    def readinto(self, buffer: Any) -> int:
        count: int = self._file.readinto(buffer)
        self._bar(count)
        return count

    def write(self, data: Any) -> int:
        count: int = self._file.write(data)
        self._bar(count)
        return count


def steps(bar: Bar) -> ProgressCallback:
    """A callback that reports the progress of a save or load to *bar*."""
    before = 0

    def report(done: int, planned: int) -> None:
        nonlocal before
        bar.plan(planned)
        bar(done - before)
        before = done

    return report


def _causes(error: Any) -> Iterable[Exception]:
    """The errors of the ranks in a failed save or load, without torch's wrapping."""
    return (found[0] for found in error.failures.values() if isinstance(found[0], Exception))


def needs_trust(error: BaseException) -> bool:
    """Whether `torch.load` raised *error* because of ``weights_only=True``."""
    return isinstance(error, pickle.UnpicklingError) or isinstance(error.__cause__, pickle.UnpicklingError)


def _untrusted(place: str, error: BaseException) -> str:
    first = str(error).split("\n", 1)[0]
    return f"{place}: {first} If you trust its origin, pass --trust, which can run any code that it contains."
