from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from flora.adapter import Adapter
from flora.algebra.verify import verify
from flora.checkpoint import Checkpoint, open_checkpoint
from flora.errors import CheckpointError, UsageError
from flora.extract import ExtractConfig, extract
from flora.extract.aliases import named_as
from flora.extract.kinds import Wish
from flora.extract.pair import TensorPair
from flora.extract.pairs import match_names, pair_tensors
from flora.rank import RankRule
from flora.registry import Registry
from flora.registry.formats.paths import tree_paths
from flora.registry.formats.peft import save_peft
from tests.extract.models import SIZES, build, rewrite, save, tune
from tests.extract.peft_judge import EVERYTHING, distance
from tests.extract.zoo import ZOO

LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def paired(base: Checkpoint, tuned: Checkpoint, **options: Any) -> dict[str, TensorPair]:
    return {pair.name: pair for pair in pair_tensors(base, tuned, **options)[0]}


def extractable(pairs: dict[str, TensorPair]) -> set[str]:
    return {name for name, pair in pairs.items() if pair.status == "extractable"}


def gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=100, n_embd=32, n_layer=1, n_head=2, n_positions=16)).eval()


def without(prefix: str) -> Callable[[dict[str, torch.Tensor]], None]:
    """For `rewrite`: names as a checkpoint has them that was saved without the part in front."""

    def change(tensors: dict[str, torch.Tensor]) -> None:
        for name in list(tensors):
            tensors[name.removeprefix(prefix)] = tensors.pop(name)

    return change


def belongs_to(base: Checkpoint, tuned: Checkpoint, folder: Path) -> Adapter:
    """The adapter of all that it can carry: `verify` finds its tensors in the base, and `fsck` in the base's record."""
    found = extract(base, tuned, ExtractConfig(RankRule(max_rank=4), "float32", wish=EVERYTHING))
    adapter = found.adapter

    assert {f"{name}.weight" for name in adapter.factors} | set(adapter.exact) <= set(base.tensors)
    assert verify(adapter, base, tuned).holds
    with Registry.open(folder) as registry:
        registry.register_base(found.base_record, name="base", path=base.path)
        registry.add(adapter, "tuned")
        assert registry.fsck() == []
    return adapter


def test_every_tensor_has_its_place_and_exactly_the_linear_layers_are_extractable(pair):
    base, tuned = pair

    pairs = paired(base, tuned)

    assert list(pairs) == sorted(base.tensors) == list(tuned.tensors)
    assert extractable(pairs) == {f"{name}.weight" for name in _modules(base) if name.endswith(LINEAR)}
    assert "tied to the output head" in pairs["model.embed_tokens.weight"].reason
    assert "norm" in pairs["model.norm.weight"].reason


def test_biases_and_head_norms_are_not_extractable(tmp_path):
    qwen2, qwen3 = build("qwen2"), build("qwen3")
    biased = paired(save(qwen2, tmp_path / "qwen2"), save(tune(qwen2), tmp_path / "qwen2-tuned"))
    normed = paired(save(qwen3, tmp_path / "qwen3"), save(tune(qwen3), tmp_path / "qwen3-tuned"))

    assert "bias" in biased["model.layers.0.self_attn.q_proj.bias"].reason
    assert biased["model.layers.0.self_attn.q_proj.weight"].status == "extractable"
    assert "norm" in normed["model.layers.0.self_attn.q_norm.weight"].reason


def test_an_untied_head_is_told_apart_from_the_embedding(tmp_path):
    model = build(tied=False)

    pairs = paired(save(model, tmp_path / "base"), save(tune(model), tmp_path / "tuned"))

    assert "output head" in pairs["lm_head.weight"].reason
    assert "tied" not in pairs["model.embed_tokens.weight"].reason


@pytest.mark.parametrize("bare", ["base", "tuned"])
def test_a_model_prefix_on_one_side_only_is_matched_and_noted(tmp_path, bare):
    model = build()
    sides = {"base": save(model, tmp_path / "base"), "tuned": save(tune(model), tmp_path / "tuned")}
    sides[bare] = rewrite(sides[bare], without("model."))

    pairs, notes = pair_tensors(sides["base"], sides["tuned"])

    assert [pair.name for pair in pairs] == sorted(sides["base"].tensors)
    assert all(pair.base and pair.tuned for pair in pairs)
    assert notes == [
        f"tensor names of the {'base' if bare == 'base' else 'tuned checkpoint'} lack 'model.', "
        "which the other checkpoint's have"
    ]
    belongs_to(sides["base"], sides["tuned"], tmp_path / "registry")


def test_an_adapter_of_a_base_without_a_prefix_is_what_peft_computes(tmp_path):
    """GPT-2 as it was published has `h.0…`, and what transformers saves of its tuning `transformer.h.0…`."""
    base = rewrite(save(gpt2(), tmp_path / "base"), without("transformer."))
    adapter = belongs_to(base, save(tune(gpt2()), tmp_path / "tuned"), tmp_path / "registry")
    assert "h.0.attn.c_attn" in adapter.factors

    save_peft(adapter, tmp_path / "adapter", paths=tree_paths(base.path, adapter.header))

    model = AutoModelForCausalLM.from_pretrained(base.path, dtype=torch.float32)
    tokens = torch.arange(12)[None]
    assert distance(model, adapter, tmp_path, lambda model: model(input_ids=tokens).logits) < 2e-4


