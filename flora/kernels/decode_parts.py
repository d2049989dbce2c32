"""Triton: which parts of which contexts a decode step attends over, listed once a step for all of its layers.

A grid of every part that a context could have would be nearly all programs with nothing to do: a nanosecond each, which
is a sixth of the attention of 256 sequences where a context may grow to 8,192 tokens.
"""

import torch
import triton
import triton.language as tl

from flora.kernels.context import Context, DecodeParts


def list_decode_parts(
    context: Context, page_tokens: int, part_tokens: int, class_tokens: int, whole_tokens: int
) -> DecodeParts:
    """Contexts cut every `part_tokens`. One without tokens has one part, so that its row gets its zeros.

    class_tokens  parts are ordered by how many times so many tokens they begin
    whole_tokens  contexts of at most so many are not cut; at least part_tokens
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
        WHOLE_TOKENS=whole_tokens,
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
    WHOLE_TOKENS: tl.constexpr,  # at least PART_TOKENS
    CLASS_TOKENS: tl.constexpr,
    BLOCK: tl.constexpr,  # sequences at a time
):
    num_classes: tl.constexpr = (WHOLE_TOKENS + CLASS_TOKENS - 1) // CLASS_TOKENS
    longer: tl.constexpr = num_classes - (PART_TOKENS + CLASS_TOKENS - 1) // CLASS_TOKENS  # classes above a part's
    count = 0
    for step in range(longer):
        count = _list_ends(
            p_seq_lens, p_starts, p_items, count, num_sequences, num_classes - step, PART_TOKENS, WHOLE_TOKENS,
            CLASS_TOKENS, BLOCK,
        )  # fmt: skip
    for first in range(0, num_sequences, BLOCK):
        sequences, rows, lens, is_decoding = _sequences(p_seq_lens, p_starts, first, num_sequences, BLOCK)
        full = tl.where(is_decoding & (lens > WHOLE_TOKENS), lens // PART_TOKENS, 0)
        places = count + tl.cumsum(full) - full
        for part in range(tl.max(full)):
            _store_items(p_items, places + part, sequences, part, rows, lens, part < full)
        count += tl.sum(full)
    for step in range(longer, num_classes):
        count = _list_ends(
            p_seq_lens, p_starts, p_items, count, num_sequences, num_classes - step, PART_TOKENS, WHOLE_TOKENS,
            CLASS_TOKENS, BLOCK,
        )  # fmt: skip
    tl.store(p_count, count)


@triton.jit
def _list_ends(  # type: ignore[no-untyped-def]
    p_seq_lens, p_starts, p_items, count, num_sequences, i_class, PART_TOKENS: tl.constexpr,
    WHOLE_TOKENS: tl.constexpr, CLASS_TOKENS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The number of parts listed, now with contexts' last or only parts that begin i_class times CLASS_TOKENS."""
    for first in range(0, num_sequences, BLOCK):
        sequences, rows, lens, is_decoding = _sequences(p_seq_lens, p_starts, first, num_sequences, BLOCK)
        is_cut = lens > WHOLE_TOKENS
        rest = tl.where(is_cut, lens % PART_TOKENS, lens)
        is_class = tl.maximum(tl.cdiv(rest, CLASS_TOKENS), 1) == i_class
        chosen = (is_decoding & is_class & ((rest > 0) | (lens == 0))).to(tl.int32)
        places = count + tl.cumsum(chosen) - chosen
        _store_items(p_items, places, sequences, tl.where(is_cut, lens // PART_TOKENS, 0), rows, lens, chosen != 0)
        count += tl.sum(chosen)
    return count


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
