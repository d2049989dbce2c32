"""Buffers: what a checkpoint keeps beside its weights and no training tunes, such as masks and positions."""

_DERIVED = (".masked_bias", "rotary_emb.inv_freq", "position_ids")
_MASKS = (".attn.bias", ".attention.bias")  # of GPT-2, GPT-Neo and GPT-NeoX; a bias of that name is a vector elsewhere


def is_derived(name: str, shape: tuple[int, ...]) -> bool:
    """Whether a library makes this tensor by itself when it builds the model.

    Older versions of it stored such tensors and newer ones do not: a checkpoint without them lacks nothing.
    """
    if name.endswith(_DERIVED):
        return True
    return name.endswith(_MASKS) and len(shape) == 4 and shape[:2] == (1, 1) and shape[2] == shape[3]
