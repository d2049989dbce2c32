"""Two checkpoints whose experts are grouped differently, read alike: fused on one side, apart on the other.

    fused   M.experts.3.gate_up_proj [2 * width, hidden], as `experts.unfused` gives it: gate's rows above up's
    apart   M.experts.3.gate_proj and .up_proj [width, hidden] each; or .w1 and .w3, and .w2 for down_proj

The tuned checkpoint is read as the base groups its own, since an adapter belongs to the base's tensors. transformers 5
saves apart what Qwen3.5 published fused, and with `save_original_format=False` fused what others published apart; there
M may have another name, too. gpt-oss, whose rows of gate and up take turns, stands in `turns.py`.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import chain

from flora.checkpoint import Checkpoint, TensorInfo
from flora.extract import turns
from flora.extract.dequantize import dequantized, fp8_ulps
from flora.extract.experts import readable, unfused
from flora.extract.pieces import Piece, in_pieces

Leaves = tuple[str, ...]
_FUSED: Leaves = ("gate_up_proj", "down_proj")
_APART: tuple[Leaves, ...] = (("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2"))
_HOMES = ("mlp", "block_sparse_moe")  # what M ends with: transformers 5's name for it, and Mixtral's own
_EXPERT = re.compile(r"(?P<home>.+)\.experts\.(?P<index>\d+)\.(?P<leaf>\w+)\.weight", re.ASCII)


def readable_pair(base: Checkpoint, tuned: Checkpoint) -> tuple[Checkpoint, Checkpoint]:
    """Both as extraction reads them: quantized weights as their numbers, experts one by one and grouped alike."""
    base = readable(base)
    return base, grouped_as(base, readable(tuned))


def ulps_of_pair(base: Checkpoint, tuned: Checkpoint) -> Checkpoint | None:
    """The tuned side of `readable_pair` with the ulp of each fp8 weight in its place; None if it has no such weight."""
    ulps = fp8_ulps(dequantized(tuned))
    return None if ulps is None else grouped_as(readable(base), unfused(ulps))


def grouped_as(base: Checkpoint, tuned: Checkpoint) -> Checkpoint:
    """The tuned checkpoint itself if its experts are grouped as the base's; else a view of it in which they are.

    Itself, too, where it cannot be told how they belong together: the names that differ are reported then.
    """
    if str(base.config.get("model_type")) in turns.MODELS:
        return in_pieces(tuned, turns.pieces_in_turns(base, tuned))
    ours, theirs = _groups(base), _groups(tuned)
    if not ours or not theirs:
        return tuned
    usual = next(iter(ours.values())).leaves if len({group.leaves for group in ours.values()}) == 1 else None
    pieces: dict[str, Piece] = {}
    homes: dict[str, str] = {}  # of the tuned checkpoint, where the base's has another name
    for home, group in theirs.items():
        own = home if home in ours else _other_name(home, ours)
        leaves = ours[own].leaves if own in ours else usual
        if own != home:
            homes[f"{home}."] = f"{own}."
        if leaves is not None and leaves != group.leaves:
            pieces |= _regroup(group, own, leaves, tuned.tensors)
    if not pieces:
        return tuned
    hidden = set(chain.from_iterable(piece.names for piece in pieces.values()))
    for name in tuned.tensors:
        stem = next((stem for stem in homes if name.startswith(stem)), None)
        if stem is not None and name not in hidden:
            pieces[_beside(homes[stem], name.removeprefix(stem), base)] = Piece((name,))
            hidden.add(name)
    return in_pieces(tuned, pieces)


@dataclass(frozen=True, slots=True)
class _Group:
    """The experts of one M."""

    home: str
    leaves: Leaves
    indices: tuple[int, ...]

    def name(self, index: int, leaf: str) -> str:
        return f"{self.home}.experts.{index}.{leaf}.weight"


def _groups(checkpoint: Checkpoint) -> dict[str, _Group]:
    """The experts of each M whose tensors are all there, of one dtype and in shapes that fit."""
    found: dict[str, dict[str, set[int]]] = {}
    for name in checkpoint.tensors:
        match = _EXPERT.fullmatch(name) if ".experts." in name else None
        if match is not None:
            found.setdefault(match["home"], {}).setdefault(match["leaf"], set()).add(int(match["index"]))
    groups = {}
    for home, by_leaf in found.items():
        leaves = next((leaves for leaves in (_FUSED, *_APART) if set(leaves) <= by_leaf.keys()), None)
        if leaves is not None and all(by_leaf[leaf] == by_leaf[leaves[0]] for leaf in leaves):
            group = _Group(home, leaves, tuple(sorted(by_leaf[leaves[0]])))
            if all(_fits(group, index, checkpoint.tensors) for index in group.indices):
                groups[home] = group
    return groups


def _fits(group: _Group, index: int, tensors: Mapping[str, TensorInfo]) -> bool:
    *wide, narrow = (tensors[group.name(index, leaf)] for leaf in group.leaves)
    if any(len(info.shape) != 2 for info in (*wide, narrow)) or len({(info.dtype, info.shape) for info in wide}) > 1:
        return False
    return sum(info.shape[0] for info in wide) == 2 * narrow.shape[1]


def _other_name(home: str, ours: Mapping[str, _Group]) -> str:
    stem, _, last = home.rpartition(".")
    others = (f"{stem}.{other}" for other in _HOMES if last in _HOMES and other != last)
    return next((other for other in others if other in ours), home)


def _beside(home: str, rest: str, base: Checkpoint) -> str:
    """What the base calls a tensor beside the experts: their router has two names."""
    names = (home + rest, home + rest.replace("router.", "gate."), home + rest.replace("gate.", "router."))
    return next((name for name in names if name in base.tensors), names[0])


def _regroup(group: _Group, home: str, leaves: Leaves, tensors: Mapping[str, TensorInfo]) -> dict[str, Piece]:
    own = replace(group, home=home, leaves=leaves)
    return dict(chain.from_iterable(_regroup_one(group, own, index, tensors) for index in group.indices))


def _regroup_one(
    theirs: _Group, ours: _Group, index: int, tensors: Mapping[str, TensorInfo]
) -> Iterator[tuple[str, Piece]]:
    """The pieces of one expert: gate and up as two or as one, down_proj as it is."""
    *wide, narrow = (theirs.name(index, leaf) for leaf in theirs.leaves)
    *own_wide, own_narrow = (ours.name(index, leaf) for leaf in ours.leaves)
    yield own_narrow, Piece((narrow,))
    if len(own_wide) == len(wide):
        yield from ((own, Piece((name,))) for own, name in zip(own_wide, wide, strict=True))
    elif len(own_wide) == 1:
        yield own_wide[0], Piece(tuple(wide))
    else:
        half = tensors[wide[0]].shape[0] // 2
        yield own_wide[0], Piece((wide[0],), slice(0, half))
        yield own_wide[1], Piece((wide[0],), slice(half, None))
