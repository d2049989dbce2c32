"""How many bytes does an adapter of a real fine-tune need, with embeddings, norms and narrow factors?

    FLORA_FIXTURES=KIT python benchmarks/real/bytes.py --out benchmarks/results/real_bytes.jsonl

FLORA_FIXTURES names the kit of accuracy.py. Each row is one `flora extract BASE TUNED OPTIONS --out FOLDER`: PEFT loads
the folder onto the base, merges it, and the merged model answers the first questions of the task's test side with
transformers, greedily, in float32 on the CPU. The tuned checkpoint answers the same questions first. `bytes` are those
of the registry's blob, where a tied table lies once; `folder_bytes` those of the PEFT folder, where it lies twice.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from pairs import commit, kit_folder, made
from peft import PeftModel
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

import flora

ALL = "--embeddings --vectors"
RECIPES = {
    "g2p": (
        "--rank 64",
        "--rank 64 --vectors",
        "--rank 64 --embeddings",
        f"--rank 64 {ALL}",
        f"--budget 20MB --dtype float8 {ALL}",
        f"--budget 40MB --dtype float8 {ALL}",
        f"--budget 67MB {ALL}",
        f"--budget 67MB --dtype float8 {ALL}",
        f"--budget 100MB --dtype float8 {ALL}",
    ),
    "lemma": (
        "--rank 8 --dtype float8",
        "--rank 16 --dtype float8",
        "--rank 64",
        "--rank 64 --dtype float8",
        f"--rank 64 --dtype float8 {ALL}",
        f"--budget 5MB --dtype float8 {ALL}",
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tasks", default="g2p,lemma")
    parser.add_argument("--only", help="one recipe instead of the list: the options of one `flora extract`")
    parser.add_argument("--questions", type=int, default=400)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--work", type=Path, help="keep checkpoints here, and use those that are there")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    kit = kit_folder()
    with tempfile.TemporaryDirectory() as folder:
        work = args.work or Path(folder)
        base = made(kit, work / "base", "make_base.py", work / "base")
        for task in args.tasks.split(","):
            tuned = made(kit, work / task, "make_tuned.py", task, base, work / task)
            for recipe in (args.only,) if args.only is not None else ("tuned", *RECIPES[task]):
                row = measure(task, recipe, base, tuned, args.questions, Path(folder))
                print(json.dumps(row), flush=True)
                if args.out:
                    with args.out.open("a") as out:
                        out.write(json.dumps(row) + "\n")


def measure(task: str, recipe: str, base: Path, tuned: Path, questions: int, folder: Path) -> dict[str, Any]:
    from eval_task import answer
    from tasks import TASKS, exact_match

    kept: dict[str, Any] = {}
    if recipe == "tuned":
        model = AutoModelForCausalLM.from_pretrained(tuned, dtype=torch.float32)
    else:
        report = extract(base, tuned, recipe, folder / "adapter")
        weights = folder / "adapter" / "adapter_model.safetensors"
        kept = {key: report[key] for key in ("kept_share_of_modules", "kept_share", "max_rank")}
        kept |= {"bytes": report["num_bytes"], "folder_bytes": weights.stat().st_size}
        model = merged(base, folder / "adapter")
    examples = TASKS[task].split().test[:questions]
    outputs = answer(model.eval(), AutoTokenizer.from_pretrained(base), examples, TASKS[task].max_new_tokens, 100)
    return {
        "task": task,
        "recipe": recipe,
        **kept,
        "exact_match": exact_match(examples, outputs),
        **TASKS[task].metrics(examples, outputs),
        "questions": len(examples),
        "device": "cpu",
        "dtype": "float32",
        "flora": flora.__version__,
        "torch": torch.__version__,
        "commit": commit(),
    }


def merged(base: Path, adapter: Path) -> nn.Module:
    """Base and adapter as one model. PEFT adds to each side of a tied table, so the head gets a table of its own."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    model.config.tie_word_embeddings = False
    return PeftModel.from_pretrained(model, adapter).merge_and_unload()


def extract(base: Path, tuned: Path, recipe: str, out: Path) -> dict[str, Any]:
    """What `flora extract --json` reports; the adapter goes to a registry for its bytes, and to `out`."""
    home = out.parent / "home"
    command = [sys.executable, "-m", "flora", "extract", base, tuned, *recipe.split(), "--name", tuned.name]
    done = subprocess.run(
        [*map(str, command), "--out", str(out), "--json"],
        check=True,
        capture_output=True,
        env=os.environ | {"FLORA_HOME": str(home)},
    )
    return json.loads(done.stdout)["adapters"][0]


if __name__ == "__main__":
    main()
