"""Drawing tokens on the device: the sampler's formulas, for many rows at once.

A draw depends on its row's logits, seed and index alone. Greedy rows need a maximum, rows with a temperature alone a
running sum; only top-k and top-p sort.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from flora.serve.engine.philox import uniform
from flora.serve.engine.sampler import Draw


def draw_rows(logits: Tensor, draws: Sequence[Draw]) -> Tensor:
    """int64 [len(draws)]: the token of each row by its own temperature, top-k and top-p; none of them greedy.

    logits  float32 [len(draws), vocab_size]
    """
    device = logits.device
    temperature = torch.tensor([draw.sampling.temperature for draw in draws], dtype=torch.float64).to(device)
    u = torch.tensor([uniform(draw.sampling.seed, draw.index) for draw in draws], dtype=torch.float64).to(device)
    weights = ((logits - logits.amax(-1, keepdim=True)).double() / temperature[:, None]).exp()
    is_cut = torch.tensor([draw.sampling.top_k is not None or draw.sampling.top_p < 1.0 for draw in draws])
    tokens = _invert(weights, u)
    if bool(is_cut.any()):
        rows = is_cut.nonzero().flatten().tolist()
        cut = [draws[row].sampling for row in rows]
        picked = torch.tensor(rows, device=device)
        top_k = torch.tensor([sampling.top_k or logits.shape[1] for sampling in cut]).to(device)
        top_p = torch.tensor([sampling.top_p for sampling in cut], dtype=torch.float64).to(device)
        tokens[picked] = _draw_cut(weights[picked], u[picked], top_k, top_p)
    return tokens


def _draw_cut(weights: Tensor, u: Tensor, top_k: Tensor, top_p: Tensor) -> Tensor:
    """As draw_rows, after the cuts: the k likeliest, then the fewest of those whose share reaches p."""
    ordered, tokens = weights.sort(dim=-1, descending=True, stable=True)
    ordered = ordered.masked_fill(torch.arange(ordered.shape[1], device=u.device) >= top_k[:, None], 0.0)
    sums = ordered.cumsum(-1)
    beyond = (sums - ordered >= top_p[:, None] * sums[:, -1:]) & (top_p[:, None] < 1.0)
    beyond[:, 0] = False  # the likeliest always stays
    return tokens.gather(1, _invert(ordered.masked_fill(beyond, 0.0), u)[:, None])[:, 0]


def _invert(weights: Tensor, u: Tensor) -> Tensor:
    """The first index of each row whose running sum exceeds u times the whole."""
    sums = weights.cumsum(-1)
    target = torch.minimum(u * sums[:, -1], torch.nextafter(sums[:, -1], torch.zeros_like(u)))
    return torch.searchsorted(sums, target[:, None], right=True)[:, 0].clamp_max(weights.shape[1] - 1)
