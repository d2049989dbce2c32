from dataclasses import replace

import pytest
import torch

from flora.kernels import (
    CHUNK,
    AdapterWeights,
    Group,
    LoraWork,
    Ops,
    PackedLinear,
    ReferenceOps,
    SideStream,
    WorkList,
    project,
    project_beside,
)
from flora.kernels.triton_ops import TritonOps
from flora.kernels.tuning import MIDDLE_LIST, SHORT_LIST, LoraTuning, Tuning
from flora.kernels.work import SEGMENT_ROWS
from tests.conftest import IS_FULL
from tests.kernels.scenes import NAN, Adapter, Shape, cut_work, pack_adapters, random_adapter, work_for

ODD = Shape(hidden=100, kv=63, ff=200)
SMALL_LLAMA = Shape(hidden=576, kv=192, ff=896)
EVEN = Shape(hidden=256, kv=256, ff=512)  # two tiles of outputs fit a row's alignment
RANKS = [[1, 3, 4, 8, 64, 3, 1], [8, 0, 1, 0, 0, 5, 16], [0] * 7, [40, 17, 64, 4, 3, 3, 8]]
ROW_SLOTS = [0, 0, 0, None, 1, None, None, 2, 3, 3]
FP8 = torch.float8_e4m3fn
TOLERANCE = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}  # of the largest value


def whatever_room(tuning: LoraTuning) -> Tuning:
    return Tuning(lora=tuning, middle_lora=tuning, short_lora=tuning)


FINE = whatever_room(  # small tiles, so that the odd sizes above meet every loop more than once
    LoraTuning(
        split_elements=64,
        max_splits=2,
        shrink_block_k=64,
        expand_width=64,
        expand_narrow=64,
        programs_per_sm=3,
    )
)


def adapters_of(shape: Shape) -> list[list[Adapter]]:
    return [[random_adapter(shape, ranks, seed=10 * s + layer) for layer in range(2)] for s, ranks in enumerate(RANKS)]


def run(ops: Ops, x, y, weights: AdapterWeights, shape: Shape, group: Group, work: WorkList | LoraWork) -> torch.Tensor:
    y = y.clone()
    place = shape.place(1, group)
    lists = both(work) if isinstance(work, WorkList) else work
    ops.lora_expand(y, ops.lora_shrink(x, weights, place, lists.shrink), weights, place, lists.expand)
    return y


def both(work: WorkList) -> LoraWork:
    return LoraWork(work, work)


def cut(row_slots: list[int | None], device) -> LoraWork:
    return cut_work(row_slots, [max(ranks) for ranks in RANKS], device=device)


def to(device, weights: AdapterWeights) -> AdapterWeights:
    moved = {name: getattr(weights, name).to(device) for name in ("pool", "cells", "modules", "scales")}
    return replace(weights, **moved)


def inputs(shape: Shape, group: Group, n: int, dtype, device) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(n)
    x = torch.randn(n, shape.inputs[group.value[0]], generator=generator)
    y = torch.randn(n, sum(shape.out_sizes(group)), generator=generator)
    return x.to(dtype).to(device), y.to(dtype).to(device)


def assert_agrees(result, wanted, dtype):
    assert bool(result.isfinite().all())
    worst = float((result.float() - wanted.float()).abs().max())
    assert worst <= TOLERANCE[dtype] * float(wanted.float().abs().max()), worst


@pytest.mark.parametrize("group", list(Group))
def test_every_row_gets_its_own_adapter_as_the_reference_says(ops, device, dtype, group):
    weights = to(device, pack_adapters(adapters_of(ODD), dtype=dtype))
    x, y = inputs(ODD, group, len(ROW_SLOTS), dtype, device)
    work = work_for(ROW_SLOTS, block_rows=2, device=device)

    result = run(ops, x, y, weights, ODD, group, work)

    assert_agrees(result, run(ReferenceOps(), x, y, weights, ODD, group, work), dtype)
    for row in (3, 5, 6, 7):  # base rows, and the row of an adapter that has no module at all
        assert torch.equal(result[row], y[row])


@pytest.mark.parametrize("group", [Group.OUT, Group.DOWN])
def test_sizes_of_a_small_llama(ops, device, dtype, group):
    weights = to(device, pack_adapters(adapters_of(SMALL_LLAMA), dtype=dtype))
    row_slots = [0, None, 3, 3]
    x, y = inputs(SMALL_LLAMA, group, len(row_slots), dtype, device)
    work = work_for(row_slots, device=device)

    result = run(ops, x, y, weights, SMALL_LLAMA, group, work)

    assert_agrees(result, run(ReferenceOps(), x, y, weights, SMALL_LLAMA, group, work), dtype)


