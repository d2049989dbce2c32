"""Proof of what stored factors keep: the residual of the very numbers that the adapter holds, rounding included.

    ‖D - BA‖² = ‖D‖² - 2<BᵀD, A> + <BᵀB, AAᵀ>,   so   kept = ‖D‖² - ‖D - BA‖² = 2<BᵀD, A> - <BᵀB, AAᵀ>

One product with D as thin as the rank; everything after it is summed in float64.
"""

import torch
from torch import Tensor

_COLUMNS = 4096  # held in float64 at once


def kept_by_rank(product: Tensor, small: Tensor, large: Tensor) -> Tensor:
    """Kept energy of the first 1, 2, …, rank terms of `small.T @ large`, float64 [rank].

    small, large  the factors as rows, [rank, small side] and [rank, large side];  product  small @ D, float32
    """
    rank = len(small)
    linear = torch.zeros(rank, dtype=torch.float64, device=product.device)
    gram = torch.zeros(rank, rank, dtype=torch.float64, device=product.device)
    for piece, columns in zip(product.split(_COLUMNS, 1), large.split(_COLUMNS, 1), strict=True):
        linear += (piece * columns).sum(1, dtype=torch.float64)
        columns = columns.double()
        gram += columns @ columns.T
    quadratic = gram * (small.double() @ small.double().T)
    return 2 * linear.cumsum(0) - quadratic.cumsum(0).cumsum(1).diagonal()
