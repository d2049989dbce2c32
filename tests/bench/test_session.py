"""The order in which a GPU session does things, and where it stops: the script itself, with a stand-in for Python.

What its steps measure is tested where they are; here they only write down that they were called.
"""

import os
import re
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu_session.sh"
STEPS = [
    *("tests", "gate", "table", "latency", "kernels", "served", "paper", "peft", "cost", "invariant", "fp8", "after"),
]
RESUMED_BY_ROWS = {"table", "served", "paper", "invariant", "fp8", "after"}
STAND_IN = """#!/bin/sh
echo "$*" >> "$CALLS"
case "$*" in *"$FAILS"*) exit 1 ;; esac
"""


@pytest.fixture
def session(tmp_path: Path):
    """Runs the script; (its exit status, what it called)."""
    python, calls = tmp_path / "python", tmp_path / "calls"
    python.write_text(STAND_IN)
    python.chmod(0o755)

    def run(*words: str, fails: str = "no such words", **environment: str) -> tuple[int, list[str]]:
        calls.write_text("")
        variables = {"PYTHON": str(python), "CALLS": str(calls), "FAILS": fails, "FLORA_COMMIT": "abc"}
        command = [str(SCRIPT), str(tmp_path / "rows"), *words]
        done = subprocess.run(command, env=os.environ | variables | environment, capture_output=True, timeout=60)
        return done.returncode, calls.read_text().splitlines()

    return run


def named(call: str) -> str:
    """The step that a call belongs to."""
    patterns = {"fp8": "--adapter-dtype", "narrow": "suite fp8", "tests": "-m pytest", "gate": "bench_gate",
                "after": "--beside-rows", "crowd": "suite after", "latency": "bench_latency",
                "kernels": "bench_kernels", "peft": "bench_peft", "cost": "bench_cost",
                "table": "suite table base linear leak", "served": "suite storm", "clients": "suite http",
                "paper": "suite paper", "invariant": "suite invariant", "claims": "bench claims"}  # fmt: skip
    return next(step for step, pattern in patterns.items() if pattern in call)


def steps_of(calls: list[str]) -> list[str]:
    """The steps that these calls belong to. Within one clients follow the storm, in another a crowd one stream, in a
    third rows of narrow adapters their gate.
    """
    return [step for step in map(named, calls) if step not in ("clients", "crowd", "narrow")]


def test_every_step_has_its_minutes():
    listed = subprocess.run([str(SCRIPT), "--list"], capture_output=True, text=True, check=True).stdout.splitlines()

    assert [line.split()[0] for line in listed] == STEPS
    assert all(re.match(r"\w+ +\d+ \d+ \S", line) for line in listed)
    assert all(int(line.split()[1]) < int(line.split()[2]) for line in listed)


def test_the_worthiest_come_first_and_the_claims_last(session):
    code, calls = session("9999")

    assert code == 0
    assert steps_of(calls) == [*STEPS, "claims"]
    assert all("--commit abc" in call and "--budget" in call for call in calls if "suite" in call)


def test_a_second_call_repeats_only_what_its_own_rows_resume(session):
    session("9999")

    _, again = session("9999")
    _, of_other_code = session("9999", FLORA_COMMIT="def")

    assert steps_of(again) == [*(step for step in STEPS if step in RESUMED_BY_ROWS), "claims"]
    assert steps_of(of_other_code) == [*STEPS, "claims"]


def test_nothing_is_timed_that_is_not_exact(session):
    code, calls = session("9999", fails="bench_gate")

    assert code == 1
    assert steps_of(calls) == ["tests", "gate"]


def test_a_step_that_fails_is_tried_again_and_the_others_go_on(session):
    code, calls = session("9999", fails="bench_latency")
    _, again = session("9999")

    assert code == 0
    assert steps_of(calls) == [*STEPS, "claims"]
    assert "latency" in steps_of(again)


def test_nothing_is_timed_where_the_gate_had_no_time(session):
    code, calls = session("80")
    alone, of_one = session("9999", STEPS="peft")

    assert (code, calls, alone, of_one) == (1, [], 1, [])


def test_nothing_begins_that_needs_more_time_than_is_left(session):
    session("9999", STEPS="gate")

    _, calls = session("80")

    # an engine and a row fit in 70 seconds, latency and peft take 75, the tests 170
    assert steps_of(calls) == ["table", "latency", "served", "paper", "peft", "claims"]


def test_steps_can_be_named(session):
    _, calls = session("9999", STEPS="gate peft cost")

    assert steps_of(calls) == ["gate", "peft", "cost", "claims"]
