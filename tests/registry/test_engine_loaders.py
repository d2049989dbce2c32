"""What `flora compat` promises of engines, held against the rules of their loaders."""

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

from flora.adapter import Adapter, BaseBinding, ChangeReport, Recipe, TensorChange, make_adapter
from flora.lowrank import LowRank
from flora.registry.formats.compat import Verdict, judge, vllm_rank
from flora.registry.formats.peft import Profile, load_peft, save_peft
from tests.registry.engine_loaders import Folder, Model, read_folder, sglang_refusals, vllm_refusals
from tests.registry.other_loaders import lorax_refusals, ollama_refusals, tensorrt_refusals

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
    model: Model,
    *leaves: str,
    ranks: dict[str, int] | None = None,
    rank: int = 8,
    is_known: bool = False,
    **exact: float,
) -> Adapter:
    """Factors for the modules whose paths end in one of `leaves`, or for all; `ranks` by path, 0 for none.

    is_known  as `flora extract` makes them: with a report of every matrix of the base
    """
    wanted = {path: shape for path, shape in model.linear.items() if not leaves or path.endswith(leaves)}
    factors = {
        path: LowRank(
            A=torch.ones((ranks or {}).get(path, rank), shape[1]), B=torch.ones(shape[0], (ranks or {}).get(path, rank))
        )
        for path, shape in wanted.items()
    }
    base = BaseBinding(name="org/base", base_id=None, architecture="LlamaForCausalLM")
    whole = {name: torch.full((32,), value) for name, value in exact.items()}
    if not is_known:
        return make_adapter(factors, base, Recipe(operation="extract"), exact=whole)
    lines = (
        TensorChange(
            name=f"{path}.weight", shape=shape, status="extracted" if path in factors else "unchanged", norm_squared=0.0
        )
        for path, shape in model.linear.items()
    )
    recipe = Recipe(operation="extract", tuned_id="sha256:" + "c" * 64)
    return make_adapter(factors, base, recipe, ChangeReport(tensors=tuple(lines)), exact=whole)


def folder_of(adapter: Adapter, path: Path, profile: Profile) -> Folder:
    save_peft(adapter, path / profile, profile)
    return read_folder(path / profile)


def verdict(adapter: Adapter, engine: str, version: str) -> Verdict:
    return next(
        each for each in judge(adapter.header, adapter.report) if (each.engine, each.version) == (engine, version)
    )


def refusals(adapter: Adapter, model: Model, path: Path, engine: str) -> dict[str, list[str]]:
    """What the engine says of the adapter in each profile."""
    rank = vllm_rank(adapter.header.max_rank)
    check: Callable[[Folder], list[str]] = {
        "vLLM": lambda folder: vllm_refusals(folder, model, rank),
        "SGLang": lambda folder: sglang_refusals(folder, model, rank),
        "LoRAX": lambda folder: lorax_refusals(folder, model),
        "TensorRT-LLM / NIM": tensorrt_refusals,
        "Ollama": lambda folder: ollama_refusals(folder, "llama"),
    }[engine]
    return {profile: check(folder_of(adapter, path, profile)) for profile in ("compact", "portable")}


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
        assert folder.config["r"] == folder.config["lora_alpha"] == 3
    else:
        assert sglang_refusals(folder, model, 8) == []
        assert lorax_refusals(folder, model) == tensorrt_refusals(folder) == ollama_refusals(folder, "llama") == []
        assert folder.config["r"] == folder.config["lora_alpha"] == 8


