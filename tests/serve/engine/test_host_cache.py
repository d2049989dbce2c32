"""What stays packed in host memory."""

import torch

from flora.serve.engine.layout import AdapterTable
from flora.serve.engine.loading.host_cache import HostCache
from flora.serve.engine.loading.packing import PackedAdapter


def packed(digest: str, num_bytes: int = 400) -> PackedAdapter:
    cells = torch.zeros(1, num_bytes // 4)
    return PackedAdapter(digest, AdapterTable(b"", b"", 0, 0), cells, num_pages=1, load_s=0.0)


def nobody(digest: str) -> bool:
    return False


def held(cache: HostCache, digests: str) -> str:
    return "".join(digest for digest in digests if cache.num_pages(digest) is not None)


def test_the_least_recently_used_makes_room():
    cache = HostCache(1000)
    cache.put(packed("a"))
    cache.put(packed("b"))
    cache.get("a")
    cache.put(packed("c"))

    assert cache.trim(nobody)
    assert held(cache, "abc") == "ac"
    assert cache.num_bytes == 800


def test_asking_how_large_an_adapter_is_is_no_use_of_it():
    cache = HostCache(1000)
    cache.put(packed("a"))
    cache.put(packed("b"))
    cache.num_pages("a")
    cache.put(packed("c"))

    cache.trim(nobody)
    assert held(cache, "abc") == "bc"


def test_what_is_waited_for_stays_and_the_cache_says_that_it_is_full():
    cache = HostCache(500)
    for digest in "abc":
        cache.put(packed(digest))

    assert not cache.trim(lambda digest: digest in "ac")
    assert held(cache, "abc") == "ac"
    assert cache.num_bytes == 800


def test_an_adapter_put_twice_counts_once():
    cache = HostCache(1000)
    cache.put(packed("a"))
    cache.put(packed("a"))

    assert cache.num_bytes == 400


def test_forgetting_what_is_not_there_is_nothing():
    cache = HostCache(1000)
    cache.discard("a")

    assert cache.num_bytes == 0
