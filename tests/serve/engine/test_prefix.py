"""The prefix cache: who finds which pages, what they cost, and when they go. A page holds four tokens."""

import random

import pytest
import torch

from flora.serve.engine.schedule.eviction import Eviction
from flora.serve.engine.schedule.pages import PagePool, Use
from flora.serve.engine.schedule.prefix import PrefixCache, PrefixPage
from flora.serve.messages import UnloadAdapter
from tests.serve.engine.adapters import random_adapter
from tests.serve.engine.bases import VOCAB
from tests.serve.engine.desk import Desk
from tests.serve.engine.test_isolation import fill_with_nan, make_resident, prompt_of, watched_logits
from tests.serve.engine.worlds import ask, run_to_end

LETTERS = (0, 1, 1, 0, 1, 0, 0, 0, 1, 1, 1, 0, 1)  # three pages and a token


def test_a_request_starts_behind_the_pages_that_it_shares():
    desk = Desk(prefix_cache=True)
    desk.submit("first", LETTERS, max_tokens=1)
    desk.step()

    desk.submit("same", LETTERS, max_tokens=1)
    desk.submit("half", (*LETTERS[:8], 0, 0, 0, 0, 0), max_tokens=1)
    desk.submit("other", (1, *LETTERS), max_tokens=1)

    assert desk.step() == {"same": (12, 1), "half": (8, 5), "other": (0, 14)}
    assert (desk.scheduler.num_prompt_tokens, desk.scheduler.num_cached_tokens) == (13 + 13 + 13 + 14, 12 + 8)


def test_without_the_switch_everything_is_computed():
    desk = Desk(prefix_cache=False)
    desk.submit("first", LETTERS, max_tokens=1)
    desk.step()
    desk.submit("same", LETTERS, max_tokens=1)

    assert desk.step() == {"same": (0, 13)}
    assert desk.pages.num_free == desk.pages.num_usable


def test_requests_of_one_step_share_too():
    """Many choices of one prompt cost its pages once."""
    desk = Desk(prefix_cache=True)
    for name in "abc":
        desk.submit(name, LETTERS, max_tokens=8)

    assert desk.step() == {"a": (0, 13), "b": (12, 1), "c": (12, 1)}
    assert desk.pages.count(Use.KV) == 3 + 3  # three pages together, and one each to write to


def test_the_last_token_is_always_computed():
    """It is what the first answer token is drawn from."""
    desk = Desk(prefix_cache=True)
    desk.submit("first", LETTERS[:12], max_tokens=1)
    desk.step()
    desk.submit("same", LETTERS[:12], max_tokens=1)

    assert desk.step() == {"same": (8, 4)}


def test_an_answer_is_a_prefix_of_the_next_turn():
    desk = Desk(prefix_cache=True)
    first = desk.submit("first", LETTERS, max_tokens=8)
    while not desk.scheduler.is_empty:
        desk.step()
    desk.submit("next", (*first.tokens, 0, 1), max_tokens=1)

    assert desk.step() == {"next": (20, 3)}  # 13 + 8 tokens, the last of which was never computed


@pytest.mark.parametrize(("one", "other"), [("x", "y"), ("x", None), (None, "x")])
def test_nothing_is_shared_between_serving_digests(one, other):
    desk = Desk(prefix_cache=True, packed={"x": 1, "y": 1})
    desk.submit("one", LETTERS, max_tokens=1, adapter=one)
    desk.step()
    desk.submit("other", LETTERS, max_tokens=1, adapter=other)

    assert desk.step() == {"other": (0, 13)}


def test_prefixes_and_adapters_leave_in_one_order():
    """What nobody asked for again first; then prefixes that were found and adapters, by their last use."""
    desk = Desk(num_pages=18, prefix_cache=True, packed={"x": 4, "y": 4})
    for name, token, adapter in (("1", 0, "x"), ("2", 0, "x"), ("3", 1, None), ("4", 1, None), ("5", 0, "y")):
        desk.submit(name, (token,) * 6, max_tokens=1, adapter=adapter)  # a page and a half: one page is kept
        desk.step()
    desk.submit("6", (0, 1) * 4, max_tokens=1)  # of the two pages the second is full as well, and nobody repeats them
    desk.step()
    assert desk.scheduler.num_cached_tokens == 4 + 4
    assert desk.pages.num_free == 18 - 4 - 4 - 5

    def left(num_pages: int) -> tuple[int, list[str]]:
        assert desk.scheduler.eviction.reclaim(num_pages)
        return desk.prefixes.idle_pages, [resident.digest for resident in desk.residency]

    assert left(8) == (2, ["x", "y"])  # y's prefix, then the last request's two pages
    assert left(9) == (1, ["x", "y"])  # x's prefix, which was found
    assert left(10) == (1, ["y"])  # x
    assert left(14) == (0, ["y"])  # the base's prefix, which was found later
    assert left(15) == (0, [])


