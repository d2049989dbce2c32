"""How long does a rank-64 extraction take, and what does it keep, beside mergekit and a full SVD of every delta?

    python benchmarks/bench_extract.py --shape smollm2 --mergekit-python OTHER_ENVIRONMENT/bin/python

Each tool runs as a process of its own on the same synthetic pair, in turns (A B C A B C …), page cache warm. Wall time,
CPU seconds and peak memory are the whole process's, imports and writing included. What is kept is recomputed from the
files that each tool wrote: 1 - ‖D - BA‖² / ‖D‖² over all matrices. This process itself loads no torch: a child's peak
memory is at least its parent's.
"""

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Shape:
    """A Llama-like model; `vocab_size` is small where only the body is of interest."""

    hidden: int
    intermediate: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    tied: bool = True

    @property
    def matrices(self) -> dict[str, tuple[int, int]]:
        """[out, in] of each linear layer's weight."""
        q, kv = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        layer = {
            "self_attn.q_proj": (q, self.hidden),
            "self_attn.k_proj": (kv, self.hidden),
            "self_attn.v_proj": (kv, self.hidden),
            "self_attn.o_proj": (self.hidden, q),
            "mlp.gate_proj": (self.intermediate, self.hidden),
            "mlp.up_proj": (self.intermediate, self.hidden),
            "mlp.down_proj": (self.hidden, self.intermediate),
        }
        return {f"model.layers.{i}.{name}": shape for i in range(self.num_layers) for name, shape in layer.items()}

    @property
    def config(self) -> dict:
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
            "vocab_size": self.vocab_size,
            "tie_word_embeddings": self.tied,
            "rms_norm_eps": 1e-5,
            "torch_dtype": "bfloat16",
        }


SHAPES = {
    "smollm2": Shape(576, 1536, 30, 9, 3, 64, vocab_size=49152),  # SmolLM2-135M
    "qwen": Shape(896, 4864, 24, 14, 2, 64, vocab_size=512),  # Qwen2.5-0.5B without its embedding
    "llama8b-layer": Shape(4096, 14336, 1, 32, 8, 128, vocab_size=512),  # one layer of Llama-3-8B
    "tiny": Shape(64, 128, 2, 4, 2, 16, vocab_size=128),  # to try the script itself
}


def make_pair(folder: Path, shape: Shape, kind: str, seed: int) -> None:
    """Two checkpoints of one file each: the linear layers are `synthetic`, embeddings and norms stay."""
    import torch
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(seed)
    fixed = {
        "model.embed_tokens.weight": torch.randn(shape.vocab_size, shape.hidden, generator=generator) * 0.02,
        "model.norm.weight": torch.ones(shape.hidden),
    }
    for i in range(shape.num_layers):
        for norm in ("input_layernorm", "post_attention_layernorm"):
            fixed[f"model.layers.{i}.{norm}.weight"] = torch.ones(shape.hidden)
    base = {name: tensor.bfloat16() for name, tensor in fixed.items()}
    tuned = dict(base)
    for module, (m, n) in shape.matrices.items():
        base[f"{module}.weight"], tuned[f"{module}.weight"] = synthetic(m, n, kind, generator)
    for name, tensors in (("base", base), ("tuned", tuned)):
        (folder / name).mkdir(parents=True)
        save_file(tensors, folder / name / "model.safetensors", metadata={"format": "pt"})
        (folder / name / "config.json").write_text(json.dumps(shape.config))


def synthetic(m: int, n: int, kind: str, generator) -> tuple:
    """A matrix [m, n] and its fine-tune, on the generator's device.

    base: N(0, 0.02) in bf16. tuned: base + delta, rounded to bf16.
    spiked  16 directions, s_i ~ 1/i, RMS 3e-4, and white noise of 5e-5
    heavy   up to 512 directions, s_i ~ 1/sqrt(i), RMS 3e-4, and white noise of 2e-5
    """
    import torch

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, device=generator.device)

    rank, power, noise = (16, 1.0, 5e-5) if kind == "spiked" else (512, 0.5, 2e-5)
    weight = (normal(m, n) * 0.02).bfloat16()
    r = min(rank, m, n)
    U, V = torch.linalg.qr(normal(m, r)).Q, torch.linalg.qr(normal(n, r)).Q
    S = torch.arange(1, r + 1, device=generator.device) ** -power
    delta = (U * S) @ V.T
    delta *= 3e-4 * (m * n) ** 0.5 / delta.norm()
    delta += noise * normal(m, n)
    return weight, (weight.float() + delta).bfloat16()


# --- the tools; each writes adapter_model.safetensors into `out` ---


