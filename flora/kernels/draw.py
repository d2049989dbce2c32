"""Triton: the next token of rows that are not greedy: one launch, no sort, and no memory but the logits.

The cuts, top-k and top-p, keep a row's likeliest tokens, of equal ones those of lower number. So a cut is a bound on
the logit, and how many tokens at that bound stay. The bound is searched for by keys, whole numbers that rise with the
logit: a pass over the row, which lies in the cache, counts the tokens at or above each of three keys, or sums their
weights, and leaves a quarter of the keys or less. Then a running sum in the order of the tokens draws from the kept.

A row is `_GROUPS` groups of consecutive tokens. A pass walks all of them at once, a tile of some columns of each after
another, and adds each place of the tile to its own accumulator: the loads of several tiles are under way together, and
threads meet once, after the pass. It leaves the sum of each group: what to look for lies in one of them.

A row is one program's: its token hangs on its own logits, seed and index alone.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

_KEY_BITS = {torch.bfloat16: 16, torch.float16: 19, torch.float32: 32}  # of a float32 that tell its values apart
_GROUPS = tl.constexpr(64)
_COLUMNS = {torch.bfloat16: 64, torch.float16: 64, torch.float32: 32}  # of a tile: a cache line of each group
_LARGE = 65_536  # tokens, from which on 16 warps are faster than 8: by the vocabulary, never by how many rows there are
_UNROLL = 4  # tiles whose loads are under way together
_REGISTERS = 128  # a thread's, so that a multiprocessor holds 16 warps


@dataclass(frozen=True, slots=True, eq=False)
class RowDraws:
    """What rows of a step's logits ask for, each array with one entry a row."""

    reals: Tensor  # float64 [2, n]: temperature, 0 for a greedy row; top_p in (0, 1]
    integers: Tensor  # int64 [5, n]: the row; top_k, 0 for all; seed; index of its token; 1: its log sum is wanted

    def __len__(self) -> int:
        return self.integers.shape[1]


def draw_tokens(
    logits: Tensor,
    highest: Tensor,
    tokens: Tensor,
    draws: RowDraws,
    *,
    warps: int | None = None,
    columns: int | None = None,
) -> Tensor:
    """tokens[row] = the token drawn, for the rows that draws names and that are not greedy.

    logits   [rows, vocab_size], float32, float16 or bfloat16; where a row's highest is not finite any token is drawn
    highest  [rows], of logits' dtype: each row's
    tokens   int64 [rows]
    warps, columns  of a program and of its tile; None: what is fastest for the vocabulary and the dtype
    returns  float32 [rows]: log of the sum of the exponentials of each row whose log sum is wanted
    Ground truth: flora.serve.engine.sampler.draw_token, in float64.
    """
    log_sums = torch.zeros(len(logits), dtype=torch.float32, device=logits.device)
    if len(draws):
        columns = columns or _COLUMNS[logits.dtype]
        warps = warps or (16 if logits.shape[1] >= _LARGE else 8)
        group = triton.cdiv(logits.shape[1], _GROUPS.value * columns) * columns
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
            GROUP=group,
            BLOCK=triton.next_power_of_2(group),
            COLUMNS=columns,
            UNROLL=_UNROLL,
            num_warps=warps,
            maxnreg=_REGISTERS,
        )
    return log_sums


