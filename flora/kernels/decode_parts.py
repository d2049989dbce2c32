"""Triton: which parts of which contexts a decode step attends over, listed once a step for all of its layers.

A grid of every part that a context could have would be nearly all programs with nothing to do: a nanosecond each, which
is a sixth of the attention of 256 sequences where a context may grow to 8,192 tokens.
"""

import torch
import triton
import triton.language as tl

from flora.kernels.context import Context, DecodeParts


def list_decode_parts(context: Context, page_tokens: int, part_tokens: int, class_tokens: int) -> DecodeParts:
    """Contexts cut every `part_tokens`. One without tokens has one part, so that its row gets its zeros.

    class_tokens  parts are ordered by how many times so many tokens they begin
    """
    num_sequences, max_pages = context.block_tables.shape
    capacity = num_sequences * max(triton.cdiv(max_pages * page_tokens, part_tokens), 1)
    device = context.seq_lens.device
    parts = DecodeParts(
        torch.empty(capacity, 4, dtype=torch.int32, device=device), torch.empty(1, dtype=torch.int32, device=device)
    )
    _decode_parts_kernel[(1,)](
        context.seq_lens,
        context.query_starts,
        parts.items,
        parts.count,
        num_sequences,
        PART_TOKENS=part_tokens,
        CLASS_TOKENS=class_tokens,
        BLOCK=256,
    )
    return parts


@triton.jit(do_not_specialize=["num_sequences"])
def _decode_parts_kernel(  # type: ignore[no-untyped-def]
    p_seq_lens,
    p_starts,
    p_items,
    p_count,
    num_sequences,
    PART_TOKENS: tl.constexpr,
    CLASS_TOKENS: tl.constexpr,
    BLOCK: tl.constexpr,  # sequences at a time
):
    count = 0
    for first in range(0, num_sequences, BLOCK):
        sequences, rows, lens, is_decoding = _sequences(p_seq_lens, p_starts, first, num_sequences, BLOCK)
        whole = tl.where(is_decoding, lens // PART_TOKENS, 0)
        places = count + tl.cumsum(whole) - whole
        for part in range(tl.max(whole)):
            _store_items(p_items, places + part, sequences, part, rows, lens, part < whole)
        count += tl.sum(whole)
    num_classes: tl.constexpr = (PART_TOKENS + CLASS_TOKENS - 1) // CLASS_TOKENS
    for step in range(num_classes):
        for first in range(0, num_sequences, BLOCK):
            sequences, rows, lens, is_decoding = _sequences(p_seq_lens, p_starts, first, num_sequences, BLOCK)
            rest = lens % PART_TOKENS
            is_part = is_decoding & ((rest > 0) | (lens == 0))
            is_class = tl.maximum(tl.cdiv(rest, CLASS_TOKENS), 1) == num_classes - step
            chosen = (is_part & is_class).to(tl.int32)
            places = count + tl.cumsum(chosen) - chosen
            _store_items(p_items, places, sequences, lens // PART_TOKENS, rows, lens, chosen != 0)
            count += tl.sum(chosen)
    tl.store(p_count, count)


@triton.jit
def _sequences(p_seq_lens, p_starts, first, num_sequences, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """(sequences, first row, tokens of context, whether it has one query) of the next BLOCK of them."""
    sequences = first + tl.arange(0, BLOCK)
    is_one = sequences < num_sequences
    rows = tl.load(p_starts + sequences, mask=is_one, other=0)
    ends = tl.load(p_starts + sequences + 1, mask=is_one, other=0)
    return sequences, rows, tl.load(p_seq_lens + sequences, mask=is_one, other=0), ends - rows == 1


@triton.jit
def _store_items(p_items, places, sequences, parts, rows, lens, is_one):  # type: ignore[no-untyped-def]
    p_item = p_items + places * 4
    tl.store(p_item, sequences, mask=is_one)
    tl.store(p_item + 1, parts, mask=is_one)
    tl.store(p_item + 2, rows, mask=is_one)
    tl.store(p_item + 3, lens, mask=is_one)


@triton.jit
def load_part(p_items, i):  # type: ignore[no-untyped-def]
    """(sequence, part, row, tokens of the context)."""
    p_item = p_items + i * 4
    return tl.load(p_item), tl.load(p_item + 1), tl.load(p_item + 2), tl.load(p_item + 3)
