"""Download what a folder has in addition to the weights: configuration, tokenizer, model card."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path

from azstoragetorch._blob.credentials import Credential
from azstoragetorch._engine.config import TransferConfig
from azstoragetorch._engine.scope import Scope
from azstoragetorch._engine.threads import engine_for
from azstoragetorch._files.paths import check_folders
from azstoragetorch._files.transfer import Hooks, get_file
from azstoragetorch.exceptions import SafetensorsError
from azstoragetorch.safetensors._folder import folder_at

WEIGHTS = ("*.safetensors", "*.bin", "*.pt", "*.pth", "*.ckpt", "*.h5", "*.msgpack", "*.onnx", "*.gguf", "*.distcp")
_UNSAFE = frozenset("\\:")


def snapshot(
    url: str,
    folder: str | Path,
    *,
    ignore: Sequence[str] = WEIGHTS,
    credential: Credential = None,
    transfer: TransferConfig | None = None,
) -> Path:
    """Download the small files of the model in the folder *url*, such as its configuration and tokenizer.

    Libraries such as transformers read these from a local folder; the weights come straight from the blobs, with
    :func:`load_into` or :func:`iter_tensors`. Files that are there and have the right MD5 are not fetched again.

    Args:
        url: URL of the folder.
        folder: The local folder, which is created if it does not exist.
        ignore: Patterns of names that are not downloaded; by default, files of weights.
        credential: Same as for :class:`~azstoragetorch.io.BlobIO`.
        transfer: Transfer settings; see :class:`azstoragetorch.TransferConfig`.

    Returns:
        The local folder.

    Raises:
        SafetensorsError: nothing is in the folder, or the name of a blob cannot be that of a file in it.
        OSError: a file cannot be written.
    """
    source, root = folder_at(url, credential, transfer), Path(folder)
    found = source.all_names()
    if not found:
        raise SafetensorsError(f"{source.url}: the folder has no blobs", url=source.url)
    # The patterns are for the name alone: a folder that is called "a.bin" has files like any other.
    names = [name for name in found if not any(fnmatchcase(name.rpartition("/")[2], pattern) for pattern in ignore)]
    for name in names:
        if not all(part not in ("", ".", "..") for part in name.split("/")) or _UNSAFE & set(name) or "\0" in name:
            raise SafetensorsError(f"{source.url}: {name!r:.200} cannot be the name of a local file", url=source.url)
    root.mkdir(parents=True, exist_ok=True)
    for name in names:
        check_folders(root, name)
        (root / name).parent.mkdir(parents=True, exist_ok=True)

    def fetch(name: str, scope: Scope) -> None:
        get_file(source.blob(name), root / name, Hooks(scope, lambda _count: None))

    engine_for(source.transfer).map(fetch, names, source.transfer.initial_concurrency)
    return root
