"""The adapters of one merge: whether they fit together and to the base, and what each brings to every module."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from flora.adapter import Adapter, Module
from flora.algebra.combine import Term
from flora.algebra.places import tensor_name
from flora.checkpoint import Checkpoint
from flora.errors import BaseMismatch, Unsupported, UsageError
from flora.identity import BaseRecord


@dataclass(frozen=True, slots=True, eq=False)
class Part:
    """One adapter of a merge."""

    adapter: Adapter
    weight: float = 1.0
    digest: str | None = None  # version digest, for the lineage; None: it has none yet
    label: str = "adapter"  # in messages


def check_parts(parts: Sequence[Part], record: BaseRecord, base: Checkpoint) -> None:
    """Raises BaseMismatch unless every part belongs to the base of `record`, and their modules agree in shape."""
    hashes = record.hashes()
    modules: dict[str, Module] = {}
    for part in parts:
        strange = next((n for n, sha256 in part.adapter.header.base.touched.items() if hashes.get(n) != sha256), None)
        if strange is not None:
            raise BaseMismatch(
                f"{part.label} was made for another base: {strange} of {base.path} is not its tensor",
                cause=f"it records base {part.adapter.header.base.base_id}; this checkpoint is {record.base_id}",
                fix=f"give the base that it was made for, {part.adapter.header.base.name}",
            )
        grown = next((tensor for tensor in part.adapter.header.exact_tensors if tensor.first_row is not None), None)
        if grown is not None:
            raise Unsupported(
                f"{part.label} carries {grown.shape[0]} rows of new tokens for {grown.name}, which the base has not",
                fix="load it with PEFT on a base whose embeddings were resized",
                tensor=grown.name,
            )
        for module in part.adapter.header.modules:
            other = modules.setdefault(module.name, module)
            shapes = [(one.out_features, one.in_features, one.form) for one in (other, module)]
            if shapes[0] != shapes[1]:
                raise BaseMismatch(
                    f"{module.name} is {list(shapes[1][:2])} in {part.label}, {list(shapes[0][:2])} in another",
                    cause="these adapters are not of one base, or one treats the layer otherwise",
                    fix="merge adapters of one base",
                )
            tensor_name(module, base.tensors)


def check_weights(weights: Sequence[float], num_parts: int) -> list[float]:
    """One weight for each part; 1 each if none is given. Raises UsageError."""
    if weights and len(weights) != num_parts:
        raise UsageError(
            f"{len(weights)} weights are given for {num_parts} adapters", fix="give --weight once for each, in order"
        )
    if any(weight == 0 or weight != weight or abs(weight) == float("inf") for weight in weights):
        raise UsageError("a weight of an adapter is zero or no number", fix="leave that adapter out")
    return list(weights) or [1.0] * num_parts


def modules_of(parts: Sequence[Part]) -> dict[str, Module]:
    """Every module of any part, by name."""
    modules = {module.name: module for part in reversed(parts) for module in part.adapter.header.modules}
    return {name: modules[name] for name in sorted(modules)}


def terms_of(parts: Sequence[Part]) -> dict[str, list[Term]]:
    terms: dict[str, list[Term]] = {}
    for part in parts:
        for name, factors in part.adapter.factors.items():
            terms.setdefault(name, []).append(Term(factors, part.weight))
    return terms


def merge_exact(parts: Sequence[Part], base: Checkpoint) -> dict[str, Tensor]:
    """Tensors that parts carry whole: base + Σ weight * (whole - base), rounded once to the first one's dtype."""
    names = sorted({name for part in parts for name in part.adapter.exact})
    merged = {}
    for name in names:
        before = base.load(name).double()
        total, holders = before.clone(), [part for part in parts if name in part.adapter.exact]
        for part in holders:
            total += part.weight * (part.adapter.exact[name].double() - before)
        merged[name] = total.to(holders[0].adapter.exact[name].dtype)
    return merged


def merge_extras(parts: Sequence[Part]) -> tuple[dict[str, bytes], list[str]]:
    """Templates and end tokens: the first part's that has any; and a note where another's differ."""
    extras: dict[str, bytes] = {}
    owners: dict[str, Part] = {}
    notes = []
    for part in parts:
        for name, data in part.adapter.extras.items():
            if extras.setdefault(name, data) != data:
                notes.append(f"{name} of {part.label} differs from that of {owners[name].label}, which is kept")
            owners.setdefault(name, part)
    return extras, notes
