"""adapter_config.json: read as strangers write it, with a named refusal of all that is not plain LoRA; and written."""

import json
import math
import re
from collections import Counter
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

import msgspec

from flora.adapter import AdapterHeader
from flora.errors import AdapterInvalid, Unsupported
from flora.forms import is_expert, split_expert
from flora.registry.formats.patterns import Patterns, anchored, compile_patterns

CONFIG_FILE = "adapter_config.json"
_MAX_BYTES = 8 << 20  # a pattern for each of 20,000 modules has about 2 MiB
_MAX_ALPHA = 1e6
_MAX_RANK = 65536

# Keys that change what the adapter computes in a way that A and B alone do not tell.
_UNSUPPORTED = {
    "use_dora": "DoRA rescales the base's weights, which is no low-rank product",
    "lora_bias": "it adds a bias to each module",
    "modules_to_save": "it carries whole tensors that replace the base's",
    "auto_mapping": "it names Python classes to import, and Flora imports nothing on an adapter's word",
    "trainable_token_indices": "it changes rows of the embedding",
    "target_parameters": "it adapts parameters that are no Linear layers",
    "layer_replication": "it changes the base's number of layers",
    "fan_in_fan_out": "its factors are of transposed (Conv1D) weights",
    "alora_invocation_tokens": "it is applied from some token on",
    "use_qalora": "its inputs are pooled in groups",
    "use_bdlora": "its factors are block-diagonal",
    "arrow_config": "it routes between adapters at run time",
    "megatron_config": "its factors are split over processes",
}
_SAFE_INITS = (True, False, None, "gaussian", "eva", "orthogonal")  # others (pissa, olora, …) change the base's weights
_NEUTRAL = {
    "peft_type", "task_type", "peft_version", "base_model_name_or_path", "revision", "inference_mode", "r",
    "target_modules", "exclude_modules", "lora_alpha", "lora_dropout", "bias", "use_rslora", "init_lora_weights",
    "layers_to_transform", "layers_pattern", "rank_pattern", "alpha_pattern", "loftq_config", "eva_config",
    "corda_config", "lora_ga_config", "runtime_config", "ensure_weight_tying",
}  # fmt: skip

_CAUSAL = re.compile(r"ForCausalLM|LMHead|^unknown$")  # for others PEFT's plain model does, whatever their inputs
_OWN = ("modules_to_save", "bias", "fan_in_fan_out", "trainable_token_indices", "target_parameters")

_Rank = Annotated[int, msgspec.Meta(ge=1, le=_MAX_RANK)]


class PeftConfig(msgspec.Struct, frozen=True):
    """The part of a LoRA's adapter_config.json that says what it computes."""

    r: _Rank = 8  # PEFT's own defaults
    lora_alpha: float = 8
    use_rslora: bool | None = False
    target_modules: list[str] | str | None = None
    rank_pattern: dict[str, _Rank] | None = None
    alpha_pattern: dict[str, float] | None = None
    base_model_name_or_path: str | None = None
    peft_version: str | None = None
    target_parameters: list[str] | None = None  # of Flora's own folders


class LoraScales:
    """Ranks and scales of the modules, by PEFT's rules for patterns and rsLoRA."""

    def __init__(self, config: PeftConfig) -> None:
        self.config = config

    def rank(self, module: str) -> int:
        found = self._ranks.get(module)
        return self.config.r if found is None else found

    def scale(self, module: str) -> float:
        """alpha / rank; with rsLoRA alpha / sqrt(rank)."""
        found = self._alphas.get(module)
        alpha = self.config.lora_alpha if found is None else found
        rank = self.rank(module)
        return alpha / math.sqrt(rank) if self.config.use_rslora else alpha / rank

    def targets(self, module: str) -> bool:
        """Whether PEFT would adapt the module. A regular expression is not run: the tensors then decide, as in vLLM."""
        targets = self.config.target_modules
        if not isinstance(targets, list) or any(module == t or module.endswith("." + t) for t in targets):
            return True
        if is_expert(module):
            parent, _, leaf = split_expert(module)
            return f"{parent}.experts" in self._homes or f"{parent}.{leaf}.weight" in self._parameters
        return f"{module}.weight" in self._parameters

    @cached_property
    def _parameters(self) -> set[str]:
        return set(self.config.target_parameters or ())

    @cached_property
    def _homes(self) -> set[str]:
        """Modules whose experts are adapted as parameters."""
        return {parameter.rpartition(".")[0] for parameter in self._parameters}

    @cached_property
    def _ranks(self) -> Patterns[int]:
        return compile_patterns(self.config.rank_pattern or {}, "rank_pattern")

    @cached_property
    def _alphas(self) -> Patterns[float]:
        return compile_patterns(self.config.alpha_pattern or {}, "alpha_pattern")


