"""The list of what a decode step attends over: every part of every context of one query, once."""

import random

import pytest
import torch

from flora.kernels import Context
from flora.kernels.decode_parts import list_decode_parts

PART, CLASS = 32, 8


def context_of(lens: list[int], queries: list[int], device: torch.device, max_pages: int = 16) -> Context:
    starts = torch.tensor([0, *queries]).cumsum(0).int()
    tables = torch.zeros(len(lens), max_pages, dtype=torch.int32)
    return Context(tables.to(device), torch.tensor(lens, dtype=torch.int32, device=device), starts.to(device))


def listed(context: Context) -> list[list[int]]:
    parts = list_decode_parts(context, page_tokens=16, part_tokens=PART, class_tokens=CLASS)
    return parts.items[: int(parts.count)].tolist()


@pytest.mark.parametrize("num_sequences", [1, 5, 300])  # the last: more than the kernel takes at a time
@pytest.mark.parametrize("seed", [1, 2])
def test_every_part_of_every_sequence_with_one_query_is_listed_once(device, num_sequences, seed):
    draw = random.Random(seed)
    lens = [draw.choice((0, 1, PART - 1, PART, PART + 1, draw.randrange(256))) for _ in range(num_sequences)]
    queries = [draw.choice((1, 1, 1, 0, 2)) for _ in range(num_sequences)]
    context = context_of(lens, queries, device)

    items = listed(context)

    starts = context.query_starts.tolist()
    wanted = [
        [s, part, starts[s], lens[s]]
        for s in range(num_sequences)
        if queries[s] == 1
        for part in range(max(1, -(-lens[s] // PART)))
    ]
    assert sorted(items) == wanted


def test_parts_come_in_falling_length_so_that_short_ones_end_a_launch(device):
    items = listed(context_of([5, 70, 0, 32, 20, 33], [1] * 6, device))

    classes = [max(1, -(-min(PART, length - part * PART) // CLASS)) for _, part, _, length in items]
    assert classes == [4, 4, 4, 4, 3, 1, 1, 1, 1]


def test_a_step_of_prompts_alone_has_none(device):
    assert listed(context_of([40, 9], [3, 9], device)) == []
