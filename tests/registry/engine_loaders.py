"""What vLLM 0.33.0 and SGLang 0.5.23 ask of an adapter folder before they serve it: names, fields and shapes.

Read from the loaders in their wheels (vllm/lora/{peft_helper,lora_model,utils}.py; sglang/srt/lora/{lora_config,lora,
lora_manager,mem_pool,utils}.py) and written anew as rules, for both engines need a GPU to run. Each function returns
what the engine would raise, or would read wrong without a word; an empty list means that it computes what PEFT does.
"""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open

Shape = tuple[int, ...]
_VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
_VLLM_PLAIN_INITS = ("gaussian", "eva", "orthogonal", "mica", "lora_ga")
_JOINED = dict.fromkeys(("q_proj", "k_proj", "v_proj"), "qkv_proj") | dict.fromkeys(
    ("gate_proj", "up_proj"), "gate_up_proj"
)
_RENAMED = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}  # SGLang's, of tensors and not of target_modules


@dataclass(frozen=True)
class Model:
    """The base that an engine has loaded."""

    linear: Mapping[str, Shape]  # [out, in] of each linear layer, by path
    vocab_size: int


@dataclass(frozen=True)
class Folder:
    """An adapter folder as a loader sees it."""

    config: dict[str, Any]
    shapes: dict[str, Shape]  # by tensor
    files: frozenset[str]


def read_folder(path: Path) -> Folder:
    with safe_open(path / "adapter_model.safetensors", framework="np") as file:
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    return Folder(
        json.loads((path / "adapter_config.json").read_text()), shapes, frozenset(each.name for each in path.iterdir())
    )


# vLLM


def vllm_refusals(folder: Folder, model: Model, max_lora_rank: int) -> list[str]:
    """vLLM 0.33.0, with --max-lora-rank as given."""
    assert max_lora_rank in _VLLM_RANKS, "vLLM takes no other"
    return [*_vllm_config(folder.config, max_lora_rank), *_vllm_tensors(folder, model)]


def _vllm_config(config: dict[str, Any], max_lora_rank: int) -> Iterator[str]:
    if missing := [key for key in ("r", "lora_alpha", "target_modules") if key not in config]:
        yield f"missing fields {missing}"
        return
    if strange := set(config.get("modules_to_save") or ()) - {"classifier", "score"}:
        yield f"modules_to_save {sorted(strange)}"
    for key in ("use_dora", "lora_bias", "alora_invocation_tokens", "layer_replication", "use_bdlora", "use_qalora"):
        if config.get(key):
            yield key
    init = config.get("init_lora_weights", True)
    if isinstance(init, str) and init.lower() not in _VLLM_PLAIN_INITS:
        yield f"init_lora_weights {init}"
    if config.get("bias", "none") != "none":
        yield "bias"
    ranks = [config["r"], *(config.get("rank_pattern") or {}).values()]
    if not all(isinstance(rank, int) and rank > 0 for rank in ranks):
        yield "a rank that is no positive integer"
    elif max(ranks) > max_lora_rank:
        yield f"rank {max(ranks)} above {max_lora_rank}"


def _vllm_tensors(folder: Folder, model: Model) -> Iterator[str]:
    leaves = {path.rpartition(".")[2] for path in model.linear if ".experts." not in path} | {"embed_tokens", "lm_head"}
    experts = {path[path.index(".experts.") + 1 :] for path in model.linear if ".experts." in path}
    for name, shape in folder.shapes.items():
        if name.endswith((".embed_tokens.base_layer.weight", ".lm_head.base_layer.weight")):
            continue
        match = re.fullmatch(r"(?:base_model\.model\.)?(.+)\.(?:lora_(A|B)\.weight|lora_embedding_(A|B))", name)
        if match is None:
            yield f"{name} is no LoRA weight"
            continue
        module, half, half_of_table = match.groups()
        known = module[module.index(".experts.") + 1 :] in experts if ".experts." in module else _leaf(module) in leaves
        if not known:
            yield f"{module} is no module of the model"
        elif half_of_table:
            if half_of_table == "A" and shape[1] != model.vocab_size:
                yield f"{module} has another vocabulary"
        else:
            yield from _misfit(module, half, shape, model, _peft_rank(folder.config, module))


