"""`flora extract`: base and tuned checkpoints to adapters."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flora.cli.extraction import Outcome, Target, extract_all, hash_cache_dir, journal_dir, readable
from flora.cli.options import AsJson, Budget, Device, DryRun, Energy, IdsOnly, MaxRank, RegistryUrl, rank_rule
from flora.cli.output import Format, choose_format, note, percent, print_json, print_record
from flora.cli.sizes import show_bytes
from flora.errors import CheckFailed, FloraError, NothingChanged, UsageError

if TYPE_CHECKING:
    from flora.extract import ExtractConfig, ExtractionPlan

DEFAULT_RANK = 64  # where no rule is given: what people train LoRA with at the upper end, and every engine serves


def extract(
    base: Annotated[str, typer.Argument(metavar="BASE", help="Pretrained checkpoint: folder, Hub id or GGUF file.")],
    tuned: Annotated[list[str], typer.Argument(metavar="TUNED", help="The same for its full fine-tunes.")],
    rank: MaxRank = None,
    energy: Energy = None,
    budget: Budget = None,
    name: Annotated[
        str | None, typer.Option("--name", metavar="NAME", help="Name in the registry. Default: TUNED's own.")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="DIR", help="Write a PEFT folder; without --name, into no registry."),
    ] = None,
    include: Annotated[
        list[str] | None, typer.Option("--include", metavar="GLOB", help="Only modules like this. Repeatable.")
    ] = None,
    exclude: Annotated[
        list[str] | None, typer.Option("--exclude", metavar="GLOB", help="No modules like this. Repeatable.")
    ] = None,
    embeddings: Annotated[
        bool, typer.Option("--embeddings", help="Embeddings and output head as factors too. PEFT reads them.")
    ] = False,
    vectors: Annotated[
        bool, typer.Option("--vectors", help="Norms and biases too, whole and exact. PEFT reads them.")
    ] = False,
    routers: Annotated[
        bool, typer.Option("--routers", help="The routers of experts as factors too. PEFT reads them.")
    ] = False,
    dtype: Annotated[
        str,
        typer.Option("--dtype", metavar="NAME", help="Of the stored factors: bfloat16, float16, float32 or float8."),
    ] = "bfloat16",
    allow_pickle: Annotated[
        bool, typer.Option("--allow-pickle", help="Read .bin weights too, by weights_only, in a process of their own.")
    ] = False,
    exact: Annotated[bool, typer.Option("--exact", help="A full SVD of every matrix: slow, for audits.")] = False,
    strict: Annotated[
        bool,
        typer.Option("--strict", help="Exit 3 if a module misses the asked energy, or low rank is the wrong tool."),
    ] = False,
    seed: Annotated[int, typer.Option("--seed", metavar="N", help="Same inputs and seed, same digests.")] = 0,
    device: Device = "cpu",
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on where an interrupted run with the same words ended.")
    ] = False,
    dry_run: DryRun = False,
    registry: RegistryUrl = None,
    as_json: AsJson = False,
    quiet: IdsOnly = False,
) -> None:
    """Turn full fine-tunes into adapters, and say what each one keeps.

    The rules --rank, --energy and --budget may be combined; with none of them, --rank 64 is taken. With neither --name
    nor --out, the adapter is registered under the name of TUNED's folder. Of several TUNED the base is read once. What
    is done is kept until the adapter is stored: after a crash, the same words and --resume go on from there.

    [bold]Examples[/bold]

      flora extract ./base ./tuned --rank 64

      flora extract org/model org/model-sql --energy 0.95 --name sql

      flora extract ./base ./tuned --budget 100MB --out ./adapter

      flora extract ./base ./tuned --embeddings --vectors --dtype float8 --out ./adapter
    """
    from flora.identity import records_beside
    from flora.startup import import_torch

    form = choose_format(as_json=as_json, ids_only=quiet)
    if len(tuned) > 1 and (name or out):
        raise UsageError("--name and --out are for one TUNED", fix="leave them out, or extract one at a time")
    targets = [Target.of(source, name, out) for source in tuned]
    with ExitStack() as stack:
        checkpoints = stack.enter_context(readable([base, *tuned], allow_pickle=allow_pickle))
        # the files are hashed beside all that follows: for a second that is the import of torch, on one core
        records = None if dry_run else stack.enter_context(records_beside(checkpoints, hash_cache_dir()))
        if device == "cpu":
            import_torch()
        from flora.extract import ExtractConfig, Wish, plan_extraction

        rule = rank_rule(rank, energy, budget)
        config = ExtractConfig(
            rule=rank_rule(DEFAULT_RANK, None, None) if rule.is_empty else rule,
            factor_dtype="float8_e4m3fn" if dtype == "float8" else dtype,
            wish=Wish(embeddings=embeddings, vectors=vectors, routers=routers),
            exact=exact,
            include=tuple(include or ()),
            exclude=tuple(exclude or ()),
            seed=seed,
            strict=strict,
            device=device,
            cache_dir=hash_cache_dir(),
            journal_dir=journal_dir(),
            resume=resume,
        )
        if dry_run:
            plans = [plan_extraction(checkpoints[0], one, config) for one in checkpoints[1:]]
            _print_plans(form, list(zip(targets, plans, strict=True)), config)
            return
        is_quiet = form is Format.IDS
        found = extract_all(
            checkpoints[0],
            checkpoints[1:],
            targets,
            config,
            registry,
            records=records,
            is_quiet=is_quiet,
            can_resume=not allow_pickle,  # the copies of pickled weights end with the run, and its record is of them
        )
    _tell(form, targets, found, is_strict=strict)


def _tell(form: Format, targets: list[Target], found: list[Outcome | FloraError], *, is_strict: bool) -> None:
    """Prints what became of each fine-tune. Raises the last of the errors among them."""
    outcomes = [outcome for outcome in found if isinstance(outcome, Outcome)]
    for outcome in outcomes:
        if form is not Format.JSON:
            _print_outcome(form, outcome)
    failed = [error for error in found if isinstance(error, FloraError) and not isinstance(error, NothingChanged)]
    if not outcomes and failed:
        raise failed[0]
    unchanged = [
        _tell_unchanged(target, error, is_strict=is_strict)
        for target, error in zip(targets, found, strict=True)
        if isinstance(error, NothingChanged)
    ]
    if form is Format.JSON:
        print_json({"adapters": [outcome.record() for outcome in outcomes], "unchanged": unchanged})
    for error in failed[1:]:
        note(str(error))
    if failed:
        raise failed[0]


def _tell_unchanged(target: Target, error: NothingChanged, *, is_strict: bool) -> dict[str, Any]:
    """A verdict, and no failure: there is nothing to make. Raises CheckFailed where the user asked to be strict."""
    if is_strict:
        raise CheckFailed(error.what, cause=error.cause, fix=error.fix) from error
    note(f"verdict: unchanged: {error.what}, so no adapter was made")
    note(f"note: {error.cause}; {error.fix}")
    return {"source": target.source, "verdict": "unchanged", "what": error.what}


def _print_outcome(form: Format, outcome: Outcome) -> None:
    from flora.cli.times import times
    from flora.cli.verdict import advice, left_out, verdict
    from flora.diagnosis import noise_share

    report, header = outcome.adapter.report, outcome.adapter.header
    assert report is not None
    ranks = sorted({module.rank for module in header.modules})
    shown_ranks = f"ranks {ranks[0]} to {ranks[-1]}" if len(ranks) > 1 else f"rank {ranks[0]}"
    facts = [
        ("modules", f"{len(header.modules)}, {shown_ranks}"),
        (
            "size",
            f"{show_bytes(outcome.adapter_bytes)}, {percent(outcome.adapter_bytes / outcome.tuned_bytes)} of the "
            f"checkpoint's {show_bytes(outcome.tuned_bytes)}",
        ),
        ("kept energy", f"{percent(report.extracted_share)} of the extracted modules' change"),
        ("", f"{percent(report.kept_share)} of the whole change"),
        *(
            ("" if i else "left as in the base", f"{percent(group.share)} of the change: {group.count} {group.kind}")
            for i, group in enumerate(left_out(report))
        ),
        ("storage noise", f"{percent(noise_share(report))} of the modules' change is rounding of the tuned weights"),
        *(("" if i else "time", line) for i, line in enumerate(times(outcome.seconds, outcome.num_workers))),
    ]
    where = f"{outcome.version.ref} ({outcome.version.digest})" if outcome.version else str(outcome.out)
    print_record(form, outcome.record(), id_key="id", facts=facts, title=f"{where}, from {header.base.name}")
    if form is Format.IDS:
        return
    if outcome.num_resumed:
        note(f"resumed: {outcome.num_resumed} of {len(report.tensors)} tensors were done already")
    note(f"verdict: {verdict(report)}")
    for line in advice(report):
        note(f"note: {line}")
    if outcome.adapter_bytes >= outcome.tuned_bytes:
        note("note: the adapter has more bytes than the checkpoint; a smaller --rank, or a --budget, is what saves any")
    for line in _next_commands(outcome):
        note(f"next: {line}")


def _next_commands(outcome: Outcome) -> list[str]:
    if outcome.version is None:
        return [f"flora import {outcome.out} --name NAME"]
    name = outcome.version.name
    return ["flora serve", f'flora run {name} "PROMPT"', f"flora push {name} USER/{name.rpartition('/')[2]}"]


def _print_plans(form: Format, plans: list[tuple[Target, ExtractionPlan]], config: ExtractConfig) -> None:
    records = [_plan_record(target, plan, config) for target, plan in plans]
    if form is Format.JSON:
        print_json({"plans": records})
        return
    for record, (target, plan) in zip(records, plans, strict=True):
        facts = [
            ("modules", f"{record['num_extractable']} of {record['num_tensors']} tensors"),
            ("ranks", f"up to {record['max_rank']}"),
            ("reads", show_bytes(plan.read_bytes)),
            ("writes", f"up to {show_bytes(plan.factor_bytes)}"),
            ("memory", f"about {show_bytes(plan.memory_bytes)} beside the mapped files"),
            ("time", _show_seconds(record["seconds"])),
            ("would go to", " and ".join(_places(target))),
        ]
        print_record(form, record, id_key="source", facts=facts, title=f"plan for {target.source}")
        for line in plan.notes:
            note(f"note: {line}")


def _places(target: Target) -> Iterator[str]:
    if target.name:
        yield f"the registry, as {target.name}"
    if target.out:
        yield f"the folder {target.out}"


def _show_seconds(seconds: float | None) -> str:
    if seconds is None:
        return "not predicted for this device"
    if seconds < 1:
        return "less than a second of work on this machine"
    shown = (
        f"{seconds:.0f} s"
        if seconds < 90
        else f"{seconds / 60:.0f} min"
        if seconds < 5400
        else f"{seconds / 3600:.1f} h"
    )
    return f"about {shown} of work on this machine, if the files are in the disk's cache"


def _plan_record(target: Target, plan: ExtractionPlan, config: ExtractConfig) -> dict[str, Any]:
    from flora.extract import estimate_seconds

    return {
        "source": target.source,
        "name": target.name,
        "out": str(target.out) if target.out else None,
        "num_tensors": len(plan.pairs),
        "num_extractable": len(plan.extractable),
        "max_rank": max(plan.ranks.values(), default=0),
        "read_bytes": plan.read_bytes,
        "factor_bytes": plan.factor_bytes,
        "memory_bytes": plan.memory_bytes,
        "seconds": estimate_seconds(plan, config),
        "tensors": [
            {"name": pair.name, "shape": list(pair.shape), "status": pair.status, "rank": plan.ranks.get(pair.name)}
            for pair in plan.pairs
        ],
    }
