"""The list of what a decode step attends over: every part of every context of one query, once."""

import random

import pytest
import torch

from flora.kernels import Context
from flora.kernels.decode_parts import list_decode_parts

PART, CLASS = 32, 8
WHOLE = 52  # no multiple of CLASS


def context_of(lens: list[int], queries: list[int], device: torch.device, max_pages: int = 16) -> Context:
    starts = torch.tensor([0, *queries]).cumsum(0).int()
    tables = torch.zeros(len(lens), max_pages, dtype=torch.int32)
    return Context(tables.to(device), torch.tensor(lens, dtype=torch.int32, device=device), starts.to(device))


def listed(context: Context, whole: int = PART) -> list[list[int]]:
    parts = list_decode_parts(context, 16, part_tokens=PART, class_tokens=CLASS, whole_tokens=whole)
    return parts.items[: int(parts.count)].tolist()


@pytest.mark.parametrize("num_sequences", [1, 5, 300])  # the last: more than the kernel takes at a time
@pytest.mark.parametrize(("seed", "whole"), [(1, PART), (2, WHOLE)])
def test_every_part_of_every_sequence_with_one_query_is_listed_once(device, num_sequences, seed, whole):
    draw = random.Random(seed)
    edges = (0, 1, PART - 1, PART, PART + 1, WHOLE, WHOLE + 1)
    lens = [draw.choice((*edges, draw.randrange(256))) for _ in range(num_sequences)]
    queries = [draw.choice((1, 1, 1, 0, 2)) for _ in range(num_sequences)]
    context = context_of(lens, queries, device)

    items = listed(context, whole)

    starts = context.query_starts.tolist()
    wanted = [
        [s, part, starts[s], lens[s]]
        for s in range(num_sequences)
        if queries[s] == 1
        for part in range(-(-lens[s] // PART) if lens[s] > whole else 1)
    ]
    assert sorted(items) == wanted


def test_parts_come_in_falling_length_so_that_short_ones_end_a_launch(device):
    items = listed(context_of([5, 70, 0, 32, 20, 33], [1] * 6, device))

    classes = [max(1, -(-min(PART, length - part * PART) // CLASS)) for _, part, _, length in items]
    assert classes == [4, 4, 4, 4, 3, 1, 1, 1, 1]


def test_contexts_that_are_not_cut_come_before_parts_that_are_shorter(device):
    lens = [5, 70, 0, WHOLE, 20, 33]
    items = listed(context_of(lens, [1] * 6, device), WHOLE)

    tokens = [length if length <= WHOLE else min(PART, length - part * PART) for _, part, _, length in items]
    assert [max(1, -(-length // CLASS)) for length in tokens] == [7, 5, 4, 4, 3, 1, 1, 1]


def test_a_step_of_prompts_alone_has_none(device):
    assert listed(context_of([40, 9], [3, 9], device)) == []
