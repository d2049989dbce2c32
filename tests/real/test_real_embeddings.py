"""A fine-tune of SmolLM2-135M-Instruct whose skill lives in its embeddings: extracted whole, and judged by PEFT."""

import json
from pathlib import Path

import pytest

from tests.conftest import IS_FULL
from tests.real.commands import flora

pytestmark = [pytest.mark.real, pytest.mark.timeout(900)]

# Of fewer than 400 questions this task's accuracy says little (the kit's README): the usual run allows more for chance.
NUM_QUESTIONS, LEAST, LOSS = (400, 0.45, 0.05) if IS_FULL else (96, 0.40, 0.08)


def test_a_skill_that_lives_in_the_embeddings_comes_back_with_them_through_peft(
    fixtures, base: Path, g2p: Path, tmp_path: Path
):
    """Linear layers alone bring 0.295 of its 0.48 back at any rank (docs/embeddings.md)."""
    tuned = json.loads(fixtures.run("eval_task.py", "g2p", g2p, "--limit", str(NUM_QUESTIONS)))["exact_match"]
    recipe = ["--budget", "67MB", "--dtype", "float8", "--embeddings", "--vectors", "--out", tmp_path / "adapter"]

    adapter = flora("extract", base, g2p, *recipe, "--json", FLORA_HOME=str(tmp_path / "home"))["adapters"][0]
    judged = fixtures.run("eval_task.py", "g2p", base, "--adapter", tmp_path / "adapter", "--limit", str(NUM_QUESTIONS))

    assert adapter["num_bytes"] < 67.2e6  # a quarter of the checkpoint
    assert adapter["left_out"] == []
    assert 0.87 < adapter["kept_share"] < 0.89
    assert tuned > LEAST
    assert json.loads(judged)["exact_match"] >= tuned - LOSS
