"""How many rows the captured steps have: what a step is padded to."""

from itertools import pairwise

import pytest

from flora.serve.engine.cuda.graphs import StepGraphs, decode_sizes, mixed_sizes


@pytest.mark.parametrize("largest", [1, 3, 16, 64, 100, 240, 250, 256, 1000])
def test_decoding_is_padded_by_less_than_two_tiles(largest):
    sizes = decode_sizes(largest)

    assert sizes[-1] == largest
    assert all(smaller < larger <= max(2 * smaller, smaller + 32) for smaller, larger in pairwise(sizes))


@pytest.mark.parametrize("largest", [32, 64, 448, 512, 2048, 8192])
def test_steps_with_prompts_are_padded_by_rows_that_are_few_beside_theirs(largest):
    sizes = mixed_sizes(largest)

    assert sizes[-1] == largest
    for smaller, larger in pairwise((0, *sizes)):
        assert 0 < larger - smaller <= (64 if smaller < 384 else 128 if smaller < 1024 else 256)


def test_rows_that_cublas_is_slow_at_are_padded_to_the_next_size():
    decode, mixed = StepGraphs(None, decode_sizes(256)), StepGraphs(None, mixed_sizes(2048))

    assert [decode.padded(rows) for rows in (5, 129, 224, 225, 241, 256)] == [8, 144, 224, 256, 256, 256]
    assert [mixed.padded(rows) for rows in (20, 384, 385, 449, 2048)] == [64, 384, 512, 512, 2048]
