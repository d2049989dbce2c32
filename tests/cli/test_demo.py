"""`flora demo`: what it must show, and that it shows it."""

import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest

from flora.cli.gates import TaskResult, broken_gates
from flora.demo import BASE_SKILLS, TASKS, held_out
from flora.demo.language import training_examples
from tests.cli.schemas import check_answer

GOOD = TaskResult(
    task="caesar",
    num_items=200,
    base_accuracy=0.0,
    tuned_accuracy=0.9,
    served_accuracy=0.88,
    max_rank=40,
    max_rank_share=0.25,
    kept_share_of_modules=0.95,
    kept_share=0.94,
    checkpoint_bytes=1000,
    adapter_bytes=400,
)


def test_no_gate_is_broken_where_every_bound_holds():
    assert broken_gates(256, [GOOD], tokens_during_load=1) == []


@pytest.mark.parametrize(
    "spoilt",
    [
        {"num_items": 199},
        {"base_accuracy": 0.21},
        {"tuned_accuracy": 0.79, "served_accuracy": 0.79},
        {"served_accuracy": 0.86},
        {"max_rank_share": 0.34},
        {"adapter_bytes": 401},
    ],
    ids=lambda values: ",".join(values),
)
def test_each_bound_is_a_gate_of_its_own(spoilt):
    (broken,) = broken_gates(256, [replace(GOOD, **spoilt)], tokens_during_load=1)

    assert broken.startswith("caesar: ")


def test_a_small_model_or_a_load_with_nothing_streaming_breaks_a_gate():
    assert len(broken_gates(255, [GOOD], tokens_during_load=1)) == 1
    assert len(broken_gates(256, [GOOD], tokens_during_load=0)) == 1


def test_the_tasks_are_the_ciphers_they_say():
    caesar, atbash, vigenere = TASKS

    assert caesar.answer("abcxyz") == "defabc"
    assert atbash.answer("abcxyz") == "zyxcba"
    assert vigenere.answer("aaaaaa") == "floraf"


def test_held_out_words_are_never_trained_on():
    words = {example.prompt for task in TASKS for example in held_out(task, 200, seed=3)}
    examples = training_examples([*BASE_SKILLS, *TASKS], seed=3)

    assert len(words) == 3 * 200
    assert not words & {next(examples).prompt for _ in range(20_000)}


@pytest.mark.timeout(1200)
def test_the_demo_shows_what_it_says(tmp_path):
    words = ["demo", "--out", str(tmp_path / "demo"), "--json"]
    done = subprocess.run([sys.executable, "-m", "flora", *words], capture_output=True, text=True, env=os.environ)

    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    check_answer(words, told, closed=True)
    assert told["broken_gates"] == []
    assert [row["task"] for row in told["tasks"]] == [task.name for task in TASKS]
    assert told["hidden_size"] >= 256
    assert told["tokens_during_load"] > 0
    for row in told["tasks"]:
        assert row["num_items"] == 200
        assert row["base_accuracy"] <= 0.2
        assert row["tuned_accuracy"] >= 0.8
        assert row["served_accuracy"] >= row["tuned_accuracy"] - 0.03
        assert row["kept_share_of_modules"] >= 0.95
        assert row["adapter_bytes"] <= 0.4 * row["checkpoint_bytes"]
        assert row["checkpoint_bytes"] < (tmp_path / "demo" / row["task"] / "model.safetensors").stat().st_size
    assert every_weight_changed(tmp_path / "demo")


def every_weight_changed(folder) -> bool:
    """Embeddings and norms too: a full fine-tune, rounded to bf16."""
    from safetensors.torch import load_file

    base, *tuned = (
        load_file(folder / name / "model.safetensors") for name in ("cipher-base", *(t.name for t in TASKS))
    )
    return all(not base[name].equal(weights[name]) for weights in tuned for name in base)
