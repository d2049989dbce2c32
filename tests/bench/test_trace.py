import numpy as np

from flora.bench.trace import Workload, draw_trace


def test_a_seed_means_the_trace_that_the_baseline_was_measured_with():
    trace = draw_trace(Workload(num_requests=600, num_adapters=1000), seed=42)

    assert (trace.in_tokens, trace.out_tokens, trace.num_distinct) == (153_447, 155_474, 457)


def test_without_adapters_no_popularity_is_drawn():
    trace = draw_trace(Workload(num_requests=600, num_adapters=0), seed=42)

    assert (trace.in_tokens, trace.out_tokens, trace.num_distinct) == (157_780, 154_854, 1)


def test_a_small_alpha_gives_most_requests_to_the_first_adapter():
    trace = draw_trace(Workload(num_requests=5000, num_adapters=200, alpha=0.1), seed=42)

    assert abs((trace.adapters == 0).mean() - (1 / 200) ** 0.1) < 0.02  # 0.589


def test_gaps_have_the_rate_and_the_variation_asked_for():
    trace = draw_trace(Workload(num_requests=20_000, num_adapters=5, rate=10.0, cv=2.0), seed=43)
    gaps = np.diff(trace.arrivals_s)

    assert abs(gaps.mean() - 0.1) < 0.01
    assert abs(gaps.std() / gaps.mean() - 2.0) < 0.2
