"""`flora bench serve` as it is typed: flags to engine and workload, rows to a table, to JSON and to a file."""

import json

import pytest

from flora.cli import main

SMALL = ["--preset", "small", "--shape", "tiny", "--pool", "32MiB", "--threads", "1", "--device", "cpu"]


def bench(*words: str) -> int:
    return main(["bench", "serve", *SMALL, *words])


def test_rows_are_printed_and_written_as_they_come(tmp_path, capfd):
    out = tmp_path / "rows.jsonl"

    code = bench(
        "--adapters", "0,2", "--requests", "6", "--lengths", "4,9", "--ranks", "4", "--modules", "all",
        "--rate", "100", "--cv", "2", "--alpha", "0.5", "--seeds", "7", "--cancel", "0.5", "--slo-ttft", "9",
        "--temperature", "0.7", "--top-p", "0.5",
        "--max-sequences", "3", "--max-batch-tokens", "17", "--commit", "abc", "--out", str(out), "--json",
    )  # fmt: skip

    printed, written = json.loads(capfd.readouterr().out)["rows"], [json.loads(x) for x in out.read_text().splitlines()]
    assert code == 0
    assert printed == written
    assert [row["adapters"] for row in written] == [0, 2]
    asked = {
        "shape": "tiny", "modules": "all", "ranks": [4], "requests": 6, "lengths": [4, 9], "rate": 100.0, "cv": 2.0,
        "alpha": 0.5, "seed": 7, "temperature": 0.7, "top_p": 0.5,
        "slo_ttft_s": 9.0, "max_sequences": 3, "max_batch_tokens": 17, "commit": "abc",
    }  # fmt: skip
    assert asked.items() <= written[1].items()
    assert written[1]["cancelled"] > 0


def test_each_switch_reaches_the_engine(capfd):
    bench(
        "--adapters", "2", "--requests", "4", "--lengths", "4,9", "--prefix-cache", "--no-fairness", "--no-prefetch",
        "--cluster", "3", "--slo-ttft-s", "5", "--adapter-dtype", "float8", "--json",
    )  # fmt: skip
    [row] = json.loads(capfd.readouterr().out)["rows"]

    switched = {"prefix_cache": True, "fairness": False, "prefetch": False, "cluster": 3, "slo_ttft_s": 5.0,
                "adapter_dtype": "float8_e4m3fn"}  # fmt: skip
    assert switched.items() <= row["switches"].items()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], (False, None, None)),
        (["--merge"], (True, None, None)),
        (["--merge", "--merge-turn", "9"], (True, 9, None)),
        (["--fixed-slots", "3"], (False, None, 3)),
    ],
)
def test_rows_say_what_they_compare(words, said, capfd):
    bench("--adapters", "2", "--requests", "4", "--lengths", "4,9", "--json", *words)
    [row] = json.loads(capfd.readouterr().out)["rows"]

    assert (row["merged"], row["merged_turn_tokens"], row["fixed_slots"]) == said


def test_without_switches_prompts_are_computed_and_nobody_is_given_up(capfd):
    bench("--adapters", "0", "--requests", "4", "--lengths", "4,9", "--json")
    [row] = json.loads(capfd.readouterr().out)["rows"]

    assert {"prefix_cache": False, "prefetch": True, "cluster": None, "slo_ttft_s": None}.items() <= row[
        "switches"
    ].items()


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--preset", "S9"], "--preset 'S9'"),
        (["--shape", "gpt"], "--shape 'gpt'"),
        (["--modules", "some"], "--modules 'some'"),
        (["--adapters", "5,x"], "--adapters '5,x'"),
        (["--ranks", "0"], "--ranks '0'"),
        (["--lengths", "9,9"], "--lengths 9,9"),
        (["--merge", "--rate", "3"], "--merge"),
        (["--http", "--url", "http://127.0.0.1:1"], "--url and --http"),
    ],
)
def test_what_cannot_be_measured_is_a_usage_error(words, named, capfd):
    assert bench(*words) == 2
    assert named in capfd.readouterr().err


def test_the_presets_are_s_loras_settings():
    from flora.bench.settings import SETTINGS

    assert {name: (SETTINGS[name].shape, SETTINGS[name].ranks) for name in ("S1", "S2", "S4")} == {
        "S1": ("llama-7b", (8,)),
        "S2": ("llama-7b", (64, 32, 16, 8)),
        "S4": ("llama-13b", (64, 32, 16)),
    }
