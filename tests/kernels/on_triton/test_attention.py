import pytest
import torch

from flora.kernels import Context, ReferenceOps
from flora.kernels.triton_ops import TritonOps
from flora.kernels.tuning import DecodeTuning, PrefillTuning, Tuning
from tests.conftest import IS_FULL
from tests.kernels.caches import PagedCache

TOLERANCE = {torch.float32: 5e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
SMALL = Tuning(
    decode=DecodeTuning(split_tokens=32, whole_tokens=40, block_tokens=16, programs_per_sm=1),
    prefill=PrefillTuning(block_rows=16, block_tokens=16, num_warps=4),
)
HEADS = [(6, 2, 64), (2, 2, 16), (4, 1, 80)]  # query heads, KV heads, head_dim
if torch.cuda.is_available() or IS_FULL:  # the interpreter takes its time for every head
    HEADS += [(9, 3, 64), (8, 1, 80)]


def attend(ops, cache, q, lengths, queries, device, order=None, max_queries=None, prefill_range=None):
    order = list(range(len(lengths))) if order is None else order
    starts = torch.tensor([0, *torch.tensor(queries).cumsum(0).tolist()], dtype=torch.int32)
    lens = torch.tensor(lengths, dtype=torch.int32)
    tables = cache.block_tables(order, spare=2)
    context = Context(tables.to(device), lens.to(device), starts.to(device), max_queries, prefill_range)
    return ops.paged_attention(q.to(device), cache.kv.to(device), context, cache.head_dim**-0.5)


def queries_of(count: int, heads: int, head_dim: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(count, heads, head_dim, generator=torch.Generator().manual_seed(1)).to(dtype)


@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), HEADS)
@pytest.mark.parametrize("page_tokens", [16, 5])
@pytest.mark.parametrize("tuning", [Tuning(), SMALL], ids=["default", "small-tiles"])
def test_decode_agrees_with_the_reference(device, dtype, heads, kv_heads, head_dim, page_tokens, tuning):
    lengths = [100, 63, 1, 33, 0, 32]
    cache = PagedCache(lengths, kv_heads, head_dim, page_tokens, dtype=dtype)
    q = queries_of(6, heads, head_dim, dtype)

    result = attend(TritonOps(2, tuning), cache, q, lengths, [1] * 6, device, max_queries=1)

    wanted = attend(ReferenceOps(), cache, q, lengths, [1] * 6, device)
    torch.testing.assert_close(result, wanted, rtol=0, atol=TOLERANCE[dtype])


@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), HEADS)
@pytest.mark.parametrize("tuning", [Tuning(), SMALL], ids=["default", "small-tiles"])
def test_a_mixed_batch_of_chunks_and_single_tokens_agrees_with_the_reference(
    device, dtype, heads, kv_heads, head_dim, tuning
):
    lengths, queries = [40, 33, 1, 70, 0, 17, 9], [1, 33, 1, 21, 1, 0, 2]
    cache = PagedCache(lengths, kv_heads, head_dim, 16, dtype=dtype)
    q = queries_of(sum(queries), heads, head_dim, dtype)

    result = attend(TritonOps(2, tuning), cache, q, lengths, queries, device)

    wanted = attend(ReferenceOps(), cache, q, lengths, queries, device)
    torch.testing.assert_close(result, wanted, rtol=0, atol=TOLERANCE[dtype])


@pytest.mark.parametrize("tuning", [Tuning(), SMALL], ids=["default", "small-tiles"])
def test_naming_the_sequences_that_prefill_changes_no_bit(device, dtype, tuning):
    lengths, queries = [40, 1, 33, 70, 17, 0], [1, 1, 33, 21, 2, 0]
    cache = PagedCache(lengths, 2, 16, 16, dtype=dtype)
    q = queries_of(sum(queries), 4, 16, dtype)
    named = torch.tensor([2, 5], dtype=torch.int32, device=device)

    result = attend(TritonOps(2, tuning), cache, q, lengths, queries, device, prefill_range=named)

    assert torch.equal(result, attend(TritonOps(2, tuning), cache, q, lengths, queries, device))


