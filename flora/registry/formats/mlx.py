"""MLX-LM: adapters.safetensors and its adapter_config.json. Both factors lie transposed, and all have one rank.

    y = x @ W.T + scale * (x @ lora_a) @ lora_b        lora_a [in, r], lora_b [r, out]

Source: mlx-lm 0.32, tuner/lora.py and tuner/utils.py. Its default scale is 20, so ours is always written.
"""

import json
import re
from pathlib import Path

from flora.adapter import Adapter
from flora.errors import Unsupported
from flora.registry.formats.compat import judge
from flora.registry.formats.portable import fold_scales, pad_factors
from flora.registry.formats.tensors import encode

WEIGHTS_FILE = "adapters.safetensors"
_LAYER = re.compile(r"(?P<stack>.*\.layers)\.(?P<layer>\d+)\.(?P<key>.+)")


def save_mlx(adapter: Adapter, folder: Path) -> None:
    """Writes both files into `folder`. Raises Unsupported if MLX-LM's LoRA cannot be this."""
    verdict = next(verdict for verdict in judge(adapter.header) if verdict.engine == "MLX-LM")
    if verdict.answer == "no":
        raise Unsupported(f"MLX-LM cannot apply this adapter: {verdict.reason}", fix=verdict.remedy)
    factors = pad_factors(fold_scales(adapter))
    tensors, keys, layers = {}, set(), set()
    for module, lowrank in sorted(factors.items()):
        match = _LAYER.fullmatch(module)
        if match is None:
            raise Unsupported(
                f"{module} lies in no layer, and MLX-LM adapts layers alone",
                fix="extract again with --exclude for it",
                tensor=module,
            )
        keys.add(match["key"])
        layers.add(int(match["layer"]))
        tensors[f"{module}.lora_a"] = lowrank.A.T.contiguous()
        tensors[f"{module}.lora_b"] = lowrank.B.T.contiguous()
    config = {
        "fine_tune_type": "lora",
        "model": adapter.header.base.name,
        "num_layers": -1,  # all of them: MLX-LM counts from the last
        "lora_parameters": {"rank": adapter.header.max_rank, "scale": 1.0, "dropout": 0.0, "keys": sorted(keys)},
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / WEIGHTS_FILE).write_bytes(b"".join(encode(tensors)))
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
