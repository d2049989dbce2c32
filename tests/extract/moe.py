"""Tiny mixtures of experts of many families, made by transformers, offline."""

from collections.abc import Callable, Mapping

import transformers as hf
from torch import nn

SIZES = {
    "vocab_size": 80,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
HEADED = SIZES | {"head_dim": 8}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 16}
ENDS = {"pad_token_id": None, "bos_token_id": None, "eos_token_id": None}


def mixtral() -> nn.Module:
    return hf.MixtralForCausalLM(hf.MixtralConfig(**HEADED, num_local_experts=4))


def qwen3() -> nn.Module:
    return hf.Qwen3MoeForCausalLM(hf.Qwen3MoeConfig(**HEADED, **EXPERTS, num_experts=4))


def qwen2() -> nn.Module:
    """One expert is shared, and its layers are named like the others'."""
    config = hf.Qwen2MoeConfig(**SIZES, **EXPERTS, num_experts=4, shared_expert_intermediate_size=24)
    return hf.Qwen2MoeForCausalLM(config)


def phimoe() -> nn.Module:
    """PEFT fuses its experts' factors, and does not translate its configuration."""
    return hf.PhimoeForCausalLM(hf.PhimoeConfig(**SIZES, num_local_experts=4))


def olmoe() -> nn.Module:
    return hf.OlmoeForCausalLM(hf.OlmoeConfig(**SIZES | ENDS, num_experts=4, num_experts_per_tok=2))


def deepseek() -> nn.Module:
    """The first layer is dense, and has layers of the experts' names."""
    ranks = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
    groups = {"n_group": 1, "topk_group": 1, "n_shared_experts": 1, "n_routed_experts": 4, "first_k_dense_replace": 1}
    sizes = SIZES | {"num_key_value_heads": 4}
    return hf.DeepseekV3ForCausalLM(hf.DeepseekV3Config(**sizes, **EXPERTS, **ranks, **groups))


def gpt_oss() -> nn.Module:
    sizes = HEADED | {"intermediate_size": 64}
    return hf.GptOssForCausalLM(hf.GptOssConfig(**sizes, num_local_experts=4, num_experts_per_tok=2))


def llama4() -> nn.Module:
    """Every second layer is dense."""
    sizes = {"num_local_experts": 4, "intermediate_size_mlp": 40, "interleave_moe_layer_step": 2}
    return hf.Llama4ForCausalLM(hf.Llama4TextConfig(**HEADED, **sizes))


def granite() -> nn.Module:
    return hf.GraniteMoeForCausalLM(hf.GraniteMoeConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2))


def jetmoe() -> nn.Module:
    """Its experts are fused in layers of their own, in its attention too."""
    return hf.JetMoeForCausalLM(hf.JetMoeConfig(**SIZES, num_local_experts=4, kv_channels=8))