def test_a_new_tensor_is_kept_in_sight(tmp_path):
    model = build()
    tuned = rewrite(
        save(tune(model), tmp_path / "tuned"), lambda tensors: tensors.update({"value_head.weight": torch.ones(1, 64)})
    )

    new = paired(save(model, tmp_path / "base"), tuned)["value_head.weight"]

    assert (new.status, new.base) == ("not_extractable", None)
    assert "no base tensor" in new.reason


def test_buffers_that_only_the_base_stores_are_kept_in_sight(tmp_path):
    model = build()
    buffer = "model.layers.0.self_attn.rotary_emb.inv_freq"
    base = rewrite(save(model, tmp_path / "base"), lambda tensors: tensors.update({buffer: torch.ones(8)}))

    assert "buffer" in paired(base, save(tune(model), tmp_path / "tuned"))[buffer].reason


def neox() -> GPTNeoXForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    return GPTNeoXForCausalLM(GPTNeoXConfig(vocab_size=100, max_position_embeddings=16, **sizes)).eval()


MASK = torch.ones(1, 1, 16, 16).tril()
STORED_BY_OLDER_VERSIONS = {
    "gpt2": (gpt2, {"transformer.h.0.attn.bias": MASK, "transformer.h.0.attn.masked_bias": torch.tensor(-1e4)}),
    "pythia": (
        neox,
        {
            "gpt_neox.layers.0.attention.bias": MASK.bool(),
            "gpt_neox.layers.0.attention.masked_bias": torch.tensor(-1e9),
            "gpt_neox.layers.0.attention.rotary_emb.inv_freq": torch.ones(4),
        },
    ),
}


@pytest.mark.parametrize("published", STORED_BY_OLDER_VERSIONS)
def test_masks_that_only_the_base_stores_are_no_missing_part(tmp_path, published):
    """As the Hub has GPT-2 and Pythia, and as transformers saves their tuning today."""
    make, buffers = STORED_BY_OLDER_VERSIONS[published]
    base = rewrite(save(make(), tmp_path / "base"), lambda tensors: tensors.update(buffers))

    pairs = paired(base, save(tune(make()), tmp_path / "tuned"))

    assert {name for name, pair in pairs.items() if pair.tuned is None} == set(buffers)
    assert all("buffer" in pairs[name].reason for name in buffers)


@pytest.mark.parametrize("bias", ["attn.c_attn.bias", "mlp.c_fc.bias"])
def test_a_bias_that_only_the_base_stores_is_a_missing_part(tmp_path, bias):
    name = f"transformer.h.0.{bias}"
    tuned = rewrite(save(tune(gpt2()), tmp_path / "tuned"), lambda tensors: tensors.pop(name))

    with pytest.raises(CheckpointError, match=rf"lacks 1 of the base's tensors, {name}"):
        paired(save(gpt2(), tmp_path / "base"), tuned)


def test_globs_include_and_exclude_whole_names(pair):
    attention = paired(*pair, include=["*.self_attn.*"])
    first = paired(*pair, exclude=["model.layers.1.*"])
    both = paired(*pair, include=["*.mlp.*"], exclude=["*.down_proj"])

    assert {name.split(".")[3] for name in extractable(attention)} == {"self_attn"}
    assert {name.split(".")[2] for name in extractable(first)} == {"0"}
    assert {name.split(".")[4] for name in extractable(both)} == {"gate_proj", "up_proj"}
    assert "model.layers.1.*" in first["model.layers.1.mlp.up_proj.weight"].reason
    assert "--include" in attention["model.layers.0.mlp.up_proj.weight"].reason


def test_any_prefix_that_most_names_lack_is_found(tmp_path):
    """BertModel saves `encoder.…`, and as a part of another model `bert.encoder.…`."""
    model = ZOO["bert"].build()

    def with_prefix(tensors: dict[str, torch.Tensor]) -> None:
        for name in list(tensors):
            tensors[f"bert.{name}"] = tensors.pop(name)

    base = save(model, tmp_path / "base")
    tuned = rewrite(save(tune(model), tmp_path / "tuned"), with_prefix)

    pairs = paired(base, tuned)

    query = pairs["encoder.layer.0.attention.self.query.weight"]
    assert query.tuned.name == "bert.encoder.layer.0.attention.self.query.weight"
    assert query.status == "extractable"
    assert all(pair.base and pair.tuned for pair in pairs.values())
    belongs_to(base, tuned, tmp_path / "registry")


