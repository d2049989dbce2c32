"""Whether a model answers questions right, greedily, from little more than one forward pass over questions and answers.

Greedy decoding says an answer exactly if at every place of it the answer's next token is the likeliest one, and then
the end. So a question with its answer behind it tells in one pass what decoding would tell in as many as the answer has
tokens; and how likely the answer was, which still moves where the share of right answers stands. Where another token is
the likeliest, decoding went another way: to another answer, or to the same text in other tokens. The text said so far
tells which; in the second case the rest of the answer is put behind it and asked again. `tests/real/test_judge.py`
compares with `generate`.
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
    """One question with one of its answers."""

    question: int
    answer: str
    ids: tuple[int, ...]  # prompt, answer, end
    start: int  # of the answer
    said: int  # where the tokens begin that are not known to be said
    is_learnt: bool  # whether the answer is the one to weigh

    @property
    def places(self) -> range:
        """Of the tokens to compare with the model's."""
        return range(self.said, len(self.ids))


class Judge:
    """Questions as token ids, made once, and asked of as many models as one likes."""

    def __init__(self, tokenizer: Any, examples: Sequence[Example], max_new_tokens: int = 64) -> None:
        """`max_new_tokens`: an answer that is not at its end by then is wrong, as when decoding stops there."""
        self._tokenizer = tokenizer
        self._max_new_tokens = max_new_tokens
        self._num_questions = len(examples)
        self._rows = [row for question, example in enumerate(examples) for row in self._first(question, example)]
        texts = tokenizer.batch_decode([[token] for token in range(len(tokenizer))])
        lines = [token for token, text in enumerate(texts) if text.lstrip(" \t").startswith("\n")]
        self._ends = {tokenizer.eos_token_id, *lines}  # an answer is read up to its first line's end

    @torch.inference_mode()
    def __call__(self, model: nn.Module) -> Verdict:
        """What `model`, a decoder of transformers in eval mode, answers: on its own device, in its own dtype."""
        right, nats, num_tokens = [False] * self._num_questions, 0.0, 0
        rows, is_first = self._rows, True
        while rows:
            asked_again = []
            for row, guesses, losses in _ask(model, rows):
                if is_first and row.is_learnt:
                    nats, num_tokens = nats + sum(losses), num_tokens + len(losses)
                place = self._departure(row, guesses)
                if place is None:
                    right[row.question] = True
                elif (again := self._other_tokens(row, place, guesses[place - row.said])) is not None:
                    asked_again.append(again)
            rows, is_first = asked_again, False
        return Verdict(tuple(right), nats / num_tokens)

    def _first(self, question: int, example: Example) -> Iterator[_Row]:
        prompt = self._tokenizer(example.prompt)["input_ids"]
        for i, answer in enumerate(example.answers):
            ids = (*prompt, *self._tokens(" " + answer), self._tokenizer.eos_token_id)
            yield _Row(question, answer, ids, len(prompt), len(prompt), i == 0)

    def _tokens(self, text: str) -> list[int]:
        return self._tokenizer(text, add_special_tokens=False)["input_ids"] if text else []

    def _departure(self, row: _Row, guesses: Sequence[int]) -> int | None:
        """The first place where the model says another token than the row's; None if it says all of them."""
        for place, guess in zip(row.places, guesses, strict=True):
            is_end = place == len(row.ids) - 1
            if guess not in self._ends if is_end else guess != row.ids[place]:
                return place
        return None

    def _other_tokens(self, row: _Row, place: int, guess: int) -> _Row | None:
        """The row in the model's own tokens up to `place`, if what it has said by then begins the answer."""
        said = (*row.ids[row.start : place], guess)
        text = self._tokenizer.decode(said, skip_special_tokens=True).lstrip()
        if guess in self._ends or len(said) >= self._max_new_tokens or not row.answer.startswith(text):
            return None
        ids = (*row.ids[: row.start], *said, *self._tokens(row.answer[len(text) :]), self._tokenizer.eos_token_id)
        return _Row(row.question, row.answer, ids, row.start, place + 1, row.is_learnt)


def _ask(model: nn.Module, rows: Sequence[_Row]) -> Iterator[tuple[_Row, list[int], list[float]]]:
    """Each row with the likeliest token at each of its places, and the nats that the row's own token costs there."""
    device = next(model.parameters()).device
    for batch in _batches(sorted(rows, key=lambda row: len(row.ids)), _BATCH_TOKENS[device.type]):
        ids, asked = _tensors(batch, device)
        hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
        logits = model.get_output_embeddings()(hidden[:, :-1][asked]).float()
        counts = [len(row.places) for row in batch]
        guesses = logits.argmax(-1).cpu().split(counts)
        losses = F.cross_entropy(logits, ids[:, 1:][asked], reduction="none").double().cpu().split(counts)
        for row, guess, loss in zip(batch, guesses, losses, strict=True):
            yield row, guess.tolist(), loss.tolist()


def _batches(rows: Sequence[_Row], num_tokens: int) -> Iterator[Sequence[_Row]]:
    """Runs of `rows`, which ascend in length, of at most so many tokens once padded, or of one row."""
    start = 0
    for end in range(1, len(rows) + 1):
        if end == len(rows) or (end + 1 - start) * len(rows[end].ids) > num_tokens:
            yield rows[start:end]
            start = end


def _tensors(rows: Sequence[_Row], device: torch.device) -> tuple[Tensor, Tensor]:
    """ids int64 [rows, length], padded on the right, where causal attention never looks; and asked
    bool [rows, length - 1], True where the next token is at one of the row's places."""
    length = len(rows[-1].ids)
    ids = torch.tensor([[*row.ids, *[0] * (length - len(row.ids))] for row in rows], device=device)
    asked = torch.tensor([[place in row.places for place in range(1, length)] for row in rows], device=device)
    return ids, asked
