"""`flora rm`, `gc` and `fsck`: taking things out of the registry, and proving what is in it."""

from __future__ import annotations

from typing import Annotated

import typer

from flora.cli.options import AsJson, DryRun, IdsOnly, RegistryUrl, complete_reference, open_registry
from flora.cli.output import Column, Format, choose_format, note, print_record, print_table
from flora.cli.sizes import show_bytes
from flora.errors import CheckFailed


def rm(
    ref: Annotated[
        str,
        typer.Argument(
            metavar="REF", help="NAME@vN, or a bare NAME for all of its versions.", autocompletion=complete_reference
        ),
    ],
    force: Annotated[bool, typer.Option("--force", help="Even if an alias other than latest points to it.")] = False,
    registry: RegistryUrl = None,
    as_json: AsJson = False,
    quiet: IdsOnly = False,
) -> None:
    """Take a version, or a whole name, out of the registry. `flora gc` then frees the bytes.

    [bold]Example[/bold]

      flora rm sql@v1
    """
    form = choose_format(as_json=as_json, ids_only=quiet)
    with open_registry(registry) as store:
        removed = store.remove(ref, force=force)
    rows = [{"ref": version.ref, "digest": version.digest, "num_bytes": version.num_bytes} for version in removed]
    columns = (Column("ref", "removed"), Column("digest", "digest"), Column("num_bytes", "size", show_bytes))
    print_table(form, "removed", columns, rows, id_key="ref")


def gc(
    dry_run: DryRun = False,
    grace: Annotated[
        float, typer.Option("--grace", metavar="SECONDS", min=0, help="Leave what is younger: it may be in use yet.")
    ] = 3600.0,
    registry: RegistryUrl = None,
    as_json: AsJson = False,
    quiet: IdsOnly = False,
) -> None:
    """Free the bytes that no version refers to, and what interrupted writes left behind or stored twice.

    [bold]Example[/bold]

      flora gc --dry-run
    """
    form = choose_format(as_json=as_json, ids_only=quiet)
    with open_registry(registry) as store:
        report = store.gc(dry_run=dry_run, grace_s=grace)
    if form is Format.IDS:
        for name in report.removed:
            print(name)
        return
    record = {
        "dry_run": dry_run,
        "num_removed": len(report.removed),
        "num_bytes": report.num_bytes,
        "num_shared_bytes": report.num_shared_bytes,
        "kept_young": report.kept_young,
        "kept_leased": report.kept_leased,
        "removed": list(report.removed),
    }
    facts = [
        ("would free" if dry_run else "freed", f"{len(report.removed)} files, {show_bytes(report.num_bytes)}"),
        *((("and by sharing", show_bytes(report.num_shared_bytes)),) if report.num_shared_bytes else ()),
        ("left, too young", str(report.kept_young)),
        ("left, in use by a server", str(report.kept_leased)),
    ]
    print_record(form, record, id_key="num_removed", facts=facts)


def fsck(registry: RegistryUrl = None, as_json: AsJson = False, quiet: IdsOnly = False) -> None:
    """Read everything in the registry and say what is not as it should be. Exit 3 if anything is wrong.

    [bold]Example[/bold]

      flora fsck --json
    """
    form = choose_format(as_json=as_json, ids_only=quiet)
    with open_registry(registry) as store:
        problems = store.fsck()
    rows = [
        {"kind": problem.kind, "subject": problem.subject, "what": problem.what, "fix": problem.fix,
         "is_harmless": problem.is_harmless}
        for problem in problems
    ]  # fmt: skip
    columns = (Column("kind", "kind"), Column("subject", "where"), Column("what", "what"), Column("fix", "fix"))
    print_table(form, "problems", columns, rows, id_key="subject")
    if serious := [problem for problem in problems if not problem.is_harmless]:
        raise CheckFailed(
            f"the registry has {len(serious)} problems, the first at {serious[0].subject}",
            cause=serious[0].what,
            fix=serious[0].fix,
        )
    if form is Format.HUMAN:
        note("the registry is sound" + (": what is listed, `flora gc` takes" if problems else ""))