def test_a_moving_average_is_not_taken_for_the_weights_beside_it(tmp_path):
    """From a tuned `ema.…` that stands alone the base's weights were subtracted, and its own `ema.…` was forgotten."""
    model = build()

    def averaged(tensors: dict[str, torch.Tensor]) -> None:
        for name in list(tensors):
            tensors[f"ema.{name}"] = tensors[name] / 2

    def alone(tensors: dict[str, torch.Tensor]) -> None:
        averaged(tensors)
        for name in list(tensors):
            if not name.startswith("ema."):
                del tensors[name]

    base = rewrite(save(model, tmp_path / "base"), averaged)
    tuned = rewrite(save(tune(model), tmp_path / "tuned"), alone)

    pairs, _ = match_names(base.tensors, tuned.tensors)

    assert [pair.name for pair in pairs] == sorted(base.tensors)
    assert {pair.name for pair in pairs if pair.tuned} == set(tuned.tensors)
    with pytest.raises(CheckpointError, match=f"lacks {len(model.state_dict()) - 1} of the base's tensors"):
        pair_tensors(base, tuned)


def test_no_two_tensors_get_one_name():
    """Both would be `model.language_model.visual.x`, one by its prefix and one as older versions named it."""
    names = ["visual.x", "language_model.model.visual.x"]

    found = named_as(names, ["model.language_model.visual.x", "model.language_model.y"])

    assert sorted(found) == sorted(names)
    assert len(set(found.values())) == 2


@pytest.mark.parametrize("older", ["base", "tuned"])
def test_names_of_older_transformers_are_matched_and_noted(tmp_path, older):
    """Models that see and read: `language_model.model.` became `model.language_model.` in transformers 5."""
    model = build(tied=False)
    sides = {"base": save(model, tmp_path / "base"), "tuned": save(tune(model), tmp_path / "tuned")}

    def named(new: str, head: str) -> Callable[[dict[str, torch.Tensor]], None]:
        def change(tensors: dict[str, torch.Tensor]) -> None:
            for name in list(tensors):
                tensors[name.replace("lm_head", head) if "lm_head" in name else new + name[6:]] = tensors.pop(name)

        return change

    for side, checkpoint in sides.items():
        names = ("language_model.model.", "language_model.lm_head"), ("model.language_model.", "lm_head")
        sides[side] = rewrite(checkpoint, named(*names[side != older]))

    pairs, notes = pair_tensors(sides["base"], sides["tuned"])

    assert [pair.name for pair in pairs] == sorted(sides["base"].tensors)
    assert all(pair.base and pair.tuned for pair in pairs)
    assert len(notes) == 1
    assert "language_model.model." in notes[0] or "language_model.lm_head" in notes[0]
    belongs_to(sides["base"], sides["tuned"], tmp_path / "registry")


@pytest.mark.parametrize("option", ["include", "exclude"])
def test_a_glob_that_matches_nothing_is_an_error(pair, option):
    with pytest.raises(UsageError, match=rf"--{option} 'q_porj' matches no tensor"):
        paired(*pair, **{option: ["q_porj"]})


def test_globs_that_leave_nothing_are_an_error(pair):
    with pytest.raises(UsageError, match=r"nothing of .* can be extracted"):
        paired(*pair, exclude=["*"])


def test_gpt2_keeps_its_weights_as_in_out(tmp_path):
    pairs = paired(save(gpt2(), tmp_path / "base"), save(tune(gpt2()), tmp_path / "tuned"))

    assert pairs["transformer.h.0.attn.c_attn.weight"].shape == (32, 96)
    assert pairs["transformer.h.0.attn.c_attn.weight"].kind == "conv1d"
    assert pairs["transformer.h.0.attn.c_attn.weight"].matrix_shape == (96, 32)  # [out, in]


def test_experts_are_extracted_and_their_routers_where_that_is_asked(tmp_path):
    torch.manual_seed(0)
    config = Qwen3MoeConfig(**SIZES, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32)
    model = Qwen3MoeForCausalLM(config)

    folders = save(model, tmp_path / "base"), save(tune(model), tmp_path / "tuned")
    pairs, asked = paired(*folders), paired(*folders, wish=Wish(routers=True))

    experts = [pair for name, pair in pairs.items() if ".experts." in name]
    assert len(experts) == 2 * 4 * 3
    assert {pair.status for pair in experts} == {"extractable"}
    router = "model.layers.0.mlp.gate.weight"
    assert (asked[router].status, asked[router].kind) == ("extractable", "parameter")
    assert pairs[router].status == "not_extractable"
    assert pairs[router].reason == "a router: only --routers extracts it"
    assert pairs["model.layers.0.self_attn.q_proj.weight"].status == "extractable"


def test_whole_number_buffers_are_no_weights(tmp_path):
    folders = []
    for name in ("base", "tuned"):
        folder = tmp_path / name
        folder.mkdir()
        tensors = {"layer.weight": torch.randn(8, 8), "position_ids": torch.arange(4)}
        save_file(tensors, folder / "model.safetensors")
        folders.append(open_checkpoint(folder))

    assert "whole numbers" in paired(*folders)["position_ids"].reason


def _modules(checkpoint: Checkpoint) -> list[str]:
    return [name.removesuffix(".weight") for name in checkpoint.tensors]
