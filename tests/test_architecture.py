"""The rules of the architecture, checked on the source: the direction of imports, dependencies, docstrings.

Each rule is a function from the source of a module to violations, and is tested with a module that breaks it.
"""

from __future__ import annotations

import ast
import gc
import importlib
import inspect
import json
import re
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path
from types import ModuleType

import pytest

import azstoragetorch

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "azstoragetorch"

FACES = {"io", "datasets", "datapipes", "manifest", "nodes", "checkpoint", "safetensors", "filesystem", "weights"}
FRAMEWORKS = {
    "lightning",
    "litdata",
    "ray",
    "torch_checkpointing",
    "transformers",
    "webdataset",
}  # each needs the framework of its name
HOUSES = FACES | FRAMEWORKS | {"cli"}  # packages or modules that are not divided into layers

# Rows of the diagram in the docstring of the package: the name of the layer, in its first row, and modules.
_ROW = re.compile(r" {3}(\w*) +((?:\w+ *)+)")


def rows_of(picture: str) -> list[set[str]]:
    """The rows of *picture*, from the bottom. A module imports from the rows below its own and, if all modules of its
    row are of one package, from that row."""
    rows: list[set[str]] = []
    floor = ""
    floors = {"exceptions"}
    for line in picture.splitlines():
        if found := _ROW.fullmatch(line):
            floor = found[1] or floor
            is_package = floor != "faces"
            rows.insert(0, {f"{floor}.{name}" if is_package else name for name in found[2].split()})
            floors |= {floor} if is_package else set()
    return [floors, *rows, {"", "__main__"}]


ROWS = rows_of(azstoragetorch.__doc__ or "")

# The modules of `_blob` that public packages import; they reach the others through these.
FRONT_DOORS = {"_blob.client", "_blob.credentials", "_blob.errors", "_blob.secret", "_blob.url"}

# Where each dependency may be imported. The longest matching prefix decides.
MAY_IMPORT = {
    "torch": (FACES - {"io", "filesystem", "manifest"})
    | {"_samples.workers", "_tensors", "cli", "lightning", "transformers"},
    "torchdata": {"nodes"},
    "azure.core": {"_blob", "_files", "_samples", "exceptions", *HOUSES},
    "azure.identity": {"_blob.authorizers", "filesystem._options"},
    "azure.storage.blob": {"_blob.authorizers", "_blob.signing"},
    "blake3": {"_tensors.hashing"},  # an optional dependency, for which SHA-256 stands in
    "certifi": {"_blob.connection"},
    "fsspec": {"filesystem"},  # an extra, although torch depends on it
    "click": {"cli"},  # an optional dependency: `cli` reports it if it is missing
    "rich": {"cli"},
    "filelock": {"litdata"},  # a dependency of litdata
    "lightning": {"lightning"},
    "litdata": {"litdata"},
    "pyarrow": {"_samples.parquet", "ray"},  # an extra, and a dependency of Ray
    "pytorch_lightning": {"lightning"},
    "ray": {"ray"},
    "torch_checkpointing": {"torch_checkpointing"},
    "transformers": {"transformers"},
    "webdataset": {"webdataset"},
    "tqdm": {"_tensors.progress"},  # not a dependency: needed only for a progress bar
    "typing_extensions": {"", "_blob", "exceptions", *FACES},
}