def dbrx() -> nn.Module:
    """The rows of its experts lie one below the other in two dimensions, of which one is transposed."""
    experts = {"ffn_hidden_size": 16, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 32}
    sizes = {"d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 32, "vocab_size": 80}
    attention = {"kv_n_heads": 2, "rope_theta": 10000.0}
    return hf.DbrxForCausalLM(hf.DbrxConfig(**sizes, attn_config=attention, ffn_config=experts))


def gemma4() -> nn.Module:
    """Beside its experts each layer has a dense part."""
    sizes = HEADED | ENDS | {"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 16, "global_head_dim": 8}
    layers = {"layer_types": ["full_attention"] * 2, "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 80}
    return hf.Gemma4ForCausalLM(hf.Gemma4TextConfig(**sizes, **layers, enable_moe_block=True))


def jamba() -> nn.Module:
    """One layer is a state space, the other attention with experts."""
    layers = {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1}
    sizes = SIZES | ENDS | {"num_experts": 4, "mamba_d_state": 4, "use_mamba_kernels": False}
    return hf.JambaForCausalLM(hf.JambaConfig(**sizes, **layers))


def nemotron() -> nn.Module:
    """Its experts have no gate; one layer is a state space."""
    experts = {"n_routed_experts": 4, "moe_shared_expert_intermediate_size": 16, "n_group": 1, "topk_group": 1}
    states = {"mamba_num_heads": 8, "mamba_head_dim": 8, "ssm_state_size": 4, "n_groups": 1}
    layers = {"layers_block_type": ["moe", "mamba", "attention"]}
    sizes = {name: size for name, size in HEADED.items() if name != "num_hidden_layers"}
    return hf.NemotronHForCausalLM(hf.NemotronHConfig(**sizes | ENDS, **EXPERTS, **experts, **states, **layers))


def privacy_filter() -> nn.Module:
    """gpt-oss's sibling, which says of each token what it is."""
    sizes = HEADED | ENDS | {"num_local_experts": 4, "num_experts_per_tok": 2, "num_labels": 5}
    return hf.OpenAIPrivacyFilterForTokenClassification(hf.OpenAIPrivacyFilterConfig(**sizes))


def granite_shared() -> nn.Module:
    """One expert is shared: a plain layer that is called like the fused ones."""
    sizes = {"num_local_experts": 4, "num_experts_per_tok": 2, "shared_intermediate_size": 24}
    return hf.GraniteMoeSharedForCausalLM(hf.GraniteMoeSharedConfig(**SIZES, **sizes))


def aria() -> nn.Module:
    sizes = {"moe_num_experts": 4, "moe_topk": 2, "moe_num_shared_experts": 1}
    return hf.AriaTextForCausalLM(hf.AriaTextConfig(**SIZES, **sizes))


EYES = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 32, "patch_size": 4}
SIGHT = {"image_token_id": 78, "video_token_id": 79, "vision_start_token_id": 76, "vision_end_token_id": 77}


def qwen3_vl() -> nn.Module:
    """It sees, too; here it only reads."""
    rope = {"mrope_section": [1, 1, 2], "rope_type": "default", "mrope_interleaved": True}
    text = {**HEADED, **EXPERTS, "num_experts": 4, "rope_scaling": rope}
    eyes = EYES | {"deepstack_visual_indexes": [0], "num_position_embeddings": 16}
    config = hf.Qwen3VLMoeConfig(text_config=text, vision_config=eyes, **SIGHT)
    return hf.Qwen3VLMoeForConditionalGeneration(config)


def qwen3_5() -> nn.Module:
    """Likewise; one of its layers has linear attention, and one expert is shared."""
    linear = {f"linear_{name}": 2 for name in ("num_key_heads", "num_value_heads")}
    linear |= {f"linear_{name}": 8 for name in ("key_head_dim", "value_head_dim")}
    layers = {"layer_types": ["linear_attention", "full_attention"], "shared_expert_intermediate_size": 24}
    text = {**HEADED, **EXPERTS, **linear, **layers, "num_experts": 4}
    config = hf.Qwen3_5MoeConfig(text_config=text, vision_config=EYES | {"num_position_embeddings": 16}, **SIGHT)
    return hf.Qwen3_5MoeForConditionalGeneration(config)


SEPARATE: Mapping[str, Callable[[], nn.Module]] = {  # each expert's matrices in tensors of their own
    "mixtral": mixtral,
    "qwen3": qwen3,
    "qwen2": qwen2,
    "olmoe": olmoe,
    "deepseek": deepseek,
    "phimoe": phimoe,
    "qwen3.5": qwen3_5,
    "jamba": jamba,
    "nemotron": nemotron,
}
FUSED: Mapping[str, Callable[[], nn.Module]] = {  # the experts of a layer in one tensor
    "gpt-oss": gpt_oss,
    "llama4": llama4,
    "granite": granite,
    "granite-shared": granite_shared,
    "aria": aria,
    "qwen3-vl": qwen3_vl,
    "jetmoe": jetmoe,
    "privacy-filter": privacy_filter,
    "gemma4": gemma4,
}
