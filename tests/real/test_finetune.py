"""Full fine-tunes of our own making: all weights move, again to the same bits, and the study takes them from there."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from flora.checkpoint import open_checkpoint
from flora.extract import ExtractConfig, Wish, extract
from flora.rank import RankRule
from tests.real import tiny
from tests.real.scripts import script

study, Canvas = script("study"), script("canvas").Canvas
Training, fine_tune = script("finetune").Training, script("finetune").fine_tune
TASKS, spelled = script("made_tasks").TASKS, script("made_tasks").spelled
Level, own_pair = script("levels").Level, script("pairs").own_pair

TRAINING = Training(steps=12, batch_size=16, lr=3e-3, seed=0, num_train=100)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_base(tmp_path_factory.mktemp("finetune") / "base")


@pytest.fixture(scope="module")
def tuned(base: Path) -> Path:
    return base.with_name("tuned")


@pytest.fixture(scope="module", autouse=True)
def row(base: Path, tuned: Path) -> dict:
    return fine_tune(base, "sort", tuned, TRAINING, questions=20)


def test_every_weight_is_trained_and_stored_like_the_bases(base: Path, tuned: Path, row: dict):
    before, after = load_file(base / "model.safetensors"), load_file(tuned / "model.safetensors")

    assert before.keys() == after.keys()
    assert all(tensor.dtype == torch.bfloat16 for tensor in after.values())
    assert not [name for name in before if torch.equal(before[name], after[name])]
    assert row["nll"] < row["nll_before"] - 0.3
    assert 0 < row["relative_change"] < 1


def test_the_same_seed_gives_the_same_bytes_and_another_seed_others(base: Path, tuned: Path, tmp_path: Path):
    fine_tune(base, "sort", tmp_path / "again", TRAINING, questions=20)
    fine_tune(base, "sort", tmp_path / "other", Training(12, 16, 3e-3, seed=1, num_train=100), questions=20)

    once, again, other = (path / "model.safetensors" for path in (tuned, tmp_path / "again", tmp_path / "other"))
    assert once.read_bytes() == again.read_bytes()
    assert once.read_bytes() != other.read_bytes()


def test_the_study_takes_the_pair_and_measures_no_row_twice(base: Path, tuned: Path, tmp_path: Path):
    out = tmp_path / "rows.jsonl"
    levels = [
        Level("tuned"),
        Level("uncut", "linear"),
        Level("rank", "all", 4),
        Level("energy", "all", 0.9),
        Level("prune", "all", 0.9),
        Level("budget", "all", 8),
        Level("module energy", "all", 8),
    ]
    first = study.Study(own_pair("sort", base, tuned, 20), "cpu", out, tmp_path / "hashes")
    rows = {level.how: first.measure(level) for level in levels}
    written = out.read_bytes()
    (base / "model.safetensors").touch()  # would be read anew

    second = study.Study(own_pair("sort", base, tuned, 20), "cpu", out, tmp_path / "hashes")

    assert [second.measure(level) for level in levels] == [json.loads(line) for line in written.splitlines()]
    assert out.read_bytes() == written
    assert rows["energy"]["kept_share_of_modules"] >= 0.9
    assert rows["prune"]["equal_ranks"] > 0.9
    assert rows["prune"]["distance"] < 0.05
    assert rows["energy"]["nll"] == pytest.approx(rows["tuned"]["nll"], abs=0.1)
    for how in ("budget", "module energy"):
        assert 0.8 < rows[how]["bytes"] / rows[how]["of_bytes"] < 1.1
    assert rows["budget"]["kept_share"] >= rows["module energy"]["kept_share"] - 0.02


def test_a_merged_adapter_is_added_exactly_and_leaves_the_base_as_it_was(base: Path, tuned: Path):
    config = ExtractConfig(RankRule(max_rank=8), wish=Wish(embeddings=True, vectors=True))
    adapter = extract(open_checkpoint(base), open_checkpoint(tuned), config).adapter
    canvas = Canvas(base, "cpu")
    before = {name: tensor.clone() for name, tensor in canvas.model.named_parameters()}

    with torch.no_grad(), canvas.with_adapter(adapter) as model:
        during = {name: tensor.clone() for name, tensor in model.named_parameters()}

    assert during.keys() == before.keys()
    for name, factors in adapter.factors.items():
        torch.testing.assert_close(during[f"{name}.weight"], before[f"{name}.weight"] + factors.delta())
    for name, tensor in adapter.exact.items():
        assert torch.equal(during[name], tensor.float())
    assert all(torch.equal(tensor, before[name]) for name, tensor in canvas.model.named_parameters())


def test_bits_survive_their_digits():
    bits = (True, False, False, True, True, False)

    assert study.digits_of(bits) == "98"
    assert study.bits_of("98", 6) == list(bits)


def test_numbers_are_spelled():
    assert spelled(0) == "zero"
    assert spelled(40_312) == "forty thousand three hundred twelve"
    assert spelled(700_019) == "seven hundred thousand nineteen"
    assert spelled(90_500) == "ninety thousand five hundred"


@pytest.mark.parametrize("name", sorted(TASKS))
def test_no_question_of_the_test_side_is_ever_trained_on(name: str):
    train, test = TASKS[name].train(2000, seed=3), TASKS[name].test(200)

    assert not {example.prompt for example in train} & {example.prompt for example in test}
    assert TASKS[name].test(50) == test[:50]
