"""Two checkpoints as large as a real model's, made on a GPU in seconds: shards as Hugging Face saves them, in bf16.

Linear layers are `bench_extract.synthetic`; the change of embeddings and head is noise, and norms stay. Each tensor has
a generator of its own, so the order of the work does not matter; the numbers of a GPU are not those of a CPU.
"""

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from zlib import crc32

import torch
from bench_extract import Shape, synthetic
from torch import Tensor

SHAPES = {
    "llama3-8b": Shape(4096, 14336, 32, 32, 8, 128, vocab_size=128256, tied=False),
    "llama3-1b": Shape(2048, 8192, 16, 32, 8, 64, vocab_size=128256),
    "tiny": Shape(320, 640, 2, 10, 2, 32, vocab_size=256, tied=False),  # to try the script itself
}
SHARD_BYTES = 4_000_000_000  # at most; five files of an 8B model
NOISE = 5e-5  # of tables


def make_big_pair(folder: Path, shape: Shape, kind: str, seed: int, device: str) -> None:
    """Writes `folder`/base and `folder`/tuned, several shards at a time."""
    torch.linalg.cholesky(torch.ones(1, 1, device=device))  # two threads must not load its linear algebra at once
    shards = _shards(_shapes(shape), SHARD_BYTES if shape.num_layers > 2 else 1_000_000)
    for side in ("base", "tuned"):
        (folder / side).mkdir(parents=True)
        (folder / side / "config.json").write_text(json.dumps(shape.config))
        weight_map = {name: file for file, shapes in shards.items() for name in shapes}
        (folder / side / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with ThreadPoolExecutor(8) as pool:
        jobs = [pool.submit(_write, folder, file, shapes, kind, seed, device) for file, shapes in shards.items()]
        for job in jobs:
            job.result()


def _shapes(shape: Shape) -> dict[str, tuple[int, ...]]:
    """Every tensor of the model, in the order of its layers."""
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (shape.vocab_size, shape.hidden)}
    shapes |= {f"{module}.weight": size for module, size in shape.matrices.items()}
    for i in range(shape.num_layers):
        for norm in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"model.layers.{i}.{norm}.weight"] = (shape.hidden,)
    shapes["model.norm.weight"] = (shape.hidden,)
    return shapes if shape.tied else shapes | {"lm_head.weight": (shape.vocab_size, shape.hidden)}


def _shards(shapes: dict[str, tuple[int, ...]], shard_bytes: int) -> dict[str, dict[str, tuple[int, ...]]]:
    """The tensors of each file, by its name: as many as fit, in their order."""
    groups: list[dict[str, tuple[int, ...]]] = [{}]
    for name, size in shapes.items():
        if groups[-1] and sum(map(_num_bytes, groups[-1].values())) + _num_bytes(size) > shard_bytes:
            groups.append({})
        groups[-1][name] = size
    return {f"model-{i:05}-of-{len(groups):05}.safetensors": group for i, group in enumerate(groups, 1)}


def _num_bytes(size: tuple[int, ...]) -> int:
    return 2 * torch.Size(size).numel()


def _write(folder: Path, file: str, shapes: dict[str, tuple[int, ...]], kind: str, seed: int, device: str) -> None:
    """One shard of both sides, tensor by tensor."""
    header, end = {}, 0
    for name, size in shapes.items():
        start, end = end, end + _num_bytes(size)
        header[name] = {"dtype": "BF16", "shape": size, "data_offsets": [start, end]}
    text = json.dumps({"__metadata__": {"format": "pt"}} | header).encode()
    text += b" " * (-len(text) % 8)
    with (folder / "base" / file).open("wb") as base, (folder / "tuned" / file).open("wb") as tuned:
        for side in (base, tuned):
            side.write(len(text).to_bytes(8, "little") + text)
        for pair in _tensors(shapes, kind, seed, device):
            for side, tensor in zip((base, tuned), pair, strict=True):
                side.write(tensor.cpu().view(torch.int16).numpy().data)


def _tensors(shapes: dict[str, tuple[int, ...]], kind: str, seed: int, device: str) -> Iterator[tuple[Tensor, Tensor]]:
    for name, size in shapes.items():
        generator = torch.Generator(device).manual_seed(seed << 32 | crc32(name.encode()))
        if name.endswith("_proj.weight"):
            yield synthetic(*size, kind, generator)
        elif len(size) == 1:
            yield torch.ones(size).bfloat16(), torch.ones(size).bfloat16()
        else:
            table = (torch.randn(size, generator=generator, device=device) * 0.02).bfloat16()
            change = torch.randn(size, generator=generator, device=device) * NOISE
            yield table, (table.float() + change).bfloat16()
