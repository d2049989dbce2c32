"""`flora import`, `export` and `compat`: adapters from and to files that other tools read and write."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from flora.cli.extraction import hash_cache_dir
from flora.cli.options import AsJson, IdsOnly, Ref, RegistryUrl, open_registry
from flora.cli.output import Column, choose_format, print_record, print_table
from flora.cli.sizes import show_bytes
from flora.errors import BaseMismatch, UsageError
from flora.names import check_name

if TYPE_CHECKING:
    from flora.adapter import Adapter
    from flora.checkpoint import Checkpoint
    from flora.identity import BaseRecord
    from flora.registry import Registry


class ExportFormat(StrEnum):
    PEFT = "peft"
    NIM = "nim"
    GGUF = "gguf"
    MLX = "mlx"
    DIFFUSERS = "diffusers"
    KOHYA = "kohya"


class PipelinePart(StrEnum):
    TRANSFORMER = "transformer"
    UNET = "unet"
    TEXT_ENCODER = "text_encoder"
    TEXT_ENCODER_2 = "text_encoder_2"


class ExportProfile(StrEnum):
    COMPACT = "compact"
    PORTABLE = "portable"


ProfileOption = Annotated[
    ExportProfile,
    typer.Option(
        "--profile",
        help="portable: one rank, zero-padded, for any engine. compact: each module's own rank, smaller.",
    ),
]


def import_(
    path: Annotated[Path, typer.Argument(metavar="PATH", help="A PEFT folder, Flora's own or another's.")],
    name: Annotated[str, typer.Option("--name", metavar="NAME", help="Name in the registry.")],
    base: Annotated[
        str | None,
        typer.Option("--base", metavar="BASE", help="Folder or Hub id of its base, to bind it to those weights."),
    ] = None,
    registry: RegistryUrl = None,
    as_json: AsJson = False,
    quiet: IdsOnly = False,
) -> None:
    """Take an adapter folder into the registry. Only safetensors are read.

    An adapter that Flora did not make only claims a base by name. With --base, its modules are checked against that
    checkpoint, and it is served on no other; without, it is checked when a server loads it.

    [bold]Examples[/bold]

      flora import ./adapter --name sql

      flora import ./adapter --name sql --base org/model
    """
    from flora.registry.formats.peft import load_peft

    form = choose_format(as_json=as_json, ids_only=quiet)
    check_name(name)
    adapter = load_peft(path)
    bound = bind_to(adapter, base) if base is not None else None
    with open_registry(registry, create=True) as store:
        version = store.add(bound.adapter if bound else adapter, name, provenance={"command": "import"})
        if bound is not None:
            store.register_base(bound.record, name=bound.checkpoint.name, path=bound.checkpoint.path)
        is_proven = store.is_base_proven(version)
    record = {
        "ref": version.ref,
        "digest": version.digest,
        "serving_digest": version.serving_digest,
        "base": version.base_name,
        "base_id": version.base_id,
        "max_rank": version.max_rank,
        "num_bytes": version.num_bytes,
    }
    facts = [
        ("base", describe_base(version.base_name, version.base_id, is_proven=is_proven)),
        ("modules", f"{version.num_modules}, ranks up to {version.max_rank}"),
        ("size", show_bytes(version.num_bytes)),
    ]
    print_record(form, record, id_key="ref", facts=facts, title=version.ref)


def describe_base(name: str, base_id: str | None, *, is_proven: bool) -> str:
    """The base for people to read, and whether anybody here has seen its weights."""
    claim = [] if is_proven else ["as the folder claims: nobody has hashed it"]
    return f"{name} ({', '.join([base_id, *claim] if base_id else claim)})"


@dataclass(frozen=True, slots=True, eq=False)
class Bound:
    adapter: Adapter
    checkpoint: Checkpoint  # of its base
    record: BaseRecord


def bind_to(adapter: Adapter, base: str) -> Bound:
    """The adapter bound to the weights of `base`. Raises BaseMismatch, also if its own record says other weights."""
    from flora.checkpoint import locate_checkpoint, open_checkpoint
    from flora.identity import base_record
    from flora.registry.binding import altered, bind

    checkpoint = open_checkpoint(locate_checkpoint(base))
    record = base_record(checkpoint, hash_cache_dir())
    binding = adapter.header.base
    if strange := next(altered(adapter.header, record), None):
        raise BaseMismatch(
            f"{strange} of {checkpoint.path} is not the tensor that this adapter was extracted from",
            cause=f"its record says base {binding.base_id}; this checkpoint is {record.base_id}",
            fix=f"give the base that it was made for, {binding.name}",
        )
    return Bound(bind(adapter, record, checkpoint.name, checkpoint.architecture), checkpoint, record)


def export(
    ref: Ref,
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="New folder, or one that Flora wrote.")],
    form_of_files: Annotated[
        ExportFormat,
        typer.Option(
            "--format",
            help="peft: for PEFT, vLLM, SGLang, LoRAX. nim: a folder of that name in DIR. gguf: llama.cpp and Ollama. "
            "mlx: MLX-LM. diffusers, kohya: image models.",
        ),
    ] = ExportFormat.PEFT,
    profile: ProfileOption = ExportProfile.COMPACT,
    base: Annotated[
        str | None,
        typer.Option(
            "--base", metavar="BASE", help="Folder or Hub id of its base: gguf wants it, PEFT's names go by it."
        ),
    ] = None,
    part: Annotated[
        PipelinePart, typer.Option("--part", help="With diffusers and kohya: which part of the pipeline the base is.")
    ] = PipelinePart.TRANSFORMER,
    registry: RegistryUrl = None,
    as_json: AsJson = False,
    quiet: IdsOnly = False,
) -> None:
    """Write an adapter as files that other tools read. `flora compat REF` tells which engine wants which.

    [bold]Examples[/bold]

      flora export sql --profile portable --out ./sql-adapter

      flora export sql --format gguf --base org/model --out ./sql-gguf

      flora export sql --format nim --out $NIM_PEFT_SOURCE
    """
    form = choose_format(as_json=as_json, ids_only=quiet)
    if form_of_files is ExportFormat.GGUF and base is None:
        raise UsageError("GGUF wants the base: its number of heads orders the rows", fix="give it: --base BASE")
    with open_registry(registry) as store:
        version = store.resolve(ref)
        adapter = store.load(version)
        if form_of_files is ExportFormat.PEFT:
            files = save_folder(adapter, out, profile, _base_folder(store, adapter, base))
        elif form_of_files is ExportFormat.NIM:
            folder = out / version.name.rpartition("/")[2]
            files = save_folder(adapter, folder, ExportProfile.PORTABLE, _base_folder(store, adapter, base))
        else:
            files = _save_other(adapter, out, form_of_files, base, part)
    rows = [{"file": str(file), "num_bytes": file.stat().st_size} for file in files]
    columns = (Column("file", "file"), Column("num_bytes", "size", show_bytes, is_number=True))
    print_table(form, "files", columns, rows, id_key="file")


def save_folder(adapter: Adapter, out: Path, profile: ExportProfile, base: Path | None) -> list[Path]:
    """Writes a PEFT folder, under the names that the library gives the modules of `base` while it loads them."""
    from flora.registry.formats.paths import tree_paths
    from flora.registry.formats.peft import save_peft

    return save_peft(adapter, out, profile.value, tree_paths(base, adapter.header) if base else None)


def base_folder(store: Registry, adapter: Adapter) -> Path | None:
    """Where the adapter's base lies on this machine, if that is known."""
    known = (one.path for one in store.bases() if one.base_id == adapter.header.base.base_id)
    return next((path for path in known if path is not None and path.is_dir()), None)


