"""Loads run beside the engine and finish as values: an adapter, or what was wrong."""

from threading import Event, get_ident

import pytest
import torch

from flora.errors import AdapterNotFound, ServeError
from flora.serve.engine.layout import AdapterTable
from flora.serve.engine.loading.loader import LoadFailed, ThreadLoader
from flora.serve.engine.loading.packing import PackedAdapter
from flora.serve.request import AdapterTarget


def target(digest: str) -> AdapterTarget:
    return AdapterTarget(serving_digest=digest, version_digest="v", label=digest)


def packed(asked: AdapterTarget) -> PackedAdapter:
    return PackedAdapter(
        asked.serving_digest, AdapterTable(b"", b"", 0, 0), torch.zeros(1, 64), num_pages=1, load_s=0.0
    )


def test_a_load_runs_on_another_thread_and_wakes_whoever_waits():
    woken, threads = Event(), []

    def load(asked: AdapterTarget) -> PackedAdapter:
        threads.append(get_ident())
        return packed(asked)

    loader = ThreadLoader(load, woken.set)
    loader.start(target("a"))

    assert woken.wait(10)
    assert [finished.digest for finished in loader.finished()] == ["a"]
    assert threads != [get_ident()]
    loader.close()


def test_nothing_finished_is_an_empty_list_at_once():
    loader = ThreadLoader(packed, lambda: None)

    assert loader.finished() == []
    loader.close()


@pytest.mark.parametrize(
    ("raised", "kind"), [(AdapterNotFound("no such version"), AdapterNotFound), (MemoryError("no memory"), ServeError)]
)
def test_a_load_that_fails_is_told_and_the_next_one_runs(raised, kind):
    def load(asked: AdapterTarget) -> PackedAdapter:
        if asked.serving_digest == "bad":
            raise raised
        return packed(asked)

    loader = ThreadLoader(load, lambda: None)
    loader.start(target("bad"))
    loader.start(target("good"))

    finished = loader.finished(10.0)
    while len(finished) < 2:
        finished += loader.finished(10.0)
    failed, sound = finished
    assert isinstance(failed, LoadFailed)
    assert isinstance(failed.error, kind)
    assert sound.digest == "good"
    loader.close()
