"""Which tensor of the tuned checkpoint belongs to which of the base, and what becomes of it. Reads headers only."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Literal

from flora.checkpoint import Checkpoint, TensorInfo
from flora.errors import UsageError
from flora.extract.agreement import check_complete, check_dtypes, check_shapes
from flora.extract.aliases import named_as
from flora.extract.experts import expert_of
from flora.extract.kinds import (
    DEFAULT_WISH,
    Finding,
    Wish,
    classify,
    is_embedding,
    is_head,
    reason_not_wished,
    tied_heads,
)
from flora.extract.layers import classes_say
from flora.extract.pair import TensorPair
from flora.forms import is_expert, split_expert


def pair_tensors(
    base: Checkpoint,
    tuned: Checkpoint,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    wish: Wish = DEFAULT_WISH,
) -> tuple[list[TensorPair], list[str]]:
    """Every tensor of either checkpoint, paired and classified, by name; and notes on names that had to be mapped.

    include, exclude  globs over module and tensor names;  wish  what is wanted beside linear layers
    Raises ShapeMismatch, CheckpointError (the tuned checkpoint lacks tensors, or weights are not floating point),
    UsageError (a glob that matches nothing, or nothing left to extract).
    """
    pairs, notes = match_names(base.tensors, tuned.tensors)
    check_dtypes(pairs)  # first: quantized weights have other names and shapes, and would be taken for another model
    check_shapes(pairs, base, tuned, wish)
    check_complete(pairs, base, tuned)
    pairs = _select(_classify(pairs, base, wish), include, exclude)
    if not any(pair.status == "extractable" for pair in pairs):
        raise UsageError(
            f"nothing of {base.path} can be extracted",
            cause=f"most of it is: {_main_reasons(pairs)}",
            fix="give a model of linear layers, or other --include and --exclude",
        )
    return pairs, notes


def match_names(base: Mapping[str, TensorInfo], tuned: Mapping[str, TensorInfo]) -> tuple[list[TensorPair], list[str]]:
    """Pairs in the order of names, None where a side lacks the tensor; and a note on each side that lacks a prefix.

    A name that the other side has in place of one's own matches the two, and is forgotten then: an adapter belongs to
    the tensors of its base, so a pair has the base's own name.
    """
    as_tuned, as_base = named_as(base, tuned), named_as(tuned, base)
    base_by_name = {as_tuned[name]: info for name, info in base.items()}
    tuned_by_name = {as_base[name]: info for name, info in tuned.items()}
    notes = [_note("base", base_by_name), _note("tuned checkpoint", tuned_by_name)]
    names = sorted(base_by_name.keys() | tuned_by_name.keys())
    twin = next((name for name in names if is_embedding(name)), None)
    pairs = [_pair(name, base_by_name, tuned_by_name, twin) for name in names]
    return sorted(pairs, key=lambda pair: pair.name), [note for note in notes if note]


def _note(side: str, by_name: Mapping[str, TensorInfo]) -> str | None:
    renamed = next(((name, info.name) for name, info in by_name.items() if name != info.name), None)
    if renamed is None:
        return None
    name, own = renamed
    if name.endswith(own):
        return f"tensor names of the {side} lack {name.removesuffix(own)!r}, which the other checkpoint's have"
    return f"tensors of the {side} have other names: {own} is {name} in the other checkpoint"


def _pair(
    name: str, base: Mapping[str, TensorInfo], tuned: Mapping[str, TensorInfo], embedding: str | None
) -> TensorPair:
    """The pair of the tensors that are matched under `name`."""
    ours, theirs = base.get(name), tuned.get(name)
    own = next(info.name for info in (ours, theirs) if info is not None)
    if embedding is None or not is_head(name) or embedding not in base or embedding not in tuned:
        return TensorPair(own, ours, theirs)
    twin = base[embedding], tuned[embedding]
    ours, theirs = ours or twin[0], theirs or twin[1]  # a side that stores no head uses its embedding as one
    may_be_tied = (ours.shape, theirs.shape) == (twin[0].shape, twin[1].shape)
    return TensorPair(own, ours, theirs, twin=twin if may_be_tied else None)


def _classify(pairs: Sequence[TensorPair], base: Checkpoint, wish: Wish) -> list[TensorPair]:
    names = {pair.name for pair in pairs}
    num_experts = _count_experts(pairs)
    found = [_classified(pair, names, num_experts, base, wish) for pair in pairs]
    findings = classes_say(base, found)
    return [_corrected(pair, findings[pair.name], names, wish) if pair.name in findings else pair for pair in found]


def _corrected(pair: TensorPair, finding: Finding, names: set[str], wish: Wish) -> TensorPair:
    """The pair as what its module's class says it is."""
    reason = finding.reason if finding.kind is None else reason_not_wished(pair.name, finding.kind, names, wish)
    if reason is not None or finding.kind is None:
        return replace(pair, status="not_extractable", reason=reason)
    return replace(pair, kind=finding.kind)