def _base_folder(store: Registry, adapter: Adapter, base: str | None) -> Path | None:
    """The folder of `base`; without one, that of the adapter's base."""
    if base is None:
        return base_folder(store, adapter)
    from flora.checkpoint import locate_checkpoint

    return locate_checkpoint(base)


def _save_other(adapter: Adapter, out: Path, form: ExportFormat, base: str | None, part: PipelinePart) -> list[Path]:
    """Writes the files of a format that is no PEFT folder into the new folder `out`."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(f"{out} is there already", fix="give --out a new folder")
    out.mkdir(parents=True, exist_ok=True)
    if form is ExportFormat.GGUF:
        from flora.checkpoint import locate_checkpoint
        from flora.registry.formats.gguf import save_gguf

        save_gguf(adapter, out / "adapter.gguf", locate_checkpoint(str(base)) / "config.json")
    elif form is ExportFormat.MLX:
        from flora.registry.formats.mlx import save_mlx

        save_mlx(adapter, out)
    else:
        from flora.registry.formats.image import DIFFUSERS_FILE, KOHYA_FILE, save_diffusers, save_kohya

        if form is ExportFormat.DIFFUSERS:
            save_diffusers(adapter, out / DIFFUSERS_FILE, part.value)
        else:
            save_kohya(adapter, out / KOHYA_FILE, part.value)
    return sorted(out.iterdir())


def compat(
    ref: Ref,
    registry: RegistryUrl = None,
    as_json: AsJson = False,
    quiet: IdsOnly = False,
) -> None:
    """What each engine will say of an adapter: takes it as it is, only in a portable form, or not, and why.

    [bold]Example[/bold]

      flora compat sql
    """
    from flora.registry.formats.compat import TABLE_VERSION, judge

    form = choose_format(as_json=as_json, ids_only=quiet)
    with open_registry(registry) as store:
        version = store.resolve(ref)
        verdicts = judge(store.header(version), store.report(version))
    rows = [
        {
            "engine": verdict.engine,
            "version": verdict.version,
            "answer": verdict.answer,
            "reason": verdict.reason,
            "remedy": verdict.remedy.replace("REF", ref),
            "table": TABLE_VERSION,
        }
        for verdict in verdicts
    ]
    columns = [Column(key, key) for key in ("engine", "version", "answer", "reason", "remedy")]
    print_table(form, "engines", columns, rows, id_key="engine")
