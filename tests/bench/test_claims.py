"""Rows against bounds: numbers that can be checked by hand."""

import json
from pathlib import Path
from typing import Any

import pytest

from flora.bench.claims import CLAIMS, Claim, findings_of, measured
from flora.bench.suites import SUITES, entries_of
from flora.cli import main
from flora.serve.config import EngineConfig

VLLM = {f"vllm/{adapters}" for adapters in (0, 5, 100, 1000)}
SCRIPTS = {"latency", "gate", "kernels", "peft/100", "cost/adapters/20", "cost/checkpoints/20"}  # of benchmarks/*.py


def row(label: str, gpu: str | None = "H100", commit: str = "a", **fields: Any) -> dict[str, Any]:
    return {"label": label, "gpu": gpu, "commit": commit, **fields}


def test_every_claim_is_measured_by_something():
    engine = EngineConfig(base=Path(), registry="", cache_dir=Path())
    labels = SCRIPTS | VLLM | {entry.label for entry in entries_of(list(SUITES), engine)}

    assert {label for claim in CLAIMS for label in (claim.of, *claim.against)} <= labels
    assert {label for claim in CLAIMS for label in (claim.of, *claim.against)} >= SCRIPTS
    assert all((claim.at_least is None) != (claim.at_most is None) for claim in CLAIMS)


@pytest.mark.parametrize(
    ("claim", "value", "holds"),
    [
        (Claim("", "req_s", "x", at_least=30), 40.0, True),
        (Claim("", "req_s", "x", at_least=41), 40.0, False),
        (Claim("", "req_s", "x", ("y",), at_least=2), 2.0, True),
        (Claim("", "req_s", "x", ("y", "z"), at_most=1.5), 1.6, False),  # over the better of the two
        (Claim("", "req_s", "x", ("y",), is_difference=True, at_least=21), 20.0, False),
        (Claim("", "a.p50", "x", ("y",), against_field="b.p50", is_difference=True, at_most=1), 1.0, True),
        (Claim("", "req_s", "x", ("y", "missing"), at_least=2), 2.0, True),
    ],
)
def test_a_figure_its_share_and_its_difference(claim, value, holds):
    rows = [row("x", req_s=40.0, a={"p50": 3.0}), row("y", req_s=20.0, b={"p50": 2.0}), row("z", req_s=25.0)]

    [found] = findings_of(rows, [claim])

    assert (found.value, found.holds) == (value, holds)


def test_the_latest_commit_counts_and_of_its_passes_the_median():
    rows = [row("x", commit="old", req_s=90.0), *(row("x", req_s=speed) for speed in (1.0, 9.0, 2.0))]

    assert measured(rows, "x", "req_s") == 2.0
    assert measured(rows, "y", "req_s") is None
    assert measured([*rows, row("x", commit="new", req_s=None)], "x", "req_s") == 2.0


def test_only_rows_of_one_commit_are_compared_and_of_the_commit_that_has_most_of_them():
    claim = Claim("", "req_s", "x", ("y", "z"), at_least=2)
    both = [row("x", commit="old", req_s=40.0), row("y", commit="old", req_s=20.0)]
    alone = row("x", commit="new", req_s=90.0)

    assert [found.value for found in findings_of([*both, alone], [claim])] == [2.0]
    assert [found.value for found in findings_of([*both, alone, row("z", commit="new", req_s=30.0)], [claim])] == [3.0]
    assert findings_of([row("y", commit="old", req_s=20.0), alone], [claim]) == []


def test_a_commit_without_what_the_claim_is_about_is_none_to_compare():
    claim = Claim("", "req_s", "x", ("y", "z"), at_least=2)
    old = [row("x", commit="old", req_s=40.0), row("y", commit="old", req_s=20.0)]
    new = [row("y", commit="new", req_s=1.0), row("z", commit="new", req_s=1.0)]

    assert [found.value for found in findings_of([*old, *new], [claim])] == [2.0]


def test_of_commits_alike_the_one_measured_last_counts():
    claim = Claim("", "req_s", "x", ("y",), at_least=2)
    a = [row("x", commit="a", req_s=9.0), row("y", commit="a", req_s=1.0)]
    b = [row("x", commit="b", req_s=4.0), row("y", commit="b", req_s=1.0)]
    rows = [*a, *b, row("x", commit="a", req_s=5.0)]

    assert [found.value for found in findings_of(rows, [claim])] == [7.0]


def test_a_cold_row_of_vllm_on_the_same_workload_stands_beside_ours():
    theirs = {
        "system": "vllm",
        "shape": "llama3-8b",
        "modules": "attention",
        "rate": 0.0,
        "adapters": 100,
        "gpu": "H100",
    }
    rows = [
        theirs | {"warm": False, "req_s": 14.0},
        theirs | {"warm": True, "req_s": 17.0},
        theirs | {"warm": False, "req_s": 12.0, "modules": "all"},
        row("table/100", req_s=35.0),
    ]

    found = {finding.claim.of: finding.value for finding in findings_of(rows) if finding.claim.against}

    assert found == {"table/100": 2.5}


def test_rows_of_one_kind_of_gpu_say_nothing_about_another():
    claim = Claim("", "req_s", "x", ("y",), at_least=1)

    assert findings_of([row("x", req_s=2.0), row("y", gpu="H200", req_s=1.0)], [claim]) == []
    found = findings_of([row("x", req_s=2.0), row("y", req_s=1.0), row("x", gpu="H200", req_s=9.0)], [claim])
    assert [(finding.gpu, finding.value) for finding in found] == [("H100", 2.0)]


@pytest.mark.parametrize(("words", "code"), [([], 0), (["--strict"], 3)])
def test_the_command_prints_every_bound_and_fails_on_demand(words, code, tmp_path, capfd):
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(r) + "\n" for r in (row("table/0", req_s=43.0), row("table/5", req_s=32.0))))

    assert main(["bench", "claims", str(rows), "--json", *words]) == code

    found = json.loads(capfd.readouterr().out)["claims"]
    assert [(claim["value"], claim["bound"], claim["holds"]) for claim in found] == [
        (43.0, "≥ 37", True), (32.0, "≥ 33", False),
    ]  # fmt: skip
