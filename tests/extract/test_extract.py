"""From two checkpoints to an adapter, on tiny real models; numpy and transformers are the judges."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from flora.checkpoint import open_checkpoint
from flora.errors import CheckFailed
from flora.extract import ExtractConfig, extract
from flora.identity import base_record
from flora.rank import RankRule
from tests.extract.models import best_share, build, delta_of, residual_share, rewrite, save, tune

RANK_8 = ExtractConfig(RankRule(max_rank=8))


@pytest.mark.parametrize("architecture", ["llama", "mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize("tied", [True, False])
def test_every_linear_layer_keeps_what_eight_columns_can_and_the_report_says_so(tmp_path, architecture, tied):
    model = build(architecture, tied=tied)
    base = save(model, tmp_path / "base", torch.bfloat16)
    tuned = save(tune(model), tmp_path / "tuned", torch.bfloat16)

    adapter = extract(base, tuned, RANK_8).adapter

    changes = adapter.report.by_name()
    assert len(adapter.factors) == 14
    for module, factors in adapter.factors.items():
        delta, change = delta_of(base, tuned, f"{module}.weight"), changes[f"{module}.weight"]
        direct = 1 - residual_share(delta, factors)
        assert factors.rank == change.rank == 8
        assert best_share(delta, 8) - direct < 3e-4
        assert change.kept / change.norm_squared == pytest.approx(direct, rel=1e-6)
        assert change.norm_squared == pytest.approx(np.square(delta).sum(), rel=1e-6)


def test_the_report_adds_up_to_the_whole_change_of_the_whole_model(pair):
    base, tuned = pair

    report = extract(base, tuned, RANK_8).adapter.report

    assert [change.name for change in report.tensors] == sorted(base.tensors)
    whole = sum(np.square(delta_of(base, tuned, name)).sum() for name in base.tensors)
    assert report.norm_squared == pytest.approx(whole, rel=1e-6)
    embedding = report.by_name()["model.embed_tokens.weight"]
    assert embedding.status == "not_extractable"
    assert report.share(embedding) == pytest.approx(
        np.square(delta_of(base, tuned, "model.embed_tokens.weight")).sum() / whole, rel=1e-6
    )
    assert report.share(embedding) > 0.1
    assert report.kept_share < 1 - report.share(embedding)


@pytest.mark.parametrize("dtypes", [(torch.bfloat16, torch.float32), (torch.float16, torch.bfloat16)])
def test_base_and_tuned_may_have_different_dtypes(tmp_path, dtypes):
    model = build()
    base, tuned = save(model, tmp_path / "base", dtypes[0]), save(tune(model), tmp_path / "tuned", dtypes[1])

    adapter = extract(base, tuned, RANK_8).adapter

    for module, factors in adapter.factors.items():
        delta = delta_of(base, tuned, f"{module}.weight")
        assert best_share(delta, 8) - (1 - residual_share(delta, factors)) < 3e-4


def test_shards_change_nothing_but_where_the_tensors_lie(tmp_path, pair):
    model = build()
    base = save(model, tmp_path / "base", torch.bfloat16, max_shard_size="50KB")
    tuned = save(tune(model), tmp_path / "tuned", torch.bfloat16, max_shard_size="80KB")
    assert len({info.file for info in base.tensors.values()}) > 2

    sharded, single = extract(base, tuned, RANK_8).adapter, extract(*pair, RANK_8).adapter

    assert sharded.header.serving_digest == single.header.serving_digest


def test_base_plus_adapter_comes_near_the_tuned_model(tmp_path):
    """Linear layers alone are tuned here, so a full-rank adapter gives the tuned model's logits back."""
    model = build()
    tuned_model = tune(model, only=lambda name: name.endswith("_proj.weight"))
    base, tuned = save(model, tmp_path / "base"), save(tuned_model, tmp_path / "tuned")

    adapter = extract(base, tuned, ExtractConfig(RankRule(max_rank=64), factor_dtype="float32")).adapter

    served = AutoModelForCausalLM.from_pretrained(base.path)
    with torch.no_grad():
        for module, factors in adapter.factors.items():
            served.get_submodule(module).weight += factors.delta()
        tokens = torch.arange(20)[None]
        wanted, got, before = (m(tokens).logits for m in (tuned_model, served, model))
    assert adapter.report.kept_share > 1 - 1e-6
    assert (got - wanted).norm() < 1e-3 * (before - wanted).norm()