@pytest.mark.parametrize("spare", [SHORT_LIST, MIDDLE_LIST])
@pytest.mark.parametrize("group", [Group.QKV, Group.DOWN] if torch.cuda.is_available() or IS_FULL else [Group.DOWN])
def test_lists_with_room_for_more_have_tiles_of_their_own(ops, device, dtype, group, spare):
    weights = to(device, pack_adapters(adapters_of(SMALL_LLAMA), dtype=dtype))
    row_slots = [*ROW_SLOTS, *[None] * 3, *[3] * 9]
    x, y = inputs(SMALL_LLAMA, group, len(row_slots), dtype, device)
    work = cut_work(row_slots, [max(ranks) for ranks in RANKS], spare=spare, device=device)

    result = run(ops, x, y, weights, SMALL_LLAMA, group, work)

    assert_agrees(result, run(ReferenceOps(), x, y, weights, SMALL_LLAMA, group, work), dtype)


@pytest.mark.parametrize("group", [Group.QKV, Group.DOWN])
def test_a_single_stream_whose_list_has_room_for_one(ops, device, dtype, group):
    weights = to(device, pack_adapters(adapters_of(SMALL_LLAMA), dtype=dtype))
    x, y = inputs(SMALL_LLAMA, group, 1, dtype, device)
    work = cut_work([3], [max(ranks) for ranks in RANKS], spare=0, device=device)
    assert work.shrink.room == work.expand.room <= SHORT_LIST

    result = run(ops, x, y, weights, SMALL_LLAMA, group, work)

    assert_agrees(result, run(ReferenceOps(), x, y, weights, SMALL_LLAMA, group, work), dtype)


@pytest.mark.parametrize("block_rows", [SEGMENT_ROWS, 32])
@pytest.mark.parametrize("group", [Group.QKV, Group.DOWN])
def test_no_tile_size_changes_what_comes_out(device, dtype, group, block_rows):
    weights = to(device, pack_adapters(adapters_of(ODD), dtype=dtype))
    x, y = inputs(ODD, group, len(ROW_SLOTS), dtype, device)
    work = work_for(ROW_SLOTS, block_rows=block_rows, device=device)

    result = run(TritonOps(num_sms=1, tuning=FINE), x, y, weights, ODD, group, work)

    assert_agrees(result, run(ReferenceOps(), x, y, weights, ODD, group, work), dtype)


@pytest.mark.parametrize("block_rows", [SEGMENT_ROWS, 64])
def test_blocks_of_many_rows_as_prompts_have_them(ops, device, dtype, block_rows):
    weights = to(device, pack_adapters(adapters_of(ODD), dtype=dtype))
    row_slots = [0] * 70 + [None] * 5 + [3] * 20
    x, y = inputs(ODD, Group.QKV, len(row_slots), dtype, device)
    work = work_for(row_slots, block_rows=block_rows, device=device)

    result = run(ops, x, y, weights, ODD, Group.QKV, work)

    assert_agrees(result, run(ReferenceOps(), x, y, weights, ODD, Group.QKV, work), dtype)


@pytest.mark.parametrize(("shape", "group"), [(ODD, Group.QKV), (ODD, Group.DOWN), (EVEN, Group.QKV)], ids=str)
def test_rows_of_prompts_and_single_ones_lie_in_lists_cut_for_each_kernel(ops, device, dtype, shape, group):
    alignment = 256 if shape is EVEN else CHUNK
    weights = to(device, pack_adapters(adapters_of(shape), dtype=dtype, cell_elements=1024, alignment=alignment))
    row_slots = [*ROW_SLOTS, *[None] * 3, *[0] * 17, *[1] * 5, *[3] * 33]
    x, y = inputs(shape, group, len(row_slots), dtype, device)
    work = cut(row_slots, device)
    place = shape.place(1, group)

    result = run(ops, x, y, weights, shape, group, work)
    terms = torch.full_like(y, NAN)
    v = ops.lora_shrink(x, weights, place, work.shrink)
    ops.lora_expand(terms, v, weights, place, work.expand, add=False)

    wanted = run(ReferenceOps(), x, y, weights, shape, group, work_for(row_slots, device=device))
    assert_agrees(result, wanted, dtype)
    base = [row for row, slot in enumerate(row_slots) if slot in (None, 2)]
    assert torch.equal(result[base], y[base])
    rows = [row for row, slot in enumerate(row_slots) if slot is not None]
    alone = run(ReferenceOps(), x, torch.zeros_like(y), weights, shape, group, work_for(row_slots, device=device))
    assert_agrees(terms[rows], alone[rows], dtype)
    single = len(ROW_SLOTS)
    without = cut([*ROW_SLOTS, *[None] * (len(row_slots) - single)], device)
    decoding = run(ops, x, y, weights, shape, group, without)
    assert torch.equal(result[:single], decoding[:single]), "prompts in the list change no row that decodes"


