"""A plot of results as one SVG file, sensible on light and dark pages: no script, nothing fetched."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING

from flora.cli.svg import BOTTOM, LEFT, NUM_SERIES, RIGHT, TOP, Axis, Line, chart

if TYPE_CHECKING:
    from flora.bench.plots import Curve, Plot

_WIDTH, _CHART_HEIGHT, _HEAD, _LINE = 640, 320, 40, 18
PAGE_STYLE = """
.paper { fill: #ffffff; } .title { fill: #1c2024; font: 600 15px system-ui, sans-serif; }
text { font-family: system-ui, sans-serif; } .label { fill: #60646c; font-size: 12px; }
.grid { stroke: #e2e5e9; } .axis { stroke: #60646c; } .rule { stroke: #60646c; stroke-dasharray: 4 4; }
.curve { fill: none; stroke-width: 2; } .mark { fill: #ffffff; stroke-width: 2; }
.s0 { stroke: #1264a3; } .s1 { stroke: #c2410c; } .s2 { stroke: #15803d; } .s3 { stroke: #a21caf; }
.s4 { stroke: #a16207; } .s5 { stroke: #be123c; } .s6 { stroke: #0e7490; } .s7 { stroke: #57534e; }
@media (prefers-color-scheme: dark) {
.paper { fill: #14171a; } .title { fill: #e8eaed; } .label { fill: #9aa0a8; } .grid { stroke: #2c3137; }
.axis, .rule { stroke: #9aa0a8; } .mark { fill: #14171a; }
.s0 { stroke: #7cc4ff; } .s1 { stroke: #ff9d66; } .s2 { stroke: #6ddc8b; } .s3 { stroke: #ee9cf7; }
.s4 { stroke: #e6c04f; } .s5 { stroke: #ff8fa3; } .s6 { stroke: #5fd6e8; } .s7 { stroke: #c9c4bf; } }
"""


def draw_plot(plot: Plot, curves: Sequence[Curve], title: str | None = None) -> str:
    """The file's text. `title` in place of the plot's own."""
    xs = [x for curve in curves for x, _ in curve.points] or [1.0]
    ys = [y for curve in curves for _, y in curve.points] + [curve.base for curve in curves if curve.base is not None]
    is_log = plot.is_x_log and max(xs) / min(xs) >= 10
    x = Axis(plot.x_title, min(xs) if is_log else 0.0, max(xs), is_log)
    low = min(y for y in ys if y > 0) * 0.8 if plot.is_y_log and max(ys) > 0 else 0.0
    y = Axis(plot.y_title, low, 100.0 if plot.y_scale == 100.0 else max(ys) * 1.1, low > 0, short)
    lines = [Line(curve.points, f"s{i % NUM_SERIES}", curve.name) for i, curve in enumerate(curves)]
    drawn = chart(x, y, lines, size=(_WIDTH, _CHART_HEIGHT), title=title or plot.title)
    legend = curves if len(curves) > 1 or any(curve.base for curve in curves) else []
    height = _HEAD + _CHART_HEIGHT + _LINE * len(legend) + 8
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" width="{_WIDTH}" height="{height}">',
        f"<title>{escape(title or plot.title)}</title><style>{PAGE_STYLE}</style>",
        f'<rect class="paper" width="{_WIDTH}" height="{height}"/>',
        f'<text class="title" x="16" y="26">{escape(title or plot.title)}</text>',
        f'<svg y="{_HEAD}" width="{_WIDTH}" height="{_CHART_HEIGHT}">{drawn}',
        *(_level(y, curve.base, i) for i, curve in enumerate(curves) if curve.base is not None),
        *(_mark(x, y, point, i, curve.name) for i, curve in enumerate(curves) for point in curve.points),
        "</svg>",
    ]
    for i, curve in enumerate(legend):
        at = _HEAD + _CHART_HEIGHT + _LINE * i + 8
        parts.append(f'<line class="curve s{i % NUM_SERIES}" x1="68" x2="92" y1="{at}" y2="{at}"/>')
        parts.append(f'<text class="label" x="100" y="{at + 4}">{escape(_legend(plot, curve))}</text>')
    return "\n".join([*parts, "</svg>\n"])


def _legend(plot: Plot, curve: Curve) -> str:
    base = f"dashed: {plot.level}, {short(curve.base)}" if curve.base is not None else ""
    return "; ".join(filter(None, (curve.name, base)))


def _height(y: Axis, value: float) -> float:
    return TOP + (_CHART_HEIGHT - TOP - BOTTOM) * (1 - y.share(value))


def _level(y: Axis, value: float, series: int) -> str:
    at = _height(y, value)
    style = f'class="curve s{series % NUM_SERIES}" stroke-dasharray="5 4"'
    return f'<line {style} x1="{LEFT}" x2="{_WIDTH - RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>'


def _mark(x: Axis, y: Axis, point: tuple[float, float], series: int, name: str) -> str:
    """A measured point, in its series' color; a pointer over it reads the number."""
    cx = LEFT + (_WIDTH - LEFT - RIGHT) * x.share(point[0])
    cy = _height(y, point[1])
    words = f"{name + ': ' if name else ''}{short(point[1])} at {point[0]:g}"
    circle = f'<circle class="mark s{series % NUM_SERIES}" cx="{cx:.1f}" cy="{cy:.1f}" r="4">'
    return f"{circle}<title>{escape(words)}</title></circle>"


def short(value: float) -> str:
    """A figure as charts show it: three digits, or all that stand before the point."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
