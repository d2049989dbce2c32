"""`flora push` and `pull`: adapters to and from the Hub, buckets, OCI registries and folders."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flora.cli.commands.exchange import ExportProfile, ProfileOption, base_folder, bind_to, describe_base
from flora.cli.options import AsJson, DryRun, IdsOnly, Ref, RegistryUrl, open_registry
from flora.cli.output import Column, Format, choose_format, note, print_json, print_record, print_table
from flora.cli.progress import progress
from flora.cli.sizes import parse_bytes, show_bytes
from flora.errors import FloraError, UsageError
from flora.names import check_alias, check_name

if TYPE_CHECKING:
    from flora.registry import Registry, Version
    from flora.registry.remotes.transfer import Limits

_ADDRESS = "user/name on the Hugging Face Hub, a folder (./… or /…), s3://BUCKET/…/NAME, or oci://HOST/…/NAME."


def push(
    ref: Ref,
    repo: Annotated[str, typer.Argument(metavar="REPO", help=_ADDRESS)],
    profile: ProfileOption = ExportProfile.PORTABLE,
    private: Annotated[bool, typer.Option("--private", help="If the repository is new, keep it private.")] = False,
    dry_run: DryRun = False,
    registry: RegistryUrl = None,
    as_json: AsJson = False,
    quiet: IdsOnly = False,
) -> None:
    """Publish an adapter on the Hugging Face Hub or another remote, with a card that says what it keeps.

    Everything goes in one step, or nothing does. On the Hub, what arrived is compared by the Hub's own sha256.

    [bold]Examples[/bold]

      flora push sql you/sql-adapter --dry-run

      flora push sql:prod you/sql-adapter

      flora push sql s3://models/adapters/sql
    """
    from flora.registry.remotes.pushing import plan_push
    from flora.registry.remotes.pushing import push as send

    form = choose_format(as_json=as_json, ids_only=quiet)
    with open_registry(registry) as store:
        version = store.resolve(ref)
        adapter = store.load(version)
        base = base_folder(store, adapter)
        plan = plan_push(adapter, version, repo, profile=profile.value, is_private=private, base=base)
    if form is not Format.IDS and "/" not in version.base_name:
        note(f"note: the card names the base {version.base_name}, which is no Hub id; readers will not find it by that")
    address = None if dry_run else send(plan)
    files = [{"file": file.name, "num_bytes": file.num_bytes} for file in plan.files]
    record: dict[str, Any] = {
        "ref": version.ref,
        "repo": plan.repo,
        "url": address,
        "dry_run": dry_run,
        "message": plan.message,
        "files": files,
        "card": plan.card,
    }
    if form is Format.JSON:
        print_json(record)
    elif form is Format.IDS:
        print(address or plan.repo)
    else:
        columns = (Column("file", "file"), Column("num_bytes", "size", show_bytes, is_number=True))
        print_table(form, "files", columns, files, id_key="file")
        if dry_run:
            print(f"\n--- README.md of {plan.repo}, the model card\n")
            print(plan.card)
            note(f"note: nothing was sent; {version.ref} would be one commit to {plan.repo}: {plan.message}")
        else:
            print(address)


def pull(
    repo: Annotated[str, typer.Argument(metavar="REPO", help=_ADDRESS)],
    name: Annotated[
        str | None, typer.Option("--name", metavar="NAME", help="Name in the registry, if not the last part of REPO.")
    ] = None,
    revision: Annotated[
        str | None, typer.Option("--revision", metavar="REV", help="On the Hub: a branch, a tag or a commit.")
    ] = None,
    base: Annotated[
        str | None,
        typer.Option("--base", metavar="BASE", help="Folder or Hub id of its base, to bind it to those weights."),
    ] = None,
    alias: Annotated[
        str, typer.Option("--alias", metavar="ALIAS", help="What to point to the new version.")
    ] = "latest",
    max_size: Annotated[
        str, typer.Option("--max-size", metavar="SIZE", help="Refuse to fetch more than this.")
    ] = "16GiB",
    stall_timeout: Annotated[
        float, typer.Option("--stall-timeout", metavar="SECONDS", min=0.1, help="Longest time without a byte.")
    ] = 30.0,
    everything: Annotated[
        bool, typer.Option("--all", help="REPO is a folder of adapter folders, as NVIDIA NIM keeps them: pull each.")
    ] = False,
    watch: Annotated[
        float | None,
        typer.Option("--watch", metavar="SECONDS", min=0.1, help="With --all: look again so often, until Ctrl-C."),
    ] = None,
    registry: RegistryUrl = None,
    as_json: AsJson = False,
    quiet: IdsOnly = False,
) -> None:
    """Take an adapter from the Hugging Face Hub or another remote into the registry.

    Any PEFT LoRA will do; what is none, such as DoRA, is refused before its weights are fetched. Every file is checked
    by the digest that the remote tells. Interrupted, the same command goes on where it stopped.

    An adapter only claims its base, by name or in Flora's record by id; --base proves it against that checkpoint.

    [bold]Examples[/bold]

      flora pull someone/sql-lora

      flora pull someone/sql-lora --revision v1.0 --name sql --base org/model

      flora pull s3://models/adapters/sql:prod

      flora pull --all --watch 5 /var/nim/loras
    """
    from flora.registry.remotes.address import default_name
    from flora.registry.remotes.transfer import Limits

    form = choose_format(as_json=as_json, ids_only=quiet)
    check_alias(alias)
    limits = Limits(max_bytes=parse_bytes(max_size), stall_s=stall_timeout)
    if watch is not None and not everything:
        raise UsageError("--watch wants --all", fix="flora pull --all --watch SECONDS FOLDER")
    with open_registry(registry, create=True) as store:
        if everything:
            _pull_all(store, Path(repo).expanduser(), alias, limits, watch, form)
            return
        called = check_name(name if name is not None else default_name(repo))
        record = _pull_one(store, repo, called, revision, base, alias, limits, is_quiet=quiet)
    facts = [
        ("from", f"{record['repo']}" + (f" at {record['revision'][:12]}" if record["revision"] else "")),
        ("base", describe_base(record["base"], record["base_id"], is_proven=record["base_is_proven"])),
        ("modules", f"{record['num_modules']}, ranks up to {record['max_rank']}"),
        ("size", show_bytes(record["num_bytes"])),
    ]
    print_record(form, record, id_key="ref", facts=facts, title=record["ref"])


def _pull_one(
    store: Registry,
    repo: str,
    name: str,
    revision: str | None,
    base: str | None,
    alias: str,
    limits: Limits,
    *,
    is_quiet: bool,
) -> dict[str, Any]:
    """Pulls and registers one adapter; returns what to tell about it."""
    from flora.config import settings
    from flora.registry.remotes.pulling import pull as fetch

    with progress(f"pulling {name}", is_quiet=is_quiet) as report:
        pulled = fetch(repo, settings().cache_dir / "pulls", revision=revision, limits=limits, report=report)
    bound = bind_to(pulled.adapter, base) if base is not None else None
    provenance = {"command": "pull", "remote": pulled.address, "revision": pulled.revision}
    version = store.add(bound.adapter if bound else pulled.adapter, name, alias=alias, provenance=provenance)
    if bound is not None:
        store.register_base(bound.record, name=bound.checkpoint.name, path=bound.checkpoint.path)
    is_proven = store.is_base_proven(version)
    return _record(version, pulled.address, pulled.revision, is_floras=pulled.is_floras, is_proven=is_proven)


def _record(version: Version, repo: str, revision: str, *, is_floras: bool, is_proven: bool) -> dict[str, Any]:
    return {
        "ref": version.ref,
        "digest": version.digest,
        "serving_digest": version.serving_digest,
        "repo": repo,
        "revision": revision,
        "made_by_flora": is_floras,
        "base": version.base_name,
        "base_id": version.base_id,
        "base_is_proven": is_proven,
        "num_modules": version.num_modules,
        "max_rank": version.max_rank,
        "num_bytes": version.num_bytes,
    }


def _pull_all(store: Registry, source: Path, alias: str, limits: Limits, watch: float | None, form: Format) -> None:
    """Pulls every adapter folder under `source`; with `watch`, again whenever one of them changes."""
    from flora.registry.remotes.folder import adapters_in, fingerprint

    seen: dict[str, tuple[tuple[str, int, int], ...]] = {}
    columns = (Column("ref", "version", keeps_whole=True), Column("base", "base"), Column("repo", "from"))
    while True:
        rows, refused = [], []
        for folder in adapters_in(source):
            state = fingerprint(folder)
            if seen.get(folder.name) == state:
                continue
            try:
                check_name(folder.name)
                rows.append(_pull_one(store, str(folder), folder.name, None, None, alias, limits, is_quiet=True))
            except FloraError as error:
                refused.append(error)
                note(f"{folder.name}: {error}")
            seen[folder.name] = state  # refused or not: once is enough until its files change
        if watch is None:
            print_table(form, "adapters", columns, rows, id_key="ref")
            if refused:
                raise FloraError(
                    f"{len(refused)} of {len(rows) + len(refused)} adapters under {source} were refused",
                    cause=refused[0].what,
                    fix="what is wrong with each stands above; the others were pulled",
                )
            return
        for row in rows:
            print_table(form, "adapters", columns, [row], id_key="ref")
        time.sleep(watch)
