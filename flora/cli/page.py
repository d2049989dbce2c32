"""An adapter's portrait as one HTML file: no script, nothing fetched, legible in light and in dark."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from statistics import median
from typing import TYPE_CHECKING

from flora.cli.output import percent
from flora.cli.svg import NUM_SERIES, Axis, Cell, Line, chart, heatmap
from flora.portrait import LEVELS, Curve, Portrait, Spectrum

if TYPE_CHECKING:
    from collections.abc import Callable

_MAX_POINTS = 48  # of one spectrum: more than a screen shows apart
_DEEPEST = 1e-8  # of the largest singular value: below, a spectrum is drawn at the floor
_STYLE = """
:root { color-scheme: light dark; --paper: #ffffff; --ink: #1c2024; --faint: #60646c; --line: #e2e5e9; --heat: #1264a3;
  --heat-ink: #ffffff; --s0: #1264a3; --s1: #c2410c; --s2: #15803d; --s3: #a21caf; --s4: #a16207; --s5: #be123c;
  --s6: #0e7490; --s7: #57534e; }
@media (prefers-color-scheme: dark) { :root { --paper: #14171a; --ink: #e8eaed; --faint: #9aa0a8; --line: #2c3137;
  --heat: #7cc4ff; --heat-ink: #0b1116; --s0: #7cc4ff; --s1: #ff9d66; --s2: #6ddc8b; --s3: #ee9cf7; --s4: #e6c04f;
  --s5: #ff8fa3; --s6: #5fd6e8; --s7: #c9c4bf; } }
body { margin: 0 auto; max-width: 60rem; padding: 2rem 1.25rem 4rem; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.5rem; margin: 0 0 .25rem; overflow-wrap: anywhere; }
h2 { font-size: 1.1rem; margin: 2.5rem 0 .25rem; }
p { margin: .25rem 0 .75rem; color: var(--faint); max-width: 46rem; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .15rem 1.25rem; margin: 1rem 0; }
dt { color: var(--faint); } dd { margin: 0; overflow-wrap: anywhere; }
svg { display: block; width: 100%; height: auto; } .scroll { overflow-x: auto; }
.label { fill: var(--faint); font-size: 12px; } .halo { stroke: var(--paper); stroke-width: 5px; paint-order: stroke; }
.grid { stroke: var(--line); } .axis { stroke: var(--faint); }
.rule { stroke: var(--faint); stroke-dasharray: 4 4; } .curve { fill: none; stroke-width: 1.6; }
.thin { stroke-width: 1; stroke-opacity: .3; } .all { stroke: var(--ink); stroke-width: 2.6; }
.mark { fill: var(--paper); stroke: var(--ink); stroke-width: 2; }
.paper { fill: var(--line); } .ink { fill: var(--heat); } .on .label { fill: var(--heat-ink); }
.off .label { fill: var(--ink); }
ul.legend { list-style: none; display: flex; flex-wrap: wrap; gap: .1rem 1.1rem; padding: 0; margin: .5rem 0;
  font-size: .85rem; }
.legend li::before { content: ""; display: inline-block; width: 1rem; height: 3px; margin-right: .4rem;
  vertical-align: middle; background: var(--c); }
table { border-collapse: collapse; font-size: .85rem; } th, td { padding: .2rem .7rem .2rem 0; text-align: right; }
th:first-child, td:first-child { text-align: left; } thead th { border-bottom: 1px solid var(--line); }
summary { cursor: pointer; margin-top: 2rem; }
""" + "".join(f".s{i} {{ stroke: var(--s{i}); }}\n" for i in range(NUM_SERIES))


def make_page(title: str, facts: Sequence[tuple[str, str]], portrait: Portrait) -> str:
    """The whole file. `facts` are words and values for the head of the page."""
    listed = "".join(f"<dt>{escape(word)}</dt><dd>{escape(value)}</dd>" for word, value in facts)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
        f"<h1>{escape(title)}</h1>\n<dl>{listed}</dl>\n"
        f"{_energy(portrait)}\n{_maps(portrait)}\n{_spectra(portrait)}\n{_table(portrait)}\n</body>\n</html>\n"
    )


def _energy(portrait: Portrait) -> str:
    whole, kinds = portrait.whole(), portrait.by_kind()
    top = max(1, len(whole.shares) - 1)
    lines = [_curve_line(one, f"s{i % NUM_SERIES}") for i, one in enumerate(kinds)] if len(kinds) > 1 else []
    rules = [(level, f"{100 * level:.0f} %") for level in LEVELS]
    noise = portrait.noise_share
    bounds = [(1 - noise, f"all but storage noise: {percent(1 - noise)}")] if noise > 1e-3 else []
    marks = [
        (rank, level, f"{100 * level:.0f} % at rank {rank}")
        for level in LEVELS
        if (rank := whole.rank_for(level)) is not None
    ]
    reached = [
        f"{100 * level:.0f} % {'takes rank ' + str(rank) if rank is not None else 'is out of reach of what is stored'}"
        for level in LEVELS
        for rank in [whole.rank_for(level)]
    ]
    drawn = chart(
        Axis("terms kept in each module", 0, top),
        Axis("kept share of the change", min(0.0, *whole.shares), 1.0, show=lambda v: f"{100 * v:.0f} %"),
        [*lines, _curve_line(whole, "all")],
        rules,
        bounds,
        marks,
        title="kept energy against rank",
    )
    return (
        "<h2>Energy against rank</h2>\n<p>What the modules together keep of their change if each is cut to so many "
        f"terms, by kind and over all: {escape('; '.join(reached))}.</p>\n{drawn}\n{_legend(portrait, with_all=True)}"
    )


def _curve_line(curve: Curve, style: str) -> Line:
    points = [(float(rank), share) for rank, share in enumerate(curve.shares)]
    return Line(points, style, f"{curve.label}: {percent(curve.shares[-1])} at rank {len(points) - 1}")


def _spectra(portrait: Portrait) -> str:
    largest = max((module.energies[0] for module in portrait.modules if module.energies), default=1.0) ** 0.5 or 1.0
    smallest = min((module.energies[-1] for module in portrait.modules if module.energies), default=1.0) ** 0.5
    color = {kind: f"s{i % NUM_SERIES}" for i, kind in enumerate(portrait.kinds)}
    lines = [
        Line(_points(module.energies), f"thin {color[module.kind]}", f"{module.name}, rank {module.rank}")
        for module in portrait.modules
    ]
    for kind in portrait.kinds:
        middle = _median([module.energies for module in portrait.modules if module.kind == kind])
        lines.append(Line(_points(middle), color[kind], f"{kind}: median over its layers"))
    drawn = chart(
        Axis("term", 1, max((module.rank for module in portrait.modules), default=2), show="{:.0f}".format),
        Axis("singular value", max(smallest, _DEEPEST * largest), largest, is_log=True),
        lines,
        title="singular values of every module",
    )
    return (
        "<h2>Spectra</h2>\n<p>Singular values of each module's stored product, largest first, and thicker the median "
        "over the layers of a kind. A line that falls early "
        f"needs few terms; one that runs level gains little from more.</p>\n{drawn}\n"
        f"{_legend(portrait)}"
    )


def _median(spectra: Sequence[tuple[float, ...]]) -> tuple[float, ...]:
    """Term by term, the median of the spectra that have it."""
    length = max(map(len, spectra), default=0)
    return tuple(median(energies[i] for energies in spectra if len(energies) > i) for i in range(length))


def _points(energies: Sequence[float]) -> list[tuple[float, float]]:
    """Index and singular value, thinned evenly in the logarithm of the index."""
    rank = len(energies)
    if rank <= _MAX_POINTS:
        indices = list(range(rank))
    else:
        indices = sorted({round(rank ** (i / (_MAX_POINTS - 1))) - 1 for i in range(_MAX_POINTS)})
    return [(i + 1.0, energies[i] ** 0.5) for i in indices]


def _maps(portrait: Portrait) -> str:
    total = sum(module.norm_squared for module in portrait.modules) or 1.0

    def kept(modules: list[Spectrum]) -> float:
        norm = sum(module.norm_squared for module in modules)
        return sum(module.kept for module in modules) / norm if norm else 1.0

    def share(modules: list[Spectrum]) -> float:
        return sum(module.norm_squared for module in modules) / total

    largest = max((share(modules) for modules in portrait.cells().values()), default=1.0) or 1.0
    return (
        "<h2>Kept energy by layer and module</h2>\n<p>How much of each module's own change is kept, in percent.</p>\n"
        f'<div class="scroll">{_map(portrait, kept, lambda value: value, "kept energy by layer and module")}</div>\n'
        "<h2>Where the change lies</h2>\n<p>Each module's share of all these modules' change, in percent.</p>\n"
        f'<div class="scroll">{_map(portrait, share, lambda value: value / largest, "share of the change")}</div>'
    )


def _map(
    portrait: Portrait, measure: Callable[[list[Spectrum]], float], strength: Callable[[float], float], title: str
) -> str:
    rows, columns = portrait.kinds, portrait.layers
    cells = []
    for (layer, kind), modules in portrait.cells().items():
        value = measure(modules)
        ranks = ", ".join(sorted({str(module.rank) for module in modules}))
        tip = f"{modules[0].name}{' and others' if len(modules) > 1 else ''}: {percent(value)}, rank {ranks}"
        word = f"{100 * value:.0f}" if value >= 0.0995 else f"{100 * value:.1f}"
        cells.append(Cell(rows.index(kind), columns.index(layer), strength(value), word, tip))
    return heatmap(rows, ["-" if layer is None else str(layer) for layer in columns], cells, title=title)


def _legend(portrait: Portrait, *, with_all: bool = False) -> str:
    entries = [(kind, f"--s{i % NUM_SERIES}") for i, kind in enumerate(portrait.kinds)]
    if with_all:
        entries = [("all modules", "--ink"), *(entries if len(entries) > 1 else [])]
    listed = "".join(f'<li style="--c: var({color})">{escape(word)}</li>' for word, color in entries)
    return f'<ul class="legend">{listed}</ul>'


def _table(portrait: Portrait) -> str:
    heading = "".join(
        f"<th>{word}</th>" for word in ("module", "rank", "kept", *(f"r@{100 * v:.0f} %" for v in LEVELS))
    )
    rows = []
    for module in portrait.modules:
        kept = [energy / module.norm_squared if module.norm_squared else 1.0 for energy in module.kept_by_rank()]
        ranks = [next((rank for rank, share in enumerate(kept) if share >= level), None) for level in LEVELS]
        cells = [str(module.rank), percent(module.kept_share), *("-" if rank is None else str(rank) for rank in ranks)]
        rows.append(f"<tr><td>{escape(module.name)}</td>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>")
    return (
        "<details><summary>Every module as numbers</summary>\n"
        f'<div class="scroll"><table><thead><tr>{heading}</tr></thead>\n<tbody>{"".join(rows)}</tbody></table></div>\n'
        "</details>"
    )
