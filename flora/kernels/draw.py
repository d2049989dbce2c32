"""Triton: the next token of rows that are not greedy: one launch, no sort, and no memory but the logits.

The cuts, top-k and top-p, keep a row's likeliest tokens, of equal ones those of lower number. So a cut is a bound on
the logit, and how many tokens at that bound stay. The bound is found by the bits of the logit, from the highest on and
two in a pass over the row, which lies in the cache: what is at or above it is counted, or its weights are summed. Then
one running sum in the order of the tokens draws from what is kept.

A row is one program's, block after block: its token hangs on its own logits, seed and index alone.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

_KEY_BITS = {torch.bfloat16: 16, torch.float16: 20, torch.float32: 32}  # of a float32 that tell its values apart; even
_BLOCK = 4096


@dataclass(frozen=True, slots=True, eq=False)
class RowDraws:
    """What rows of a step's logits ask for, each array with one entry a row."""

    reals: Tensor  # float64 [2, n]: temperature, 0 for a greedy row; top_p in (0, 1]
    integers: Tensor  # int64 [5, n]: the row; top_k, 0 for all; seed; index of its token; 1: its log sum is wanted

    def __len__(self) -> int:
        return self.integers.shape[1]


def draw_tokens(logits: Tensor, highest: Tensor, tokens: Tensor, draws: RowDraws, *, block: int = _BLOCK) -> Tensor:
    """tokens[row] = the token drawn, for the rows that draws names and that are not greedy.

    logits   [rows, vocab_size], float32, float16 or bfloat16; where a row's highest is not finite any token is drawn
    highest  [rows], of logits' dtype: each row's
    tokens   int64 [rows]
    returns  float32 [rows]: log of the sum of the exponentials of each row whose log sum is wanted
    Ground truth: flora.serve.engine.sampler.draw_token, in float64.
    """
    log_sums = torch.zeros(len(logits), dtype=torch.float32, device=logits.device)
    if len(draws):
        _draw_kernel[(len(draws),)](
            logits,
            highest,
            tokens,
            log_sums,
            draws.reals,
            draws.integers,
            len(draws),
            logits.shape[1],
            logits.stride(0),
            KEY_BITS=_KEY_BITS[logits.dtype],
            BLOCK=block,
            num_warps=8,
        )
    return log_sums


