"""`flora prune`: a stored adapter with fewer terms, as a new version."""

from __future__ import annotations

from typing import Any

from flora.cli.options import (
    AsJson,
    Budget,
    DryRun,
    Energy,
    IdsOnly,
    MaxRank,
    MovedAlias,
    Ref,
    RegistryUrl,
    open_registry,
    rank_rule,
)
from flora.cli.output import choose_format, note, percent, print_record
from flora.cli.sizes import show_bytes
from flora.errors import UsageError
from flora.names import check_alias


def prune(
    ref: Ref,
    rank: MaxRank = None,
    energy: Energy = None,
    budget: Budget = None,
    alias: MovedAlias = None,
    dry_run: DryRun = False,
    registry: RegistryUrl = None,
    as_json: AsJson = False,
    quiet: IdsOnly = False,
) -> None:
    """Cut an adapter further, by energy, rank or bytes.

    Energy is measured against the change that the adapter was extracted from, so pruning twice to 0.9 is pruning once.
    The result is a new version; no alias moves unless --alias names one. If nothing would be cut, nothing is made.

    [bold]Examples[/bold]

      flora prune sql --energy 0.9

      flora prune sql@v1 --budget 20MB --alias small
    """
    from flora.prune import prune as prune_adapter

    form = choose_format(as_json=as_json, ids_only=quiet)
    rule = rank_rule(rank, energy, budget)
    if rule.is_empty:
        raise UsageError("nothing says how far to prune", fix="give --energy, --rank or --budget")
    if alias is not None:
        check_alias(alias)
    with open_registry(registry) as store:
        version = store.resolve(ref)
        before = store.load(version)
        after = prune_adapter(before, rule, version.digest)
        made = store.add(after, version.name, alias=alias) if after is not None and not dry_run else None
    kept = after or before
    num_bytes = sum(factors.num_bytes for factors in kept.factors.values())
    record: dict[str, Any] = {
        "ref": made.ref if made else version.ref,
        "digest": made.digest if made else None if after else version.digest,
        "parent": version.ref,
        "was_cut": after is not None,
        "dry_run": dry_run,
        "max_rank": kept.header.max_rank,
        "num_bytes": num_bytes,
        "parent_bytes": version.num_bytes,
        "kept_share": kept.report.kept_share if kept.report else None,
        "kept_share_of_modules": kept.report.extracted_share if kept.report else None,
    }
    facts = [
        ("from", f"{version.ref}, {show_bytes(version.num_bytes)}, rank {version.max_rank}"),
        ("now", f"{show_bytes(num_bytes)}, rank {kept.header.max_rank}"),
        ("kept energy", f"{percent(record['kept_share_of_modules'])} of the modules' change"),
        ("", f"{percent(record['kept_share'])} of the whole change"),
    ]
    print_record(form, record, id_key="ref", facts=facts, title=record["ref"])
    if dry_run and after is not None and not quiet:
        note("note: nothing was made; this is what it would be")
    if after is None and not quiet:
        note(f"note: {version.ref} holds no more than that already, so no version was made")
