"""What rows ask for beyond their likeliest token, on a GPU: draws, and log probabilities. Nothing here waits for it.

A draw and its log probabilities depend on its row's logits, seed and index alone, and on no other row.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from flora.kernels.draw import RowDraws
from flora.serve.engine.sampler import Draw

_ROWS = 32  # whose logits are ordered at once: 33 MB for a vocabulary of 128,256


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
    ids = torch.cat([_likeliest(logits[part], max(num_top)) for part in index.split(_ROWS)])
    sums = log_sums[index]
    chosen = logits[index, tokens[index]].float() - sums
    return TopLogprobs(rows, num_top, chosen, ids, logits[index[:, None], ids].float() - sums[:, None])


def _likeliest(logits: Tensor, count: int) -> Tensor:
    """int64 [rows, count]: by falling logit, equal ones by rising number. No two keys are equal: one order is right."""
    bits = (logits + 0.0).view(torch.int32 if logits.dtype == torch.float32 else torch.int16)  # 0 and -0 are one number
    sign, most = (31, 0x7FFFFFFF) if logits.dtype == torch.float32 else (15, 0x7FFF)
    keys = (bits ^ ((bits >> sign) & most)).long()  # rise with the logits
    numbers = torch.arange(logits.shape[1], device=logits.device)
    top = ((keys << 32) | (0xFFFFFFFF - numbers)).topk(count).values
    return 0xFFFFFFFF - (top & 0xFFFFFFFF)
