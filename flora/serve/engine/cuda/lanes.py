"""A running sequence's lane: its row in the host's block table, and where its last token lies on the device.

A token drawn by a step that is still under way is known on the device only. It is left in the sequence's lane, and the
next step reads it there.
"""

from collections.abc import Sequence as Many

import numpy as np
from numpy.typing import NDArray

from flora.serve.engine.schedule.sequence import Sequence, State


class _Lane:
    __slots__ = ("index", "num_pages", "pages", "sequence")

    def __init__(self, index: int, sequence: Sequence) -> None:
        self.index = index
        self.sequence = sequence
        self.pages: list[int] | None = None  # the list that the table's row was filled from
        self.num_pages = 0


class Lanes:
    """Lanes of running sequences; one is given back when its sequence is found not to run any more."""

    def __init__(self, num_lanes: int, table_pages: int) -> None:
        self.num_lanes = num_lanes
        self.spare = num_lanes  # a lane that nobody owns: padding rows write there
        self.tables: NDArray[np.int32] = np.zeros((num_lanes + 1, table_pages), dtype=np.int32)
        self._free = list(range(num_lanes - 1, -1, -1))
        self._by_sequence: dict[int, _Lane] = {}  # by id: a lane keeps its sequence alive, so ids do not repeat

    def of(self, sequences: Many[Sequence]) -> NDArray[np.int64]:
        """Each sequence's lane, with its pages now in the table."""
        if len(self._free) < len(sequences):
            self._collect()
        return np.fromiter((self._lane(sequence).index for sequence in sequences), np.int64, len(sequences))

    def _lane(self, sequence: Sequence) -> _Lane:
        lane = self._by_sequence.get(id(sequence))
        if lane is None:
            lane = self._by_sequence[id(sequence)] = _Lane(self._free.pop(), sequence)
        pages = sequence.pages
        if lane.pages is not pages:  # admitted, or admitted again after a preemption
            lane.pages, lane.num_pages = pages, 0
        if lane.num_pages < len(pages):
            self.tables[lane.index, lane.num_pages : len(pages)] = pages[lane.num_pages :]
            lane.num_pages = len(pages)
        return lane

    def _collect(self) -> None:
        for key, lane in list(self._by_sequence.items()):
            if lane.sequence.state is not State.RUNNING:
                del self._by_sequence[key]
                self._free.append(lane.index)
