"""Wan's modules by the names of its authors, which kohya's scripts (musubi) and ComfyUI call its LoRA by.

    blocks.3.attn1.to_q   blocks.3.self_attn.q     likewise k and v; to_out.0 is o
    blocks.3.attn2.to_q   blocks.3.cross_attn.q    add_k_proj is k_img

Source: Wan-Video/Wan2.1's modules; diffusers' convert_wan_to_diffusers.py and lora_conversion_utils.py.
"""

import re
from collections.abc import Mapping

from flora.errors import Unsupported
from flora.lowrank import LowRank

ARCHITECTURE = "WanTransformer3DModel"

_ATTENTION = {"to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "o", "add_k_proj": "k_img", "add_v_proj": "v_img"}
_IN_BLOCK = {
    **{f"attn1.{ours}": f"self_attn.{theirs}" for ours, theirs in _ATTENTION.items()},
    **{f"attn2.{ours}": f"cross_attn.{theirs}" for ours, theirs in _ATTENTION.items()},
    "ffn.net.0.proj": "ffn.0",
    "ffn.net.2": "ffn.2",
}
_AROUND = {
    "patch_embedding": "patch_embedding",
    "condition_embedder.time_embedder.linear_1": "time_embedding.0",
    "condition_embedder.time_embedder.linear_2": "time_embedding.2",
    "condition_embedder.time_proj": "time_projection.1",
    "condition_embedder.text_embedder.linear_1": "text_embedding.0",
    "condition_embedder.text_embedder.linear_2": "text_embedding.2",
    "condition_embedder.image_embedder.ff.net.0.proj": "img_emb.proj.1",
    "condition_embedder.image_embedder.ff.net.2": "img_emb.proj.3",
    "proj_out": "head.head",
}
_BLOCK = re.compile(r"(?P<home>blocks\.\d+\.)(?P<rest>.+)", re.ASCII)


def by_authors_names(factors: Mapping[str, LowRank]) -> dict[str, LowRank]:
    """The same factors by the authors' names. Raises Unsupported: a module that Wan does not have."""
    return {_renamed(name): own for name, own in factors.items()}


def _renamed(name: str) -> str:
    block = _BLOCK.fullmatch(name)
    found = _IN_BLOCK.get(block["rest"]) if block else _AROUND.get(name)
    if found is None:
        raise Unsupported(f"{name} has no name among Wan's own", fix="export it with --format diffusers", tensor=name)
    return block["home"] + found if block else found
