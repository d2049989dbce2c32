"""The portable profile: one rank, alpha = rank, every layer of an adapted kind of module present, and its partners.

Engines that know no per-module ranks read this one right: SGLang and LoRAX want one rank, LoRAX drops a kind of module
that lacks a layer, SGLang joins q, k, v and gate, up, llama.cpp takes alpha over each tensor's own rank. Padding is
zeros, so the product is the same.
"""

from collections.abc import Iterable, Mapping

import torch

from flora.adapter import Adapter, make_adapter
from flora.forms import LINEAR, Form
from flora.lowrank import LowRank, pad
from flora.registry.formats.kinds import kind_of
from flora.registry.formats.padding import Padding, padding_of, portable_rank


def fold_scales(adapter: Adapter) -> Adapter:
    """The adapter with each scale multiplied into B, rounded to B's dtype; itself if there is none to fold.

    fp8 becomes bf16, which holds the same numbers and their scales.
    """
    if all(lowrank.scale == 1 for lowrank in adapter.factors.values()):
        return adapter
    folded = {name: _fold(lowrank) for name, lowrank in adapter.factors.items()}
    header = adapter.header
    return make_adapter(
        folded,
        header.base,
        header.recipe,
        adapter.report,
        adapter.extras,
        header.bench_salt,
        forms=header.forms,
        exact=adapter.exact,
        first_rows=header.first_rows,
    )


def _fold(factors: LowRank) -> LowRank:
    dtype = torch.bfloat16 if factors.B.dtype == torch.float8_e4m3fn else factors.B.dtype
    return LowRank(A=factors.A.to(dtype), B=(factors.B.float() * factors.scale).to(dtype))


def pad_portable(adapter: Adapter, paths: Mapping[str, str] | None = None) -> dict[str, LowRank]:
    """The factors of the portable profile, of rank `portable_rank`: those of `pad_factors`, and their partners.

    paths  of modules that the adapter has under another name than its report
    """
    rank = portable_rank(adapter.header)
    found = padding_of(adapter.header, adapter.report, paths)
    padded = pad_factors(adapter, rank, found)
    if found.partners:
        some = next(iter(padded.values()))
        padded |= {name: _zeros(some, shape) for name, shape in found.partners.items()}
    return padded


def pad_factors(adapter: Adapter, rank: int | None = None, padding: Padding | None = None) -> dict[str, LowRank]:
    """Factors of one rank for every layer of each kind of module that the adapter has; where it has none, zeros.

    rank  the largest of the adapter's, if none is given;  padding  as the adapter's own report has it, likewise
    """
    rank = adapter.header.max_rank if rank is None else rank
    found = padding_of(adapter.header, adapter.report) if padding is None else padding
    padded = {name: pad(lowrank, rank) for name, lowrank in adapter.factors.items()}
    siblings = {kind_of(name): lowrank for name, lowrank in padded.items()}
    for name, shape in found.layers.items():
        padded[name] = _zeros(siblings[kind_of(name)], shape)
    return padded


def pad_forms(adapter: Adapter, names: Iterable[str]) -> dict[str, Form]:
    """What each module of the padded factors is: what the other layers' modules of its kind are, or linear."""
    forms = adapter.header.forms
    by_kind = {kind_of(name): form for name, form in forms.items()}
    return {name: forms.get(name) or by_kind.get(kind_of(name), LINEAR) for name in names}


def _zeros(sibling: LowRank, shape: tuple[int, int]) -> LowRank:
    out_features, in_features = shape
    return LowRank(
        A=torch.zeros(sibling.rank, in_features, dtype=sibling.A.dtype),
        B=torch.zeros(out_features, sibling.rank, dtype=sibling.B.dtype),
    )
