"""A torch without DataPipes, for every process that has this folder in PYTHONPATH.

Today torch.utils.data and the workers of DataLoader import the DataPipes themselves, so hiding the modules would break
torch. Here torch and torchdata get empty classes without instances in their place: a DataLoader treats every dataset as
one that is not a pipe, as a torch without pipes would. For all other code the modules
``torch.utils.data.datapipes``, ``graph`` and ``graph_settings`` and the names that torch.utils.data takes from them do
not exist. Whatever else such a release of torch would change is not simulated.
"""

from __future__ import annotations

import sys
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

DATA = "torch.utils.data"
GONE = (f"{DATA}.datapipes", f"{DATA}.graph", f"{DATA}.graph_settings")


def is_for_torch() -> bool:
    """Whether torch itself does the current import or attribute lookup."""
    frame = sys._getframe(1)
    while frame is not None:
        name = frame.f_globals.get("__name__", "")
        if name != __name__ and not name.startswith("importlib"):
            return name.partition(".")[0] in ("torch", "torchdata")
        frame = frame.f_back  # type: ignore[assignment]
    return False


def empty_class(name: str) -> type:
    if name.startswith("__") or not is_for_torch():
        raise AttributeError(name)
    return type(name, (), {"__module__": __name__})


class Removed(MetaPathFinder, Loader):
    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if name == DATA:
            spec = PathFinder.find_spec(name, path, target)
            assert spec is not None
            assert spec.loader is not None
            execute = spec.loader.exec_module

            def execute_and_remove(module: ModuleType) -> None:
                execute(module)
                for key, value in list(vars(module).items()):
                    if getattr(value, "__module__", None) == __name__ or f"{DATA}.{key}" in GONE:
                        delattr(module, key)
                module.__getattr__ = empty_class  # type: ignore[method-assign]
                for key in [key for key in sys.modules if key.startswith(GONE)]:
                    del sys.modules[key]

            spec.loader.exec_module = execute_and_remove  # type: ignore[method-assign]
            return spec
        if name in GONE or name.startswith(f"{GONE[0]}."):
            if not is_for_torch():
                raise ModuleNotFoundError(f"No module named {name!r}", name=name)
            return ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec: ModuleSpec) -> None:
        return None

    def exec_module(self, module: ModuleType) -> None:
        module.__getattr__ = empty_class  # type: ignore[method-assign]


sys.meta_path.insert(0, Removed())
