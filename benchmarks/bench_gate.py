"""Is the engine as exact as PEFT? Both in bf16 against float32, on the shape that is timed: before any timing.

    python benchmarks/bench_gate.py --out gate.jsonl

One random checkpoint on disk, adapters of ranks 64/32/16/8 on all seven projections. The engine answers prompts for
several adapters and for the base in one batch, prompts cut into chunks and answers token by token, with the
distribution over the whole vocabulary at each token. transformers with PEFT computes the same distributions in bf16,
and again in float32: that is the truth. A row's error is the distance of log probabilities from the truth's, as a share
of their spread over the vocabulary. Exit status 1 where the engine's is more than twice PEFT's.

With --adapter-dtype float8_e4m3fn both judges have the rounded factors: what is held against twice PEFT's error is the
arithmetic. What the rounding itself changes is told beside it, as error_rounding.
"""

import argparse
import gc
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import Tensor

from flora.adapter import BaseBinding, Recipe, make_adapter
from flora.bench.row import append_row, encode_row
from flora.bench.script import make_parser, place_facts, surroundings
from flora.bench.shapes import ALL_LINEAR, SHAPES, random_factors
from flora.lowrank import LowRank
from flora.registry import Registry
from flora.serve.config import EngineConfig
from flora.serve.engine import Engine, build_engine
from flora.serve.engine.loading.narrowing import narrow
from flora.serve.messages import StepEvents, Submit
from flora.serve.request import AdapterTarget, SamplingParams

RANKS = (64, 32, 16, 8)
PROMPT_TOKENS = (1, 40, 200)  # the longest in two chunks
MOST = 2.0  # times PEFT's error


@dataclass(frozen=True)
class Case:
    adapter: int | None  # its number; None is the base
    prompt: tuple[int, ...]


def main() -> int:
    args = parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.backends.cuda.matmul.allow_tf32 = False
    with tempfile.TemporaryDirectory(dir=args.scratch) as place, torch.inference_mode():
        folder = Path(place)
        write_base(folder / "base", args)
        factors = [random_factors(args.shape, ALL_LINEAR, rank, 0, torch.bfloat16) for rank in RANKS]
        factors = [{name: pair for name, pair in f.items() if layer_of(name) < args.layers} for f in factors]
        cases = draw_cases(args)
        answers, kernels = ask_engine(folder, args, factors, cases)
        gc.collect()
        if args.device != "cpu":
            torch.cuda.empty_cache()
        model = transformers.AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.bfloat16)
        model = with_adapters(model.to(args.device).eval())
        asked = [(case, tokens) for case, (tokens, _) in zip(cases, answers, strict=True)]
        set_factors(model, [rounded(of_one) for of_one in factors] if args.adapter_dtype else factors)
        peft = [judge(model, case, tokens) for case, tokens in asked]
        model.float()
        truth = [judge(model, case, tokens) for case, tokens in asked]
        row = compare(truth, peft, [told for _, told in answers]) | facts(args, kernels)
        if args.adapter_dtype:
            set_factors(model, factors)
            row |= rounding(truth, [judge(model, case, tokens) for case, tokens in asked])
    print(encode_row(row), flush=True)
    if args.out:
        append_row(args.out, row)
    return 0 if row["error_ratio"] <= MOST else 1


def parse_args() -> argparse.Namespace:
    parser = make_parser(__doc__)
    parser.add_argument("--shape", default="llama3-8b", choices=sorted(SHAPES))
    parser.add_argument("--layers", type=int, help="fewer than the shape has")
    parser.add_argument("--tokens", type=int, default=4, help="of each answer")
    parser.add_argument("--dtype", default="bfloat16", help="of the engine")
    parser.add_argument(
        "--adapter-dtype", choices=["float8_e4m3fn"], help="of adapters in the pool; the judges' are rounded alike"
    )
    parser.add_argument("--pool-gib", type=float, default=4.0)
    parser.add_argument("--scratch", type=Path, help="for the checkpoint: memory is quickest (/dev/shm)")
    args = parser.parse_args()
    args.layers = args.layers or SHAPES[args.shape]["num_hidden_layers"]
    return args