# Private names of other packages that are used: (module, name) -> why a public one does not exist.
ALLOWED_PRIVATE: dict[tuple[str, str], str] = {
    ("_engine.threads", "_thread"): "public by its documentation; starts a thread in one step, without a lock",
    ("checkpoint._format.items", "_StorageInfo"): "entries of torch's format are pickled instances of it",
    ("checkpoint._format.metadata", "_StorageInfo"): "what is read is given to torch as instances of it",
    ("checkpoint._format.envelope", "_subclasses"): "FakeTensorMode reads a tensor's layout without its bytes",
    ("_engine.turns", "_getframe"): "documented; a call is known by its frame",
    ("_engine.turns", "_current_frames"): "documented; whether a thread still executes a call",
    ("io._drops", "_finalizing"): "the mark that Python's io classes have while their finalizer closes them",
    ("filesystem._writes", "_intrans"): "whether a transaction is open, which fsspec's own file systems ask as well",
    ("checkpoint._format.envelope", "_checkpoint_offset"): "where torch.load, in that mode, says that the bytes begin",
    ("safetensors._convert", "_subclasses"): "FakeTensorMode reads a file's structure without its elements",
    ("safetensors._convert", "_checkpoint_offset"): "where torch.load, in that mode, says that the elements begin",
    ("checkpoint._load", "_extension"): "torch's registry of stream extensions, which the format refers to",
    ("checkpoint._urls", "_storage_setup"): "where torch chooses the writer or reader for a checkpoint_id",
    ("datapipes._base", "_check_unpickable_fn"): "torch's own words for a function that no worker can be sent",
}

MAKES_THREADS = "_engine.threads"
THREAD_MAKERS = (
    "threading.Thread",
    "threading.Timer",
    "_thread.start_new_thread",
    "concurrent.futures.ThreadPoolExecutor",
    "concurrent.futures.ProcessPoolExecutor",
    "concurrent.futures.thread",
    "concurrent.futures.process",
    "multiprocessing.Process",
    "multiprocessing.Pool",
    "multiprocessing.get_context",
    "multiprocessing.context.BaseContext",
    "multiprocessing.context.Process",
    "multiprocessing.pool",
    "multiprocessing.process",
    "asyncio.to_thread",
)


@dataclass(frozen=True)
class Module:
    """A module of the package; *name* is relative to the package, which itself is ''."""

    name: str
    source: str
    is_package: bool = False

    tree: ast.Module = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        # CPython 3.11 fails when a finalizer or another thread parses at the same time; formatting a traceback does. So
        # modules are made when this one is imported, before any test has run, and none is garbage meanwhile.
        was_enabled = gc.isenabled()
        gc.disable()
        try:
            object.__setattr__(self, "tree", ast.parse(self.source))
        finally:
            if was_enabled:
                gc.enable()

    @property
    def dotted(self) -> str:
        return ".".join(filter(None, ["azstoragetorch", self.name]))

    @cached_property
    def bindings(self) -> dict[str, str]:
        """The absolute dotted name for each imported local name."""
        bound = {}
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Import):
                for alias in node.names:
                    first = alias.name.partition(".")[0]
                    bound[alias.asname or first] = alias.name if alias.asname else first
            elif isinstance(node, ast.ImportFrom):
                for alias in node.names:
                    bound[alias.asname or alias.name] = f"{self.absolute(node)}.{alias.name}"
        return bound

    @cached_property
    def imports(self) -> set[str]:
        """Every imported module or member, as an absolute dotted name."""
        found = set()
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                found |= {f"{self.absolute(node)}.{alias.name}" for alias in node.names}
        return without_type_stubs(found)

    @cached_property
    def uses(self) -> set[str]:
        """Dotted names that are used through imports: ``threading.Thread``, ``torch.utils.data``."""
        found = set(self.imports)
        for node in ast.walk(self.tree):
            path = []
            while isinstance(node, ast.Attribute):
                path.append(node.attr)
                node = node.value
            if isinstance(node, ast.Name) and node.id in self.bindings:
                found.add(".".join([self.bindings[node.id], *reversed(path)]))
        return without_type_stubs(found)

    def absolute(self, node: ast.ImportFrom) -> str:
        if not node.level:
            return node.module or ""
        parts = self.dotted.split(".")
        kept = parts[: len(parts) - node.level + (1 if self.is_package else 0)]
        return ".".join([*kept, *filter(None, [node.module])])


