"""The CPU's operations against the reference: attention and rope to the bit, LoRA within rounding and row-invariant."""

import random

import pytest
import torch
from torch import Tensor

from flora.kernels import CHUNK, AdapterWeights, Context, Group, Place, ReferenceOps, WorkList, padded, split_segments
from flora.serve.engine.cpu.attention import keeps_the_references_bits, plan_decode
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
        tables = (torch.randperm(num_pages - 1, generator=generator) + 1).int().view(len(lengths), max_pages)
        for table, length in zip(tables, lengths, strict=True):
            for position in range(length):  # what is past a length stays NaN
                page, offset = table[position // page_tokens], position % page_tokens
                self.kv[page, :, offset] = torch.randn(2, num_kv_heads, head_dim, generator=generator)
        starts = torch.tensor([0, *queries], dtype=torch.int32).cumsum(0).int()
        self.context = Context(tables, torch.tensor(lengths, dtype=torch.int32), starts)
        self.q = torch.randn(sum(queries), num_q_heads, head_dim, generator=generator)

    def attention(self, ops: ReferenceOps) -> Tensor:
        return ops.paged_attention(self.q, self.kv, self.context, 0.125)


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


def test_contexts_of_very_different_lengths_give_the_references_bits():
    """Two short ones are not padded to a long one's length: there are two plans."""
    step = Step((4, 2, 16), [3, 20, 2100], [1, 1, 1])

    assert len(plan_decode(step.context, 16)) == 2
    assert same_bits(step.attention(CpuOps()), step.attention(REFERENCE))


def test_padding_sequences_are_left_out():
    step = Step((4, 2, 16), [40, 7], [1, 1])
    step.context.seq_lens[1] = 0

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
    assert keeps_the_references_bits(9, 3, 64, torch.get_num_threads())


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


# --- LoRA ---

SIZES = (40, 24, 24)  # outputs of q, k and v, for 100 inputs
STARTS = (0, 40, 64)


class Adapters:
    """Random adapters of one layer, q, k and v only, in a pool whose every other element is NaN."""

    def __init__(self, ranks: list[tuple[int, int, int]]) -> None:
        generator = torch.Generator().manual_seed(3)
        cell_elements, max_cells = 192, 90
        self.pool = torch.full((1 + max_cells * len(ranks), cell_elements), float("nan"))
        self.cells = (torch.randperm(max_cells * len(ranks), generator=generator) + 1).int().view(len(ranks), max_cells)
        self.modules = torch.zeros(len(ranks), 1, 7, 3, dtype=torch.int32)
        self.scales = torch.rand(len(ranks), 1, 7, generator=generator)
        for slot, by_module in enumerate(ranks):
            stream = torch.full((max_cells * cell_elements,), float("nan"))
            chunk = 0
            for factor in (1, 2):  # every A, then every B
                for module, rank in enumerate(by_module):
                    features = 100 if factor == 1 else SIZES[module]
                    self.modules[slot, 0, module, 0] = rank
                    self.modules[slot, 0, module, factor] = chunk
                    rows = stream[chunk * CHUNK :][: rank * padded(features)].view(rank, padded(features))
                    rows[:, :features] = torch.randn(rank, features, generator=generator)
                    chunk += rank * padded(features) // CHUNK
            self.pool[self.cells[slot].long()] = stream.view(max_cells, cell_elements)

    @property
    def weights(self) -> AdapterWeights:
        return AdapterWeights(self.pool, self.cells, self.modules, self.scales)

    def deltas(self, ops: ReferenceOps, x: Tensor, row_slots: list[int | None], dtype=torch.float32) -> Tensor:
        """What the adapters add to zeros."""
        work = WorkList.build(split_segments(row_slots, 64), block_rows=64, max_rank=64)
        y = torch.zeros(len(x), sum(SIZES), dtype=dtype)
        place = Place(0, Group.QKV, STARTS, SIZES)
        ops.lora_expand(y, ops.lora_shrink(x.to(dtype), self.weights, place, work), self.weights, place, work)
        return y


RANKS = [(16, 16, 16), (16, 16, 16), (1, 0, 5), (0, 0, 0), (64, 3, 17), (16, 16, 16)]


def rows_of(*counts: tuple[int | None, int]) -> list[int | None]:
    return [slot for slot, count in counts for _ in range(count)]


@pytest.mark.parametrize(
    "row_slots",
    [
        rows_of((None, 2), (0, 1), (1, 1), (2, 1), (4, 1), (5, 1)),
        rows_of((0, 9), (1, 3), (3, 2), (4, 70)),
        rows_of((None, 5)),
        rows_of((2, 1)),
    ],
    ids=["decode", "prefill", "base", "one row"],
)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
def test_lora_is_the_references(row_slots, dtype, tolerance):
    adapters = Adapters(RANKS)
    x = torch.randn(len(row_slots), 100, generator=torch.Generator().manual_seed(4))

    ours, theirs = (adapters.deltas(ops, x, row_slots, dtype).float() for ops in (CpuOps(), REFERENCE))

    assert float((ours - theirs).abs().max()) <= tolerance * max(1.0, float(theirs.abs().max()))
    assert all((ours[i] == 0).all() for i, slot in enumerate(row_slots) if slot in (None, 3))


def test_a_rows_lora_has_the_same_bits_in_any_company():
    """Alone, in a full tile, in many tiles, beside adapters laid out alike or not, beside NaN."""
    adapters = Adapters(RANKS)
    x = torch.randn(200, 100, generator=torch.Generator().manual_seed(5))
    for slot in (0, 2, 4):
        alone = adapters.deltas(CpuOps(), x[:1], [slot])[0]
        for before, own, after in ((0, 8, 0), (0, 70, 0), (5, 1, 1), (3, 40, 20), (0, 1, 9)):
            row_slots = rows_of((None, before), (slot, own), (1, after), (5, after))
            for place in {before, before + own // 2, before + own - 1}:
                rows = torch.cat((x[1 : place + 1], x[:1], x[place + 1 : len(row_slots)]))
                rows[[i for i in range(len(rows)) if row_slots[i] != slot]] = float("nan")
                assert same_bits(adapters.deltas(CpuOps(), rows, row_slots)[place], alone)
