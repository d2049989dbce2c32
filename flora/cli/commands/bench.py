"""`flora bench`: serving measured, and its rows drawn. `suite` and `claims` stand in bench_suite.py."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

from flora.cli import bench_options as flag
from flora.cli.bench_tables import print_rows, print_storms
from flora.cli.commands.bench_suite import claims, figures, suite
from flora.cli.options import AsJson
from flora.cli.output import choose_format, note
from flora.cli.sizing import resolve_adapter_dtype, resolve_device
from flora.errors import UsageError

if TYPE_CHECKING:
    import msgspec

_R = TypeVar("_R", bound="msgspec.Struct")
_STORM_LENGTH = "8k"  # streams must not end before the storm does


def serve(
    preset: flag.Preset = None,
    shape: flag.Shape = None,
    modules: flag.Modules = None,
    ranks: flag.Ranks = None,
    adapters: flag.Adapters = None,
    requests: flag.Requests = None,
    lengths: flag.Lengths = None,
    alpha: flag.Alpha = 1.0,
    cancel: flag.Cancel = 0.0,
    temperature: flag.Temperature = 0.0,
    top_p: flag.TopP = 1.0,
    seeds: flag.Seeds = "42",
    rate: flag.Rate = 0.0,
    cv: flag.Cv = 1.0,
    slo_ttft: flag.SloTtft = 6.0,
    device: flag.DeviceName = "auto",
    dtype: flag.Dtype = "auto",
    adapter_dtype: flag.AdapterDtype = "auto",
    pool: flag.Pool = None,
    host_cache: flag.HostCache = None,
    max_len: flag.MaxLen = None,
    max_sequences: flag.MaxSequences = None,
    max_batch_tokens: flag.MaxBatchTokens = None,
    max_adapters: flag.MaxAdapters = flag.MAX_ADAPTERS,
    loaders: flag.Loaders = None,
    threads: flag.Threads = None,
    prefix_cache: flag.PrefixCache = False,
    fairness: flag.Fairness = None,
    prefetch: flag.Prefetch = None,
    cluster: flag.Cluster = None,
    slo_ttft_s: flag.EarlyAbort = None,
    merge: flag.Merged = False,
    merge_turn: flag.MergedTurnTokens = None,
    fixed_slots: flag.FixedSlots = None,
    storm: flag.StormRate = None,
    streams: flag.Streams = 64,
    storm_seconds: flag.StormSeconds = 10.0,
    http: flag.OverHttp = False,
    url: flag.Url = None,
    clients: flag.NumClients = None,
    model: flag.ModelName = None,
    adapter_name: flag.AdapterName = None,
    ignore_eos: flag.IgnoreEos = True,
    system: flag.System = None,
    api_key: flag.ApiKey = None,
    gpu: flag.GpuName = None,
    out: flag.Out = None,
    scratch: flag.Scratch = None,
    commit: flag.Commit = None,
    as_json: AsJson = False,
) -> None:
    """Measure serving with random weights: requests and tokens a second, and the time to tokens.

    The engine is driven in this process: no HTTP and no text, as the offline classes of other engines are; or, with
    --http or --url, by streaming clients. Traces are S-LoRA's: power-law popularity, uniform lengths, Gamma arrivals. A
    row is printed only if every request got the tokens of its trace and the idle engine holds no page for any.

    [bold]Examples[/bold]

      flora bench serve --adapters 0,5,100,1000 --out rows.jsonl

      flora bench serve --preset S2 --adapters 200 --rate 20 --cv 2

      flora bench serve --http --clients 256 --adapters 100

      flora bench serve --storm 50 --streams 64 --adapters 16
    """
    from flora.bench.facts import Surroundings
    from flora.bench.http_stream import Endpoint
    from flora.bench.row import commit_of_this_code
    from flora.bench.serving import measure_engine, measure_storm
    from flora.bench.serving_http import Clients, measure_own_server, measure_storm_http, measure_url
    from flora.bench.settings import ServeBench
    from flora.bench.storm import Storm

    if url and http:
        raise UsageError("--url and --http exclude each other", fix="give --http for a server that is started here")
    if merge and (rate or http or url or storm):
        raise UsageError(
            "--merge is measured on the engine, with all requests there at once", fix="leave the other flags out"
        )
    if merge_turn and not merge:
        raise UsageError("--merge-turn is of --merge", fix="give --merge too")
    form = choose_format(as_json=as_json, ids_only=False)
    device, dtype = resolve_device(device, dtype)
    bench = ServeBench(
        setting=flag.make_setting(
            preset or ("small" if device == "cpu" else "G1"),
            shape=shape,
            modules=modules,
            ranks=ranks,
            adapters=adapters,
            requests=requests,
            lengths=lengths,
            fixed_slots=fixed_slots,
        ),
        engine=flag.make_engine_config(
            device,
            dtype,
            pool=pool,
            host_cache=host_cache,
            max_len=max_len or (_STORM_LENGTH if storm else None),
            max_sequences=max_sequences,
            max_batch_tokens=max_batch_tokens,
            max_adapters=max_adapters,
            loaders=loaders,
            threads=threads,
            prefix_cache=prefix_cache,
            fairness=fairness,
            prefetch=prefetch,
            cluster=cluster,
            slo_ttft_s=slo_ttft_s,
            adapter_dtype=resolve_adapter_dtype(adapter_dtype),
        ),
        seeds=flag.numbers(seeds, "--seeds"),
        alpha=alpha,
        rate=rate,
        cv=cv,
        cancel=cancel,
        temperature=temperature,
        top_p=top_p,
        slo_ttft_s=slo_ttft,
        merged=merge,
        merged_turn_tokens=merge_turn,
    )
    logging.getLogger("flora.serve").setLevel(logging.ERROR)  # of a thousand adapters, a line each
    where = Surroundings(commit or commit_of_this_code(), gpu or (None if url else flag.gpu_name(device)))
    if storm:
        if url:
            raise UsageError("--storm needs adapters that nobody has loaded", fix="leave --url out, or give --http")
        measure = measure_storm_http if http else measure_storm
        weather = Storm(rate=storm, num_streams=streams, window_s=storm_seconds)
        print_storms(form, list(_kept(measure(bench, weather, where, scratch=scratch, tell=note), out)))
        return
    driven_by = Clients(clients, ignore_eos)
    if url:
        measured = measure_url(
            bench,
            Endpoint(url, api_key),
            driven_by,
            where,
            adapter_name=adapter_name or f"{bench.setting.modules}-{{}}",
            base_name=model,
            system=system,
        )
    elif http:
        measured = measure_own_server(bench, driven_by, where, scratch=scratch, tell=note)
    else:
        measured = measure_engine(bench, where, scratch=scratch, tell=note)
    rows = []
    for row in _kept(measured, out):
        note(f"{row.adapters} adapters, seed {row.seed}, {row.order}: {row.req_s} requests/s in {row.elapsed_s} s")
        rows.append(row)
    print_rows(form, rows)


def _kept(rows: Iterator[_R], out: Path | None) -> Iterator[_R]:
    """The rows, each appended to the file as soon as it is there."""
    from flora.bench.row import append_row

    for row in rows:
        if out:
            append_row(out, row)
        yield row


def plot(
    files: Annotated[list[Path], typer.Argument(metavar="ROWS…", help="What --out wrote: JSON lines.")],
    out: Annotated[Path, typer.Option("--out", metavar="FILE", help="The SVG to write.")],
    show: Annotated[
        str, typer.Option("--show", metavar="WHAT", help="throughput, tokens, latency, pace, slo, burst, slots, …")
    ] = "throughput",
    title: Annotated[str | None, typer.Option("--title", metavar="WORDS", help="Above the plot.")] = None,
) -> None:
    """Draw rows of `flora bench serve` as one SVG: throughput by adapters, latency and SLO attainment by rate.

    What differs between rows names the curves; of the same measurement, the latest commit's counts.

    [bold]Examples[/bold]

      flora bench plot rows.jsonl --out throughput.svg

      flora bench plot fcfs.jsonl abort.jsonl --show burst --out burst.svg
    """
    from flora.bench.plots import PLOTS, curves_of
    from flora.bench.row import read_rows
    from flora.cli.bench_plot import draw_plot

    chosen = flag.one_of(PLOTS, show, "--show")
    curves = curves_of(chosen, [row for file in files for row in read_rows(file)])
    out.write_text(draw_plot(chosen, curves, title), encoding="utf-8")
    note(f"{len(curves)} curves in {out}")


VERBS: dict[str, Callable[..., None]] = {
    "serve": serve,
    "suite": suite,
    "claims": claims,
    "plot": plot,
    "figures": figures,
}

app = typer.Typer(
    no_args_is_help=True, rich_markup_mode="rich", context_settings={"help_option_names": ["-h", "--help"]}
)
