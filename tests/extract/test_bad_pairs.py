"""Pairs that cannot be extracted: each refused with what happened, where, and what to do."""

import json
import shutil

import pytest
import torch

from flora.checkpoint import open_checkpoint
from flora.errors import CheckpointError, NotFinite, PickleRefused, ShapeMismatch, UsageError
from flora.extract import ExtractConfig, extract, plan_extraction
from flora.rank import RankRule
from tests.extract.models import build, rewrite, save, tune

RANK_8 = ExtractConfig(RankRule(max_rank=8))


@pytest.fixture
def unread(monkeypatch):
    """Fails the test if any weight is read: a plan, and its errors, come from headers alone."""
    from flora.checkpoint import Checkpoint

    def load(self, name):
        raise AssertionError(f"{name} was read")

    monkeypatch.setattr(Checkpoint, "load", load)


def test_another_size_of_the_same_architecture(tmp_path, unread):
    base = save(build(), tmp_path / "base")
    tuned = save(build(intermediate_size=112), tmp_path / "tuned")

    with pytest.raises(ShapeMismatch) as caught:
        extract(base, tuned, RANK_8)

    assert caught.value.tensor == "model.layers.0.mlp.down_proj.weight"
    assert str(caught.value) == (
        "error[FL-SHAPE]: model.layers.0.mlp.down_proj.weight is [64, 96] in the base, "
        f"[64, 112] in {tuned.path / 'model.safetensors'}\n"
        "cause: these two checkpoints are not of one architecture "
        "(config.json: LlamaForCausalLM of 72k parameters against LlamaForCausalLM of 78.1k parameters)\n"
        "fix: give the base that this checkpoint was tuned from"
    )


def test_a_wrong_base_is_told_the_right_one_where_the_config_names_it(tmp_path, unread):
    base, tuned = save(build(), tmp_path / "base"), save(build(intermediate_size=112), tmp_path / "tuned")
    config = json.loads((tuned.path / "config.json").read_text()) | {"_name_or_path": "org/the-right-base"}
    (tuned.path / "config.json").write_text(json.dumps(config))

    with pytest.raises(ShapeMismatch) as caught:
        extract(base, open_checkpoint(tuned.path), RANK_8)

    assert caught.value.fix.endswith("its config.json names org/the-right-base")


def test_another_architecture_of_the_same_size(tmp_path, unread):
    base, tuned = save(build("llama"), tmp_path / "base"), save(build("qwen2"), tmp_path / "tuned")

    with pytest.raises(CheckpointError, match="holds 6 tensors that the base lacks") as caught:
        extract(base, tuned, RANK_8)

    assert "LlamaForCausalLM of 72k parameters against Qwen2ForCausalLM" in caught.value.cause


def test_a_resized_vocabulary(tmp_path, unread):
    base, tuned = save(build(), tmp_path / "base"), save(build(vocab_size=168), tmp_path / "tuned")

    with pytest.raises(ShapeMismatch, match=r"embed_tokens.weight is \[160, 64\] in the base, \[168, 64\]") as caught:
        extract(base, tuned, RANK_8)

    assert "the vocabulary was resized from 160 to 168 tokens" in caught.value.cause


def test_a_tuned_checkpoint_that_lacks_a_tensor(tmp_path, unread):
    model = build()
    tuned = rewrite(save(tune(model), tmp_path / "tuned"), lambda t: t.pop("model.layers.1.mlp.up_proj.weight"))

    with pytest.raises(CheckpointError, match=r"lacks 1 of the base's tensors, model\.layers\.1\.mlp\.up_proj"):
        extract(save(model, tmp_path / "base"), tuned, RANK_8)


def test_an_untied_checkpoint_without_its_head(tmp_path, unread):
    model = build(tied=False)
    tuned = rewrite(save(tune(model), tmp_path / "tuned"), lambda tensors: tensors.pop("lm_head.weight"))
    config = json.loads((tuned.path / "config.json").read_text()) | {"tie_word_embeddings": False}
    (tuned.path / "config.json").write_text(json.dumps(config))

    with pytest.raises(CheckpointError, match=r"lacks 1 of the base's tensors, lm_head\.weight"):
        extract(save(model, tmp_path / "base"), open_checkpoint(tuned.path), RANK_8)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8])
def test_quantized_weights(tmp_path, unread, dtype):
    model = build()
    name = "model.layers.0.mlp.up_proj.weight"

    def quantize(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name] = tensors[name].to(dtype)

    tuned = rewrite(save(tune(model), tmp_path / "tuned"), quantize)

    with pytest.raises(CheckpointError, match=rf"{name} .* a quantized weight"):
        extract(save(model, tmp_path / "base"), tuned, RANK_8)


def gptq(tensors: dict[str, torch.Tensor]) -> None:
    """As GPTQ and AWQ pack a layer."""
    name = "model.layers.0.mlp.up_proj"
    del tensors[f"{name}.weight"]
    tensors |= {f"{name}.qweight": torch.ones(8, 96, dtype=torch.int32), f"{name}.scales": torch.ones(2, 96)}


