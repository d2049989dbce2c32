"""GGUF: an adapter as llama.cpp and Ollama read it, through the gguf package.

One rank for all and alpha = rank, for llama.cpp scales each module by alpha over its own rank. Architectures that
llama.cpp keeps as `llama` have the rows of q and k in another order, so their B is reordered by the number of heads.
Source: llama.cpp's convert_lora_to_gguf.py and convert_hf_to_gguf.py.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from flora.adapter import Adapter
from flora.errors import Unsupported, UsageError
from flora.registry.formats.compat import judge
from flora.registry.formats.peft_config import read_json
from flora.registry.formats.portable import fold_scales, pad_factors

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

_ARCHITECTURES = {  # of config.json's model_type
    "llama": "LLAMA",
    "mistral": "LLAMA",
    "qwen2": "QWEN2",
    "qwen3": "QWEN3",
    "gemma2": "GEMMA2",
}


def save_gguf(adapter: Adapter, path: Path, base_config: Path) -> None:
    """Writes the adapter to file `path`, for the base whose config.json is given.

    Raises Unsupported (an architecture or a module that llama.cpp's adapters cannot have), UsageError.
    """
    import gguf

    config = read_json(base_config)
    kind = str(config.get("model_type"))
    if kind not in _ARCHITECTURES:
        raise Unsupported(
            f"no GGUF for a base of model_type {kind[:40]!r}",
            cause=f"Flora knows the tensor names of {', '.join(_ARCHITECTURES)}",
            fix="convert a PEFT folder with llama.cpp's convert_lora_to_gguf.py",
        )
    refusal = next(verdict for verdict in judge(adapter.header) if verdict.engine == "llama.cpp")
    if refusal.answer == "no":
        raise Unsupported(f"llama.cpp cannot apply this adapter: {refusal.reason}", fix=refusal.remedy)
    architecture = gguf.MODEL_ARCH[_ARCHITECTURES[kind]]
    names = gguf.get_tensor_name_map(architecture, int(config["num_hidden_layers"]))
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[architecture])
    rank = adapter.header.max_rank
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(rank))
    for module, factors in sorted(pad_factors(fold_scales(adapter)).items()):
        name = names.get_name(f"{module}.weight", try_suffixes=(".weight",))
        if name is None:
            raise Unsupported(
                f"{module} has no name in GGUF's {architecture.name}",
                fix=f"extract again without it: --exclude '{module}'",
                tensor=module,
            )
        B = factors.B
        if _ARCHITECTURES[kind] == "LLAMA" and module.endswith((".q_proj", ".k_proj")):
            B = _reorder(B, _heads(config, module))
        writer.add_tensor(f"{name}.lora_a", _plain(factors.A))
        writer.add_tensor(f"{name}.lora_b", _plain(B))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _heads(config: dict[str, Any], module: str) -> int:
    heads = config.get("num_attention_heads")
    if module.endswith(".k_proj"):
        heads = config.get("num_key_value_heads") or heads
    if not isinstance(heads, int) or heads < 1:
        raise UsageError("the base's config.json tells no number of heads", fix="give the base's own folder")
    return heads


def _reorder(B: "Tensor", num_heads: int) -> "Tensor":
    """Rows of each head from halves (x1…, x2…) to pairs (x1, x2, …): llama.cpp's rotary embedding. B is [out, rank]."""
    return B.unflatten(0, (num_heads, 2, -1)).transpose(1, 2).reshape(B.shape).contiguous()


def _plain(tensor: "Tensor") -> "np.ndarray[Any, Any]":
    """fp16 where that holds the very same numbers, else fp32."""
    import torch

    exact = tensor.float()
    half = exact.to(torch.float16)
    return (half if torch.equal(half.float(), exact) else exact).numpy()
