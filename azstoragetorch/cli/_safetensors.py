"""``azstoragetorch safetensors``: list, look into, and convert models that are saved as safetensors files."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import click

from azstoragetorch._blob.url import BlobURL
from azstoragetorch._engine.config import TransferConfig
from azstoragetorch._files.paths import printable
from azstoragetorch.cli._access import with_sas
from azstoragetorch.cli._output import human
from azstoragetorch.cli._session import Session, Url, common, examples

_MODEL = "https://ACCOUNT.blob.core.windows.net/CONTAINER/model"


@click.group()
def safetensors() -> None:
    """Inspect and convert safetensors models: a file, or a folder with or without an index."""


@safetensors.command(epilog=examples(f"safetensors ls {_MODEL}\nsafetensors ls -H {_MODEL}/model.safetensors"))
@click.argument("url", type=Url())
@click.option("--human", "-H", "is_human", is_flag=True, help="Sizes such as 1.5 GiB.")
@common
def ls(session: Session, url: BlobURL, is_human: bool) -> None:
    """List the files of the model at URL, a file or a folder: tensors, bytes, name. Reads their headers only."""
    from azstoragetorch.safetensors import describe_model

    found = describe_model(str(url), credential=session.access.credential(url))
    for file in found.files:
        session.output.record({"file": file.name, "tensors": file.tensors, "bytes": file.nbytes})
        size = human(file.nbytes) if is_human else str(file.nbytes)
        session.output.line(f"{file.tensors:>8}  {size:>14}  {printable(file.name)}")
    summary = {"url": found.url, "files": len(found.files), "tensors": len(found.tensors), "bytes": found.nbytes}
    session.output.record({"summary": summary})
    session.output.note(f"{len(found.tensors):,} tensors, {human(found.nbytes)}, {len(found.files):,} files")


@safetensors.command(epilog=examples(f"safetensors inspect {_MODEL}"))
@click.argument("url", type=Url())
@common
def inspect(session: Session, url: BlobURL) -> None:
    """Show the tensors of the model at URL, a file or a folder: types, shapes, bytes. Reads headers only."""
    from azstoragetorch.safetensors import describe_model

    found = describe_model(str(url), credential=session.access.credential(url))
    rows = []
    for tensor in found.tensors:
        session.output.record(
            {
                "name": tensor.name,
                "type": tensor.dtype,
                "shape": list(tensor.shape),
                "bytes": tensor.nbytes,
                "file": tensor.file,
            }
        )
        shape = "x".join(map(str, tensor.shape))
        rows.append([tensor.name, tensor.dtype, shape, f"{tensor.nbytes:,}", tensor.file])
    session.output.line(found.url)
    session.output.table("", ["name", "type", "shape", "bytes", "file"], rows)
    for key, value in sorted(found.metadata.items()):
        session.output.line(f"{printable(key)}: {printable(value)}")
    elements = sum(math.prod(tensor.shape) for tensor in found.tensors)
    summary: dict[str, Any] = {"url": found.url, "tensors": len(rows), "elements": elements, "bytes": found.nbytes}
    session.output.record({"summary": {**summary, "metadata": found.metadata}})
    session.output.note(f"{len(rows):,} tensors, {elements:,} elements, {human(found.nbytes)}")


@safetensors.command(
    epilog=examples(
        f"safetensors convert {_MODEL}-checkpoint {_MODEL}\n"
        f"safetensors convert {_MODEL} {_MODEL}-checkpoint --to checkpoint\n"
        f"safetensors convert {_MODEL}.pt {_MODEL} --only-tensors\n"
        f"safetensors convert {_MODEL} {_MODEL}.pt"
    )
)
@click.argument("source", type=Url())
@click.argument("target", type=Url())
@click.option("--from", "kind", type=click.Choice(["checkpoint", "torch-save", "safetensors"]), help="What SOURCE is.")
@click.option("--to", "goal", type=click.Choice(["checkpoint", "torch-save", "safetensors"]), help="What to write.")
@click.option("--only-tensors", is_flag=True, help="Leave out entries that are not tensors.")
@click.option("--max-shard-size", default="5GB", show_default=True, help="The maximum size of a safetensors file.")
@click.option("--overwrite", is_flag=True, help="Replace the model or checkpoint in the folder TARGET.")
@common
def convert(
    session: Session,
    source: BlobURL,
    target: BlobURL,
    kind: str | None,
    goal: str | None,
    only_tensors: bool,
    max_shard_size: str,
    overwrite: bool,
) -> None:
    """Convert between a folder of safetensors files, a distributed checkpoint, and a blob of torch.save.

    The kind of SOURCE follows from its ending (.pt, .pth, .bin, .safetensors), or from the metadata of a checkpoint in
    the folder; --from overrides this. Without --to, a checkpoint or a blob of torch.save becomes a folder of
    safetensors files, and those become a blob of torch.save if TARGET ends in .pt, .pth, or .bin. Tensors are read as
    they are written, so the model need not fit into memory.
    """
    from azstoragetorch import safetensors as models

    kind = kind or _kind_of(session, source)
    goal = goal or ("torch-save" if kind == "safetensors" and target.blob.endswith(_TORCH_SAVE) else "safetensors")
    if "safetensors" not in (kind, goal) or kind == goal:
        raise click.UsageError(f"cannot convert {kind} to {goal}: pass --from and --to, one of them safetensors")
    options: dict[str, Any] = {"credential": session.access.for_both(source, target)}
    action: Callable[..., Any]
    if goal == "safetensors":
        options |= {"only_tensors": only_tensors, "max_shard_size": max_shard_size, "overwrite": overwrite}
        action = models.checkpoint_to_safetensors if kind == "checkpoint" else models.torch_save_to_safetensors
    elif goal == "checkpoint":
        options |= {"overwrite": overwrite}
        action = models.safetensors_to_checkpoint
    else:
        action = models.safetensors_to_torch_save
    with session.output.progress("converting", None):
        action(with_sas(source), with_sas(target), **options)
    session.output.record({"source": str(source), "target": str(target), "from": kind, "to": goal})
    session.output.note(f"wrote {target}")


_TORCH_SAVE = (".pt", ".pth", ".bin")


def _kind_of(session: Session, url: BlobURL) -> str:
    if url.blob.endswith(_TORCH_SAVE):
        return "torch-save"
    if url.blob.endswith((".safetensors", ".safetensors.index.json")):
        return "safetensors"
    folder = url.with_blob(f"{url.blob.strip('/')}/.metadata".lstrip("/"))
    return "checkpoint" if session.access.blob(folder, TransferConfig()).version() is not None else "safetensors"