def without_type_stubs(dotted: set[str]) -> set[str]:
    """The imports that exist at run time: ``_typeshed`` exists for type checkers only."""
    return {name for name in dotted if not begins_with(name, "_typeshed")}


def read_package() -> dict[str, Module]:
    modules = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        is_package = parts[-1] == "__init__"
        name = ".".join(parts[:-1] if is_package else parts)
        modules[name] = Module(name, path.read_text(encoding="utf-8"), is_package)
    return modules


MODULES = read_package()


def begins_with(name: str, prefix: str) -> bool:
    """Whether the dotted *name* is *prefix* or starts with it."""
    return name == prefix or prefix == "" or name.startswith(f"{prefix}.")


def row_of(name: str) -> int | None:
    rooms = {name} | ({name.partition(".")[0]} & HOUSES)
    return next((row for row, members in enumerate(ROWS) if members & rooms), None)


def own_imports(module: Module, names: set[str]) -> set[str]:
    """Modules of the package that *module* imports; a member counts as its module."""
    found = set()
    for dotted in module.imports - {"azstoragetorch.__version__"}:
        if begins_with(dotted, "azstoragetorch"):
            name = dotted.removeprefix("azstoragetorch").removeprefix(".")
            while name not in names and name:
                name = name.rpartition(".")[0]
            found.add(name)
    return found - {module.name}


def imports_pointing_up(module: Module) -> Iterator[str]:
    row = row_of(module.name)
    if row is None:
        yield f"{module.dotted} has no place in the picture; give it one in ROWS"
        return
    names = set(MODULES) | set().union(*ROWS)
    for other in sorted(own_imports(module, names)):
        target = row_of(other)
        same_room = module.name.partition(".")[0] == other.partition(".")[0] != ""
        if target is None or target > row or (target == row and not same_room):
            yield f"{module.dotted} imports azstoragetorch.{other}, which is not below it"


def reaching_past_the_front_doors(module: Module) -> Iterator[str]:
    """A public package that imports a module of the core other than the allowed ones."""
    face = module.name.partition(".")[0]
    if face not in HOUSES:
        return
    for other in sorted(own_imports(module, set(MODULES) | set().union(*ROWS))):
        if other.startswith("_blob.") and other not in FRONT_DOORS:
            yield f"{module.dotted} imports azstoragetorch.{other}; faces use {sorted(FRONT_DOORS)}"


def misplaced_dependencies(module: Module) -> Iterator[str]:
    for dotted in sorted(module.imports):
        top = dotted.partition(".")[0]
        if top in sys.stdlib_module_names or top == "azstoragetorch":
            continue
        known = max((name for name in MAY_IMPORT if begins_with(dotted, name)), key=len, default=None)
        if known is None:
            yield f"{module.dotted} imports {dotted}, which is not a declared dependency"
        elif not any(module.name == room or (room and begins_with(module.name, room)) for room in MAY_IMPORT[known]):
            yield f"{module.dotted} imports {dotted}, which belongs to {sorted(MAY_IMPORT[known])}"


def is_private(name: str) -> bool:
    return name.startswith("_") and not (name.startswith("__") and name.endswith("__")) and name.strip("_") != ""


@cache
def own_private_names() -> frozenset[str]:
    """Private names that the package itself defines, in any module."""
    names = set()
    for module in MODULES.values():
        names.update(part for part in module.name.split(".") if is_private(part))
        for node in ast.walk(module.tree):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
                names.add(node.name)
            elif isinstance(node, (ast.Attribute, ast.Name)) and isinstance(node.ctx, ast.Store):
                names.add(node.attr if isinstance(node, ast.Attribute) else node.id)
    return frozenset(filter(is_private, names))


