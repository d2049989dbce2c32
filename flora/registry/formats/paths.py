"""Paths of the modules that load an adapter, where a library's module tree has other names than the checkpoint's.

transformers 5 renames while it loads: a ViT's `vit.encoder.layer.0.attention.attention.query.weight` becomes
`vit.layers.0.attention.q_proj.weight`. PEFT finds modules by their names in the tree, so a PEFT folder needs those; the
adapter itself keeps the checkpoint's, which every version of every library shares.
"""

import re
from collections.abc import Mapping
from pathlib import Path

import msgspec

from flora.adapter import AdapterHeader, ExactTensor, Module
from flora.forms import is_expert, split_expert
from flora.tree import ModuleTree, module_tree

_USUAL = re.compile(
    r"model\.layers\.\d+\.(self_attn|mlp|mlp\.experts\.\d+)\.\w+|model\.(embed_tokens|norm|layers\.\d+\.\w*norm)|lm_head"
)


def rename(header: AdapterHeader, paths: Mapping[str, str]) -> AdapterHeader:
    """The header with the modules in `paths` (checkpoint's path to the tree's) under their other names."""
    if not paths:
        return header
    return msgspec.structs.replace(
        header,
        modules=tuple(_rename_module(module, paths) for module in header.modules),
        exact=tuple(_rename_exact(tensor, paths) for tensor in header.exact_tensors) or msgspec.UNSET,
    )


def rename_tensor(name: str, paths: Mapping[str, str]) -> str:
    """`name` with its module renamed."""
    module, _, leaf = name.rpartition(".")
    return f"{paths.get(module, module)}.{leaf}"


def tree_paths(base: Path, header: AdapterHeader) -> dict[str, str]:
    """The paths that differ in the tree that the installed transformers builds for `base`, by the checkpoint's paths.

    base  folder of the base checkpoint, with its config.json
    Decoders that everyone names like Llama's are not asked about: importing transformers takes seconds.
    Empty where transformers is not installed, is older than 5, or does not know the model: no names are known then.
    """
    modules = {module.name for module in header.modules} | {
        tensor.name.rpartition(".")[0] for tensor in header.exact_tensors
    }
    if all(_USUAL.fullmatch(module) for module in modules):
        return {}
    tree = module_tree(base)
    if tree is None:
        return {}
    found = {module: _path_of(module, tree) for module in modules}
    return {module: path for module, path in found.items() if path != module}


def _path_of(module: str, tree: ModuleTree) -> str:
    """The tree's path; of an expert that where it would be, were the tree's one parameter apart."""
    key = tree.tensor_path(f"{module}.weight")
    if key is not None:
        return key.removesuffix(".weight")
    if not is_expert(module):
        return module
    parent, index, leaf = split_expert(module)
    key = tree.tensor_path(f"{parent}.experts.{leaf}")
    return module if key is None else f"{key.removesuffix(leaf)}{index}.{leaf}"


def _rename_module(module: Module, paths: Mapping[str, str]) -> Module:
    return msgspec.structs.replace(module, name=paths.get(module.name, module.name))


def _rename_exact(tensor: ExactTensor, paths: Mapping[str, str]) -> ExactTensor:
    return msgspec.structs.replace(tensor, name=rename_tensor(tensor.name, paths))
