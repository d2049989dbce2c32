"""A few measurements beside each other as one SVG file: a bar each, its words before it and its figure behind it."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from flora.cli.bench_plot import PAGE_STYLE, short

_STYLE = ".bar { fill: #1264a3; } @media (prefers-color-scheme: dark) { .bar { fill: #7cc4ff; } }"
_WIDTH, _HEAD, _ROW, _BAR, _MARGIN = 640, 56, 34, 20, 16
_WORDS, _FIGURE = 220, 90  # room for a bar's words and for its figure


def draw_bars(title: str, unit: str, bars: Sequence[tuple[str, float]]) -> str:
    """The file's text. bars  words and value of each, from the top; values are not negative."""
    longest = max((value for _, value in bars), default=0.0) or 1.0
    height = _HEAD + _ROW * len(bars) + 8
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" width="{_WIDTH}" height="{height}">',
        f"<title>{escape(title)}</title><style>{PAGE_STYLE}{_STYLE}</style>",
        f'<rect class="paper" width="{_WIDTH}" height="{height}"/>',
        f'<text class="title" x="{_MARGIN}" y="26">{escape(title)}</text>',
        f'<text class="label" x="{_MARGIN}" y="44">{escape(unit)}</text>',
    ]
    for i, (words, value) in enumerate(bars):
        top, wide = _HEAD + _ROW * i, (_WIDTH - 2 * _MARGIN - _WORDS - _FIGURE) * value / longest
        left, middle = _MARGIN + _WORDS, top + _BAR / 2 + 4
        parts.append(f'<text class="label" x="{left - 10}" y="{middle}" text-anchor="end">{escape(words)}</text>')
        parts.append(f'<rect class="bar" x="{left}" y="{top}" width="{max(wide, 1):.1f}" height="{_BAR}"/>')
        parts.append(f'<text class="label" x="{left + wide + 8:.1f}" y="{middle}">{short(value)}</text>')
    return "\n".join([*parts, "</svg>\n"])
