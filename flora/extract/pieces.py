"""A checkpoint read under other names and in other rows than its files have: tensors made of pieces of others."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import TYPE_CHECKING

from flora.checkpoint import Checkpoint, TensorInfo

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class Piece:
    """A tensor as rows of others: of one, or of several one below the other."""

    names: tuple[str, ...]
    rows: slice | None = None  # None: all
    turns: int = 1  # so many of them, one after the other, give a row each in turn
    stacked: bool = False  # those of each turn are one entry of a new first dimension


@dataclass(frozen=True, eq=False)
class RegroupedCheckpoint(Checkpoint):
    """A checkpoint some of whose tensors are pieces of its source's."""

    source: Checkpoint = field(kw_only=True)
    pieces: Mapping[str, Piece] = field(kw_only=True)  # by the names that this view gives them

    def load(self, name: str) -> "Tensor":
        import torch

        piece = self.pieces.get(name)
        if piece is None:
            return self.source.load(name)
        parts = [self.source.load(part) for part in piece.names]
        if piece.turns > 1:
            rounds = (parts[i : i + piece.turns] for i in range(0, len(parts), piece.turns))
            parts = [torch.stack(one, 1).flatten(0, 1) for one in rounds]
        if piece.stacked:
            return torch.stack(parts)
        whole = parts[0] if len(parts) == 1 else torch.cat(parts)
        return whole if piece.rows is None else whole[piece.rows]


def in_pieces(source: Checkpoint, pieces: Mapping[str, Piece]) -> Checkpoint:
    """The checkpoint with these tensors instead of those that they are made of; itself if there are none."""
    if not pieces:
        return source
    hidden = set(chain.from_iterable(piece.names for piece in pieces.values()))
    tensors = {name: info for name, info in source.tensors.items() if name not in hidden}
    tensors |= {name: _describe(name, piece, source.tensors) for name, piece in pieces.items()}
    tensors = {name: tensors[name] for name in sorted(tensors)}
    return RegroupedCheckpoint(source.path, source.config, tensors, source=source, pieces=pieces)


def _describe(name: str, piece: Piece, tensors: Mapping[str, TensorInfo]) -> TensorInfo:
    """The piece's entry: of several tensors it starts where the first does, and has the bytes of all."""
    infos = [tensors[part] for part in piece.names]
    first, num_bytes = infos[0], sum(info.num_bytes for info in infos)
    if piece.stacked:
        shape = (len(infos) // piece.turns, piece.turns * first.shape[0], *first.shape[1:])
        return replace(first, name=name, shape=shape, end=first.start + num_bytes)
    if not first.shape:
        return replace(first, name=name)
    num_rows = sum(info.shape[0] for info in infos)
    start, stop, _ = (piece.rows or slice(None)).indices(num_rows)
    row_bytes = num_bytes // max(1, num_rows)
    begin, end = (first.start + row * row_bytes for row in (start, stop))
    return replace(first, name=name, shape=(stop - start, *first.shape[1:]), start=begin, end=end)
