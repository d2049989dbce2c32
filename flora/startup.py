"""How a process of our own starts: what is set before large imports, and torch without what extraction never calls.

Of the second that `import torch` takes (benchmarks/NOTES.md), a third writes down, function by function in Python, what
a thousand operations return on tensors without numbers ("meta"); `torch.export`, the compiler and `flora.tree` ask for
that. Here it waits until somebody does.
"""

import gc
import os
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from importlib.abc import Loader

_POSTPONED = ("torch._meta_registrations",)


def prepare_process() -> None:
    """To be called before the first import of numpy or torch."""
    gc.set_threshold(50_000, *gc.get_threshold()[1:])  # at 700 the import of torch alone collects a thousand times
    # numpy's own linear algebra, which nothing here calls: its threads spin for a tenth of a second once started
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")


def import_torch() -> None:
    """Imports torch, if it is not there yet, for work on a CPU. Not for a library: other code may count on all of it.

    Nothing is searched for cycles meanwhile, or ever again of what the import leaves.
    """
    if "torch" in sys.modules:
        return
    was_collecting = gc.isenabled()
    gc.disable()
    finder = _Finder()
    sys.meta_path.insert(0, finder)
    try:
        import torch  # noqa: F401
    finally:
        sys.meta_path.remove(finder)
        gc.freeze()
        if was_collecting:
            gc.enable()


def complete_torch() -> None:
    """Imports what was postponed. To be called before tensors on the meta device are made."""
    for name in _POSTPONED:
        module = sys.modules.get(name)
        if isinstance(module, _Postponed):
            module.load()


class _Postponed(ModuleType):
    """A module that runs when the first of its names is asked for."""

    def load(self) -> None:
        spec = self.__spec__
        assert spec is not None
        assert isinstance(spec.loader, _Loader)
        spec.loader = spec.loader.real
        self.__class__ = ModuleType
        spec.loader.exec_module(self)

    def __getattr__(self, name: str) -> object:
        if name.startswith("__"):  # what the import itself looks for
            raise AttributeError(name)
        self.load()
        return getattr(self, name)


class _Loader:
    def __init__(self, real: "Loader") -> None:
        self.real = real

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return _Postponed(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        pass


class _Finder:
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        spec = PathFinder.find_spec(fullname, path, target) if fullname in _POSTPONED else None
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)  # type: ignore[assignment]
        return spec
