"""What LoRAX, TensorRT-LLM and Ollama make of an adapter folder: names, fields and shapes, as in `engine_loaders.py`.

Read from predibase/lorax (server/lorax_server/adapters/lora.py, models/model.py, utils/sgmv.py), NVIDIA/TensorRT-LLM
(tensorrt_llm/lora_manager.py) and ollama/ollama (convert/convert.go, convert_llama_adapter.go), and written anew.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any

from tests.registry.engine_loaders import Folder, Model

_FACTOR = re.compile(r"base_model\.model\.(.+)\.lora_([AB])\.weight")
_KINDS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")  # in LoRAX's order
_TRT_NAMES = {*_KINDS, "gate_up_proj", "w1", "w2", "w3", "gate"}
_TRT_PLACE = re.compile(r".*\.\d+\.\w+\.(?:\w+|\w+\.\w+|\w+\.\d+\.\w+)\.lora_[AB]\.weight")


def lorax_refusals(folder: Folder, model: Model) -> list[str]:
    """LoRAX of 2026-05 on one GPU, whose layers are all of `model`'s."""
    return list(_lorax(folder, model))


def _lorax(folder: Folder, model: Model) -> Iterator[str]:
    config, pairs = folder.config, _pairs(folder)
    rank, used = config["r"], set()
    for kind in _KINDS:
        layers = [path for path in sorted(model.linear) if path.endswith(f".{kind}")]
        found = [path for path in layers if {"A", "B"} <= pairs.get(path, {}).keys()]
        if not layers or not found:
            continue
        used.update(found)
        if len(found) < len(layers):  # the loader returns at the first layer that it does not find
            yield f"{kind} is dropped: {min(set(layers) - set(found))} lacks it"
            continue
        if len({pairs[path]["A"] for path in found}) > 1:
            yield f"{kind} cannot be stacked: its ranks differ"
            continue
        own = pairs[found[0]]["A"][0]
        if config["lora_alpha"] / rank != _peft_scale(config, found[0]):
            yield f"{kind} is scaled by {config['lora_alpha']}/{rank}"
        rank = 8 if own <= 8 else -(-own // 16) * 16  # padded, and kept for the next kind
    if rest := pairs.keys() - used:
        yield f"{min(rest)} is dropped without a word"
    yield from (f"{name} is dropped without a word" for name in folder.shapes if not _FACTOR.fullmatch(name))


def tensorrt_refusals(folder: Folder) -> list[str]:
    """TensorRT-LLM's loader of Hugging Face LoRAs, with its own table of module names."""
    return list(_tensorrt(folder))


def _tensorrt(folder: Folder) -> Iterator[str]:
    for name, shape in folder.shapes.items():
        if "lm_head" in name or "embed_tokens" in name:
            yield f"{name} is passed over"
        elif not _TRT_PLACE.fullmatch(name):
            yield f"unsupported key {name}"
        elif (leaf := _FACTOR.fullmatch(name)[1].rpartition(".")[2]) not in _TRT_NAMES:  # type: ignore[index]
            yield f"{leaf} is not in its list"
        elif ".lora_A." in name:
            module = _FACTOR.fullmatch(name)[1]  # type: ignore[index]
            if folder.config["lora_alpha"] / shape[0] != _peft_scale(folder.config, module):
                yield f"{module} is scaled by {folder.config['lora_alpha']}/{shape[0]}"


def ollama_refusals(folder: Folder, architecture: str) -> list[str]:
    """Ollama's conversion of a PEFT folder, for a base of that general.architecture in GGUF's words."""
    found = [] if architecture in ("llama", "gemma2") else [f"unsupported architecture {architecture}"]
    alpha = folder.config.get("lora_alpha")
    if not isinstance(alpha, int) or not 0 < alpha < 1 << 32:
        found.append(f"lora_alpha {alpha!r} is no unsigned integer")
    for module, factors in _pairs(folder).items():
        if {"A", "B"} > factors.keys():
            found.append(f"{module} lacks a factor")
        elif alpha is not None and alpha / factors["A"][0] != _peft_scale(folder.config, module):
            found.append(f"{module} is scaled by {alpha}/{factors['A'][0]}")
    return found


def _pairs(folder: Folder) -> dict[str, dict[str, tuple[int, ...]]]:
    pairs: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, shape in folder.shapes.items():
        if match := _FACTOR.fullmatch(name):
            pairs.setdefault(match[1], {})[match[2]] = shape
    return pairs


def _peft_scale(config: Mapping[str, Any], module: str) -> float:
    """What PEFT multiplies by."""
    rank, alpha = (
        next(
            (value for key, value in (config.get(table) or {}).items() if re.match(rf"(.*\.)?({key})$", module)),
            config[usual],
        )
        for table, usual in (("rank_pattern", "r"), ("alpha_pattern", "lora_alpha"))
    )
    return float(alpha / rank ** (0.5 if config.get("use_rslora") else 1))
