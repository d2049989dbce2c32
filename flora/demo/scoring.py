"""Exact match by greedy decoding, with the plain-torch model."""

from collections.abc import Sequence

import torch

from flora.demo.alphabet import END, START, decode, encode
from flora.demo.language import Example
from flora.demo.model import TinyLlama

MAX_ANSWER_TOKENS = 10  # a right answer has at most six letters and the end token


def exact_match(model: TinyLlama, examples: Sequence[Example]) -> float:
    """Share of the examples that the model answers letter for letter. Prompts have one length."""
    answers = greedy_answers(model, [example.prompt for example in examples])
    right = sum(is_right(answer, example) for answer, example in zip(answers, examples, strict=True))
    return right / len(examples)


def is_right(answer: str, example: Example) -> bool:
    return answer == example.answer


@torch.no_grad()
def greedy_answers(model: TinyLlama, prompts: Sequence[str]) -> list[str]:
    """What the model says after each prompt, up to its end token."""
    tokens = torch.tensor([[START, *encode(prompt)] for prompt in prompts])
    asked = tokens.shape[1]
    for _ in range(MAX_ANSWER_TOKENS):
        tokens = torch.cat([tokens, model(tokens)[:, -1:].argmax(-1)], 1)
    return [_until_end(row.tolist()) for row in tokens[:, asked:]]


def _until_end(ids: list[int]) -> str:
    return decode(ids[: ids.index(END)] if END in ids else ids)
