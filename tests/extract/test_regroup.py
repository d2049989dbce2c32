"""Pairs of which one side keeps the experts of a layer in one tensor, and the other each by itself."""

import pytest
import torch
from torch import Tensor

from flora.algebra.verify import verify
from flora.errors import CheckpointError
from flora.extract import ExtractConfig, Wish, extract, plan_extraction
from flora.rank import RankRule
from flora.registry.formats.paths import tree_paths
from flora.registry.formats.peft import load_peft, save_peft
from tests.extract.models import rewrite, save, tune
from tests.extract.moe_judge import ROUNDING, built, distance

RANK_6 = ExtractConfig(RankRule(max_rank=6), factor_dtype="float32")


@pytest.mark.parametrize(
    ("name", "side"),
    [
        ("qwen3", "tuned"),
        ("qwen3.5", "base"),  # as it was published, and as transformers saves it
        ("mixtral", "base"),  # its experts have other names apart, and their home another one
        ("mixtral", "tuned"),
        ("phimoe", "tuned"),  # its router, too
        ("deepseek", "base"),  # its first layer is dense, and has layers of the experts' names
    ],
)
def test_a_pair_of_which_one_side_keeps_its_experts_fused_gives_the_adapter_of_the_base(tmp_path, name, side):
    """The very adapter that it gives with the tuned checkpoint grouped as the base is."""
    model = built(name)
    tuned_model = tune(model)
    base = save(model, tmp_path / "base", save_original_format=side != "base")
    tuned = save(tuned_model, tmp_path / "tuned", save_original_format=side != "tuned")
    alike = save(tuned_model, tmp_path / "alike", save_original_format=side != "base")
    config = ExtractConfig(RankRule(max_rank=6), factor_dtype="float32", wish=Wish(routers=True))

    assert any("read as the base's are" in note for note in plan_extraction(base, tuned, config).notes)
    adapter = extract(base, tuned, config).adapter

    assert adapter.header.serving_digest == extract(base, alike, config).adapter.header.serving_digest
    assert verify(adapter, base, tuned).holds
    save_peft(adapter, tmp_path / "adapter", paths=tree_paths(base.path, adapter.header))
    assert load_peft(tmp_path / "adapter").header == adapter.header
    assert distance(base.path, adapter, tmp_path) < ROUNDING


def taken_apart(tensors: dict[str, Tensor]) -> None:
    """Experts [in, out] by themselves: rows of gate and up one below the other."""
    for home in {name.partition(".experts.")[0] for name in tensors if name.endswith("experts.gate_up_proj")}:
        wide, narrow = (tensors.pop(f"{home}.experts.{leaf}").transpose(1, 2) for leaf in ("gate_up_proj", "down_proj"))
        half = wide.shape[1] // 2
        for index in range(len(wide)):
            gate, up = wide[index, :half], wide[index, half:]
            for leaf, part in (("gate_proj", gate), ("up_proj", up), ("down_proj", narrow[index])):
                tensors[f"{home}.experts.{index}.{leaf}.weight"] = part.contiguous()


def test_experts_of_llama_4_may_be_apart_as_those_have_them_who_quantize_it(tmp_path):
    model = built("llama4")
    base, alike = save(model, tmp_path / "base"), save(tune(model), tmp_path / "alike")
    tuned = rewrite(save(tune(model), tmp_path / "tuned"), taken_apart)

    adapter = extract(base, tuned, RANK_6).adapter

    assert adapter.header.serving_digest == extract(base, alike, RANK_6).adapter.header.serving_digest
    assert verify(adapter, base, tuned).holds


def as_fp8(tensors: dict[str, Tensor]) -> None:
    """Each expert's matrices with a scale for each row."""
    for name in [name for name in tensors if ".experts." in name]:
        scale = tensors[name].abs().amax(1, keepdim=True) / 448
        tensors |= {name: (tensors[name] / scale).to(torch.float8_e4m3fn), f"{name}_scale": scale}