@pytest.mark.parametrize("group", [Group.QKV, Group.DOWN])
def test_whoever_shares_the_ranks_the_bits_are_the_same(ops, device, dtype, group):
    weights = to(device, pack_adapters(adapters_of(ODD), dtype=dtype))
    x, y = inputs(ODD, group, len(ROW_SLOTS), dtype, device)
    shared = cut(ROW_SLOTS, device)
    whole = work_for(ROW_SLOTS, block_rows=SEGMENT_ROWS, device=device)

    result = run(ops, x, y, weights, ODD, group, shared)

    assert torch.equal(result, run(ops, x, y, weights, ODD, group, LoraWork(whole, shared.expand)))
    assert_agrees(result, run(ReferenceOps(), x, y, weights, ODD, group, shared), dtype)


def test_shares_of_other_ranks_than_a_tile_has_are_refused(device, dtype):
    weights = to(device, pack_adapters(adapters_of(ODD), dtype=dtype))
    x, y = inputs(ODD, Group.OUT, len(ROW_SLOTS), dtype, device)
    tuning = whatever_room(LoraTuning(block_rank=32))

    with pytest.raises(ValueError, match="needs block_rank 16, not 32"):
        run(TritonOps(num_sms=1, tuning=tuning), x, y, weights, ODD, Group.OUT, cut(ROW_SLOTS, device))


@pytest.mark.parametrize("count", [1, 3, 8, 16])
def test_a_row_keeps_its_bits_however_few_rows_its_segment_has(ops, device, dtype, count):
    """Where two requests of an adapter lie side by side, the second one's first row falls anywhere in a segment."""
    weights = to(device, pack_adapters(adapters_of(ODD), dtype=dtype))
    x, y = inputs(ODD, Group.QKV, 1, dtype, device)
    x, y = x.expand(count, -1).contiguous(), y.expand(count, -1).contiguous()

    alone = run(ops, x[:1], y[:1], weights, ODD, Group.QKV, cut([3], device))
    result = run(ops, x, y, weights, ODD, Group.QKV, cut([3] * count, device))

    # The interpreter's products are BLAS's, whose bits depend on a row's place in its block; a tensor core's do not.
    for row in range(0, count, 1 if device.type == "cuda" else SEGMENT_ROWS):
        assert torch.equal(result[row], alone[0]), row


@pytest.mark.parametrize("rank", [65, 130])
def test_ranks_beyond_one_tile(ops, device, dtype, rank):
    adapters = [[random_adapter(EVEN, [rank] * 7, seed=layer) for layer in range(2)]]
    weights = to(device, pack_adapters(adapters, dtype=dtype, cell_elements=1024, alignment=256))
    x, y = inputs(EVEN, Group.QKV, 11, dtype, device)
    row_slots = [None, *[0] * 10]
    shared = cut_work(row_slots, [rank], max_rank=rank, device=device)
    work = LoraWork(work_for(row_slots, block_rows=SEGMENT_ROWS, max_rank=rank, device=device), shared.expand)

    result = run(ops, x, y, weights, EVEN, Group.QKV, work)

    assert_agrees(result, run(ReferenceOps(), x, y, weights, EVEN, Group.QKV, work), dtype)
    assert torch.equal(result, run(ops, x, y, weights, EVEN, Group.QKV, shared)), "130: a lane has two blocks"


