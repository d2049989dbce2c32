"""Embeddings and output heads as factors, norms and biases whole: PEFT computes what the truncated deltas do."""

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from flora.errors import AdapterInvalid, ShapeMismatch
from flora.extract import ExtractConfig, Wish, extract, plan_extraction
from flora.prune import prune
from flora.rank import RankRule
from flora.registry import Registry
from flora.registry.formats.peft import load_peft, save_peft
from tests.extract.models import best_share, build, delta_of, residual_share, rewrite, save, tune
from tests.extract.peft_judge import EVERYTHING, distance, extracted, with_deltas

ROUNDING = 2e-4  # float32, in units of the change
TOKENS = torch.arange(20)[None]


def logits(model: torch.nn.Module) -> torch.Tensor:
    return model(input_ids=TOKENS).logits


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_peft_computes_what_the_truncated_deltas_do(tmp_path, architecture, tied, low_cpu_mem_usage):
    base, _, adapter = extracted(build(architecture, tied=tied), tmp_path)

    model = AutoModelForCausalLM.from_pretrained(base.path, dtype=torch.float32)
    assert distance(model, adapter, tmp_path, logits, low_cpu_mem_usage=low_cpu_mem_usage) < ROUNDING
    assert {change.status for change in adapter.report.tensors} == {"extracted", "exact"}


def test_the_table_keeps_what_eight_columns_can_and_the_report_says_so(tmp_path):
    base, tuned, adapter = extracted(build(), tmp_path)

    delta = delta_of(base, tuned, "model.embed_tokens.weight")
    kept = 1 - residual_share(delta, adapter.factors["model.embed_tokens"])
    change = adapter.report.by_name()["model.embed_tokens.weight"]
    assert best_share(delta, 8) - kept < 3e-4
    assert change.kept / change.norm_squared == pytest.approx(kept, rel=1e-6)
    norms = [change for change in adapter.report.tensors if change.status == "exact"]
    assert len(norms) == 5
    assert all(change.kept == change.norm_squared > 0 for change in norms)


def test_the_tied_table_is_stored_once_and_written_for_both_sides(tmp_path):
    _, _, adapter = extracted(build(), tmp_path)

    module = next(module for module in adapter.header.modules if module.name == "model.embed_tokens")
    assert (module.kind, module.tied) == ("embedding", ("lm_head",))
    assert (module.out_features, module.in_features) == (160, 64)  # as the tensor lies
    assert "lm_head" not in adapter.factors
    written = (tmp_path / "adapter" / "adapter_model.safetensors").read_bytes()
    assert b"lm_head.lora_A" in written


def test_a_head_stored_twice_is_tied_all_the_same(tmp_path):
    model = build(tied=False)
    with torch.no_grad():
        model.lm_head.weight.copy_(model.model.embed_tokens.weight)
    tuned = tune(model)
    with torch.no_grad():
        tuned.lm_head.weight.copy_(tuned.model.embed_tokens.weight)
    base, tuned = save(model, tmp_path / "base"), save(tuned, tmp_path / "tuned")

    adapter = extract(base, tuned, ExtractConfig(RankRule(max_rank=8), "float32", wish=EVERYTHING)).adapter

    save_peft(adapter, tmp_path / "adapter")
    assert adapter.header.forms["model.embed_tokens"].tied == ("lm_head",)
    wanted = with_deltas(model, adapter)
    with torch.no_grad():
        wanted.lm_head.weight += adapter.factors["model.embed_tokens"].delta()
    with torch.no_grad():
        got, want = logits(PeftModel.from_pretrained(model, tmp_path / "adapter").eval()), logits(wanted)
    assert float((got - want).norm() / want.norm()) < 1e-6


def test_without_the_wish_nothing_but_linear_layers_is_extracted(pair):
    report = extract(*pair, ExtractConfig(RankRule(max_rank=8))).adapter.report.by_name()

    assert "tied to the output head: only --embeddings" in report["model.embed_tokens.weight"].reason
    assert {change.name for change in report.values() if change.status == "extracted"} == {
        name for name in pair[0].tensors if name.endswith("_proj.weight")
    }