def _peft_rank(config: dict[str, Any], module: str) -> int:
    patterns = config.get("rank_pattern") or {}
    return next((rank for key, rank in patterns.items() if re.match(rf"(.*\.)?({key})$", module)), config["r"])


# SGLang


def sglang_refusals(folder: Folder, model: Model, max_lora_rank: int) -> list[str]:
    """SGLang 0.5.23, with --max-lora-rank as given and the target modules that it detects by itself."""
    return [*_sglang_config(folder, model, max_lora_rank), *_sglang_tensors(folder, model)]


def _sglang_targets(model: Model) -> set[str]:
    """What its memory pool has buffers for."""
    leaves = {_RENAMED.get(_leaf(path), _leaf(path)) for path in model.linear}
    return {_JOINED.get(leaf, leaf) for leaf in leaves} | {"embed_tokens", "lm_head"}


def _sglang_config(folder: Folder, model: Model, max_lora_rank: int) -> Iterator[str]:
    config = folder.config
    if missing := [key for key in ("r", "lora_alpha", "target_modules", "peft_type") if key not in config]:
        yield f"missing fields {missing}"
        return
    if config["peft_type"].lower() != "lora":
        yield f"peft_type {config['peft_type']}"
    if config.get("use_dora"):
        yield "use_dora"
    if "added_tokens.json" in folder.files:
        yield "added tokens"
    if config["r"] > max_lora_rank:
        yield f"rank {config['r']} above {max_lora_rank}"
    targets = config["target_modules"]
    if isinstance(targets, str):
        if targets not in ("all", "all-linear"):
            yield f"target_modules {targets!r}"
    elif strange := {_JOINED.get(_leaf(each), _leaf(each)) for each in targets} - _sglang_targets(model):
        yield f"target_modules {sorted(strange)}"
    for key in ("rank_pattern", "alpha_pattern", "use_rslora"):
        if config.get(key):
            yield f"{key} is not read"


def _sglang_tensors(folder: Folder, model: Model) -> Iterator[str]:
    by_parent: dict[str, set[str]] = {}
    for name, shape in folder.shapes.items():
        in_layers = re.search(r"\blayers\.\d+\.", name)
        match = re.fullmatch(r"base_model\.model\.(.+)\.lora_(A|B)\.weight", name)
        if match is None:
            if in_layers:
                yield f"{name} matches no target module"
            elif not name.endswith(("lora_embedding_A", "lora_embedding_B")):
                yield f"{name} is dropped without a word"
            continue
        module, half = match.groups()
        parent, _, leaf = module.rpartition(".")
        leaf = _RENAMED.get(leaf, leaf)
        if in_layers and _JOINED.get(leaf, leaf) not in _sglang_targets(model):
            yield f"{module} matches no target module"
            continue
        by_parent.setdefault(parent, set()).add(leaf)
        yield from _misfit(module, half, shape, model, folder.config["r"])
    for parent, leaves in sorted(by_parent.items()):
        if "q_proj" in leaves and "v_proj" not in leaves:
            yield f"{parent}.v_proj is missing beside q_proj"
        if leaves & {"k_proj", "v_proj"} and "q_proj" not in leaves:
            yield f"{parent}.q_proj is missing beside k_proj and v_proj"
        if "up_proj" in leaves and "gate_proj" not in leaves:
            yield f"{parent}.gate_proj is missing beside up_proj"


# Both


def _misfit(module: str, half: str, shape: Shape, model: Model, rank: int) -> Iterator[str]:
    if module == "lm_head":
        return
    out_features, in_features = model.linear.get(module, (0, 0))
    wanted = (rank, in_features) if half == "A" else (out_features, rank)
    if shape != wanted:
        yield f"{module}.lora_{half} is {shape}, not {wanted}"


def _leaf(path: str) -> str:
    return path.rpartition(".")[2]