def bitsandbytes(tensors: dict[str, torch.Tensor]) -> None:
    """As bitsandbytes packs one into four bits."""
    name = "model.layers.0.mlp.up_proj.weight"
    tensors |= {name: torch.ones(96 * 64 // 2, 1, dtype=torch.uint8), f"{name}.absmax": torch.ones(96)}


@pytest.mark.parametrize("pack", [gptq, bitsandbytes])
def test_packed_weights_are_told_as_such_and_not_as_another_architecture(tmp_path, unread, pack):
    model = build()
    tuned = rewrite(save(tune(model), tmp_path / "tuned"), pack)

    with pytest.raises(CheckpointError, match=r"up_proj.q?weight .* a quantized weight") as caught:
        extract(save(model, tmp_path / "base"), tuned, RANK_8)

    assert caught.value.fix.startswith("give the checkpoint as it was before quantization")


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("side", ["base", "tuned"])
@pytest.mark.parametrize("name", ["model.layers.1.mlp.up_proj.weight", "model.norm.weight"])
def test_numbers_that_are_none(tmp_path, bad, side, name):
    model = build()
    sides = {"base": save(model, tmp_path / "base"), "tuned": save(tune(model), tmp_path / "tuned")}

    def poison(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name].view(-1)[5] = bad

    sides[side] = rewrite(sides[side], poison)

    with pytest.raises(NotFinite) as caught:
        extract(sides["base"], sides["tuned"], RANK_8)

    assert (caught.value.tensor, caught.value.file) == (name, sides[side].path / "model.safetensors")


def test_identical_checkpoints(tmp_path):
    model = build()
    base, copy = save(model, tmp_path / "base"), save(model, tmp_path / "copy")

    with pytest.raises(CheckpointError, match=r"copy holds the same weights as .*base"):
        extract(base, copy, RANK_8)


def test_one_folder_given_twice(pair, unread):
    with pytest.raises(UsageError, match="given as base and as tuned"):
        extract(pair[0], open_checkpoint(pair[0].path), RANK_8)


def test_a_change_outside_every_linear_layer(tmp_path):
    model = build()
    tuned = tune(model, only=lambda name: "embed_tokens" in name)

    with pytest.raises(CheckpointError, match="nothing that can be extracted differs") as caught:
        extract(save(model, tmp_path / "base"), save(tuned, tmp_path / "tuned"), RANK_8)

    assert "model.embed_tokens.weight holds 100% of it" in caught.value.cause


def test_a_budget_below_the_smallest_module(pair):
    with pytest.raises(UsageError, match="a budget of 10 bytes"):
        extract(*pair, ExtractConfig(RankRule(budget_bytes=10)))


def test_nothing_asked_and_rank_zero_and_unknown_dtypes():
    with pytest.raises(UsageError, match="how much of the change to keep"):
        ExtractConfig(RankRule())
    with pytest.raises(UsageError, match="rank 0 keeps nothing"):
        RankRule(max_rank=0)
    with pytest.raises(UsageError, match="'int8' is no dtype for factors"):
        ExtractConfig(RankRule(max_rank=8), factor_dtype="int8")


def test_a_device_that_is_not_there(pair, unread):
    with pytest.raises(UsageError, match="'qpu' is no device"):
        extract(*pair, ExtractConfig(RANK_8.rule, device="qpu"))


def test_a_truncated_file(tmp_path, pair):
    shutil.copytree(pair[1].path, tmp_path / "tuned")
    file = tmp_path / "tuned" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])

    with pytest.raises(CheckpointError, match="not a complete safetensors file"):
        open_checkpoint(tmp_path / "tuned")


def test_pickled_weights_are_never_opened(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'exit 1'\ntR.")

    with pytest.raises(PickleRefused):
        open_checkpoint(tmp_path)


def test_half_precision_factors_that_overflow(tmp_path):
    model = build()
    base = save(model, tmp_path / "base")

    def explode(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.0.mlp.up_proj.weight"] *= 1e12

    tuned = rewrite(save(model, tmp_path / "tuned"), explode)

    with pytest.raises(CheckpointError, match="do not fit into float16"):
        extract(base, tuned, ExtractConfig(RANK_8.rule, factor_dtype="float16"))


def test_a_plan_reads_no_weights_and_predicts_the_bytes(pair, unread):
    plan = plan_extraction(*pair, RANK_8)

    assert len(plan.extractable) == 14
    assert len(plan.pairs) == len(pair[0].tensors)
    per_rank = sum(sum(entry.shape) for entry in plan.extractable)
    assert plan.factor_bytes == 8 * per_rank * 2  # bf16
    assert plan.read_bytes == pair[0].num_bytes + pair[1].num_bytes
    assert plan_extraction(*pair, ExtractConfig(RankRule(budget_bytes=4096))).factor_bytes == 4096


def test_the_predicted_bytes_are_those_of_the_adapter(pair):
    adapter = extract(*pair, RANK_8).adapter

    stored = sum(factors.num_bytes for factors in adapter.factors.values())
    assert stored == plan_extraction(*pair, RANK_8).factor_bytes
