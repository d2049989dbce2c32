"""Low-rank terms beside the base's products: the same walk, and the terms reach every reader of a product."""

from dataclasses import replace

import pytest
import torch

from flora.kernels import ReferenceOps
from flora.serve.engine.batch import Batch
from tests.serve.engine.adapters import random_adapter
from tests.serve.engine.test_isolation import prompt_of
from tests.serve.engine.test_logits import TOLERANCE, relative_error
from tests.serve.engine.worlds import LogitsTap, World, ask, run_to_end


def adapter_rows(batch: Batch) -> torch.Tensor:
    rows = torch.zeros(len(batch.token_ids), dtype=torch.int32)
    for work in batch.work:
        for _, first, count in work.expand.segments[: int(work.expand.num_segments)].tolist():
            rows[first : first + count] = 1
    return rows


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_terms_beside_the_products_give_the_logits_of_terms_added_at_once(bases, tmp_path, family):
    world = World(bases(family), tmp_path)
    targets = [None] + [world.add(random_adapter(world.config, seed), f"a{seed}") for seed in (1, 2)]
    taps, seen = [], []
    for is_beside in (False, True):
        engine = world.engine()
        model = engine.runner.model
        model.ops = ReferenceOps()
        if is_beside:
            forward = model.forward

            def forward_beside(batch, *rest, forward=forward):
                seen.append(batch)
                return forward(replace(batch, adapter_rows=adapter_rows(batch)), *rest)

            model.forward = forward_beside
        taps.append(LogitsTap(engine))
        for i, target in enumerate(targets):
            ask(engine, f"{i}", prompt_of(9 + i, seed=i), target)
        run_to_end(engine)
        engine.close()

    assert any(batch.work for batch in seen)
    for i in range(len(targets)):
        at_once, beside = (tap.of(f"{i}") for tap in taps)
        assert relative_error(beside, at_once) <= TOLERANCE
