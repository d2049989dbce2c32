"""What a tensor is, by name and shape: a weight that can become factors, a vector to carry whole, or neither."""

import re
from collections.abc import Set
from dataclasses import dataclass
from typing import Any

from flora.forms import Kind, is_expert

EMBEDDINGS = (
    "embed_tokens",
    "wte",
    "word_embeddings",
    "embed_in",
    "tok_embeddings",
    "shared",
    "token_embedding",
    "embeddings",
)
HEADS = ("lm_head", "embed_out", "output", "vocab_projector", "generator_lm_head")
HEAD_PATHS = ("cls.predictions.decoder", "predictions.decoder", "lm_head.decoder")  # of encoders' masked-word heads
CONV1D_MODELS = ("gpt2", "openai-gpt", "imagegpt")  # their Conv1D keeps its weight as [in, out]
CONV1D_LAYERS = ("c_attn", "c_proj", "c_fc", "q_attn")
STRIDE_READERS = ("whisper",)
POSITIONS = "embed_positions"  # a table whose layer looks up by other than what it is given
POSITION_READERS = (  # whose code reads that table past its layer
    "whisper",
    "qwen2_audio",
    "voxtral",
    "audioflamingo3",
    "musicflamingo",
    "moss_transcribe_diarize",
)
READ_PAST = {  # projections of state-space layers, whose weight the code reads past the layer, so LoRA would be lost
    "dt_proj": ("mamba", "falcon_mamba", "jamba"),
    "out_proj": ("mamba", "mamba2", "falcon_mamba", "falcon_h1", "nemotron_h"),  # while training: PEFT refuses it
}
ROUTERS = (".gate", ".router", ".router.layer")
_STACKS = (".input_linear.weight", ".output_linear.weight")  # of experts, where their name does not say so
TIED_HEADS = {  # where a tied head of no tensor of its own stands in the module tree; lm_head if not named here
    "bert": "cls.predictions.decoder",
    "albert": "predictions.decoder",
    "roberta": "lm_head.decoder",
    "xlm-roberta": "lm_head.decoder",
    "distilbert": "vocab_projector",
    "electra": "generator_lm_head",
    "gpt_neox": "embed_out",
    "biogpt": "output_projection",
    "blip-2": "language_model.lm_head",
    "instructblip": "language_model.lm_head",
    "whisper": "proj_out",
}
_LANGUAGE = "language_model."
_TABLE = re.compile(r"(?:word|token|token_type|position|class|time|label)_embeddings?|wpe|wte")
_HEADED = re.compile(r"ForCausalLM|LMHead|ForConditionalGeneration|ForMaskedLM|ForSpeechSeq2Seq|ForPreTraining")


@dataclass(frozen=True, slots=True)
class Wish:
    """What to extract beside the linear layers of the body, the only ones that every server of adapters takes."""

    embeddings: bool = False  # tables and output heads, as factors
    vectors: bool = False  # norms and biases, whole
    routers: bool = False  # of experts, as factors


DEFAULT_WISH = Wish()


@dataclass(frozen=True, slots=True)
class Finding:
    """What becomes of one tensor: factors of that kind, a whole copy, or nothing for a reason in words."""

    kind: Kind | None = None
    is_vector: bool = False
    reason: str | None = None


def classify(name: str, shape: tuple[int, ...], model_type: str, names: Set[str]) -> Finding:
    """What a tensor of both sides is that is no buffer.

    names  of every tensor of the pair
    """
    leaf = leaf_of(name)
    if is_table(name, shape):
        return Finding("embedding")
    if _is_fused(name, shape):
        return Finding(reason=f"several experts in one tensor, whose layout in {model_type} is not known here")
    if ".experts." in name and name.endswith("_bias") and len(shape) == 2:
        return Finding(is_vector=True, reason="biases of all experts, a row each: they have no LoRA form")
    if name.endswith(".bias") and is_expert(name.removesuffix(".bias")):
        return Finding(reason="a bias of one expert, which libraries keep in one tensor with those of the others")
    if len(shape) == 2 and _is_router(name, names):
        return Finding("parameter")
    if len(shape) == 1 and f"{name.rpartition('.')[0]}.running_mean" in names:
        return Finding(reason="a norm with statistics of its own, without which PEFT carries none of it")
    if len(shape) < 2:
        return Finding(is_vector=len(shape) == 1 and name.endswith((".weight", ".bias")), reason=_vector(name, leaf))
    if not name.endswith(".weight"):
        return Finding(reason="a parameter outside any layer that has a LoRA form")
    if leaf == POSITIONS:
        if model_type in POSITION_READERS:
            return Finding(reason=f"a table of positions that {model_type}'s code reads past its layer")
        return Finding("parameter")
    if len(shape) > 2:
        return _classify_conv(name, shape, model_type)
    if model_type in CONV1D_MODELS and leaf in CONV1D_LAYERS:
        return Finding("conv1d")
    if model_type in READ_PAST.get(leaf, ()):
        return Finding(reason=f"a projection whose weight {model_type}'s code reads past its layer")
    return Finding("linear")


