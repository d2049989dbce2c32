"""The pool is real: the one copy that the forward pass reads, of keys, values and adapter weights alike."""

import pytest
import torch

from flora.errors import UsageError
from flora.serve.engine.layout import PoolGeometry
from flora.serve.engine.pool import DevicePool
from flora.serve.engine.schedule.pages import NULL_PAGE
from flora.serve.request import SamplingParams
from tests.serve.engine.adapters import random_adapter
from tests.serve.engine.worlds import Answer, World, ask, collect, run_to_end

GEOMETRY = PoolGeometry(num_planes=3, num_pages=5, page_tokens=4, num_kv_heads=2, head_dim=8, itemsize=4)


def new_pool(dtype: torch.dtype = torch.float32) -> DevicePool:
    geometry = PoolGeometry(3, 5, 4, 2, 8, itemsize=dtype.itemsize)
    return DevicePool(geometry, dtype, torch.device("cpu"))


def test_more_than_the_device_has_is_refused_by_its_size():
    endless = PoolGeometry(32, 2**30, 16, 8, 128, itemsize=2)  # 2 PiB

    with pytest.raises(UsageError, match=r"a pool of 2097152\.0 GiB does not fit in the memory of cpu"):
        DevicePool(endless, torch.bfloat16, torch.device("cpu"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_pool_starts_as_nan(dtype):
    assert new_pool(dtype).cells.isnan().all()


def test_all_views_share_the_one_allocation():
    pool = new_pool()
    begin, end = pool.storage.data_ptr(), pool.storage.data_ptr() + pool.storage.numel()

    assert pool.storage.numel() == 5 * GEOMETRY.page_bytes
    for view in (pool.cells, *(pool.kv(layer) for layer in range(3))):
        assert begin <= view.data_ptr() < end


def test_keys_and_values_of_a_layer_lie_in_its_plane():
    pool = new_pool()
    pool.kv(1)[2] = 7.0

    touched = (pool.cells == 7.0).any(1).nonzero().flatten().tolist()
    assert touched == [1 * 5 + 2]  # plane 1, page 2


def test_an_adapter_fills_its_pages_plane_by_plane():
    pool = new_pool()
    packed = torch.arange(4.0)[:, None].expand(4, GEOMETRY.cell_elements).contiguous()  # cell c is full of c

    cells = pool.write_adapter([4, 2], packed)

    assert cells.tolist() == [4, 5 + 4, 10 + 4, 2]  # three planes of page 4, then the first of page 2
    assert pool.cells[cells].eq(packed).all()
    assert int(pool.cells.isnan().all(1).sum()) == 15 - 4


def test_poison_fills_every_plane_of_a_page_and_no_other():
    pool = new_pool()
    pool.cells.zero_()

    pool.poison([1, 3])

    poisoned = pool.cells.isnan().all(1).nonzero().flatten().tolist()
    assert poisoned == [1, 3, 6, 8, 11, 13]
    assert int(pool.cells.isnan().any(1).sum()) == 6


def test_zeroing_one_adapters_pages_changes_only_its_own_streams(world: World):
    """Between two steps, in mid-stream: nothing else holds the weights."""
    targets = {name: world.add(random_adapter(world.config, seed, gain=3.0), name) for seed, name in enumerate("abc")}
    sampling = SamplingParams(max_tokens=24, temperature=0.0, logprobs=0)

    def stream(zeroed: str | None) -> dict[str, Answer]:
        engine = world.engine()
        for name, target in {**targets, "base": None}.items():
            ask(engine, name, [1, 2, 3, 4], target, sampling)
        answers: dict[str, Answer] = {}
        while not all(len(answers[name].tokens) >= 4 for name in answers) or len(answers) < 4:
            collect(engine.step(wait_s=10.0), answers)
        if zeroed:
            resident = engine.residency.get(targets[zeroed].serving_digest)
            planes = engine.runner.pool.cells.view(world.config.num_layers, engine.ready.num_pages, -1)
            planes[:, resident.pages] = 0.0
        for name, answer in run_to_end(engine).items():
            answers[name].events += answer.events
        engine.close()
        return answers

    untouched, zeroed = stream(None), stream("b")

    for name in ("a", "c", "base"):
        assert zeroed[name].events == untouched[name].events
    assert zeroed["b"].events != untouched["b"].events
    assert zeroed["b"].events[:4] == untouched["b"].events[:4]


def test_an_adapter_whose_pages_are_zero_answers_as_the_base(world: World):
    target = world.add(random_adapter(world.config, seed=1, gain=3.0), "a")
    engine = world.engine()
    ask(engine, "warm", [1, 2], target)
    run_to_end(engine)
    resident = engine.residency.get(target.serving_digest)
    engine.runner.pool.cells.view(world.config.num_layers, engine.ready.num_pages, -1)[:, resident.pages] = 0.0

    ask(engine, "zeroed", [1, 2, 3], target)
    ask(engine, "base", [1, 2, 3])
    answers = run_to_end(engine)
    engine.close()

    assert answers["zeroed"].tokens == answers["base"].tokens


def test_freed_pages_are_nan_again_and_no_stream_notices(world: World):
    """A small pool that every request reuses: whoever read a freed page would end with an error."""
    target = world.add(random_adapter(world.config, seed=1), "a")
    engine = world.engine(pool_bytes=64 * 8192)
    fresh = world.engine()
    for i in range(6):
        ask(engine, f"r{i}", [i + 1] * (20 + i), target if i % 2 else None)
        ask(fresh, f"r{i}", [i + 1] * (20 + i), target if i % 2 else None)
    answers, expected = run_to_end(engine), run_to_end(fresh)

    assert {name: answer.tokens for name, answer in answers.items()} == {
        name: answer.tokens for name, answer in expected.items()
    }
    engine.step()  # the last frees are poisoned before the next step
    planes = engine.runner.pool.cells.view(world.config.num_layers, engine.ready.num_pages, -1)
    held = {page for resident in engine.residency for page in resident.pages}
    free = [page for page in range(engine.ready.num_pages) if page not in held]
    assert planes[:, free].isnan().all()
    engine.close()
    fresh.close()


def test_the_null_page_is_never_written(world: World):
    engine = world.engine()
    ask(engine, "r", [1, 2, 3])
    run_to_end(engine)

    planes = engine.runner.pool.cells.view(world.config.num_layers, engine.ready.num_pages, -1)
    assert planes[:, NULL_PAGE].isnan().all()
    engine.close()