def test_storage_noise_of_fp8_experts_apart_is_that_of_their_rounding(tmp_path):
    """An untuned model in fp8, against its base with the experts fused: nothing but rounding is in the change."""
    model = built("llama4")
    base = save(model, tmp_path / "base")
    tuned = rewrite(rewrite(save(model, tmp_path / "tuned"), taken_apart), as_fp8)

    changes = [change for change in extract(base, tuned, RANK_6).adapter.report.tensors if change.norm_squared]

    assert changes
    for change in changes:
        assert ".experts." in change.name
        assert change.noise == pytest.approx(change.norm_squared, rel=0.15), change.name


def as_unsloth(tensors: dict[str, Tensor]) -> None:
    """gpt-oss as Unsloth's model for four bits has it: experts in lists of layers, the router's layer in a box."""
    for name in [name for name in tensors if ".mlp." in name]:
        tensor = tensors.pop(name)
        if ".router." in name:
            tensors[name.replace(".router.", ".router.linear.")] = tensor
            continue
        kind = "bias" if name.endswith("_bias") else "weight"
        for index, own in enumerate(tensor):
            layer = f"{name.removesuffix('_bias')}s.{index}"
            tensors[f"{layer}.{kind}"] = (own if kind == "bias" else own.T).contiguous()


def as_llm_compressor(tensors: dict[str, Tensor]) -> None:
    """gpt-oss with a gate, an up and a down layer for each expert: of gate and up every second row."""
    for name in [name for name in tensors if ".mlp.experts." in name]:
        home, _, leaf = name.rpartition(".")
        kind = "bias" if leaf.endswith("_bias") else "weight"
        for index, own in enumerate(tensors.pop(name)):
            whole = own if kind == "bias" else own.T
            parts = (("down_proj", whole),)
            if leaf.startswith("gate_up_proj"):
                parts = ("gate_proj", whole[::2]), ("up_proj", whole[1::2])
            for part, rows in parts:
                tensors[f"{home}.{index}.{part}.{kind}"] = rows.contiguous()


@pytest.mark.parametrize("apart", [as_unsloth, as_llm_compressor])
def test_gpt_oss_with_its_experts_apart_gives_the_adapter_of_the_fused_base(tmp_path, apart):
    """What PEFT merges into Unsloth's model for four bits is saved so, with the biases and the router."""
    model = built("gpt-oss")
    base, alike = save(model, tmp_path / "base"), save(tune(model), tmp_path / "alike")
    tuned = rewrite(save(tune(model), tmp_path / "tuned"), apart)
    wish = Wish(routers=True, vectors=True)
    config = ExtractConfig(RankRule(max_rank=6), factor_dtype="float32", wish=wish)

    adapter = extract(base, tuned, config).adapter

    assert adapter.header.serving_digest == extract(base, alike, config).adapter.header.serving_digest
    assert verify(adapter, base, tuned).holds
    save_peft(adapter, tmp_path / "adapter", paths=tree_paths(base.path, adapter.header))
    assert distance(base.path, adapter, tmp_path) < ROUNDING


@pytest.mark.parametrize("apart", [as_unsloth, as_llm_compressor])
def test_gpt_oss_with_its_experts_apart_in_the_base_is_told(tmp_path, apart):
    model = built("gpt-oss")
    base = rewrite(save(model, tmp_path / "base"), apart)

    with pytest.raises(CheckpointError, match="of the base's tensors") as caught:
        plan_extraction(base, save(tune(model), tmp_path / "tuned"), RANK_6)

    assert "gpt-oss and apart in the base" in caught.value.cause


def test_experts_apart_of_which_one_lacks_a_part_are_told(tmp_path):
    model = built("qwen3")
    base = save(model, tmp_path / "base", save_original_format=False)
    tuned = save(tune(model), tmp_path / "tuned")
    tuned = rewrite(tuned, lambda tensors: tensors.pop("model.layers.1.mlp.experts.3.up_proj.weight"))

    with pytest.raises(CheckpointError, match="lacks 4 of the base's tensors") as caught:
        plan_extraction(base, tuned, RANK_6)

    assert "a part of an expert is missing" in caught.value.cause
