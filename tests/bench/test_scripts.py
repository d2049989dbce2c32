"""The benchmarks that stand beside the command, on shapes so small that a CPU runs them: rows that claims can read."""

import importlib.util
import json
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from flora.bench.claims import CLAIMS, findings_of

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, BENCHMARKS / f"{name}.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def run(
    module: ModuleType, words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[int | None, list[dict[str, Any]]]:
    """The exit status of a script's main, and the rows that it wrote."""
    out = tmp_path / "rows.jsonl"
    monkeypatch.setattr(sys, "argv", [module.__name__, "--device", "cpu", "--commit", "abc", "--out", str(out), *words])
    code = module.main()
    return code, [json.loads(line) for line in out.read_text().splitlines()]


def test_peft_serves_the_trace_in_both_of_its_ways(tmp_path, monkeypatch):
    words = ["--shape", "tiny", "--dtype", "float32", "--requests", "10", "--lengths", "4,9", "--adapters", "5",
             "--ranks", "8,4", "--ways", "switch,mixed"]  # fmt: skip

    _, rows = run(script("bench_peft"), words, tmp_path, monkeypatch)

    switch, mixed = rows
    assert (switch["label"], mixed["label"]) == ("peft/5", "peft/5/mixed")
    assert switch["completed"] == mixed["completed"] == 10
    assert (switch["batches"], mixed["batches"]) == (switch["distinct"], 1)
    assert (switch["in_tok"], switch["out_tok"]) == (mixed["in_tok"], mixed["out_tok"])
    assert {"torch", "transformers", "version", "commit", "seed", "alpha", "ranks", "gpu"} <= set(switch)


def test_loads_are_timed_in_this_process_and_in_a_loader(tmp_path, monkeypatch):
    _, rows = run(script("bench_load"), ["--shape", "tiny", "--ranks", "8,4"], tmp_path, monkeypatch)

    assert [row["label"] for row in rows] == ["load/attention/8", "load/attention/4"]
    assert rows[0]["num_bytes"] >= rows[1]["num_bytes"] > 0
    for row in rows:
        for took in (row["pack_ms"], row["pack_cpu_ms"], row["loader_ms"]):
            assert 0 < took["min"] <= took["p50"] <= took["max"]


def test_loads_into_fp8_are_timed_too_and_fill_half_the_memory(tmp_path, monkeypatch):
    words = ["--shape", "smollm2-135m", "--ranks", "8"]
    run(script("bench_load"), words, tmp_path, monkeypatch)

    _, [wide, narrow] = run(script("bench_load"), [*words, "--adapter-dtype", "float8_e4m3fn"], tmp_path, monkeypatch)

    assert narrow["label"] == "load/attention/8/fp8"
    assert narrow["num_bytes"] == pytest.approx(wide["num_bytes"] / 2, rel=0.1)


def test_products_are_timed_by_shape_and_rows(tmp_path, monkeypatch):
    _, rows = run(script("bench_products"), ["--shapes", "tiny,smollm2-135m", "--rows", "1,64"], tmp_path, monkeypatch)

    assert [(row["shape"], row["rows"]) for row in rows] == [
        ("tiny", 1), ("tiny", 64), ("smollm2-135m", 1), ("smollm2-135m", 64)
    ]  # fmt: skip
    assert all(set(row["us"]) == {"qkv", "o", "gate_up", "down"} and min(row["us"].values()) > 0 for row in rows)
    assert rows[3]["layer_us"] > rows[1]["layer_us"], "some forty times the operations"


def test_draws_are_the_samplers_before_they_are_timed(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)

    _, rows = run(script("bench_draw"), ["--rows", "1,3", "--vocab", "500"], tmp_path, monkeypatch)

    cases = ["greedy", "temperature", "top_p", "top_k", "both", "logprobs"]
    assert [(row["rows"], row["case"]) for row in rows] == [(1, case) for case in cases] + [(3, case) for case in cases]
    assert all(row["host_us"] > 0 for row in rows)