def write_base(folder: Path, args: argparse.Namespace) -> None:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**SHAPES[args.shape] | {"num_hidden_layers": args.layers}, initializer_range=0.02)
    with torch.device(args.device):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder)


def draw_cases(args: argparse.Namespace) -> list[Case]:
    """A prompt of each length for the base and for each adapter."""
    generator = torch.Generator().manual_seed(1)
    vocab = SHAPES[args.shape]["vocab_size"]
    return [
        Case(adapter, tuple(torch.randint(3, vocab, (length,), generator=generator).tolist()))
        for length in PROMPT_TOKENS
        for adapter in (None, *range(len(RANKS)))
    ]


def layer_of(module: str) -> int:
    return int(module.split(".")[2])


# --- the engine ---


def ask_engine(
    folder: Path, args: argparse.Namespace, factors: list[dict[str, LowRank]], cases: list[Case]
) -> tuple[list[tuple[list[int], Tensor]], dict[str, str]]:
    """Each case's tokens and the log probabilities [tokens, vocab] that they were chosen by; and the kernels."""
    targets = []
    with Registry.open(folder / "registry") as registry:
        for number, of_one in enumerate(factors):
            adapter = make_adapter(of_one, BaseBinding(name="gate", base_id=None), Recipe(operation="import"))
            version = registry.add(adapter, f"a{number}")
            targets.append(
                AdapterTarget(serving_digest=version.serving_digest, version_digest=version.digest, label=version.name)
            )
    engine = build_engine(
        EngineConfig(
            base=folder / "base",
            registry=str(folder / "registry"),
            cache_dir=folder / "cache",
            device=args.device,
            dtype=args.dtype,
            adapter_dtype=args.adapter_dtype,
            pool_bytes=int(args.pool_gib * 2**30),
            max_context=512,
            max_sequences=16,
            max_batch_tokens=128,
            max_adapters=8,
            prefix_cache=False,
        )
    )
    answers = told_of(engine, cases, targets, args.tokens)
    kernels = engine.ready.kernels
    engine.close()
    return answers, kernels


def told_of(
    engine: Engine, cases: list[Case], targets: list[AdapterTarget], num_tokens: int
) -> list[tuple[list[int], Tensor]]:
    vocab = engine.ready.vocab_size
    everything = SamplingParams(max_tokens=num_tokens, temperature=0.0, ignore_eos=True, logprobs=vocab)
    for number, case in enumerate(cases):
        target = None if case.adapter is None else targets[case.adapter]
        engine.submit(Submit(request_id=str(number), prompt=case.prompt, sampling=everything, adapter=target))
    tokens: list[list[int]] = [[] for _ in cases]
    rows: list[list[Tensor]] = [[] for _ in cases]
    while not engine.is_idle:
        for _, message in engine.step(wait_s=10.0):
            assert isinstance(message, StepEvents), message
            for event in message.events:
                number = int(event.request_id)
                tokens[number] += event.token_ids
                for told in event.logprobs:
                    row = torch.empty(vocab)
                    row[torch.tensor(told.top_ids)] = torch.tensor(told.top)
                    rows[number].append(row)
    return [(mine, torch.stack(of_mine)) for mine, of_mine in zip(tokens, rows, strict=True)]


# --- transformers with PEFT ---


def rounded(factors: dict[str, LowRank]) -> dict[str, LowRank]:
    """As they lie in the pool; their numbers are exact in bf16."""

    def as_stored(matrix: Tensor) -> Tensor:
        narrowed = narrow(matrix)
        assert narrowed is not None
        return (narrowed[0].float() * 2.0 ** -narrowed[1]).to(matrix.dtype)

    return {name: replace(pair, A=as_stored(pair.A), B=as_stored(pair.B)) for name, pair in factors.items()}