@triton.jit(do_not_specialize=["n"])
def _draw_kernel(  # type: ignore[no-untyped-def]
    p_logits, p_highest, p_tokens, p_log_sums, p_reals, p_integers, n, vocab, row_stride,
    KEY_BITS: tl.constexpr, GROUP: tl.constexpr, BLOCK: tl.constexpr, COLUMNS: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0)
    row = tl.load(p_integers + i)
    temperature, top_p = tl.load(p_reals + i), tl.load(p_reals + n + i)
    top_k = tl.load(p_integers + n + i)
    p_row = p_logits + row * row_stride
    highest = tl.load(p_highest + row).to(tl.float32)
    none = tl.full((), -float("inf"), tl.float32)  # all are kept
    if tl.load(p_integers + 4 * n + i) != 0:
        b_whole = _sums(p_row, vocab, highest, 1.4426950408889634, none, GROUP, COLUMNS, UNROLL)
        tl.store(p_log_sums + row, highest + tl.log(tl.sum(b_whole, 0).to(tl.float32)))
    if temperature > 0:
        scale = tl.minimum(tl.maximum(1.4426950408889634 / temperature, 1e-30), 1e30)  # not NaN, times 0 or infinity
        scale = scale.to(tl.float32)
        bound, above_all = _key_of(none, KEY_BITS), _key_of(highest, KEY_BITS) + 1
        least, last, num_kept = none, vocab - 1, tl.full((), 1, tl.float64) * vocab
        b_added = tl.zeros((_GROUPS,), tl.float64)  # kept at the bound, where `least` is above it

        if (top_k > 0) & (top_k < vocab):
            num_kept = top_k.to(tl.float64)
            key = _key_guess(p_row, vocab, top_k, bound, above_all, KEY_BITS, GROUP, COLUMNS, UNROLL)
            bound, b_from, b_above = _bound(
                p_row, vocab, highest, scale, num_kept, bound, b_added, above_all,
                key, key + 1, key + 2 + (above_all - key) // 8, True, KEY_BITS, GROUP, COLUMNS, UNROLL,
            )  # fmt: skip
            least = _logit_of(bound, KEY_BITS)
            ties = num_kept - tl.sum(b_above, 0)
            if ties < tl.sum(b_from - b_above, 0):
                last, b_added = _some_ties(p_row, vocab, least, b_from - b_above, ties, GROUP, BLOCK)
                b_added *= tl.exp2((least - highest) * scale).to(tl.float64)
                least = _logit_of(bound + 1, KEY_BITS)

        b_kept = _sums(p_row, vocab, highest, scale, least, GROUP, COLUMNS, UNROLL) + b_added

        if top_p < 1:
            kept = tl.sum(b_kept, 0)
            wanted = tl.maximum(top_p * kept, 1e-30)
            # Were what top-p leaves out one token, or all equally heavy: the bound is in between. Or it is the highest.
            light = tl.log2(((1 - top_p) * kept).to(tl.float32))
            lighter = tl.log2(num_kept.to(tl.float32))
            bound_p, b_from, b_above = _bound(
                p_row, vocab, highest, scale, wanted, bound, b_kept, above_all,
                _key_of(highest + (light - lighter) / scale, KEY_BITS),
                _key_of(highest + (light - lighter / 2) / scale, KEY_BITS),
                above_all - 1, False, KEY_BITS, GROUP, COLUMNS, UNROLL,
            )  # fmt: skip
            at_p = _logit_of(bound_p, KEY_BITS)
            each = tl.exp2((at_p - highest) * scale).to(tl.float64)
            ties = tl.maximum(tl.ceil((wanted - tl.sum(b_above, 0)) / tl.maximum(each, 1e-300)), 1)
            if ties * each < tl.sum(b_from - b_above, 0) - each / 2:
                next_p = _logit_of(bound_p + 1, KEY_BITS)
                b_1, b_2, _ = _sums_from(
                    p_row, vocab, highest, scale, at_p, next_p, next_p, True, GROUP, COLUMNS, UNROLL
                )
                last, b_added = _some_ties(p_row, vocab, at_p, b_1 - b_2, ties, GROUP, BLOCK)
                b_kept = b_above + b_added * each
            else:
                last = tl.where(bound_p == bound, last, vocab - 1)
                b_kept = b_from
            bound = bound_p

        total = tl.sum(b_kept, 0)
        u = _uniform(tl.load(p_integers + 2 * n + i), tl.load(p_integers + 3 * n + i))
        target = tl.minimum(u * total, total * (1 - 2**-53))  # the product may round up to the whole
        token = _first_beyond(
            p_row, vocab, highest, scale, _logit_of(bound, KEY_BITS), last, b_kept, target, False, GROUP, BLOCK
        )
        tl.store(p_tokens + row, tl.minimum(tl.maximum(token, 0), vocab - 1).to(tl.int64))


@triton.jit
def _key_of(logit, KEY_BITS: tl.constexpr):  # type: ignore[no-untyped-def]
    """int64, since one more than the highest key of 32 bits is a key too."""
    bits = tl.where(logit == 0, 0.0, logit).to(tl.int32, bitcast=True)  # 0 and -0 are one number
    return ((bits ^ ((bits >> 31) & 0x7FFFFFFF)) >> (32 - KEY_BITS)).to(tl.int64)