@pytest.mark.parametrize("group", [Group.QKV, Group.GATE_UP])
@pytest.mark.parametrize("crowd", [1, 10**6])
def test_few_segments_or_many_the_bits_are_the_same(device, dtype, group, crowd):
    """Where there are few, each program has fewer outputs."""
    weights = to(device, pack_adapters(adapters_of(EVEN), dtype=dtype, cell_elements=1024, alignment=256))
    x, y = inputs(EVEN, group, len(ROW_SLOTS), dtype, device)
    work = work_for(ROW_SLOTS, device=device)
    tuning = whatever_room(LoraTuning(expand_width=256, expand_narrow=64, expand_crowd=crowd))
    alike = whatever_room(LoraTuning(expand_width=64, expand_narrow=64))

    result = run(TritonOps(num_sms=2, tuning=tuning), x, y, weights, EVEN, group, work)

    assert torch.equal(result, run(TritonOps(num_sms=2, tuning=alike), x, y, weights, EVEN, group, work))
    assert_agrees(result, run(ReferenceOps(), x, y, weights, EVEN, group, work), dtype)


@pytest.mark.parametrize("group", [Group.QKV, Group.GATE_UP])
def test_each_matrix_is_looked_up_as_seldom_as_its_own_rows_allow(device, dtype, group):
    """Rows of 256 beside others of 384, in cells of 512, every matrix on a multiple of 256."""
    shape = Shape(hidden=256, kv=128, ff=384)
    weights = to(device, pack_adapters(adapters_of(shape), dtype=dtype, cell_elements=512, alignment=256))
    x, y = inputs(shape, group, len(ROW_SLOTS), dtype, device)
    work = work_for(ROW_SLOTS, device=device)

    result = run(TritonOps(num_sms=2, tuning=FINE), x, y, weights, shape, group, work)

    assert_agrees(result, run(ReferenceOps(), x, y, weights, shape, group, work), dtype)


@pytest.mark.parametrize("group", [Group.QKV, Group.OUT])
def test_outputs_of_a_tile_lie_in_one_cell_where_rows_are_aligned(ops, device, dtype, group):
    weights = to(device, pack_adapters(adapters_of(EVEN), dtype=dtype, cell_elements=1024, alignment=256))
    x, y = inputs(EVEN, group, len(ROW_SLOTS), dtype, device)
    work = work_for(ROW_SLOTS, device=device)
    place = EVEN.place(1, group)

    result = run(ops, x, y, weights, EVEN, group, work)
    terms = torch.full_like(y, NAN)
    ops.lora_expand(terms, ops.lora_shrink(x, weights, place, work), weights, place, work, add=False)

    assert_agrees(result, run(ReferenceOps(), x, y, weights, EVEN, group, work), dtype)
    rows = [row for row, slot in enumerate(ROW_SLOTS) if slot is not None]
    wanted = run(ReferenceOps(), x, torch.zeros_like(y), weights, EVEN, group, work)
    assert_agrees(terms[rows], wanted[rows], dtype)


def test_half_precision_weights_cost_a_float32_step_no_digits(ops, device):
    weights = to(device, pack_adapters(adapters_of(ODD), dtype=torch.float16))
    x, y = inputs(ODD, Group.QKV, len(ROW_SLOTS), torch.float32, device)
    work = work_for(ROW_SLOTS, device=device)

    result = run(ops, x, y, weights, ODD, Group.QKV, work)

    wanted = run(ReferenceOps(), x, y, weights, ODD, Group.QKV, work)
    assert_agrees(result, wanted, torch.float32)


SHARED = [
    *((ODD, Group.QKV, sharing) for sharing in (1, 2, 3, 4, 9)),
    (ODD, Group.DOWN, 20),
    *((EVEN, Group.OUT, sharing) for sharing in (2, 9)),
    (EVEN, Group.QKV, 4),
]
if torch.cuda.is_available() or IS_FULL:  # the interpreter takes its time for every group
    SHARED += [(ODD, Group.QKV, 20), *((ODD, Group.DOWN, sharing) for sharing in (1, 2, 3, 4, 9))]


