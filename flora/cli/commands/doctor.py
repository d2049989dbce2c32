"""`flora doctor`: whether this machine has what Flora needs."""

from __future__ import annotations

from dataclasses import asdict

from flora.cli.options import AsJson, IdsOnly, RegistryUrl
from flora.cli.output import Column, Format, choose_format, note, print_table
from flora.errors import CheckFailed


def doctor(registry: RegistryUrl = None, as_json: AsJson = False, quiet: IdsOnly = False) -> None:
    """Check this machine: Python, settings, torch, GPU, memory, disk, registry, server libraries, and say what to mend.

    A warning is something that a command may miss later; a failure is something that nothing works with. Exit 3 if
    something failed.

    [bold]Examples[/bold]

      flora doctor

      flora doctor --json
    """
    from flora.cli.health import examine

    form = choose_format(as_json=as_json, ids_only=quiet)
    findings = list(examine(registry))
    columns = [Column("check", "check", keeps_whole=True), Column("status", "status"), Column("detail", "detail")]
    if form is not Format.HUMAN:
        columns.append(Column("fix", "fix"))
    print_table(form, "checks", columns, [asdict(finding) for finding in findings], id_key="check")
    if form is Format.HUMAN:
        for finding in findings:
            if finding.fix:
                note(f"{finding.status}: {finding.check}: {finding.detail}\nfix: {finding.fix}")
    failed = [finding for finding in findings if finding.status == "failed"]
    if failed:
        checks = f"the check of {failed[0].check}" if len(failed) == 1 else f"{len(failed)} checks"
        raise CheckFailed(f"{checks} failed", cause=failed[0].detail, fix=failed[0].fix)
    if form is Format.HUMAN:
        note("nothing is broken")
