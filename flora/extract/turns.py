"""gpt-oss with experts apart, read as its base keeps them fused, where rows of gate and up take turns.

base, as `experts.unfused` gives it   M.experts.3.gate_up_proj.weight [2 * width, hidden], and down_proj
                                      M.experts.gate_up_proj_bias [experts, 2 * width], and down_proj_bias
Unsloth for four bits, and what PEFT  M.experts.gate_up_projs.3.weight and .bias, the same rows; down_projs.3;
merges into its model                 M.router.linear.weight and .bias
LLM Compressor                        M.experts.3.gate_proj.weight and .bias, the even rows; up_proj, the odd ones
"""

import re
from collections.abc import Iterator

from flora.checkpoint import Checkpoint
from flora.extract.pieces import Piece

MODELS = ("gpt_oss",)
_WEIGHT = re.compile(r"(?P<home>.+\.experts)\.(?P<index>\d+)\.(?P<leaf>gate_up_proj|down_proj)\.weight", re.ASCII)
_BIAS = re.compile(r"(?P<home>.+\.experts)\.(?P<leaf>gate_up_proj|down_proj)_bias", re.ASCII)
_ROUTER = re.compile(r"(?P<home>.+\.router)\.(?P<leaf>weight|bias)", re.ASCII)


def pieces_in_turns(base: Checkpoint, tuned: Checkpoint) -> dict[str, Piece]:
    """What the base has and the tuned checkpoint has in other tensors, where those fit the base's in shape."""
    pieces = {}
    for name, info in base.tensors.items():
        if name in tuned.tensors:
            continue
        for piece in _candidates(name, info.shape):
            shapes = {tuned.tensors[part].shape if part in tuned.tensors else None for part in piece.names}
            if shapes == {_part_shape(piece, info.shape)}:
                pieces[name] = piece
                break
    return pieces


def _candidates(name: str, shape: tuple[int, ...]) -> Iterator[Piece]:
    """What a tensor of the base may be made of elsewhere."""
    if match := _WEIGHT.fullmatch(name):
        home, index, leaf = match["home"], match["index"], match["leaf"]
        yield Piece((f"{home}.{leaf}s.{index}.weight",))
        yield Piece((f"{home}.{index}.gate_proj.weight", f"{home}.{index}.up_proj.weight"), turns=2)
    elif match := _BIAS.fullmatch(name):
        home, leaf, indices = match["home"], match["leaf"], range(shape[0])
        yield Piece(tuple(f"{home}.{leaf}s.{index}.bias" for index in indices), stacked=True)
        if leaf == "down_proj":
            yield Piece(tuple(f"{home}.{index}.down_proj.bias" for index in indices), stacked=True)
        else:
            parts = (f"{home}.{index}.{part}.bias" for index in indices for part in ("gate_proj", "up_proj"))
            yield Piece(tuple(parts), turns=2, stacked=True)
    elif match := _ROUTER.fullmatch(name):
        yield Piece((f"{match['home']}.linear.{match['leaf']}",))


def _part_shape(piece: Piece, whole: tuple[int, ...]) -> tuple[int, ...]:
    """The shape that each part must have to make the whole."""
    num_rows, *rest = whole[1:] if piece.stacked else whole
    return (num_rows // piece.turns, *rest)
