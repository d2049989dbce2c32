"""Mixtures of experts: one pair of factors an expert, which PEFT stacks into transformers' fused parameters."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from flora.algebra.changes import checkpoint_changes
from flora.algebra.combine import Combination
from flora.algebra.parts import Part
from flora.algebra.verify import verify
from flora.errors import AdapterInvalid
from flora.extract import ExtractConfig, Wish, extract
from flora.forms import is_expert
from flora.identity import base_record
from flora.rank import RankRule
from flora.registry.binding import bind
from flora.registry.formats.paths import tree_paths
from flora.registry.formats.peft import load_peft, peft_files, save_peft
from tests.extract.models import rewrite, save, tune
from tests.extract.moe import FUSED, SEPARATE, dbrx
from tests.extract.moe_judge import ROUNDING, built, distance
from tests.extract.peft_judge import extracted


@pytest.mark.parametrize("name", SEPARATE | FUSED)
def test_every_expert_is_extracted_and_peft_computes_what_the_deltas_do(tmp_path, name):
    base, _, adapter = extracted(built(name), tmp_path, rank=6, wish=Wish(routers=True))

    of_experts = [change for change in adapter.report.tensors if is_expert(change.name.removesuffix(".weight"))]
    assert {change.status for change in of_experts} == {"extracted"}
    assert distance(base.path, adapter, tmp_path) < ROUNDING


def test_both_profiles_are_one_where_there_are_experts(tmp_path):
    """PEFT stacks them, so all must be there, and of one rank."""
    _, _, adapter = extracted(built("mixtral"), tmp_path, rank=6, wish=Wish(routers=True))

    compact, portable = (dict(peft_files(adapter, profile)) for profile in ("compact", "portable"))

    assert compact["adapter_config.json"] == portable["adapter_config.json"]


def transposed(tensors: dict[str, Tensor]) -> None:
    """As transformers 4 saved Qwen3-VL."""
    for name in [name for name in tensors if name.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
        tensors[name] = tensors[name].transpose(1, 2).contiguous()


def fused(tensors: dict[str, Tensor]) -> None:
    """As Qwen published Qwen3.5."""
    for home in {name.partition(".experts.")[0] for name in tensors if ".experts." in name}:
        gate, up, down = (
            torch.stack([tensors.pop(f"{home}.experts.{index}.{leaf}_proj.weight") for index in range(4)])
            for leaf in ("gate", "up", "down")
        )
        tensors[f"{home}.experts.gate_up_proj"] = torch.cat((gate, up), 1)
        tensors[f"{home}.experts.down_proj"] = down


@pytest.mark.parametrize(("name", "change"), [("qwen3-vl", transposed), ("qwen3.5", fused)])
def test_what_others_saved_is_read_as_transformers_reads_it(tmp_path, name, change):
    model = built(name)
    base = rewrite(save(model, tmp_path / "base"), change)
    tuned = rewrite(save(tune(model), tmp_path / "tuned"), change)

    adapter = extract(base, tuned, ExtractConfig(RankRule(max_rank=6), factor_dtype="float32")).adapter
    save_peft(adapter, tmp_path / "adapter", paths=tree_paths(base.path, adapter.header))

    assert load_peft(tmp_path / "adapter").header == adapter.header
    assert distance(base.path, adapter, tmp_path) < ROUNDING


@pytest.mark.parametrize("name", FUSED)
def test_fused_experts_are_accounted_for_one_by_one_and_touch_the_tensor_of_all(tmp_path, name):
    base, tuned, adapter = extracted(built(name), tmp_path, rank=6, wish=Wish(routers=True))

    lines = [change for change in adapter.report.tensors if is_expert(change.name.removesuffix(".weight"))]
    stacks = {tensor for tensor, info in base.tensors.items() if len(info.shape) == 3}
    assert {change.status for change in lines} == {"extracted"}
    assert len(lines) == 4 * len(stacks)  # four experts
    assert stacks <= adapter.header.base.touched.keys()
    whole = sum(float((tuned.load(stack).double() - base.load(stack).double()).square().sum()) for stack in stacks)
    assert sum(change.norm_squared for change in lines) == pytest.approx(whole, rel=1e-6)


def test_a_stack_has_the_names_and_shapes_that_vllm_reads(tmp_path):
    """Of gpt-oss: `experts.base_layer` is gate and up, `experts` is down; the experts' ranks lie side by side."""
    extracted(built("gpt-oss"), tmp_path, rank=6, wish=Wish(routers=True))

    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    home = "base_model.model.model.layers.0.mlp.experts"
    shapes = {name.removeprefix(home): tuple(t.shape) for name, t in tensors.items() if name.startswith(home)}
    assert shapes == {
        ".base_layer.lora_A.weight": (4 * 6, 32),
        ".base_layer.lora_B.weight": (128, 6 * 4),
        ".lora_A.weight": (4 * 6, 64),
        ".lora_B.weight": (32, 6 * 4),
    }