@pytest.mark.parametrize(("shape", "group", "sharing"), SHARED, ids=str)
def test_a_row_keeps_its_bits_whatever_the_other_rows_hold_and_whoever_shares_its_adapter(
    ops, device, dtype, shape, group, sharing
):
    alignment = 256 if shape is EVEN else CHUNK
    weights = to(device, pack_adapters(adapters_of(shape), dtype=dtype, cell_elements=1024, alignment=alignment))
    x, y = inputs(shape, group, 1, dtype, device)
    alone = run(ops, x, y, weights, shape, group, work_for([3], spare=3, device=device))[0]
    row_slots = [0, 0, 0, None, 1, None, None, 2, *[3] * sharing]
    # The interpreter's products are BLAS's, whose bits depend on a row's place in its block; a tensor core's do not.
    for place in range(8, 8 + sharing, 1 if device.type == "cuda" else SEGMENT_ROWS):
        others, other_y = inputs(shape, group, len(row_slots), dtype, device)
        others[8:], others[4] = NAN, NAN
        others[place], other_y[place] = x[0], y[0]

        result = run(ops, others, other_y, weights, shape, group, work_for(row_slots, spare=3, device=device))

        assert torch.equal(result[place], alone), place


@pytest.mark.parametrize("block_rows", [SEGMENT_ROWS, 32])
@pytest.mark.parametrize("group", [Group.QKV, Group.GATE_UP])
def test_terms_alone_are_written_whole_and_nothing_else(ops, device, dtype, group, block_rows):
    """Whatever lay there before; zeros where an adapter has no such module, base rows untouched."""
    weights = to(device, pack_adapters(adapters_of(ODD), dtype=dtype))
    x, y = inputs(ODD, group, len(ROW_SLOTS), dtype, device)
    work = work_for(ROW_SLOTS, block_rows=block_rows, device=device)
    place = ODD.place(1, group)

    terms = torch.full_like(y, NAN)
    ops.lora_expand(terms, ops.lora_shrink(x, weights, place, work), weights, place, work, add=False)

    wanted, reference = torch.full_like(y, NAN), ReferenceOps()
    v = reference.lora_shrink(x, weights, place, work)
    reference.lora_expand(wanted, v, weights, place, work, add=False)
    rows = [row for row, slot in enumerate(ROW_SLOTS) if slot is not None]
    assert_agrees(terms[rows], wanted[rows], dtype)
    assert bool(terms[[3, 5, 6]].isnan().all())
    assert not terms[7].any(), "an adapter with no module at all"


def projection(group, dtype, device):
    """A base product, rows for it, and adapters of its modules."""
    weights = to(device, pack_adapters(adapters_of(SMALL_LLAMA), dtype=dtype))
    x, y = inputs(SMALL_LLAMA, group, len(ROW_SLOTS), dtype, device)
    base = PackedLinear(torch.randn(y.shape[1], x.shape[1], generator=torch.Generator().manual_seed(9)).to(x) / 24)
    return base, x, weights, SMALL_LLAMA.place(1, group)


@pytest.mark.parametrize("group", [Group.QKV, Group.DOWN])
def test_beside_the_product_or_after_it_the_sum_is_the_same(ops, device, dtype, group):
    base, x, weights, place = projection(group, dtype, device)
    work = [both(work_for(ROW_SLOTS, device=device))]
    adapter_rows = torch.tensor([slot is not None for slot in ROW_SLOTS], dtype=torch.int32, device=device)

    product, terms = project_beside(ops, SideStream(device), base, x, weights, place, work, adapter_rows)

    wanted = project(ops, base, x, weights, place, work)
    assert_agrees(terms.added_to(product), wanted, dtype)
    assert torch.equal(terms.added_to(product)[[3, 5, 6]], wanted[[3, 5, 6]])


@pytest.mark.parametrize("group", [Group.QKV, Group.DOWN])
def test_the_prompts_list_beside_the_decoding_one_changes_no_bit(ops, device, dtype, group):
    base, x, weights, place = projection(group, dtype, device)
    half = len(ROW_SLOTS) // 2
    decoding = both(work_for([*ROW_SLOTS[:half], *[None] * (len(ROW_SLOTS) - half)], device=device))
    prompts = both(work_for([*[None] * half, *ROW_SLOTS[half:]], block_rows=32, device=device))

    beside = project(ops, base, x, weights, place, [decoding, prompts], SideStream(device))

    assert torch.equal(beside, project(ops, base, x, weights, place, [decoding, prompts]))
    for lacking in ([decoding], [prompts], []):
        assert not torch.equal(beside, project(ops, base, x, weights, place, lacking))


def test_an_empty_work_list_leaves_every_bit(ops, device, dtype):
    weights = to(device, pack_adapters(adapters_of(ODD), dtype=dtype))
    x, y = inputs(ODD, Group.QKV, 4, dtype, device)

    assert torch.equal(run(ops, x, y, weights, ODD, Group.QKV, work_for([None] * 4, device=device)), y)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA graph")