def foreign_private_names(module: Module) -> Iterator[str]:
    """Private names of other packages: imported, used through an import, or not defined in this package."""
    found = set()
    for dotted in module.uses:
        if not begins_with(dotted, "azstoragetorch"):
            found.update(filter(is_private, dotted.split(".")))
    own = own_private_names()
    for node in ast.walk(module.tree):
        name = None
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
            name = node.attr
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            is_by_name = node.func.id in {"getattr", "setattr", "hasattr", "delattr"} and len(node.args) > 1
            if is_by_name and isinstance(node.args[1], ast.Constant):
                name = str(node.args[1].value)
        if name is not None and is_private(name) and name not in own:
            found.add(name)
    for name in sorted(found):
        if (module.name, name) not in ALLOWED_PRIVATE:
            yield f"{module.dotted} uses the private name {name}; find a public way or list it with a reason"


def threads_made_elsewhere(module: Module) -> Iterator[str]:
    if module.name != MAKES_THREADS:
        for dotted in sorted(module.uses):
            if any(begins_with(dotted, maker) for maker in THREAD_MAKERS):
                yield f"{module.dotted} uses {dotted}; threads are made by {MAKES_THREADS} alone"


def missing_module_docstring(module: Module) -> Iterator[str]:
    if not ast.get_docstring(module.tree):
        yield f"{module.dotted} does not say what its place is"


RULES: list[Callable[[Module], Iterator[str]]] = [
    imports_pointing_up,
    reaching_past_the_front_doors,
    misplaced_dependencies,
    foreign_private_names,
    threads_made_elsewhere,
    missing_module_docstring,
]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
@pytest.mark.parametrize("name", MODULES, ids=lambda name: name or "azstoragetorch")
def test_every_module_keeps_the_rule(rule: Callable[[Module], Iterator[str]], name: str) -> None:
    assert list(rule(MODULES[name])) == []


@pytest.mark.parametrize(
    ("rule", "module"),
    [
        (imports_pointing_up, Module("_engine.threads", "from azstoragetorch._blob.client import BlobClient")),
        (imports_pointing_up, Module("_engine.threads", "from .._blob import client")),
        (imports_pointing_up, Module("_engine.threads", "def f():\n    from .._blob.client import BlobClient")),
        (imports_pointing_up, Module("_blob.url", "import azstoragetorch.io")),
        (imports_pointing_up, Module("_blob.client", "from ..io import BlobIO")),
        (imports_pointing_up, Module("_blob.client", "import azstoragetorch")),
        (imports_pointing_up, Module("io", "from azstoragetorch import datasets")),
        (imports_pointing_up, Module("datapipes", "from azstoragetorch.datasets import Blob")),
        (imports_pointing_up, Module("checkpoint.format", "from ..nodes import BlobReader")),
        (imports_pointing_up, Module("_blob.attic", "")),
        (imports_pointing_up, Module("io", "from azstoragetorch.cli import main")),
        (
            reaching_past_the_front_doors,
            Module("datapipes._tar", "from azstoragetorch._blob.transport import Connection"),
        ),
        (reaching_past_the_front_doors, Module("checkpoint._writer", "from .._blob import upload")),
        (reaching_past_the_front_doors, Module("datasets", "def f():\n    from azstoragetorch._blob import listing")),
        (misplaced_dependencies, Module("_blob.download", "import torch")),
        (misplaced_dependencies, Module("io", "from torch import Tensor")),
        (misplaced_dependencies, Module("datapipes", "from torchdata.nodes import BaseNode")),
        (misplaced_dependencies, Module("io", "import azure.storage.blob")),
        (misplaced_dependencies, Module("_blob.listing", "from azure.storage.blob import ContainerClient")),
        (misplaced_dependencies, Module("_blob.upload", "import numpy as np")),
        (misplaced_dependencies, Module("_tensors.progress", "from rich.progress import Progress")),
        (misplaced_dependencies, Module("", "import azure.core.exceptions")),
        (foreign_private_names, Module("io", "from azure.storage.blob._shared import base_client")),
        (foreign_private_names, Module("io", "import azure.core._enum_meta as meta")),
        (foreign_private_names, Module("io", "import torch\ntorch._C._cuda_init()")),
        (foreign_private_names, Module("io", "from torch.utils.data import datapipes as d\nd._typing.x")),
        (foreign_private_names, Module("io", "def f(sdk):\n    return sdk._pipeline_of_the_sdk")),
        (foreign_private_names, Module("io", "def f(sdk):\n    return getattr(sdk, '_pipeline_of_the_sdk')")),
        (threads_made_elsewhere, Module("io", "import threading\nthreading.Thread(target=print).start()")),
        (threads_made_elsewhere, Module("io", "from threading import Timer as Later")),
        (threads_made_elsewhere, Module("io", "from concurrent import futures\nfutures.ThreadPoolExecutor()")),
        (threads_made_elsewhere, Module("io", "from multiprocessing.pool import ThreadPool")),
        (missing_module_docstring, Module("io", "# a comment is not one")),
    ],
)
def test_the_rule_sees_its_breach(rule: Callable[[Module], Iterator[str]], module: Module) -> None:
    assert list(rule(module)) != []


