import pytest
import torch

from flora.kernels import (
    RANK_LANES,
    Group,
    ReferenceOps,
    WorkList,
    cut_runs,
    matrix_alignment,
    row_alignment,
    share_ranks,
    split_segments,
)
from tests.kernels.scenes import NAN, Adapter, Shape, expected_lora, pack_adapters, random_adapter, work_for

SHAPE = Shape(hidden=100, kv=63, ff=200)
RANKS = [[1, 3, 4, 8, 64, 3, 1], [8, 0, 1, 0, 0, 5, 16], [0, 0, 0, 0, 0, 0, 0], [4, 4, 4, 4, 4, 4, 4]]


@pytest.fixture(scope="module")
def adapters() -> list[list[Adapter]]:
    return [[random_adapter(SHAPE, ranks, seed=10 * s + layer) for layer in range(2)] for s, ranks in enumerate(RANKS)]


def rounded(adapter, dtype):
    return Adapter([a.to(dtype) for a in adapter.a], [b.to(dtype) for b in adapter.b], adapter.scale)


def apply_lora(x, y, weights, layer, group, work):
    ops = ReferenceOps()
    place = SHAPE.place(layer, group)
    ops.lora_expand(y, ops.lora_shrink(x, weights, place, work), weights, place, work)
    return y


@pytest.mark.parametrize("group", list(Group))
def test_every_row_gets_its_own_adapter_and_base_rows_get_none(adapters, group):
    row_slots = [0, 0, 0, None, 1, None, None, 2, 3, 3]
    weights = pack_adapters(adapters)
    x = torch.randn(len(row_slots), SHAPE.inputs[group.value[0]], generator=torch.Generator().manual_seed(1))
    y = torch.randn(len(row_slots), sum(SHAPE.out_sizes(group)), generator=torch.Generator().manual_seed(2))

    result = apply_lora(x, y.clone(), weights, 1, group, work_for(row_slots, block_rows=2))

    wanted = expected_lora(x, y, [None if s is None else adapters[s][1] for s in row_slots], SHAPE, group)
    torch.testing.assert_close(result.double(), wanted, rtol=1e-5, atol=1e-5)
    for row in (3, 5, 6, 7):  # base rows, and the row of an adapter that has no module at all
        assert torch.equal(result[row], y[row])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_rounded_once(adapters, dtype):
    group, row_slots = Group.QKV, [0, 1, 3]
    weights = pack_adapters(adapters, dtype=dtype)
    stored = [[rounded(layer, dtype) for layer in layers] for layers in adapters]
    x = torch.randn(3, SHAPE.hidden, generator=torch.Generator().manual_seed(3)).to(dtype)
    y = torch.randn(3, sum(SHAPE.out_sizes(group)), generator=torch.Generator().manual_seed(4)).to(dtype)

    result = apply_lora(x, y.clone(), weights, 0, group, work_for(row_slots))

    wanted = expected_lora(x, y, [stored[s][0] for s in row_slots], SHAPE, group).to(dtype)
    ulp = torch.finfo(dtype).eps
    torch.testing.assert_close(result, wanted, rtol=ulp, atol=1e-6)


@pytest.mark.parametrize("group", list(Group))
def test_a_row_keeps_its_bits_in_any_company(adapters, group):
    generator = torch.Generator().manual_seed(5)
    weights = pack_adapters(adapters)
    moved = pack_adapters(adapters, seed=9)
    row = torch.randn(SHAPE.inputs[group.value[0]], generator=generator)
    start = torch.randn(sum(SHAPE.out_sizes(group)), generator=generator)
    alone = apply_lora(row[None].clone(), start[None].clone(), weights, 0, group, work_for([0]))[0]

    for row_slots, place, block_rows in [
        ([0, 0], 1, 16),
        ([1, 1, None, 0], 3, 16),
        ([0] * 40 + [None] + [3] * 30, 17, 16),
        ([0] * 200, 199, 64),
        ([3] * 5 + [0] * 65, 5, 64),
    ]:
        x = torch.randn(len(row_slots), len(row), generator=generator)
        x[(place + 1) % len(row_slots)] = NAN
        y = torch.randn(len(row_slots), len(start), generator=generator)
        x[place], y[place] = row, start
        for pool in (weights, moved):  # an adapter that was evicted and came back lies in other cells
            result = apply_lora(x, y.clone(), pool, 0, group, work_for(row_slots, block_rows=block_rows))
            assert torch.equal(result[place], alone), (row_slots, place)


def test_segments_are_runs_of_one_slot_cut_at_the_block_size():
    assert split_segments([None, 7, 7, 7, 2, None, 2], block_rows=2) == [(7, 1, 2), (7, 3, 1), (2, 4, 1), (2, 6, 1)]
    assert split_segments([], block_rows=16) == []


def test_matrices_start_where_it_helps_the_rows_that_it_helps_most():
    assert matrix_alignment([4096, 1024, 14336], cell_elements=32768) == 2048
    assert matrix_alignment([4096, 11008], cell_elements=131072) == 2048
    assert matrix_alignment([576, 192, 1536], cell_elements=6144) == 512
    assert matrix_alignment([896, 128, 4864], cell_elements=4096) == 256
    assert matrix_alignment([100], cell_elements=256) == 128  # a row of 100 is stored as 128


def test_rows_start_on_what_divides_their_length_and_their_matrix_start():
    assert [row_alignment(2048, length) for length in (4096, 11008, 18944, 576, 100)] == [2048, 256, 512, 64, 128]
    assert row_alignment(256, 4096) == 256


def test_runs_are_cut_into_segments_and_the_heaviest_adapters_come_first():
    runs = [(0, 0, 4), (2, 4, 9), (1, 13, 1), (3, 14, 8)]

    segments = cut_runs(runs, 8, ranks=[8, 64, 16, 16])

    assert segments == [(1, 13, 1), (2, 4, 8), (2, 12, 1), (3, 14, 8), (0, 0, 4)]


def test_each_lane_of_a_segment_that_has_a_block_of_ranks_is_a_share_of_it():
    segments = [(1, 3, 8), (0, 0, 2), (3, 2, 1), (2, 11, 1)]

    shares = share_ranks(segments, ranks=[16, 40, 0, 17])

    assert shares == [(1, 3, 8, 0), (1, 3, 8, 1), (1, 3, 8, 2), (0, 0, 2, 0), (3, 2, 1, 0), (3, 2, 1, 1)]
    assert len(share_ranks([(0, 0, 1)], ranks=[512])) == RANK_LANES


def test_a_work_list_refuses_more_segments_than_it_holds():
    with pytest.raises(ValueError, match="3 segments do not fit a work list of capacity 2"):
        WorkList.build([(0, 0, 1), (1, 1, 1), (2, 2, 1)], block_rows=16, max_rank=8, capacity=2)
