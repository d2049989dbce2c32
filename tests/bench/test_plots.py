"""Rows to curves, and curves to a file that any browser draws."""

import json
from xml.etree import ElementTree

import pytest

from flora.bench.plots import PLOTS, Curve, curves_of
from flora.cli import main
from flora.cli.bench_plot import draw_plot
from flora.errors import UsageError

THROUGHPUT, BURST = PLOTS["throughput"], PLOTS["burst"]
SVG = "{http://www.w3.org/2000/svg}"


def row(adapters: int, req_s: float, **facts: object) -> dict[str, object]:
    return {"system": "flora", "adapters": adapters, "req_s": req_s, "commit": "a", "seed": 42, **facts}


def test_what_differs_between_rows_names_the_curves():
    rows = [row(5, 30.0), row(100, 20.0), row(5, 24.0, system="vllm"), row(100, 14.0, system="vllm")]

    assert curves_of(THROUGHPUT, rows) == [
        Curve("flora", ((5.0, 30.0), (100.0, 20.0))),
        Curve("vllm", ((5.0, 24.0), (100.0, 14.0))),
    ]


def test_a_curve_of_its_own_kind_needs_no_name_and_the_base_alone_is_a_level():
    assert curves_of(THROUGHPUT, [row(100, 20.0), row(0, 43.0), row(5, 30.0)]) == [
        Curve("", ((5.0, 30.0), (100.0, 20.0)), base=43.0)
    ]


def test_seeds_count_by_their_median_and_commits_by_their_latest():
    seeds = [row(5, speed, seed=seed) for seed, speed in ((1, 10.0), (2, 30.0), (3, 20.0))]

    assert curves_of(THROUGHPUT, [row(5, 99.0, commit="before"), *seeds])[0].points == ((5.0, 20.0),)


def test_switches_name_curves_too():
    rows = [
        {"cv": cv, "slo_attainment": share, "switches": {"slo_ttft_s": slo, "num_loaders": cv}}
        for slo, cv, share in ((None, 1, 0.5), (6.0, 1, 0.75), (None, 4, 0.25), (6.0, 4, 0.5))
    ]

    assert curves_of(BURST, rows) == [
        Curve("nobody is given up", ((1.0, 50.0), (4.0, 25.0))),
        Curve("given up after 6 s without a token", ((1.0, 75.0), (4.0, 50.0))),
    ]


def test_an_older_row_that_says_less_is_no_other_curve():
    rows = [row(5, 30.0), row(100, 20.0, merged=False, switches={"fairness": True})]

    assert [curve.name for curve in curves_of(THROUGHPUT, rows)] == [""]


def test_rows_without_the_field_are_refused_by_its_name():
    with pytest.raises(UsageError, match="cv, slo_attainment"):
        curves_of(BURST, [row(5, 30.0)])


@pytest.mark.parametrize("name", PLOTS)
def test_each_plot_is_one_well_formed_svg_with_every_point_and_name(name):
    plot = PLOTS[name]
    rows = [
        {"system": system, plot.x: x} | dict.fromkeys((field for field, _ in plot.ys), 0.5 + x)
        for system in ("a<b", "c&d")
        for x in (1, 20, 300)
    ]

    drawn = ElementTree.fromstring(draw_plot(plot, curves_of(plot, rows), "100 < 200"))

    texts = [text.text for text in drawn.iter(f"{SVG}text")]
    assert {"100 < 200", plot.x_title, plot.y_title} <= set(texts)
    assert any("a<b" in str(text) for text in texts)
    assert len(list(drawn.iter(f"{SVG}circle"))) == 6 * len(plot.ys)
    assert not list(drawn.iter(f"{SVG}script"))


def test_files_of_rows_become_a_file(tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(row(n, 40.0 - n / 100)) + "\n" for n in (0, 5, 100, 1000)))

    assert main(["bench", "plot", str(rows), "--out", str(tmp_path / "plot.svg")]) == 0

    drawn = ElementTree.parse(tmp_path / "plot.svg").getroot()
    assert len(list(drawn.iter(f"{SVG}circle"))) == 3
    assert "dashed: the base alone, 40" in [text.text for text in drawn.iter(f"{SVG}text")]


@pytest.mark.parametrize(
    ("text", "words", "named"),
    [
        ("{", [], "line 1"),
        ("{}\n", [], "no row has"),
        ("{}\n", ["--show", "all"], "--show 'all'"),
    ],
)
def test_what_cannot_be_drawn_is_a_usage_error(text, words, named, tmp_path, capfd):
    rows = tmp_path / "rows.jsonl"
    rows.write_text(text)

    assert main(["bench", "plot", str(rows), "--out", str(tmp_path / "plot.svg"), *words]) == 2
    assert named in capfd.readouterr().err
    assert not (tmp_path / "plot.svg").exists()
