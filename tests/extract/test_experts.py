"""Mixtures of experts: one pair of factors an expert, which PEFT stacks into transformers' fused parameters."""

import shutil

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from flora.extract import Wish
from flora.registry.formats.peft import save_peft
from tests.extract.models import SIZES
from tests.extract.peft_judge import extracted

TOKENS = torch.arange(20)[None]


def mixtral() -> torch.nn.Module:
    return MixtralForCausalLM(MixtralConfig(**SIZES, num_local_experts=4))


def qwen3() -> torch.nn.Module:
    config = Qwen3MoeConfig(**SIZES, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=48)
    return Qwen3MoeForCausalLM(config)


@pytest.mark.parametrize("make", [mixtral, qwen3])
@pytest.mark.parametrize("profile", ["compact", "portable"])
def test_every_expert_is_extracted_and_peft_computes_what_the_deltas_do(tmp_path, make, profile):
    torch.manual_seed(0)
    base, _, adapter = extracted(make().eval(), tmp_path, rank=6, wish=Wish())
    save_peft(adapter, tmp_path / "adapter", profile)
    assert sum(".experts." in name for name in adapter.factors) == 2 * 4 * 3  # layers, experts, matrices

    shutil.copytree(base.path, tmp_path / "wanted")
    tensors = load_file(tmp_path / "wanted" / "model.safetensors")
    for name, factors in adapter.factors.items():
        tensors[f"{name}.weight"] += factors.delta()
    save_file(tensors, tmp_path / "wanted" / "model.safetensors", metadata={"format": "pt"})

    with torch.no_grad():
        wanted = AutoModelForCausalLM.from_pretrained(tmp_path / "wanted", dtype=torch.float32)(TOKENS).logits
        model = AutoModelForCausalLM.from_pretrained(base.path, dtype=torch.float32).eval()
        before = model(TOKENS).logits
        got = PeftModel.from_pretrained(model, tmp_path / "adapter").eval()(TOKENS).logits
    assert float((got - wanted).norm() / (wanted - before).norm()) < 1e-4


def test_the_router_is_named_and_left(tmp_path):
    torch.manual_seed(0)
    _, _, adapter = extracted(qwen3().eval(), tmp_path, rank=6, wish=Wish())

    assert "router" in adapter.report.by_name()["model.layers.0.mlp.gate.weight"].reason


def test_experts_fused_in_one_parameter_are_named_with_their_share(tmp_path):
    """gpt-oss keeps them so: no adapter of theirs is made, and the report says how much of the change they hold."""
    torch.manual_seed(0)
    sizes = SIZES | {"num_local_experts": 4, "num_experts_per_tok": 2}
    _, _, adapter = extracted(GptOssForCausalLM(GptOssConfig(**sizes)).eval(), tmp_path, rank=6, wish=Wish())

    fused = [change for change in adapter.report.tensors if ".experts." in change.name and len(change.shape) == 3]
    assert len(fused) == 2 * 2
    assert {change.reason for change in fused} == {"expert weights, fused in one 3-D parameter"}
    assert all(adapter.report.share(change) > 0 for change in fused)
    assert "model.layers.0.self_attn.q_proj" in adapter.factors
