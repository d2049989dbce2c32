"""Products of a delta with a few rows, in the order in which it lies in memory.

The float32 delta of a large layer is bigger than any cache near a core, and a product with 32 rows does too little with
each element to hide that. So D is read in the order in which it is stored, and where the layout allows it in pieces
that stay near the core while both products of an iteration use them: measured with MKL, two thirds to four fifths of
the time of two products in the usual layout (benchmarks/NOTES.md).
"""

import torch
from torch import Tensor

PIECE = 1 << 20  # elements of D at once; smaller ones cost two threads more in calls than they save in reading


def times(rows: Tensor, D: Tensor) -> Tensor:
    """rows @ D, [num_rows, large], in the layout of `empty_products`."""
    product = empty_products(len(rows), D)
    there_and_back(rows, D, product, back=False)
    return product


def empty_products(num_rows: int, D: Tensor) -> Tensor:
    """Uninitialized [num_rows, large] for Q @ D, laid out as `there_and_back` writes it best. D [small, large]"""
    return D.new_empty(D.shape[1], num_rows).T if _is_stored_by_columns(D) else D.new_empty(num_rows, D.shape[1])


def there_and_back(Q: Tensor, D: Tensor, QD: Tensor, *, back: bool) -> Tensor | None:
    """Writes Q @ D to QD; returns QD @ D.T, [rows, small], if `back`.

    Q [rows, small], D [small, large], QD [rows, large], made by empty_products
    """
    by_columns = not D.is_cuda and _is_stored_by_columns(D)
    if by_columns:
        Q = Q.T.contiguous().T  # as D lies: MKL multiplies it a quarter faster than rows
    if not back:
        torch.matmul(Q, D, out=QD)
        return None
    if not by_columns:
        torch.matmul(Q, D, out=QD)
        return (D @ QD.T).T
    step = max(1, PIECE // D.shape[0])
    returned = Q.new_zeros(len(Q), D.shape[0])
    for piece, products in zip(D.split(step, 1), QD.split(step, 1), strict=True):
        torch.matmul(Q, piece, out=products)
        returned.addmm_(products, piece.T)
    return returned


def _is_stored_by_columns(D: Tensor) -> bool:
    """Whether D is the transpose of a matrix that lies in memory row by row."""
    return D.stride(0) == 1 and D.shape[0] > 1