def test_a_draw_that_is_not_the_samplers_is_not_timed(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    module = script("bench_draw")
    monkeypatch.setattr(module, "draw_token", lambda *_: -1)

    with pytest.raises(SystemExit, match=r"temperature: token .* nothing was timed"):
        run(module, ["--rows", "1", "--vocab", "500"], tmp_path, monkeypatch)


def test_prompts_in_one_list_and_in_two_agree_before_they_are_timed(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)

    _, rows = run(script("bench_joint"), ["--shapes", "tiny", "--prompt-rows", "40"], tmp_path, monkeypatch)

    assert [row["adapters"] for row in rows] == ["own", "of 100", "of 5"]
    assert all(row["us"].keys() == {"no prompts", "apart", "joint"} and min(row["us"].values()) > 0 for row in rows)


def test_every_case_of_the_kernels_has_lists_of_its_rows(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    import kernel_lora
    import kernel_world

    bench, ranks = kernel_world.Bench(torch.device("cpu"), kernel_world.TINY, [], 1), [8, 16, 32, 64] * 2
    cases = {name: (work, rows) for name, work, rows in kernel_lora.lora_cases(bench, ranks)}

    for name, (work, rows) in cases.items():
        listed = work.expand.segments[: int(work.expand.num_segments)]
        assert int(listed[:, 2].sum()) == (0 if name == "none" else rows), name
    assert cases["none"][0].expand.room == cases["none"][0].shrink.room == len(ranks)


def test_a_sweep_tries_no_tiling_that_is_the_default_and_none_twice(monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.syspath_prepend(BENCHMARKS)
    from flora.kernels.tuning import Tuning

    tried = [
        (part, replace(getattr(Tuning(), part), **sizes)) for part, sizes in script("kernel_sweep").variants() if sizes
    ]

    assert len(set(tried)) == len(tried)
    assert not [part for part, tiling in tried if tiling == getattr(Tuning(), part)]


def test_no_batch_begins_after_the_time_is_up(tmp_path, monkeypatch):
    words = ["--shape", "tiny", "--dtype", "float32", "--requests", "10", "--lengths", "4,9", "--adapters", "5",
             "--ranks", "4", "--seconds", "0"]  # fmt: skip

    _, [row] = run(script("bench_peft"), words, tmp_path, monkeypatch)

    assert row["batches"] == 1
    assert 0 < row["completed"] < 10


GATE = ["--shape", "tiny", "--layers", "1", "--tokens", "2", "--pool-gib", "0.05"]


def test_the_gate_holds_the_engine_against_peft(tmp_path, monkeypatch):
    """In float32 its error is rounding, so the bf16 of PEFT beside it is a hundred times as large."""
    code, [row] = run(script("bench_gate"), [*GATE, "--dtype", "float32"], tmp_path, monkeypatch)

    assert code == 0
    assert row["error_flora"] < 1e-4 < 1e-3 < row["error_peft"]
    assert row["greedy_equal_flora"] == row["cases"] == 15
    assert row["rows"] == 15 * 2
    [found] = findings_of([row], [claim for claim in CLAIMS if claim.of == "gate"])
    assert found.holds


def test_the_gate_holds_adapters_in_fp8_against_rounded_ones(tmp_path, monkeypatch):
    """And says what the rounding alone changes: here less than the bf16 of PEFT does."""
    words = [*GATE, "--dtype", "float32", "--adapter-dtype", "float8_e4m3fn"]

    code, [row] = run(script("bench_gate"), words, tmp_path, monkeypatch)

    assert code == 0
    assert row["error_flora"] < 1e-4 < row["error_rounding"] < row["error_peft"]
    assert findings_of([row], [claim for claim in CLAIMS if claim.of == "gate"]) == [], "it is not the gate's row"


def test_the_gate_shuts_where_the_engine_errs(tmp_path, monkeypatch):
    """Its logits are off by a hundredth of their spread: too little to be seen in an answer."""
    gate = script("bench_gate")
    told_of = gate.told_of

    def wrong(*arguments: Any) -> list[tuple[list[int], torch.Tensor]]:
        generator = torch.Generator().manual_seed(0)
        return [(tokens, row + 0.02 * row.std() * torch.randn(row.shape, generator=generator))
                for tokens, row in told_of(*arguments)]  # fmt: skip

    monkeypatch.setattr(gate, "told_of", wrong)

    code, [row] = run(gate, [*GATE, "--dtype", "float32"], tmp_path, monkeypatch)

    assert code == 1
    assert row["error_ratio"] > 2
    assert [found.holds for found in findings_of([row], CLAIMS)] == [False]


def test_latency_is_of_one_stream_and_of_adapters_wherever_they_lie(tmp_path, monkeypatch):
    latency = script("bench_latency")
    monkeypatch.setattr(latency, "REPEATS", 2)
    monkeypatch.setattr(latency, "ANSWER_TOKENS", 4)
    words = ["--shape", "tiny", "--rank", "4", "--pool-gib", "0.05", "--host-gib", "0.1", "--loaders", "0"]

    _, [row] = run(latency, words, tmp_path, monkeypatch)

    assert row["label"] == "latency"
    assert {found.claim.of for found in findings_of([row], CLAIMS)} == {"latency"}
    assert all(row[f"ttft_{place}_ms"]["p50"] > 0 for place in ("base", "resident", "file", "host"))
