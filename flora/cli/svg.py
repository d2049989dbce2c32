"""Charts as SVG text for a page that colors them: no script, no style of their own but classes.

Classes: `axis`, `grid`, `label` (`halo`: over lines), `rule` (a line across at some level), `curve`, `mark`, `s0` to
`s7` (a series), `cell` with `on` or `off`, `paper` and `ink`.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

LEFT, RIGHT, TOP, BOTTOM = 68, 44, 12, 40  # margins of a chart, in its own units
NUM_SERIES = 8  # colors that the page defines


@dataclass(frozen=True, slots=True)
class Line:
    """One series: points of x and y, the class that colors it, and what a pointer over it reads."""

    points: Sequence[tuple[float, float]]
    style: str
    title: str


@dataclass(frozen=True, slots=True)
class Axis:
    """From `low` to `high`; `log` ones are by powers of ten, and both ends above zero."""

    title: str
    low: float
    high: float
    is_log: bool = False
    show: Callable[[float], str] = "{:g}".format

    def share(self, value: float) -> float:
        """Where `value` lies, 0 at the low end and 1 at the high one, and never outside."""
        low, high, value = (math.log10(v) if self.is_log else v for v in (self.low, self.high, max(value, self.low)))
        return min(1.0, (value - low) / (high - low)) if high > low else 0.0

    def ticks(self) -> list[float]:
        if self.is_log:
            first, last = math.ceil(math.log10(self.low) - 1e-9), math.floor(math.log10(self.high) + 1e-9)
            if last - first < 2:  # few powers of ten: 1, 2 and 5 of each
                fine = [factor * 10.0**power for power in range(first - 1, last + 1) for factor in (1, 2, 5)]
                return [value for value in fine if self.low <= value <= self.high]
            every = max(1, (last - first) // 6)
            return [10.0**power for power in range(first, last + 1, every)]
        step = _round_step((self.high - self.low) / 5)
        first = math.ceil(self.low / step - 1e-9)
        return [i * step for i in range(first, math.floor(self.high / step + 1e-9) + 1)]


def chart(
    x: Axis,
    y: Axis,
    lines: Sequence[Line],
    rules: Sequence[tuple[float, str]] = (),
    bounds: Sequence[tuple[float, str]] = (),
    marks: Sequence[tuple[float, float, str]] = (),
    *,
    size: tuple[int, int] = (640, 320),
    title: str,
) -> str:
    """A line chart. `rules` are levels of y with a word each in the margin, `bounds` the same with it at the left."""
    width, height = size
    wide, high = width - LEFT - RIGHT, height - TOP - BOTTOM

    def at(px: float, py: float) -> tuple[float, float]:
        return LEFT + wide * x.share(px), TOP + high * (1 - y.share(py))

    parts = [f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(title)}">']
    for value in y.ticks():
        _, py = at(x.low, value)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{width - RIGHT}" y1="{py:.1f}" y2="{py:.1f}"/>')
        parts.append(_text(LEFT - 8, py + 4, y.show(value), "end"))
    for value in x.ticks():
        px, _ = at(value, y.low)
        parts.append(f'<line class="axis" x1="{px:.1f}" x2="{px:.1f}" y1="{TOP + high}" y2="{TOP + high + 4}"/>')
        parts.append(_text(px, TOP + high + 18, x.show(value), "middle"))
    parts.append(f'<line class="axis" x1="{LEFT}" x2="{width - RIGHT}" y1="{TOP + high}" y2="{TOP + high}"/>')
    parts.append(_text(LEFT + wide / 2, height - 6, x.title, "middle"))
    parts.append(f'<g transform="translate(14 {TOP + high / 2:.0f}) rotate(-90)">{_text(0, 0, y.title, "middle")}</g>')
    for line in lines:
        points = " ".join(f"{px:.1f},{py:.1f}" for px, py in (at(*point) for point in line.points))
        parts.append(
            f'<polyline class="curve {line.style}" points="{points}"><title>{escape(line.title)}</title></polyline>'
        )
    for level, word in (*rules, *bounds):
        _, py = at(x.low, level)
        parts.append(f'<line class="rule" x1="{LEFT}" x2="{width - RIGHT}" y1="{py:.1f}" y2="{py:.1f}"/>')
        in_margin = (level, word) in rules
        parts.append(
            _text(width - RIGHT + 6, py + 4, word, "start")
            if in_margin
            else _text(LEFT + 6, py + 14, word, "start", "label halo")
        )
    for px, py, word in marks:
        cx, cy = at(px, py)
        parts.append(f'<circle class="mark" cx="{cx:.1f}" cy="{cy:.1f}" r="4"><title>{escape(word)}</title></circle>')
    parts.append("</svg>")
    return "\n".join(parts)


@dataclass(frozen=True, slots=True)
class Cell:
    """One field of a heatmap: how strong its color is, from 0 to 1, what stands in it, and what a pointer reads."""

    row: int
    column: int
    strength: float
    word: str
    title: str


def heatmap(rows: Sequence[str], columns: Sequence[str], cells: Sequence[Cell], *, title: str) -> str:
    """A matrix of colored fields, rows from the top. Words stand in the fields only while these are wide enough."""
    left = 12 + 7 * max((len(row) for row in rows), default=0)
    top = 20
    wide, high = min(110, max(26, 900 // max(1, len(columns)))), 20
    width, height = left + wide * len(columns) + 8, top + high * len(rows) + 8
    parts = [
        f'<svg viewBox="0 0 {width} {height}" style="max-width:{width}px" role="img" aria-label="{escape(title)}">'
    ]
    for i, row in enumerate(rows):
        parts.append(_text(left - 6, top + high * i + 14, row, "end"))
    every = max(1, math.ceil(7 * max((len(column) for column in columns), default=1) / wide))
    for j, column in enumerate(columns):
        if j % every == 0:
            parts.append(_text(left + wide * j + wide / 2, top - 6, column, "middle"))
    for cell in cells:
        px, py, strength = left + wide * cell.column, top + high * cell.row, min(1.0, max(0.0, cell.strength))
        ink = "on" if strength > 0.6 else "off"
        parts.append(
            f'<g class="cell {ink}"><title>{escape(cell.title)}</title>'
            f'<rect class="paper" x="{px}" y="{py}" width="{wide - 2}" height="{high - 2}"/>'
            f'<rect class="ink" x="{px}" y="{py}" width="{wide - 2}" height="{high - 2}" opacity="{strength:.3f}"/>'
            + (_text(px + wide / 2 - 1, py + 13, cell.word, "middle") if 7 * len(cell.word) <= wide else "")
            + "</g>"
        )
    parts.append("</svg>")
    return "\n".join(parts)


def _text(x: float, y: float, word: str, anchor: str, style: str = "label") -> str:
    return f'<text class="{style}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(word)}</text>'


def _round_step(step: float) -> float:
    """The next of 1, 2, 5 times a power of ten."""
    if step <= 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(step))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= step * (1 - 1e-9))
