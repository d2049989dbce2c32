"""PEFT folders, judged by PEFT itself on a tiny Llama in float32."""

import copy
import json
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from flora.adapter import CHAT_TEMPLATE, Adapter, ChangeReport, Recipe, TensorChange, make_adapter
from flora.errors import AdapterInvalid, FloraError, NotFound, UsageError
from flora.lowrank import LowRank
from flora.registry.formats.peft import load_peft, save_peft
from tests.registry.adapters import BASE, HIDDEN, MLP, Q_PROJ, random_adapter
from tests.registry.peft_folders import CONFIG, RECORD, WEIGHTS, as_foreign, edit_config

RANKS = {
    "model.layers.0.self_attn.q_proj": 4,
    "model.layers.1.self_attn.q_proj": 1,
    "model.layers.0.self_attn.k_proj": 3,
    "model.layers.1.mlp.down_proj": 7,
}
TOKENS = torch.arange(12).reshape(2, 6)


@pytest.fixture(scope="module")
def llama() -> LlamaForCausalLM:
    torch.manual_seed(7)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=HIDDEN,
        intermediate_size=MLP,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=False,
    )
    return LlamaForCausalLM(config).eval()


def with_delta(llama: LlamaForCausalLM, adapter: Adapter) -> Tensor:
    """The logits of base weights plus every module's delta."""
    model = copy.deepcopy(llama)
    with torch.no_grad():
        for module, factors in adapter:
            model.get_submodule(module.name).weight += factors.delta()
        return model(TOKENS).logits


def with_peft(llama: LlamaForCausalLM, folder: Path) -> Tensor:
    """The logits that PEFT computes from the folder; a warning about missing or unknown keys is an error."""
    model = peft.PeftModel.from_pretrained(copy.deepcopy(llama), folder).eval()
    with torch.no_grad():
        return model(TOKENS).logits


@pytest.mark.filterwarnings("error::UserWarning:peft.*")
@pytest.mark.parametrize("profile", ["compact", "portable"])
def test_peft_computes_the_same_logits_from_our_folder(llama, tmp_path, profile):
    adapter = random_adapter(ranks=RANKS, dtype=torch.float32)

    save_peft(adapter, tmp_path / "out", profile)

    expected = with_delta(llama, adapter)
    torch.testing.assert_close(with_peft(llama, tmp_path / "out"), expected, rtol=1e-5, atol=1e-4)
    assert not torch.allclose(expected, llama(TOKENS).logits, atol=1e-2)


@pytest.mark.parametrize("profile", ["compact", "portable"])
def test_our_folder_comes_back_with_both_identities(tmp_path, profile):
    adapter = random_adapter(ranks=RANKS, extras={CHAT_TEMPLATE: b"{{ messages }}"})

    save_peft(adapter, tmp_path / "out", profile)
    loaded = load_peft(tmp_path / "out")

    assert loaded.header == adapter.header
    assert loaded.header.serving_digest == adapter.header.serving_digest
    assert loaded.report == adapter.report
    assert loaded.extras == {CHAT_TEMPLATE: b"{{ messages }}"}
    assert all(torch.equal(loaded.factors[name].B, adapter.factors[name].B) for name in RANKS)


def test_the_portable_profile_has_one_rank_and_every_layer_of_a_used_kind(tmp_path):
    save_peft(random_adapter(ranks=RANKS), tmp_path / "out", "portable")

    tensors = load_file(tmp_path / "out" / WEIGHTS)
    config = json.loads((tmp_path / "out" / CONFIG).read_text())
    assert {tensor.shape[0] for name, tensor in tensors.items() if "lora_A" in name} == {8}
    assert not tensors["base_model.model.model.layers.0.mlp.down_proj.lora_B.weight"].any()
    assert len(tensors) == 2 * 8  # q, k and down, in both layers, and the v that an engine joins with q and k
    assert (config["r"], config["lora_alpha"], config["rank_pattern"]) == (8, 8, {})
    assert config["target_modules"] == ["down_proj", "k_proj", "q_proj", "v_proj"]


