"""How much faster than transformers' generate does the engine serve on a CPU: one stream, 16 streams, 16 adapters?

    python benchmarks/bench_serve_cpu.py --out benchmarks/results/serve_cpu.jsonl

One model with random weights in float32, in one process, all systems with the same threads. Prompts of about 64 random
tokens, 64 greedy tokens each, no end-of-sequence. The answers of all systems must be equal before anything is timed;
then they take turns (A B C A B C …), and the median counts. transformers serves 16 prompts in two ways: one after the
other, and as one padded batch, which is the best it can do when all prompts are there at once and ask for equally many
tokens. PEFT serves 16 adapters one after the other, all of them loaded before the clock starts; the engine's are
resident too.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

from flora.adapter import BaseBinding, Recipe, make_adapter
from flora.bench.shapes import ALL_LINEAR, SHAPES
from flora.lowrank import LowRank
from flora.registry import Registry
from flora.serve.config import EngineConfig
from flora.serve.engine import Engine, build_engine
from flora.serve.messages import StepEvents, Submit
from flora.serve.request import AdapterTarget, SamplingParams

REPOSITORY = Path(__file__).resolve().parent.parent
NUM_STREAMS = 16
RANK = 16

Answers = list[list[int]]
System = Callable[[], Answers]


@dataclass(frozen=True)
class Workload:
    name: str
    systems: dict[str, System]  # flora first, then what it is measured against
    num_tokens: int  # generated, all streams together


def make_model(shape: str, folder: Path, seed: int) -> Any:
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(**SHAPES[shape], initializer_range=0.02, attn_implementation="sdpa")
    model = transformers.LlamaForCausalLM(config).float().eval()
    model.save_pretrained(folder)
    return model


def make_prompts(vocab_size: int, num_prompts: int, mean_length: int, seed: int) -> Answers:
    """Lengths within a quarter of the mean: a padded batch has something to pad."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(mean_length * 3 // 4, mean_length * 5 // 4 + 1, (num_prompts,), generator=generator)
    return [torch.randint(3, vocab_size, (n,), generator=generator).tolist() for n in lengths.tolist()]


# --- transformers ---


def generate(model: Any, prompts: Answers, num_tokens: int) -> Answers:
    """One call of generate; prompts of different lengths are padded on the left."""
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    made = model.generate(
        ids,
        attention_mask=mask,
        max_new_tokens=num_tokens,
        min_new_tokens=num_tokens,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    return made[:, longest:].tolist()


def one_after_the_other(model: Any, prompts: Answers, num_tokens: int) -> Answers:
    return [generate(model, [prompt], num_tokens)[0] for prompt in prompts]


# --- adapters ---


def random_factors(shape: str, seed: int) -> dict[str, LowRank]:
    """Rank-16 factors of every projection, large enough to change the answers."""
    generator = torch.Generator().manual_seed(seed)
    dims = SHAPES[shape]
    q, kv = (dims[key] * dims["head_dim"] for key in ("num_attention_heads", "num_key_value_heads"))
    hidden, ff = dims["hidden_size"], dims["intermediate_size"]
    features = {
        "q_proj": (hidden, q),
        "k_proj": (hidden, kv),
        "v_proj": (hidden, kv),
        "o_proj": (q, hidden),
        "gate_proj": (hidden, ff),
        "up_proj": (hidden, ff),
        "down_proj": (ff, hidden),
    }
    return {
        f"model.layers.{layer}.{'self_attn' if module[0] in 'qkvo' else 'mlp'}.{module}": LowRank(
            A=torch.randn(RANK, features[module][0], generator=generator) * 0.02,
            B=torch.randn(features[module][1], RANK, generator=generator) * 0.02,
        )
        for layer in range(dims["num_hidden_layers"])
        for module in ALL_LINEAR
    }


def peft_model(model: Any, adapters: list[dict[str, LowRank]]) -> Any:
    from peft import LoraConfig, PeftModel, get_peft_model

    config = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=list(ALL_LINEAR))
    wrapped: PeftModel = get_peft_model(model, config, adapter_name="0")
    for name in range(1, len(adapters)):
        wrapped.add_adapter(str(name), config)
    layers = dict(wrapped.base_model.model.named_modules())
    with torch.no_grad():
        for name, factors in enumerate(adapters):
            for module, lowrank in factors.items():
                layers[module].lora_A[str(name)].weight.copy_(lowrank.A)
                layers[module].lora_B[str(name)].weight.copy_(lowrank.B)
    return wrapped.eval()


def register(adapters: list[dict[str, LowRank]], home: Path) -> list[AdapterTarget]:
    targets = []
    with Registry.open(home) as registry:
        for name, factors in enumerate(adapters):
            adapter = make_adapter(factors, BaseBinding(name="bench", base_id=None), Recipe(operation="import"))
            version = registry.add(adapter, f"a{name}")
            targets.append(
                AdapterTarget(serving_digest=version.serving_digest, version_digest=version.digest, label=version.name)
            )
    return targets


# --- the engine ---