def test_a_budget_weighs_the_tables_bytes_with_the_others(pair):
    config = ExtractConfig(RankRule(budget_bytes=20_000), wish=Wish(embeddings=True))

    adapter = extract(*pair, config).adapter

    stored = sum(factors.num_bytes for factors in adapter.factors.values())
    assert 19_000 < stored <= 20_000
    assert plan_extraction(*pair, config).factor_bytes == 20_000
    assert 0 < adapter.factors["model.embed_tokens"].rank < 64


def test_the_registry_gives_back_what_it_was_given(tmp_path):
    base, _, adapter = extracted(build("qwen2"), tmp_path)

    with Registry.open(str(tmp_path / "home")) as registry:
        again = registry.load(registry.add(adapter, "whole"))
        assert registry.fsck() == []

    assert again.header == adapter.header
    for name, factors in adapter.factors.items():
        assert torch.equal(again.factors[name].A, factors.A)
        assert torch.equal(again.factors[name].B, factors.B)
    assert again.exact.keys() == {name for name in base.tensors if name.endswith(".bias") or "norm" in name}
    assert all(torch.equal(again.exact[name], tensor) for name, tensor in adapter.exact.items())


@pytest.mark.parametrize("name", ["lm_head.lora_B.weight", "model.embed_tokens.lora_embedding_A", "model.norm.weight"])
def test_a_folder_that_was_changed_in_one_place_is_refused(tmp_path, name):
    extracted(build(), tmp_path)
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(file)
    tensors[f"base_model.model.{name}"].view(-1)[5] += 1
    save_file(tensors, file)

    with pytest.raises(AdapterInvalid, match=r"is not what flora\.json says"):
        load_peft(tmp_path / "adapter")


def test_peft_merges_a_tied_table_rightly_once_the_head_has_a_copy_of_its_own(tmp_path):
    """As docs/embeddings.md says: on the shared weight, PEFT adds the change once for each side."""
    base, _, adapter = extracted(build(), tmp_path)
    model = AutoModelForCausalLM.from_pretrained(base.path, dtype=torch.float32)
    with torch.no_grad():
        wanted = logits(with_deltas(model, adapter))

    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    model.config.tie_word_embeddings = False
    merged = PeftModel.from_pretrained(model, tmp_path / "adapter").merge_and_unload()

    with torch.no_grad():
        assert float((logits(merged) - wanted).norm() / wanted.norm()) < 1e-6


# --- factors of eight bits ---


def test_fp8_factors_take_half_the_bytes_and_a_thousandth_of_the_energy(tmp_path):
    base, tuned, narrow = extracted(build(), tmp_path / "8", dtype="float8_e4m3fn")
    _, _, wide = extracted(build(), tmp_path / "16", dtype="bfloat16")

    for name, factors in narrow.factors.items():
        assert factors.num_bytes * 2 == wide.factors[name].num_bytes
        delta = delta_of(base, tuned, f"{name}.weight")
        kept, of_wide = 1 - residual_share(delta, factors), 1 - residual_share(delta, wide.factors[name])
        assert of_wide - kept < 2e-3
        change = narrow.report.by_name()[f"{name}.weight"]
        assert change.kept / change.norm_squared == pytest.approx(kept, rel=1e-6)  # certified as stored
    model = AutoModelForCausalLM.from_pretrained(base.path, dtype=torch.float32)
    assert distance(model, narrow, tmp_path / "8", logits) < ROUNDING


@pytest.mark.parametrize("size", [1e-9, 1e6])
def test_fp8_factors_have_a_scale_of_their_own(tmp_path, size):
    model = build()
    base = save(model, tmp_path / "base")
    name = "model.layers.0.mlp.up_proj.weight"
    change = size * torch.randn(96, 64, generator=torch.Generator().manual_seed(0))

    def set_base(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name] = torch.zeros(96, 64)

    def set_tuned(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name] = change

    base, tuned = rewrite(base, set_base), rewrite(save(model, tmp_path / "tuned"), set_tuned)
    config = ExtractConfig(RankRule(max_rank=64), "float8_e4m3fn", include=(name,))

    factors = extract(base, tuned, config).adapter.factors[name.removesuffix(".weight")]

    assert residual_share(change.double().numpy(), factors) < 5e-3
    assert np.log2(factors.scale).is_integer()


