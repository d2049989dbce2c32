"""The next token of each row: the likeliest one, or a draw that depends on the row's logits, its seed and index alone.

Rows are drawn one at a time from a copy: that a draw is the same alone and in any batch then holds by construction.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from flora.serve.engine.philox import uniform
from flora.serve.messages import TokenLogprobs
from flora.serve.request import SamplingParams


@dataclass(frozen=True, slots=True)
class Draw:
    """What one row asks for."""

    sampling: SamplingParams
    index: int  # of the token in its answer: the counter of its random number


@dataclass(frozen=True, slots=True)
class Drawn:
    token: int | None  # None: the row's logits are not finite
    logprobs: TokenLogprobs | None = None


def sample(logits: Tensor, draws: Sequence[Draw]) -> list[Drawn]:
    """One token a row. logits  float32 [len(draws), vocab_size]"""
    best = logits.max(-1)
    likeliest, highest = best.indices.tolist(), best.values.tolist()
    drawn = []
    for row, draw in enumerate(draws):
        if not math.isfinite(highest[row]):
            drawn.append(Drawn(None))
            continue
        token = likeliest[row]
        if not draw.sampling.is_greedy:
            token = draw_token(logits[row].clone(), draw.sampling, uniform(draw.sampling.seed, draw.index))
        wanted = draw.sampling.logprobs
        drawn.append(Drawn(token, None if wanted is None else token_logprobs(logits[row].clone(), token, wanted)))
    return drawn


def draw_token(logits: Tensor, sampling: SamplingParams, u: float) -> int:
    """The token at which the running sum of probabilities passes u, after temperature, then top-k, then top-p.

    Both cuts keep the likeliest tokens, of equal ones those of lower number. The sum runs over what they keep in the
    order of the tokens, so that it can be taken without a sort.

    logits  float32 [vocab_size];  u  in [0, 1)
    """
    weights = ((logits - logits.max()).double() / sampling.temperature).exp()
    if sampling.top_k is None and sampling.top_p >= 1.0:
        return _invert(weights, u)
    tokens = _likeliest_first(logits, weights, sampling)
    if sampling.top_k is not None:
        tokens = tokens[: sampling.top_k]
    if sampling.top_p < 1.0:
        ordered = weights[tokens]
        whole = weights.sum() if sampling.top_k is None else ordered.sum()
        tokens = tokens[ordered.cumsum(0) - ordered < sampling.top_p * whole]  # the first always stays
    kept = torch.zeros_like(weights)
    kept[tokens] = weights[tokens]
    return _invert(kept, u)


def _likeliest_first(logits: Tensor, weights: Tensor, sampling: SamplingParams) -> Tensor:
    """Tokens by falling logit, equal ones by rising number: all that the cuts can keep, few of a vocabulary."""
    if sampling.top_k is not None:
        bound = logits.topk(min(sampling.top_k, len(logits))).values[-1]
        tokens = (logits >= bound).nonzero()[:, 0]
    else:  # all that are lighter than this hold less than half of what top-p leaves out
        tokens = (weights >= (1 - sampling.top_p) / 2 * weights.sum() / len(weights)).nonzero()[:, 0]
    return tokens[logits[tokens].sort(descending=True, stable=True).indices]


def token_logprobs(logits: Tensor, token: int, num_top: int) -> TokenLogprobs:
    """Log probabilities in the model's own distribution, before temperature and cuts. logits  float32 [vocab_size]"""
    logprobs = logits.log_softmax(0)
    top = logprobs.topk(min(num_top, len(logprobs)))
    return TokenLogprobs(float(logprobs[token]), tuple(top.indices.tolist()), tuple(top.values.tolist()))


def _invert(weights: Tensor, u: float) -> int:
    """The first index whose running sum exceeds u times the whole; never one of weight zero."""
    sums = weights.cumsum(0)
    total = float(sums[-1])
    target = min(u * total, math.nextafter(total, 0.0))  # the product may round up to the whole
    return int(torch.searchsorted(sums, target, right=True))