def test_an_adapter_names_its_base_by_content_and_the_tensors_it_touches(pair):
    base, tuned = pair

    result = extract(base, tuned, RANK_8)

    binding = result.adapter.header.base
    hashes = base_record(base).hashes()
    assert binding.base_id == str(base_record(base).base_id) == str(result.base_record.base_id)
    assert binding.architecture == "LlamaForCausalLM"
    assert binding.touched == {f"{module}.weight": hashes[f"{module}.weight"] for module in result.adapter.factors}
    assert result.adapter.header.recipe.tuned_id == str(base_record(tuned).base_id)
    assert result.adapter.header.recipe.options["rank"] == 8


def test_the_steps_by_the_clock_add_up_to_the_total_and_every_stage_of_a_pair_is_counted(pair):
    timings = extract(*pair, RANK_8).timings

    assert timings["total"] == pytest.approx(sum(timings[step] for step in ("plan", "work", "hashes", "finish")))
    assert timings["copy"] == 0  # of the CPU, where files are mapped
    assert all(timings[stage] > 0 for stage in ("read", "delta", "factorize", "fit"))


# --- how much to keep ---


@pytest.mark.parametrize("energy", [0.5, 0.9, 0.97, 0.999])
def test_an_energy_is_kept_in_every_module_by_the_smallest_rank_that_does(pair, energy):
    adapter = extract(*pair, ExtractConfig(RankRule(energy=energy))).adapter

    for module, factors in adapter.factors.items():
        delta = delta_of(*pair, f"{module}.weight")
        assert 1 - residual_share(delta, factors) >= energy - 1e-9
        assert best_share(delta, factors.rank - 1) < energy  # one column less cannot, however well chosen


def test_energy_capped_by_rank_keeps_the_cap_and_says_so(pair):
    adapter = extract(*pair, ExtractConfig(RankRule(energy=0.999, max_rank=6))).adapter

    changes = [change for change in adapter.report.tensors if change.status == "extracted"]
    assert {change.rank for change in changes} == {6}
    assert all(change.reason.endswith("not 0.999: capped at rank 6") for change in changes)


def test_an_energy_that_bf16_cannot_hold_keeps_every_term_and_says_so(pair):
    adapter = extract(*pair, ExtractConfig(RankRule(energy=1.0))).adapter

    for change in adapter.report.tensors:
        if change.status == "extracted":
            assert change.kept / change.norm_squared > 0.9999
            assert change.reason.endswith("rounding to bfloat16 takes the rest")


def test_strict_makes_a_missed_energy_fail(pair):
    rule = RankRule(energy=0.999, max_rank=6)

    with pytest.raises(CheckFailed, match=r"14 of 14 modules keep less than the asked energy 0\.999") as caught:
        extract(*pair, ExtractConfig(rule, strict=True))

    assert caught.value.exit_code == 3
    assert extract(*pair, ExtractConfig(RankRule(energy=0.9), strict=True)).adapter


@pytest.mark.parametrize("share", [0.02, 0.05, 0.08, 0.1])
def test_strict_refuses_few_weights_moved_by_one_ulp_for_they_form_no_low_rank(tmp_path, share):
    """What reinforcement learning leaves of bf16 weights: the noise that is estimated reaches the change's norm."""
    generator = torch.Generator().manual_seed(0)
    weight = (0.02 * torch.randn(256, 256, generator=generator)).bfloat16()
    moved = (weight.view(torch.int16) + 1).view(torch.bfloat16)
    tuned = torch.where(torch.rand(256, 256, generator=generator) < share, moved, weight)
    sides = []
    for side, tensor in (("base", weight), ("tuned", tuned)):
        (tmp_path / side).mkdir()
        save_file({"model.layers.0.self_attn.q_proj.weight": tensor}, tmp_path / side / "model.safetensors")
        sides.append(open_checkpoint(tmp_path / side))

    with pytest.raises(CheckFailed, match="is sparse") as caught:
        extract(*sides, ExtractConfig(RankRule(max_rank=8), strict=True))

    assert caught.value.kind == "sparse"