def test_a_captured_graph_replays_over_other_adapters_and_cells(ops, device):
    adapters = adapters_of(SMALL_LLAMA)
    weights = to(device, pack_adapters(adapters, dtype=torch.bfloat16))
    x, y = inputs(SMALL_LLAMA, Group.QKV, len(ROW_SLOTS), torch.bfloat16, device)
    work = work_for([0] + [None] * 9, device=device, spare=9)
    out = y.clone()

    def step():
        out.copy_(y)
        place = SMALL_LLAMA.place(1, Group.QKV)
        ops.lora_expand(out, ops.lora_shrink(x, weights, place, work), weights, place, work)

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()

    moved = to(device, pack_adapters(adapters, dtype=torch.bfloat16, seed=7))
    weights.pool.copy_(moved.pool)
    weights.cells.copy_(moved.cells)
    for row_slots in ([3, 3, 1, None, 0, 0, 0, 2, None, 1], [None] * 10, [3] * 10):
        other = work_for(row_slots, device=device, spare=0)
        work.segments[: len(other.segments)] = other.segments
        work.num_segments.copy_(other.num_segments)
        graph.replay()
        wanted = run(ReferenceOps(), x, y, weights, SMALL_LLAMA, Group.QKV, work)
        assert_agrees(out, wanted, torch.bfloat16)


@pytest.mark.parametrize(("shape", "group"), [(EVEN, Group.QKV), (ODD, Group.QKV), (EVEN, Group.DOWN)], ids=str)
def test_factors_in_fp8_are_multiplied_as_the_numbers_that_they_are(ops, device, dtype, shape, group):
    """Outputs of an even number are read and written in pairs; prompts and ranks above 64 have ways of their own."""
    ranks = [*RANKS, [70] * 7]
    layers = [[random_adapter(shape, of, seed=10 * s + layer) for layer in range(2)] for s, of in enumerate(ranks)]
    packed = pack_adapters(layers, dtype=FP8, cell_elements=1024, alignment=256 if shape is EVEN else CHUNK)
    weights = to(device, packed)
    row_slots = [*ROW_SLOTS, 4, None, *[3] * 9]
    x, y = inputs(shape, group, len(row_slots), dtype, device)
    work = cut_work(row_slots, [max(of) for of in ranks], max_rank=70, device=device)
    prompts = both(work_for(row_slots, block_rows=32, max_rank=70, device=device))
    place = shape.place(1, group)
    exact = replace(weights, pool=weights.pool.float())
    wanted = run(ReferenceOps(), x, y, exact, shape, group, work)
    alone = run(ReferenceOps(), x, torch.zeros_like(y), exact, shape, group, work)
    rows = [row for row, slot in enumerate(row_slots) if slot is not None]
    base = [row for row, slot in enumerate(row_slots) if slot in (None, 2)]
    for lists in (work, prompts):
        result = run(ops, x, y, weights, shape, group, lists)
        terms = torch.full_like(y, NAN)
        v = ops.lora_shrink(x, weights, place, lists.shrink)
        ops.lora_expand(terms, v, weights, place, lists.expand, add=False)

        assert_agrees(result, wanted, dtype)
        assert torch.equal(result[base], y[base])
        assert_agrees(terms[rows], alone[rows], dtype)
    assert_agrees(run(ReferenceOps(), x, y, weights, shape, group, work), wanted, dtype)


def test_a_row_keeps_its_bits_among_others_with_factors_in_fp8(ops, device, dtype):
    weights = to(device, pack_adapters(adapters_of(EVEN), dtype=FP8, cell_elements=1024, alignment=256))
    row_slots = [0, 0, 0, None, 1, None, None, 2, *[3] * 9]
    x, y = inputs(EVEN, Group.QKV, 1, dtype, device)
    alone = run(ops, x, y, weights, EVEN, Group.QKV, cut([3], device))[0]
    for place in range(8, 17, 1 if device.type == "cuda" else SEGMENT_ROWS):
        others, other_y = inputs(EVEN, Group.QKV, len(row_slots), dtype, device)
        others[8:], others[4] = NAN, NAN
        others[place], other_y[place] = x[0], y[0]

        result = run(ops, others, other_y, weights, EVEN, Group.QKV, cut(row_slots, device))

        assert torch.equal(result[place], alone), place
