"""benchmarks/simulate.py: the engine's real schedule over a device that only counts what a step costs."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from flora.bench.claims import measured

ROOT = Path(__file__).parents[2]
TOKENS_A_REQUEST = 260  # of the answers, on average
SEED = 42  # of what is simulated


def simulated(*arguments: str) -> list[dict[str, Any]]:
    command = [sys.executable, str(ROOT / "benchmarks/simulate.py"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture(scope="module")
def many() -> dict[str, Any]:
    return simulated("S2", "200", "--requests", "60", "--pool-gib", "7.08")[0]


def test_every_step_costs_its_weights_and_every_adapter_is_loaded_at_least_once(many):
    steps_s = 60 / many["req_s"]
    assert many["steps"] * 0.0047 < steps_s < many["steps"] * 0.02
    assert 40 < many["loads"] <= 60
    assert many["rows_a_step"] * many["steps"] == pytest.approx(60 * TOKENS_A_REQUEST, rel=0.1)


def test_slots_that_are_set_aside_leave_less_room(many):
    (slots,) = simulated("S2", "200", "--requests", "60", "--pool-gib", "7.08", "--fixed-slots", "16")
    assert slots["rows_a_step"] < many["rows_a_step"]
    assert slots["req_s"] < many["req_s"]


def test_few_adapters_are_faster_than_many_and_merged_ones_take_turns(many):
    few, _ = simulated("S2", "5", "200", "--requests", "60", "--pool-gib", "7.08")
    (turns,) = simulated("S2", "5", "--requests", "60", "--pool-gib", "7.08", "--merged", "2416")
    assert turns["req_s"] < many["req_s"] < few["req_s"]
    assert turns["loads"] == 0


def test_adapters_that_only_read_are_faster_and_cost_what_their_bytes_do(many):
    """With none at all nothing changes; with adapters their bytes are all that is left, so they are no longer free."""
    few = ("--requests", "60", "--pool-gib", "7.08")
    (reads,) = simulated("S2", "200", *few, "--only-reads")
    (none,) = simulated("S2", "0", *few)
    (none_reads,) = simulated("S2", "0", *few, "--only-reads")

    assert none_reads["req_s"] == none["req_s"]
    assert many["req_s"] < reads["req_s"] < none["req_s"]


SIMULATED = {  # labels of the suite's rows, one for each number of adapters: how they are simulated
    ("S1/5", "S1/2000"): ("S1", "5", "2000"),
    ("S2/5", "S2/2000"): ("S2", "5", "2000"),
}
SIMULATED_LONG = {
    ("S2/2000/cluster-100",): ("S2", "2000", "--cluster", "100"),
    ("S2/200",): ("S2", "200"),
    ("S2/200/fixed-144",): ("S2", "200", "--fixed-slots", "144"),
    ("S2/2000/fixed-176",): ("S2", "2000", "--fixed-slots", "176"),
    ("S2/200/capped",): ("S2", "200", "--pool-gib", "7.08", "--requests", "400"),
    ("S2/200/capped/fixed-20",): ("S2", "200", "--pool-gib", "7.08", "--requests", "400", "--fixed-slots", "20"),
    ("S2/200/capped/fixed-24",): ("S2", "200", "--pool-gib", "7.08", "--requests", "400", "--fixed-slots", "24"),
    ("table/0", "table/5", "table/100"): ("G1", "0", "5", "100", "--pool-gib", "54"),
    ("table/1000", "table/2000"): ("G1", "1000", "2000", "--pool-gib", "54"),
}


@pytest.mark.parametrize(
    ("labels", "arguments"),
    [*SIMULATED.items(), *(pytest.param(*case, marks=pytest.mark.long) for case in SIMULATED_LONG.items())],
)
def test_it_gives_the_throughput_that_an_h100_gave(labels, arguments):
    lines = (ROOT / "benchmarks/results/suite.jsonl").read_text().splitlines()
    rows = [row for row in map(json.loads, lines) if row.get("seed") == SEED]
    for label, found in zip(labels, simulated(*arguments), strict=True):
        assert found["req_s"] == pytest.approx(measured(rows, label, "req_s"), rel=0.025), label
