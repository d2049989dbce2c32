"""Whether a model answers questions right, greedily, from one forward pass over each question with its answers.

Greedy decoding says an answer exactly if at every place of it the answer's own next token is the likeliest one, and
after it the end. So a question with its answer behind it tells, in one pass, what decoding would tell in as many passes
as the answer has tokens; and how likely the answer was, which moves where the share of right answers stands still. An
answer counts in the tokens that its tokenizer makes of it: the same text in other tokens, which decoding could say too,
does not. `tests/real/test_judge.py` compares with `generate`.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

_BATCH_TOKENS = {"cpu": 2048, "cuda": 65536}  # of one forward pass, padding included


class Example(Protocol):
    """A question and its answers, each of which is right; the first is the one that was learnt."""

    @property
    def prompt(self) -> str: ...
    @property
    def answers(self) -> Sequence[str]: ...


@dataclass(frozen=True, slots=True)
class Verdict:
    right: tuple[bool, ...]  # of each question
    nll: float  # nats a token of the first answers, their ends included

    @property
    def exact_match(self) -> float:
        return sum(self.right) / len(self.right)

    @property
    def stderr(self) -> float:
        """Binomial standard error of the share."""
        return math.sqrt(self.exact_match * (1 - self.exact_match) / len(self.right))


@dataclass(frozen=True, slots=True)
class _Row:
    question: int
    ids: tuple[int, ...]  # prompt, answer, end
    start: int  # of the answer
    is_first: bool  # of the question's answers


class Judge:
    """Questions as token ids, made once, and asked of as many models as one likes."""

    def __init__(self, tokenizer: Any, examples: Sequence[Example]) -> None:
        self._num_questions = len(examples)
        self._rows = sorted(_rows(tokenizer, examples), key=lambda row: len(row.ids))
        self._ends = _ends(tokenizer)

    @torch.inference_mode()
    def __call__(self, model: nn.Module) -> Verdict:
        """What `model`, a decoder of transformers in eval mode, answers: on its own device, in its own dtype."""
        device = next(model.parameters()).device
        ends = torch.tensor(self._ends, device=device)
        right, nats, tokens = [False] * self._num_questions, 0.0, 0
        for rows in _batches(self._rows, _BATCH_TOKENS[device.type]):
            ids, asked = _tensors(rows, device)
            hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
            logits = model.get_output_embeddings()(hidden[:, :-1][asked]).float()
            wanted = ids[:, 1:][asked]
            guess = logits.argmax(-1)
            is_end = wanted == self._ends[0]
            says = torch.where(is_end, torch.isin(guess, ends), guess == wanted)
            loss = F.cross_entropy(logits, wanted, reduction="none").double()
            lengths = [len(row.ids) - row.start for row in rows]
            for row, said, lost in zip(rows, says.cpu().split(lengths), loss.cpu().split(lengths), strict=True):
                right[row.question] |= bool(said.all())
                if row.is_first:
                    nats, tokens = nats + float(lost.sum()), tokens + len(lost)
        return Verdict(tuple(right), nats / tokens)


def _rows(tokenizer: Any, examples: Sequence[Example]) -> Iterator[_Row]:
    for question, example in enumerate(examples):
        prompt = tokenizer(example.prompt)["input_ids"]
        for i, answer in enumerate(example.answers):
            reply = tokenizer(" " + answer, add_special_tokens=False)["input_ids"]
            yield _Row(question, (*prompt, *reply, tokenizer.eos_token_id), len(prompt), i == 0)


def _ends(tokenizer: Any) -> list[int]:
    """The end of turn, then every token that starts a new line: an answer is read up to there."""
    texts = tokenizer.batch_decode([[i] for i in range(len(tokenizer))])
    return [tokenizer.eos_token_id, *(i for i, text in enumerate(texts) if text.lstrip(" \t").startswith("\n"))]


def _batches(rows: Sequence[_Row], num_tokens: int) -> Iterator[Sequence[_Row]]:
    """Runs of `rows`, which ascend in length, of at most so many tokens once padded."""
    start = 0
    for end in range(1, len(rows) + 1):
        if end == len(rows) or (end + 1 - start) * len(rows[end].ids) > num_tokens:
            yield rows[start:end]
            start = end


def _tensors(rows: Sequence[_Row], device: torch.device) -> tuple[Tensor, Tensor]:
    """ids int64 [rows, length], padded on the right, where causal attention never looks; asked bool [rows, length - 1],
    True where the next token belongs to an answer."""
    length = len(rows[-1].ids)
    ids = torch.tensor([[*row.ids, *[0] * (length - len(row.ids))] for row in rows], device=device)
    places = torch.arange(1, length)
    asked = torch.stack([(places >= row.start) & (places < len(row.ids)) for row in rows])
    return ids, asked.to(device)