def _classified(
    pair: TensorPair, names: set[str], num_experts: Mapping[tuple[str, str], int], base: Checkpoint, wish: Wish
) -> TensorPair:
    model_type = str(base.config.get("model_type"))
    apart = _reason_of_buffer(pair)
    if apart is not None:
        return replace(pair, status="not_extractable", reason=apart)
    if pair.base is None:
        reason = "new in the tuned checkpoint: there is no base tensor to change"
        return replace(pair, status="not_extractable", reason=reason)
    if pair.num_new_rows:
        reason = f"{pair.num_new_rows} rows of new tokens are carried whole; the others stay as in the base"
        return replace(pair, status="exact", reason=reason)
    found = classify(pair.name, pair.shape, model_type, names)
    if found.kind is None:
        status: Literal["exact", "not_extractable"] = "exact" if found.is_vector and wish.vectors else "not_extractable"
        return replace(pair, status=status, reason=found.reason)
    not_wished = reason_not_wished(pair.name, found.kind, names, wish)
    if not_wished is not None:
        return replace(pair, status="not_extractable", reason=not_wished)
    expert = expert_of(base, pair.base.name)
    if expert is not None:
        return replace(pair, kind=expert.kind, experts=expert.num_experts)
    if is_expert(pair.module):
        parent, _, leaf = split_expert(pair.module)
        return replace(pair, experts=num_experts[parent, leaf])
    return replace(pair, kind=found.kind, tied=tied_heads(pair.name, model_type, dict(base.config), names))


def _reason_of_buffer(pair: TensorPair) -> str | None:
    if pair.buffer_reason is None or len(pair.sides) == 2:
        return pair.buffer_reason
    side = "base" if pair.base else "tuned checkpoint"
    return f"a buffer that only the {side} stores: there is nothing to compare it with"


def _count_experts(pairs: Sequence[TensorPair]) -> dict[tuple[str, str], int]:
    """How many experts M has that have a tensor LEAF of their own, by M and LEAF of M.experts.3.LEAF."""
    counts: dict[tuple[str, str], int] = {}
    for pair in pairs:
        if is_expert(pair.module):
            parent, index, leaf = split_expert(pair.module)
            counts[parent, leaf] = max(counts.get((parent, leaf), 0), index + 1)
    return counts


def _select(pairs: Sequence[TensorPair], include: Sequence[str], exclude: Sequence[str]) -> list[TensorPair]:
    for option, globs in (("--include", include), ("--exclude", exclude)):
        for glob in globs:
            if not any(_matches(pair, glob) for pair in pairs):
                raise UsageError(
                    f"{option} {glob!r} matches no tensor",
                    fix=f"globs are matched against whole names such as {pairs[len(pairs) // 2].module}",
                )
    return [_selected(pair, include, exclude) for pair in pairs]


def _selected(pair: TensorPair, include: Sequence[str], exclude: Sequence[str]) -> TensorPair:
    if pair.status == "not_extractable":
        return pair
    if include and not any(_matches(pair, glob) for glob in include):
        return replace(pair, status="excluded", reason="not named by --include")
    glob = next((glob for glob in exclude if _matches(pair, glob)), None)
    return replace(pair, status="excluded", reason=f"excluded by {glob!r}") if glob else pair


def _matches(pair: TensorPair, glob: str) -> bool:
    return fnmatchcase(pair.module, glob) or fnmatchcase(pair.name, glob)


def _main_reasons(pairs: Sequence[TensorPair]) -> str:
    """The two reasons that stand against most bytes."""
    num_bytes: Counter[str] = Counter()
    for pair in pairs:
        num_bytes[pair.reason or ""] += pair.num_bytes
    return "; ".join(reason for reason, _ in num_bytes.most_common(2))
