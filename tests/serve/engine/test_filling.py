"""What the GPU's runner writes for a step, row by row: on any machine, since only the copy is the device's business."""

import random
from itertools import pairwise

import numpy as np
import pytest
import torch

from flora.kernels import RANK_LANES, SEGMENT_ROWS, cut_runs, share_ranks
from flora.serve.engine.batch import JOINT_ROWS, PREFILL_BLOCK_ROWS
from flora.serve.engine.cuda import filling
from flora.serve.engine.cuda.filling import StepFiller
from flora.serve.engine.cuda.inputs import InputSizes, StepInputs
from flora.serve.engine.cuda.lanes import Lanes
from flora.serve.engine.schedule.scheduler import Chunk
from flora.serve.engine.schedule.sequence import PENDING, Sequence, State
from flora.serve.request import SamplingParams

PAGE_TOKENS, TABLE_PAGES, ROWS, SEQUENCES = 4, 16, 160, 24
RANKS = [8, 64, 0, 16]  # by slot
LISTS = ("shrink", "expand", "prefill")


def draw_step(seeded: random.Random, count: int) -> tuple[list[Chunk], list[int | None]]:
    """Sequences somewhere in their prompts or answers, with pages of their own, and the slots of their adapters."""
    chunks, slots = [], []
    free = seeded.sample(range(1, 1000), count * TABLE_PAGES)
    for i in range(count):
        length = seeded.randrange(1, 40)
        prompt = tuple(seeded.randrange(100) for _ in range(length))
        sequence = Sequence(
            ("", str(i)), prompt, SamplingParams(max_tokens=9), None, order=i, arrived_s=0.0, max_context=64
        )
        sequence.state = State.RUNNING
        sequence.pages = free[i * TABLE_PAGES : i * TABLE_PAGES + -(-length // PAGE_TOKENS)]
        start = seeded.randrange(length) if seeded.random() < 0.5 else length - 1
        rows = seeded.randrange(1, min(length - start, 6) + 1)
        if seeded.random() < 0.2 and rows == 1:
            sequence.tokens[start] = PENDING
        chunks.append(Chunk(sequence, start, rows, samples=start + rows == length))
        slots.append(seeded.choice([None, 0, 1, 3]))
    return chunks, slots


def met(segments: list[list[int]], most: int) -> dict[int, int]:
    """The slot of every row in the segments; no row is in two, and no segment has more than `most`."""
    assert all(0 < number <= most for _, _, number in segments)
    rows = [(row, slot) for slot, first, number in segments for row in range(first, first + number)]
    assert len({row for row, _ in rows}) == len(rows)
    return dict(rows)


@pytest.mark.parametrize("lists", ["joint", "apart", "one"])
@pytest.mark.parametrize("seed", range(20))
def test_every_row_finds_its_token_its_place_and_its_adapter(monkeypatch, seed, lists):
    """lists: prompts share those of rows that decode, or have their own, or all rows go the way of prompts."""
    seeded, one_list = random.Random(seed), lists == "one"
    monkeypatch.setattr(filling, "JOINT_ROWS", 0 if lists == "apart" else ROWS)
    sizes = InputSizes(ROWS, SEQUENCES, TABLE_PAGES)
    inputs = StepInputs(sizes, torch.device("cpu"))
    filler = StepFiller(inputs, Lanes(2 * SEQUENCES, TABLE_PAGES), PAGE_TOKENS, lambda: RANKS, one_list=one_list)
    for _ in range(4):  # the arrays are used again: nothing of a step may be left for the next
        chunks, slots = draw_step(seeded, seeded.randrange(1, SEQUENCES + 1))
        order = filler.order(chunks, slots)
        chunks, slots = [chunks[i] for i in order], [slots[i] for i in order]
        counts = np.array([chunk.count for chunk in chunks])
        padded = min(ROWS, int(counts.sum()) + seeded.randrange(10))

        filler.fill(chunks, counts, np.array([-1 if slot is None else slot for slot in slots], np.int32), padded)

        sent = {name: tensor.tolist() for name, tensor in inputs.device.items()}
        row, row_slots, is_single, sampled = 0, [], [], []
        for i, (chunk, slot) in enumerate(zip(chunks, slots, strict=True)):
            assert sent["seq_lens"][i] == chunk.start + chunk.count
            assert sent["query_starts"][i : i + 2] == [row, row + chunk.count]
            assert sent["block_tables"][i][: len(chunk.sequence.pages)] == chunk.sequence.pages
            for position in range(chunk.start, chunk.start + chunk.count):
                assert sent["token_ids"][row] == chunk.sequence.tokens[position]
                assert sent["positions"][row] == position
                page = chunk.sequence.pages[position // PAGE_TOKENS]
                assert sent["slots"][row] == page * PAGE_TOKENS + position % PAGE_TOKENS
                row_slots.append(slot)
                is_single.append(chunk.count == 1)
                row += 1
            if chunk.samples:
                sampled.append((row - 1, sent["lanes"][row - 1]))
        assert list(zip(sent["logits_rows"], sent["sampled_lanes"], strict=True))[: len(sampled)] == sampled
        assert len({sent["lanes"][start] for start in sent["query_starts"][: len(chunks)]}) == len(chunks)
        assert sent["slots"][row:padded] == [-1] * (padded - row)
        assert set(sent["seq_lens"][len(chunks) :]) <= {0}
        assert set(sent["query_starts"][len(chunks) :]) == {row}
        assert set(sent["sampled_lanes"][len(sampled) :]) <= {filler.lanes.spare}

        found = {name: sent[f"{name}_segments"][: sent[f"num_{name}_segments"][0]] for name in LISTS}
        shares = found["shrink"]
        found["shrink"] = [share[:3] for share in shares if share[3] == 0]
        assert shares == [list(share) for share in share_ranks(found["shrink"], RANKS)], "every rank, each once"
        for segments in found.values():
            assert all(RANKS[a[0]] >= RANKS[b[0]] for a, b in pairwise(segments)), "heaviest first"
        shrunk, expanded, apart = (
            met(found[name], rows)
            for name, rows in (("shrink", SEGMENT_ROWS), ("expand", SEGMENT_ROWS), ("prefill", PREFILL_BLOCK_ROWS))
        )
        assert shrunk == expanded, "none is without ranks"
        assert lists == "joint" or all(is_single[row] for row in expanded)
        assert one_list or not any(is_single[row] for row in apart)
        assert not (expanded if one_list else apart if lists == "joint" else {})
        assert expanded | apart == {row: slot for row, slot in enumerate(row_slots) if slot is not None}
        has_adapter = [int(slot is not None) for slot in row_slots]
        assert sent["adapter_rows"][:padded] == has_adapter + [0] * (padded - row)
        first, end = sent["prefill_range"]
        assert end == len(chunks)
        assert all(chunk.count == 1 for chunk in chunks[:first])
        assert one_list or all(chunk.count > 1 for chunk in chunks[first:])
        for chunk in chunks:
            chunk.sequence.state = State.FINISHED  # and its lane is another's


@pytest.mark.parametrize(("rows", "sequences"), [(2048, 256), (2048, 1), (64, 256), (2048, 1024)])
@pytest.mark.parametrize("seed", range(5))
def test_lists_have_room_for_whatever_a_step_holds(rows, sequences, seed):
    seeded, sizes = random.Random(seed), InputSizes(rows, sequences, TABLE_PAGES)
    room = {name: shape[0] for name, (_, shape) in sizes.fields().items()}
    room["shrink_segments"] //= RANK_LANES  # each of the highest rank
    for name in ("shrink_segments", "expand_segments"):
        assert min(rows, sequences) <= room[name], "a row a sequence, each with an adapter of its own"
        total = min(rows, JOINT_ROWS)
        count = min(total, sequences)
        edges = sorted(seeded.sample(range(1, total), count - 1))
        runs = [(i, a, b - a) for i, (a, b) in enumerate(pairwise([0, *edges, total]))]
        segments = len(cut_runs(runs, SEGMENT_ROWS, [8] * count))
        assert segments <= sizes.joint_segments(total) <= room[name]
