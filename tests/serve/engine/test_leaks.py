"""Many requests, many adapters, clients that go away: whoever held a page gave it back."""

import random

from flora.serve.engine.schedule.pages import Use
from flora.serve.messages import Cancel
from flora.serve.request import AdapterTarget, SamplingParams
from tests.conftest import IS_FULL
from tests.serve.engine.adapters import random_adapter
from tests.serve.engine.worlds import World, ask, collect

NUM_REQUESTS = 10_000 if IS_FULL else 600
NUM_ADAPTERS = 500 if IS_FULL else 40
AT_ONCE = 60


def test_no_page_is_lost_over_many_requests_of_which_one_in_twenty_is_cancelled(bases, tmp_path):
    """The pool holds a tenth of the adapters, and the host cache a quarter of them, so all of them come and go."""
    world = World(bases("llama"), tmp_path)
    with world.registry as registry:
        adapters = ((random_adapter(world.config, i, ranks=(1, 2, 4)), f"a{i}") for i in range(NUM_ADAPTERS))
        targets = [
            AdapterTarget(serving_digest=version.serving_digest, version_digest=version.digest, label=version.name)
            for version in registry.add_many(adapters)
        ]
    engine = world.engine(
        pool_bytes=NUM_ADAPTERS * 2_000 + (1 << 20),
        host_cache_bytes=NUM_ADAPTERS * 5_000,
        max_adapters=max(8, NUM_ADAPTERS // 10),
        max_sequences=32,
        max_batch_tokens=256,
    )
    seeded = random.Random(0)
    answers, asked, cancelled = {}, 0, set()
    while asked < NUM_REQUESTS or not engine.is_idle:
        while asked < NUM_REQUESTS and len(engine.scheduler.running) + engine.scheduler.num_waiting < AT_ONCE:
            prompt = [seeded.randrange(199) for _ in range(seeded.randrange(1, 40))]
            sampling = SamplingParams(max_tokens=seeded.randrange(1, 6), temperature=0.0, ignore_eos=True)
            ask(engine, str(asked), prompt, seeded.choice([None, *targets]), sampling)
            if seeded.random() < 0.05:
                cancelled.add(str(asked))
            asked += 1
        collect(engine.step(wait_s=10.0), answers)
        for request_id in [name for name in cancelled if name not in answers and seeded.random() < 0.3]:
            engine.cancel(Cancel(request_id=request_id))  # while it waits, loads, prefills or decodes

    reasons = [answers[str(i)].finish_reason for i in range(NUM_REQUESTS)]
    assert set(reasons) == {"length", "cancelled"}
    assert engine.residency.num_evictions > NUM_ADAPTERS / 4
    assert engine.host.num_bytes <= engine.host.capacity_bytes
    assert engine.pages.count(Use.ADAPTER) == sum(len(resident.pages) for resident in engine.residency)
    engine.scheduler.eviction.reclaim(engine.pages.num_usable)
    assert engine.pages.num_free == engine.pages.num_usable
    engine.close()
