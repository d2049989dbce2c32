"""Suites on the real engine, so small that a CPU runs them; time passes only where a test says so."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import msgspec
import pytest

from flora.bench.engines import World
from flora.bench.facts import Surroundings
from flora.bench.suite import START_S, SuiteRun, is_measured, told
from flora.bench.suites import FULL, SMALL, SUITES, Entry, entries_of
from flora.cli import main
from flora.errors import ServeError
from flora.serve.config import EngineConfig

ENGINE = EngineConfig(
    base=Path(), registry="", cache_dir=Path(), pool_bytes=32 << 20, max_context=2048, num_threads=1,
    max_sequences=8, max_batch_tokens=64, prefix_cache=False,
)  # fmt: skip
HERE = Surroundings(commit="abc", gpu=None)


def small(*labels: str) -> list[Entry]:
    entries = {entry.label.removeprefix("small/"): entry for entry in entries_of(list(SUITES), ENGINE, SMALL)}
    return [entries[label] for label in labels]


def measure(entries: list[Entry], before: list[dict[str, Any]] | None = None, **settings: Any) -> tuple[list, SuiteRun]:
    run = SuiteRun(entries, before or [], HERE, **settings)
    return [msgspec.to_builtins(row) for row in run.rows()], run


def looks(*moments_s: float) -> Iterator[float]:
    """A clock's answers; the last one again and again."""
    yield from moments_s
    while True:
        yield moments_s[-1]


def test_every_measurement_has_a_label_of_its_own_and_the_scales_have_the_same_ones():
    full = [entry.label for entry in entries_of(list(SUITES), ENGINE, FULL)]
    rehearsed = [entry.label for entry in entries_of(list(SUITES), ENGINE, SMALL)]

    assert len(set(full)) == len(full)
    assert rehearsed == [f"small/{label}" for label in full]


def test_the_table_is_the_workload_that_other_engines_were_measured_with():
    [entry] = [entry for entry in entries_of(["table"], ENGINE) if entry.label == "table/1000"]
    setting = entry.bench.setting

    assert (setting.shape, setting.modules, setting.ranks) == ("llama3-8b", "attention", (64, 32, 16, 8))
    assert (setting.adapters, setting.num_requests, setting.lengths) == ((1000,), 600, (8, 512))
    assert (entry.bench.rate, entry.bench.alpha, entry.bench.seeds) == (0.0, 1.0, (42,))


def test_s_loras_pool_and_its_queue_are_those_of_its_a10g():
    entries = {entry.label: entry.bench for entry in entries_of(["paper"], ENGINE)}
    cells, cell_bytes = 14_500, 32 * 2 * 4096 * 2  # a token of the 7B shape: layers, keys and values, hidden, bf16

    for label in ("S2/5/capped", "S2/5/capped/merged/queue"):
        assert entries[label].engine.pool_bytes == cells * cell_bytes
        assert entries[label].setting.num_requests == 150
    assert entries["S2/5/capped/merged/queue"].merged_turn_tokens == cells // 6


def test_slots_of_the_largest_rank_fit_into_the_pool_and_the_best_numbers_of_them_leave_most_of_it():
    engine = msgspec.structs.replace(ENGINE, dtype="bfloat16")
    benches = [entry.bench for entry in entries_of(["paper"], engine) if "fixed" in entry.label]
    adapter = 64 * 32 * 8 * 4096 * 2  # rank, layers, A and B of q, k, v, o, hidden, bf16

    assert [bench.setting.fixed_slots for bench in benches] == [160, 176, 192, 144, 20, 24, 128, 32, 16]
    for bench in benches:
        config = World(Path(), bench, {}).config([])
        assert (config.slot_bytes, config.max_adapters) == (adapter, bench.setting.fixed_slots)
        assert config.max_adapters * adapter < config.pool_bytes * (0.6 if bench.setting.fixed_slots == 32 else 0.5)


def test_rows_bear_the_label_and_what_tells_neighbours_apart():
    rows, run = measure(small("base/alone", "base/beside", "S2/200/fixed-144", "S2/5/merged", "S2/5/merged/queue",
                               "S2/5/capped/merged/queue", "S2/32/cluster-8"))  # fmt: skip

    by_label = {row["label"].removeprefix("small/"): row for row in rows}
    assert run.outcome.done == list(dict.fromkeys(row["label"] for row in rows))
    assert sum(row["label"] == "small/base/alone" for row in rows) == 5
    assert [by_label[f"base/{name}"]["beside"] for name in ("alone", "beside")] == [0, 3]
    assert by_label["base/beside"]["adapters"] == 0
    slots = by_label["S2/200/fixed-144"]
    assert (slots["fixed_slots"], slots["switches"]["max_adapters"]) == (2, 2)
    # rank 8, two layers, A and B of four projections, rows of 64, float32
    assert slots["switches"]["slot_bytes"] == 8 * 2 * 8 * 64 * 4
    assert slots["evictions"] > 0
    assert by_label["S2/5/merged"]["switches"]["slot_bytes"] is None
    assert by_label["S2/5/merged"]["merged"]
    assert by_label["S2/5/merged"]["merged_turn_tokens"] is None
    assert by_label["S2/5/merged/queue"]["merged_turn_tokens"] == 20_480
    assert by_label["S2/5/capped/merged/queue"]["merged_turn_tokens"] == 2_416
    assert by_label["S2/32/cluster-8"]["switches"]["cluster"] == 8