def run_flora(base: Path, tuned: Path, out: Path, rank: int) -> None:
    from flora.checkpoint import open_checkpoint
    from flora.identity import records_beside
    from flora.startup import import_torch, prepare_process

    prepare_process()  # as `flora` does
    pair = open_checkpoint(base), open_checkpoint(tuned)
    with records_beside(pair, None) as records:  # as `flora extract` does: hashed beside the import of torch
        import_torch()
        from safetensors.torch import save_file

        from flora.extract import ExtractConfig, extract
        from flora.rank import RankRule

        result = extract(*pair, ExtractConfig(RankRule(max_rank=rank)), records=records)
    _save(out, {module: (factors.A, factors.B) for module, factors in result.adapter.factors.items()}, save_file)
    print(json.dumps({stage: round(seconds, 3) for stage, seconds in result.timings.items()}))


def run_svd(base: Path, tuned: Path, out: Path, rank: int) -> None:
    """What the usual script does: torch.linalg.svd of each float32 delta, one after the other, all threads."""
    import torch
    from safetensors import safe_open
    from safetensors.torch import save_file

    factors = {}
    with safe_open(base / "model.safetensors", "pt") as ours, safe_open(tuned / "model.safetensors", "pt") as theirs:
        for name in ours.keys():  # noqa: SIM118 - not a mapping
            if name.endswith("_proj.weight"):
                delta = theirs.get_tensor(name).float() - ours.get_tensor(name).float()
                U, S, Vh = torch.linalg.svd(delta, full_matrices=False)
                root = S[:rank].sqrt()
                A, B = (root[:, None] * Vh[:rank]).bfloat16(), (U[:, :rank] * root).bfloat16()
                factors[name.removesuffix(".weight")] = A.contiguous(), B.contiguous()
    _save(out, factors, save_file)


def _save(out: Path, factors: dict, save_file) -> None:
    out.mkdir(parents=True)
    tensors = {}
    for module, (A, B) in factors.items():
        tensors[f"base_model.model.{module}.lora_A.weight"] = A
        tensors[f"base_model.model.{module}.lora_B.weight"] = B
    save_file(tensors, out / "adapter_model.safetensors")


# --- measuring ---


@dataclass(frozen=True)
class Run:
    tool: str
    wall_s: float
    cpu_s: float
    peak_rss_bytes: int
    load_before: float
    kept: float
    output_bytes: int


def measure(tool: str, command: list[str], pair: Path, out: Path, environment: dict[str, str]) -> Run:
    load = os.getloadavg()[0]
    with (out.parent / f"{tool}.log").open("wb") as log:
        start = time.perf_counter()
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=os.environ | environment)
        _, status, usage = os.wait4(process.pid, 0)
        wall = time.perf_counter() - start
    file = out / "adapter_model.safetensors"
    if not file.exists():  # mergekit exits with 1 offline, after it has written the weights
        sys.exit(f"{tool} failed with status {status}:\n{(out.parent / f'{tool}.log').read_text()[-3000:]}")
    return Run(
        tool=tool,
        wall_s=round(wall, 3),
        cpu_s=round(usage.ru_utime + usage.ru_stime, 3),
        peak_rss_bytes=usage.ru_maxrss * 1024,
        load_before=round(load, 2),
        kept=float(in_a_process("kept", pair, file)),
        output_bytes=file.stat().st_size,
    )


