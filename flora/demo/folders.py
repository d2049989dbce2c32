"""Ordinary Hugging Face checkpoint folders: bf16 safetensors, config, tokenizer, generation config."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from flora.demo.alphabet import END, START, VOCABULARY, tokenizer_files
from flora.demo.model import LlamaShape, TinyLlama

_CHAT_TEMPLATE = "{{ bos_token }}{{ messages[-1].content }}"  # it was trained on prompts: what was said last is one


def save_model(model: TinyLlama, folder: Path) -> None:
    """Writes the folder; weights are rounded to bf16, and with them the tied head is stored once."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: tensor.to(torch.bfloat16).contiguous() for name, tensor in model.state_dict().items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    files = {
        "config.json": json.dumps(_config(model.shape), indent=1),
        "generation_config.json": json.dumps({"bos_token_id": START, "eos_token_id": END}, indent=1),
        **tokenizer_files(),
        "chat_template.jinja": _CHAT_TEMPLATE,
    }
    for name, text in files.items():
        (folder / name).write_text(text + "\n", encoding="utf-8")


def load_model(folder: Path, shape: LlamaShape) -> TinyLlama:
    """The model as its folder holds it: bf16 weights, computed with in float32."""
    model = TinyLlama(shape)
    model.load_state_dict({name: tensor.float() for name, tensor in load_file(folder / "model.safetensors").items()})
    return model


def _config(shape: LlamaShape) -> dict[str, Any]:
    assert len(VOCABULARY) <= shape.vocab_size
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": shape.vocab_size,
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.intermediate_size,
        "num_hidden_layers": shape.num_layers,
        "num_attention_heads": shape.num_heads,
        "num_key_value_heads": shape.num_kv_heads,
        "head_dim": shape.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": shape.max_positions,
        "rms_norm_eps": shape.norm_eps,
        "rope_theta": shape.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": shape.rope_theta},
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": True,
        "bos_token_id": START,
        "eos_token_id": END,
        "dtype": "bfloat16",
        "torch_dtype": "bfloat16",
    }
