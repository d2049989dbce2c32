"""A real full fine-tune to study: every weight of a model trained on a task that needs no data.

    python benchmarks/real/finetune.py BASE spell TUNED --device cuda
    python benchmarks/real/finetune.py BASE sort TUNED --steps 200 --batch-size 64 --lr 1e-3     # a tiny BASE, on a CPU

BASE is any causal language model's folder in Hugging Face's form; TUNED becomes one like it, of the same dtype. AdamW
steps float32 weights, embeddings and norms included; on a GPU the forward pass is in bf16. Only the answer's tokens and
the end token are learned. On a CPU the same seed, threads and versions give the same bytes; a GPU's sums are not the
same bits everywhere, so there a second run gives a sibling. Prints one JSON line, with the share of right answers on
questions that were not trained on, before and after. study.py --pair takes it from there.
"""

import argparse
import json
import math
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random
from typing import Any

import torch
import transformers
from judge import Example, Judge
from made_tasks import TASKS
from pairs import commit
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

from flora.checkpoint import open_checkpoint


@dataclass(frozen=True, slots=True)
class Training:
    steps: int
    batch_size: int  # questions a step
    lr: float  # the peak: linear warm-up over a twentieth of the steps, then linear decay to zero
    seed: int
    num_train: int  # different questions
    eps: float = 1e-7
    betas: tuple[float, float] = (0.9, 0.98)
    max_norm: float = 1.0

    def lr_at(self, step: int) -> float:
        warmup = max(1, self.steps // 20)
        return self.lr * min((step + 1) / warmup, (self.steps - step) / (self.steps - warmup + 1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("base", type=Path)
    parser.add_argument("task", choices=sorted(TASKS))
    parser.add_argument("tuned", type=Path, help="a folder that does not exist")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--num-train", type=int, default=50_000)
    parser.add_argument("--questions", type=int, default=1000, help="of the test side, asked before and after")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--out", type=Path, help="append the row to this file")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    training = Training(args.steps, args.batch_size, args.lr, args.seed, args.num_train)
    row = fine_tune(args.base, args.task, args.tuned, training, args.questions, args.device)
    print(json.dumps(row), flush=True)
    if args.out:
        with args.out.open("a") as out:
            out.write(json.dumps(row) + "\n")


def fine_tune(
    base: Path, task: str, tuned: Path, training: Training, questions: int, device: str = "cpu"
) -> dict[str, Any]:
    """Writes `tuned`, a full fine-tune of `base` on `task`, and returns its row."""
    tuned.mkdir(parents=True)
    torch.manual_seed(training.seed)
    tokenizer = AutoTokenizer.from_pretrained(base)
    judge = Judge(tokenizer, TASKS[task].test(questions))
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).to(device)
    before = judge(model.eval())
    started = time.perf_counter()
    loss = train(model.train(), tokenizer, TASKS[task].train(training.num_train, training.seed), training)
    train_s = time.perf_counter() - started
    save(model, base, tuned)
    after = judge(AutoModelForCausalLM.from_pretrained(tuned, dtype=torch.float32).to(device).eval())
    return {
        "task": task,
        "base": open_checkpoint(base).name,
        **asdict(training),
        "last_loss": loss,
        "exact_match_before": before.exact_match,
        "exact_match": after.exact_match,
        "stderr": after.stderr,
        "nll_before": before.nll,
        "nll": after.nll,
        "questions": questions,
        "relative_change": relative_change(base, tuned),
        "train_s": round(train_s, 1),
        "device": torch.cuda.get_device_name() if device == "cuda" else device,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "commit": commit(),
    }


def train(model: nn.Module, tokenizer: Any, examples: Sequence[Example], training: Training) -> float:
    """Trains every weight in place. Returns the mean loss of the last steps, nats a token."""
    weights = list(model.parameters())
    optimizer = torch.optim.AdamW(
        weights, lr=training.lr, betas=training.betas, eps=training.eps, weight_decay=0.0, fused=weights[0].is_cuda
    )
    losses = []
    for step, (ids, learned) in enumerate(batches(tokenizer, examples, training, weights[0].device)):
        with _precision(weights[0].device):
            loss = answer_loss(model, ids, learned)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(weights, training.max_norm)
        for group in optimizer.param_groups:
            group["lr"] = training.lr_at(step)
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses[-20:]).mean().item()


def answer_loss(model: nn.Module, ids: Tensor, learned: Tensor) -> Tensor:
    """Mean cross-entropy of the learned tokens.

    ids      [batch, length]  padded on the right, where causal attention never looks
    learned  [batch, length]  True at the tokens to predict
    """
    hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
    logits = model.get_output_embeddings()(hidden[:, :-1][learned[:, 1:]])
    return F.cross_entropy(logits.float(), ids[:, 1:][learned[:, 1:]])


def batches(
    tokenizer: Any, examples: Sequence[Example], training: Training, device: torch.device
) -> Iterator[tuple[Tensor, Tensor]]:
    """`training.steps` batches of ids and learned: the examples in a shuffled order, again and again."""
    prompts = tokenizer([example.prompt for example in examples])["input_ids"]
    answers = tokenizer([" " + example.answers[0] for example in examples], add_special_tokens=False)["input_ids"]
    rows = [(len(p), [*p, *a, tokenizer.eos_token_id]) for p, a in zip(prompts, answers, strict=True)]
    random, order = Random(training.seed), list[int]()
    for _ in range(training.steps):
        while len(order) < training.batch_size:
            order += random.sample(range(len(rows)), len(rows))
        picked, order = [rows[i] for i in order[: training.batch_size]], order[training.batch_size :]
        length = 8 * math.ceil(max(len(ids) for _, ids in picked) / 8)  # a few shapes, not one a batch
        ids = torch.zeros(len(picked), length, dtype=torch.int64)
        learned = torch.zeros(len(picked), length, dtype=torch.bool)
        for i, (start, row) in enumerate(picked):
            ids[i, : len(row)] = torch.tensor(row)
            learned[i, start : len(row)] = True
        yield ids.to(device), learned.to(device)


def save(model: nn.Module, base: Path, tuned: Path) -> None:
    """The weights in the base's dtype, and the base's tokenizer beside them."""
    dtype = AutoModelForCausalLM.from_pretrained(base, dtype="auto").dtype
    model.to(dtype).save_pretrained(tuned)
    for path in [*base.glob("*token*"), *base.glob("*.jinja"), *base.glob("vocab*"), *base.glob("merges*")]:
        shutil.copyfile(path, tuned / path.name)


def relative_change(base: Path, tuned: Path) -> float:
    """Norm of the change over norm of the base, all weights together."""
    before, after = open_checkpoint(base), open_checkpoint(tuned)
    change = norm = 0.0
    for name in before.tensors:
        old = before.load(name).double()
        change += float((after.load(name).double() - old).square().sum())
        norm += float(old.square().sum())
    return math.sqrt(change / norm)


def _precision(device: torch.device) -> AbstractContextManager[Any]:
    return torch.autocast("cuda", torch.bfloat16) if device.type == "cuda" else nullcontext()


if __name__ == "__main__":
    main()