@pytest.mark.parametrize(
    ("rule", "module"),
    [
        (imports_pointing_up, Module("io", "from azstoragetorch._blob.client import BlobClient")),
        (imports_pointing_up, Module("io", "from azstoragetorch._blob import client")),
        (imports_pointing_up, Module("datasets", "from .io import BlobIO\nfrom . import exceptions")),
        (imports_pointing_up, Module("checkpoint.writer", "from .format import Index\nfrom .._blob import client")),
        (
            imports_pointing_up,
            Module("_blob.client", "from .download import fetch\nfrom .._engine.threads import Engine"),
        ),
        (imports_pointing_up, Module("_blob.readahead", "from .download import fetch")),
        (imports_pointing_up, Module("cli._bench", "from azstoragetorch.datasets import BlobDataset")),
        (misplaced_dependencies, Module("_blob.authorizers", "from azure.storage.blob import BlobClient\nimport json")),
        (reaching_past_the_front_doors, Module("datapipes", "from azstoragetorch._blob.client import ClientFactory")),
        (
            reaching_past_the_front_doors,
            Module("datasets", "from azstoragetorch._samples.prefetch import OrderedPrefetch"),
        ),
        (
            reaching_past_the_front_doors,
            Module("_blob.client", "from azstoragetorch._blob.transport import Connection"),
        ),
        (misplaced_dependencies, Module("checkpoint.writer", "import torch.distributed.checkpoint as dcp")),
        (foreign_private_names, Module("io", "import torch\ntorch.__version__\n_, b = 1, 2")),
        (
            threads_made_elsewhere,
            Module("io", "import threading\nfrom concurrent.futures import Future\nthreading.Lock()"),
        ),
    ],
)
def test_the_rule_lets_pass_what_it_should(rule: Callable[[Module], Iterator[str]], module: Module) -> None:
    assert list(rule(module)) == []


def find_circle(graph: dict[str, set[str]]) -> list[str] | None:
    """The modules of one import cycle, if there is one."""
    done: set[str] = set()

    def visit(name: str, path: list[str]) -> list[str] | None:
        if name in path:
            return [*path[path.index(name) :], name]
        if name not in done:
            for other in sorted(graph.get(name, ())):
                if circle := visit(other, [*path, name]):
                    return circle
            done.add(name)
        return None

    return next((circle for name in sorted(graph) if (circle := visit(name, []))), None)


def test_the_picture_is_one() -> None:
    """The architecture page shows the same rows that imports are checked against, and every module is in one."""
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    table = re.findall(r"^\| `?(\w*)`? +\| (`.+`) \|$", page.partition("## Rules")[0], re.MULTILINE)
    drawn = (f"   {layer.replace('public', 'faces')} {re.sub('[`,]', '', names)}" for layer, names in table)
    assert rows_of("\n".join(drawn)) == ROWS
    assert sum(map(len, ROWS)) == len(set().union(*ROWS))
    placed = {name for row in ROWS for name in row}
    assert {name for name in placed if name.partition(".")[0] not in HOUSES} <= set(MODULES)


