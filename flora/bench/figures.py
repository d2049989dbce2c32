"""The figures of the claims: which rows each is drawn from, and by which plot."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from flora.bench.claims import Rows, label_of, measured, of_one_commit
from flora.bench.plots import PLOTS, Curve, Plot, curves_of

_LEAST_POINTS = 2  # one figure says less than the table does


@dataclass(frozen=True, slots=True)
class Figure:
    name: str  # of its file
    plot: str  # key of PLOTS
    title: str
    labels: str  # what the labels of its rows match
    is_paired: bool = False  # it compares them: rows of one commit alone


FIGURES = (
    Figure("throughput", "throughput", "Requests a second by adapters, Llama-3-8B shape", r"(table|linear)/\d+(/fp8)?"),
    Figure("s_lora", "throughput", "Requests a second by adapters, S-LoRA's settings", r"S[12]/\d+(/fp8)?"),
    Figure("slots", "slots", "A unified pool, and fixed slots of the largest rank", r"S2/200(/capped)?(/fixed-\d+)?",
           is_paired=True),
    Figure("early_abort", "burst", "First tokens in time under overload", r"S2/200/(fcfs|abort)/cv\d+",
           is_paired=True),
    Figure("clusters", "clusters", "Clusters of adapters, pool of 7 GiB", r"S2/32/.+", is_paired=True),
    Figure("cost", "cost", "Fine-tunes of a 1B model: adapters, and checkpoints in turn", r"cost/\w+/\d+"),
    Figure("bill", "bill", "Fine-tunes of a 1B model: GPU seconds for a million tokens", r"cost/\w+/\d+"),
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Bars:
    """Measurements that differ in one thing, beside each other."""

    name: str  # of its file
    title: str
    unit: str
    field: str
    words: Mapping[str, str]  # by label


BARS = (
    Bars("merged", "Five adapters at once, or merged one after the other (S2)", "requests a second", "req_s", {
        "S2/5": "on the fly", "S2/5/merged": "merged, in the best order", "S2/5/merged/queue": "merged, S-LoRA's queue",
    }),
    Bars("merged_small", "The same in S-LoRA's own pool of 7 GiB", "requests a second", "req_s",
         {"S2/5/capped": "on the fly", "S2/5/capped/merged/queue": "merged, S-LoRA's queue"}),
    Bars("peft", "A hundred adapters (S2)", "requests a second", "req_s",
         {"S2/100": "Flora", "peft/100": "transformers and PEFT"}),
    Bars("prefetch", "Three quarters of the load, 2,000 adapters (S2)", "ms to the first token, 99th percentile",
         "ttft_ms_p99", {"S2/2000/prefetch": "prefetch", "S2/2000/no-prefetch": "no prefetch"}),
    Bars("anchor", "A hundred adapters, the same machine and requests", "requests a second, cold", "req_s",
         {"table/100": "Flora", "vllm/100": "vLLM 0.26.0"}),
)  # fmt: skip


def drawable_bars(rows: Rows, bars: Sequence[Bars] = BARS) -> Iterator[tuple[Bars, list[tuple[str, float]]]]:
    """Of these, those that the rows have two measurements for, of one commit: words and value."""
    for each in bars:
        own = of_one_commit(rows, list(each.words))
        values = [(words, measured(own, label, each.field)) for label, words in each.words.items()]
        known = [(words, value) for words, value in values if value is not None]
        if len(known) >= _LEAST_POINTS:
            yield each, known


def drawable(rows: Rows, figures: Sequence[Figure] = FIGURES) -> Iterator[tuple[Figure, Plot, list[Curve]]]:
    """The figures that these rows have points for."""
    for figure in figures:
        plot = PLOTS[figure.plot]
        own: Rows = [row for row in rows if re.fullmatch(figure.labels, str(row.get("label") or ""))]
        if figure.is_paired:
            own = of_one_commit(own, [str(label_of(row)) for row in own])
        curves = curves_of(plot, own) if own else []
        if sum(len(curve.points) for curve in curves) >= _LEAST_POINTS:
            yield figure, plot, curves
