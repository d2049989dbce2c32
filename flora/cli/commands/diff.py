"""`flora diff`: two adapters told apart in factor space."""

from __future__ import annotations

from statistics import median
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flora.cli.options import AsJson, IdsOnly, RegistryUrl, complete_reference
from flora.cli.output import Column, Format, choose_format, note, print_json, print_table
from flora.cli.progress import progress
from flora.cli.sources import Source, open_source

if TYPE_CHECKING:
    from flora.algebra.compare import Comparison, ModuleComparison


def diff(
    left: Annotated[
        str,
        typer.Argument(
            metavar="A", help="NAME, NAME:ALIAS, NAME@vN, or a folder: ./adapter.", autocompletion=complete_reference
        ),
    ],
    right: Annotated[
        str, typer.Argument(metavar="B", help="The same for the other one.", autocompletion=complete_reference)
    ],
    registry: RegistryUrl = None,
    as_json: AsJson = False,
    quiet: IdsOnly = False,
) -> None:
    """Say how far apart two adapters are, module by module, from their factors alone.

    The distance is that of what they add to the weights, over the larger of the two: 0 is equal, 1 as far as from
    nothing, 2 opposite. Principal angles are between the directions that they write to (outputs) and read from
    (inputs): 0 degrees are shared, 90 are foreign to each other. Angles count every direction alike, however weak.

    [bold]Examples[/bold]

      flora diff sql@v1 sql@v2

      flora diff sql ./another-adapter --json
    """
    from flora.algebra.compare import compare

    form = choose_format(as_json=as_json, ids_only=quiet)
    sources = [open_source(ref, registry) for ref in (left, right)]
    with progress("comparing", is_quiet=quiet) as report:
        found = compare(sources[0].adapter, sources[1].adapter, lambda name, share: report(share, name))
    rows = [_row(module) for module in found.modules]
    notes = _notes(sources)
    if form is Format.JSON:
        summary = {"left": sources[0].label, "right": sources[1].label, "distance": found.distance}
        print_json(summary | {"cosine": found.cosine, "notes": notes, "modules": rows})
        return
    columns = [
        Column("module", "module", keeps_whole=True),
        Column("left_rank", "rank A", is_number=True),
        Column("right_rank", "rank B", is_number=True),
        Column("distance", "distance", _number, is_number=True),
        Column("cosine", "cosine", _number, is_number=True),
        Column("median_output_angle", "outputs, median angle", _degrees, is_number=True),
        Column("median_input_angle", "inputs, median angle", _degrees, is_number=True),
    ]
    print_table(form, "modules", columns, rows, id_key="module")
    if form is not Format.IDS:
        note(_summary(sources, found))
        for line in notes:
            note(f"note: {line}")


def _row(module: ModuleComparison) -> dict[str, Any]:
    return {
        "module": module.name,
        "left_rank": module.left_rank,
        "right_rank": module.right_rank,
        "left_norm": module.left_norm,
        "right_norm": module.right_norm,
        "distance": module.distance,
        "cosine": module.cosine,
        "median_output_angle": median(module.output_angles) if module.output_angles else None,
        "median_input_angle": median(module.input_angles) if module.input_angles else None,
        "output_angles": list(module.output_angles),
        "input_angles": list(module.input_angles),
    }


def _notes(sources: list[Source]) -> list[str]:
    """What else than factors tells the two apart."""
    left, right = (source.adapter for source in sources)
    notes = []
    if left.header.serving_digest == right.header.serving_digest:
        notes.append("both have the same serving digest: they answer alike")
    if left.header.base.base_id != right.header.base.base_id:
        notes.append("they belong to different bases, or one's base is not proven")
    if dict(left.extras) != dict(right.extras):
        notes.append("their chat templates or end tokens differ")
    exact = sorted({tensor.name for tensor in left.header.exact_tensors} ^ {t.name for t in right.header.exact_tensors})
    if exact or {t.sha256 for t in left.header.exact_tensors} != {t.sha256 for t in right.header.exact_tensors}:
        notes.append("the tensors that they carry whole differ")
    return notes


def _summary(sources: list[Source], found: Comparison) -> str:
    cosine = "" if found.cosine is None else f", cosine {found.cosine:.4f}"
    return f"{sources[0].label} and {sources[1].label}: distance {found.distance:.4f}{cosine}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _degrees(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}°"