VERSIONS = {"vLLM": "0.33", "SGLang": "0.5", "LoRAX": "2026-05", "TensorRT-LLM / NIM": "2.0", "Ollama": "2026-11"}
ENGINES = tuple(VERSIONS)
ALL_YES = ("yes",) * 5
UNUSUAL = {path: 1 + index % 3 for index, path in enumerate(LLAMA.linear)}
FIRST_LAYER_UNCHANGED = {path: 0 for path in LLAMA.linear if path.startswith("model.layers.0.")}
CASES: dict[str, tuple[Adapter, tuple[str, ...]]] = {  # answers in the order of ENGINES
    "one rank": (adapter_of(LLAMA), ALL_YES),
    "ranks": (adapter_of(LLAMA, ranks=UNUSUAL), ("yes", "portable", "portable", "portable", "portable")),
    "a rank that is no engine's": (adapter_of(LLAMA, rank=20), ("yes", "yes", "portable", "yes", "yes")),
    "no k": (adapter_of(LLAMA, Q, V), ALL_YES),
    "no up": (adapter_of(LLAMA, GATE, DOWN), ALL_YES),
    "no v": (adapter_of(LLAMA, Q, K, OUT), ("yes", "portable", "yes", "yes", "yes")),
    "no gate": (adapter_of(LLAMA, UP, DOWN), ("yes", "portable", "yes", "yes", "yes")),
    "no v and no k, of a base that nobody has seen": (adapter_of(LLAMA, Q), ("yes", "no", "yes", "yes", "yes")),
    "no q, of a base that nobody has seen": (adapter_of(LLAMA, V), ("yes", "no", "yes", "yes", "yes")),
    "no v and no k": (adapter_of(LLAMA, Q, is_known=True), ("yes", "portable", "yes", "yes", "yes")),
    "no q": (adapter_of(LLAMA, V, is_known=True), ("yes", "portable", "yes", "yes", "yes")),
    "no v in one layer": (
        adapter_of(LLAMA, Q, V, ranks={f"model.layers.1.{V}": 0}),
        ("yes", "portable", "portable", "yes", "yes"),
    ),
    "o in one layer alone": (
        adapter_of(LLAMA, OUT, DOWN, ranks={f"model.layers.{layer}.{OUT}": 0 for layer in (0, 2)}),
        ("yes", "yes", "portable", "yes", "yes"),
    ),
    "nothing of one layer": (
        adapter_of(LLAMA, ranks=FIRST_LAYER_UNCHANGED, is_known=True),
        ("yes", "yes", "portable", "yes", "yes"),
    ),
    "a norm, whole": (adapter_of(LLAMA, **{"model.norm.weight": 1.0}), ("no", "no", "no", "no", "")),
    "a norm of a layer, whole": (
        adapter_of(LLAMA, **{"model.layers.0.input_layernorm.weight": 1.0}),
        ("no", "no", "no", "no", ""),
    ),
}  # an empty answer: the rules that are written here do not tell


@pytest.mark.parametrize(
    ("case", "engine"),
    [(case, engine) for case in CASES for engine in ENGINES if CASES[case][1][ENGINES.index(engine)]],
)
def test_the_verdict_is_what_the_loader_does(tmp_path, case, engine):
    """yes: as it is stored; portable: in that profile alone; no: in neither."""
    adapter, answers = CASES[case]

    found = refusals(adapter, LLAMA, tmp_path, engine)

    answer = verdict(adapter, engine, VERSIONS[engine]).answer
    assert answer == answers[ENGINES.index(engine)]
    assert (not found["compact"], not found["portable"]) == {
        "yes": (True, True), "portable": (False, True), "no": (False, False)
    }[answer], found  # fmt: skip


@pytest.mark.parametrize("case", [case for case in CASES if "norm" not in case])
def test_a_portable_folder_comes_back_with_its_digest_whatever_was_added_to_it(tmp_path, case):
    adapter, _ = CASES[case]

    save_peft(adapter, tmp_path / "out", "portable")

    loaded = load_peft(tmp_path / "out")
    assert loaded.header.serving_digest == adapter.header.serving_digest
    assert loaded.factors.keys() == adapter.factors.keys()


