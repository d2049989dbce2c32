"""What `flora bench` measured and holds of it, as tables."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from flora.cli.output import Column, Format, print_table

if TYPE_CHECKING:
    from flora.bench.claims import Finding
    from flora.bench.row import Row
    from flora.bench.storm import StormRow
    from flora.bench.suites import Entry


def print_rows(form: Format, rows: Sequence[Row]) -> None:
    import msgspec

    columns = (
        Column("adapters", "adapters", is_number=True),
        Column("seed", "seed", is_number=True),
        Column("order", "order"),
        Column("rate", "rate", lambda rate: f"{rate:g}" if rate else "at once", is_number=True),
        Column("req_s", "requests/s", _number, is_number=True),
        Column("out_tok_s", "tokens/s", _number, is_number=True),
        Column("ttft_ms_p50", "first token p50, ms", _number, is_number=True),
        Column("ttft_ms_p99", "p99", _number, is_number=True),
        Column("tpot_ms_p50", "a token p50, ms", _number, is_number=True),
        Column("tpot_ms_p99", "p99", _number, is_number=True),
        Column("slo_attainment", "SLO met", _share, is_number=True),
    )
    print_table(form, "rows", columns, [msgspec.to_builtins(row) for row in rows], id_key="adapters")


def print_storms(form: Format, rows: Sequence[StormRow]) -> None:
    import msgspec

    columns = (
        Column("streams", "streams", is_number=True),
        Column("storm", "loads/s asked", _number, is_number=True),
        Column("loads", "loads", is_number=True),
        Column("load_ms_p99", "load p99, ms", _number, is_number=True),
        Column("gap_ms_p50_before", "gap p50, ms", _number, is_number=True),
        Column("gap_ms_p99_before", "p99", _number, is_number=True),
        Column("gap_ms_p50_during", "in the storm p50", _number, is_number=True),
        Column("gap_ms_p99_during", "p99", _number, is_number=True),
        Column("gap_p99_ratio", "p99 ratio", lambda ratio: f"{ratio:.2f}", is_number=True),
    )
    print_table(form, "rows", columns, [msgspec.to_builtins(row) for row in rows], id_key="storm")


def print_entries(form: Format, entries: Sequence[tuple[Entry, bool]]) -> None:
    """entries  and whether their rows are there"""
    columns = (
        Column("label", "measurement"),
        Column("shape", "shape"),
        Column("adapters", "adapters", is_number=True),
        Column("seconds", "seconds on an H100", is_number=True),
        Column("is_there", "there", lambda there: "yes" if there else "no"),
    )
    rows = [
        {
            "label": entry.label,
            "shape": entry.bench.setting.shape,
            "adapters": entry.num_adapters,
            "seconds": entry.seconds,
            "is_there": there,
        }
        for entry, there in entries
    ]
    print_table(form, "entries", columns, rows, id_key="label")


def print_findings(form: Format, findings: Sequence[Finding]) -> None:
    columns = (
        Column("claim", "claim"),
        Column("gpu", "on"),
        Column("value", "measured", lambda value: f"{value:.4g}", is_number=True),
        Column("bound", "bound", is_number=True),
        Column("holds", "holds", lambda holds: "yes" if holds else "NO"),
    )
    rows = [
        {
            "claim": found.claim.what,
            "gpu": found.gpu,
            "value": round(found.value, 4),
            "bound": found.claim.bound,
            "holds": found.holds,
        }
        for found in findings
    ]
    print_table(form, "claims", columns, rows, id_key="claim")


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:,.1f}"


def _share(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f} %"
