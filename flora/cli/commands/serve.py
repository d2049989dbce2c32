"""`flora serve`: one base and all its adapters over HTTP."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from flora.cli.options import RegistryUrl, complete_reference, open_registry
from flora.cli.serving import find_base, merged_target, read_keys
from flora.cli.sizes import parse_bytes, parse_length
from flora.cli.sizing import (
    PACE,
    default_pool_bytes,
    host_cache_bytes,
    resolve_adapter_dtype,
    resolve_device,
    weights_bytes,
)
from flora.errors import UsageError

if TYPE_CHECKING:
    from flora.serve import ServeConfig

_MEMORY = "Memory"
_ACCESS = "Access"
_TURNS = "Scheduling"

log = logging.getLogger(__name__)


def serve(
    base: Annotated[
        str | None,
        typer.Argument(metavar="BASE", help="Folder or Hub id. Default: the base of the registry's adapters."),
    ] = None,
    host: Annotated[
        str,
        typer.Option(
            "--host",
            metavar="ADDRESS",
            help="Where to listen; 0.0.0.0 is everywhere, and wants keys.",
            rich_help_panel=_ACCESS,
        ),
    ] = "127.0.0.1",
    port: Annotated[
        int,
        typer.Option("--port", metavar="N", min=0, max=65535, help="0 takes a free one.", rich_help_panel=_ACCESS),
    ] = 8000,
    api_key_file: Annotated[
        Path | None,
        typer.Option("--api-key-file", metavar="FILE", help="One key a line.", rich_help_panel=_ACCESS),
    ] = None,
    insecure: Annotated[
        bool,
        typer.Option("--insecure", help="Let other machines in without a key.", rich_help_panel=_ACCESS),
    ] = False,
    adapter: Annotated[
        list[str] | None,
        typer.Option(
            "--adapter",
            "--preload",
            metavar="REF,…",
            help="Load before the first request. Repeatable.",
            autocompletion=complete_reference,
        ),
    ] = None,
    merge: Annotated[
        str | None,
        typer.Option(
            "--merge",
            metavar="REF",
            help="Serve this one adapter, merged into the base, and nothing else.",
            autocompletion=complete_reference,
        ),
    ] = None,
    allow_base_mismatch: Annotated[
        bool,
        typer.Option(
            "--allow-base-mismatch", help="Serve adapters of other base weights too. `flora show` tells for good."
        ),
    ] = False,
    served_name: Annotated[
        str | None, typer.Option("--base-name", metavar="NAME", help="The base's model id. Default: its own name.")
    ] = None,
    device: Annotated[
        str, typer.Option("--device", metavar="NAME", help="cpu, cuda, cuda:1; auto takes a GPU if there is one.")
    ] = "auto",
    dtype: Annotated[
        str,
        typer.Option("--dtype", metavar="NAME", help="float32, bfloat16, float16; auto by device."),
    ] = "auto",
    adapter_dtype: Annotated[
        str,
        typer.Option(
            "--adapter-dtype",
            metavar="NAME",
            help="float8: adapters in half the memory, rounded to four binary digits; auto: as --dtype.",
            rich_help_panel=_MEMORY,
        ),
    ] = "auto",
    pool: Annotated[
        str | None,
        typer.Option(
            "--pool",
            metavar="SIZE",
            help="Keys, values and adapters on the device together: 4GiB. Default: from the memory that is free.",
            rich_help_panel=_MEMORY,
        ),
    ] = None,
    host_cache: Annotated[
        str | None,
        typer.Option("--host-cache", metavar="SIZE", help="Of adapters in host memory.", rich_help_panel=_MEMORY),
    ] = None,
    max_len: Annotated[
        str | None,
        typer.Option(
            "--max-len", metavar="TOKENS", help="Longest prompt and answer together: 4k.", rich_help_panel=_MEMORY
        ),
    ] = None,
    max_sequences: Annotated[
        int | None,
        typer.Option(
            "--max-sequences",
            metavar="N",
            min=1,
            help="Running at once. Default: 256 on a GPU, 64 on a CPU.",
            rich_help_panel=_MEMORY,
        ),
    ] = None,
    max_batch_tokens: Annotated[
        int | None,
        typer.Option(
            "--max-batch-tokens",
            metavar="N",
            min=1,
            help="Rows of a step; at most 512 once half of the places decode. Default: 2048 on a GPU, 512 on a CPU.",
            rich_help_panel=_MEMORY,
        ),
    ] = None,
    loaders: Annotated[
        int | None,
        typer.Option(
            "--loaders",
            metavar="N",
            min=0,
            help="Processes that load adapters; 0: a thread. Default: by the cores beside a GPU, 0 on a CPU.",
            rich_help_panel=_MEMORY,
        ),
    ] = None,
    max_adapters: Annotated[
        int, typer.Option("--max-adapters", metavar="N", min=1, help="On the device at once.", rich_help_panel=_MEMORY)
    ] = 256,
    prefix_cache: Annotated[
        bool,
        typer.Option(
            "--prefix-cache/--no-prefix-cache",
            help="Compute what requests for one adapter begin with in common only once.",
            rich_help_panel=_TURNS,
        ),
    ] = True,
    fairness: Annotated[
        bool,
        typer.Option(
            "--fairness/--no-fairness",
            help="Under load the adapter that was served least goes first; without, the oldest request.",
            rich_help_panel=_TURNS,
        ),
    ] = True,
    max_wait_s: Annotated[
        float,
        typer.Option(
            "--max-wait-s",
            metavar="SECONDS",
            min=0,
            help="How long a waiting adapter, or a request without room, may be overtaken.",
            rich_help_panel=_TURNS,
        ),
    ] = 5.0,
    slo_ttft_s: Annotated[
        float | None,
        typer.Option(
            "--slo-ttft-s",
            metavar="SECONDS",
            min=0.001,
            help="Refuse with 503 whoever can no longer have a first token in that time.",
            rich_help_panel=_TURNS,
        ),
    ] = None,
    cluster: Annotated[
        int | None,
        typer.Option(
            "--cluster",
            metavar="N",
            min=1,
            help="Once N adapters run, requests for those go first.",
            rich_help_panel=_TURNS,
        ),
    ] = None,
    prefetch: Annotated[
        bool,
        typer.Option(
            "--prefetch/--no-prefetch",
            help="Load adapters when their requests arrive; without, when their turn comes.",
            rich_help_panel=_TURNS,
        ),
    ] = True,
    batch_invariant: Annotated[
        bool,
        typer.Option(
            "--batch-invariant",
            help="On a GPU: the same bits in batches of any size, slower. On a CPU it is always so.",
            rich_help_panel=_TURNS,
        ),
    ] = False,
    threads: Annotated[int | None, typer.Option("--threads", metavar="N", min=1, help="Of torch on a CPU.")] = None,
    drain: Annotated[
        float, typer.Option("--drain", metavar="SECONDS", min=0, help="Left to running requests after Ctrl-C.")
    ] = 30.0,
    log_json: Annotated[bool, typer.Option("--log-json", help="One JSON object per log line.")] = False,
    registry: RegistryUrl = None,
) -> None:
    """Serve one base model and every adapter of the registry that belongs to it, over OpenAI's HTTP routes.

    A request names an adapter as its model: NAME, NAME:ALIAS or NAME@vN. Adapters load on first use, and new versions
    and moved aliases count from the next request on. Without a key only this machine can connect.

    [bold]Examples[/bold]

      flora serve

      flora serve org/model --adapter sql:prod --port 8080

      flora serve ./base --host 0.0.0.0 --api-key-file keys.txt --pool 8GiB
    """
    from flora.cli.logs import configure_logs
    from flora.config import settings
    from flora.errors import CheckpointError
    from flora.serve import EngineConfig, ServeConfig
    from flora.serve import serve as run_server

    configure_logs(logging.DEBUG if log.isEnabledFor(logging.DEBUG) else logging.INFO, as_json=log_json)
    if merge and adapter:
        raise UsageError("--merge serves one adapter", fix="leave --adapter out")
    with open_registry(registry, create=True) as store:
        merged = store.resolve(merge) if merge else None
        folder, name = find_base(store, base, merged)
        registry_root = str(registry or settings().registry_url or settings().registry_dir)
    device, dtype = resolve_device(device, dtype)
    narrow = resolve_adapter_dtype(adapter_dtype)
    pace = PACE["cpu" if device == "cpu" else "cuda"]
    num_loaders = pace.num_loaders() if loaders is None else loaders
    is_page_locked = device.startswith("cuda") and num_loaders > 0
    num_bytes = weights_bytes(folder, dtype)
    if num_bytes == 0:
        raise CheckpointError(f"{folder} holds no weights")
    engine = EngineConfig(
        base=folder,
        registry=registry_root,
        cache_dir=settings().cache_dir / "hashes",
        device=device,
        dtype=dtype,
        adapter_dtype=narrow,
        pool_bytes=parse_bytes(pool) if pool else default_pool_bytes(device, num_bytes),
        host_cache_bytes=host_cache_bytes(
            parse_bytes(host_cache) if host_cache else None, is_page_locked=is_page_locked, num_loaders=num_loaders
        ),
        max_context=parse_length(max_len) if max_len else None,
        max_sequences=max_sequences or pace.max_sequences,
        max_batch_tokens=max_batch_tokens or pace.max_batch_tokens,
        num_loaders=num_loaders,
        max_adapters=max_adapters,
        merge=merged_target(merged, merge) if merged and merge else None,
        allow_base_mismatch=allow_base_mismatch,
        prefix_cache=prefix_cache,
        fairness=fairness,
        max_wait_s=max_wait_s,
        slo_ttft_s=slo_ttft_s,
        cluster=cluster,
        prefetch=prefetch,
        batch_invariant=batch_invariant,
        num_threads=threads,
    )
    config: ServeConfig = ServeConfig(
        engine=engine,
        base_name=served_name or name,
        host=host,
        port=port,
        preload=tuple(reference for given in adapter or () for reference in given.split(",") if reference),
        drain_s=drain,
        api_keys=read_keys(api_key_file) if api_key_file else (),
        insecure=insecure,
    )
    log.info(
        "starting base=%s device=%s dtype=%s pool_bytes=%d host_cache_bytes=%d registry=%s",
        config.base_name, device, dtype, engine.pool_bytes, engine.host_cache_bytes, registry_root
    )  # fmt: skip
    run_server(config)
