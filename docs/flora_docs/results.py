"""Rows of `benchmarks/results/` as tables: what tells the rows apart, what was measured, and the commit that ran."""

import json
from pathlib import Path
from typing import Any

from flora.bench.claims import findings_of
from flora.bench.row import read_rows

# file -> the question that it answers, and the columns to show. Of other files, whatever differs between rows is shown.
_SHOWN: dict[str, tuple[str, tuple[str, ...]]] = {
    "suite": (
        "What does Flora claim of its engine?",
        ("label", "modules", "adapters", "order", "req_s", "out_tok_s", "step_ms_p50", "gap_p99_ratio", "gpu"),
    ),
    "gate": (
        "Is it as exact as PEFT? (The first row's judge was wrong, see the notes.)",
        ("shape", "layers", "dtype", "adapter_dtype", "error_flora", "error_peft", "error_ratio", "rows", "gpu"),
    ),
    "many_adapters": (
        "How fast are many adapters of one base served?",
        ("system", "modules", "adapters", "order", "req_s", "out_tok_s", "ttft_s_p50", "loads", "gpu"),
    ),
    "latency": (
        "What does an adapter cost one stream?",
        ("shape", "modules", "rank", "tpot_base_ms", "tpot_adapter_ms", "ttft_resident_ms", "ttft_file_ms", "gpu"),
    ),
    "kernels": (
        "How fast are the kernels? (Bytes of true ranks, by graph replay.)",
        ("lora_tb_s", "lora_all_tb_s", "decode_tb_s", "gpu"),
    ),
    "products": (
        "How long do a layer's products take, by rows? (Steps are padded past 240 and 448.)",
        ("shape", "rows", "layer_us", "us", "gpu"),
    ),
    "profile": (
        "Where does a step's time go? (Kernels in the file, by their milliseconds.)",
        ("label", "with_prompts", "rows", "sequences", "context", "distinct", "step_ms", "busy_ms", "gpu"),
    ),
    "load": (
        "How long does an adapter take from its file to the host cache?",
        ("shape", "modules", "rank", "adapter_dtype", "num_bytes", "pack_ms", "pack_cpu_ms", "loader_ms", "load"),
    ),
    "vllm": (
        "And vLLM, on the same machine?",
        ("modules", "adapters", "max_loras", "warm", "req_s", "out_tok_s", "versions", "gpu"),
    ),
    "peft": (
        "And PEFT? (S-LoRA's larger setting, 100 adapters.)",
        ("shape", "adapters", "batch_size", "completed", "elapsed_s", "req_s", "out_tok_s", "gpu"),
    ),
    "cost": (
        "What do adapters save over checkpoints in turn?",
        ("way", "fine_tunes", "req_s", "gpu_s_per_m_tok", "weights_gib_device", "weights_gib_host", "swaps", "gpu"),
    ),
    "real_accuracy": (
        "How well do adapters of real fine-tunes answer, by rank?",
        ("task", "model", "rank", "adapter_dtype", "num_bytes", "kept_share", "exact_match", "questions", "device"),
    ),
    "real_bytes": (
        "And by bytes, with embeddings and norms?",
        ("task", "recipe", "bytes", "kept_share", "exact_match", "questions", "device"),
    ),
    "real_study": (
        "And by energy, pruned, and at equal bytes?",
        ("task", "how", "scope", "at", "bytes", "kept_share", "exact_match", "stderr", "nll", "questions", "device"),
    ),
    "real_finetune": (
        "What do fine-tunes of our own making learn?",
        ("task", "steps", "batch_size", "lr", "seed", "exact_match_before", "exact_match", "relative_change", "device"),
    ),
    "serve_cpu": (
        "How fast is a CPU?",
        ("workload", "system", "median_s", "out_tok_s", "flora_speedup", "answers_equal", "load"),
    ),
    "extract": ("How fast is extraction?", ("shape", "kind", "rank", "num_threads", "tools")),
    "extract_gpu": (
        "And of a whole 8B model on a GPU?",
        ("label", "kind", "rank", "wall_s", "seconds", "num_workers", "kept_share", "gpu"),
    ),
    "bench_registry": (
        "How large may a registry grow?",
        ("num_adapters", "add_ms_each", "resolve_p50_ms", "ls_50_ms", "ls_ms", "load_average"),
    ),
    "shared_tensors": (
        "What does it cost a reader that equal tensors are stored once?",
        ("tensor_bytes", "whole_warm_ms", "parts_warm_ms", "whole_cold_ms", "parts_cold_ms", "load_average"),
    ),
    "front_end": (
        "What does a streamed token cost the front end?",
        ("streams", "interval_ms", "us_per_token", "tokens_per_core_s", "tok_s", "load"),
    ),
    "host_step": ("What does planning a step cost?", ("policy", "sequences", "host_ms_p50", "host_ms_p99")),
}
_HIDDEN = ("kernels_sweeps",)  # tuning; what they say stands in the notes
_MAX_COLUMNS = 10
_DIGITS = 4  # significant, of a share


def claims_table(folder: Path) -> str:
    """What Flora is asked to reach, what its latest rows say, and whether that is enough."""
    rows = [row for file in sorted(folder.glob("*.jsonl")) for row in read_rows(file)]
    lines = ["| of the engine | measured | bound | |", "| --- | ---: | ---: | --- |"]
    for found in findings_of(rows):
        word = "" if found.holds else "**missed**"
        lines.append(f"| {found.claim.what} | {_shown(found.value)} | {found.claim.bound} | {word} |")
    return "\n".join(lines)


def result_sections(folder: Path) -> str:
    """A section for each file, its rows in order."""
    files = sorted(folder.glob("*.jsonl"), key=lambda file: (_place(file.stem), file.stem))
    return "\n\n".join(_section(file) for file in files if file.stem not in _HIDDEN)


def _place(stem: str) -> int:
    return list(_SHOWN).index(stem) if stem in _SHOWN else len(_SHOWN)


def _section(file: Path) -> str:
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    title, columns = _SHOWN.get(file.stem, (file.stem.replace("_", " ").capitalize(), _telling(rows)))
    lines = [f"## {title}", "", f"`benchmarks/results/{file.name}`", ""]
    lines += [f"| {' | '.join([*columns, 'commit'])} |", "|" + " --- |" * (len(columns) + 1)]
    for row in rows:
        lines.append(f"| {' | '.join(_shown(row.get(column)) for column in (*columns, 'commit'))} |")
    return "\n".join(lines)


def _telling(rows: list[dict[str, Any]]) -> tuple[str, ...]:
    """Keys of plain values, those first that differ between rows."""
    keys = list(dict.fromkeys(key for row in rows for key in row if key != "commit"))
    plain = [key for key in keys if not any(isinstance(row.get(key), (dict, list)) for row in rows)]
    differing = [key for key in plain if len({str(row.get(key)) for row in rows}) > 1]
    return tuple([*differing, *(key for key in plain if key not in differing)][:_MAX_COLUMNS])


def _shown(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, dict):
        inner = {key: one.get("wall_s") if isinstance(one, dict) else one for key, one in value.items()}
        return ", ".join(f"{key} {_shown(one)}" for key, one in inner.items())
    if isinstance(value, list):
        return ", ".join(map(_shown, value))
    if isinstance(value, float):
        return f"{value:.{_DIGITS}g}" if abs(value) < 1 else f"{value:,.2f}".rstrip("0").rstrip(".")
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return f"`{value}`" if str(value).startswith("--") else str(value)
