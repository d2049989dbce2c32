"""Adapters of an engine: loaded on demand, evicted, brought back, refused where they do not fit the base."""

from dataclasses import replace

import msgspec
import pytest
import torch

from flora.adapter import AdapterHeader, ChangeReport, TensorChange, make_adapter
from flora.errors import EngineDead
from flora.lowrank import LowRank
from flora.serve.engine import Engine
from flora.serve.engine.loading.packing import PackedAdapter
from flora.serve.engine.schedule.residency import Resident
from flora.serve.messages import AdapterLoaded, AdapterUnloaded, LoadAdapter, Rejected, UnloadAdapter
from flora.serve.request import SamplingParams
from tests.serve.engine.adapters import module_name, random_adapter
from tests.serve.engine.bases import VOCAB
from tests.serve.engine.worlds import PAGE_BYTES, World, ask, collect, run_to_end

# --- adapters come and go ---


def test_the_least_recently_used_adapter_is_evicted_and_comes_back(world):
    targets = [world.add(random_adapter(world.config, seed, ranks=[8], absent=0.0), f"a{seed}") for seed in range(4)]
    engine, roomy = world.engine(max_adapters=2), world.engine()
    order = [0, 1, 2, 0, 3, 1]
    for number, which in enumerate(order):
        for one in (engine, roomy):
            ask(one, str(number), [1, 2, 3], targets[which])
        answer, expected = run_to_end(engine)[str(number)], run_to_end(roomy)[str(number)]
        assert answer.tokens == expected.tokens

    beat = engine.heartbeat()
    assert beat.adapter_evictions == 4
    assert beat.adapter_loads == 4  # what was evicted came back from host memory
    assert {resident.label for resident in beat.resident} == {"a3", "a1"}
    engine.close()
    roomy.close()


def test_what_host_memory_does_not_hold_is_read_again(world):
    targets = [world.add(random_adapter(world.config, seed, ranks=[8], absent=0.0), f"a{seed}") for seed in range(2)]
    engine = world.engine(max_adapters=1, host_cache_bytes=1)
    for number in range(4):
        ask(engine, str(number), [1, 2, 3], targets[number % 2])
        assert run_to_end(engine)[str(number)].finish_reason == "length"

    assert engine.heartbeat().adapter_loads == 4
    engine.close()


def test_two_versions_with_one_serving_digest_are_one_resident_adapter(world):
    """A version is more than what changes the answer: its report and lineage too."""
    adapter = random_adapter(world.config, seed=1)
    first = world.add(adapter, "a")
    lineage = msgspec.structs.replace(adapter.header.recipe, parents=("sha256:" + "1" * 64,))
    header = msgspec.structs.replace(adapter.header, recipe=lineage)
    second = world.add(replace(adapter, header=header), "b")
    assert (first.serving_digest, first.version_digest != second.version_digest) == (second.serving_digest, True)

    engine = world.engine()
    ask(engine, "first", [1, 2], first)
    ask(engine, "second", [1, 2], second)
    answers = run_to_end(engine)

    assert answers["first"].tokens == answers["second"].tokens
    assert len(engine.residency) == 1
    assert engine.heartbeat().adapter_loads == 1
    engine.close()


def test_nothing_of_a_name_outlives_its_requests(world):
    """A client may ask for any number of names: what stays is bounded by adapters that exist."""
    engine = world.engine()
    target = world.add(random_adapter(world.config, seed=1), "a")
    for i in range(50):
        unknown = msgspec.structs.replace(
            target, serving_digest=f"sha256:{i:064x}", version_digest=f"sha256:{i:064x}", label=f"name{i}"
        )
        ask(engine, str(i), [1, 2], unknown)
    answers = run_to_end(engine)

    assert {answer.rejected.code for answer in answers.values()} == {"FL-ADAPTER"}
    assert len(engine.residency) == 0
    assert engine.host.num_bytes == 0
    assert engine.heartbeat().waiting_by_adapter == {}
    engine.close()


def test_an_adapter_is_made_resident_on_demand_and_let_go(world):
    target = world.add(random_adapter(world.config, seed=1), "a")
    engine = world.engine()

    engine.load_adapter(LoadAdapter(request_id="l", adapter=target, pinned=True))
    [(_, loaded)] = [told for _ in range(9) for told in engine.step(wait_s=10.0)][:1]
    assert isinstance(loaded, AdapterLoaded)
    assert engine.heartbeat().resident[0].pinned

    engine.unload_adapter(UnloadAdapter(request_id="u", serving_digest=target.serving_digest))
    [(_, unloaded)] = engine.step()
    assert isinstance(unloaded, AdapterUnloaded)
    assert unloaded.was_resident
    assert engine.pages.num_free == engine.pages.num_usable
    assert engine.host.num_bytes == 0
    engine.close()