@pytest.mark.parametrize("profile", ["compact", "portable"])
def test_a_bias_comes_back_whose_layer_has_no_factors_but_zeros(tmp_path, profile):
    """A budget leaves some layers no terms, and --vectors carries their biases all the same."""
    factors = random_adapter(ranks={"model.layers.1.self_attn.q_proj": 2, "model.layers.0.mlp.up_proj": 2}).factors
    biases = {f"model.layers.{layer}.self_attn.q_proj.bias": torch.ones(HIDDEN) * layer for layer in range(2)}
    adapter = make_adapter(factors, BASE, Recipe(operation="extract"), exact=biases)

    save_peft(adapter, tmp_path / "out", profile)
    loaded = load_peft(tmp_path / "out")

    assert loaded.header == adapter.header
    assert all(torch.equal(loaded.exact[name], bias) for name, bias in biases.items())


def test_the_portable_profile_takes_layers_from_the_report_that_the_adapter_never_touches(tmp_path):
    adapter = random_adapter(ranks={Q_PROJ: 2})
    untouched = [
        TensorChange(
            name=f"model.layers.{i}.self_attn.q_proj.weight", shape=(20, 10), status="unchanged", norm_squared=0.0
        )
        for i in (1, 2)
    ]
    report = ChangeReport(tensors=(*adapter.report.tensors, *untouched))
    adapter = make_adapter(adapter.factors, BASE, adapter.header.recipe, report)

    save_peft(adapter, tmp_path / "out", "portable")

    tensors = load_file(tmp_path / "out" / WEIGHTS)
    assert tensors["base_model.model.model.layers.2.self_attn.q_proj.lora_A.weight"].shape == (8, 10)
    assert tensors["base_model.model.model.layers.2.self_attn.q_proj.lora_B.weight"].shape == (20, 8)
    assert load_peft(tmp_path / "out").header == adapter.header


def test_the_portable_profile_knows_the_layers_of_a_base_that_its_library_names_otherwise(tmp_path):
    theirs, ours = "language_model.model.layers", "model.language_model.layers"
    name = f"{theirs}.1.self_attn.q_proj"
    report = ChangeReport(
        tensors=tuple(
            TensorChange(
                name=f"{theirs}.{layer}.self_attn.{leaf}.weight", shape=shape, status=status, norm_squared=norm
            )
            for layer, status, norm in ((0, "unchanged", 0.0), (1, "extracted", 40.0))
            for leaf, shape in (("q_proj", (10, 4)), ("v_proj", (5, 4)))
        )
    )
    recipe = Recipe(operation="extract", tuned_id="sha256:" + "c" * 64)
    adapter = make_adapter({name: LowRank(torch.ones(1, 4), torch.ones(10, 1))}, BASE, recipe, report)

    save_peft(adapter, tmp_path / "out", "portable", {name: f"{ours}.1.self_attn.q_proj"})

    shapes = {key: tuple(tensor.shape) for key, tensor in load_file(tmp_path / "out" / WEIGHTS).items()}
    assert {key: shape for key, shape in shapes.items() if "lora_B" in key} == {
        f"base_model.model.{ours}.{layer}.self_attn.{leaf}.lora_B.weight": (size, 8)
        for layer in (0, 1)
        for leaf, size in (("q_proj", 10), ("v_proj", 5))
    }
    assert load_peft(tmp_path / "out").header == adapter.header


def test_a_portable_mixture_of_experts_has_every_expert_of_every_layer_seen(tmp_path):
    experts = ["model.layers.0.mlp.experts.0.up_proj", "model.layers.3.mlp.experts.10.up_proj"]
    factors = {name: LowRank(torch.ones(1, 4), torch.ones(6, 1)) for name in experts}

    save_peft(make_adapter(factors, BASE, Recipe(operation="extract")), tmp_path / "out", "portable")

    names = {name.removeprefix("base_model.model.") for name in load_file(tmp_path / "out" / WEIGHTS)}
    assert names == {
        f"model.layers.{layer}.mlp.experts.{expert}.up_proj.lora_{half}.weight"
        for layer in (0, 3)
        for expert in (0, 10)
        for half in "AB"
    }


