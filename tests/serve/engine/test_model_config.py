"""What a config.json says, in the spellings of old and new files; and what is refused."""

from typing import Any

import pytest

from flora.errors import CheckpointError, UsageError
from flora.serve.engine.model.config import RopeConfig, parse_model_config, resolve_max_context

SMALL: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "num_hidden_layers": 2,
    "hidden_size": 64,
    "intermediate_size": 100,
    "num_attention_heads": 4,
    "vocab_size": 99,
    "max_position_embeddings": 256,
}


def parse(**changes: Any):
    return parse_model_config(SMALL | changes)


def test_key_heads_and_head_size_follow_from_the_rest_where_they_are_not_given():
    config = parse()

    assert (config.num_kv_heads, config.head_dim) == (4, 16)
    assert parse(architectures=["Qwen3ForCausalLM"]).head_dim == 128


@pytest.mark.parametrize(
    ("spelling", "expected"),
    [
        ({}, RopeConfig(10000.0)),
        ({"rope_theta": 5e5}, RopeConfig(5e5)),
        ({"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}}, RopeConfig(5e5)),
        ({"rope_theta": 5e5, "rope_scaling": None}, RopeConfig(5e5)),
        ({"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2.0}}, RopeConfig(5e5, "linear", 2.0)),
        (
            {
                "rope_theta": 5e5,
                "rope_scaling": {
                    "rope_type": "llama3",
                    "factor": 8.0,
                    "low_freq_factor": 1.0,
                    "high_freq_factor": 4.0,
                    "original_max_position_embeddings": 8192,
                },
            },
            RopeConfig(5e5, "llama3", 8.0, 1.0, 4.0, 8192),
        ),
    ],
)
def test_rope_is_read_from_either_place(spelling, expected):
    assert parse(**spelling).rope == expected


@pytest.mark.parametrize("kind", ["dynamic", "yarn", "longrope"])
def test_a_rope_that_is_not_computed_is_refused(kind):
    with pytest.raises(CheckpointError, match=kind):
        parse(rope_scaling={"rope_type": kind, "factor": 2.0})


@pytest.mark.parametrize(
    ("changes", "biases"),
    [
        ({}, (False, False, False)),
        ({"attention_bias": True, "mlp_bias": True}, (True, True, True)),
        ({"architectures": ["Qwen2ForCausalLM"]}, (True, False, False)),
        ({"architectures": ["MistralForCausalLM"]}, (False, False, False)),
        ({"architectures": ["Qwen3ForCausalLM"], "attention_bias": True}, (True, True, False)),
    ],
)
def test_each_family_has_its_biases(changes, biases):
    config = parse(**changes)

    assert (config.qkv_bias, config.o_bias, config.mlp_bias) == biases


@pytest.mark.parametrize(
    "changes",
    [
        {"architectures": ["GPT2LMHeadModel"]},
        {"architectures": [], "model_type": "mamba"},
        {"architectures": ["LlamaForSequenceClassification"]},
        {"quantization_config": {"quant_method": "gptq"}},
        {"hidden_act": "gelu"},
        {"partial_rotary_factor": 0.5},
        {"num_key_value_heads": 3},
        {"head_dim": 15},
        {"vocab_size": None},
    ],
)
def test_what_this_server_cannot_run_is_refused(changes):
    with pytest.raises(CheckpointError):
        parse(**changes)


def test_a_missing_dimension_is_named():
    incomplete = {key: value for key, value in SMALL.items() if key != "intermediate_size"}

    with pytest.raises(CheckpointError) as caught:
        parse_model_config(incomplete)
    assert "intermediate_size" in caught.value.cause


def test_the_context_is_the_least_of_model_pool_and_window():
    config = parse()

    assert resolve_max_context(config, SMALL, None, pool_tokens=1000) == 256
    assert resolve_max_context(config, SMALL, None, pool_tokens=100) == 100
    assert resolve_max_context(config, SMALL | {"sliding_window": 64, "model_type": "mistral"}, None, 1000) == 256
    mistral = SMALL | {"architectures": ["MistralForCausalLM"], "sliding_window": 64}
    assert resolve_max_context(config, mistral, None, 1000) == 64


@pytest.mark.parametrize(("asked", "pool_tokens", "window"), [(300, 1000, None), (200, 100, None), (100, 1000, 64)])
def test_a_context_that_does_not_fit_is_refused_where_it_was_asked_for(asked, pool_tokens, window):
    mistral = SMALL | {"architectures": ["MistralForCausalLM"], "sliding_window": window}

    with pytest.raises(UsageError) as caught:
        resolve_max_context(parse(), mistral, asked, pool_tokens)
    assert caught.value.fix == f"ask for {min(256, pool_tokens, window or 256)}"


def test_a_window_that_is_switched_off_limits_nothing():
    qwen = SMALL | {"architectures": ["Qwen2ForCausalLM"], "sliding_window": 64, "use_sliding_window": False}

    assert resolve_max_context(parse(), qwen, 200, 1000) == 200
    full = SMALL | {
        "architectures": ["MistralForCausalLM"],
        "sliding_window": 64,
        "layer_types": ["full_attention"] * 2,
    }
    assert resolve_max_context(parse(), full, 200, 1000) == 200