def test_no_imports_form_a_circle() -> None:
    assert find_circle({name: own_imports(module, set(MODULES)) for name, module in MODULES.items()}) is None
    assert find_circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]


def test_every_private_name_on_the_list_is_still_used_and_has_a_reason() -> None:
    used = set()
    for name, module in MODULES.items():
        parts = {part for dotted in module.uses for part in dotted.split(".")}
        parts |= {node.attr for node in ast.walk(module.tree) if isinstance(node, ast.Attribute)}
        used |= {(name, part) for part in parts}
    assert set(ALLOWED_PRIVATE) <= used
    assert all(reason.strip() for reason in ALLOWED_PRIVATE.values())


def test_importing_the_package_costs_next_to_nothing() -> None:
    program = (
        "import json, sys\nbefore = set(sys.modules)\nimport azstoragetorch\n"
        "print(json.dumps(sorted(set(sys.modules) - before)))"
    )
    answer = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True, timeout=240
    )
    imported = json.loads(answer.stdout)
    foreign = {name.partition(".")[0] for name in imported} - sys.stdlib_module_names
    assert foreign == {"azstoragetorch"}
    assert len(imported) <= 60, imported


PUBLIC = [name for name in MODULES if not any(part.startswith("_") for part in name.split("."))]


def load(name: str) -> ModuleType:
    """The public module *name*. One that needs a framework is skipped where that is not installed."""
    if name in FRAMEWORKS:
        pytest.importorskip(name, reason=f"{name} is not installed; `make frameworks` installs it")
    return importlib.import_module(MODULES[name].dotted)


@pytest.mark.parametrize("name", PUBLIC, ids=lambda name: name or "azstoragetorch")
def test_every_public_name_is_described(name: str) -> None:
    """Every name in ``__all__``, and every public member of a class, has a docstring."""
    module = load(name)
    silent = []
    for public in getattr(module, "__all__", []):
        value = getattr(module, public)
        if inspect.isclass(value):
            silent += [f"{public}.{member}" for member in undescribed_members(value)]
        if inspect.isclass(value) or inspect.isroutine(value):
            own = inspect.getdoc(value) if inspect.isroutine(value) else vars(value).get("__doc__")
            if not own or own.startswith(f"{public}("):  # generated by dataclass
                silent.append(public)
    assert silent == []


def undescribed_members(cls: type) -> Iterator[str]:
    for name, value in vars(cls).items():
        is_member = inspect.isroutine(value) or isinstance(value, (property, cached_property))
        if not name.startswith("_") and is_member and not inspect.getdoc(getattr(cls, name)):
            yield name


@pytest.mark.parametrize("name", PUBLIC, ids=lambda name: name or "azstoragetorch")
def test_every_public_module_names_what_is_public(name: str) -> None:
    """``__all__`` has exactly the names that a module defines without an underscore."""
    module = MODULES[name]
    defined = {
        node.name
        for node in module.tree.body
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_")
    }
    loaded = load(name)
    if defined:
        assert defined <= set(loaded.__all__)
    assert [public for public in getattr(loaded, "__all__", []) if not hasattr(loaded, public)] == []


@pytest.mark.slow
def test_the_wheel_carries_the_package_its_types_and_nothing_else(tmp_path: Path) -> None:
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(tmp_path)],
        cwd=ROOT,
        check=True,
        timeout=100,
    )
    (wheel,) = tmp_path.glob("*.whl")
    shipped = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    expected = {
        str(path.relative_to(ROOT).as_posix())
        for path in PACKAGE.rglob("*")
        if path.suffix == ".py" or path.name == "py.typed"
    }
    assert "azstoragetorch/py.typed" in shipped
    assert shipped == expected
