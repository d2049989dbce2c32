"""Buffers: what a checkpoint keeps beside its weights and no training tunes, such as masks, positions and counters.

Whether a buffer differs is told, but not by how much: a thousand steps counted are no change of a thousand.
"""

from collections.abc import Set

from flora.checkpoint import FLOAT_DTYPES

_DERIVED = (".masked_bias", "rotary_emb.inv_freq", "position_ids")
_MASKS = (".attn.bias", ".attention.bias")  # of GPT-2, GPT-Neo and GPT-NeoX; a bias of that name is a vector elsewhere


def buffer_reason(name: str, shape: tuple[int, ...], dtypes: Set[str]) -> str | None:
    """Why a tensor is a buffer; None of a weight.

    dtypes  of the sides that have it, in safetensors' words
    """
    if not dtypes <= set(FLOAT_DTYPES):
        return "a buffer of whole numbers, not a weight"
    return "a buffer that its library makes by itself, not a weight" if is_derived(name, shape) else None


def is_derived(name: str, shape: tuple[int, ...]) -> bool:
    """Whether a library makes this tensor by itself when it builds the model.

    Older versions of it stored such tensors and newer ones do not: a checkpoint without them lacks nothing.
    """
    if name.endswith(_DERIVED):
        return True
    return name.endswith(_MASKS) and len(shape) == 4 and shape[:2] == (1, 1) and shape[2] == shape[3]
