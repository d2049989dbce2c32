"""Where a step's milliseconds go: torch's profiler over steps in the middle of one of `flora bench suite`'s entries.

    python benchmarks/profile_steps.py paper S2/2000 --skip 1000 --steps 60 --out profile.jsonl

The entry's own row is not kept: a profiled run is slower. A line of JSON for the steps together: what they held, the
time that they took, and each kernel's share of it. Kernels that run side by side add up to more than the time.
"""

import argparse
import json
import statistics
import tempfile
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from flora.bench.row import commit_of_this_code
from flora.serve.engine.cuda.runner import CudaRunner
from flora.serve.engine.cuda.step import CudaStep
from flora.serve.engine.schedule.scheduler import Chunk

Launch = Callable[[CudaRunner, Sequence[Chunk], Sequence[int | None]], CudaStep]


class StepProfile:
    """A launch that profiles the steps after the first `skip` of them, warm-up counted."""

    def __init__(self, launch: Launch, skip: int, steps: int) -> None:
        self._launch = launch
        self._first, self._end = skip, skip + steps
        self._num_launched = 0
        self._profile = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA])
        self.held: list[dict[str, int]] = []  # by each profiled step
        self.spans: list[tuple[float, float, str]] = []  # begin and end in us, and name, of what ran on the device

    def __call__(self, runner: CudaRunner, chunks: Sequence[Chunk], adapter_slots: Sequence[int | None]) -> CudaStep:
        if self._num_launched == self._first:
            torch.cuda.synchronize()
            self._profile.start()
        if self._first <= self._num_launched < self._end:
            self.held.append(_held(chunks, adapter_slots))
        if self._num_launched == self._end:
            self._stop()
        self._num_launched += 1
        return self._launch(runner, chunks, adapter_slots)

    def _stop(self) -> None:
        torch.cuda.synchronize()
        self._profile.stop()
        self.spans = sorted(
            (event.time_range.start, event.time_range.end, event.name)
            for event in self._profile.events()
            if event.device_type == torch.autograd.DeviceType.CUDA
        )


def _held(chunks: Sequence[Chunk], adapter_slots: Sequence[int | None]) -> dict[str, int]:
    return {
        "rows": sum(chunk.count for chunk in chunks),
        "sequences": len(chunks),
        "context": sum(chunk.start + 1 for chunk in chunks if chunk.count == 1),
        "distinct": len({slot for slot in adapter_slots if slot is not None}),
    }


def summary(profile: StepProfile) -> dict[str, Any]:
    """Means of a step: ms, what it held, and the kernels by their ms."""
    steps, first = len(profile.held), profile.spans[0][0]
    kernels: dict[str, list[float]] = defaultdict(list)
    busy, end = 0.0, first
    for begin, until, name in profile.spans:
        kernels[name].append(until - begin)
        busy += max(0.0, until - max(begin, end))
        end = max(end, until)
    of_step = {
        name: {"ms": sum(took) / steps / 1e3, "launches": len(took) / steps, "us": statistics.mean(took)}
        for name, took in kernels.items()
    }
    return {
        "steps": steps,
        "with_prompts": sum(held["rows"] > held["sequences"] for held in profile.held),
        **{name: statistics.mean(held[name] for held in profile.held) for name in profile.held[0]},
        "step_ms": (end - first) / steps / 1e3,
        "busy_ms": busy / steps / 1e3,
        "kernels": dict(sorted(of_step.items(), key=lambda item: -item[1]["ms"])),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("suite")
    parser.add_argument("label")
    parser.add_argument("--skip", type=int, default=1000, help="steps, those of the warm-up among them")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--commit", default=commit_of_this_code() or "unknown")
    parser.add_argument("--out", type=Path, help="append the line here")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("steps are profiled on a GPU, and this machine has none")
    profile = StepProfile(CudaRunner.launch, args.skip, args.steps)
    CudaRunner.launch = lambda runner, chunks, slots: profile(runner, chunks, slots)  # type: ignore[method-assign]

    from flora.cli import main as flora

    with tempfile.TemporaryDirectory() as folder:
        rows = str(Path(folder) / "rows.jsonl")
        code = flora(["bench", "suite", args.suite, "--only", args.label, "--out", rows, "--commit", args.commit])
    if code or not profile.spans:
        raise SystemExit(code or f"{args.label} ended before step {args.skip + args.steps}")
    facts = {"bench": "profile", "label": f"profile/{args.label}", "gpu": torch.cuda.get_device_name()}
    row = facts | {"torch": torch.__version__, "commit": args.commit} | summary(profile)
    print(f"{row['step_ms']:.2f} ms a step, {row['busy_ms']:.2f} of them with something on the GPU")
    for name, share in list(row["kernels"].items())[:25]:
        print(f"{share['ms']:8.3f} ms {share['launches']:7.1f} x {share['us']:8.2f} us  {name[:90]}")
    if args.out:
        with args.out.open("a") as file:
            file.write(json.dumps(row) + "\n")


if __name__ == "__main__":  # loaders are processes that import this file again
    main()
