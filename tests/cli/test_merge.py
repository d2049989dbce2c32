"""`flora merge`: adapters to checkpoints, and several adapters to one."""

import json

import pytest

from flora.checkpoint import open_checkpoint
from tests.cli.models import make_base, make_tuned


@pytest.fixture
def two(stored, base, tmp_path):
    """A registry with `sql` and `chat`, of one base."""
    stored("extract", base, make_tuned(base, tmp_path / "chat", seed=5), "--rank", 6, "--name", "chat")
    return stored


def test_an_adapter_goes_back_into_a_checkpoint(stored, base, tuned, tmp_path):
    done = stored("merge", base, "sql", "--out", tmp_path / "out", "--json")

    merged, aim, start = (open_checkpoint(folder) for folder in (tmp_path / "out", tuned, base))
    name = "model.layers.0.self_attn.q_proj.weight"
    error = (merged.load(name).double() - aim.load(name).double()).norm()
    assert error < 0.2 * (start.load(name).double() - aim.load(name).double()).norm()
    assert done.json["id"] == str(tmp_path / "out")
    record = json.loads((tmp_path / "out" / "flora_merge.json").read_text())
    assert record["adapters"][0]["version_digest"] == stored("show", "sql", "--json").json["digest"]
    assert str(tmp_path) not in json.dumps(record)


def test_extraction_finds_the_adapter_in_its_checkpoint_again(stored, base, tmp_path):
    stored("merge", base, "sql", "--out", tmp_path / "out")

    again = stored("extract", base, tmp_path / "out", "--rank", 8, "--name", "again", "--json").json["adapters"][0]

    assert again["kept_share"] > 0.99


def test_several_become_one_adapter_with_its_lineage(two, base):
    done = two("merge", base, "sql", "chat", "--weight", 0.7, "--weight", 0.3, "--name", "both", "--json")

    assert done.json["ref"] == "both@v1"
    assert done.json["max_rank"] == 14
    assert done.json["distance_to_sum"] < 5e-3
    assert done.json["kept_share"] > 0.9999
    facts = two("show", "both", "--json").json
    assert facts["operation"] == "merge"
    assert facts["parents"] == [two("show", name, "--json").json["digest"] for name in ("sql", "chat")]
    assert facts["aliases"] == {"latest": 1}


@pytest.mark.parametrize("method", ["ties", "dare"])
def test_other_methods_and_a_cut(two, base, method):
    done = two("merge", base, "sql", "chat", "--method", method, "--rank", 8, "--name", "both", "--json")

    assert done.json["max_rank"] == 8
    assert 0.2 < done.json["kept_share"] < 1


def test_a_further_version_moves_no_alias_unless_told(two, base):
    for weight in (0.7, 0.6):
        two("merge", base, "sql", "--weight", weight, "--name", "both")
    assert two("show", "both", "--json").json["ref"] == "both@v1"

    two("merge", base, "sql", "--weight", 0.5, "--name", "both", "--alias", "prod")

    assert two("show", "both", "--json").json["ref"] == "both@v3"


def test_a_merged_adapter_is_a_peft_folder_like_any_other(two, base, tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    two("merge", base, "sql", "chat", "--name", "both")
    two("export", "both", "--out", tmp_path / "both")

    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "both")

    assert len([name for name, _ in model.named_parameters() if "lora_A" in name]) == 14


def test_the_human_answer_names_parts_and_loss(two, base, tmp_path):
    done = two("merge", base, "sql", "chat", "--name", "both", "--out", tmp_path / "out")

    rows = dict(done.rows)
    assert rows["ref"] == "both@v1"
    assert rows["out"] == str(tmp_path / "out")
    assert float(rows["distance_to_sum"]) < 5e-3


BAD_WORDS = [
    (["sql"], 2, "where the merge goes"),
    (["sql", "--weight", "1", "--weight", "2", "--name", "x"], 2, "2 weights are given for 1 adapters"),
    (["sql", "--weight", "0", "--name", "x"], 2, "zero or no number"),
    (["sql", "chat", "--method", "ties", "--density", "2", "--name", "x"], 2, "is not a share"),
    (["sql", "chat", "--method", "linear", "--name", "x"], 2, "ranks 6 and 8 cannot be added up"),
    (["sql", "--alias", "prod", "--out", "x"], 2, "--alias is for a merge that is registered"),
    (["nobody", "--name", "x"], 5, "nobody"),
    (["sql", "--out", "{base}"], 2, "is there already"),
]


@pytest.mark.parametrize(("words", "code", "message"), BAD_WORDS, ids=[" ".join(row[0]) for row in BAD_WORDS])
def test_words_that_make_no_merge_are_refused(two, base, words, code, message):
    done = two("merge", base, *[word.format(base=base) for word in words], code=code)

    assert message in done.err
    assert set(two("ls", "-q").out.split()) == {"sql", "chat"}


def test_another_base_is_refused(stored, tmp_path):
    done = stored("merge", make_base(tmp_path / "other", seed=4), "sql", "--out", tmp_path / "out", code=1)

    assert "error[FL-BASE]" in done.err
    assert not (tmp_path / "out").exists()
