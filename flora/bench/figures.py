"""The figures of the claims: which rows each is drawn from, and by which plot."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from flora.bench.claims import Rows
from flora.bench.plots import PLOTS, Curve, Plot, curves_of

_LEAST_POINTS = 2  # one figure says less than the table does


@dataclass(frozen=True, slots=True)
class Figure:
    name: str  # of its file
    plot: str  # key of PLOTS
    title: str
    labels: str  # what the labels of its rows match


FIGURES = (
    Figure("throughput", "throughput", "Requests a second by adapters, Llama-3-8B shape", r"(table|linear)/\d+"),
    Figure("s_lora", "throughput", "Requests a second by adapters, S-LoRA's settings", r"S[12]/\d+"),
    Figure("slots", "slots", "A unified pool, and slots of the largest rank", r"S2/200(/capped)?(/slots-\d+)?"),
    Figure("early_abort", "burst", "First tokens in time under overload", r"S2/200/(fcfs|abort)/cv\d+"),
    Figure("clusters", "clusters", "Clusters of adapters, pool of 7 GiB", r"S2/32/.+"),
    Figure("cost", "cost", "Fine-tunes of a 1B model: adapters, and checkpoints in turn", r"cost/\w+/\d+"),
    Figure("bill", "bill", "Fine-tunes of a 1B model: GPU seconds for a million tokens", r"cost/\w+/\d+"),
)  # fmt: skip


def drawable(rows: Rows, figures: Sequence[Figure] = FIGURES) -> Iterator[tuple[Figure, Plot, list[Curve]]]:
    """The figures that these rows have points for."""
    for figure in figures:
        plot = PLOTS[figure.plot]
        own = [row for row in rows if re.fullmatch(figure.labels, str(row.get("label") or ""))]
        curves = curves_of(plot, own) if own else []
        if sum(len(curve.points) for curve in curves) >= _LEAST_POINTS:
            yield figure, plot, curves
