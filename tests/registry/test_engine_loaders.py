"""What `flora compat` promises of vLLM and SGLang, held against the rules of their loaders."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

from flora.adapter import Adapter, BaseBinding, Recipe, make_adapter
from flora.lowrank import LowRank
from flora.registry.formats.compat import Verdict, judge, vllm_rank
from flora.registry.formats.peft import Profile, save_peft
from tests.registry.engine_loaders import Folder, Model, read_folder, sglang_refusals, vllm_refusals

SIZES = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
         "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}  # fmt: skip
Q, K, V, OUT = (f"self_attn.{letter}_proj" for letter in "qkvo")
UP, GATE, DOWN = (f"mlp.{kind}_proj" for kind in ("up", "gate", "down"))


def dense(config: type, kind: type) -> Model:
    with torch.device("meta"):
        tree = kind(config(**SIZES)).named_modules()
    linear = {path: tuple(module.weight.shape) for path, module in tree if isinstance(module, torch.nn.Linear)}
    return Model({path: shape for path, shape in linear.items() if path != "lm_head"}, SIZES["vocab_size"])


def mixtral() -> Model:
    """By the names of its checkpoint, which adapters have too: the module tree of transformers stacks experts."""
    attention = {
        path: shape for path, shape in dense(LlamaConfig, LlamaForCausalLM).linear.items() if "self_attn" in path
    }
    experts = {
        f"model.layers.{layer}.block_sparse_moe.experts.{expert}.{leaf}": (32, 48) if leaf == "w2" else (48, 32)
        for layer in range(3)
        for expert in range(2)
        for leaf in ("w1", "w2", "w3")
    }
    return Model(attention | experts, SIZES["vocab_size"])


MODELS: dict[str, Callable[[], Model]] = {
    "llama": lambda: dense(LlamaConfig, LlamaForCausalLM),
    "qwen2": lambda: dense(Qwen2Config, Qwen2ForCausalLM),
    "qwen3": lambda: dense(Qwen3Config, Qwen3ForCausalLM),
    "mixtral": mixtral,
}
LLAMA = MODELS["llama"]()


def adapter_of(
    model: Model, *leaves: str, ranks: dict[str, int] | None = None, rank: int = 4, **exact: float
) -> Adapter:
    """Factors for the modules whose paths end in one of `leaves`, or for all; `ranks` by path, 0 for none."""
    wanted = {path: shape for path, shape in model.linear.items() if not leaves or path.endswith(leaves)}
    factors = {
        path: LowRank(
            A=torch.ones((ranks or {}).get(path, rank), shape[1]), B=torch.ones(shape[0], (ranks or {}).get(path, rank))
        )
        for path, shape in wanted.items()
    }
    base = BaseBinding(name="org/base", base_id=None, architecture="LlamaForCausalLM")
    whole = {name: torch.full((32,), value) for name, value in exact.items()}
    return make_adapter(factors, base, Recipe(operation="extract"), exact=whole)


def folder_of(adapter: Adapter, path: Path, profile: Profile) -> Folder:
    save_peft(adapter, path / profile, profile)
    return read_folder(path / profile)


def verdict(adapter: Adapter, engine: str, version: str) -> Verdict:
    return next(each for each in judge(adapter.header) if (each.engine, each.version) == (engine, version))


def refusals(adapter: Adapter, model: Model, path: Path, engine: str) -> dict[str, list[str]]:
    """What the engine says of the adapter in each profile."""
    check = {"vLLM": vllm_refusals, "SGLang": sglang_refusals}[engine]
    rank = vllm_rank(adapter.header.max_rank)
    return {profile: check(folder_of(adapter, path, profile), model, rank) for profile in ("compact", "portable")}


@pytest.mark.parametrize("family", MODELS)
def test_the_portable_profile_of_an_adapter_with_ranks_and_layers_of_its_own_loads(tmp_path, family):
    model = MODELS[family]()
    ranks = {path: index % 4 for index, path in enumerate(sorted(model.linear))}  # every fourth module has none
    adapter = adapter_of(model, ranks=ranks)

    folder = folder_of(adapter, tmp_path, "portable")

    assert vllm_refusals(folder, model, 8) == []
    if family == "mixtral":
        assert "target_modules ['w1', 'w2', 'w3']" in sglang_refusals(folder, model, 8)
        assert verdict(adapter, "SGLang", "0.5").answer == "no"
        assert "w1" in verdict(adapter, "SGLang", "0.5").reason
    else:
        assert sglang_refusals(folder, model, 8) == []
    assert folder.config["r"] == folder.config["lora_alpha"] == 3


CASES: dict[str, tuple[Adapter, str, str]] = {
    "one rank": (adapter_of(LLAMA), "yes", "yes"),
    "ranks": (
        adapter_of(LLAMA, ranks={path: 1 + index % 3 for index, path in enumerate(LLAMA.linear)}),
        "yes",
        "portable",
    ),
    "no k": (adapter_of(LLAMA, Q, V), "yes", "yes"),
    "no up": (adapter_of(LLAMA, GATE, DOWN), "yes", "yes"),
    "no v": (adapter_of(LLAMA, Q, K, OUT), "yes", "no"),
    "no q": (adapter_of(LLAMA, V), "yes", "no"),
    "no gate": (adapter_of(LLAMA, UP, DOWN), "yes", "no"),
    "no v in one layer": (adapter_of(LLAMA, Q, V, ranks={f"model.layers.1.{V}": 0}), "yes", "portable"),
    "a norm, whole": (adapter_of(LLAMA, **{"model.norm.weight": 1.0}), "no", "no"),
    "a norm of a layer, whole": (adapter_of(LLAMA, **{"model.layers.0.input_layernorm.weight": 1.0}), "no", "no"),
}


@pytest.mark.parametrize("engine", ["vLLM", "SGLang"])
@pytest.mark.parametrize("case", CASES)
def test_the_verdict_is_what_the_loader_does(tmp_path, case, engine):
    """yes: as it is stored; portable: in that profile alone; no: in neither."""
    adapter, *expected = CASES[case]

    found = refusals(adapter, LLAMA, tmp_path, engine)

    answer = verdict(adapter, engine, {"vLLM": "0.33", "SGLang": "0.5"}[engine]).answer
    assert answer == expected[engine == "SGLang"]
    assert (not found["compact"], not found["portable"]) == {
        "yes": (True, True), "portable": (False, True), "no": (False, False)
    }[answer], found  # fmt: skip


def test_a_rank_above_what_the_server_was_started_with_is_refused_and_compat_says_what_to_start_it_with(tmp_path):
    adapter = adapter_of(LLAMA, rank=20)
    folder = folder_of(adapter, tmp_path, "portable")

    assert vllm_refusals(folder, LLAMA, 16) == ["rank 20 above 16"]
    assert sglang_refusals(folder, LLAMA, 16) == ["rank 20 above 16"]
    assert "--max-lora-rank 32" in verdict(adapter, "vLLM", "0.33").remedy
    assert "--max-lora-rank 20" in verdict(adapter, "SGLang", "0.5").remedy
    assert vllm_refusals(folder, LLAMA, 32) == sglang_refusals(folder, LLAMA, 20) == []


def test_a_rank_above_all_that_vllm_can_be_started_with_is_told(tmp_path):
    adapter = adapter_of(LLAMA, Q, V, rank=600)

    assert vllm_refusals(folder_of(adapter, tmp_path, "portable"), LLAMA, 512) == ["rank 600 above 512"]
    assert verdict(adapter, "vLLM", "0.33").answer == "no"
    assert "flora prune" in verdict(adapter, "vLLM", "0.33").remedy


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"use_dora": True}, ["use_dora"]),
        ({"modules_to_save": ["lm_head"]}, ["modules_to_save ['lm_head']"]),
        ({"bias": "all"}, ["bias"]),
        ({"init_lora_weights": "pissa"}, ["init_lora_weights pissa"]),
        ({"init_lora_weights": "gaussian"}, []),
        ({"rank_pattern": {"q_proj": 16}}, ["rank 16 above 8"]),
    ],
)
def test_the_rules_refuse_what_vllm_refuses(tmp_path, change, said):
    """The fixture itself, on config fields that Flora never writes."""
    folder = folder_of(adapter_of(LLAMA, OUT), tmp_path, "portable")
    changed = Folder(folder.config | change, folder.shapes, folder.files)

    assert [each for each in vllm_refusals(changed, LLAMA, 8) if "lora_" not in each or "init" in each] == said
