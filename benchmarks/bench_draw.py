"""What does a step's draw take: a temperature, top-p, top-k, log probabilities, by the number of rows that ask for it?

    python benchmarks/bench_draw.py --out benchmarks/results/draw.jsonl

us is the device's time, medians of replayed CUDA graphs: `draw` as the engine draws, `sort` with a sort of each row
(float32; greedy: torch's own maximum). host_us is what the interpreter takes until it has launched all of it. Tokens
are the float64 sampler's first, or nothing is timed. On a CPU the engine's sampler there is timed, by calls.
"""

import statistics
import time
from collections.abc import Callable, Iterator

import torch
from kernel_world import LLAMA_8B, Bench
from torch import Tensor

from flora.bench.row import append_row, encode_row
from flora.bench.script import ints, make_parser, place_facts, surroundings
from flora.serve.engine.philox import uniform
from flora.serve.engine.sampler import Draw, draw_token, sample
from flora.serve.request import SamplingParams

REPEATS, SEED, CHECKED = 20, 0, 8
CASES: dict[str, dict[str, float | int]] = {
    "greedy": {"temperature": 0.0},
    "temperature": {"temperature": 0.7},
    "top_p": {"temperature": 0.7, "top_p": 0.9},
    "top_k": {"temperature": 0.7, "top_k": 50},
    "both": {"temperature": 0.7, "top_p": 0.9, "top_k": 50},
    "logprobs": {"temperature": 0.7, "logprobs": 5},
}


def by_sort(logits: Tensor, sampling: SamplingParams, u: Tensor) -> Tensor:
    """Weights by falling logit, those past the cuts taken away, and a running sum."""
    if sampling.is_greedy:
        return logits.argmax(-1)
    ordered, tokens = (logits.float() / sampling.temperature).sort(dim=-1, descending=True)
    weights = ordered.softmax(-1)
    if sampling.top_k is not None:
        weights[:, sampling.top_k :] = 0.0
    sums = weights.cumsum(-1)
    weights = weights.masked_fill(sums - weights >= sampling.top_p * sums[:, -1:], 0.0)
    sums = weights.cumsum(-1)
    return tokens.gather(1, torch.searchsorted(sums, u[:, None] * sums[:, -1:]).clamp_max(logits.shape[1] - 1))[:, 0]


def on_gpu(logits: Tensor, draws: list[Draw], warps: int | None) -> tuple[Callable[[], Tensor], Callable[[], object]]:
    """(the kernels of a draw, which a graph can hold; all of it, with what the host packs)."""
    from flora.kernels.draw import draw_tokens
    from flora.serve.engine.cuda.sampler import pack_draws, top_logprobs

    asked = [(row, draw) for row, draw in enumerate(draws) if not draw.sampling.asks_likeliest]
    packed = pack_draws(asked, logits.device)

    def kernels() -> Tensor:
        likeliest = logits.max(-1)
        draw_tokens(logits, likeliest.values, likeliest.indices, packed, warps=warps)
        return likeliest.indices

    likeliest = logits.max(-1)

    def whole() -> None:
        tokens = likeliest.indices.clone()
        sums = draw_tokens(logits, likeliest.values, tokens, pack_draws(asked, logits.device), warps=warps)
        top_logprobs(logits, tokens, sums, asked)

    return kernels, whole


def host_us(step: Callable[[], object]) -> float:
    times = []
    for _ in range(REPEATS):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        start_s = time.perf_counter()
        step()
        times.append(time.perf_counter() - start_s)
    return statistics.median(times) * 1e6


def check(case: str, tokens: list[int], logits: Tensor, draws: list[Draw]) -> None:
    for token, row, draw in zip(tokens, logits[:CHECKED].float().cpu(), draws, strict=False):
        sampling, u = draw.sampling, uniform(draw.sampling.seed, draw.index)
        wanted = int(row.argmax()) if sampling.is_greedy else draw_token(row, sampling, u)
        if token != wanted:
            raise SystemExit(f"{case}: token {token} is drawn and {wanted} is right: nothing was timed")


def measure(logits: Tensor, case: str, warps: int | None) -> Iterator[tuple[str, dict[str, float] | float]]:
    fields = {"max_tokens": 1, "top_p": 1.0} | CASES[case]
    draws = [Draw(SamplingParams(**fields, seed=SEED + row), 7) for row in range(len(logits))]  # type: ignore[arg-type]
    if logits.device.type == "cpu":
        check(case, [drawn.token or 0 for drawn in sample(logits, draws)], logits, draws)
        yield "host_us", round(host_us(lambda: sample(logits, draws)), 1)
        return
    kernels, whole = on_gpu(logits, draws, warps)
    check(case, kernels().tolist(), logits, draws)
    u = torch.tensor([uniform(draw.sampling.seed, draw.index) for draw in draws], device=logits.device)
    bench = Bench(logits.device, LLAMA_8B, [], REPEATS)
    steps = {"draw": kernels, "sort": lambda: by_sort(logits, draws[0].sampling, u.float())}
    yield "us", {name: round(bench.seconds(step) * 1e6, 1) for name, step in steps.items()}
    yield "host_us", round(host_us(whole), 1)


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--rows", type=ints, default=(1, 32, 256))
    parser.add_argument("--vocab", type=ints, default=(128_256, 32_000))
    parser.add_argument("--warps", type=int, help="of a program on a GPU, where they are not to be the engine's")
    args = parser.parse_args()
    where, device = surroundings(args), torch.device(args.device)
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    for vocab in args.vocab:
        for rows in args.rows:
            noise = torch.randn(rows, vocab, generator=torch.Generator().manual_seed(SEED))
            logits = (3 * noise).to(dtype).to(device)
            for case in CASES:
                row = {"bench": "draw", "case": case, "rows": rows, "vocab": vocab, "seed": SEED}
                row |= {
                    "dtype": str(dtype).removeprefix("torch."),
                    **dict(measure(logits, case, args.warps)),
                    **place_facts(where),
                }
                row |= {"warps": args.warps} if args.warps else {}
                print(encode_row(row), flush=True)
                if args.out:
                    append_row(args.out, row)


if __name__ == "__main__":
    main()