@triton.jit
def _logit_of(key, KEY_BITS: tl.constexpr):  # type: ignore[no-untyped-def]
    bits = key.to(tl.int32) << (32 - KEY_BITS)
    if KEY_BITS < 32:
        bits = tl.where(key < 0, bits | (2 ** (32 - KEY_BITS) - 1), bits)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _tile(p_row, start, vocab, GROUP: tl.constexpr, COLUMNS: tl.constexpr):  # type: ignore[no-untyped-def]
    """float32 [_GROUPS, COLUMNS]: the logits of each group from its token `start` on, -inf past the row's end."""
    o = tl.arange(0, _GROUPS)[:, None] * GROUP + (start + tl.arange(0, COLUMNS))[None, :]
    return tl.load(p_row + o, mask=o < vocab, other=-float("inf")).to(tl.float32)


@triton.jit
def _sums(  # type: ignore[no-untyped-def]
    p_row, vocab, highest, scale, least, GROUP: tl.constexpr, COLUMNS: tl.constexpr, UNROLL: tl.constexpr
):  # fmt: skip
    """float64 [_GROUPS]: the weights of each group's tokens whose logit is `least` or more."""
    b_sum = tl.zeros((_GROUPS, COLUMNS), tl.float32)
    for start in tl.range(0, GROUP, COLUMNS, loop_unroll_factor=UNROLL):
        b_x = _tile(p_row, start, vocab, GROUP, COLUMNS)
        b_sum += (b_x >= least).to(tl.float32) * tl.exp2((b_x - highest) * scale)
    return tl.sum(b_sum, 1).to(tl.float64)


