"""The portable profile: one rank, alpha = rank, every layer of an adapted kind of module present.

Engines that know no per-module ranks read this one right: SGLang and LoRAX want one rank, LoRAX drops a kind of module
that lacks a layer, llama.cpp takes alpha over each tensor's own rank. Padding is zeros, so the product is the same.
"""

from collections.abc import Iterable, Mapping

import torch

from flora.adapter import Adapter, ChangeReport, make_adapter
from flora.forms import EXPERT_KINDS, Form
from flora.lowrank import LowRank, pad
from flora.registry.formats.kinds import expected_modules, kind_of


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


def pad_factors(adapter: Adapter) -> dict[str, LowRank]:
    """Factors of one rank for every layer of each kind of module that the adapter has; where it has none, zeros."""
    rank = adapter.header.max_rank
    padded = {name: pad(lowrank, rank) for name, lowrank in adapter.factors.items()}
    shapes = _shapes(adapter.report)
    all_are_known = adapter.header.recipe.tuned_id is not None  # then the report lists whatever the base has
    siblings = {kind_of(name): lowrank for name, lowrank in padded.items()}
    for name in expected_modules(adapter.factors, shapes):
        kind = pad_forms(adapter, [name])[name].kind
        is_there = name in shapes or not all_are_known or kind != "linear"  # others' tensors are no such matrices
        if name not in padded and is_there and kind not in EXPERT_KINDS:  # a stack pads itself
            padded[name] = _zeros_like(siblings[kind_of(name)], shapes.get(name) if kind == "linear" else None)
    return padded


def pad_forms(adapter: Adapter, names: Iterable[str]) -> dict[str, Form]:
    """What each module of the padded factors is: what the other layers' modules of its kind are."""
    forms = adapter.header.forms
    by_kind = {kind_of(name): form for name, form in forms.items()}
    return {name: forms.get(name) or by_kind[kind_of(name)] for name in names}


def _shapes(report: ChangeReport | None) -> Mapping[str, tuple[int, ...]]:
    """[out, in] of every matrix that the report lists, by module: it lists the layers that did not change, too."""
    tensors = report.tensors if report else ()
    return {
        tensor.name.removesuffix(".weight"): tensor.shape
        for tensor in tensors
        if tensor.name.endswith(".weight") and len(tensor.shape) == 2
    }


def _zeros_like(sibling: LowRank, shape: tuple[int, ...] | None) -> LowRank:
    out_features, in_features = shape or (sibling.out_features, sibling.in_features)
    return LowRank(
        A=torch.zeros(sibling.rank, in_features, dtype=sibling.A.dtype),
        B=torch.zeros(out_features, sibling.rank, dtype=sibling.B.dtype),
    )