def test_batch_invariant_attention_has_one_way_for_prompts_in_any_chunks_and_for_single_tokens(device, dtype):
    """A context of 70 tokens: its rows in one chunk, in two, and one by one."""
    cache = PagedCache([70, 33], 2, 16, 16, dtype=dtype)
    q, ops = queries_of(70, 4, 16, dtype), TritonOps(2, SMALL, batch_invariant=True)
    neighbour = queries_of(1, 4, 16, dtype)
    # The interpreter's products are BLAS's, whose bits depend on a row's place in its block; a tensor core's do not.
    places = range(70) if device.type == "cuda" else range(0, 70, 8)

    whole = attend(ops, cache, q, [70, 33], [70, 0], device)
    wanted = attend(ReferenceOps(), cache, q, [70, 33], [70, 0], device)
    torch.testing.assert_close(whole, wanted, rtol=0, atol=TOLERANCE[dtype])
    halves = [
        attend(ops, cache, q[:48], [48, 33], [48, 0], device),
        attend(ops, cache, q[48:], [70, 33], [22, 0], device),
    ]
    assert torch.equal(torch.cat(halves)[places], whole[places])
    for token in places:
        both = torch.cat((q[token : token + 1], neighbour))
        assert torch.equal(attend(ops, cache, both, [token + 1, 33], [1, 1], device)[0], whole[token]), token


def test_a_decode_row_keeps_its_bits_in_any_company(device, dtype):
    lengths = [70, 3, 65, 33]
    cache = PagedCache(lengths, 2, 32, 16, dtype=dtype)
    q, ops = queries_of(4, 6, 32, dtype), TritonOps(2, SMALL)
    alone = [attend(ops, cache, q[s : s + 1], [lengths[s]], [1], device, order=[s])[0] for s in range(4)]

    for order in ([0, 1, 2, 3], [3, 2, 0]):
        result = attend(ops, cache, q[order], [lengths[s] for s in order], [1] * len(order), device, order=order)
        for row, s in enumerate(order):
            assert torch.equal(result[row], alone[s]), (order, s)


def test_a_launch_leaves_its_successor_as_good_a_start(device, dtype):
    """What its programs count each other by is as it was, whatever the contexts were cut into."""
    ops = TritonOps(2, SMALL)
    for lengths in ([70, 3, 65], [33, 64, 200], [70, 3, 65]):
        cache = PagedCache(lengths, 2, 16, 16, dtype=dtype)
        q = queries_of(3, 4, 16, dtype)
        wanted = attend(ReferenceOps(), cache, q, lengths, [1] * 3, device)

        result = attend(ops, cache, q, lengths, [1] * 3, device, max_queries=1)

        torch.testing.assert_close(result, wanted, rtol=0, atol=TOLERANCE[dtype])


@pytest.mark.parametrize("page_tokens", [16, 5])
def test_keys_and_values_go_to_their_slots_and_padding_goes_nowhere(ops, device, dtype, page_tokens):
    n, heads, head_dim = 4, 3, 20
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(n, 3 * heads * head_dim, generator=generator).to(dtype).to(device)
    k, v = (part.view(n, heads, head_dim) for part in qkv.split(heads * head_dim, dim=1)[1:])  # strided views
    slots = torch.tensor([2 * page_tokens + 1, -1, 0, 4 * page_tokens - 1], device=device)
    stored = [torch.full((4, 2, page_tokens, heads, head_dim), 7.0, dtype=dtype, device=device) for _ in range(2)]

    ops.store_kv(k, v, stored[0], slots)
    ReferenceOps().store_kv(k, v, stored[1], slots)

    assert torch.equal(stored[0], stored[1])
    assert int((stored[0] != 7.0).any(-1).sum()) == 3 * 2 * heads


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA graph")
def test_a_captured_step_replays_over_other_lengths_and_pages(ops, device):
    lengths = [100, 1500, 63, 1]
    cache = PagedCache(lengths, 2, 64, 16, dtype=torch.bfloat16)
    kv, tables = cache.kv.to(device), cache.block_tables([0, 1, 2, 3], spare=2).to(device)
    lens = torch.tensor([1, 0, 0, 0], dtype=torch.int32, device=device)
    starts = torch.arange(5, dtype=torch.int32, device=device)
    q = queries_of(4, 8, 64, torch.bfloat16).to(device)
    new_k, new_v = (torch.randn(4, 2, 64, device=device).bfloat16() for _ in range(2))
    slots = torch.full((4,), -1, dtype=torch.int64, device=device)

    def step() -> torch.Tensor:
        ops.store_kv(new_k, new_v, kv, slots)
        return ops.paged_attention(q, kv, Context(tables, lens, starts, max_queries=1), 0.125)

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step()

    for order in ([0, 1, 2, 3], [3, 1, 0, 0]):
        lens.copy_(torch.tensor([lengths[s] for s in order]))
        tables.copy_(cache.block_tables([*order, 1], spare=2)[:4])
        last = [cache.pages[s][(lengths[s] - 1) // 16] * 16 + (lengths[s] - 1) % 16 for s in order[:2]]
        slots.copy_(torch.tensor([*last, -1, -1]))
        graph.replay()
        wanted = ReferenceOps().paged_attention(q, kv, Context(tables, lens, starts), 0.125)
        torch.testing.assert_close(out, wanted, rtol=0, atol=TOLERANCE[torch.bfloat16])
