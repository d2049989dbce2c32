import pytest
import torch

from flora.kernels import Context, ReferenceOps
from flora.kernels.reference_attention import bmm_keeps_rows
from tests.kernels.caches import PagedCache, expected_attention

OPS = ReferenceOps()


def attend(
    cache: PagedCache, q: torch.Tensor, lengths: list[int], queries: list[int], order: list[int], spare: int = 0
):
    """The op on sequences `order` of the cache; `spare` widens the block table by entries that no one may read."""
    tables = cache.block_tables(order, spare)
    starts = torch.tensor([0, *torch.tensor(queries).cumsum(0).tolist()], dtype=torch.int32)
    lens = torch.tensor(lengths, dtype=torch.int32)
    return OPS.paged_attention(q, cache.kv, Context(tables, lens, starts), cache.head_dim**-0.5)


@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(9, 3, 64), (4, 4, 16), (8, 1, 80), (6, 2, 128)])
@pytest.mark.parametrize("page_tokens", [16, 5])
def test_attention_is_softmax_over_each_sequences_own_past(heads, kv_heads, head_dim, page_tokens):
    lengths, queries = [100, 63, 1, 200, 0, 17], [1, 63, 1, 70, 1, 0]
    cache = PagedCache(lengths, kv_heads, head_dim, page_tokens)
    q = torch.randn(sum(queries), heads, head_dim, generator=torch.Generator().manual_seed(1))

    result = attend(cache, q, lengths, queries, order=list(range(6)), spare=3)

    wanted = expected_attention(q, cache, lengths, queries)
    torch.testing.assert_close(result.double(), wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_rounded_once(dtype):
    cache = PagedCache([77], 2, 64, 16, dtype=dtype)
    q = torch.randn(5, 4, 64, generator=torch.Generator().manual_seed(1)).to(dtype)

    result = attend(cache, q, [77], [5], order=[0])

    wanted = expected_attention(q, cache, [77], [5]).to(dtype)
    torch.testing.assert_close(result, wanted, rtol=torch.finfo(dtype).eps, atol=1e-6)


@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(9, 3, 64), (4, 4, 16), (16, 2, 128)])
def test_a_row_keeps_its_bits_however_its_prompt_is_cut(heads, kv_heads, head_dim):
    length = 150
    cache = PagedCache([length], kv_heads, head_dim, 16)
    q = torch.randn(length, heads, head_dim, generator=torch.Generator().manual_seed(1))
    whole = attend(cache, q, [length], [length], order=[0])

    for cuts in ([1] * length, [64, 64, 22], [63, 1, 65, 21], [100, 50], [7, 143]):
        done = 0
        for count in cuts:
            chunk = attend(cache, q[done : done + count], [done + count], [count], order=[0])
            assert torch.equal(chunk, whole[done : done + count]), (cuts, done)
            done += count


def test_a_row_keeps_its_bits_in_any_company():
    lengths = [150, 3, 64, 700, 65, 1, 129]
    cache = PagedCache(lengths, 3, 64, 16)
    q = torch.randn(len(lengths), 9, 64, generator=torch.Generator().manual_seed(1))
    alone = [attend(cache, q[s : s + 1], [lengths[s]], [1], order=[s])[0] for s in range(len(lengths))]

    for order, spare in [([0, 1, 2, 3, 4, 5, 6], 0), ([3, 0], 9), ([6, 5, 4, 3, 2, 1, 0] * 3, 1), ([0, 6], 40)]:
        result = attend(cache, q[order], [lengths[s] for s in order], [1] * len(order), order, spare)
        for row, s in enumerate(order):
            assert torch.equal(result[row], alone[s]), (order, s)


def test_stale_keys_and_values_of_another_sequence_change_nothing():
    cache = PagedCache([70], 2, 64, 16)  # all else in the cache is NaN
    q = torch.randn(1, 4, 64, generator=torch.Generator().manual_seed(1))
    among_nan = attend(cache, q, [70], [1], order=[0])
    cache.kv.nan_to_num_(nan=1e4)

    assert torch.equal(attend(cache, q, [70], [1], order=[0]), among_nan)


def test_this_machine_runs_the_fast_tiles():
    assert bmm_keeps_rows(64)


def test_keys_and_values_go_to_their_slots_and_padding_goes_nowhere():
    kv = torch.full((4, 2, 5, 2, 8), float("nan"))
    k, v = torch.arange(3.0)[:, None, None].expand(3, 2, 8), torch.arange(3.0)[:, None, None].expand(3, 2, 8) + 10

    OPS.store_kv(k, v, kv, torch.tensor([7, -1, 19]))  # page 1 offset 2; padding; page 3 offset 4

    assert torch.equal(kv[1, 0, 2], k[0])
    assert torch.equal(kv[3, 1, 4], v[2])
    assert int(kv.isnan().sum()) == kv.numel() - 2 * 2 * 2 * 8