def read_config(path: Path, *, own: bool = False) -> PeftConfig:
    """The config in file `path`. Raises AdapterInvalid, and Unsupported with the key that asks for more than LoRA.

    own  beside a record of Flora's, which tells what the keys in `_OWN` are about
    """
    raw = read_json(path)
    kind = raw.get("peft_type")
    if kind != "LORA":
        raise Unsupported(f"{CONFIG_FILE} is of peft_type {str(kind)[:40]!r}; Flora reads LORA", field="peft_type")
    for key, value in raw.items():
        if own and key in _OWN:
            continue
        if key in _UNSUPPORTED and value:
            raise Unsupported(f"{CONFIG_FILE} sets {key}: {_UNSUPPORTED[key]}", field=key)
        if key not in _NEUTRAL and (value is True or (isinstance(value, (dict, list)) and value)):
            raise Unsupported(f"{CONFIG_FILE} sets {key[:80]}, which this Flora does not know", field=key[:80])
    if not own and raw.get("bias") not in (None, "none"):
        raise Unsupported(f"{CONFIG_FILE} sets bias: it was trained together with the base's biases", field="bias")
    if raw.get("init_lora_weights") not in _SAFE_INITS:
        raise Unsupported(
            f"{CONFIG_FILE} sets init_lora_weights to {str(raw['init_lora_weights'])[:40]!r}, which changes the base",
            fix="convert it with peft: save_pretrained(folder, path_initial_model_for_weight_conversion=…)",
            field="init_lora_weights",
        )
    try:
        config = msgspec.convert(raw, PeftConfig)
    except msgspec.ValidationError as error:
        raise AdapterInvalid(f"{CONFIG_FILE} does not describe a LoRA", cause=str(error)[:300]) from error
    for alpha in (config.lora_alpha, *(config.alpha_pattern or {}).values()):
        if not 0 < alpha <= _MAX_ALPHA:
            raise AdapterInvalid(f"{CONFIG_FILE} has an alpha of {alpha}; it must be in (0, {_MAX_ALPHA:g}]")
    return config


def make_config(header: AdapterHeader, target_modules: list[str]) -> dict[str, Any]:
    """The config of this adapter with its true ranks, in the few keys that PEFT has had since version 0.10.

    r is the largest rank, since engines size their buffers by it; a pattern names each module that differs.
    target_modules  paths or leaves; of the modules tied to an embedding, too
    """
    rank = max(header.max_rank, 1)
    alphas = Counter(module.alpha for module in header.modules if module.rank == rank)
    alpha = alphas.most_common(1)[0][0] if alphas else rank
    modules = [(name, module) for module in header.modules for name in (module.name, *module.tied)]
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM" if _CAUSAL.search(header.base.architecture) else None,
        "auto_mapping": None,
        "base_model_name_or_path": header.base.name,
        "revision": None,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": _plain_number(alpha),
        "lora_dropout": 0.0,
        "fan_in_fan_out": any(module.kind == "conv1d" for module in header.modules),
        "bias": "all" if any(tensor.name.endswith("bias") for tensor in header.exact_tensors) else "none",
        "use_rslora": False,
        "use_dora": False,
        "init_lora_weights": True,
        "modules_to_save": _modules_to_save(header),
        "layers_to_transform": None,
        "layers_pattern": None,
        "target_modules": target_modules,
        "rank_pattern": {anchored(name): m.rank for name, m in modules if m.rank != rank},
        "alpha_pattern": {anchored(name): _plain_number(m.alpha) for name, m in modules if m.alpha != alpha},
    }
    new_rows = {
        tensor.name.removesuffix(".weight"): list(range(tensor.first_row, tensor.first_row + tensor.shape[0]))
        for tensor in header.exact_tensors
        if tensor.first_row is not None
    }
    return config | ({"trainable_token_indices": new_rows} if new_rows else {})


def _modules_to_save(header: AdapterHeader) -> list[str] | None:
    """Modules whose weight the adapter carries whole. A bias alone needs no entry: `bias` speaks for all."""
    names = [tensor.name for tensor in header.exact_tensors if tensor.first_row is None]
    return sorted(name.removesuffix(".weight") for name in names if name.endswith(".weight")) or None


def read_json(path: Path) -> dict[str, Any]:
    """A small JSON object that a stranger wrote. Raises AdapterInvalid: too large, too deep, NaN, a key given twice."""
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise AdapterInvalid(f"{path.name} has more than {_MAX_BYTES >> 20} MiB")
        value = json.loads(path.read_bytes(), object_pairs_hook=_without_duplicates, parse_constant=_no_constant)
    except (ValueError, RecursionError, OSError) as error:
        raise AdapterInvalid(f"{path.name} cannot be read as JSON", cause=str(error)[:300]) from error
    if not isinstance(value, dict):
        raise AdapterInvalid(f"{path.name} is not a JSON object")
    return value


def public_name(name_or_path: str | None) -> str:
    """What the base calls itself: a Hub id as it is; of a path or URL only the last part, for it may be private."""
    text = (name_or_path or "").strip()
    if re.fullmatch(r"[A-Za-z0-9][\w.\-]*(?:/[A-Za-z0-9][\w.\-]*)?", text) and ".." not in text and len(text) <= 128:
        return text
    last = re.split(r"[/\\]", text.rstrip("/\\"))[-1]
    return re.sub(r"[^\w.\-]", "_", last).strip("._-")[:128] or "unknown"


def _plain_number(value: float) -> int | float:
    return int(value) if float(value).is_integer() else value  # Ollama reads lora_alpha as an unsigned integer


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        raise ValueError("a key is given twice")
    return table


def _no_constant(text: str) -> None:
    raise ValueError(f"{text} is not JSON")