def test_a_budget_is_filled_and_spent_where_it_keeps_most(pair):
    budget = 40_000
    uniform = extract(*pair, ExtractConfig(RankRule(max_rank=5))).adapter

    adapter = extract(*pair, ExtractConfig(RankRule(budget_bytes=_stored_bytes(uniform)))).adapter
    small = extract(*pair, ExtractConfig(RankRule(budget_bytes=budget))).adapter

    assert 0.9 * _stored_bytes(uniform) < _stored_bytes(adapter) <= _stored_bytes(uniform)
    assert adapter.report.kept_share > uniform.report.kept_share - 1e-6
    assert _stored_bytes(small) <= budget
    for module, factors in small.factors.items():
        direct = 1 - residual_share(delta_of(*pair, f"{module}.weight"), factors)
        change = small.report.by_name()[f"{module}.weight"]
        assert change.kept / change.norm_squared == pytest.approx(direct, rel=1e-6)


def test_a_module_that_the_budget_leaves_out_stays_in_the_report(pair):
    adapter = extract(*pair, ExtractConfig(RankRule(budget_bytes=2_000))).adapter

    left_out = [change for change in adapter.report.tensors if change.status == "extracted" and change.rank == 0]
    assert left_out
    assert all((change.kept, change.reason) == (0.0, "the budget leaves it no terms") for change in left_out)
    assert all(change.name.removesuffix(".weight") not in adapter.factors for change in left_out)


def test_budget_and_energy_together_keep_no_more_than_the_energy(pair):
    wanted = extract(*pair, ExtractConfig(RankRule(energy=0.9))).adapter
    ample = extract(*pair, ExtractConfig(RankRule(energy=0.9, budget_bytes=10**6))).adapter
    scarce = extract(*pair, ExtractConfig(RankRule(energy=0.9, budget_bytes=10_000))).adapter

    assert {m: f.rank for m, f in ample.factors.items()} == {m: f.rank for m, f in wanted.factors.items()}
    missed = [change for change in scarce.report.tensors if change.reason and "the budget ends here" in change.reason]
    assert missed


def test_planted_ranks_are_found(tmp_path):
    """A float32 pair whose change has five directions needs five terms, however many are allowed."""
    model = build()
    base = save(model, tmp_path / "base")
    generator = torch.Generator().manual_seed(3)

    def plant(tensors: dict[str, torch.Tensor]) -> None:
        for name, weight in tensors.items():
            if name.endswith("_proj.weight"):
                left = torch.randn(weight.shape[0], 5, generator=generator)
                weight += 1e-2 * left @ torch.randn(5, weight.shape[1], generator=generator)

    tuned = rewrite(save(model, tmp_path / "tuned"), plant)

    by_energy = extract(base, tuned, ExtractConfig(RankRule(energy=0.9999))).adapter
    by_rank = extract(base, tuned, ExtractConfig(RankRule(max_rank=5))).adapter

    assert {factors.rank for factors in by_energy.factors.values()} == {5}
    assert by_rank.report.extracted_share > 0.9999


def test_exact_agrees_with_the_fast_methods(pair):
    fast, exact = extract(*pair, RANK_8).adapter, extract(*pair, ExtractConfig(RANK_8.rule, exact=True)).adapter

    assert exact.report.extracted_share == pytest.approx(fast.report.extracted_share, abs=3e-4)
    assert exact.header.recipe.method == "svd"


# --- the same again ---


def test_two_runs_give_the_same_digest(pair):
    first, again = (extract(*pair, RANK_8).adapter.header for _ in range(2))

    assert first == again
    assert first.serving_digest == again.serving_digest


def test_one_thread_and_two_give_the_same_digest(pair):
    """Each worker has one thread either way. With more threads for each, last bits may differ (workers.py)."""
    digests = set()
    for num_threads in (1, 2):
        torch.set_num_threads(num_threads)
        digests.add(str(extract(*pair, RANK_8).adapter.header.serving_digest))
    torch.set_num_threads(1)

    assert len(digests) == 1