def in_a_process(task: str, *paths: Path, options: Sequence[str] = ()) -> str:
    """What this script prints when it does one of its tasks in a process of its own."""
    command = [sys.executable, __file__, *options, "--task", task, "--paths", *map(str, paths)]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def kept_share(pair: Path, adapter: Path) -> float:
    """1 - ‖D - BA‖² / ‖D‖² over all linear layers, each residual formed whole."""
    from safetensors import safe_open

    total = residual = 0.0
    with (
        safe_open(pair / "base" / "model.safetensors", "pt") as base,
        safe_open(pair / "tuned" / "model.safetensors", "pt") as tuned,
        safe_open(adapter, "pt") as factors,
    ):
        for name in base.keys():  # noqa: SIM118 - not a mapping
            if not name.endswith("_proj.weight"):
                continue
            delta = tuned.get_tensor(name).float() - base.get_tensor(name).float()
            A, B = (
                factors.get_tensor(f"base_model.model.{name.removesuffix('weight')}lora_{side}.weight").float()
                for side in "AB"
            )
            total += float(delta.double().square().sum())
            residual += float((delta - B @ A).double().square().sum())
    return 1 - residual / total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="smollm2")
    parser.add_argument("--kind", choices=["spiked", "heavy"], default="spiked")
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--mergekit-python", type=Path, help="a Python with mergekit 0.1.5; none: left out")
    parser.add_argument("--no-svd", action="store_true", help="leave out torch.linalg.svd, the slowest")
    parser.add_argument("--out", type=Path, help="append one JSON line here")
    parser.add_argument("--task", choices=TASKS, help=argparse.SUPPRESS)  # what one of our processes is to do
    parser.add_argument("--paths", nargs="+", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.task:
        TASKS[arguments.task](arguments)
        return
    with tempfile.TemporaryDirectory() as scratch:
        compare(arguments, Path(scratch))


TASKS = {
    "make": lambda arguments: make_pair(*arguments.paths, SHAPES[arguments.shape], arguments.kind, arguments.seed),
    "flora": lambda arguments: run_flora(*arguments.paths, arguments.rank),
    "svd": lambda arguments: run_svd(*arguments.paths, arguments.rank),
    "kept": lambda arguments: print(kept_share(*arguments.paths)),
}


def compare(arguments: argparse.Namespace, scratch: Path) -> None:
    pair = scratch / "pair"
    options = ["--shape", arguments.shape, "--kind", arguments.kind, "--seed", str(arguments.seed)]
    in_a_process("make", pair, options=options)
    paths = [str(pair / "base"), str(pair / "tuned")]
    threads = str(arguments.threads)
    environment = {
        "OMP_NUM_THREADS": threads,
        "MKL_NUM_THREADS": threads,
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": str(REPOSITORY),
    }

    def command(tool: str, out: Path) -> list[str]:
        if tool == "mergekit":
            options = ["--model", paths[1], "--base-model", paths[0], "--out-path", str(out)]
            script = [str(arguments.mergekit_python), "-m", "mergekit.scripts.extract_lora"]
            return [*script, *options, "--max-rank", str(arguments.rank)]
        return [sys.executable, __file__, "--task", tool, "--rank", str(arguments.rank), "--paths", *paths, str(out)]

    tools = ["flora"] + ["mergekit"] * bool(arguments.mergekit_python) + ["svd"] * (not arguments.no_svd)
    runs: list[Run] = []
    for i in range(arguments.rounds):
        for tool in tools:
            out = scratch / f"{tool}-{i}"
            runs.append(measure(tool, command(tool, out), pair, out, environment))
            shutil.rmtree(out)
            print(f"{i + 1}/{arguments.rounds} {tool}: {runs[-1].wall_s} s", file=sys.stderr)
    record = {
        "benchmark": "extract",
        "shape": arguments.shape,
        "kind": arguments.kind,
        "rank": arguments.rank,
        "seed": arguments.seed,
        "num_threads": arguments.threads,
        "tools": {tool: summarize([run for run in runs if run.tool == tool]) for tool in tools},
        "runs": [asdict(run) for run in runs],
        **about_this_machine(),
    }
    print_table(record)
    if arguments.out:
        with arguments.out.open("a") as file:
            file.write(json.dumps(record) + "\n")


def summarize(runs: list[Run]) -> dict[str, float]:
    walls = [run.wall_s for run in runs]
    return {
        "wall_s": statistics.median(walls),
        "wall_min_s": min(walls),
        "wall_max_s": max(walls),
        "cpu_s": statistics.median(run.cpu_s for run in runs),
        "peak_rss_bytes": max(run.peak_rss_bytes for run in runs),
        "kept": statistics.median(run.kept for run in runs),
        "output_bytes": runs[0].output_bytes,
    }


def print_table(record: dict) -> None:
    print(f"{record['shape']} ({record['kind']}), rank {record['rank']}, {record['num_threads']} threads")
    print(f"{'tool':<10}{'wall s':>9}{'min..max':>16}{'CPU s':>9}{'peak MB':>9}{'kept':>11}{'x wall':>8}")
    ours = record["tools"]["flora"]["wall_s"]
    for tool, row in record["tools"].items():
        spread = f"{row['wall_min_s']:.2f}..{row['wall_max_s']:.2f}"
        print(
            f"{tool:<10}{row['wall_s']:>9.2f}{spread:>16}{row['cpu_s']:>9.2f}{row['peak_rss_bytes'] / 1e6:>9.0f}"
            f"{row['kept']:>11.6f}{row['wall_s'] / ours:>8.2f}"
        )


def about_this_machine() -> dict:
    model = next((line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")), "")
    commit = os.environ.get("FLORA_COMMIT")
    if not commit:
        git = ["git", "-C", str(REPOSITORY), "rev-parse", "HEAD"]
        commit = subprocess.run(git, capture_output=True, text=True).stdout.strip()
    return {
        "device": f"{model.partition(':')[2].strip()}, {os.cpu_count()} cores",
        "versions": {"python": platform.python_version(), "torch": version("torch"), "mergekit": "0.1.5"},
        "commit": commit,
        "date": time.strftime("%Y-%m-%d"),
    }


if __name__ == "__main__":
    main()
