"""What a base is, read from its config.json: the dimensions of a Llama, Mistral, Qwen2 or Qwen3 decoder. No torch."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from flora.errors import CheckpointError, UsageError

ARCHITECTURES = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
}
RopeKind = Literal["default", "linear", "llama3"]


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """How fast each pair of a head's elements turns with the position."""

    theta: float
    kind: RopeKind = "default"
    factor: float = 1.0  # linear, llama3: the context is this many times the original
    low_freq_factor: float = 1.0  # llama3: wavelengths above original_context / this are stretched in full
    high_freq_factor: float = 4.0  # llama3: wavelengths below original_context / this are left alone
    original_context: int = 8192  # llama3: tokens


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """The dimensions of one decoder; every head and feature count is the whole model's."""

    architecture: str
    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_positions: int  # tokens that the model was made for
    rms_norm_eps: float
    rope: RopeConfig
    tied: bool  # the head is the embedding's matrix
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    qk_norm: bool  # Qwen3: RMSNorm over each head of q and k, before rope

    @property
    def q_size(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        return self.num_kv_heads * self.head_dim

    def module_shape(self, module: str) -> tuple[int, int]:
        """(in_features, out_features) of one of flora.kernels.MODULES."""
        return {
            "q": (self.hidden_size, self.q_size),
            "k": (self.hidden_size, self.kv_size),
            "v": (self.hidden_size, self.kv_size),
            "o": (self.q_size, self.hidden_size),
            "gate": (self.hidden_size, self.intermediate_size),
            "up": (self.hidden_size, self.intermediate_size),
            "down": (self.intermediate_size, self.hidden_size),
        }[module]


def parse_model_config(config: Mapping[str, Any]) -> ModelConfig:
    """The dimensions that a config.json tells. Raises CheckpointError for a model that this server cannot run."""
    kind = _model_kind(config)
    for name, neutral in (("quantization_config", None), ("partial_rotary_factor", 1.0), ("hidden_act", "silu")):
        if config.get(name, neutral) not in (neutral, None):
            raise CheckpointError(
                f"config.json says {name} = {str(config[name])[:80]}, which this server cannot run",
                fix="serve a plain float checkpoint of Llama, Mistral, Qwen2 or Qwen3",
            )
    try:
        num_heads, hidden_size = int(config["num_attention_heads"]), int(config["hidden_size"])
        attention_bias = bool(config.get("attention_bias", False))
        parsed = ModelConfig(
            architecture=next(name for name, known in ARCHITECTURES.items() if known == kind),
            num_layers=int(config["num_hidden_layers"]),
            hidden_size=hidden_size,
            intermediate_size=int(config["intermediate_size"]),
            num_heads=num_heads,
            num_kv_heads=int(config.get("num_key_value_heads") or num_heads),
            head_dim=int(config.get("head_dim") or (128 if kind == "qwen3" else hidden_size // num_heads)),
            vocab_size=int(config["vocab_size"]),
            max_positions=int(config.get("max_position_embeddings", 2048)),
            rms_norm_eps=float(config.get("rms_norm_eps", 1e-6)),
            rope=_parse_rope(config),
            tied=bool(config.get("tie_word_embeddings", False)),
            qkv_bias=kind == "qwen2" or (kind in ("llama", "qwen3") and attention_bias),
            o_bias=kind in ("llama", "qwen3") and attention_bias,
            mlp_bias=kind == "llama" and bool(config.get("mlp_bias", False)),
            qk_norm=kind == "qwen3",
        )
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"config.json does not describe a {kind} model", cause=repr(error)) from error
    if parsed.num_heads % parsed.num_kv_heads or parsed.head_dim % 2:
        raise CheckpointError(
            f"config.json gives {parsed.num_heads} query heads, {parsed.num_kv_heads} key heads, each of "
            f"{parsed.head_dim} elements",
            cause="every key head serves the same number of query heads, and rope turns pairs of elements",
        )
    return parsed


def resolve_max_context(config: ModelConfig, raw: Mapping[str, Any], asked: int | None, pool_tokens: int) -> int:
    """Tokens of prompt and answer together: what was asked, or the least of model, attention window and pool.

    Raises UsageError where more was asked than one of them holds.
    """
    limits = {
        "the model's positions (max_position_embeddings)": config.max_positions,
        "the pool": pool_tokens,
    }
    window = _sliding_window(raw)
    if window is not None:
        limits["the sliding attention window, which this server does not apply"] = window
    if asked is None:
        return min(limits.values())
    for name, limit in limits.items():
        if asked > limit:
            raise UsageError(f"a context of {asked} tokens is more than {name} holds: {limit}", fix=f"ask for {limit}")
    return asked


def _model_kind(config: Mapping[str, Any]) -> str:
    architectures = config.get("architectures") or []
    for name in architectures:
        if name in ARCHITECTURES:
            return ARCHITECTURES[name]
    if not architectures and config.get("model_type") in ARCHITECTURES.values():
        return str(config["model_type"])
    found = ", ".join(map(str, architectures)) or config.get("model_type") or "no architecture"
    raise CheckpointError(
        f"config.json names {found}, which this server cannot run", fix=f"it runs {', '.join(ARCHITECTURES)}"
    )


def _parse_rope(config: Mapping[str, Any]) -> RopeConfig:
    """rope_theta lies at the top of older files; newer ones hold it in rope_parameters, with the scaling."""
    scaling = config.get("rope_parameters") or config.get("rope_scaling") or {}
    theta = float(scaling.get("rope_theta") or config.get("rope_theta") or 10000.0)
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    if kind == "default":
        return RopeConfig(theta)
    if kind == "linear":
        return RopeConfig(theta, "linear", factor=float(scaling["factor"]))
    if kind == "llama3":
        return RopeConfig(
            theta,
            "llama3",
            factor=float(scaling["factor"]),
            low_freq_factor=float(scaling["low_freq_factor"]),
            high_freq_factor=float(scaling["high_freq_factor"]),
            original_context=int(scaling["original_max_position_embeddings"]),
        )
    raise CheckpointError(
        f"config.json scales rope as {kind!r}, which this server cannot run", fix="it runs default, linear and llama3"
    )


def _sliding_window(config: Mapping[str, Any]) -> int | None:
    """Tokens that a layer looks back, where any layer is so limited."""
    window = config.get("sliding_window")
    if window is None or not config.get("use_sliding_window", _model_kind(config) == "mistral"):
        return None
    kinds = config.get("layer_types")
    return int(window) if kinds is None or "sliding_attention" in kinds else None
