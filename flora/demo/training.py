"""Next-token training of the base, and full fine-tuning of every weight on one task."""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor, nn

from flora.demo.alphabet import END, START, encode
from flora.demo.language import BASE_SKILLS, Example, Skill, training_examples
from flora.demo.model import LlamaShape, TinyLlama

_IGNORED = -100  # cross_entropy's word for a position that is not learnt


@dataclass(frozen=True, slots=True)
class Training:
    steps: int
    batch_size: int  # examples a step
    peak_lr: float
    embedding_lr_share: float = 1.0  # learning rate of the token embedding, as a share of the others'
    answers_only: bool = False  # learn the answer's tokens and not the prompt's
    warmup_steps: int = 20


BASE_TRAINING = Training(steps=300, batch_size=64, peak_lr=1e-3)  # of five seeds all learn; of three one not in 210
# The embedding trains too, but slowly: an adapter of linear layers leaves its change out, and where it learns as fast
# as they do, part of the skill goes there (measured on three seeds: vigenere's adapter then loses 0.010 to 0.025).
TASK_TRAINING = Training(
    steps=85, batch_size=64, peak_lr=1e-3, embedding_lr_share=0.1, answers_only=True, warmup_steps=10
)


@dataclass(frozen=True, slots=True)
class TrainingProgress:
    step: int
    steps: int
    loss: float
    elapsed_s: float


ProgressCallback = Callable[[TrainingProgress], None]


def train_base(
    shape: LlamaShape, training: Training = BASE_TRAINING, seed: int = 0, progress: ProgressCallback | None = None
) -> TinyLlama:
    """A base model, trained from nothing on every token of the skills' lines."""
    model = TinyLlama(shape, seed)
    _train(model, training_examples(BASE_SKILLS, seed), training, progress)
    return model


def fine_tune(
    model: TinyLlama,
    task: Skill,
    training: Training = TASK_TRAINING,
    seed: int = 0,
    progress: ProgressCallback | None = None,
) -> None:
    """Trains all weights of `model` on the task, in place."""
    _train(model, training_examples([task], seed), training, progress)


def _train(
    model: TinyLlama, examples: Iterator[Example], training: Training, progress: ProgressCallback | None
) -> None:
    start = time.monotonic()
    optimizer = _optimizer(model, training)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _lr_share(step, training))
    for step in range(1, training.steps + 1):
        tokens, targets = _batch(list(islice(examples, training.batch_size)), training.answers_only)
        loss = nn.functional.cross_entropy(model(tokens).flatten(0, 1), targets.flatten(), ignore_index=_IGNORED)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if progress:
            progress(TrainingProgress(step, training.steps, loss.item(), time.monotonic() - start))


def _optimizer(model: TinyLlama, training: Training) -> torch.optim.Optimizer:
    embedding = model.model.embed_tokens.weight
    others = [parameter for parameter in model.parameters() if parameter is not embedding]
    groups = [
        {"params": others, "lr": training.peak_lr},
        {"params": [embedding], "lr": training.peak_lr * training.embedding_lr_share},
    ]
    return torch.optim.AdamW(groups, betas=(0.9, 0.98), weight_decay=0.0)


def _lr_share(step: int, training: Training) -> float:
    """Linear warm-up, then a half cosine down to a tenth."""
    warm = min(1.0, (step + 1) / training.warmup_steps)
    return warm * (0.1 + 0.45 * (1 + math.cos(math.pi * step / training.steps)))


def _batch(examples: Sequence[Example], answers_only: bool) -> tuple[Tensor, Tensor]:
    """tokens and targets, int64 [batch, length]; target i is token i + 1, or ignored."""
    rows = [([START, *encode(e.prompt)], [*encode(e.answer), END]) for e in examples]
    length = max(len(prompt) + len(answer) for prompt, answer in rows) - 1
    tokens = torch.full((len(rows), length), END)
    targets = torch.full((len(rows), length), _IGNORED)
    for i, (prompt, answer) in enumerate(rows):
        line = torch.tensor(prompt + answer)
        first = len(prompt) - 1 if answers_only else 0
        tokens[i, : len(line) - 1] = line[:-1]
        targets[i, first : len(line) - 1] = line[first + 1 :]
    return tokens, targets