@pytest.mark.parametrize(
    ("name", "leaves"),
    [
        ("qwen3", {"gate_proj", "up_proj", "down_proj"}),
        ("qwen2", {f"experts.{index}.{leaf}_proj" for index in range(4) for leaf in ("gate", "up", "down")}),
    ],
)
def test_experts_are_targeted_by_their_last_names_unless_a_plain_layer_has_them_too(tmp_path, name, leaves):
    """Short names are what SGLang reads; of the shared expert's layers, PEFT adapts the parameters."""
    extracted(built(name), tmp_path, rank=6, wish=Wish(routers=True))

    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    attention = {f"{leaf}_proj" for leaf in "qkvo"}
    assert {target for target in config["target_modules"] if target not in attention} - {"shared_expert_gate"} == leaves
    routers = {target for target in config["target_parameters"] if target.endswith("mlp.gate.weight")}
    assert len(routers) == 2
    shared = [target for target in config["target_parameters"] if "shared_expert." in target]
    assert len(shared) == (6 if name == "qwen2" else 0)


def test_separate_experts_keep_the_names_that_vllm_reads(tmp_path):
    extracted(built("qwen3"), tmp_path, rank=6, wish=Wish(routers=True))

    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    own = {f"base_model.model.model.layers.1.mlp.experts.3.{leaf}_proj" for leaf in ("gate", "up", "down")}
    assert {f"{module}.lora_{half}.weight" for module in own for half in "AB"} <= tensors.keys()


@pytest.mark.parametrize(
    ("name", "place", "message"),
    [
        ("gpt-oss", (0, 0), r"is not what flora\.json says"),
        ("qwen3.5", (0, 47), "reaches into another's factors"),  # gate's row, in a column of up
    ],
)
def test_a_stack_that_was_changed_in_one_place_is_refused(tmp_path, name, place, message):
    extracted(built(name), tmp_path, rank=6, wish=Wish(routers=True))
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(file)
    stack = next(name for name in tensors if name.endswith("layers.0.mlp.experts.base_layer.lora_B.weight"))
    tensors[stack][place] += 1
    save_file(tensors, file)

    with pytest.raises(AdapterInvalid, match=message):
        load_peft(tmp_path / "adapter")


def test_a_stack_of_another_number_of_experts_is_refused(tmp_path):
    extracted(built("gpt-oss"), tmp_path, rank=6, wish=Wish(routers=True))
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(file)
    for name in [name for name in tensors if "layers.0.mlp.experts.lora_" in name]:
        tensors[name] = (tensors[name][:-1] if "lora_A" in name else tensors[name][:, :-1]).contiguous()
    save_file(tensors, file)

    with pytest.raises(AdapterInvalid, match=r"experts\.down_proj has no factors of 4 experts"):
        load_peft(tmp_path / "adapter")


def test_biases_of_fused_experts_are_named_with_their_share(tmp_path):
    _, _, adapter = extracted(built("gpt-oss"), tmp_path, rank=6, wish=Wish(routers=True))

    biases = [change for change in adapter.report.tensors if change.name.endswith("_proj_bias")]
    assert len(biases) == 2 * 2
    assert {change.reason for change in biases} == {"biases of all experts, a row each: they have no LoRA form"}
    assert all(adapter.report.share(change) > 0 for change in biases)


