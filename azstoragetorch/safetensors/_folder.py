"""Find the files of a model in a folder: by its index, or by their names where it has none."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any, NoReturn

from azure.core.exceptions import AzureError, ClientAuthenticationError, ResourceNotFoundError

from azstoragetorch._blob.client import BlobClient, BlobVersion, ClientFactory, ContainerClient
from azstoragetorch._blob.credentials import Credential
from azstoragetorch._blob.url import BlobURL, parse_url
from azstoragetorch._engine.config import MiB, TransferConfig
from azstoragetorch._engine.scope import Scope
from azstoragetorch._engine.threads import engine_for
from azstoragetorch.exceptions import SafetensorsError
from azstoragetorch.safetensors._files import open_file, open_files, read_head, read_rest
from azstoragetorch.safetensors._model import Model, model_of_file, model_of_files, model_of_index

SUFFIX = ".safetensors"
INDEX_SUFFIX = ".safetensors.index.json"
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"

_LARGEST_INDEX = 64 * MiB  # that of a model with 90,000 tensors has 8 MiB
_NUMBERED = re.compile(r"(?P<stem>.*)-(?P<number>\d{5})-of-(?P<count>\d{5})(?P<save>-[0-9a-f]+)?\.safetensors")
_OF_RANK = re.compile(r"shard-\d+-")  # files of torch, of which a rank may have written only some
_UNSAFE = re.compile("[\x00-\x1f\x7f-\x9f\\\\:\ud800-\udfff]")


class Folder:
    """A folder of safetensors files. *index* is the name of the index to use, if the user has given it."""

    def __init__(self, container: ContainerClient, address: BlobURL, index: str | None = None) -> None:
        self._container = container
        self._address = address
        self._index = index
        self.prefix = f"{address.blob}/" if address.blob else ""

    @property
    def url(self) -> str:
        """The URL, without a SAS."""
        return str(self._address)

    @property
    def transfer(self) -> TransferConfig:
        """How its blobs are transferred."""
        return self._container.config

    def blob(self, name: str) -> BlobClient:
        """The blob *name* in the folder."""
        return self._container.blob(self.prefix + name)

    def names(self) -> list[str]:
        """The names of the blobs in the folder itself, sorted."""
        pages = self._container.pages(prefix=self.prefix, delimiter="/")
        return sorted(name.removeprefix(self.prefix) for page in pages for name in page.names)

    def all_names(self) -> list[str]:
        """The names of all blobs in the folder and in folders below it, but for markers of folders; sorted."""
        pages = self._container.pages(prefix=self.prefix)
        return sorted(name.removeprefix(self.prefix) for page in pages for name in page.names if not name.endswith("/"))

    def open(self, wanted: Sequence[str] | None = None) -> Model:
        """The model, with the headers of its files; with an index, only of those that have one of *wanted*.

        Raises:
            SafetensorsError: the folder has not one model, or its model is not complete.
            AzureError: the service refused a request, or could not be reached.
        """
        name, weight_map, names = self._look()
        if name is not None and weight_map is not None:
            if wanted is not None and all(tensor in weight_map for tensor in wanted):
                weight_map = {tensor: weight_map[tensor] for tensor in wanted}
            paths = sorted(set(weight_map.values()))
            files = open_files([self._file(path, name) for path in paths], f"which {name} names")
            return model_of_index(self.url, name, dict(zip(paths, files, strict=True)), weight_map)
        if not names:
            self._fail(
                "there is neither an index nor a file *.safetensors here; pass the URL of the folder of a model, or of "
                "a file to load_file"
            )
        clients = [self.blob(path) for path in names]
        return model_of_files(self.url, open_files(clients, "though it was listed: the model is being replaced"))

    def _look(self) -> tuple[str | None, dict[str, str] | None, list[str]]:
        """The name of the index and its content if there is one, else the names of the files of the model."""
        if self._index is not None:
            try:
                return self._index, self.read_index(self._index), []
            except ResourceNotFoundError as error:
                raise SafetensorsError(f"{self.url}: {self._index} is missing", url=self.url) from error
        # The common name of an index is requested while the folder is listed, which saves a round trip.
        weight_map, names = self._both(lambda: self.read_index(INDEX), self.names)
        if isinstance(names, ClientAuthenticationError) and isinstance(weight_map, dict):
            return INDEX, weight_map, []  # not everybody may list
        if isinstance(names, Exception):
            raise names
        indexes = [name for name in names if name.endswith(INDEX_SUFFIX)]
        if len(indexes) > 1:
            self._fail(f"there are {len(indexes)} indexes: {', '.join(indexes[:5])}. Pass the URL of one of them")
        if indexes:
            if indexes != [INDEX] or isinstance(weight_map, ResourceNotFoundError):
                weight_map = self.read_index(indexes[0])
            if isinstance(weight_map, Exception):
                raise weight_map
            return indexes[0], weight_map, []
        return None, None, self._files_of(names)

    def _both(self, *actions: Callable[[], Any]) -> list[Any]:
        """What *actions*, which run at once, return or raise."""

        def run(action: Callable[[], Any], _scope: Scope) -> Any:
            try:
                return action()
            except (AzureError, SafetensorsError) as error:
                return error

        return engine_for(self.transfer).map(run, actions, len(actions))

    def _files_of(self, names: list[str]) -> list[str]:
        """Which of *names* are the files of the model.

        Raises:
            SafetensorsError: only some of the files of a save are there.
        """
        files = [name for name in names if name.endswith(SUFFIX)]
        if SINGLE in files:
            return [SINGLE]  # a save that replaces it by several files has not ended
        series: dict[tuple[str, str, str | None], set[int]] = defaultdict(set)
        for name in files:
            found = _NUMBERED.fullmatch(name)
            if found is not None and not _OF_RANK.match(name):
                series[found["stem"], found["count"], found["save"]].add(int(found["number"]))
        for (stem, count, save), numbers in series.items():
            if numbers != set(range(1, int(count) + 1)):
                self._fail(
                    f"there are {len(numbers)} of the {int(count)} files {stem}-*-of-{count}{save or ''}{SUFFIX} and "
                    "no index: a save is in progress or was interrupted"
                )
        return files

    def read_index(self, name: str) -> dict[str, str]:
        """Which file has which tensor, according to the index *name*.

        Raises:
            ResourceNotFoundError: it does not exist.
            SafetensorsError: it is not a valid index.
        """
        _, content = self.read_small(name)
        try:
            weight_map: Any = json.loads(content)["weight_map"]
        except (ValueError, TypeError, KeyError, RecursionError):
            weight_map = None
        if type(weight_map) is not dict or not all(type(path) is str for path in weight_map.values()):
            self._fail(f"{name} is not a valid index: it has no weight_map from names of tensors to names of files")
        for path in set(weight_map.values()):
            self._check(path, name)
        result: dict[str, str] = weight_map
        return result

    def read_small(self, name: str) -> tuple[BlobVersion, bytes]:
        """The version and the content of the blob *name*, which is not large.

        Raises:
            ResourceNotFoundError: it does not exist.
            SafetensorsError: it is too large to be what it should be.
        """
        client, scope = self.blob(name), Scope()
        version, head = read_head(client, self.transfer.part_size, scope)
        if version.size > _LARGEST_INDEX:
            self._fail(f"{name} has {version.size:,} bytes; at most {_LARGEST_INDEX:,} are read")
        return version, head if len(head) == version.size else read_rest(client, version, head, version.size, scope)

    def _file(self, path: str, index: str) -> BlobClient:
        self._check(path, index)
        return self.blob(path)

    def _check(self, path: str, index: str) -> None:
        """Raise unless *path* is a file in the folder: an index must not lead a credential elsewhere."""
        is_inside = (
            0 < len(path) <= 1024
            and path.endswith(SUFFIX)
            and not _UNSAFE.search(path)
            and all(part not in ("", ".", "..") for part in path.split("/"))
        )
        if not is_inside:
            self._fail(f"{index} names {path!r:.200}, which is not a safetensors file in the folder")

    def _fail(self, what: str) -> NoReturn:
        raise SafetensorsError(f"{self.url}: {what}", url=self.url)


def folder_at(url: str, credential: Credential, transfer: TransferConfig | None) -> Folder:
    """The folder at *url*, which may also be the URL of its index.

    Raises:
        ValueError: *url* is not valid, or names a snapshot.
    """
    parsed = parse_url(url)
    if parsed.is_read_only:
        raise ValueError(f"url {str(parsed)!r}: a folder has no snapshot or version")
    name, index = parsed.blob.strip("/"), None
    if name.endswith(INDEX_SUFFIX):
        name, _, index = name.rpartition("/")
    container = ClientFactory(credential, transfer, parsed).container(parsed)
    return Folder(container, replace(parsed, blob=name, sas=None), index)


def open_model(url: str, credential: Credential, transfer: TransferConfig | None) -> Model:
    """The model at *url*, which is that of a file if it ends in ``.safetensors``, else of a folder or an index."""
    parsed = parse_url(url)
    if parsed.blob.endswith(SUFFIX):
        return model_of_file(open_file(ClientFactory(credential, transfer, parsed).blob(parsed)))
    return folder_at(url, credential, transfer).open()


def numbered(number: int, count: int, save: str = "") -> str:
    """The name of file *number* of *count*, as Hugging Face's libraries name them."""
    return f"model-{number:05d}-of-{count:05d}{save}{SUFFIX}"


def of_a_save(names: Iterable[str]) -> list[str]:
    """Those of *names* that `save_folder` may have written as files of a model."""
    return [
        name
        for name in names
        if name == SINGLE or ((found := _NUMBERED.fullmatch(name)) is not None and found["stem"] == "model")
    ]