def test_what_a_running_sequence_holds_is_not_evicted():
    desk = Desk(num_pages=8, prefix_cache=True)
    desk.submit("a", 16, max_tokens=8)
    desk.step()

    assert not desk.scheduler.eviction.reclaim(5)
    assert desk.pages.count(Use.KV) == 4


def test_a_preempted_request_finds_what_nobody_needed():
    desk = Desk(num_pages=8, prefix_cache=True)
    desk.submit("old", (0,) * 4, max_tokens=20)
    desk.submit("young", (1,) * 9, max_tokens=12)
    while desk.scheduler.get((b"", "old")):
        desk.step()
    assert desk.scheduler.num_preemptions == 1

    assert desk.step()["young"][0] > 0


# --- the tree ---


@pytest.fixture
def cache() -> PrefixCache:
    pages = PagePool(20)
    pages.allocate(19, Use.KV)
    return PrefixCache(pages, Eviction(pages), page_tokens=2)


def path(cache: PrefixCache, *pages: tuple[int, int, int], digest: str | None = None) -> list[PrefixPage]:
    """A sequence publishes these (page, token, token)."""
    held: list[PrefixPage] = []
    for page, *tokens in pages:
        cache.publish(digest, held, tuple(tokens), page)
    return held


def test_a_twin_is_held_but_not_read(cache):
    """Two sequences computed the same page side by side: each reads its own, and what follows has one place."""
    elder = path(cache, (1, 5, 5))
    younger = path(cache, (2, 5, 5), (3, 6, 6))
    cache.release(elder)

    assert [page.page for page in younger] == [1, 3]
    assert cache.idle_pages == 0
    assert [page.page for page in cache.find(None, [5, 5, 6, 6, 0])] == [1, 3]


def test_a_twin_that_nobody_else_holds_gives_way_to_the_page_that_is_read(cache):
    elder = path(cache, (1, 5, 5))
    younger = path(cache, (2, 5, 5), (3, 6, 6))
    cache.give_up_twins(younger, [2, 3])
    assert cache._pages.num_free == 0, "the elder one reads it"
    cache.release(elder)

    cache.give_up_twins(younger, [2, 3])

    assert cache._pages.use(1) is Use.FREE
    assert [page.page for page in cache.find(None, [5, 5, 6, 6, 0])] == [2, 3]


def test_a_request_that_fills_the_pool_is_not_preempted_for_a_twin():
    """The whole prompt is in the cache, and its last page is computed again: for a while there are two of it."""
    desk = Desk(6, prefix_cache=True, max_sequences=1)
    desk.submit("first", LETTERS[:12], max_tokens=1)
    desk.step()
    desk.submit("same", LETTERS[:12], max_tokens=10)  # all of the six pages, at the end

    while not desk.scheduler.is_empty:
        desk.step()

    assert desk.scheduler.num_preemptions == 0


def test_forgotten_pages_are_not_found_and_go_with_their_holder(cache):
    held = path(cache, (1, 5, 5), (2, 6, 6), digest="x")
    cache.release(path(cache, (1, 5, 5), (3, 7, 7), digest="x"))

    cache.forget("x")

    assert cache.find("x", [5, 5, 6, 6, 0]) == []
    assert cache.idle_pages == 0
    assert cache._pages.num_free == 1  # page 3, which nobody held
    cache.release(held)
    assert cache._pages.num_free == 3


def test_what_follows_a_forgotten_page_is_never_found(cache):
    """Two sequences go on behind one forgotten page. The second must not get the page that the first gave back."""
    first, second = path(cache, (1, 5, 5), (2, 6, 6)), path(cache, (1, 5, 5))
    cache.forget(None)
    cache.release(first)
    assert cache._pages.use(2) is Use.FREE
    cache.publish(None, second, (6, 6), 3)

    assert [page.page for page in second] == [1, 3]
    assert cache.find(None, [5, 5, 6, 6, 0]) == []
    cache.release(second)
    assert cache._pages.num_free == 3


def test_a_failed_sequence_takes_its_beginning_out_of_the_cache(cache):
    cache.release(path(cache, (1, 5, 5), (2, 6, 6)))
    cache.release(path(cache, (3, 8, 8)))
    failed = cache.find(None, [5, 5, 0])
    cache.hold(failed)

    cache.distrust(failed)

    assert cache.find(None, [5, 5, 6, 6, 0]) == []
    assert [page.page for page in cache.find(None, [8, 8, 0])] == [3]


