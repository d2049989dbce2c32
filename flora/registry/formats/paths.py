"""Paths of the modules that load an adapter, where a library's module tree has other names than the checkpoint's.

transformers 5 renames while it loads: a ViT's `vit.encoder.layer.0.attention.attention.query.weight` becomes
`vit.layers.0.attention.q_proj.weight`. PEFT finds modules by their names in the tree, so a PEFT folder needs those; the
adapter itself keeps the checkpoint's, which every version of every library shares.
"""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import msgspec

from flora.adapter import AdapterHeader, ExactTensor, Module

_USUAL = re.compile(r"model\.layers\.\d+\.(self_attn|mlp)\.\w+|model\.(embed_tokens|norm|layers\.\d+\.\w*norm)|lm_head")


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
    try:
        found = _ask_transformers(base, modules)
    except Exception:  # whatever a config of any age makes a library raise: without it, names stay as they are
        return {}
    return {module: path for module, path in found.items() if path != module}


def _ask_transformers(base: Path, modules: Iterable[str]) -> dict[str, str]:
    import torch
    import transformers
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming, rename_source_key

    config = transformers.AutoConfig.from_pretrained(base, local_files_only=True)
    with torch.device("meta"):
        model = getattr(transformers, config.architectures[0])(config)
    tree = model.state_dict()
    renamings = [entry for entry in get_model_conversion_mapping(model) if isinstance(entry, WeightRenaming)]
    found = {}
    for module in modules:
        key, _ = rename_source_key(f"{module}.weight", renamings, [], model.base_model_prefix, tree)
        if key in tree:
            found[module] = key.removesuffix(".weight")
    return found


def _rename_module(module: Module, paths: Mapping[str, str]) -> Module:
    return msgspec.structs.replace(module, name=paths.get(module.name, module.name))


def _rename_exact(tensor: ExactTensor, paths: Mapping[str, str]) -> ExactTensor:
    return msgspec.structs.replace(tensor, name=rename_tensor(tensor.name, paths))
