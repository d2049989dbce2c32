"""What does an adapter keep of a real fine-tune's skill, by rank?

    FLORA_FIXTURES=KIT python benchmarks/real/accuracy.py --out benchmarks/results/real_accuracy.jsonl

FLORA_FIXTURES names the kit that rebuilds SmolLM2-135M-Instruct and two full fine-tunes of it (g2p: a word to its
phonemes; lemma: an inflected form to lemma and tags). Base, tuned checkpoints and adapters answer the first questions
of each test side, greedily, over HTTP from `flora serve`; the tuned checkpoints are served as bases of their own, so
that all rows come from one engine, device and dtype. One JSON line a row.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from openai import OpenAI
from pairs import commit, kit_folder, made

import flora
from flora.cli.server_process import running_server

CONCURRENT = 48


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tasks", default="lemma,g2p")
    parser.add_argument("--ranks", default="8,16,32,64,128,256")
    parser.add_argument("--questions", type=int, default=400)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--adapter-dtypes", default="auto", help="of adapters in the pool, each asked: auto,float8")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    kit = kit_folder()
    from tasks import TASKS

    where = ["--device", args.device, "--dtype", args.dtype]
    with tempfile.TemporaryDirectory() as folder:
        work, home = Path(folder), Path(folder) / "home"
        base = made(kit, work / "base", "make_base.py", work / "base")
        for name in args.tasks.split(","):
            task = TASKS[name]
            examples = task.split().test[: args.questions]
            tuned = made(kit, work / name, "make_tuned.py", name, base, work / name)

            def ask(url: str, model: str, rest: dict[str, Any], task: Any = task, examples: list = examples) -> None:
                outputs = answers(url, model, examples, task.max_new_tokens)
                right = sum(output in example.answers for example, output in zip(examples, outputs, strict=True))
                row = {
                    "task": task.name,
                    **rest,
                    "exact_match": right / len(examples),
                    **task.metrics(examples, outputs),
                    "questions": len(examples),
                    "device": args.device,
                    "dtype": args.dtype,
                    "flora": flora.__version__,
                    "torch": torch.__version__,
                    "commit": commit(),
                }
                print(json.dumps(row), flush=True)
                if args.out:
                    with args.out.open("a") as out:
                        out.write(json.dumps(row) + "\n")

            with running_server([str(tuned), *where], home) as url:
                ask(url, tuned.name, {"model": "tuned"})
            reports = {rank: extract(base, tuned, int(rank), home) for rank in args.ranks.split(",")}
            for number, narrow in enumerate(args.adapter_dtypes.split(",")):
                with running_server([str(base), *where, "--adapter-dtype", narrow], home) as url:
                    if not number:
                        ask(url, "base", {"model": "base"})
                    for rank, report in reports.items():
                        kept = {key: report[key] for key in ("kept_share_of_modules", "kept_share", "num_bytes")}
                        told = {"model": "adapter", "rank": int(rank), "adapter_dtype": narrow, **kept}
                        ask(url, report["id"].partition("@")[0], told)


def extract(base: Path, tuned: Path, rank: int, home: Path) -> dict[str, Any]:
    command = [sys.executable, "-m", "flora", "extract", base, tuned, "--rank", rank]
    command += ["--name", f"{tuned.name}-r{rank}", "--json"]
    done = subprocess.run(
        list(map(str, command)), check=True, capture_output=True, env=os.environ | {"FLORA_HOME": str(home)}
    )
    return json.loads(done.stdout)["adapters"][0]


def answers(url: str, model: str, examples: list, max_tokens: int) -> list[str]:
    """Each example's greedy answer: its first line, as the kit's own evaluation reads it."""
    client = OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=900)

    def answer(example: Any) -> str:
        done = client.completions.create(model=model, prompt=example.prompt, max_tokens=max_tokens, temperature=0)
        return (done.choices[0].text.strip().splitlines() or [""])[0].strip()

    with ThreadPoolExecutor(CONCURRENT) as pool:
        return list(pool.map(answer, examples))


if __name__ == "__main__":
    main()
