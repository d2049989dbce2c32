"""Which rows a step has. Integers only: a page holds four tokens, and a clock is a number."""

import pytest

from flora.errors import OutOfPages, Overloaded
from flora.serve.engine.schedule.pages import Use
from flora.serve.engine.schedule.scheduler import Limits
from flora.serve.engine.schedule.sequence import State
from tests.serve.engine.desk import Desk, names


def test_a_prompt_is_computed_at_once_and_then_a_token_a_step():
    desk = Desk()
    sequence = desk.submit("a", 5, max_tokens=3)

    assert desk.step() == {"a": (0, 5)}
    assert desk.step() == {"a": (5, 1)}
    assert desk.step() == {"a": (6, 1)}
    assert sequence.state is State.FINISHED
    assert desk.pages.num_free == desk.pages.num_usable


def test_a_long_prompt_is_computed_in_chunks_beside_decoding_rows():
    desk = Desk(max_batch_tokens=6)
    desk.submit("short", 2)
    desk.step()
    desk.submit("long", 12)

    assert desk.step() == {"short": (2, 1), "long": (0, 5)}
    assert desk.step() == {"short": (3, 1), "long": (5, 5)}
    assert desk.step() == {"short": (4, 1), "long": (10, 2)}
    assert desk.step() == {"short": (5, 1), "long": (12, 1)}


def test_decoding_rows_go_before_an_older_prompt():
    """Else a long prompt would hold up everybody's next token."""
    desk = Desk(max_batch_tokens=4)
    desk.submit("long", 40)
    desk.step()
    desk.submit("short", 1)
    while "short" not in names(desk.scheduler.running):
        desk.step()

    assert desk.step()["short"][1] == 1


def test_prompts_fill_steps_until_half_of_the_places_decode_and_then_ride_along():
    """Four places: one that decodes leaves a prompt all rows of a step, two leave it 510."""
    desk = Desk(num_pages=1000, max_sequences=4, max_batch_tokens=1500)
    desk.submit("a", 2, max_tokens=100)
    desk.step()
    desk.submit("b", 1499, max_tokens=3)

    assert desk.step() == {"a": (2, 1), "b": (0, 1499)}

    desk.submit("c", 1500)
    assert desk.step() == {"a": (3, 1), "b": (1499, 1), "c": (0, 510)}
    assert desk.step() == {"a": (4, 1), "b": (1500, 1), "c": (510, 510)}
    assert desk.step() == {"a": (5, 1), "c": (1020, 480)}


@pytest.mark.parametrize(
    ("max_sequences", "max_batch_tokens", "num_decoding", "rows"),
    [
        (256, 2048, 127, 2048),
        (256, 2048, 128, 512),
        (256, 2048, 256, 512),
        (256, 300, 256, 300),  # never more than allowed
        (400, 2048, 400, 800),  # and always as many for prompts as decode
    ],
)
def test_rows_of_a_step(max_sequences, max_batch_tokens, num_decoding, rows):
    limits = Limits(16, max_sequences, max_batch_tokens, max_waiting=1)

    assert limits.rows_of_step(num_decoding) == rows


def test_requests_are_admitted_in_order_of_arrival_up_to_max_sequences():
    desk = Desk(max_sequences=2)
    for name in "abc":
        desk.submit(name, 2)
    desk.step()

    assert names(desk.scheduler.running) == ["a", "b"]
    assert desk.waiting == 1


def test_a_full_queue_refuses():
    desk = Desk(max_waiting=1)
    desk.submit("a", 2)

    with pytest.raises(Overloaded):
        desk.submit("b", 2)


def test_a_request_without_its_adapter_is_passed_over():
    desk = Desk()
    desk.submit("waits", 2, adapter="x")
    desk.submit("runs", 2)

    assert desk.step() == {"runs": (0, 2)}
    assert [target.serving_digest for target in desk.scheduler.wanted_adapters()] == ["x"]

    desk.load("x", 3)
    assert "waits" in desk.step()
    assert desk.pages.count(Use.ADAPTER) == 3


def test_an_adapter_is_placed_once_for_all_its_requests():
    desk = Desk(packed={"x": 3})
    desk.submit("a", 2, adapter="x")
    desk.submit("b", 2, adapter="x")

    plan = desk.scheduler.plan(0.0)

    assert [resident.digest for resident in plan.placed] == ["x"]
    assert plan.placed[0].running == 2


def test_an_idle_adapter_makes_room_for_tokens():
    desk = Desk(num_pages=8, packed={"x": 6})
    desk.submit("a", 2, adapter="x", max_tokens=1)
    desk.step()
    assert desk.pages.count(Use.ADAPTER) == 6  # idle now, and still there

    desk.submit("b", 20)

    assert "b" in desk.step()
    assert desk.pages.count(Use.ADAPTER) == 0


def test_an_admission_leaves_each_running_sequence_a_page():
    desk = Desk(num_pages=4)
    desk.submit("a", 4, max_tokens=5)  # one page now, a second with the next token
    desk.step()
    desk.submit("b", 12, max_tokens=1)  # three pages

    assert "b" not in desk.step()
    assert desk.waiting == 1


