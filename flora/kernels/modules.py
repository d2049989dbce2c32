"""The seven linear modules of a decoder layer that an adapter may touch, and the groups that share one launch."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import Enum
from math import gcd

MODULES = ("q", "k", "v", "o", "gate", "up", "down")
CHUNK = 64  # elements: every stored matrix row starts on a multiple of it, so no chunk straddles a cell


class Group(Enum):
    """Modules that read the same input and write neighbouring outputs; the value is their indices in MODULES."""

    QKV = (0, 1, 2)
    OUT = (3,)
    GATE_UP = (4, 5)
    DOWN = (6,)


ATTENTION_GROUPS = frozenset({Group.QKV, Group.OUT})
ALL_GROUPS = frozenset(Group)


@dataclass(frozen=True, slots=True)
class Place:
    """Which products of a layer are meant, and where each lies in the fused output."""

    layer: int
    group: Group
    out_starts: Sequence[int]
    out_sizes: Sequence[int]


def padded(row_elements: int) -> int:
    """Elements that one stored row takes: `row_elements` rounded up to whole chunks."""
    return -(-row_elements // CHUNK) * CHUNK


def matrix_alignment(row_elements: Iterable[int], cell_elements: int) -> int:
    """Elements on which a stored matrix starts: the largest power of two, up to 2048, that is of use to any of these.

    row_elements  lengths of all rows that an adapter may store on this device: the modules' inputs and outputs.
    It is what AdapterWeights.alignment may promise; 2048 for rows of 4096 beside others of 11008. Shrink reads as much
    of a row in one loop, with one look at where it lies.
    """
    return max(gcd(2048, cell_elements, padded(length)) for length in row_elements)


def row_alignment(alignment: int, row_elements: int) -> int:
    """Elements on which every row of a matrix starts that starts on `alignment`: as many always lie in one cell."""
    return gcd(alignment, padded(row_elements))
