"""A GGUF file as a checkpoint: llama.cpp's tensors under Hugging Face's names, dequantized as they are read.

What llama.cpp changed is changed back: names, the order of dimensions, and in Llama's attention the order of the rows
of q and k, which its rotary embedding pairs otherwise. Only architectures whose weights it changes in no other way are
read. The base id is that of the file's own bytes, so an adapter of it belongs to this quantization and no other.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from flora.checkpoint import Checkpoint, TensorInfo
from flora.errors import CheckpointError, NotFound, UsageError

if TYPE_CHECKING:
    from torch import Tensor

ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_TENSOR = re.compile(r"(?:blk\.(?P<layer>\d+)\.)?(?P<kind>\w+)\.(?P<leaf>weight|bias)", re.ASCII)
_DERIVED = ("rope_freqs.weight",)  # what llama.cpp computed from the config


@dataclass(frozen=True, eq=False)
class GgufCheckpoint(Checkpoint):
    """`tensors` tell the stored types, as GGUF_Q4_0; `load` gives float32."""

    entries: Mapping[str, Any] = field(kw_only=True)  # gguf's own, by Hugging Face's name
    heads: Mapping[str, int] = field(kw_only=True)  # of the modules whose rows were reordered, by the last of its path

    def load(self, name: str) -> "Tensor":
        from gguf.quants import dequantize

        entry = self.entries[name]
        weight = torch.from_numpy(dequantize(entry.data, entry.tensor_type).copy()).reshape(self.tensors[name].shape)
        num_heads = self.heads.get(name.split(".")[-2])
        return weight if num_heads is None else _restore_rows(weight, num_heads)

    def readable(self) -> "GgufCheckpoint":
        """The same with the types that `load` gives."""
        return replace(self, tensors={name: replace(info, dtype="F32") for name, info in self.tensors.items()})


def open_gguf(path: Path) -> GgufCheckpoint:
    """Opens the file by its header.

    Raises NotFound, UsageError (the gguf package is not installed), CheckpointError (damaged, or an architecture or a
    tensor that cannot be changed back).
    """
    if not path.is_file():
        raise NotFound(f"{path} is not a file", fix="give a GGUF file")
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise UsageError(f"{path} is a GGUF file", fix="pip install 'flora-adapters[gguf]' to read it") from error
    try:
        reader = GGUFReader(path)
        fields = {name: entry.contents() for name, entry in reader.fields.items() if not name.startswith("tokenizer.")}
    except (ValueError, IndexError, KeyError, OSError) as error:
        raise CheckpointError(
            f"{path} is not a complete GGUF file", cause=str(error)[:300], fix="fetch it again"
        ) from error
    architecture = fields.get("general.architecture")
    if architecture not in ARCHITECTURES:
        raise CheckpointError(
            f"{path} is of architecture {architecture}",
            cause=f"Flora changes back the weights of {', '.join(ARCHITECTURES)}; llama.cpp stores others otherwise",
            fix="give the base as safetensors",
        )
    entries = {_name_of(entry.name, path): entry for entry in reader.tensors if entry.name not in _DERIVED}
    tensors = {
        name: TensorInfo(
            name,
            f"GGUF_{entry.tensor_type.name}",
            tuple(int(size) for size in reversed(entry.shape)),
            path,
            int(entry.data_offset),
            int(entry.data_offset) + int(entry.n_bytes),
        )
        for name, entry in sorted(entries.items())
    }
    config = {
        "architectures": [ARCHITECTURES[architecture]],
        "model_type": architecture,
        "tie_word_embeddings": "lm_head.weight" not in tensors,
    }
    return GgufCheckpoint(path, config, tensors, entries=entries, heads=_reordered(architecture, fields))


def _name_of(name: str, path: Path) -> str:
    match = _TENSOR.fullmatch(name)
    kind = NAMES.get(match["kind"]) if match else None
    if match is None or kind is None:
        raise CheckpointError(
            f"{path} holds {name}, which Flora has no name for", fix="give the base as safetensors", tensor=name
        )
    prefix = f"model.layers.{match['layer']}." if match["layer"] is not None else ""
    return f"{prefix}{kind}.{match['leaf']}"


def _reordered(architecture: str, fields: Mapping[str, Any]) -> dict[str, int]:
    if architecture != "llama":
        return {}
    num_heads = int(fields["llama.attention.head_count"])
    return {"q_proj": num_heads, "k_proj": int(fields.get("llama.attention.head_count_kv", num_heads))}


def _restore_rows(weight: "Tensor", num_heads: int) -> "Tensor":
    """Rows (head, pair, half) back to (head, half, pair): the inverse of llama.cpp's permutation."""
    return weight.unflatten(0, (num_heads, -1, 2)).transpose(1, 2).flatten(0, 2).contiguous()
