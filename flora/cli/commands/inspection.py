"""`flora inspect`: where an adapter's energy lies, module by module."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flora.cli.options import AsJson, IdsOnly, RefOrFolder, RegistryUrl, open_registry
from flora.cli.output import Column, choose_format, note, percent, print_table
from flora.cli.sizes import show_bytes
from flora.cli.sources import is_folder, open_source
from flora.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from flora.adapter import Adapter, AdapterHeader, ChangeReport

_ITEM_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4, "float8_e4m3fn": 1}
_LEVELS = (0.9, 0.95, 0.99)  # of the stored factors' own energy


def inspect(
    ref: RefOrFolder,
    spectra: Annotated[
        bool, typer.Option("--spectra", help="Read the weights too: singular values, and ranks by energy.")
    ] = False,
    plot: Annotated[
        Path | None,
        typer.Option(
            "--plot", metavar="FILE", help="Write spectra, energy against rank and heatmaps as one HTML file."
        ),
    ] = None,
    registry: RegistryUrl = None,
    as_json: AsJson = False,
    quiet: IdsOnly = False,
) -> None:
    """Show each module's rank and kept energy, and each changed tensor that the adapter leaves out.

    [bold]Examples[/bold]

      flora inspect sql

      flora inspect sql@v2 --spectra --json

      flora inspect ./adapter --plot adapter.html
    """
    form = choose_format(as_json=as_json, ids_only=quiet)
    adapter: Adapter | None = None
    if spectra or plot is not None or is_folder(ref):
        source = open_source(ref, registry)
        adapter, label = source.adapter, source.label
        header, report = adapter.header, adapter.report
    else:  # header and report are small blobs, and need no torch
        with open_registry(registry) as store:
            version = store.resolve(ref)
            header, report, label = store.header(version), store.report(version), version.ref
    if plot is not None and adapter is not None:
        _write_page(plot, label, adapter)
    rows = list(_module_rows(header, report))
    columns = [
        Column("module", "module", keeps_whole=True),
        Column("shape", "shape", lambda shape: "x".join(map(str, shape)), is_number=True),
        Column("rank", "rank", is_number=True),
        Column("kept", "kept", percent, is_number=True),
        Column("share", "share of the change", percent, is_number=True),
        Column("num_bytes", "size", show_bytes, is_number=True),
        Column("note", "note"),
    ]
    if adapter is not None and spectra:
        for row in rows:
            row |= _spectrum(adapter, row["module"])
        columns[3:3] = [Column(f"rank_{level:.0%}", f"r@{level:.0%}", is_number=True) for level in _LEVELS]
    print_table(form, "modules", columns, rows, id_key="module")
    if report is not None and not quiet:
        note(
            f"{label} keeps {percent(report.extracted_share)} of its modules' change, "
            f"{percent(report.kept_share)} of the whole"
        )


def _write_page(path: Path, label: str, adapter: Adapter) -> None:
    """The adapter's portrait as a page at `path`. Raises UsageError if that is a folder."""
    from flora.cli.page import make_page
    from flora.portrait import portrait

    if path.is_dir():
        raise UsageError(f"{path} is a folder", fix="give --plot a file, such as adapter.html")
    header, report = adapter.header, adapter.report
    facts = [("base", header.base.name), ("modules", f"{len(header.modules)}, ranks up to {header.max_rank}")]
    facts.append(("size", show_bytes(sum(factors.num_bytes for factors in adapter.factors.values()))))
    if report is not None and report.norm_squared:
        facts += [
            ("kept energy", f"{percent(report.extracted_share)} of the modules' change"),
            ("", f"{percent(report.kept_share)} of the whole change"),
        ]
    facts.append(("serving digest", str(header.serving_digest)))
    path.write_text(make_page(f"{label}, from {header.base.name}", facts, portrait(adapter)), encoding="utf-8")
    note(f"wrote {path}")


def _module_rows(header: AdapterHeader, report: ChangeReport | None) -> Iterator[dict[str, Any]]:
    """The adapter's modules, then what changed and is not in it, largest share first."""
    changes = report.by_name() if report else {}
    for module in header.modules:
        change = changes.get(f"{module.name}.weight")
        yield {
            "module": module.name,
            "shape": [module.out_features, module.in_features],
            "rank": module.rank,
            "kept": change.kept / change.norm_squared if change and change.norm_squared else None,
            "share": report.share(change) if report and change else None,
            "num_bytes": module.rank * (module.in_features + module.out_features) * _ITEM_BYTES[module.dtype],
            "note": (change.reason or "") if change else "",
        }
    if report is None:
        return
    others = [t for t in report.tensors if t.status in ("not_extractable", "excluded") and t.norm_squared]
    for change in sorted(others, key=lambda tensor: -tensor.norm_squared):
        yield {
            "module": change.name,
            "shape": list(change.shape),
            "rank": 0,
            "kept": 0.0,
            "share": report.share(change),
            "num_bytes": 0,
            "note": change.reason or change.status,
        }


def _spectrum(adapter: Adapter, module: str) -> dict[str, Any]:
    from flora.lowrank import component_energies, is_svd_ordered, svd_order

    factors = adapter.factors.get(module)
    if factors is None:
        return {"singular_values": []} | {f"rank_{level:.0%}": 0 for level in _LEVELS}
    energies = component_energies(factors if is_svd_ordered(factors) else svd_order(factors))
    kept = energies.cumsum(0) / energies.sum()
    ranks = {f"rank_{level:.0%}": min(int((kept < level).sum()) + 1, len(kept)) for level in _LEVELS}
    return {"singular_values": energies.sqrt().tolist()} | ranks
