"""benchmarks/profile_steps.py: what it makes of the spans that the profiler saw."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

from flora.serve.engine.schedule.scheduler import Chunk

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "profile_steps.py"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("profile_steps", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["profile_steps"] = module
    spec.loader.exec_module(module)
    return module


def test_kernels_side_by_side_count_once_as_time_and_each_as_its_own(script):
    profile = script.StepProfile(lambda *_: None, 0, 2)
    profile.held = [
        {"rows": 3, "sequences": 3, "context": 30, "distinct": 1},
        {"rows": 9, "sequences": 4, "context": 50, "distinct": 3},
    ]
    profile.spans = [(0.0, 1000.0, "shrink"), (500.0, 1500.0, "product"), (2000.0, 3000.0, "shrink")]

    found = script.summary(profile)

    assert (found["steps"], found["with_prompts"]) == (2, 1)
    assert (found["rows"], found["context"], found["distinct"]) == (6, 40, 2)
    assert found["step_ms"] == pytest.approx(1.5)
    assert found["busy_ms"] == pytest.approx(1.25)  # 500 us of two at once, 500 of none
    assert list(found["kernels"]) == ["shrink", "product"]
    assert found["kernels"]["shrink"] == {"ms": 1.0, "launches": 1.0, "us": 1000.0}


def test_what_a_step_holds_counts_prompts_rows_but_not_their_context(script):
    chunks = [Chunk(None, 40, 1, True), Chunk(None, 8, 5, True)]
    assert script._held(chunks, [3, None]) == {"rows": 6, "sequences": 2, "context": 41, "distinct": 1}