def test_unloading_lets_running_requests_finish(world):
    target = world.add(random_adapter(world.config, seed=1), "a")
    engine = world.engine()
    ask(engine, "r", [1, 2, 3], target)
    answers = {}
    while "r" not in answers:
        collect(engine.step(wait_s=10.0), answers)

    engine.unload_adapter(UnloadAdapter(request_id="u", serving_digest=target.serving_digest))
    rest = run_to_end(engine)["r"]

    assert rest.finish_reason == "length"
    assert len(engine.residency) == 0
    engine.close()


@pytest.mark.parametrize("pinned", [False, True])
def test_what_is_loaded_again_while_it_is_on_its_way_out_stays(world, pinned):
    """A stream still runs: the adapter is here, and told to go when that ends."""
    target = world.add(random_adapter(world.config, seed=1), "a")
    engine = world.engine()
    ask(engine, "r", [1, 2, 3], target)
    answers = {}
    while "r" not in answers:
        collect(engine.step(wait_s=10.0), answers)

    engine.unload_adapter(UnloadAdapter(request_id="u", serving_digest=target.serving_digest))
    engine.load_adapter(LoadAdapter(request_id="l", adapter=target, pinned=pinned))
    told = engine.step()
    assert [type(message) for _, message in told[:2]] == [AdapterUnloaded, AdapterLoaded]
    run_to_end(engine)

    assert [resident.label for resident in engine.residency] == ["a"]
    engine.unload_adapter(UnloadAdapter(request_id="u", serving_digest=target.serving_digest))
    assert len(engine.residency) == 0
    engine.close()


def test_a_load_without_room_for_good_is_refused(world):
    small = world.add(random_adapter(world.config, seed=1, ranks=[8], absent=0.0), "small")
    large = world.add(random_adapter(world.config, seed=2, ranks=[16], absent=0.0), "large")
    engine = world.engine(pool_bytes=24 * PAGE_BYTES)
    engine.load_adapter(LoadAdapter(request_id="pin", adapter=small, pinned=True))
    run_to_end(engine)

    engine.load_adapter(LoadAdapter(request_id="more", adapter=large))
    answers = run_to_end(engine)

    assert answers["more"].rejected.code == "FL-PAGES"
    engine.close()


# --- loads that fail ---


def test_a_load_that_fails_refuses_only_the_requests_that_wait_for_it(world):
    sound = world.add(random_adapter(world.config, seed=1), "sound")
    broken = world.add(random_adapter(world.config, seed=2), "broken")
    for blob in sorted((world.home / "registry" / "blobs").rglob("*")):
        if blob.is_file() and blob.stat().st_size > 1000 and blob.stat().st_mtime_ns == newest_blob(world):
            blob.write_bytes(blob.read_bytes()[:-100])
    engine = world.engine()
    ask(engine, "broken1", [1, 2], broken)
    ask(engine, "sound", [1, 2], sound)
    ask(engine, "broken2", [1, 2], broken)
    ask(engine, "base", [1, 2])
    engine.load_adapter(LoadAdapter(request_id="order", adapter=broken))
    answers = run_to_end(engine)
    engine.close()

    for name in ("broken1", "broken2", "order"):
        assert answers[name].rejected.code == "FL-STORE"
    assert answers["sound"].finish_reason == answers["base"].finish_reason == "length"


def break_copies(engine: Engine, *errors: Exception) -> None:
    """The next adapters do not get to the device, each for its reason; those after them do."""
    write, coming = engine.runner.write_adapter, list(errors)

    def write_adapter(resident: Resident, packed: PackedAdapter) -> None:
        if coming:
            raise coming.pop(0)
        write(resident, packed)

    engine.runner.write_adapter = write_adapter


@pytest.mark.parametrize("pinned", [False, True])
def test_an_ordered_adapter_that_cannot_be_copied_to_the_device_fails_its_order_alone(world, caplog, pinned):
    target = world.add(random_adapter(world.config, seed=1), "a")
    engine, sound = world.engine(), world.engine()
    ask(sound, "r", [1, 2, 3], target)
    expected = run_to_end(sound)["r"].tokens
    sound.close()
    break_copies(engine, RuntimeError("out of memory"))
    ask(engine, "bystander", [1, 2], sampling=SamplingParams(max_tokens=200, temperature=0.0))

    engine.load_adapter(LoadAdapter(request_id="order", adapter=target, pinned=pinned))
    answers = run_to_end(engine)

    refused = answers["order"].rejected
    assert (refused.code, refused.message) == ("FL-SERVE", "adapter a could not be copied to the device")
    assert "out of memory" in refused.cause
    assert refused.fix
    assert "adapter write failed label=a" in caplog.text
    assert answers["bystander"].finish_reason == "length"
    engine.step()
    assert engine.pages.num_free == engine.pages.num_usable
    ask(engine, "again", [1, 2, 3], target)
    assert run_to_end(engine)["again"].tokens == expected
    engine.close()