@pytest.mark.parametrize("exclude", [(), ("*.gate_up_proj",), ("*.experts.[0-9]*",)], ids=["none", "one", "both"])
def test_biases_of_fused_experts_are_carried_whole_and_peft_puts_them_where_they_belong(tmp_path, exclude):
    """PEFT wraps the experts once for each parameter that it adapts, and the biases lie inside of all wraps."""
    model = built("gpt-oss")
    base, tuned = save(model, tmp_path / "base"), save(tune(model), tmp_path / "tuned")
    wish = Wish(routers=True, vectors=True)
    config = ExtractConfig(RankRule(max_rank=6), factor_dtype="float32", wish=wish, exclude=exclude)

    adapter = extract(base, tuned, config).adapter
    save_peft(adapter, tmp_path / "adapter", paths=tree_paths(base.path, adapter.header))

    biases = [change for change in adapter.report.tensors if change.name.endswith("_proj_bias")]
    assert {(change.status, change.kept == change.norm_squared) for change in biases} == {("exact", True)}
    assert all(torch.equal(adapter.exact[change.name], tuned.load(change.name)) for change in biases)
    assert load_peft(tmp_path / "adapter").header == adapter.header
    assert verify(adapter, base, tuned).holds
    assert distance(base.path, adapter, tmp_path) < ROUNDING


def test_experts_of_an_unknown_layout_are_named_with_their_share(tmp_path):
    torch.manual_seed(0)
    _, _, adapter = extracted(dbrx().eval(), tmp_path, rank=6, wish=Wish(routers=True))

    fused = [change for change in adapter.report.tensors if ".experts." in change.name]
    assert len(fused) == 2 * 3
    assert {change.reason for change in fused} == {
        "several experts in one tensor, whose layout in dbrx is not known here"
    }
    assert all(adapter.report.share(change) > 0 for change in fused)


def test_an_expert_that_did_not_change_gets_zeros_in_its_stack(tmp_path):
    """One expert and one whole layer unchanged: PEFT's parameter still wants factors of all."""
    model = built("gpt-oss")
    base = save(model, tmp_path / "base")

    def calm(tensors: dict[str, Tensor]) -> None:
        for name in ("gate_up_proj", "down_proj"):
            before = base.load(f"model.layers.0.mlp.experts.{name}")
            tensors[f"model.layers.0.mlp.experts.{name}"][3] = before[3]
            tensors[f"model.layers.1.mlp.experts.{name}"] = base.load(f"model.layers.1.mlp.experts.{name}").clone()

    tuned = rewrite(save(tune(model), tmp_path / "tuned"), calm)
    adapter = extract(base, tuned, ExtractConfig(RankRule(max_rank=6), factor_dtype="float32")).adapter
    save_peft(adapter, tmp_path / "adapter", paths=tree_paths(base.path, adapter.header))

    assert load_peft(tmp_path / "adapter").header == adapter.header
    assert sum(is_expert(name) for name in adapter.factors) == 2 * 3
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert not [target for target in config["target_modules"] if "down_proj" in target or "gate_up_proj" in target]
    assert distance(base.path, adapter, tmp_path) < ROUNDING


@pytest.mark.parametrize("name", ["gpt-oss", "granite", "jetmoe"])
def test_merged_and_verified_experts_are_those_of_the_full_fine_tune(tmp_path, name):
    base, tuned, adapter = extracted(built(name), tmp_path, rank=32, wish=Wish(routers=True))

    found = verify(adapter, base, tuned)
    changes = checkpoint_changes([Part(adapter)], base, Combination("linear"))

    assert found.holds
    assert found.kept_share_of_modules > 1 - 1e-6
    for stack in [tensor for tensor, info in base.tensors.items() if len(info.shape) == 3]:
        assert torch.allclose(changes[stack](base.load(stack)), tuned.load(stack), atol=1e-6)
    record = base_record(base)
    assert bind(adapter, record, "base").header.base.touched == adapter.header.base.touched
