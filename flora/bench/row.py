"""A row of results: one pass, with all that it takes to repeat it. One JSON line."""

import subprocess
from pathlib import Path
from typing import Any

import msgspec

from flora.errors import UsageError


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """Absent is None: what was not measured, or what a server does not tell."""

    system: str  # flora (in process), flora-http, or the label of another server
    version: str | None
    commit: str | None
    gpu: str | None  # None: a CPU
    device: str | None
    torch: str | None
    triton: str | None
    kernels: dict[str, str] | None  # op -> implementation that ran
    shape: str
    modules: str
    adapters: int  # that requests chose among
    distinct: int  # that were asked for
    ranks: list[int]
    requests: int
    lengths: list[int]  # [low, high)
    rate: float
    alpha: float
    cv: float
    seed: int
    order: str  # cold: nothing of the trace's adapters was loaded before; warm: a later pass over the same engine
    in_tok: int
    out_tok: int
    completed: int
    cancelled: int
    aborted: int
    elapsed_s: float
    req_s: float  # completed
    out_tok_s: float
    ttft_ms_p50: float | None
    ttft_ms_p99: float | None
    tpot_ms_p50: float | None
    tpot_ms_p99: float | None
    gap_ms_p50: float | None
    gap_ms_p99: float | None
    slo_ttft_s: float
    slo_attainment: float | None
    send_delay_ms_p99: float | None  # more than a few milliseconds over HTTP: the client was the bottleneck
    label: str | None = None  # what a suite calls this measurement
    merged: bool = False  # each adapter's requests on their own, by the base's weights as they are
    merged_turn_tokens: int | None = None  # of prompts that an adapter's turn begins with; None: all it has
    beside: int = 0  # adapters on the device that no request names
    temperature: float = 0.0  # of every request's tokens; 0: greedy
    top_p: float = 1.0
    # Adapters on the device at once, all filled up to the largest rank, in memory that is set aside for them; None: a
    # unified pool of true ranks. In rows without the switch slot_bytes keys and values took what an idle slot had.
    fixed_slots: int | None = None
    clients: int | None = None  # at once, over HTTP
    start_s: float | None = None
    max_batch_tokens: int | None = None
    max_sequences: int | None = None
    pool_gib: float | None = None
    host_gib: float | None = None
    switches: dict[str, bool | int | float | str | None] | None = None  # of the engine, beyond its sizes
    full_batch_after_s: float | None = None
    steps: int | None = None
    step_ms_p50: float | None = None
    loads: int | None = None
    load_ms_mean: float | None = None
    evictions: int | None = None
    preemptions: int | None = None
    kv_pages_left: int | None = None  # after everything has ended: 0, or something leaks


def encode_row(row: msgspec.Struct | dict[str, Any]) -> str:
    """One line of JSON, without its end."""
    return msgspec.json.encode(row).decode()


def append_row(path: Path, row: msgspec.Struct | dict[str, Any]) -> None:
    with path.open("a", encoding="utf-8") as out:
        out.write(encode_row(row) + "\n")


def read_rows(path: Path) -> list[dict[str, object]]:
    """Every row of a file, in order, whatever its kind. Raises UsageError where it cannot be read or a line is none."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"the rows of {path} cannot be read", cause=str(error)) from error
    rows = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            rows.append(msgspec.json.decode(line, type=dict[str, object]))
        except msgspec.DecodeError as error:
            raise UsageError(f"line {number} of {path} is no row of results", cause=str(error)) from error
    return rows


def commit_of_this_code() -> str | None:
    """Short, with a + where files differ from it; None where this is no git checkout."""
    folder = Path(__file__).parent
    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--dirty=+", "--exclude=*"], capture_output=True, text=True, cwd=folder
        )
    except OSError:
        return None
    return done.stdout.strip() or None