def test_adapters_that_cannot_be_copied_to_the_device_are_gone_with_the_requests_of_their_step(world):
    targets = [world.add(random_adapter(world.config, seed), f"a{seed}") for seed in range(3)]
    engine = world.engine()
    for target in targets:
        ask(engine, target.label, [1, 2, 3], target)
    while any(engine.host.num_pages(target.serving_digest) is None for target in targets):
        engine.supply.start_loads()
        assert not engine.supply.receive(wait_s=10.0)
    break_copies(engine, RuntimeError("out of memory"))

    failed = run_to_end(engine)

    assert all("out of memory" in failed[target.label].events[-1].error for target in targets)
    engine.step()
    assert engine.pages.num_free == engine.pages.num_usable
    for target in targets:
        ask(engine, target.label, [1, 2, 3], target)
    assert {answer.finish_reason for answer in run_to_end(engine).values()} == {"length"}
    engine.close()


def test_a_device_that_is_lost_while_an_order_is_filled_ends_the_engine(world):
    target = world.add(random_adapter(world.config, seed=1), "a")
    engine = world.engine()
    break_copies(engine, EngineDead("the device is lost"))
    engine.load_adapter(LoadAdapter(request_id="order", adapter=target))

    with pytest.raises(EngineDead):
        run_to_end(engine)
    engine.close()


def newest_blob(world: World) -> int:
    blobs = (world.home / "registry" / "blobs").rglob("*")
    return max(blob.stat().st_mtime_ns for blob in blobs if blob.is_file() and blob.stat().st_size > 1000)


def adapter_of(world: World, name: str, in_features: int, out_features: int, value: float = 0.1, **binding: object):
    header: AdapterHeader = random_adapter(world.config, seed=1).header
    factors = LowRank(A=torch.full((2, in_features), value), B=torch.full((out_features, 2), 0.1))
    return make_adapter({name: factors}, msgspec.structs.replace(header.base, **binding), header.recipe)


def refusal(world: World, adapter) -> Rejected:
    target = world.add(adapter, "bad")
    engine = world.engine()
    ask(engine, "bad", [1, 2], target)
    ask(engine, "base", [1, 2])
    answers = run_to_end(engine)
    engine.close()
    assert answers["base"].finish_reason == "length"
    return answers["bad"].rejected


@pytest.mark.parametrize("name", ["lm_head", "model.embed_tokens", "model.layers.0.self_attn.rotary"])
def test_a_module_that_the_server_cannot_adapt_is_refused_never_skipped(world, name):
    refused = refusal(world, adapter_of(world, name, 64, VOCAB))

    assert refused.code == "FL-UNSUPPORTED"
    assert name in refused.message


def test_a_refused_module_is_named_with_its_share_of_the_change(world):
    adapter = adapter_of(world, "lm_head", 64, VOCAB)
    changes = tuple(
        TensorChange(name=name, shape=(1, 1), status="extracted", norm_squared=norm)
        for name, norm in (("lm_head.weight", 1.0), ("model.layers.0.self_attn.q_proj.weight", 3.0))
    )

    refused = refusal(world, replace(adapter, report=ChangeReport(tensors=changes)))

    assert "lm_head (25.0% of the change)" in refused.message


def test_an_adapter_of_the_served_base_needs_no_further_proof(world, caplog):
    engine = world.engine()
    adapter = random_adapter(world.config, seed=1, base_id=engine.ready.base_id)
    ask(engine, "r", [1, 2], world.add(adapter, "a"))

    assert run_to_end(engine)["r"].finish_reason == "length"
    assert "unproven" not in caplog.text
    engine.close()


def test_a_module_of_another_size_is_refused(world):
    refused = refusal(world, adapter_of(world, module_name(0, "q"), 32, 64))

    assert refused.code == "FL-SHAPE"
    assert "[64, 32] in the adapter, [64, 64] in the base" in refused.message


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_factors_that_are_not_finite_are_refused(world, value):
    refused = refusal(world, adapter_of(world, module_name(0, "q"), 64, 64, value))

    assert refused.code == "FL-NOTFINITE"
    assert module_name(0, "q") in refused.message


def test_an_adapter_of_other_base_weights_is_refused(world):
    touched = {f"{module_name(0, 'q')}.weight": "0" * 64}
    adapter = adapter_of(world, module_name(0, "q"), 64, 64, base_id="sha256:" + "1" * 64, touched=touched)

    refused = refusal(world, adapter)

    assert refused.code == "FL-BASE"
    assert "1 of the 1 tensors that it changes" in refused.cause
