"""From rows of results to the curves of a plot: what differs between rows names them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from flora.errors import UsageError

Rows = Sequence[Mapping[str, Any]]

_NAMING = ("system", "way", "gpu", "shape", "modules", "ranks", "adapters", "requests", "lengths", "rate", "alpha",
           "cv", "order", "clients", "max_sequences", "pool_gib", "merged", "merged_turn_tokens",
           "fixed_slots", "slo_ttft_s")  # fmt: skip
_SIZES_LEFT_OUT = {  # that name no curve
    "num_loaders", "page_tokens", "num_threads", "max_context", "max_adapters", "slot_bytes",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Plot:
    """One way to look at rows."""

    title: str
    x: str  # a field of a row, or of its switches
    x_title: str
    ys: tuple[tuple[str, str], ...]  # field, and the word that tells its curve from the others
    y_title: str
    is_x_log: bool = False
    is_y_log: bool = False
    y_scale: float = 1.0  # from the field's unit to the axis's
    level: str = ""  # what a row without x is, or one at 0, drawn as a level; "": there is none


PLOTS = {
    "throughput": Plot("Throughput against adapters", "adapters", "adapters", (("req_s", ""),), "requests a second",
                       is_x_log=True, level="the base alone"),
    "tokens": Plot("Throughput against adapters", "adapters", "adapters", (("out_tok_s", ""),), "tokens a second",
                   is_x_log=True, level="the base alone"),
    "latency": Plot("Time to the first token against rate", "rate", "requests a second that arrive",
                    (("ttft_ms_p50", "p50"), ("ttft_ms_p99", "p99")), "ms to the first token", is_y_log=True),
    "pace": Plot("Time per token against rate", "rate", "requests a second that arrive",
                 (("tpot_ms_p50", "p50"), ("tpot_ms_p99", "p99")), "ms a token"),
    "slo": Plot("Requests with their first token in time, against rate", "rate", "requests a second that arrive",
                (("slo_attainment", ""),), "share, %", y_scale=100.0),
    "burst": Plot("Requests with their first token in time, against burstiness", "cv", "variation of the gaps (cv)",
                  (("slo_attainment", ""),), "share, %", y_scale=100.0),
    "slots": Plot("Throughput against fixed slots", "fixed_slots", "adapters on the device, all of the largest rank",
                  (("req_s", ""),), "requests a second", is_x_log=True, level="a unified pool of true ranks"),
    "clusters": Plot("Throughput against the size of a cluster", "cluster", "adapters that a cluster keeps to",
                     (("req_s", ""),), "requests a second", is_x_log=True, level="no clusters"),
    "cost": Plot("Requests a second by the number of fine-tunes", "fine_tunes", "fine-tunes of one base",
                 (("req_s", ""),), "requests a second", is_x_log=True),
    "bill": Plot("GPU seconds for a million tokens", "fine_tunes", "fine-tunes of one base",
                 (("gpu_s_per_m_tok", ""),), "GPU seconds", is_x_log=True),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Curve:
    name: str
    points: tuple[tuple[float, float], ...]  # by x
    base: float | None = None  # y of the plot's level


def curves_of(plot: Plot, rows: Rows) -> list[Curve]:
    """The plot's curves, in the order in which rows name them.

    Of rows that agree in all but seed, commit and figures, those of the latest commit count, and of its seeds the
    median. Raises UsageError where no row has the plot's fields.
    """
    usable = [row for row in rows if _has_place(plot, row) and any(row.get(y) is not None for y, _ in plot.ys)]
    if not usable:
        fields = ", ".join([plot.x, *(y for y, _ in plot.ys)])
        raise UsageError(f"no row has {fields}", fix="give rows of `flora bench serve --out FILE`, or another --show")
    named = [_facts(row, without=plot.x) for row in usable]
    differing = [key for key in _keys(named) if len({_plain(facts[key]) for facts in named if key in facts}) > 1]
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for row, facts in zip(usable, named, strict=True):
        name = ", ".join(filter(None, (_word(key, facts.get(key)) for key in differing)))
        groups.setdefault(name, []).append(row)
    return [curve for name, of_name in groups.items() for curve in _curves(plot, name, of_name)]


def _curves(plot: Plot, name: str, rows: Rows) -> list[Curve]:
    found = []
    for field, word in plot.ys:
        by_x: dict[float, list[Mapping[str, Any]]] = {}
        for row in rows:
            if row.get(field) is not None:
                by_x.setdefault(float(_x_of(plot, row) or 0), []).append(row)
        points = {x: plot.y_scale * _latest(of_x, field) for x, of_x in sorted(by_x.items())}
        base = points.pop(0.0, None) if plot.level else None
        found.append(Curve(", ".join(filter(None, (name, word))), tuple(points.items()), base))
    return found


def _x_of(plot: Plot, row: Mapping[str, Any]) -> Any:
    return row[plot.x] if plot.x in row else (row.get("switches") or {}).get(plot.x)


def _has_place(plot: Plot, row: Mapping[str, Any]) -> bool:
    """Whether the row says its x, be it that it has none."""
    says = plot.x in row or plot.x in (row.get("switches") or {})
    return says and (_x_of(plot, row) is not None or bool(plot.level))


def _latest(rows: Rows, field: str) -> float:
    commit = rows[-1].get("commit")
    return median(float(row[field]) for row in rows if row.get("commit") == commit)


def _facts(row: Mapping[str, Any], without: str) -> dict[str, Any]:
    """What may name a row's curve; older rows say less, and are not another curve for that."""
    facts = {key: row[key] for key in _NAMING if key in row and key != without}
    switches = row.get("switches") or {}
    return facts | {key: value for key, value in switches.items() if key not in _SIZES_LEFT_OUT | {without}}


def _keys(named: Sequence[Mapping[str, Any]]) -> list[str]:
    return list(dict.fromkeys(key for facts in named for key in facts))


def _plain(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)


def _word(key: str, value: Any) -> str:
    """How a fact reads in a legend: `vllm`, `100 adapters`, `no fairness`; nothing where a row lacks it."""
    if key == "slo_ttft_s":  # of the switches: when the server gives up
        return "nobody is given up" if value is None else f"given up after {value:g} s without a token"
    if value is None:
        return ""
    if isinstance(value, bool):
        words = key.replace("_", " ")
        return words if value else f"no {words}"
    if key in ("system", "way", "gpu", "shape", "order"):
        return str(value)
    if key == "adapter_dtype":
        return f"adapters in {value}"
    if key == "modules":
        return "all projections" if value == "all" else str(value)
    if key in ("adapters", "clients"):
        return f"{value} {key}"
    return f"{key.replace('_', ' ')} {_plain(value)}"
