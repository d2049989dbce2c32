"""`flora merge`: adapters back into a full checkpoint, or several into one adapter."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flora.cli.extraction import hash_cache_dir
from flora.cli.options import (
    AsJson,
    Budget,
    Energy,
    IdsOnly,
    MaxRank,
    MovedAlias,
    RegistryUrl,
    complete_reference,
    open_registry,
    rank_rule,
)
from flora.cli.output import choose_format, note, percent, print_record
from flora.cli.progress import progress
from flora.cli.sizes import show_bytes
from flora.cli.sources import open_source
from flora.errors import AdapterNotFound, UsageError
from flora.names import check_alias, check_name

if TYPE_CHECKING:
    from flora.adapter import Adapter
    from flora.algebra.merge import Merged
    from flora.algebra.parts import Part
    from flora.checkpoint import Checkpoint
    from flora.identity import BaseRecord
    from flora.registry import Version


class MergeMethod(StrEnum):
    SVD = "svd"
    LINEAR = "linear"
    TIES = "ties"
    DARE = "dare"


def merge(
    base: Annotated[str, typer.Argument(metavar="BASE", help="Folder or Hub id of the base they belong to.")],
    refs: Annotated[
        list[str],
        typer.Argument(
            metavar="REF",
            help="NAME, NAME:ALIAS, NAME@vN, or a folder: ./adapter.",
            autocompletion=complete_reference,
        ),
    ],
    out: Annotated[
        Path | None, typer.Option("--out", metavar="DIR", help="Write a full checkpoint to this new folder.")
    ] = None,
    name: Annotated[
        str | None, typer.Option("--name", metavar="NAME", help="Register the merge as an adapter of this name.")
    ] = None,
    weight: Annotated[
        list[float] | None,
        typer.Option("--weight", metavar="W", help="Of each REF, in order. Default: 1 each. Repeatable."),
    ] = None,
    method: Annotated[
        MergeMethod, typer.Option("--method", help="How several become one; see above.")
    ] = MergeMethod.SVD,
    density: Annotated[
        float, typer.Option("--density", metavar="SHARE", help="ties, dare: share of elements that counts.")
    ] = 0.2,
    seed: Annotated[int, typer.Option("--seed", metavar="N", help="dare: of what is dropped.")] = 0,
    rank: MaxRank = None,
    energy: Energy = None,
    budget: Budget = None,
    alias: MovedAlias = None,
    registry: RegistryUrl = None,
    as_json: AsJson = False,
    quiet: IdsOnly = False,
) -> None:
    """Merge adapters into their base's checkpoint (--out), or into one adapter (--name), or both.

    The checkpoint is written file by file; what no adapter touches is copied byte for byte.
    Several adapters become one by --method: [bold]svd[/bold], the weighted sum of their changes, exactly, recombined in
    factor space; [bold]ties[/bold] and [bold]dare[/bold], as in their papers, on the changes themselves;
    [bold]linear[/bold], the sum of the factors, as PEFT has it, for equal ranks. A merged adapter carries its lineage,
    and its report says what its stored factors keep of the merge; --rank, --energy and --budget cut it.

    [bold]Examples[/bold]

      flora merge ./base sql --out ./sql-checkpoint

      flora merge ./base sql chat --weight 0.7 --weight 0.3 --name both

      flora merge org/model a b c --method ties --density 0.3 --rank 64 --name all --out ./all
    """
    from flora.algebra.changes import checkpoint_changes
    from flora.algebra.combine import Combination
    from flora.algebra.merge import merge_adapters
    from flora.algebra.write_checkpoint import check_target, write_checkpoint

    form = choose_format(as_json=as_json, ids_only=quiet)
    _check_words(out, name, alias)
    combination, rule = Combination(method.value, density, seed), rank_rule(rank, energy, budget)
    checkpoint, parts, record = _open(base, refs, weight or [], registry)
    merged = version = None
    if out is not None:
        check_target(checkpoint, out)
    if name is not None:
        with progress("merging factors", is_quiet=quiet) as report:
            merged = merge_adapters(
                parts, checkpoint, record, combination, rule, lambda module, share: report(share, module)
            )
        version = _register(merged.adapter, name, alias, checkpoint, record, registry)
    if out is not None:
        changes = checkpoint_changes(parts, checkpoint, combination)
        with progress(f"writing {out.name}", is_quiet=quiet) as report:
            write_checkpoint(
                checkpoint,
                out,
                changes,
                _extras(parts),
                _provenance(parts, record, combination),
                lambda what, share: report(share, what),
            )
    answer = _record(parts, checkpoint, method, merged, version, out)
    print_record(form, answer, id_key="id", facts=_facts(answer), title=str(answer["id"]))
    if not quiet:
        for line in merged.notes if merged else ():
            note(f"note: {line}")


def _check_words(out: Path | None, name: str | None, alias: str | None) -> None:
    if out is None and name is None:
        raise UsageError(
            "nothing says where the merge goes", fix="give --out DIR for a checkpoint, --name NAME for an adapter"
        )
    if name is not None:
        check_name(name)
    if alias is not None:
        check_alias(alias)
        if name is None:
            raise UsageError("--alias is for a merge that is registered", fix="give --name too")


def _open(
    base: str, refs: list[str], weights: list[float], registry: str | None
) -> tuple[Checkpoint, list[Part], BaseRecord]:
    from flora.algebra.parts import Part, check_parts, check_weights
    from flora.checkpoint import locate_checkpoint, open_checkpoint
    from flora.identity import base_record

    weights = check_weights(weights, len(refs))
    sources = [open_source(ref, registry) for ref in refs]
    checkpoint = open_checkpoint(locate_checkpoint(base))
    record = base_record(checkpoint, hash_cache_dir())
    parts = [
        Part(source.adapter, one, source.version.digest if source.version else None, source.label)
        for source, one in zip(sources, weights, strict=True)
    ]
    check_parts(parts, record, checkpoint)
    return checkpoint, parts, record


def _register(
    adapter: Adapter, name: str, alias: str | None, base: Checkpoint, record: BaseRecord, registry: str | None
) -> Version:
    """The merge as a version of `name`. Only a new name's first version becomes `latest` unasked."""
    with open_registry(registry, create=True) as store:
        if alias is None:
            try:
                store.versions(name)
            except AdapterNotFound:
                alias = "latest"
        version = store.add(adapter, name, alias=alias, provenance={"command": "merge"})
        store.register_base(record, name=base.name, path=base.path)
        return version