def serve(engine: Engine, prompts: Answers, targets: list[AdapterTarget | None], num_tokens: int) -> Answers:
    """All requests at once; their answers when the last has ended."""
    sampling = SamplingParams(max_tokens=num_tokens, temperature=0.0, ignore_eos=True)
    for number, (prompt, target) in enumerate(zip(prompts, targets, strict=True)):
        engine.submit(Submit(request_id=str(number), prompt=tuple(prompt), sampling=sampling, adapter=target))
    answers: Answers = [[] for _ in prompts]
    while not engine.is_idle:
        for _, message in engine.step(wait_s=10.0):
            assert isinstance(message, StepEvents), message
            for event in message.events:
                answers[int(event.request_id)] += event.token_ids
    return answers


# --- measuring ---


def measure(workload: Workload, repeats: int) -> dict[str, list[float]]:
    """Seconds of each run, the systems in turns. Exits if their answers differ."""
    expected: dict[str, Answers] = {name: system() for name, system in workload.systems.items()}
    first = next(iter(expected.values()))
    for name, answers in expected.items():
        if answers != first:
            raise SystemExit(f"{workload.name}: the answers of {name} are not those of {next(iter(expected))}")
    seconds: dict[str, list[float]] = {name: [] for name in workload.systems}
    for _ in range(repeats):
        for name, system in workload.systems.items():
            start = time.perf_counter()
            system()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="smollm2-135m", choices=SHAPES)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", help="one workload: streams-1, streams-16, adapters-16")
    parser.add_argument("--out", type=Path, help="append a JSON line per system and workload")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()

    with tempfile.TemporaryDirectory(prefix="flora-bench-") as folder, torch.no_grad():
        home = Path(folder)
        model = make_model(arguments.shape, home / "base", arguments.seed)
        prompts = make_prompts(model.config.vocab_size, NUM_STREAMS, arguments.prompt_tokens, arguments.seed)
        adapters = [random_factors(arguments.shape, seed) for seed in range(NUM_STREAMS)]
        targets: list[AdapterTarget | None] = list(register(adapters, home / "registry"))
        engine = build_engine(
            EngineConfig(
                base=home / "base",
                registry=str(home / "registry"),
                cache_dir=home / "cache",
                pool_bytes=1 << 30,
                num_threads=arguments.threads,
            )
        )
        n = arguments.tokens
        no_adapter: list[AdapterTarget | None] = [None] * NUM_STREAMS
        for workload in (
            Workload(
                "streams-1",
                {
                    "flora": lambda: serve(engine, prompts[:1], no_adapter[:1], n),
                    "transformers": lambda: generate(model, prompts[:1], n),
                },
                n,
            ),
            Workload(
                "streams-16",
                {
                    "flora": lambda: serve(engine, prompts, no_adapter, n),
                    "transformers, one after the other": lambda: one_after_the_other(model, prompts, n),
                    "transformers, one padded batch": lambda: generate(model, prompts, n),
                },
                n * NUM_STREAMS,
            ),
            Workload("adapters-16", {"flora": lambda: serve(engine, prompts, targets, n)}, n * NUM_STREAMS),
        ):
            if arguments.only not in (None, workload.name):
                continue
            if workload.name == "adapters-16":
                wrapped = peft_model(model, adapters)

                def with_each_adapter(wrapped: Any = wrapped) -> Answers:
                    answers = []
                    for name, prompt in enumerate(prompts):
                        wrapped.set_adapter(str(name))
                        answers += generate(wrapped, [prompt], n)
                    return answers

                workload.systems["PEFT, one after the other"] = with_each_adapter
            report(workload, measure(workload, arguments.repeats), arguments)
        engine.close()


def report(workload: Workload, seconds: dict[str, list[float]], arguments: argparse.Namespace) -> None:
    ours = statistics.median(seconds["flora"])
    for system, runs in seconds.items():
        median = statistics.median(runs)
        speed = workload.num_tokens / median
        print(f"{workload.name:12} {system:36} {median:8.2f} s {speed:8.1f} tok/s   flora is {median / ours:5.2f} x")
        line = {
            "benchmark": "serve_cpu",
            "workload": workload.name,
            "system": system,
            "seconds": [round(run, 3) for run in runs],
            "median_s": round(median, 3),
            "out_tok_s": round(speed, 1),
            "flora_speedup": round(median / ours, 2),
            "shape": arguments.shape,
            "dtype": "float32",
            "prompt_tokens": arguments.prompt_tokens,
            "tokens": arguments.tokens,
            "rank": RANK if workload.name.startswith("adapters") else None,
            "seed": arguments.seed,
            "answers_equal": True,
            **surroundings(arguments.threads),
        }
        if arguments.out:
            with arguments.out.open("a") as file:
                file.write(json.dumps(line) + "\n")


def surroundings(threads: int) -> dict[str, Any]:
    """Where and with what this was measured."""
    import peft

    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=REPOSITORY, capture_output=True, text=True, check=False
    ).stdout.strip()
    cpuinfo = Path("/proc/cpuinfo").read_text().splitlines()
    cpu = next((line.split(":")[1].strip() for line in cpuinfo if "model name" in line), "unknown")
    return {
        "device": f"{cpu}, {os.cpu_count()} CPUs",
        "threads": threads,
        "load": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "peft": peft.__version__,
        "commit": commit,
    }


if __name__ == "__main__":
    main()
