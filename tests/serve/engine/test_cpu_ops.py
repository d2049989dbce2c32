"""The CPU's operations give the bits of the reference, whatever is in the step."""

import random

import pytest
import torch
from torch import Tensor

from flora.kernels import ReferenceOps
from flora.serve.engine.cpu.attention import keeps_the_references_bits
from flora.serve.engine.cpu.ops import CpuOps

HEADS = [(9, 3, 64), (14, 2, 64), (4, 2, 16), (4, 4, 24), (8, 1, 32), (32, 8, 128)]  # query heads, key heads, head size
REFERENCE = ReferenceOps()


class Step:
    """The tensors of a step over random pages: sequences of these context lengths and numbers of queries."""

    def __init__(
        self, heads: tuple[int, int, int], lengths: list[int], queries: list[int], page_tokens: int = 16
    ) -> None:
        num_q_heads, num_kv_heads, head_dim = heads
        generator = torch.Generator().manual_seed(len(lengths) + sum(lengths))
        max_pages = max(-(-length // page_tokens) for length in lengths)
        num_pages = 1 + max_pages * len(lengths)
        self.kv = torch.full((num_pages, 2, page_tokens, num_kv_heads, head_dim), float("nan"))
        self.block_tables = (torch.randperm(num_pages - 1, generator=generator) + 1).int().view(len(lengths), max_pages)
        for table, length in zip(self.block_tables, lengths, strict=True):
            for position in range(length):  # what is past a length stays NaN
                page, offset = table[position // page_tokens], position % page_tokens
                self.kv[page, :, offset] = torch.randn(2, num_kv_heads, head_dim, generator=generator)
        self.seq_lens = torch.tensor(lengths, dtype=torch.int32)
        self.query_starts = torch.tensor([0, *queries], dtype=torch.int32).cumsum(0).int()
        self.q = torch.randn(sum(queries), num_q_heads, head_dim, generator=generator)

    def attention(self, ops: ReferenceOps) -> Tensor:
        return ops.paged_attention(self.q, self.kv, self.block_tables, self.seq_lens, self.query_starts, 0.125)


def same_bits(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.view(torch.int32), b.view(torch.int32))


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("page_tokens", [4, 16, 48])
def test_decode_attention_gives_the_references_bits(heads, page_tokens):
    step = Step(heads, [1, 5, 63, 64, 65, 129, 200], [1] * 7, page_tokens)

    assert same_bits(step.attention(CpuOps()), step.attention(REFERENCE))


@pytest.mark.parametrize("heads", HEADS[:3])
def test_a_mixed_step_gives_the_references_bits(heads):
    step = Step(heads, [40, 7, 70, 16, 130], [1, 7, 30, 0, 1])

    assert same_bits(step.attention(CpuOps()), step.attention(REFERENCE))


def test_padding_sequences_are_left_out():
    step = Step((4, 2, 16), [40, 7], [1, 1])
    step.seq_lens[1] = 0

    out = step.attention(CpuOps())

    assert same_bits(out, step.attention(REFERENCE))
    assert (out[1] == 0).all()


def test_each_steps_plan_is_its_own():
    """Two steps in turn on one object: a plan kept too long would read the other's pages."""
    ops = CpuOps()
    first, second = Step((4, 2, 16), [30, 40], [1, 1]), Step((4, 2, 16), [50, 20], [1, 1])

    for step in (first, second, first):
        assert same_bits(step.attention(ops), step.attention(REFERENCE))


def test_this_machine_takes_the_wide_products():
    assert keeps_the_references_bits(9, 3, 64)


@pytest.mark.parametrize("heads", HEADS)
def test_rope_and_the_stored_keys_are_the_references(heads):
    num_q_heads, num_kv_heads, head_dim = heads
    seeded, generator = random.Random(1), torch.Generator().manual_seed(1)
    qkv = torch.randn(9, (num_q_heads + 2 * num_kv_heads) * head_dim, generator=generator)
    positions = torch.tensor([seeded.randrange(100) for _ in range(9)])
    slots = torch.tensor([3, 17, -1, 40, 41, 0, -1, 79, 63])
    angles = torch.rand(100, head_dim // 2, generator=generator)
    ours, theirs = (torch.full((5, 2, 16, num_kv_heads, head_dim), float("nan")) for _ in range(2))

    q = CpuOps().rope_store(qkv.clone(), positions, angles.cos(), angles.sin(), ours, slots)
    expected = REFERENCE.rope_store(qkv.clone(), positions, angles.cos(), angles.sin(), theirs, slots)

    assert same_bits(q.contiguous(), expected.contiguous())
    assert same_bits(ours, theirs)