def _extras(parts: list[Part]) -> dict[str, bytes]:
    """Each file of the first part that carries it."""
    return {name: data for part in reversed(parts) for name, data in part.adapter.extras.items()}


def _provenance(parts: list[Part], record: BaseRecord, combination: Any) -> dict[str, Any]:
    """What flora_merge.json says: what was merged into which base, by content."""
    return {
        "schema_version": 1,
        "base_id": str(record.base_id),
        "method": combination.method,
        "options": {} if combination.is_low_rank else {"density": combination.density, "seed": combination.seed},
        "adapters": [
            {
                "serving_digest": str(part.adapter.header.serving_digest),
                "version_digest": part.digest,
                "weight": part.weight,
            }
            for part in parts
        ],
    }


def _record(
    parts: list[Part],
    base: Checkpoint,
    method: MergeMethod,
    merged: Merged | None,
    version: Version | None,
    out: Path | None,
) -> dict[str, Any]:
    report = merged.adapter.report if merged else None
    return {
        "id": version.ref if version else str(out),
        "ref": version.ref if version else None,
        "digest": version.digest if version else None,
        "out": str(out) if out else None,
        "base": base.name,
        "method": method.value,
        "adapters": [{"ref": part.label, "weight": part.weight} for part in parts],
        "max_rank": merged.adapter.header.max_rank if merged else None,
        "num_bytes": version.num_bytes if version else None,
        "checkpoint_bytes": base.num_bytes if out else None,
        "kept_share": report.kept_share if report else None,
        "distance_to_sum": merged.distance if merged else None,
        "modules": _module_rows(merged),
    }


def _module_rows(merged: Merged | None) -> list[dict[str, Any]]:
    if merged is None:
        return []
    return [
        {
            "module": name,
            "rank": one.factors.rank,
            "norm_squared": one.norm_squared,
            "residual_squared": one.residual_squared,
            "distance_to_sum": (one.distance_squared / one.sum_norm_squared) ** 0.5 if one.sum_norm_squared else 0.0,
        }
        for name, one in merged.modules.items()
    ]


def _facts(answer: dict[str, Any]) -> list[tuple[str, str]]:
    facts = [
        ("of", ", ".join(f"{one['weight']:g} x {one['ref']}" for one in answer["adapters"])),
        ("by", answer["method"]),
    ]
    if answer["ref"]:
        facts += [
            ("adapter", f"rank {answer['max_rank']}, {show_bytes(answer['num_bytes'])}"),
            ("kept energy", f"{percent(answer['kept_share'])} of the merge"),
            ("from the exact sum", f"{answer['distance_to_sum']:.2e} of its norm"),
        ]
    if answer["out"]:
        facts.append(("checkpoint", f"{answer['out']}, {show_bytes(answer['checkpoint_bytes'])}"))
    return facts