@triton.jit(do_not_specialize=["n"])
def _draw_kernel(  # type: ignore[no-untyped-def]
    p_logits,
    p_highest,
    p_tokens,
    p_log_sums,
    p_reals,
    p_integers,
    n,
    vocab,
    row_stride,
    KEY_BITS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i = tl.program_id(0)
    row = tl.load(p_integers + i)
    temperature, top_p = tl.load(p_reals + i), tl.load(p_reals + n + i)
    top_k = tl.load(p_integers + n + i)
    p_row = p_logits + row * row_stride
    highest = tl.load(p_highest + row).to(tl.float32)
    bound, last = tl.full((), -(2 ** (KEY_BITS - 1)), tl.int32), vocab - 1  # all are kept
    if tl.load(p_integers + 4 * n + i) != 0:
        whole = _sum_kept(p_row, vocab, highest, 1.4426950408889634, bound, last, KEY_BITS, BLOCK)
        tl.store(p_log_sums + row, highest + tl.log(whole.to(tl.float32)))
    if temperature > 0:
        scale = tl.minimum(1.4426950408889634 / temperature, 1e30).to(tl.float32)  # times a difference of 0: not NaN
        if (top_k > 0) & (top_k < vocab):
            wanted = top_k.to(tl.float64)
            bound_k = _bound(p_row, vocab, highest, scale, bound, last, wanted, True, KEY_BITS, BLOCK)
            above, _, _ = _sums_from(
                p_row, vocab, highest, scale, bound, last, bound_k + 1, bound_k, bound_k, True, KEY_BITS, BLOCK
            )
            last = _first_beyond(p_row, vocab, highest, scale, bound_k, last, wanted - above - 1, True, KEY_BITS, BLOCK)
            bound = bound_k
        if top_p < 1:
            kept = _sum_kept(p_row, vocab, highest, scale, bound, last, KEY_BITS, BLOCK)
            wanted_p = tl.maximum(top_p * kept, 1e-30)
            bound_p = _bound(p_row, vocab, highest, scale, bound, last, wanted_p, False, KEY_BITS, BLOCK)
            above_p, _, _ = _sums_from(
                p_row, vocab, highest, scale, bound, last, bound_p + 1, bound_p, bound_p, False, KEY_BITS, BLOCK
            )
            each = tl.exp2((_logit_of(bound_p, KEY_BITS) - highest) * scale).to(tl.float64)
            ties = tl.where(each > 0, tl.ceil((wanted_p - above_p) / tl.maximum(each, 1e-300)), vocab)
            ties = tl.minimum(tl.maximum(ties, 1), vocab)
            last_p = tl.where(bound_p == bound, last, vocab - 1)
            last = _first_beyond(p_row, vocab, highest, scale, bound_p, last_p, ties - 1, True, KEY_BITS, BLOCK)
            bound = bound_p
        total = _sum_kept(p_row, vocab, highest, scale, bound, last, KEY_BITS, BLOCK)
        u = _uniform(tl.load(p_integers + 2 * n + i), tl.load(p_integers + 3 * n + i))
        target = tl.minimum(u * total, total * (1 - 2**-53))  # the product may round up to the whole
        token = _first_beyond(p_row, vocab, highest, scale, bound, last, target, False, KEY_BITS, BLOCK)
        tl.store(p_tokens + row, tl.minimum(tl.maximum(token, 0), vocab - 1).to(tl.int64))


@triton.jit
def _block(p_row, start, vocab, highest, scale, KEY_BITS: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """(tokens, their weights, their keys): a key is a whole number that rises with the logit."""
    o = start + tl.arange(0, BLOCK)
    b_x = tl.load(p_row + o, mask=o < vocab, other=-float("inf")).to(tl.float32)
    bits = tl.where(b_x == 0, 0.0, b_x).to(tl.int32, bitcast=True)  # 0 and -0 are one number
    key = (bits ^ ((bits >> 31) & 0x7FFFFFFF)) >> (32 - KEY_BITS)
    return o, tl.exp2((b_x - highest) * scale), key


@triton.jit
def _logit_of(key, KEY_BITS: tl.constexpr):  # type: ignore[no-untyped-def]
    bits = key << (32 - KEY_BITS)
    if KEY_BITS < 32:
        bits = tl.where(key < 0, bits | (2 ** (32 - KEY_BITS) - 1), bits)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _is_kept(o, key, vocab, bound, last):  # type: ignore[no-untyped-def]
    return (o < vocab) & ((key > bound) | ((key == bound) & (o <= last)))


@triton.jit
def _sum_kept(p_row, vocab, highest, scale, bound, last, KEY_BITS: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """float64: the weights of what is kept, in the order in which `_first_beyond` adds them."""
    total = tl.zeros((), tl.float64)
    for start in range(0, vocab, BLOCK):
        o, b_w, key = _block(p_row, start, vocab, highest, scale, KEY_BITS, BLOCK)
        total += tl.sum(tl.where(_is_kept(o, key, vocab, bound, last), b_w, 0.0)).to(tl.float64)
    return total


@triton.jit
def _sums_from(  # type: ignore[no-untyped-def]
    p_row, vocab, highest, scale, bound, last, key_1, key_2, key_3, COUNTS: tl.constexpr, KEY_BITS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """float64: weights of what is kept and at or above each of three keys; or how many these are."""
    sum_1, sum_2, sum_3 = tl.zeros((), tl.float64), tl.zeros((), tl.float64), tl.zeros((), tl.float64)
    for start in range(0, vocab, BLOCK):
        o, b_w, key = _block(p_row, start, vocab, highest, scale, KEY_BITS, BLOCK)
        if COUNTS:
            b_w = tl.full((BLOCK,), 1.0, tl.float32)
        b_w = tl.where(_is_kept(o, key, vocab, bound, last), b_w, 0.0)
        sum_1 += tl.sum(tl.where(key >= key_1, b_w, 0.0)).to(tl.float64)
        sum_2 += tl.sum(tl.where(key >= key_2, b_w, 0.0)).to(tl.float64)
        sum_3 += tl.sum(tl.where(key >= key_3, b_w, 0.0)).to(tl.float64)
    return sum_1, sum_2, sum_3


@triton.jit
def _bound(  # type: ignore[no-untyped-def]
    p_row, vocab, highest, scale, bound, last, wanted, COUNTS: tl.constexpr, KEY_BITS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """The highest key from which on the kept tokens' weights, or their number, reach `wanted`; two digits a pass."""
    key = tl.full((), -(2 ** (KEY_BITS - 1)), tl.int64)
    one = tl.full((), 1, tl.int64)
    for step in range(KEY_BITS // 2):
        digit = one << (KEY_BITS - 2 - 2 * step)
        key_1, key_2, key_3 = key + digit, key + 2 * digit, key + 3 * digit
        sum_1, sum_2, sum_3 = _sums_from(
            p_row, vocab, highest, scale, bound, last, key_1.to(tl.int32), key_2.to(tl.int32), key_3.to(tl.int32),
            COUNTS, KEY_BITS, BLOCK,
        )  # fmt: skip
        key = tl.where(sum_1 >= wanted, key_1, key)
        key = tl.where(sum_2 >= wanted, key_2, key)
        key = tl.where(sum_3 >= wanted, key_3, key)
    return key.to(tl.int32)


@triton.jit
def _first_beyond(  # type: ignore[no-untyped-def]
    p_row, vocab, highest, scale, bound, last, target, TIES: tl.constexpr, KEY_BITS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """The first token at which the running sum of the kept tokens' weights is more than `target`.

    TIES  the running number of the kept tokens at the bound instead
    """
    run, found_run = tl.zeros((), tl.float64), tl.zeros((), tl.float64)
    found, is_found = tl.zeros((), tl.int32), tl.zeros((), tl.int32)
    for start in range(0, vocab, BLOCK):
        o, b_w = _candidates(p_row, start, vocab, highest, scale, bound, last, TIES, KEY_BITS, BLOCK)
        added = tl.sum(b_w).to(tl.float64)
        is_next = (is_found == 0) & (added > 0)  # should rounding leave none beyond the target, it is the last
        found, found_run = tl.where(is_next, start, found), tl.where(is_next, run, found_run)
        run += added
        is_found = tl.where(is_next & (run > target), 1, is_found)
    o, b_w = _candidates(p_row, found, vocab, highest, scale, bound, last, TIES, KEY_BITS, BLOCK)
    is_beyond = (found_run + tl.cumsum(b_w.to(tl.float64), 0) > target) & (b_w > 0)
    first, final = tl.min(tl.where(is_beyond, o, vocab)), tl.max(tl.where(b_w > 0, o, -1))
    return tl.where(first < vocab, first, final)


@triton.jit
def _candidates(  # type: ignore[no-untyped-def]
    p_row, start, vocab, highest, scale, bound, last, TIES: tl.constexpr, KEY_BITS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    o, b_w, key = _block(p_row, start, vocab, highest, scale, KEY_BITS, BLOCK)
    kept = _is_kept(o, key, vocab, bound, last)
    if TIES:
        kept = kept & (key == bound)
        b_w = tl.full((BLOCK,), 1.0, tl.float32)
    return o, tl.where(kept, b_w, 0.0)


@triton.jit
def _uniform(seed, index):  # type: ignore[no-untyped-def]
    """float64 in [0, 1): philox.uniform, whose source and rounds are told there."""
    first_step, second_step = tl.full((), 0x9E3779B97F4A7C15, tl.uint64), tl.full((), 0xBB67AE8584CAA73B, tl.uint64)
    first_by, second_by = tl.full((), 0xD2E7470EE14C6C93, tl.uint64), tl.full((), 0xCA5A826395121157, tl.uint64)
    a, b = index.to(tl.uint64), tl.zeros((), tl.uint64)
    c, d = tl.zeros((), tl.uint64), tl.zeros((), tl.uint64)
    low, high = seed.to(tl.uint64, bitcast=True), tl.zeros((), tl.uint64)
    for _ in tl.static_range(10):
        old_a, old_c = a, c
        a, c = tl.umulhi(old_c, second_by) ^ b ^ low, tl.umulhi(old_a, first_by) ^ d ^ high
        b, d = old_c * second_by, old_a * first_by
        low, high = low + first_step, high + second_step
    return (a >> 11).to(tl.float64) * (1.0 / 9007199254740992)
