"""What a tensor is, by name and shape: the weight of a linear layer, or something that has no such factors."""

from collections.abc import Set

from flora.checkpoint import FLOAT_DTYPES

EMBEDDINGS = ("embed_tokens", "wte", "word_embeddings", "embed_in", "tok_embeddings", "shared")
HEADS = ("lm_head", "embed_out", "output")
CONV1D_MODELS = ("gpt2", "openai-gpt", "imagegpt")  # their Conv1D keeps its weight as [in, out]
CONV1D_LAYERS = ("c_attn", "c_proj", "c_fc", "q_attn")


def reason_against(name: str, shape: tuple[int, ...], dtypes: Set[str], model_type: str, names: Set[str]) -> str | None:
    """Why this tensor cannot become factors of a linear layer, in words for the report; None if it can.

    dtypes  of both sides, in safetensors' words;  names  of every tensor of the pair
    """
    leaf = leaf_of(name)
    if not dtypes <= set(FLOAT_DTYPES):
        return "a buffer of whole numbers, not a weight"
    if is_embedding(name):
        tied = not any(is_head(other) for other in names)
        return "the token embedding" + (", tied to the output head" if tied else "") + ": a table, not a linear layer"
    if is_head(name):
        return "the output head: only the linear layers of the body are extracted"
    if "embed" in leaf or leaf in ("wpe", "relative_attention_bias"):
        return "an embedding: a table, not a linear layer"
    if name.endswith(".bias"):
        return "a bias: a vector has no low rank"
    if len(shape) < 2:
        return "a norm's weight: a vector has no low rank" if "norm" in name or leaf.startswith("ln") else "a vector"
    if ".experts." in name:
        return "expert weights: the module tree holds them fused in one 3-D parameter"
    if leaf in ("gate", "router") and any(other.startswith(f"{_parent(name)}.experts.") for other in names):
        return "the router of a mixture of experts: no linear layer in the module tree"
    if len(shape) > 2:
        return f"a {len(shape)}-dimensional parameter, not a matrix"
    if not name.endswith(".weight"):
        return "a parameter outside any linear layer"
    if model_type in CONV1D_MODELS and leaf in CONV1D_LAYERS:
        return "a Conv1D layer: its weight lies transposed, [in, out]"
    return None


def is_embedding(name: str) -> bool:
    """Whether this is the table that turns token ids into vectors."""
    return name.endswith(".weight") and leaf_of(name) in EMBEDDINGS


def is_head(name: str) -> bool:
    """Whether this is the weight that turns the last hidden state into logits; it is never inside a layer."""
    return name.endswith(".weight") and leaf_of(name) in HEADS and name.count(".") <= 2


def leaf_of(name: str) -> str:
    """The module's own name: `q_proj` of `model.layers.0.self_attn.q_proj.weight`."""
    return name.rpartition(".")[0].rpartition(".")[2]


def _parent(name: str) -> str:
    return name.rpartition(".")[0].rpartition(".")[0]
