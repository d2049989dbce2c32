"""The flags of `flora bench serve`, and what they make together: a setting, and an engine's configuration."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from flora.cli.machine import available_memory_bytes, gpus
from flora.cli.sizes import parse_bytes, parse_length
from flora.cli.sizing import PACE
from flora.errors import UsageError

if TYPE_CHECKING:
    from flora.bench.settings import Setting
    from flora.serve.config import EngineConfig

_GPU_POOL_GIB, _CPU_POOL_GIB = 54, 1  # 54: beside the 16 GB of the 8B shape on 80 GB
_HOST_CACHE_SHARE = 0.4  # of the memory that is available
_MAX_CONTEXT = 2048  # more than any request of the settings has
MAX_ADAPTERS = 1024

_T = TypeVar("_T")


def _flag(panel: str, name: str, metavar: str | None = None, help: str | None = None, **bounds: Any) -> Any:
    return typer.Option(name, metavar=metavar, help=help, rich_help_panel=panel, **bounds)


_WHAT, _WHEN, _ENGINE = "What is asked", "When, and by what it is judged", "Engine"
_SWITCHES, _HTTP, _STORM = "What the engine does, and may leave", "Over HTTP", "A storm of loads"

Preset = Annotated[
    str | None,
    _flag(
        _WHAT, "--preset", "NAME",
        "S1, S2, S4 (S-LoRA's), G1 (Llama-3-8B shape), small; default: G1 on a GPU, else small. Other flags change it.",
    ),
]  # fmt: skip
Shape = Annotated[str | None, _flag(_WHAT, "--shape", "NAME", "Of the base: llama3-8b, llama-7b, smollm2-135m, …")]
Modules = Annotated[str | None, _flag(_WHAT, "--modules", "NAME", "attention: q, k, v, o; all: gate, up, down too.")]
Ranks = Annotated[str | None, _flag(_WHAT, "--ranks", "LIST", "Dealt out in turn: 64,32,16,8.")]
Adapters = Annotated[str | None, _flag(_WHAT, "--adapters", "LIST", "How many, a row each: 0,5,100; 0 is the base.")]
Requests = Annotated[int | None, _flag(_WHAT, "--requests", "N", "Of a pass.", min=1)]
Lengths = Annotated[str | None, _flag(_WHAT, "--lengths", "LOW,HIGH", "Tokens of prompts and answers, HIGH left out.")]
Alpha = Annotated[float, _flag(_WHAT, "--alpha", "A", "Popularity: 1 is uniform, less is skewed.", min=0.01)]
Cancel = Annotated[float, _flag(_WHAT, "--cancel", "SHARE", "Of the requests, given up midway.", min=0, max=1)]
Temperature = Annotated[
    float, _flag(_WHAT, "--temperature", "T", "Of every request's tokens; 0: greedy.", min=0, max=2)
]
TopP = Annotated[float, _flag(_WHAT, "--top-p", "P", "Share of the likeliest that are drawn from.", min=0.001, max=1)]
Seeds = Annotated[str, _flag(_WHAT, "--seeds", "LIST", "A pass each: the first is cold, the others are warm.")]
Rate = Annotated[float, _flag(_WHEN, "--rate", "R", "Requests a second; 0: all at once.", min=0)]
Cv = Annotated[float, _flag(_WHEN, "--cv", "CV", "Variation of the gaps between requests; 1: Poisson.", min=0.01)]
SloTtft = Annotated[float, _flag(_WHEN, "--slo-ttft", "SECONDS", "A first token until then attains the objective.")]
Dtype = Annotated[str, _flag(_ENGINE, "--dtype", "NAME", "float32, bfloat16, float16; auto by device.")]
AdapterDtype = Annotated[
    str, _flag(_ENGINE, "--adapter-dtype", "NAME", "Of adapters on the device: float8, or auto: as --dtype.")
]
DeviceName = Annotated[str, _flag(_ENGINE, "--device", "NAME", "cpu, cuda, cuda:1; auto.")]
Pool = Annotated[
    str | None, _flag(_ENGINE, "--pool", "SIZE", f"Default: {_GPU_POOL_GIB}GiB on a GPU, {_CPU_POOL_GIB}GiB on a CPU.")
]
HostCache = Annotated[str | None, _flag(_ENGINE, "--host-cache", "SIZE", "At most; what cannot fill is not taken.")]
MaxLen = Annotated[str | None, _flag(_ENGINE, "--max-len", "TOKENS", "Longest prompt and answer together.")]
MaxSequences = Annotated[int | None, _flag(_ENGINE, "--max-sequences", "N", "Running at once.", min=1)]
MaxBatchTokens = Annotated[int | None, _flag(_ENGINE, "--max-batch-tokens", "N", "Rows of one step.", min=1)]
MaxAdapters = Annotated[int, _flag(_ENGINE, "--max-adapters", "N", "On the device at once.", min=1)]
Loaders = Annotated[int | None, _flag(_ENGINE, "--loaders", "N", "Processes that load adapters; 0: a thread.", min=0)]
Threads = Annotated[int | None, _flag(_ENGINE, "--threads", "N", "Of torch on a CPU.", min=1)]
PrefixCache = Annotated[
    bool, _flag(_SWITCHES, "--prefix-cache/--no-prefix-cache", None, "Of prompts; comparisons are without.")
]
Fairness = Annotated[
    bool | None,
    _flag(_SWITCHES, "--fairness/--no-fairness", None, "Between adapters; else first come, first served."),
]
Prefetch = Annotated[
    bool | None, _flag(_SWITCHES, "--prefetch/--no-prefetch", None, "Of adapters whose requests wait.")
]
Cluster = Annotated[int | None, _flag(_SWITCHES, "--cluster", "N", "Keep to N adapters where that is possible.", min=1)]
EarlyAbort = Annotated[
    float | None, _flag(_SWITCHES, "--slo-ttft-s", "SECONDS", "Give up who can no longer have a first token by then.")
]
Merged = Annotated[
    bool,
    _flag(_SWITCHES, "--merge", None, "Each adapter's requests on their own, as a server with merged weights has to."),
]
MergedTurnTokens = Annotated[
    int | None,
    _flag(
        _SWITCHES,
        "--merge-turn",
        "TOKENS",
        "With --merge: prompt tokens that an adapter's turn begins with, as S-LoRA's queue has it; else all it has.",
        min=1,
    ),
]
FixedSlots = Annotated[
    int | None,
    _flag(
        _SWITCHES,
        "--fixed-slots",
        "N",
        "N adapters on the device, filled up to the largest rank, in memory set aside for them; else a unified pool.",
        min=1,
    ),
]
OverHttp = Annotated[bool, _flag(_HTTP, "--http", None, "Measure a server of Flora's, started for this.")]
Url = Annotated[str | None, _flag(_HTTP, "--url", "URL", "Measure the server there, Flora's or another.")]
NumClients = Annotated[
    int | None, _flag(_HTTP, "--clients", "N", "At once. Default: as many as there are requests.", min=1)
]
ModelName = Annotated[str | None, _flag(_HTTP, "--model", "NAME", "Of the base at --url. Default: its first.")]
AdapterName = Annotated[
    str | None,
    _flag(_HTTP, "--adapter-name", "NAME", "Of adapter {} at --url. Default: MODULES-{}."),
]
IgnoreEos = Annotated[bool, _flag(_HTTP, "--ignore-eos/--no-ignore-eos", None, "A field that not all servers take.")]
System = Annotated[str | None, _flag(_HTTP, "--system", "NAME", "What rows call the server at --url.")]
ApiKey = Annotated[str | None, _flag(_HTTP, "--api-key", "KEY", "If the server asks for one.", envvar="FLORA_API_KEY")]
GpuName = Annotated[str | None, _flag(_HTTP, "--gpu", "NAME", "That the server at --url has.")]
StormRate = Annotated[
    float | None, _flag(_STORM, "--storm", "R", "Load R new adapters a second beside streams, instead.", min=0.1)
]
Streams = Annotated[int, _flag(_STORM, "--streams", "N", "That decode meanwhile, --adapters among them.", min=1)]
StormSeconds = Annotated[float, _flag(_STORM, "--storm-seconds", "S", "As long before the storm as in it.", min=0.1)]
Out = Annotated[Path | None, typer.Option("--out", metavar="FILE", help="Append a JSON line for each row as it comes.")]
Scratch = Annotated[
    Path | None, typer.Option("--scratch", metavar="DIR", help="For config, registry and adapters meanwhile.")
]
Commit = Annotated[
    str | None,
    typer.Option("--commit", metavar="NAME", envvar="FLORA_COMMIT", help="Of this code, where there is no git."),
]


def make_setting(
    preset: str,
    *,
    shape: str | None,
    modules: str | None,
    ranks: str | None,
    adapters: str | None,
    requests: int | None,
    lengths: str | None,
    fixed_slots: int | None,
) -> Setting:
    """The preset, changed by the flags that were given. Raises UsageError."""
    from flora.bench.settings import SETTINGS
    from flora.bench.shapes import MODULE_SETS, SHAPES

    setting = one_of(SETTINGS, preset, "--preset")
    changes: dict[str, Any] = {"shape": shape, "modules": modules, "num_requests": requests, "fixed_slots": fixed_slots}
    if ranks:
        changes["ranks"] = numbers(ranks, "--ranks", least=1)
    if adapters:
        changes["adapters"] = numbers(adapters, "--adapters")
    if lengths:
        changes["lengths"] = numbers(lengths, "--lengths", least=1)
    setting = replace(setting, **{name: value for name, value in changes.items() if value is not None})
    one_of(SHAPES, setting.shape, "--shape")
    one_of(MODULE_SETS, setting.modules, "--modules")
    if len(setting.lengths) != 2 or setting.lengths[0] >= setting.lengths[1]:
        raise UsageError(
            f"--lengths {lengths} leaves no length", fix="give the least and one more than the most: 8,512"
        )
    return setting


def make_engine_config(
    device: str,
    dtype: str,
    *,
    pool: str | None,
    host_cache: str | None,
    max_len: str | None,
    max_sequences: int | None,
    max_batch_tokens: int | None,
    max_adapters: int,
    loaders: int | None,
    threads: int | None,
    **switches: Any,
) -> EngineConfig:
    """An engine for measuring, its folders still to be filled in. Raises UsageError.

    switches  fields of EngineConfig; None leaves the engine's own default
    """
    from flora.serve.config import EngineConfig

    is_gpu = device != "cpu"
    pace = PACE["cuda" if is_gpu else "cpu"]
    default_pool_bytes = (_GPU_POOL_GIB if is_gpu else _CPU_POOL_GIB) << 30
    default_host_bytes = int(_HOST_CACHE_SHARE * available_memory_bytes())
    return EngineConfig(
        base=Path(),
        registry="",
        cache_dir=Path(),
        device=device,
        dtype=dtype,
        dummy_weights=True,
        pool_bytes=parse_bytes(pool) if pool else default_pool_bytes,
        host_cache_bytes=parse_bytes(host_cache) if host_cache else default_host_bytes,
        max_context=parse_length(max_len) if max_len else _MAX_CONTEXT,
        max_sequences=max_sequences or pace.max_sequences,
        max_batch_tokens=max_batch_tokens or pace.max_batch_tokens,
        max_adapters=max_adapters,
        num_loaders=pace.num_loaders() if loaders is None else loaders,
        num_threads=threads,
        **{name: value for name, value in switches.items() if value is not None},
    )


def gpu_name(device: str) -> str | None:
    """As the driver calls it; None for a CPU."""
    return None if device == "cpu" else gpus()[int(device.partition(":")[2] or 0)].name


def seconds_of(text: str, flag: str) -> float:
    """`90`, `90s` or `8m` -> seconds. Raises UsageError."""
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)([smh]?)", text.strip())
    if match is None:
        raise UsageError(f"{flag} {text!r} is no time", fix="write 90s, 8m or 1h")
    return float(match[1]) * {"": 1, "s": 1, "m": 60, "h": 3600}[match[2]]


def numbers(text: str, flag: str, *, least: int = 0) -> tuple[int, ...]:
    """`5,100` -> (5, 100). Raises UsageError."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) >= least for part in parts):
        raise UsageError(f"{flag} {text!r} is no list of numbers from {least} on", fix="separate them by commas: 5,100")
    return tuple(map(int, parts))


def one_of(choices: Mapping[str, _T], name: str, flag: str) -> _T:
    """What the flag names. Raises UsageError."""
    if name not in choices:
        raise UsageError(f"{flag} {name!r} is not known", fix=f"give one of {', '.join(choices)}")
    return choices[name]
