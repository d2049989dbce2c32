"""Divergences of next-token distributions, with transformers' and PEFT's own forward pass as judges."""

import pytest
import torch

from flora.adapter import make_adapter
from flora.algebra.likeness import compare_answers, read_prompts
from flora.checkpoint import open_checkpoint
from flora.errors import CheckpointError, Unsupported, UsageError
from flora.extract import ExtractConfig, Wish, extract
from flora.lowrank import LowRank
from flora.rank import RankRule
from flora.registry.formats.peft import save_peft
from tests.cli.models import make_base, make_tuned

PROMPTS = ["copy:saberu=", "upper:ma="]


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    folder = tmp_path_factory.mktemp("likeness")
    base = make_base(folder / "base")
    return open_checkpoint(base), open_checkpoint(make_tuned(base, folder / "tuned"))


def log_probabilities(model, tokenizer, prompt):
    with torch.inference_mode():
        return model(**tokenizer(prompt, return_tensors="pt")).logits[0].double().log_softmax(1)


def test_the_divergences_are_those_of_peft_and_torch(pair, tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base, tuned = pair
    adapter = extract(base, tuned, ExtractConfig(rule=RankRule(max_rank=2), factor_dtype="float32")).adapter
    save_peft(adapter, tmp_path / "adapter")
    tokenizer = AutoTokenizer.from_pretrained(base.path)
    theirs, ours = (AutoModelForCausalLM.from_pretrained(one.path, dtype=torch.float32).eval() for one in pair[::-1])
    wanted = [log_probabilities(theirs, tokenizer, prompt) for prompt in PROMPTS]
    alone = [log_probabilities(ours, tokenizer, prompt) for prompt in PROMPTS]
    adapted = PeftModel.from_pretrained(ours, tmp_path / "adapter").eval()
    with_adapter = [log_probabilities(adapted, tokenizer, prompt) for prompt in PROMPTS]

    likeness = compare_answers(adapter, base, tuned, PROMPTS)

    for prompt, target, bare, full in zip(likeness.prompts, wanted, alone, with_adapter, strict=True):
        kl = [torch.nn.functional.kl_div(one, target, log_target=True, reduction="none").sum(1) for one in (bare, full)]
        assert prompt.num_tokens == len(target)
        assert prompt.base_mean == pytest.approx(float(kl[0].mean()), rel=1e-3)
        assert prompt.adapter_mean == pytest.approx(float(kl[1].mean()), rel=1e-3)
        assert prompt.adapter_last == pytest.approx(float(kl[1][-1]), rel=1e-3)
        assert prompt.adapter_agrees == int((full.argmax(1) == target.argmax(1)).sum())
    assert likeness.mean("adapter_mean") < likeness.mean("base_mean")


def test_an_adapter_of_the_whole_change_answers_like_the_tuned_checkpoint(pair):
    """Every tensor, uncut: linear layers and tied embedding as factors, norms whole."""
    base, tuned = pair
    config = ExtractConfig(RankRule(max_rank=64), factor_dtype="float32", wish=Wish(embeddings=True, vectors=True))
    everything = extract(base, tuned, config).adapter

    likeness = compare_answers(everything, base, tuned, PROMPTS)

    assert everything.exact
    assert abs(likeness.mean("adapter_mean")) < 1e-6 * likeness.mean("base_mean")
    assert likeness.share("adapter_agrees") == 1.0


def test_modules_are_found_where_the_tree_names_them_otherwise(pair):
    base, tuned = pair
    adapter = extract(base, tuned, ExtractConfig(RankRule(max_rank=2))).adapter
    renamed = {name: f"old.{name}" for name in adapter.factors}
    header = adapter.header
    old = make_adapter({renamed[name]: one for name, one in adapter.factors.items()}, header.base, header.recipe)

    found = compare_answers(old, base, tuned, PROMPTS, {path: name for name, path in renamed.items()})

    assert found == compare_answers(adapter, base, tuned, PROMPTS)
    with pytest.raises(Unsupported, match=r"no parameter old\.model"):
        compare_answers(old, base, tuned, PROMPTS)


def test_an_adapter_that_does_nothing_answers_like_the_base(pair):
    base, tuned = pair
    adapter = extract(base, tuned, ExtractConfig(rule=RankRule(max_rank=2))).adapter
    nothing = {name: LowRank(A=0 * one.A, B=one.B) for name, one in adapter.factors.items()}

    likeness = compare_answers(make_adapter(nothing, adapter.header.base, adapter.header.recipe), base, tuned, PROMPTS)

    assert likeness.mean("adapter_mean") == likeness.mean("base_mean")


def test_prompts_are_the_lines_that_hold_anything(tmp_path):
    (tmp_path / "prompts").write_text("one\n\n  \ntwo  \n")

    assert read_prompts(tmp_path / "prompts") == ["one", "two  "]


@pytest.mark.parametrize("data", [b"", b"\n \n", b"\xff\xfe\x00a"])
def test_a_file_without_prompts_is_refused(tmp_path, data):
    (tmp_path / "prompts").write_bytes(data)

    with pytest.raises(UsageError):
        read_prompts(tmp_path / "prompts")


def test_a_base_without_a_tokenizer_is_refused(pair, tmp_path):
    import shutil

    base, tuned = pair
    bare = shutil.copytree(base.path, tmp_path / "bare")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (bare / name).unlink()
    adapter = extract(base, tuned, ExtractConfig(rule=RankRule(max_rank=1))).adapter

    with pytest.raises(CheckpointError, match="no tokenizer"):
        compare_answers(adapter, open_checkpoint(bare), tuned, PROMPTS)
