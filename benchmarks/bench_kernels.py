"""How close do the Triton kernels come to the rate at which this GPU reads memory?

    python benchmarks/bench_kernels.py [--out FILE.jsonl] [--sweep [--shard 0/8]]

Decoding is bound by bytes: every step reads each running adapter once and each sequence's keys and values once. So the
figure of merit is bytes that must be read (true ranks, true lengths) over the time of a CUDA-graph replay. Errors
against float32 arithmetic on the same numbers come before any timing, and a wrong result ends the run. Beside ours: the
same adapters in fp8, a plain copy, a plain read of as many bytes in as many launches (the floor of LoRA's), adapters
padded to one rank under torch.bmm, torch's attention over contiguous keys and values.
"""

import argparse
import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import torch
import triton
from kernel_attention import bench_attention, check_attention
from kernel_floor import bench_floor
from kernel_fp8 import bench_fp8
from kernel_lora import bench_cases, bench_lora, bench_peer, check_lora
from kernel_sweep import sweep
from kernel_world import LLAMA_8B, SEED, TINY, Bench, build_adapters
from peer_sglang import SglangLora
from peer_vllm import VllmLora

from flora.kernels.triton_ops import TritonOps


def copy_rate(bench: Bench) -> None:
    source = torch.randn(2**28 if bench.device.type == "cuda" else 2**16, device=bench.device)
    target = torch.empty_like(source)
    seconds = bench.seconds(lambda: target.copy_(source))
    bench.record(op="copy", tb_s=2 * source.numel() * 4 / seconds / 1e12)


def headline(bench: Bench, ops: TritonOps) -> dict[str, float | None]:
    """What is claimed: shrink and expand of q, k, v, o, and of all seven; decode attention where it is slowest."""
    lora = {
        str(row["modules"]): row["tb_s"]
        for row in bench.rows
        if row.get("op") == "lora" and row.get("overlap") == ops.overlap and "tb_s" in row
    }
    decode = [row["tb_s"] for row in bench.rows if row.get("op") == "decode attention"]
    return {
        "lora_tb_s": lora.get("q,k,v,o"),
        "lora_all_tb_s": lora.get("all seven"),
        "decode_tb_s": min(decode, default=None),
    }


def environment(bench: Bench, ops: TritonOps, label: str) -> dict[str, object]:
    command = ["git", "rev-parse", "--verify", "--quiet", "HEAD"]
    commit = subprocess.run(command, capture_output=True, text=True).stdout.strip()
    name = torch.cuda.get_device_name() if bench.device.type == "cuda" else "cpu"
    return {
        "bench": "kernels",
        "label": label,
        "device": name,
        "gpu": name if bench.device.type == "cuda" else None,
        **headline(bench, ops),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "commit": os.environ.get("FLORA_COMMIT") or commit or "unknown",
        "seed": SEED,
        "kernels": ops.name,
        "tuning": dataclasses.asdict(ops.tuning),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="append one JSON line to this file")
    parser.add_argument(
        "--sweep", action="store_true", help="first time every tiling of `variants`, then run with the best"
    )
    parser.add_argument("--parts", default="lora,wide_lora,decode,prefill", help="with --sweep: only these tilings")
    parser.add_argument("--shard", default="0/1", help="with --sweep: only each N-th tiling from the I-th on, as I/N")
    parser.add_argument("--adapters", type=int, default=128)
    parser.add_argument("--vllm", type=Path, metavar="FOLDER", help="where vLLM is installed: its kernels beside ours")
    parser.add_argument("--sglang", type=Path, metavar="FOLDER", help="where SGLang's wheel is unpacked: likewise")
    parser.add_argument("--dry", action="store_true", help="tiny sizes on this machine's CPU, under TRITON_INTERPRET=1")
    args = parser.parse_args()
    torch.manual_seed(SEED)
    device = torch.device("cpu" if args.dry else "cuda")
    bench = Bench(
        device, TINY if args.dry else LLAMA_8B, [], repeats=20, dtype=torch.float16 if args.dry else torch.bfloat16
    )
    ops = TritonOps(num_sms=2) if args.dry else TritonOps.for_device(device)
    weights, ranks = build_adapters(bench, 8 if args.dry else args.adapters, layers=1 if args.dry else 4)
    check_lora(bench, ops, weights, ranks)
    check_lora(bench, ops, weights, ranks, rows_each=20)
    if args.sweep:
        shard, shards = args.shard.split("/")
        ops = sweep(bench, ops, weights, ranks, args.parts.split(","), (int(shard), int(shards)))
        check_lora(bench, ops, weights, ranks)
        check_lora(bench, ops, weights, ranks, rows_each=20)
    if not args.sweep or args.shard == "0/1":
        check_attention(bench, ops)
        copy_rate(bench)
        bench_lora(bench, ops, weights, ranks)
        bench_floor(bench, weights, ranks)
        bench_cases(bench, ops, weights, ranks)
        bench_fp8(bench, ops, weights, ranks)
        if not args.dry:
            bench_attention(bench, ops)
        layers = weights.modules.shape[1]
        del weights  # slots of the highest rank take twice as much
        if args.vllm:
            sys.path.append(str(args.vllm))  # last: its own pydantic and the like stay behind ours
            bench_peer(bench, "vllm lora", lambda slots: VllmLora(slots, len(slots), device), ranks, layers)
        if args.sglang:
            bench_peer(bench, "sglang lora", lambda slots: SglangLora(args.sglang, slots, ranks, device), ranks, layers)
    if args.out:
        label = "kernels/sweep" if args.sweep else "kernels"  # a claim's rows are of the defaults
        with args.out.open("a") as file:
            file.write(json.dumps(environment(bench, ops, label) | {"rows": bench.rows}) + "\n")


if __name__ == "__main__":
    main()
