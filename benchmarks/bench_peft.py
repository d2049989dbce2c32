"""How many requests a second do transformers and PEFT serve when they want 5 or 100 different adapters?

    python benchmarks/bench_peft.py --adapters 100 --out peft.jsonl

The trace of `flora bench serve`, in the two ways that PEFT has. `switch`: requests grouped by adapter in order of
arrival, static batches, `set_adapter` before each. `mixed`: static batches in order of arrival, each row naming its
adapter. A batch runs until its longest answer is done, and only tokens that were asked for count. All in PEFT's favor:
every adapter lies on the device before the clock starts, numbers that share weights share one adapter, and the clock
stops after the batch in which the time is up, nothing extrapolated. Times are those of --seconds, not of the whole
trace, which would take the best part of an hour.
"""

import argparse
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import peft
import torch
import transformers

from flora.bench.row import append_row, encode_row
from flora.bench.script import ints, make_parser, place_facts, surroundings
from flora.bench.shapes import FILES_PER_RANK, MODULE_SETS, SHAPES
from flora.bench.trace import Trace, Workload, draw_trace

BASE = "base"  # in place of an adapter's name, as PEFT calls it: "__base__" in a mixed batch


@dataclass(frozen=True)
class Batch:
    requests: list[int]
    adapters: list[str]  # of each


def main() -> None:
    args = parse_args()
    transformers.logging.set_verbosity_error()
    workload = Workload(args.requests, args.adapters, args.alpha, lengths=args.lengths)
    trace = draw_trace(workload, args.seed)
    started = time.perf_counter()
    model = make_model(args)
    start_s = time.perf_counter() - started
    warm_up = draw_trace(Workload(2, args.adapters, lengths=(8, 16)), seed=7)
    for way in args.ways:
        with torch.inference_mode():
            run(model, warm_up, Batch([0], [name_of(args, warm_up, 0)]), way)
            row = facts(args, trace, way, start_s) | measure(args, model, trace, way)
        print(encode_row(row), flush=True)
        if args.out:
            append_row(args.out, row)


def parse_args() -> argparse.Namespace:
    parser = make_parser(__doc__)
    parser.add_argument("--shape", default="llama-7b", choices=sorted(SHAPES))
    parser.add_argument("--adapters", type=int, default=100, help="0 is the base alone")
    parser.add_argument("--modules", default="attention", choices=sorted(MODULE_SETS))
    parser.add_argument("--ranks", type=ints, default=(64, 32, 16, 8))
    parser.add_argument("--requests", type=int, default=600)
    parser.add_argument("--lengths", type=ints, default=(8, 512), help="low,high of prompts and answers")
    parser.add_argument("--alpha", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--ways", type=lambda text: text.split(","), default=["switch"], help="switch,mixed")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=60.0, help="after which no batch begins")
    parser.add_argument("--dtype", default="bfloat16")
    return parser.parse_args()


def make_model(args: argparse.Namespace) -> Any:
    """A base drawn at random on the device, with an adapter for each weights that adapters of the trace can have."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**SHAPES[args.shape])
    with torch.device(args.device):
        dtype = getattr(torch, args.dtype)
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
        model.generation_config.eos_token_id = None  # an answer is as long as the trace says
        names = sorted({weights_of(args, number) for number in range(args.adapters)})
        for name in names:
            rank = int(name.split("-")[0])
            lora = peft.LoraConfig(
                r=rank, lora_alpha=rank, target_modules=list(MODULE_SETS[args.modules]), init_lora_weights=False
            )
            if name == names[0]:
                model = peft.get_peft_model(model, lora, adapter_name=name, autocast_adapter_dtype=False)
            else:
                model.add_adapter(name, lora)
    return model.to(device=args.device, dtype=dtype).eval()


def weights_of(args: argparse.Namespace, number: int) -> str:
    """PEFT's name of adapter `number`: RANK-WEIGHTS, the same for numbers that share weights."""
    return f"{args.ranks[number % len(args.ranks)]}-{number // len(args.ranks) % FILES_PER_RANK}"


def name_of(args: argparse.Namespace, trace: Trace, request: int) -> str:
    return weights_of(args, int(trace.adapters[request])) if args.adapters else BASE


def batches_of(args: argparse.Namespace, trace: Trace, way: str) -> Iterator[Batch]:
    """Static batches. switch: of one adapter each, adapters in order of their first request; mixed: as they arrive."""
    groups: dict[int, list[int]] = {}
    for request in range(trace.num_requests):
        groups.setdefault(int(trace.adapters[request]) if way == "switch" else 0, []).append(request)
    for group in groups.values():
        for first in range(0, len(group), args.batch_size):
            requests = group[first : first + args.batch_size]
            yield Batch(requests, [name_of(args, trace, request) for request in requests])


def measure(args: argparse.Namespace, model: Any, trace: Trace, way: str) -> dict[str, Any]:
    done: list[int] = []
    num_batches = 0
    started = time.perf_counter()
    for batch in batches_of(args, trace, way):
        run(model, trace, batch, way)
        done += batch.requests
        num_batches += 1
        if time.perf_counter() - started >= args.seconds:
            break
    elapsed_s = time.perf_counter() - started
    out_tokens = int(trace.output_lens[done].sum())
    return {
        "completed": len(done),
        "batches": num_batches,
        "elapsed_s": round(elapsed_s, 2),
        "req_s": round(len(done) / elapsed_s, 3),
        "in_tok": sum(len(trace.prompts[request]) for request in done),
        "out_tok": out_tokens,
        "out_tok_s": round(out_tokens / elapsed_s, 1),
    }


def run(model: Any, trace: Trace, batch: Batch, way: str) -> None:
    """Generates the batch's answers, prompts padded on the left; returns when the device is done."""
    prompts = [trace.prompts[request] for request in batch.requests]
    longest, num_new = max(map(len, prompts)), int(max(trace.output_lens[request] for request in batch.requests))
    ids = torch.tensor([[0] * (longest - len(prompt)) + list(prompt) for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    names: dict[str, Any] = {}
    if way == "mixed" and batch.adapters[0] != BASE:
        names = {"adapter_names": batch.adapters}
    elif batch.adapters[0] != BASE:
        model.set_adapter(batch.adapters[0])
    made = model.generate(
        input_ids=ids.to(model.device),
        attention_mask=mask.to(model.device),
        max_new_tokens=num_new,
        do_sample=False,
        pad_token_id=0,
        **names,
    )
    if made.shape[1] != longest + num_new:  # reading the shape has waited for nothing; the next line does
        sys.exit(f"generate made {made.shape[1] - longest} tokens, the trace asks for {num_new}")
    made[0, -1].item()


def facts(args: argparse.Namespace, trace: Trace, way: str, start_s: float) -> dict[str, Any]:
    return {
        "system": "peft" if way == "switch" else f"peft-{way}",
        "label": f"peft/{args.adapters}" if way == "switch" else f"peft/{args.adapters}/{way}",
        "shape": args.shape,
        "modules": args.modules,
        "ranks": list(args.ranks),
        "adapters": args.adapters,
        "distinct": trace.num_distinct if args.adapters else 0,
        "requests": args.requests,
        "lengths": list(args.lengths),
        "rate": 0.0,
        "alpha": args.alpha,
        "seed": args.seed,
        "order": "warm",
        "batch_size": args.batch_size,
        "start_s": round(start_s, 1),
        "device": args.device,
        "version": peft.__version__,
        "transformers": transformers.__version__,
        "kernels": {"attention": "torch sdpa", "lora": "torch"},
    } | place_facts(surroundings(args))


if __name__ == "__main__":
    main()
