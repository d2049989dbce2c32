"""A checkpoint's module tree as its own library builds it: transformers 5 or diffusers, on the meta device, no weights.

It is asked where names and shapes do not tell enough: what class a convolution is, and which path a library gives a
module that its checkpoints call otherwise. Nothing here runs code from a checkpoint.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flora.startup import complete_torch

if TYPE_CHECKING:
    from torch import Tensor, nn


@dataclass(frozen=True, slots=True, eq=False)
class ModuleTree:
    """Modules on the meta device, found by the names that the checkpoint has for their tensors."""

    model: "nn.Module"
    tensors: "dict[str, Tensor]"  # of the whole tree, by its own names
    renamings: tuple[Any, ...] = ()  # of transformers: from the checkpoint's names to the tree's
    prefix: str = ""  # that names in a checkpoint may have or lack
    converters: tuple[Any, ...] = ()  # of transformers: what it splits or joins while it loads

    def tensor_path(self, name: str) -> str | None:
        """What the tree calls the tensor; None if it has none of that name."""
        if name in self.tensors:
            return name
        if not self.renamings and not self.prefix:
            return None
        from transformers.core_model_loading import rename_source_key

        key, _ = rename_source_key(name, list(self.renamings), [], self.prefix, self.tensors)
        return key if key in self.tensors else None

    def is_converted(self, name: str) -> bool:
        """Whether the library makes other tensors of this one: splits it, or joins it with others."""
        if not self.converters:
            return False
        from transformers.core_model_loading import rename_source_key

        names = name, list(self.renamings), list(self.converters), self.prefix, self.tensors
        return rename_source_key(*names)[1] is not None

    def module_of(self, name: str) -> "nn.Module | None":
        """The module that the tensor belongs to."""
        path = self.tensor_path(name)
        return None if path is None else self.model.get_submodule(path.rpartition(".")[0])

    def parents_of(self, name: str) -> "list[nn.Module]":
        """The modules around that one, the innermost last."""
        parts = (self.tensor_path(name) or "").split(".")[:-2]
        return [self.model.get_submodule(".".join(parts[: depth + 1])) for depth in range(len(parts))]


def module_tree(folder: Path) -> ModuleTree | None:
    """The tree of the checkpoint in `folder`; None where no library is there that knows it."""
    complete_torch()
    try:
        config = json.loads((folder / "config.json").read_bytes())
        return _of_diffusers(config) if "_class_name" in config else _of_transformers(folder)
    except Exception:  # whatever a config of any age makes a library raise: without it, names are all there is
        return None


def _of_transformers(folder: Path) -> ModuleTree | None:
    import torch
    import transformers
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming

    config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
    made = getattr(transformers, config.architectures[0])
    if not issubclass(made, transformers.PreTrainedModel):
        return None
    with torch.device("meta"):
        model = made(config)
    entries = get_model_conversion_mapping(model)
    renamings = tuple(entry for entry in entries if isinstance(entry, WeightRenaming))
    converters = tuple(entry for entry in entries if isinstance(entry, WeightConverter))
    return ModuleTree(model, model.state_dict(), renamings, model.base_model_prefix, converters)


def _of_diffusers(config: dict[str, Any]) -> ModuleTree | None:
    import diffusers
    import torch

    made = getattr(diffusers, config["_class_name"])
    if not issubclass(made, diffusers.ModelMixin):
        return None
    with torch.device("meta"):
        model = made.from_config(config)
    return ModuleTree(model, model.state_dict())