def reason_not_wished(name: str, kind: Kind, names: Set[str], wish: Wish) -> str | None:
    """Why factors of this tensor are not made unless asked for; None if they are."""
    if kind == "parameter" and _is_router(name, names):
        return None if wish.routers else "a router: only --routers extracts it"
    if wish.embeddings:
        return None
    if is_embedding(name):
        tied = not any(is_head(other) for other in names)
        return "the token embedding" + (", tied to the output head" if tied else "") + ": only --embeddings extracts it"
    if is_head(name):
        return "the output head: only --embeddings extracts it"
    is_table = kind == "embedding" or leaf_of(name) == POSITIONS
    return "an embedding: only --embeddings extracts it" if is_table else None


def tied_heads(embedding: str, model_type: str, config: dict[str, Any], names: Set[str]) -> tuple[str, ...]:
    """Modules that use the weight of tensor `embedding` and have none of their own in the files.

    names  of every tensor of the base
    """
    module = embedding.removesuffix(".weight")
    if not is_embedding(embedding):
        return ()
    if module.rpartition(".")[2] == "shared":  # T5 and BART: encoder and decoder each look tokens up in it
        stem = module.removesuffix("shared")
        tables = tuple(f"{stem}{side}.embed_tokens" for side in ("encoder", "decoder"))
        tables = tuple(table for table in tables if f"{table}.weight" not in names)
    else:
        tables = ()
    architecture = str((config.get("architectures") or [""])[0])
    has_head = any(is_head(name) for name in names)
    if has_head or not _HEADED.search(architecture) or config.get("tie_word_embeddings") is False:
        return tables
    head = TIED_HEADS.get(model_type, "lm_head")
    if head.startswith(_LANGUAGE) and not embedding.startswith(_LANGUAGE):
        return tables  # the table of a part that reads questions, as InstructBLIP's
    return (*tables, head)


def is_embedding(name: str) -> bool:
    """Whether this is the table that turns token ids into vectors."""
    return name.endswith(".weight") and leaf_of(name) in EMBEDDINGS


def is_table(name: str, shape: tuple[int, ...]) -> bool:
    """Whether this is any table that is looked up by an index: tokens, positions, kinds of token."""
    if len(shape) != 2 or not name.endswith(".weight"):
        return False
    return is_embedding(name) or leaf_of(name) == "relative_attention_bias" or bool(_TABLE.fullmatch(leaf_of(name)))


def is_head(name: str) -> bool:
    """Whether this is the weight that turns the last hidden state into logits; it is never inside a layer."""
    if not name.endswith(".weight"):
        return False
    return (leaf_of(name) in HEADS and name.count(".") <= 2) or name.removesuffix(".weight") in HEAD_PATHS


def leaf_of(name: str) -> str:
    """The module's own name: `q_proj` of `model.layers.0.self_attn.q_proj.weight`."""
    return name.rpartition(".")[0].rpartition(".")[2]


def _vector(name: str, leaf: str) -> str:
    if name.endswith(".bias"):
        return "a bias: a vector has no low rank"
    return "a norm's weight: a vector has no low rank" if "norm" in name or leaf.startswith("ln") else "a vector"


def _classify_conv(name: str, shape: tuple[int, ...], model_type: str) -> Finding:
    if len(shape) > 5:
        return Finding(reason=f"a {len(shape)}-dimensional parameter, not a matrix")
    if "transpose" in leaf_of(name) or "deconv" in leaf_of(name):
        return Finding(reason="a transposed convolution: it has no LoRA form")
    if shape[1] == 1:
        return Finding(reason="a convolution of one channel each: too small for two factors")
    if model_type in STRIDE_READERS:
        return Finding(
            reason=f"a convolution whose stride {model_type}'s code reads: a LoRA layer in its place has none"
        )
    return Finding("conv")


def _is_fused(name: str, shape: tuple[int, ...]) -> bool:
    """Whether this holds the matrices of several experts: they have been taken apart where that is possible."""
    if len(shape) == 3 and (name.endswith(_STACKS) or ".moe." in name):
        return True
    return ".experts." in name and len(shape) >= 2 and (len(shape) > 2 or not name.endswith((".weight", "_bias")))


def _is_router(name: str, names: Set[str]) -> bool:
    """Whether this weight gives each token to experts: PEFT finds no linear layer there, and adapts the parameter."""
    module = name.removesuffix(".weight")
    end = next((end for end in ROUTERS if module.endswith(end)), None)
    return end is not None and any(other.startswith(f"{module.removesuffix(end)}.experts.") for other in names)
