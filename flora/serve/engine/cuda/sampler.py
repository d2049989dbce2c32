"""What rows ask for beyond their likeliest token, on a GPU: draws, and log probabilities. Nothing here waits for it.

A draw and its log probabilities depend on its row's logits, seed and index alone, and on no other row.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from flora.kernels.draw import RowDraws
from flora.serve.engine.sampler import Draw

_GROUP = 128  # tokens whose maximum tells whether they are looked at: near the root of a vocabulary, with 5 wanted


@dataclass(frozen=True, slots=True)
class TopLogprobs:
    """Of the rows that ask for them, on the device. n rows, k: the most that one asks for."""

    rows: list[int]
    num_top: list[int]  # of each
    chosen: Tensor  # float32 [n]: of the token
    ids: Tensor  # int64 [n, k]: of the likeliest tokens, of equal ones the lower first
    values: Tensor  # float32 [n, k]


Asked = Sequence[tuple[int, Draw]]  # rows of the step's logits, and what each asks for


def pack_draws(asked: Asked, device: torch.device) -> RowDraws:
    """What these rows ask for, on its way to the device."""
    host = torch.empty(7, len(asked), dtype=torch.int64, pin_memory=device.type == "cuda")
    reals, integers = host[:2].view(torch.float64).numpy(), host[2:].numpy()
    reals[:] = [[draw.sampling.temperature for _, draw in asked], [draw.sampling.top_p for _, draw in asked]]
    integers[:] = [
        [row for row, _ in asked],
        [draw.sampling.top_k or 0 for _, draw in asked],
        [draw.sampling.seed for _, draw in asked],
        [draw.index for _, draw in asked],
        [draw.sampling.logprobs is not None for _, draw in asked],
    ]
    packed = host.to(device, non_blocking=True)
    return RowDraws(packed[:2].view(torch.float64), packed[2:])


def top_logprobs(logits: Tensor, tokens: Tensor, log_sums: Tensor, asked: Asked) -> TopLogprobs | None:
    """Log probabilities in the model's own distribution, before temperature and cuts; None if no row wants any.

    logits    [rows, vocab_size];  tokens  int64 [rows]
    log_sums  float32 [rows], what draw_tokens returned
    """
    wanted = [(row, draw.sampling.logprobs) for row, draw in asked if draw.sampling.logprobs is not None]
    if not wanted:
        return None
    rows, num_top = [row for row, _ in wanted], [min(top, logits.shape[1]) for _, top in wanted]
    index = torch.tensor(rows, pin_memory=logits.is_cuda).to(logits.device, non_blocking=True)
    ids, values = _likeliest(logits, index, max(num_top))
    sums = log_sums[index]  # float32, as what they are taken from becomes
    return TopLogprobs(rows, num_top, logits[index, tokens[index]] - sums, ids, values - sums[:, None])


def _likeliest(logits: Tensor, rows: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """(tokens by falling logit, equal ones by rising number, so that one order is right; their logits).

    rows     int64 [n]: of logits
    returns  int64 [n, count];  [n, count], of logits' dtype

    They lie in as many groups of consecutive tokens: those of the highest maxima, of equal ones the first, for each of
    these has a token that comes before any of another group's. So a maximum and two short sorts find them, for all rows
    at once and with little memory. The tokens after the last whole group are looked at, too.
    """
    vocab, device = logits.shape[1], logits.device
    num_groups = vocab // _GROUP
    highest = logits[:, : num_groups * _GROUP].unflatten(-1, (num_groups, _GROUP)).amax(-1)[rows]
    groups = _falling(highest).indices[:, :count].sort(-1).values  # so that their tokens, too, are by rising number
    ids = torch.add(torch.arange(_GROUP, device=device), groups[:, :, None], alpha=_GROUP).flatten(1)
    if vocab % _GROUP:
        rest = torch.arange(num_groups * _GROUP, vocab, device=device)
        ids = torch.cat((ids, rest.expand(len(rows), -1)), 1)
    found = _falling(logits[rows[:, None], ids])
    return ids.gather(1, found.indices[:, :count]), found.values[:, :count]


def _falling(x: Tensor) -> torch.return_types.sort:
    return (x + 0.0).sort(dim=-1, descending=True, stable=True)  # 0 and -0 are one number
