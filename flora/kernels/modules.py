"""The seven linear modules of a decoder layer that an adapter may touch, and the groups that share one launch."""

from enum import Enum

MODULES = ("q", "k", "v", "o", "gate", "up", "down")
CHUNK = 64  # elements: every stored matrix row starts on a multiple of it, so no chunk straddles a cell


class Group(Enum):
    """Modules that read the same input and write neighbouring outputs; the value is their indices in MODULES."""

    QKV = (0, 1, 2)
    OUT = (3,)
    GATE_UP = (4, 5)
    DOWN = (6,)


def padded(row_elements: int) -> int:
    """Elements that one stored row takes: `row_elements` rounded up to whole chunks."""
    return -(-row_elements // CHUNK) * CHUNK