def test_the_portable_profile_gives_fp8_as_bf16_without_scales(tmp_path):
    base, _, adapter = extracted(build(), tmp_path, dtype="float8_e4m3fn")
    save_peft(adapter, tmp_path / "adapter", "portable")

    model = AutoModelForCausalLM.from_pretrained(base.path, dtype=torch.float32)

    assert distance(model, adapter, tmp_path, logits) < ROUNDING


# --- vocabularies that have grown ---


def grown(model: torch.nn.Module, num_tokens: int = 168) -> torch.nn.Module:
    """A fine-tune of the projections with eight more tokens, as trainers add them."""
    tuned = tune(model, only=lambda name: name.endswith("_proj.weight"))
    torch.manual_seed(5)
    tuned.resize_token_embeddings(num_tokens, mean_resizing=False)
    return tuned


@pytest.mark.parametrize("tied", [True, False])
def test_rows_of_new_tokens_are_carried_and_peft_puts_them_in_place(tmp_path, tied):
    model = build(tied=tied)
    tuned_model = grown(model)
    base, tuned = save(model, tmp_path / "base"), save(tuned_model, tmp_path / "tuned")
    config = ExtractConfig(RankRule(max_rank=64), "float32", wish=EVERYTHING)

    adapter = extract(base, tuned, config).adapter
    save_peft(adapter, tmp_path / "adapter")

    assert load_peft(tmp_path / "adapter").header == adapter.header
    assert prune(adapter, RankRule(max_rank=2), None).header.exact == adapter.header.exact
    assert torch.equal(adapter.exact["model.embed_tokens.weight"], tuned_model.model.embed_tokens.weight[160:])
    assert len(adapter.exact) == (1 if tied else 2)
    assert adapter.report.kept_share > 1 - 1e-6
    resized = AutoModelForCausalLM.from_pretrained(base.path, dtype=torch.float32)
    resized.resize_token_embeddings(168, mean_resizing=False)
    tokens = torch.arange(150, 168)[None]
    with torch.no_grad():
        wanted = tuned_model(tokens).logits
        got = PeftModel.from_pretrained(resized, tmp_path / "adapter").eval()(tokens).logits
    assert float((got - wanted).norm() / wanted.norm()) < 1e-5


def test_the_old_rows_of_a_grown_table_stay_and_their_change_is_reported(tmp_path):
    model = build()
    tuned = grown(model)
    with torch.no_grad():
        tuned.model.embed_tokens.weight[:160] += 0.01
    base, tuned = save(model, tmp_path / "base"), save(tuned, tmp_path / "tuned")

    report = extract(base, tuned, ExtractConfig(RankRule(max_rank=8), wish=EVERYTHING)).adapter.report

    change = report.by_name()["model.embed_tokens.weight"]
    assert change.norm_squared - change.kept == pytest.approx(160 * 64 * 0.01**2, rel=1e-3)
    assert change.reason == "8 rows of new tokens are carried whole; the others stay as in the base"


def test_a_grown_vocabulary_is_refused_where_nobody_asked_for_embeddings(tmp_path):
    model = build()
    base, tuned = save(model, tmp_path / "base"), save(grown(model), tmp_path / "tuned")

    with pytest.raises(ShapeMismatch, match=r"\[160, 64\] in the base, \[168, 64\]") as caught:
        extract(base, tuned, ExtractConfig(RankRule(max_rank=8)))

    assert caught.value.fix.startswith("--embeddings carries the rows of new tokens")


def test_a_vocabulary_that_shrank_is_refused(tmp_path):
    model = build()
    base, tuned = save(model, tmp_path / "base"), save(grown(model, 152), tmp_path / "tuned")

    with pytest.raises(ShapeMismatch, match=r"\[160, 64\] in the base, \[152, 64\]"):
        extract(base, tuned, ExtractConfig(RankRule(max_rank=8), wish=EVERYTHING))
