"""The allocator: no page has two owners, and every page is free or owned."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from flora.errors import OutOfPages
from flora.serve.engine.schedule.pages import NULL_PAGE, PagePool, Use
from tests.conftest import examples


def test_kv_grows_from_the_low_end_and_adapters_from_the_high_one():
    pool = PagePool(10)

    assert pool.allocate(3, Use.KV) == [1, 2, 3]
    assert pool.allocate(2, Use.ADAPTER) == [9, 8]


def test_the_null_page_is_never_handed_out():
    pool = PagePool(4)

    assert NULL_PAGE not in pool.allocate(3, Use.KV)
    assert pool.use(NULL_PAGE) is Use.NULL


def test_more_than_is_free_is_refused_and_takes_nothing():
    pool = PagePool(4)

    with pytest.raises(OutOfPages, match="4 pages are asked for and 3 are free"):
        pool.allocate(4, Use.KV)
    assert pool.num_free == 3


def test_a_page_freed_by_one_use_serves_the_other():
    pool = PagePool(4)
    pool.free(pool.allocate(3, Use.KV))

    assert sorted(pool.allocate(3, Use.ADAPTER)) == [1, 2, 3]
    assert pool.count(Use.ADAPTER) == 3


@pytest.mark.parametrize("pages", [[1, 1], [2], [NULL_PAGE]])
def test_freeing_what_nobody_owns_is_a_bug(pages):
    pool = PagePool(4)
    pool.allocate(1, Use.KV)

    with pytest.raises(AssertionError):
        pool.free(pages)


def test_freed_pages_are_remembered_once_for_the_one_who_poisons_them():
    pool = PagePool(4, remember_freed=True)
    pool.free(pool.allocate(2, Use.KV))

    assert sorted(pool.take_freed()) == [1, 2]
    assert pool.take_freed() == []


class PagePoolMachine(RuleBasedStateMachine):
    """Any order of allocating and freeing, against a set of owners."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = PagePool(24)
        self.owned: list[tuple[Use, list[int]]] = []

    @rule(count=st.integers(0, 24), use=st.sampled_from([Use.KV, Use.ADAPTER]))
    def allocate(self, count: int, use: Use) -> None:
        if count > self.pool.num_free:
            with pytest.raises(OutOfPages):
                self.pool.allocate(count, use)
        else:
            self.owned.append((use, self.pool.allocate(count, use)))

    @precondition(lambda self: self.owned)
    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        _, pages = self.owned.pop(data.draw(st.integers(0, len(self.owned) - 1)))
        self.pool.free(pages)

    @invariant()
    def no_page_has_two_owners(self) -> None:
        pages = [page for _, pages in self.owned for page in pages]
        assert len(pages) == len(set(pages))
        assert NULL_PAGE not in pages
        assert all(self.pool.use(page) is use for use, pages in self.owned for page in pages)

    @invariant()
    def free_and_used_make_the_whole(self) -> None:
        used = {use: sum(len(pages) for kind, pages in self.owned if kind is use) for use in (Use.KV, Use.ADAPTER)}
        assert used == {use: self.pool.count(use) for use in used}
        assert self.pool.num_free + sum(used.values()) == self.pool.num_usable


TestPagePoolMachine = PagePoolMachine.TestCase
TestPagePoolMachine.settings = settings(max_examples=examples(60), stateful_step_count=60)