def test_without_a_page_the_youngest_sequence_is_preempted_and_computed_anew():
    desk = Desk(num_pages=4)
    old = desk.submit("old", 4, max_tokens=12)
    young = desk.submit("young", 4, max_tokens=8)
    desk.step()
    while desk.scheduler.num_preemptions == 0:
        desk.step()

    assert names(desk.scheduler.running) == ["old"]
    assert young.state is State.WAITING
    assert young.pages == []
    assert young.num_computed == 0
    told = list(young.tokens)
    while old.state is State.RUNNING:
        desk.step()
    assert desk.step() == {"young": (0, len(told))}  # prompt and answer so far, in one piece
    assert young.tokens[: len(told)] == told


def test_a_preempted_request_keeps_its_place_in_the_queue():
    desk = Desk(num_pages=4)
    desk.submit("old", 4, max_tokens=12)
    desk.submit("young", 4, max_tokens=8)
    desk.step()
    desk.submit("late", 9, max_tokens=2)
    while desk.scheduler.num_preemptions == 0:
        desk.step()
    while "old" in names(desk.scheduler.running):
        desk.step()

    assert next(iter(desk.step())) == "young"


def test_preemption_lets_go_of_the_adapter():
    desk = Desk(num_pages=6, packed={"x": 2})
    desk.submit("old", 4, max_tokens=20)
    desk.submit("young", 4, max_tokens=12, adapter="x")
    desk.step()
    assert desk.pages.count(Use.ADAPTER) == 2

    while desk.scheduler.get((b"", "old")):
        desk.step()
        assert desk.scheduler.num_preemptions <= 1  # it does not come back before there is room

    assert desk.scheduler.num_preemptions == 1


def test_a_request_that_could_never_finish_is_refused_on_arrival():
    desk = Desk(num_pages=5)

    with pytest.raises(OutOfPages, match="needs 6 pages of the pool and 5 can be had"):
        desk.submit("a", 4, max_tokens=20)
    assert desk.scheduler.is_empty


def test_the_adapter_counts_in_what_a_request_needs():
    desk = Desk(num_pages=5, packed={"x": 4})

    with pytest.raises(OutOfPages):
        desk.submit("a", 4, max_tokens=4, adapter="x")
    desk.submit("b", 2, max_tokens=2, adapter="x")


def test_a_context_shorter_than_asked_bounds_what_a_request_needs():
    desk = Desk(num_pages=5, max_context=20)

    assert desk.submit("a", 4, max_tokens=1000).max_len == 20


def test_a_pinned_adapter_is_no_longer_to_be_had():
    desk = Desk(num_pages=5, packed={"x": 3})
    desk.submit("a", 1, max_tokens=1, adapter="x")
    desk.step()
    desk.residency.pin("x")

    with pytest.raises(OutOfPages, match="3 are taken by pinned adapters"):
        desk.submit("b", 8, max_tokens=4)
    desk.submit("c", 4, max_tokens=4, adapter="x")  # its own adapter is already paid for


def test_a_pin_that_would_strand_a_live_request_is_refused():
    desk = Desk(num_pages=5, packed={"x": 3})
    desk.submit("a", 8, max_tokens=4)

    with pytest.raises(OutOfPages, match="the largest request needs 3 pages"):
        desk.scheduler.room.check_pin("x", 3, desk.scheduler.live)
    desk.scheduler.room.check_pin("x", 2, desk.scheduler.live)


def test_a_pin_leaves_one_slot():
    desk = Desk(num_slots=1, packed={"x": 3})

    with pytest.raises(OutOfPages):
        desk.scheduler.room.check_pin("x", 3, desk.scheduler.live)


def test_a_request_without_room_is_overtaken_only_so_long():
    desk = Desk(num_pages=8, max_sequences=8)
    desk.submit("first", 16, max_tokens=4)  # five pages at its longest
    desk.step()
    desk.submit("large", 20, max_tokens=4, at_s=0.0)

    desk.submit("small", 2, max_tokens=1, at_s=1.0)
    assert "small" in desk.step(now_s=4.9)

    desk.submit("late", 2, max_tokens=1, at_s=2.0)
    assert "late" not in desk.step(now_s=5.0)
    assert desk.waiting == 2


@pytest.mark.parametrize("phase", ["waiting", "prefilling", "decoding", "preempted"])
def test_a_cancelled_request_gives_all_back_in_every_phase(phase):
    desk = Desk(num_pages=12, packed={"x": 2}, max_batch_tokens=4)
    sequence = desk.submit("a", 10, max_tokens=8, adapter="x")
    if phase != "waiting":
        desk.step()
    if phase in ("decoding", "preempted"):
        while sequence.num_generated == 0:
            desk.step()
    if phase == "preempted":
        desk.scheduler._preempt(sequence)

    desk.scheduler.finish(sequence)

    assert desk.scheduler.is_empty
    assert desk.waiting == 0
    assert not list(desk.scheduler.wanted_adapters())
    assert desk.pages.count(Use.KV) == 0
    assert all(resident.running == 0 for resident in desk.residency)
