"""Which rows become which figure, and that a figure without rows is not drawn."""

import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from flora.bench.figures import BARS, FIGURES, drawable, drawable_bars
from flora.bench.plots import PLOTS, Curve, curves_of
from flora.bench.suites import FULL, SUITES, entries_of
from flora.cli import main
from flora.serve.config import EngineConfig


def row(label: str, **fields: Any) -> dict[str, Any]:
    return {"label": label, "commit": "a", "system": "flora", "adapters": 200, "fixed_slots": None, **fields}


SET_ASIDE = {"slot_bytes": 9}
SLOTS = [
    row("S2/200", req_s=30.0, pool_gib=54.0, switches={"slot_bytes": None}),
    row("S2/200/fixed-144", req_s=20.0, pool_gib=54.0, fixed_slots=144, switches={"max_adapters": 144, **SET_ASIDE}),
    row("S2/200/fixed-128", req_s=24.0, pool_gib=54.0, fixed_slots=128, switches={"max_adapters": 128, **SET_ASIDE}),
    row("S2/200/capped", req_s=9.0, pool_gib=7.1),
    row("S2/200/capped/fixed-8", req_s=5.0, pool_gib=7.1, fixed_slots=8),
    row("S2/200/capped/fixed-20", req_s=6.0, pool_gib=7.1, fixed_slots=20),
]


def test_slots_are_curves_and_the_unified_pool_is_their_level():
    assert curves_of(PLOTS["slots"], SLOTS) == [
        Curve("pool gib 54.0", ((128.0, 24.0), (144.0, 20.0)), base=30.0),
        Curve("pool gib 7.1", ((8.0, 5.0), (20.0, 6.0)), base=9.0),
    ]


def test_a_plot_over_a_switch_finds_it_among_the_switches():
    rows = [row(f"S2/32/{n}", req_s=1.0 + (n or 0), switches={"cluster": n, "fairness": False}) for n in (None, 2, 8)]

    assert curves_of(PLOTS["clusters"], rows) == [Curve("", ((2.0, 3.0), (8.0, 9.0)), base=1.0)]


def test_every_figure_has_measurements_whose_rows_it_is_drawn_from():
    engine = EngineConfig(base=Path(), registry="", cache_dir=Path())
    labels = [entry.label for entry in entries_of(list(SUITES), engine, FULL)]
    labels += ["cost/adapters/20", "cost/checkpoints/20"]
    rows = [
        row(label, **dict.fromkeys(("req_s", "slo_attainment", "gpu_s_per_m_tok"), 1.0), adapters=1 + i, cv=1 + i,
            fine_tunes=1 + i, fixed_slots=2 + i, switches={"cluster": 2 + i})
        for i, label in enumerate(labels)
    ]  # fmt: skip

    assert [figure.name for figure, _, _ in drawable(rows)] == [figure.name for figure in FIGURES]


def test_every_bar_is_of_a_measurement_that_a_suite_or_a_script_makes():
    engine = EngineConfig(base=Path(), registry="", cache_dir=Path())
    labels = {entry.label for entry in entries_of(list(SUITES), engine, FULL)} | {"peft/100", "vllm/100"}

    assert {label for bars in BARS for label in bars.words} <= labels


def test_bars_are_as_long_as_their_figures_and_one_alone_is_not_drawn(tmp_path):
    rows = [row("S2/5", req_s=24.0), row("S2/5/merged", req_s=6.0), row("peft/100", req_s=0.2)]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(r) + "\n" for r in rows))

    assert [(bars.name, values) for bars, values in drawable_bars(rows)] == [
        ("merged", [("on the fly", 24.0), ("merged, in the best order", 6.0)])
    ]
    assert main(["bench", "figures", str(file), "--out", str(tmp_path)]) == 0

    drawn = ElementTree.parse(tmp_path / "merged.svg").getroot()
    widths = [float(each.get("width", 0)) for each in drawn.iter() if each.get("class") == "bar"]
    assert widths[0] == pytest.approx(4 * widths[1])
    assert {"24", "6", "on the fly"} <= {each.text for each in drawn.iter() if each.get("class") == "label"}
    assert not (tmp_path / "peft.svg").exists()


def test_what_has_no_points_is_not_drawn(tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(r) + "\n" for r in [*SLOTS, row("table/5", req_s=3.0)]))

    assert main(["bench", "figures", str(rows), "--out", str(tmp_path / "drawn")]) == 0

    assert [file.name for file in (tmp_path / "drawn").iterdir()] == ["slots.svg"]
    drawn = ElementTree.parse(tmp_path / "drawn" / "slots.svg").getroot()
    texts = [text.text for text in drawn.iter("{http://www.w3.org/2000/svg}text")]
    assert "pool gib 7.1; dashed: a unified pool of true ranks, 9" in texts


def test_rows_of_slots_that_lent_their_pages_are_not_drawn_among_those_that_do_not():
    """They stand in the file under labels of their own: `S2/200/slots-64` was measured before memory was set aside."""
    lent = [row("S2/200/slots-64", req_s=26.0, pool_gib=54.0, fixed_slots=144)]

    assert [len(curves) for _, _, curves in drawable(SLOTS + lent)] == [2]
    assert list(drawable(lent + SLOTS[:1])) == []


@pytest.mark.parametrize("figure", FIGURES, ids=lambda figure: figure.name)
def test_every_figure_has_a_plot(figure):
    assert figure.plot in PLOTS
