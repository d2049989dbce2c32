"""Flux's modules by the names of its authors, which kohya's scripts and ComfyUI call its LoRA by.

    transformer_blocks.3.attn.to_q, .to_k, .to_v                     double_blocks.3.img_attn.qkv
    transformer_blocks.3.attn.add_q_proj, .add_k_proj, .add_v_proj   double_blocks.3.txt_attn.qkv
    single_transformer_blocks.3.attn.to_q, .to_k, .to_v, .proj_mlp   single_blocks.3.linear1

Layers that diffusers takes apart are one there. Factors of the parts are joined without loss: their rows of A one below
the other, B block-diagonal, all at the rank of the largest; so the joined rank is that times the number of parts, and
diffusers, which looks for these blocks, takes them apart again. The last layer's shift and scale trade places.

Source: black-forest-labs/flux's modules; diffusers' convert_flux_to_diffusers.py and lora_conversion_utils.py.
"""

import re
from collections.abc import Mapping, Sequence

import torch

from flora.errors import Unsupported
from flora.lowrank import LowRank, pad
from flora.registry.formats.kinds import kind_of

ARCHITECTURE = "FluxTransformer2DModel"

_DOUBLE = {
    "attn.to_out.0": "img_attn.proj",
    "attn.to_add_out": "txt_attn.proj",
    "ff.net.0.proj": "img_mlp.0",
    "ff.net.2": "img_mlp.2",
    "ff_context.net.0.proj": "txt_mlp.0",
    "ff_context.net.2": "txt_mlp.2",
    "norm1.linear": "img_mod.lin",
    "norm1_context.linear": "txt_mod.lin",
}
_SINGLE = {"proj_out": "linear2", "norm.linear": "modulation.lin"}
_AROUND = {
    "x_embedder": "img_in",
    "context_embedder": "txt_in",
    "time_text_embed.timestep_embedder.linear_1": "time_in.in_layer",
    "time_text_embed.timestep_embedder.linear_2": "time_in.out_layer",
    "time_text_embed.text_embedder.linear_1": "vector_in.in_layer",
    "time_text_embed.text_embedder.linear_2": "vector_in.out_layer",
    "time_text_embed.guidance_embedder.linear_1": "guidance_in.in_layer",
    "time_text_embed.guidance_embedder.linear_2": "guidance_in.out_layer",
    "norm_out.linear": "final_layer.adaLN_modulation.1",
    "proj_out": "final_layer.linear",
}
_JOINED_DOUBLE = {
    "img_attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "txt_attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
}
_JOINED_SINGLE = {"linear1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")}
_SWAPPED = "norm_out.linear"  # its rows are scale and shift, its authors' shift and scale
_BLOCK = re.compile(r"(?P<single>single_)?transformer_blocks\.(?P<index>\d+)\.(?P<rest>.+)", re.ASCII)


def by_authors_names(factors: Mapping[str, LowRank], widths: Mapping[str, int]) -> dict[str, LowRank]:
    """The factors of the layers as Flux's authors have them, by their names.

    factors  by diffusers' names, scale 1
    widths   out_features by kind of module (`kinds.kind_of`), as far as they are known: of parts that lack factors
    Raises Unsupported: a module that Flux does not have, or a part without factors whose width is not known.
    """
    found: dict[str, LowRank] = {}
    joined: dict[str, tuple[str, ...]] = {}
    for name, own in factors.items():
        block = _BLOCK.fullmatch(name)
        if block is None:
            found[_renamed(name, name, "", _AROUND)] = _swap_halves(own) if name == _SWAPPED else own
            continue
        names, whole = (_SINGLE, _JOINED_SINGLE) if block["single"] else (_DOUBLE, _JOINED_DOUBLE)
        home = f"{'single' if block['single'] else 'double'}_blocks.{block['index']}."
        layer = next((layer for layer, parts in whole.items() if block["rest"] in parts), None)
        if layer is None:
            found[_renamed(name, block["rest"], home, names)] = own
        else:
            stem = name.removesuffix(block["rest"])
            joined[home + layer] = tuple(stem + part for part in whole[layer])
    return found | {layer: _join(parts, factors, widths) for layer, parts in joined.items()}


def _renamed(name: str, rest: str, home: str, names: Mapping[str, str]) -> str:
    if rest not in names:
        raise Unsupported(f"{name} has no name among Flux's own", fix="export it with --format diffusers", tensor=name)
    return home + names[rest]


def _swap_halves(factors: LowRank) -> LowRank:
    first, second = factors.B.chunk(2)
    return LowRank(A=factors.A, B=torch.cat((second, first)), scale=factors.scale)


def _join(parts: Sequence[str], factors: Mapping[str, LowRank], widths: Mapping[str, int]) -> LowRank:
    """One pair for the layer whose rows are those of its parts, one below the other."""
    present = [factors[part] for part in parts if part in factors]
    rank = max(part.rank for part in present)
    own = [pad(factors[part] if part in factors else _zeros(part, present[0], widths), rank) for part in parts]
    B = torch.block_diag(*(part.B for part in own)).to(present[0].B.dtype)
    return LowRank(A=torch.cat([part.A for part in own]), B=B, scale=1.0)


def _zeros(part: str, neighbor: LowRank, widths: Mapping[str, int]) -> LowRank:
    """Factors of rank 0."""
    width = widths.get(kind_of(part))
    if width is None:
        raise Unsupported(
            f"{part} has no factors, and its width is not on record",
            cause="by Flux's own names it is one layer with its neighbors, and its rows lie between theirs",
            fix="export it with --format diffusers",
            tensor=part,
        )
    return LowRank(A=neighbor.A[:0], B=neighbor.B.new_zeros(width, 0), scale=1.0)