@triton.jit
def _sums_from(  # type: ignore[no-untyped-def]
    p_row, vocab, highest, scale, least_1, least_2, least_3, COUNTS: tl.constexpr,
    GROUP: tl.constexpr, COLUMNS: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """float64 [_GROUPS], from each of three logits on: the weights of each group's tokens; or how many these are."""
    b_sum_1 = tl.zeros((_GROUPS, COLUMNS), tl.float32)
    b_sum_2, b_sum_3 = b_sum_1, b_sum_1
    for start in tl.range(0, GROUP, COLUMNS, loop_unroll_factor=UNROLL):
        b_x = _tile(p_row, start, vocab, GROUP, COLUMNS)
        b_w = tl.full((_GROUPS, COLUMNS), 1.0, tl.float32) if COUNTS else tl.exp2((b_x - highest) * scale)
        # A product is one instruction beside the comparison, and a choice two.
        b_sum_1 += (b_x >= least_1).to(tl.float32) * b_w
        b_sum_2 += (b_x >= least_2).to(tl.float32) * b_w
        b_sum_3 += (b_x >= least_3).to(tl.float32) * b_w
    return tl.sum(b_sum_1, 1).to(tl.float64), tl.sum(b_sum_2, 1).to(tl.float64), tl.sum(b_sum_3, 1).to(tl.float64)


@triton.jit
def _bound(  # type: ignore[no-untyped-def]
    p_row, vocab, highest, scale, wanted, low, b_low, high, key_1, key_2, key_3, COUNTS: tl.constexpr,
    KEY_BITS: tl.constexpr, GROUP: tl.constexpr, COLUMNS: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """The highest key from which on the tokens' weights, or their number, reach `wanted`.

    low, b_low    an earlier cut's bound, and what each group has from it on, which reaches `wanted`
    high          a key that no token reaches
    key_1 to 3    where to look first: any; a good guess saves passes
    returns  (key, float64 [_GROUPS]: what each group has from it on, and above it)
    """
    b_high = tl.zeros_like(b_low)
    while high - low > 1:
        # All three are above the earlier bound, or are passed over: whatever is at or above them has been kept.
        b_1, b_2, b_3 = _sums_from(
            p_row, vocab, highest, scale,
            _logit_of(key_1, KEY_BITS), _logit_of(key_2, KEY_BITS), _logit_of(key_3, KEY_BITS),
            COUNTS, GROUP, COLUMNS, UNROLL,
        )  # fmt: skip
        low, b_low, high, b_high = _narrowed(low, b_low, high, b_high, key_1, b_1, wanted)
        low, b_low, high, b_high = _narrowed(low, b_low, high, b_high, key_2, b_2, wanted)
        low, b_low, high, b_high = _narrowed(low, b_low, high, b_high, key_3, b_3, wanted)
        key_1, key_2, key_3 = _keys_between(low, high, KEY_BITS)
    return low, b_low, b_high


@triton.jit
def _keys_between(low, high, KEY_BITS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Three keys that quarter the range; or, as nearly all keys of both signs are of numbers next to 0, part those."""
    near: tl.constexpr = 0x3D800000 >> (32 - KEY_BITS)  # 1 / 16
    spans, keys = (low < -near - 1) & (high > near), high - low
    key_1 = tl.where(spans, -near - 1, low + (keys + 3) // 4)
    key_2 = tl.where(spans, near, low + (2 * keys + 3) // 4)
    key_3 = tl.where(spans, (near + high) // 2, low + (3 * keys + 3) // 4)
    return key_1, key_2, key_3


@triton.jit
def _narrowed(low, b_low, high, b_high, key, b_key, wanted):  # type: ignore[no-untyped-def]
    """(low, its sums, high, its sums), of which a key between them takes the place of one."""
    is_between, reaches = (key > low) & (key < high), tl.sum(b_key, 0) >= wanted
    rises, falls = is_between & reaches, is_between & (reaches == 0)
    low, b_low = tl.where(rises, key, low), tl.where(rises, b_key, b_low)
    high, b_high = tl.where(falls, key, high), tl.where(falls, b_key, b_high)
    return low, b_low, high, b_high


@triton.jit
def _key_guess(  # type: ignore[no-untyped-def]
    p_row, vocab, count, low, high, KEY_BITS: tl.constexpr, GROUP: tl.constexpr, COLUMNS: tl.constexpr,
    UNROLL: tl.constexpr,
):  # fmt: skip
    """A key that at least `count` tokens reach, few of them more: one at each of so many places of the tile."""
    b_most = tl.full((_GROUPS, COLUMNS), -float("inf"), tl.float32)
    for start in tl.range(0, GROUP, COLUMNS, loop_unroll_factor=UNROLL):
        b_most = tl.maximum(b_most, _tile(p_row, start, vocab, GROUP, COLUMNS))
    while high - low > 1:
        key = low + (high - low) // 2
        reaches = tl.sum((b_most >= _logit_of(key, KEY_BITS)).to(tl.int32)) >= count
        low, high = tl.where(reaches, key, low), tl.where(reaches, high, key)
    return low


@triton.jit
def _some_ties(p_row, vocab, bound, b_ties, count, GROUP: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """(the last of the first `count` tokens at the bound, float64 [_GROUPS]: how many of these each group has)."""
    last = _first_beyond(p_row, vocab, 0.0, 0.0, bound, vocab, b_ties, count - 1, True, GROUP, BLOCK)
    b_left = count - (tl.cumsum(b_ties, 0) - b_ties)
    return last, tl.minimum(tl.maximum(b_left, 0.0), b_ties)


@triton.jit
def _first_beyond(  # type: ignore[no-untyped-def]
    p_row, vocab, highest, scale, bound, last, b_sums, target, TIES: tl.constexpr, GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """The first token at which the running sum of the kept tokens' weights is more than `target`.

    b_sums  float64 [_GROUPS]: the sum of each group
    TIES    the running number of the tokens at the bound instead
    """
    i_group = tl.arange(0, _GROUPS)
    is_beyond = (tl.cumsum(b_sums, 0) > target) & (b_sums > 0)
    first, final = tl.min(tl.where(is_beyond, i_group, _GROUPS), 0), tl.max(tl.where(b_sums > 0, i_group, 0), 0)
    group = tl.where(first < _GROUPS, first, final)  # should rounding leave none beyond the target, it is the last
    before = tl.sum(tl.where(i_group < group, b_sums, 0.0), 0)
    o_group = tl.arange(0, BLOCK)
    o = group * GROUP + o_group
    m = (o_group < GROUP) & (o < vocab)
    b_x = tl.load(p_row + o, mask=m, other=-float("inf")).to(tl.float32)
    if TIES:
        b_w = tl.where(m & (b_x == bound), 1.0, 0.0)
    else:
        is_kept = m & ((b_x > bound) | ((b_x == bound) & (o <= last)))
        b_w = tl.where(is_kept, tl.exp2((b_x - highest) * scale), 0.0)
    is_beyond = (before + tl.cumsum(b_w.to(tl.float64), 0) > target) & (b_w > 0)
    first, final = tl.min(tl.where(is_beyond, o, vocab), 0), tl.max(tl.where(b_w > 0, o, -1), 0)
    return tl.where(first < vocab, first, final)


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
