"""`flora verify`: an adapter against the pair that it came from, computed anew."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flora.cli.options import AsJson, IdsOnly, RefOrFolder, RegistryUrl
from flora.cli.output import Column, Format, choose_format, note, percent, print_json, print_table
from flora.cli.progress import progress
from flora.cli.sources import Source, open_source
from flora.errors import CheckFailed

if TYPE_CHECKING:
    from flora.algebra.likeness import Likeness
    from flora.algebra.verify import Verification, Verified


def verify(
    base: Annotated[str, typer.Argument(metavar="BASE", help="Folder or Hub id of the pretrained checkpoint.")],
    tuned: Annotated[str, typer.Argument(metavar="TUNED", help="The same for the full fine-tune.")],
    ref: RefOrFolder,
    prompts: Annotated[
        Path | None,
        typer.Option(
            "--prompts",
            metavar="FILE",
            help="One prompt a line: compare next-token distributions too, with transformers on the CPU.",
        ),
    ] = None,
    tolerance: Annotated[
        float, typer.Option("--tolerance", metavar="SHARE", min=0.0, help="Of a tensor's energy, before exit 3.")
    ] = 5e-4,
    registry: RegistryUrl = None,
    as_json: AsJson = False,
    quiet: IdsOnly = False,
) -> None:
    """Measure what a stored adapter keeps, from both checkpoints' weights, and compare that with its record.

    Every tensor of the pair is read once, one at a time, and the residual is formed element by element in float64:
    nothing of the certificate's own arithmetic is used. Exit 3 if the record says something else, or leaves out a
    tensor that changed. With --prompts also the divergence (KL, in nats) of the tuned checkpoint's next-token
    distribution from base with adapter, and from the base alone; this holds both checkpoints in memory, in float32.

    [bold]Examples[/bold]

      flora verify ./base ./tuned sql

      flora verify org/model org/model-sql ./adapter --prompts questions.txt --json
    """
    from flora.algebra.likeness import read_prompts
    from flora.algebra.verify import verify as verify_adapter
    from flora.checkpoint import locate_checkpoint, open_checkpoint

    form = choose_format(as_json=as_json, ids_only=quiet)
    lines = read_prompts(prompts) if prompts is not None else []
    source = open_source(ref, registry)
    ours, theirs = (open_checkpoint(locate_checkpoint(where)) for where in (base, tuned))
    with progress(f"verifying {source.label}", is_quiet=quiet) as report:
        found = verify_adapter(source.adapter, ours, theirs, tolerance, lambda name, share: report(share, name))
    likeness = None
    if lines:
        from flora.algebra.likeness import compare_answers
        from flora.registry.formats.paths import tree_paths

        paths = tree_paths(ours.path, source.adapter.header)
        with progress("comparing answers", is_quiet=quiet) as report:
            likeness = compare_answers(
                source.adapter, ours, theirs, lines, paths, lambda what, share: report(share, what)
            )
    _print(form, source, found, likeness)
    if not found.holds:
        raise _disagreement(source, found)


def _print(form: Format, source: Source, found: Verification, likeness: Likeness | None) -> None:
    rows = [_row(tensor) for tensor in found.tensors if tensor.norm_squared or not tensor.holds]
    if form is Format.JSON:
        record = {
            "ref": source.label,
            "holds": found.holds,
            "has_certificate": found.has_certificate,
            "kept_share_of_modules": found.kept_share_of_modules,
            "kept_share": found.kept_share,
            "unaccounted": list(found.unaccounted),
            "tensors": rows,
        }
        print_json(record | ({"likeness": _likeness_record(likeness)} if likeness else {}))
        return
    columns = [
        Column("name", "tensor", keeps_whole=True),
        Column("rank", "rank", is_number=True),
        Column("kept_share", "kept", percent, is_number=True),
        Column("certified_share", "as recorded", percent, is_number=True),
        Column("holds", "holds", lambda holds: "yes" if holds else "NO"),
    ]
    print_table(form, "tensors", columns, rows, id_key="name")
    if form is Format.IDS:
        return
    note(
        f"{source.label} keeps {percent(found.kept_share_of_modules)} of its modules' change, "
        f"{percent(found.kept_share)} of the whole"
    )
    if not found.has_certificate:
        note("note: its record is not of a pair of checkpoints, so there was nothing to compare this with")
    if likeness is not None:
        _tell_likeness(likeness)


def _row(tensor: Verified) -> dict[str, Any]:
    return {
        "name": tensor.name,
        "rank": tensor.rank,
        "norm_squared": tensor.norm_squared,
        "residual_squared": tensor.residual_squared,
        "kept_share": tensor.kept_share,
        "certified_share": tensor.certified_share,
        "holds": tensor.holds,
    }


def _likeness_record(likeness: Likeness) -> dict[str, Any]:
    return {
        "num_prompts": len(likeness.prompts),
        "num_tokens": likeness.num_tokens,
        "kl_tuned_adapter": likeness.mean("adapter_mean"),
        "kl_tuned_base": likeness.mean("base_mean"),
        "same_token_adapter": likeness.share("adapter_agrees"),
        "same_token_base": likeness.share("base_agrees"),
        "prompts": [
            {
                "prompt": prompt.prompt,
                "num_tokens": prompt.num_tokens,
                "kl_tuned_adapter": prompt.adapter_mean,
                "kl_tuned_base": prompt.base_mean,
                "kl_tuned_adapter_last": prompt.adapter_last,
                "kl_tuned_base_last": prompt.base_last,
            }
            for prompt in likeness.prompts
        ],
    }


def _tell_likeness(likeness: Likeness) -> None:
    note(f"on {len(likeness.prompts)} prompts, {likeness.num_tokens} tokens, from the tuned checkpoint's next token:")
    for what, kl, agrees in (
        ("base with adapter", "adapter_mean", "adapter_agrees"),
        ("base alone", "base_mean", "base_agrees"),
    ):
        note(f"  {what}: KL {likeness.mean(kl):.4g} nats, same likeliest token at {percent(likeness.share(agrees))}")


def _disagreement(source: Source, found: Verification) -> CheckFailed:
    if found.failed:
        worst = max(found.failed, key=_gap)
        shares = f"{percent(worst.kept_share)} is kept, {percent(worst.certified_share)} is recorded"
        norms = f"squared norm {worst.norm_squared:.6g}, {worst.certified.norm_squared if worst.certified else 0:.6g}"
        what = f"{len(found.failed)} of {len(found.tensors)} tensors are not as {source.label} records"
        cause = f"{worst.name}: {shares}; {norms} is recorded"
    else:
        what = f"{source.label} says nothing of {len(found.unaccounted)} tensors that changed"
        cause = f"{found.unaccounted[0]} is one of them"
    tuned_name = source.adapter.header.recipe.tuned_name
    return CheckFailed(
        what,
        cause=cause,
        fix=f"give the checkpoint that it was extracted from, {tuned_name}; if this is it, extract again",
        tensors=[tensor.name for tensor in found.failed],
    )


def _gap(tensor: Verified) -> float:
    return abs((tensor.kept_share or 0.0) - (tensor.certified_share or 0.0))
