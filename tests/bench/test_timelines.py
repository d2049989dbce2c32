"""What is checked before a row is printed, and the figures in it, by numbers that can be worked out by hand."""

import msgspec
import pytest

from flora.bench.asks import Ask, asks_of
from flora.bench.facts import make_row
from flora.bench.row import Row
from flora.bench.summary import summarize
from flora.bench.timeline import Timeline, check_timelines
from flora.bench.trace import Workload, draw_trace
from flora.errors import CheckFailed


def ask(num_tokens: int = 3, due_s: float = 0.0, cancel_after: int | None = None) -> Ask:
    return Ask(prompt=(1, 2), num_tokens=num_tokens, due_s=due_s, adapter=None, cancel_after=cancel_after)


def seen(*piece_s: float, outcome: str = "length", sent_s: float = 0.0) -> Timeline:
    timeline = Timeline(sent_s=sent_s, piece_s=list(piece_s), num_tokens=len(piece_s))
    timeline.end(outcome, piece_s[-1] if piece_s else sent_s)  # type: ignore[arg-type]
    return timeline


def test_a_request_with_all_its_tokens_passes():
    check_timelines([ask(3)], [seen(0.1, 0.2, 0.3)])


def test_a_token_too_few_fails_and_names_the_request():
    with pytest.raises(CheckFailed, match=r"request 1 .* got 2 tokens and asked for 3"):
        check_timelines([ask(1), ask(3)], [seen(0.1), seen(0.1, 0.2)])


def test_a_failed_request_fails_the_row_with_the_servers_words():
    broken = Timeline(sent_s=0.0)
    broken.end("failed", 0.5, "no pages")

    with pytest.raises(CheckFailed) as caught:
        check_timelines([ask()], [broken])

    assert caught.value.cause == "no pages"


def test_a_cancelled_request_has_what_came_until_then_and_not_all():
    check_timelines([ask(4, cancel_after=2)], [seen(0.1, 0.2, outcome="cancelled")])

    with pytest.raises(CheckFailed, match="cancelled after 2 of 4 tokens, got 1"):
        check_timelines([ask(4, cancel_after=2)], [seen(0.1, outcome="cancelled")])
    with pytest.raises(CheckFailed, match="should end as 'cancelled'"):
        check_timelines([ask(4, cancel_after=2)], [seen(0.1, 0.2, 0.3, 0.4)])


def test_an_abort_passes_only_where_the_server_was_asked_to_abort():
    asks, timelines = [ask()], [seen(outcome="aborted")]

    check_timelines(asks, timelines, may_abort=True)
    with pytest.raises(CheckFailed):
        check_timelines(asks, timelines)


def test_a_server_that_counts_another_prompt_fails():
    timeline = seen(0.1, 0.2, 0.3)
    timeline.prompt_tokens = 3

    with pytest.raises(CheckFailed, match="sent 2 prompt tokens and the server counted 3"):
        check_timelines([ask(3)], [timeline])


def test_figures_are_those_of_the_timelines():
    asks = [ask(3, due_s=1.0), ask(2, due_s=2.0), ask(5, due_s=2.0, cancel_after=1), ask(9, due_s=2.5)]
    timelines = [
        seen(1.5, 1.75, 2.0, sent_s=1.0),  # first token after 500 ms, 250 ms a token
        seen(4.0, 5.0, sent_s=2.125),  # after 2 s, 1 s a token
        seen(2.5, outcome="cancelled", sent_s=2.0),
        seen(outcome="aborted", sent_s=2.5),
    ]

    figures = summarize(asks, timelines, slo_ttft_s=1.0)

    assert (figures["completed"], figures["cancelled"], figures["aborted"]) == (2, 1, 1)
    assert figures["elapsed_s"] == 4.0  # from the first arrival, at 1, to the last end, at 5
    assert figures["req_s"] == 0.5
    assert figures["out_tok"] == 6
    assert figures["in_tok"] == 6  # the aborted request's prompt was not answered
    assert figures["ttft_ms_p50"] == 500.0  # of 500, 500 and 2000
    assert figures["tpot_ms_p50"] == 625.0  # of 250 and 1000
    assert figures["gap_ms_p50"] == 250.0  # of 250, 250 and 1000
    assert figures["send_delay_ms_p99"] == pytest.approx(121.25)  # of 0, 125, 0, 0
    assert figures["slo_attainment"] == pytest.approx(0.3333)  # one of three; the cancelled one is not judged


def test_a_share_of_the_requests_loses_interest_midway_the_same_ones_each_time():
    trace = draw_trace(Workload(num_requests=2000, num_adapters=3), seed=1)

    asks = asks_of(trace, has_adapters=True, cancel=0.05, seed=5)

    cancelled = [ask for ask in asks if ask.cancel_after is not None]
    assert abs(len(cancelled) / 2000 - 0.05) < 0.02
    assert all(ask.cancel_after == ask.num_tokens // 2 for ask in cancelled)
    assert asks == asks_of(trace, has_adapters=True, cancel=0.05, seed=5)
    assert asks_of(trace, has_adapters=True, seed=5) != asks


def test_a_row_has_what_the_comparison_needs():
    needed = {
        "system", "version", "commit", "gpu", "shape", "adapters", "ranks", "modules", "requests", "rate", "alpha",
        "cv", "seed", "order", "req_s", "out_tok_s", "in_tok", "out_tok", "kernels", "ttft_ms_p50", "ttft_ms_p99",
        "tpot_ms_p50", "tpot_ms_p99", "slo_attainment", "send_delay_ms_p99",
    }  # fmt: skip

    assert needed <= set(Row.__struct_fields__)


def test_a_row_lacking_a_fact_is_no_row():
    with pytest.raises(msgspec.ValidationError, match="required field"):
        make_row(system="flora", req_s=1.0)