def test_an_empty_tree_is_nothing(cache):
    """No per-name object outlives what it was for."""
    for number in range(5):
        cache.release(path(cache, (number + 1, 5, 5), digest=str(number)))
    for number in range(3):
        cache.forget(str(number))
    cache.evict_first()
    cache.evict_first()

    assert cache._roots == {}


# --- the engine ---


@pytest.mark.parametrize("length", [17, 40, 64, 70])
def test_an_answer_from_the_cache_is_the_same_bits(world, length):
    """On a CPU the bits of a row depend neither on the chunk it is in, nor on who computed the keys before it."""
    target = world.add(random_adapter(world.config, seed=1), "a")
    plain, caching = world.engine(), world.engine(prefix_cache=True)

    for adapter in (None, target):
        expected = watched_logits(plain, prompt_of(length), adapter)
        for _ in range(2):
            assert torch.equal(watched_logits(caching, prompt_of(length), adapter), expected)
    beat = caching.heartbeat()
    assert beat.prefix_hits == 2 * ((length - 1) // 16) * 16
    assert beat.prefix_queries == 4 * length
    plain.close()
    caching.close()


def test_neighbours_that_share_pages_do_not_matter(world):
    """A prompt, what it begins like, what begins like it, with several adapters, all at once and in a tight pool."""
    targets = [None] + [world.add(random_adapter(world.config, seed, ranks=[4]), f"a{seed}") for seed in (1, 2)]
    plain = world.engine()
    caching = world.engine(prefix_cache=True, pool_bytes=60 * 8192, max_batch_tokens=48, max_sequences=6)
    seeded = random.Random(5)
    prompt = prompt_of(60)

    for target in targets:
        expected = watched_logits(plain, prompt, target)
        for _ in range(3):
            neighbours = [
                ([*prompt[: seeded.randrange(1, 60)], seeded.randrange(VOCAB)], seeded.choice(targets))
                for _ in range(10)
            ]
            assert torch.equal(watched_logits(caching, prompt, target, neighbours), expected)
    assert caching.heartbeat().prefix_hits > 0
    assert caching.heartbeat().prefix_evictions > 0
    plain.close()
    caching.close()


def test_tokens_from_the_cache_are_told(world):
    engine = world.engine(prefix_cache=True)
    ask(engine, "first", prompt_of(40))
    first = run_to_end(engine)["first"]
    ask(engine, "second", prompt_of(40))
    second = run_to_end(engine)["second"]
    engine.close()

    assert {event.cached_tokens for event in first.events} == {0}
    assert {event.cached_tokens for event in second.events} == {32}
    assert second.tokens == first.tokens


def test_unloading_an_adapter_lets_its_prefixes_go(world):
    target = world.add(random_adapter(world.config, seed=1), "a")
    engine = world.engine(prefix_cache=True)
    ask(engine, "r", prompt_of(40), target)
    run_to_end(engine)
    assert engine.heartbeat().prefix_pages == 3  # 40 + 12 tokens, the last of which was not computed

    engine.unload_adapter(UnloadAdapter(request_id="u", serving_digest=target.serving_digest))

    assert engine.pages.num_free == engine.pages.num_usable
    engine.close()


def test_keys_that_are_not_finite_are_not_found_by_a_later_request(world):
    target = world.add(random_adapter(world.config, seed=1, absent=0.0), "a")
    engine = world.engine(prefix_cache=True)
    make_resident(engine, target)
    fill_with_nan(engine, target)
    ask(engine, "broken", prompt_of(40), target)
    assert run_to_end(engine)["broken"].finish_reason == "error"

    engine.residency.remove(target.serving_digest)  # and comes back sound from host memory
    ask(engine, "sound", prompt_of(40), target)

    assert run_to_end(engine)["sound"].finish_reason == "length"
    engine.close()


def test_a_failed_step_leaves_no_page_that_was_never_computed(world):
    """Pages are shared from the plan on, before the step has run."""
    engine, plain = world.engine(prefix_cache=True), world.engine()
    forward = engine.runner.forward

    def broken(batch):
        raise RuntimeError("no memory")

    engine.runner.forward = broken
    for name in ("a", "b"):
        ask(engine, name, prompt_of(40))
    assert {answer.finish_reason for answer in run_to_end(engine).values()} == {"error"}
    assert engine.pages.num_free == engine.pages.num_usable

    engine.runner.forward = forward
    for one in (engine, plain):
        ask(one, "c", prompt_of(40))
    assert run_to_end(engine)["c"].tokens == run_to_end(plain)["c"].tokens
    engine.close()
    plain.close()