def test_reading_changes_no_file(pair):
    before = [base_record(checkpoint).base_id for checkpoint in pair]

    extract(*pair, RANK_8)

    assert [base_record(checkpoint).base_id for checkpoint in pair] == before


# --- heads, tied and not ---


def test_a_head_stored_on_one_side_only_counts_once_where_it_is_tied(tmp_path):
    model = build(tied=True)
    base, tuned = save(model, tmp_path / "base"), save(tune(model), tmp_path / "tuned")
    table = "model.embed_tokens.weight"
    tuned = rewrite(tuned, lambda tensors: tensors.update({"lm_head.weight": tensors[table].clone()}))

    report = extract(base, tuned, RANK_8).adapter.report

    head = report.by_name()["lm_head.weight"]
    assert (head.status, head.norm_squared) == ("unchanged", 0.0)
    assert head.reason == f"tied: it is {table}, where its change counts"
    assert report.by_name()[table].norm_squared > 0


def test_a_head_that_the_tuning_untied_is_measured_against_the_embedding(tmp_path):
    model = build(tied=True)
    base, tuned = save(model, tmp_path / "base"), save(tune(model), tmp_path / "tuned")
    head = torch.randn(160, 64, generator=torch.Generator().manual_seed(0))
    tuned = rewrite(tuned, lambda tensors: tensors.update({"lm_head.weight": head}))

    change = extract(base, tuned, RANK_8).adapter.report.by_name()["lm_head.weight"]

    expected = (head - base.load("model.embed_tokens.weight")).double().square().sum()
    assert change.status == "not_extractable"
    assert change.norm_squared == pytest.approx(float(expected), rel=1e-6)


def test_a_new_tensor_counts_with_its_whole_norm(tmp_path):
    model = build()
    tuned = rewrite(save(tune(model), tmp_path / "tuned"), lambda t: t.update({"value_head.weight": torch.ones(1, 64)}))

    change = extract(save(model, tmp_path / "base"), tuned, RANK_8).adapter.report.by_name()["value_head.weight"]

    assert (change.status, change.norm_squared) == ("not_extractable", 64.0)


def test_unchanged_modules_are_left_out_of_the_adapter(tmp_path):
    model = build()
    tuned = tune(model, only=lambda name: "layers.1." in name)

    adapter = extract(save(model, tmp_path / "base"), save(tuned, tmp_path / "tuned"), RANK_8).adapter

    assert {name.split(".")[2] for name in adapter.factors} == {"1"}
    assert adapter.report.by_name()["model.layers.0.mlp.up_proj.weight"].status == "unchanged"
    assert adapter.report.by_name()["model.embed_tokens.weight"].status == "unchanged"


def test_excluded_modules_are_measured_and_named(pair):
    report = extract(*pair, ExtractConfig(RANK_8.rule, exclude=("*.mlp.*",))).adapter.report

    change = report.by_name()["model.layers.0.mlp.up_proj.weight"]
    assert (change.status, change.kept) == ("excluded", 0.0)
    assert change.norm_squared > 0


def test_template_and_end_tokens_are_carried_when_they_differ(tmp_path):
    model = build()
    base, tuned = save(model, tmp_path / "base"), save(tune(model), tmp_path / "tuned")
    assert extract(base, tuned, RANK_8).adapter.extras == {}

    (tuned.path / "chat_template.jinja").write_text("{{ messages }}")
    (tuned.path / "generation_config.json").write_text(json.dumps({"eos_token_id": [5, 3], "top_p": 0.9}))
    adapter = extract(base, tuned, RANK_8).adapter

    assert adapter.extras == {
        "chat_template.jinja": b"{{ messages }}",
        "generation_config.json": b'{"eos_token_id":[3,5]}',
    }
    assert set(adapter.header.extras) == set(adapter.extras)


def test_progress_is_told_of_every_tensor_in_order(pair):
    told = []

    extract(*pair, RANK_8, progress=told.append)

    assert [step.name for step in told] == sorted(pair[0].tensors)
    assert told[-1].done_bytes == told[-1].total_bytes == pair[0].num_bytes + pair[1].num_bytes
    assert told[-1].done_modules == told[-1].total_modules == 14


def _stored_bytes(adapter) -> int:
    return sum(factors.num_bytes for factors in adapter.factors.values())
