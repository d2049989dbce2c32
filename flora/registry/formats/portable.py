"""The portable profile: one rank, alpha = rank, every layer of an adapted kind of module present.

Engines that know no per-module ranks read this one right: SGLang and LoRAX want one rank, LoRAX drops a kind of module
that lacks a layer, llama.cpp takes alpha over each tensor's own rank. Padding is zeros, so the product is the same.
"""

import re
from collections.abc import Iterable, Mapping
from itertools import product

import torch

from flora.adapter import Adapter, ChangeReport, make_adapter
from flora.forms import LINEAR, Form
from flora.lowrank import LowRank, pad

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")  # a layer's or an expert's index within a module path


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
    siblings = {_kind(name): lowrank for name, lowrank in padded.items()}
    for name in _expected_modules(adapter.factors, shapes):
        if name not in padded:
            is_linear = pad_forms(adapter, [name])[name] == LINEAR  # others' tensors are no such matrices
            padded[name] = _zeros_like(siblings[_kind(name)], shapes.get(name) if is_linear else None)
    return padded


def pad_forms(adapter: Adapter, names: Iterable[str]) -> dict[str, Form]:
    """What each module of the padded factors is: what the other layers' modules of its kind are."""
    forms = adapter.header.forms
    by_kind = {_kind(name): form for name, form in forms.items()}
    return {name: forms.get(name) or by_kind[_kind(name)] for name in names}


def _expected_modules(present: Iterable[str], known: Iterable[str]) -> set[str]:
    """Every module of the kinds in `present`: those that the report knows, and all combinations of indices seen."""
    present = set(present)
    kinds = {_kind(name) for name in present}
    expected = {name for name in known if _kind(name) in kinds}
    layers: dict[str, set[str]] = {}  # of each stack, such as `model.layers.`
    for name in present:
        if match := _NUMBER.search(name):
            layers.setdefault(name[: match.start()], set()).add(match.group())
    for kind in kinds:
        members = [_NUMBER.findall(name) for name in present if _kind(name) == kind]
        stem, *pieces = kind.split("*")
        if pieces:
            inner = [sorted({indices[i] for indices in members}) for i in range(1, len(pieces))]
            for indices in product(sorted(layers[stem]), *inner):
                expected.add(stem + "".join(index + piece for index, piece in zip(indices, pieces, strict=True)))
    return expected


def _kind(name: str) -> str:
    """The path with its indices as stars: model.layers.*.self_attn.q_proj."""
    return _NUMBER.sub("*", name)


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