def test_each_measurement_finds_an_engine_that_knows_no_adapter():
    rows, _ = measure(small("table/100", "table/1000"))

    assert [row["order"] for row in rows] == ["cold", "cold"]
    assert all(row["loads"] == row["distinct"] > 0 for row in rows)


def test_what_is_there_of_this_commit_and_gpu_is_not_measured_again():
    entries = small("table/0", "base/alone")
    rows, _ = measure(entries)

    again, run = measure(entries, before=rows)
    assert (again, run.outcome.done, run.outcome.left) == ([], [], [])
    assert not is_measured(entries[0], rows, Surroundings(commit="def", gpu=None))
    assert not is_measured(entries[0], rows, Surroundings(commit="abc", gpu="H100"))
    assert not is_measured(entries[1], rows[:-1], HERE)  # four passes of five


def test_arrivals_come_at_a_share_of_what_was_reached():
    rows, _ = measure(small("S2/200", "S2/200/fcfs/cv4"))

    *reached, arrivals = rows
    assert [row["seed"] for row in reached] == [42, 43, 44]
    assert arrivals["rate"] == pytest.approx(1.3 * median(row["req_s"] for row in reached), abs=0.01)
    assert arrivals["requests"] == max(2, int(arrivals["rate"] * 75 / 200))
    assert (arrivals["cv"], arrivals["slo_ttft_s"]) == (4.0, 2.0)


def test_arrivals_wait_for_the_measurement_that_their_rate_depends_on():
    rows, run = measure(small("S2/200/abort/cv1"))

    assert (rows, run.outcome.left) == ([], ["small/S2/200/abort/cv1"])


def test_nothing_begins_that_would_take_longer_than_the_time_that_is_left():
    first, second = (replace(entry, seconds=10.0) for entry in small("table/0", "table/5"))
    budget_s = START_S + 15  # an engine and the first, and five seconds more
    clock = looks(0.0, 0.0, START_S, START_S, START_S + 10)

    rows, run = measure([first, second], budget_s=budget_s, clock=lambda: next(clock))

    assert [row["label"] for row in rows] == run.outcome.done == [first.label]
    assert run.outcome.left == [second.label]
    assert measure([first], budget_s=START_S)[1].outcome.left == [first.label]  # no engine is built for it


def test_a_measurement_that_fails_costs_its_neighbours_nothing():
    broken, sound = small("table/5", "table/100")
    crowded = replace(broken.bench, engine=msgspec.structs.replace(ENGINE, max_waiting=1))

    said: list[str] = []

    rows, run = measure([replace(broken, bench=crowded), sound], tell=said.append)

    assert list(run.outcome.failed) == [broken.label]
    assert f"{broken.label} failed: {told(run.outcome.failed[broken.label])}" in said
    assert [row["label"] for row in rows] == run.outcome.done == [sound.label]


def test_entries_that_no_device_can_serve_fail_and_those_behind_them_are_measured():
    """In a suite of float16, as on a GPU that knows no fp8."""
    entries = entries_of(["fp8", "table"], msgspec.structs.replace(ENGINE, dtype="float16"), SMALL)
    narrow = [entry.label for entry in entries if entry.label.endswith("/fp8")]
    said: list[str] = []

    rows, run = measure([entry for entry in entries if entry.label in (*narrow, "small/table/0")], tell=said.append)

    assert list(run.outcome.failed) == narrow
    assert [row["label"] for row in rows] == run.outcome.done == ["small/table/0"]
    assert all(any(f"{label} failed: adapters in float8 go with" in line for line in said) for label in narrow)


def test_what_failed_is_told_with_its_cause():
    assert told(ServeError("it did not come up", cause="no module named x")) == "it did not come up: no module named x"
    assert told(ServeError("it did not come up")) == "it did not come up"


def test_the_command_goes_on_where_it_was_cut_off(tmp_path, capfd):
    out = tmp_path / "rows.jsonl"
    words = ["bench", "suite", "table", "--small", "--device", "cpu", "--commit", "abc", "--out", str(out)]
    zero, five = "small/table/0", "small/table/5"

    assert main([*words, "--only", zero]) == 0
    first = out.read_text()
    assert main([*words, "--only", zero, "--only", five]) == 0
    listed = main(
        ["bench", "suite", "table", "--small", "--device", "cpu", "--commit", "abc", "--list", "--out", str(out)]
    )

    printed = capfd.readouterr()
    assert out.read_text().startswith(first)
    assert [line["label"] for line in map(msgspec.json.decode, out.read_text().splitlines())] == [zero, five]
    assert listed == 0
    assert [line.split("\t")[-1] for line in printed.out.splitlines()[-5:]] == [
        "true",
        "true",
        "false",
        "false",
        "false",
    ]


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["tables"], "'tables'"),
        (["table", "--only", "table/7"], "'table/7'"),
        (["table", "--budget", "soon"], "--budget 'soon'"),
        (["table"], "--out"),
    ],
)
def test_what_cannot_be_measured_is_a_usage_error(words, named, tmp_path, capfd):
    out = ["--out", str(tmp_path / "rows")] if named != "--out" else []

    assert main(["bench", "suite", "--device", "cpu", *words, *out]) == 2
    assert named in capfd.readouterr().err
