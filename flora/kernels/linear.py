"""x @ W.T whose every row is the same bits whatever stands in the other rows, and however many there are.

A batch changes from step to step; a sequence's tokens must not. MKL's sgemm picks another kernel, with another order of
summation, at other row counts: measured with torch 2.13 on AVX-512, a row changes bits at 2, 16 and (by shape) 63, 128
or 192 rows. oneDNN's inner product keeps them from two rows up, at any position and thread count. That is a property of
a build and a processor, not a promise, so each shape is probed once and the first product that passes is used; the last
one multiplies row by row, which holds by construction.

On a GPU this is torch's own linear, whose rows may change bits where their number does, and for one row a kernel of our
own.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from flora.kernels.tuning import can_overlap

MIN_ROWS = 4  # oneDNN's single row goes another way (gemv); four leaves a margin above the two that were measured
BLOCK_ROWS = 16
PROBE_ROWS = (1, 2, 5, 19, 70, 130, 300)  # around the row counts at which MKL and oneDNN were seen to change kernels
PROBE_WEIGHTS = 2**32  # rows times weight elements, about 0.1 s: more rows of a large weight are not probed

Product = Callable[[Tensor, Tensor, Tensor | None], Tensor]  # (x [n, in], weight [out, in], bias [out]) -> [n, out]


class PackedLinear:
    """A base weight, held in the layout that its device multiplies by: y = x @ weight.T + bias, row-invariant on a CPU.

    weight  [out_features, in_features]; on a CPU of any strides, copied (as float32), and can be freed
    bias    [out_features] or None

    row_invariant  on a GPU, too, by row_matmul and at every number of rows; on a CPU it is so in any case

    A CPU multiplies in float32 and rounds once to x's dtype: half precision saves no time without AMX, and one path is
    one thing to trust.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None, *, row_invariant: bool = False) -> None:
        self.out_features, self.in_features = weight.shape
        if weight.device.type == "cpu":
            dense = weight.detach().float().contiguous()
            self._product = invariant_product(dense, packed=True)
            self._weight = pack(dense) if self._product is onednn_rows else dense
            self._bias = None if bias is None else bias.detach().float()
        else:
            self._into = _row_matmul if row_invariant else _gpu_product
            self._weight, self._bias = weight, bias

    def __call__(self, x: Tensor, *, early: bool = True) -> Tensor:
        """[..., out_features] in x's dtype, for x [..., in_features].

        early  on a GPU: it may take its place there before the launch before it has ended, and all of it. Not where
               something else is to run beside it.
        """
        return self.into(None, x.reshape(-1, self.in_features), early=early).view(*x.shape[:-1], self.out_features)

    def into(self, out: Tensor | None, x: Tensor, *, early: bool = True) -> Tensor:
        """As a call, in `out` [n, out_features] if there is one, of x's dtype and device; x is [n, in_features]."""
        if x.device.type != "cpu":
            return self._into(x, self._weight, self._bias, out, early=early)
        rows = self._product(x.float(), self._weight, self._bias).to(x.dtype)
        return rows if out is None else out.copy_(rows)


def _row_matmul(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor | None, *, early: bool) -> Tensor:
    from flora.kernels.row_matmul import row_matmul  # needs Triton

    return row_matmul(x, weight, bias, out)


def _gpu_product(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor | None, *, early: bool) -> Tensor:
    """torch's linear, and for one row a kernel that has its first weights before the launch before it has ended."""
    if len(x) == 1:
        from flora.kernels.one_row import one_row_matmul  # needs Triton

        return one_row_matmul(x, weight, bias, out, overlap=early and can_overlap(x.device))
    if out is None or bias is not None:
        y = F.linear(x, weight, bias)
        return y if out is None else out.copy_(y)
    return torch.mm(x, weight.t(), out=out)


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x @ weight.T for a weight that is not worth packing, such as an adapter's factor; row-invariant on a CPU.

    x  [n, in_features];  weight  [out_features, in_features], of x's dtype, any strides. A CPU takes float32 only.
    """
    if x.device.type != "cpu":
        return F.linear(x, weight)
    return invariant_product(weight, packed=False)(x, weight, None)


def pack(weight: Tensor) -> Tensor:
    """float32 [out, in] in oneDNN's blocked layout."""
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight, None)
    return packed


def onednn_rows(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """oneDNN's inner product over at least MIN_ROWS rows; the weight may be packed or dense."""
    n = x.shape[0]
    if n < MIN_ROWS:
        x = torch.cat([x, x.new_zeros(MIN_ROWS - n, x.shape[1])])
    y: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return y[:n]


def blocked_rows(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """torch's linear over BLOCK_ROWS rows at a time, so that every call has one shape."""
    n = x.shape[0]
    x = torch.cat([x, x.new_zeros(-n % BLOCK_ROWS, x.shape[1])])
    return torch.cat([F.linear(block, weight, bias) for block in x.split(BLOCK_ROWS)])[:n]


def single_rows(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """torch's linear, one row at a time: slow, and invariant because a row is all that a call ever sees."""
    if x.shape[0] == 0:
        return x.new_empty(0, weight.shape[0])
    return torch.cat([F.linear(row.clone(), weight, bias) for row in x.split(1)])


PRODUCTS: tuple[Product, ...] = (onednn_rows, blocked_rows, single_rows)
_chosen: dict[tuple[object, ...], Product] = {}  # a cache of pure facts about this machine, by shape


def invariant_product(weight: Tensor, *, packed: bool) -> Product:
    """The fastest product that keeps a row's bits for weights of this shape and layout on this machine."""
    key = (*weight.shape, weight.stride(1) == 1, packed, torch.get_num_threads())
    if key not in _chosen:
        _chosen[key] = first_invariant(PRODUCTS, weight, packed=packed)
    return _chosen[key]


def first_invariant(products: Sequence[Product], weight: Tensor, *, packed: bool = False) -> Product:
    """The first of `products` that passes the probe; the last needs no probe."""
    for product in products[:-1]:
        try:
            operand = pack(weight) if packed and product is onednn_rows else weight
            if keeps_rows(product, operand, weight.shape[1]):
                return product
        except (RuntimeError, AttributeError, NotImplementedError):  # this build of torch lacks the operator
            continue
    return products[-1]


def keeps_rows(product: Product, weight: Tensor, in_features: int) -> bool:
    """Whether one row gives equal bits at every count in PROBE_ROWS, first, in the middle and last, beside NaN."""
    generator = torch.Generator().manual_seed(0)
    row = torch.randn(in_features, generator=generator)
    seen: Tensor | None = None
    for num_rows in PROBE_ROWS:
        if num_rows > 70 and num_rows * weight.shape[0] * in_features > PROBE_WEIGHTS:
            break
        x = torch.randn(num_rows, in_features, generator=generator)
        if num_rows > 3:
            x[1] = float("nan")
        places = sorted({0, num_rows // 2, num_rows - 1})
        x[places] = row
        for bits in product(x, weight, None)[places].view(torch.int32):
            seen = bits if seen is None else seen
            if not torch.equal(bits, seen):
                return False
    return True
