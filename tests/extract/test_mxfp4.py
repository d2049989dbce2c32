"""gpt-oss as OpenAI published it: experts of four bits with a scale for each block of 32."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, GptOssConfig, GptOssForCausalLM, Mxfp4Config

from flora.algebra.changes import checkpoint_changes
from flora.algebra.combine import Combination
from flora.algebra.parts import Part
from flora.algebra.verify import verify
from flora.checkpoint import Checkpoint, open_checkpoint
from flora.errors import CheckpointError, Unsupported
from flora.extract import ExtractConfig, extract, plan_extraction
from flora.extract.experts import readable
from flora.forms import is_expert
from flora.identity import base_record
from flora.rank import RankRule
from tests.extract.models import rewrite, save, tune
from tests.extract.moe import HEADED
from tests.extract.test_regroup import as_llm_compressor, as_unsloth

RANK_8 = ExtractConfig(RankRule(max_rank=8), factor_dtype="float32")
VALUES = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
HOME = "model.layers.0.mlp.experts"


def model() -> GptOssForCausalLM:
    torch.manual_seed(0)
    sizes = HEADED | {"hidden_size": 64, "head_dim": 16, "intermediate_size": 96}
    return GptOssForCausalLM(GptOssConfig(**sizes, num_local_experts=4, num_experts_per_tok=2)).eval()


def packed(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Blocks [experts, out, in / 32, 16] and scales of the numbers nearest to a weight [experts, in, out]."""
    blocks = weight.float().transpose(1, 2).unflatten(-1, (-1, 32))
    exponents = (blocks.abs().amax(-1) / 6).clamp_min(2.0**-126).log2().ceil()
    scaled = blocks / exponents.exp2()[..., None]
    nearest = (scaled.abs()[..., None] - VALUES).abs().argmin(-1).to(torch.uint8)
    codes = nearest | ((scaled < 0).to(torch.uint8) << 3)
    return codes[..., 0::2] | (codes[..., 1::2] << 4), (exponents + 127).to(torch.uint8)


def quantize(checkpoint: Checkpoint) -> Checkpoint:
    def to_fp4(tensors: dict[str, Tensor]) -> None:
        for name in [name for name in tensors if name.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
            tensors[f"{name}_blocks"], tensors[f"{name}_scales"] = packed(tensors.pop(name))

    checkpoint = rewrite(checkpoint, to_fp4)
    config = json.loads((checkpoint.path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": ["self_attn", "router", "head"]}
    (checkpoint.path / "config.json").write_text(json.dumps(config))
    return open_checkpoint(checkpoint.path)


@pytest.fixture
def base(tmp_path: Path) -> Checkpoint:
    return quantize(save(model(), tmp_path / "base", torch.bfloat16))


def test_mxfp4_experts_read_as_transformers_dequantizes_them(base):
    judge = AutoModelForCausalLM.from_pretrained(base.path, quantization_config=Mxfp4Config(dequantize=True))

    ours, theirs = readable(base), judge.state_dict()
    for leaf in ("gate_up_proj", "down_proj"):
        for index in range(4):
            expert = theirs[f"{HOME}.{leaf}"][index].float()  # [in, out]
            assert torch.equal(ours.load(f"{HOME}.{index}.{leaf}.weight"), expert.T)
    assert not [name for name in ours.tensors if name.endswith(("_blocks", "_scales"))]


def test_an_mxfp4_base_and_a_tuned_checkpoint_in_bf16_make_an_adapter_that_verifies(base, tmp_path):
    tuned = save(tune(model()), tmp_path / "tuned", torch.bfloat16)

    adapter = extract(base, tuned, RANK_8).adapter

    assert sum(is_expert(name) for name in adapter.factors) == 2 * 2 * 4
    assert verify(adapter, base, tuned).holds
    assert {f"{HOME}.down_proj_blocks", f"{HOME}.down_proj_scales"} <= adapter.header.base.touched.keys()
    assert adapter.header.base.base_id == str(base_record(base).base_id)  # of the files as they are


@pytest.mark.parametrize("apart", [as_unsloth, as_llm_compressor])
def test_an_mxfp4_base_reads_a_tuned_checkpoint_with_experts_apart(base, tmp_path, apart):
    alike = save(tune(model()), tmp_path / "alike", torch.bfloat16)
    tuned = rewrite(save(tune(model()), tmp_path / "tuned", torch.bfloat16), apart)

    adapter = extract(base, tuned, RANK_8).adapter

    assert adapter.header.serving_digest == extract(base, alike, RANK_8).adapter.header.serving_digest
    assert verify(adapter, base, tuned).holds


def test_nothing_is_merged_into_four_bits(base, tmp_path):
    adapter = extract(base, save(tune(model()), tmp_path / "tuned"), RANK_8).adapter

    with pytest.raises(Unsupported, match=r"proj_blocks of .* is stored as U8, to which nothing can be added"):
        checkpoint_changes([Part(adapter)], base, Combination("linear"))


def test_blocks_without_their_scales_are_told_before_any_weight_is_read(base, tmp_path):
    tuned = save(tune(model()), tmp_path / "tuned")
    base = rewrite(base, lambda tensors: tensors.pop(f"{HOME}.down_proj_scales"))

    with pytest.raises(CheckpointError, match=r"down_proj_scales is not there; blocks of \[4, 64, 3, 16\] want"):
        plan_extraction(base, tuned, RANK_8)


def test_mxfp4_of_an_architecture_that_is_not_known_is_refused_as_quantized(base, tmp_path):
    config = json.loads((base.path / "config.json").read_text()) | {"model_type": "gpt_next"}
    (base.path / "config.json").write_text(json.dumps(config))

    with pytest.raises(CheckpointError, match=r"_blocks .* is stored as U8, a quantized weight"):
        plan_extraction(open_checkpoint(base.path), save(tune(model()), tmp_path / "tuned"), RANK_8)