def with_adapters(model: Any) -> Any:
    """The model with an adapter of each rank, in its own dtype."""
    wrapped = model
    for number, rank in enumerate(RANKS):
        config = LoraConfig(r=rank, lora_alpha=rank, target_modules=list(ALL_LINEAR))
        if number:
            wrapped.add_adapter(str(number), config, autocast_adapter_dtype=False)
        else:
            wrapped = get_peft_model(model, config, adapter_name="0", autocast_adapter_dtype=False)
    # Not .to(dtype): that would round the buffers as well, and rotate by the angles of no checkpoint.
    assert {parameter.dtype for parameter in wrapped.parameters()} == {next(model.parameters()).dtype}
    assert wrapped.base_model.model.model.rotary_emb.inv_freq.dtype == torch.float32
    return wrapped.eval()


def set_factors(wrapped: Any, factors: list[dict[str, LowRank]]) -> None:
    layers = dict(wrapped.base_model.model.named_modules())
    for number, of_one in enumerate(factors):
        for name, pair in of_one.items():
            layers[name].lora_A[str(number)].weight.copy_(pair.A)
            layers[name].lora_B[str(number)].weight.copy_(pair.B)


def judge(model: Any, case: Case, tokens: list[int]) -> Tensor:
    """The model's log probabilities, float32 [tokens, vocab], where the engine chose these tokens."""
    ids = torch.tensor([[*case.prompt, *tokens[:-1]]], device=model.device)
    if case.adapter is None:
        with model.disable_adapter():
            logits = model(ids).logits
    else:
        model.set_adapter(str(case.adapter))
        logits = model(ids).logits
    return logits[0, len(case.prompt) - 1 :].float().log_softmax(-1).cpu()


# --- figures ---


def compare(truth: list[Tensor], peft: list[Tensor], ours: list[Tensor]) -> dict[str, Any]:
    theirs, own = errors(peft, truth), errors(ours, truth)
    greedy = [bool((told.argmax(-1) == true.argmax(-1)).all()) for told, true in zip(ours, truth, strict=True)]
    same = [bool((told.argmax(-1) == true.argmax(-1)).all()) for told, true in zip(peft, truth, strict=True)]
    return {
        "bench": "gate",
        "label": "gate",
        "error_flora": mean(own),
        "error_peft": mean(theirs),
        "error_ratio": round(mean(own) / max(mean(theirs), 1e-9), 3),
        "error_flora_worst": max(own),
        "error_peft_worst": max(theirs),
        "rows": sum(len(true) for true in truth),
        "cases": len(truth),
        "greedy_equal_flora": sum(greedy),
        "greedy_equal_peft": sum(same),
    }


def errors(system: list[Tensor], truth: list[Tensor]) -> list[float]:
    return [
        float((told - true).norm() / (true - true.mean(-1, keepdim=True)).norm())
        for told, true in zip(system, truth, strict=True)
    ]


def rounding(rounded_truth: list[Tensor], truth: list[Tensor]) -> dict[str, Any]:
    """What rounding the adapters alone changes, in float32."""
    found = errors(rounded_truth, truth)
    return {"label": "gate/fp8", "error_rounding": mean(found), "error_rounding_worst": max(found)}


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def facts(args: argparse.Namespace, kernels: dict[str, str]) -> dict[str, Any]:
    import peft

    return {
        "shape": args.shape,
        "layers": args.layers,
        "modules": "all",
        "ranks": list(RANKS),
        "dtype": args.dtype,
        "adapter_dtype": args.adapter_dtype,
        "kernels": kernels,
        "transformers": transformers.__version__,
        "peft": peft.__version__,
    } | place_facts(surroundings(args))


if __name__ == "__main__":
    sys.exit(main())