@pytest.mark.parametrize("leaves", [(Q,), (Q, K), (V,), (K, UP), (UP, OUT)], ids=" ".join)
def test_partners_are_added_as_zeros_and_peft_computes_the_same_bits(tmp_path, leaves):
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SIZES)).eval()
    adapter = adapter_of(LLAMA, *leaves, ranks={f"model.layers.1.{leaves[0]}": 0}, is_known=True)
    tokens = torch.arange(12)[None]

    logits, names = {}, {}
    for profile in ("compact", "portable"):
        names[profile] = set(folder_of(adapter, tmp_path, profile).shapes)
        wrapped = PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / profile)
        with torch.no_grad():
            logits[profile] = wrapped(tokens).logits

    assert sglang_refusals(read_folder(tmp_path / "portable"), LLAMA, 8) == []
    assert names["compact"] < names["portable"]
    assert torch.equal(logits["compact"], logits["portable"])
    assert not torch.equal(logits["portable"], model(tokens).logits)


def test_a_base_that_has_no_such_matrix_is_not_given_one(tmp_path):
    """Nemotron's MLP has no gate: then SGLang does not join either, but which model it is the adapter does not say."""
    plain = Model({path: shape for path, shape in LLAMA.linear.items() if not path.endswith(GATE)}, LLAMA.vocab_size)
    adapter = adapter_of(plain, UP, DOWN, is_known=True)

    assert not any("gate_proj" in name for name in folder_of(adapter, tmp_path, "portable").shapes)
    assert verdict(adapter, "SGLang", "0.5").answer == "no"


def test_modules_that_tensorrt_has_no_name_for_are_refused_and_its_head_is_passed_over(tmp_path):
    path = "model.layers.0.mixer.in_proj"
    strange = adapter_of(Model({path: (8, 8)}, 64))
    head = adapter_of(Model(dict(LLAMA.linear) | {"lm_head": (64, 32)}, 64), OUT, "lm_head")

    assert set(tensorrt_refusals(folder_of(strange, tmp_path, "portable"))) == {"in_proj is not in its list"}
    assert "in_proj" in verdict(strange, "TensorRT-LLM / NIM", "2.0").reason
    assert len(tensorrt_refusals(folder_of(head, tmp_path, "portable"))) == 2  # both factors
    assert verdict(head, "TensorRT-LLM / NIM", "2.0").answer == "no"


def test_ollama_converts_folders_for_two_architectures_and_wants_an_integer_alpha(tmp_path):
    folder = folder_of(adapter_of(LLAMA), tmp_path, "portable")
    half = Folder(folder.config | {"lora_alpha": 8.5}, folder.shapes, folder.files)

    assert ollama_refusals(folder, "gemma2") == []
    assert ollama_refusals(folder, "qwen2") == ["unsupported architecture qwen2"]
    assert ollama_refusals(half, "llama")[0] == "lora_alpha 8.5 is no unsigned integer"
    answers = {}
    for architecture in ("LlamaForCausalLM", "MistralForCausalLM", "Gemma2ForCausalLM", "Qwen2ForCausalLM"):
        base = BaseBinding(name="org/base", base_id=None, architecture=architecture)
        adapter = make_adapter(adapter_of(LLAMA).factors, base, Recipe(operation="extract"))
        answers[architecture] = verdict(adapter, "Ollama", "2026-11").answer
    assert list(answers.values()) == ["yes", "yes", "yes", "no"]  # a Mistral is a llama in GGUF


def test_a_rank_above_what_the_server_was_started_with_is_refused_and_compat_says_what_to_start_it_with(tmp_path):
    adapter = adapter_of(LLAMA, rank=20)
    folder = folder_of(adapter, tmp_path, "portable")

    assert vllm_refusals(folder, LLAMA, 16) == ["rank 32 above 16"]
    assert sglang_refusals(folder, LLAMA, 16) == ["rank 32 above 16"]
    assert "--max-lora-rank 32" in verdict(adapter, "vLLM", "0.33").remedy
    assert "--max-lora-rank 32" in verdict(adapter, "SGLang", "0.5").remedy
    assert vllm_refusals(folder, LLAMA, 32) == sglang_refusals(folder, LLAMA, 32) == []


def test_a_rank_above_all_that_vllm_can_be_started_with_is_told(tmp_path):
    adapter = adapter_of(LLAMA, Q, V, rank=600)

    assert vllm_refusals(folder_of(adapter, tmp_path, "portable"), LLAMA, 512) == ["rank 608 above 512"]
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