def test_a_scale_that_is_not_one_survives_both_profiles(llama, tmp_path):
    adapter = random_adapter(ranks=RANKS, dtype=torch.float32, scale=0.3)

    save_peft(adapter, tmp_path / "compact", "compact")
    save_peft(adapter, tmp_path / "portable", "portable")

    expected = with_delta(llama, adapter)
    for name in ("compact", "portable"):
        torch.testing.assert_close(with_peft(llama, tmp_path / name), expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(with_delta(llama, load_peft(tmp_path / name)), expected, rtol=1e-4, atol=1e-4)
    assert load_peft(tmp_path / "compact").header == adapter.header
    assert {module.alpha / module.rank for module in load_peft(tmp_path / "portable").header.modules} == {1.0}


@pytest.mark.parametrize(
    "options",
    [
        {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "up_proj"]},
        {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "up_proj"], "use_rslora": True},
        {"r": 2, "lora_alpha": 3, "target_modules": r"model\.layers\.\d+\.mlp\.(up|down)_proj"},
        {
            "r": 2,
            "lora_alpha": 5,
            "target_modules": ["q_proj", "k_proj", "down_proj"],
            "rank_pattern": {"layers.1.self_attn.q_proj": 3, "q_proj": 1, r"^model\.layers\.0\.mlp\.down_proj": 6},
            "alpha_pattern": {"k_proj": 7, r".*\.mlp\.(up|down)_proj": 2},
        },
        {
            "r": 4,
            "lora_alpha": 8,
            "target_modules": ["q_proj"],
            "use_rslora": True,
            "rank_pattern": {"0.self_attn.q_proj": 9},
        },
    ],
    ids=["plain", "rslora", "regex targets", "patterns", "patterns with rslora"],
)
def test_an_adapter_made_by_peft_is_imported_with_the_same_logits(llama, tmp_path, options):
    torch.manual_seed(3)
    theirs = peft.get_peft_model(copy.deepcopy(llama), peft.LoraConfig(task_type="CAUSAL_LM", **options)).eval()
    for name, parameter in theirs.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    theirs.save_pretrained(tmp_path / "theirs")
    with torch.no_grad():
        expected = theirs(TOKENS).logits

    imported = load_peft(tmp_path / "theirs")

    torch.testing.assert_close(with_delta(llama, imported), expected, rtol=1e-5, atol=1e-4)
    assert imported.header.recipe.operation == "import"
    assert imported.header.base.base_id is None
    assert imported.report.kept_share == 1.0
    save_peft(imported, tmp_path / "ours", "compact")
    torch.testing.assert_close(with_peft(llama, tmp_path / "ours"), expected, rtol=1e-5, atol=1e-4)
    assert load_peft(tmp_path / "ours").header == imported.header


@pytest.mark.parametrize(
    ("recorded", "name"),
    [
        ("org/model", "org/model"),
        ("/home/ann/secret/SmolLM2-135M", "SmolLM2-135M"),
        ("C:\\Users\\ann\\llama", "llama"),
        ("https://host.example/org/model/", "model"),
        ("../../x", "x"),
        (None, "unknown"),
    ],
)
def test_an_import_records_no_path_as_its_base(tmp_path, recorded, name):
    foreign = as_foreign(tmp_path / "theirs")
    edit_config(foreign, base_model_name_or_path=recorded)

    assert load_peft(foreign).header.base.name == name


def test_the_folder_says_nothing_of_this_machine(tmp_path):
    save_peft(random_adapter(), tmp_path / "out", "portable")

    for file in (tmp_path / "out").iterdir():
        assert str(tmp_path).encode() not in file.read_bytes()


def test_a_folder_with_a_strangers_file_is_not_overwritten(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("years of work")

    with pytest.raises(UsageError, match=r"thesis\.tex"):
        save_peft(random_adapter(), tmp_path / "out")
    assert (tmp_path / "out" / "thesis.tex").read_text() == "years of work"


def test_our_own_folder_is_replaced_whole(tmp_path):
    save_peft(random_adapter(extras={CHAT_TEMPLATE: b"x"}), tmp_path / "out")
    second = random_adapter(seed=1)

    files = save_peft(second, tmp_path / "out")

    assert load_peft(tmp_path / "out").header == second.header
    assert [file.name for file in files] == [CONFIG, WEIGHTS, RECORD]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_what_is_no_adapter_says_what_it_is(tmp_path):
    with pytest.raises(NotFound):
        load_peft(tmp_path / "nowhere")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model.safetensors").write_bytes(b"")
    with pytest.raises(AdapterInvalid, match="flora extract"):
        load_peft(tmp_path / "model")
    with pytest.raises(FloraError, match=CONFIG):
        load_peft(tmp_path)
