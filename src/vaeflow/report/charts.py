"""Charts as SVG that says its values: under the pointer, to a screen reader, and in a table below.

Colours and type are those of the page: see `page.html`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from markupsafe import Markup, escape

WIDTH, HEIGHT = 640, 260
LEFT, RIGHT, TOP, BOTTOM = 88, 12, 12, 40
ROW, NAMES = 26, 270  # of bars: their height and what their names take
MOST_MARKED = 200  # points of a line that are marked one by one
MOST_BINS = 40


class Chart(NamedTuple):
    """A chart, and its values as a table: a header and rows."""

    svg: Markup
    header: Sequence[str]
    rows: Sequence[Sequence[str]]


class Bar(NamedTuple):
    """A bar: its name, its value, how far that may be off, and another value to mark beside it."""

    name: str
    value: float
    error: float = 0.0
    mark: float | None = None


def lines(title: str, x: str, y: str, series: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> Chart:
    """Draw lines over one axis.

    Args:
        title: what a screen reader calls it.
        x, y: of the axes.
        series: by name, places and values, `(points,)` each; what is no number is left out.
    """
    finite = {name: (px[np.isfinite(py)], py[np.isfinite(py)]) for name, (px, py) in series.items()}
    places = np.concatenate([px for px, _ in finite.values()])
    values = np.concatenate([py for _, py in finite.values()])
    across, up = _Scale.of(places, LEFT, WIDTH - RIGHT), _Scale.of(values, HEIGHT - BOTTOM, TOP)
    parts = [_axes(across, up, x, y)]
    for number, (name, (px, py)) in enumerate(finite.items()):
        points = " ".join(f"{across(a):.1f},{up(b):.1f}" for a, b in zip(px, py, strict=True))
        parts.append(Markup('<polyline class="line s{}" points="{}"/>').format(number, points))
        if len(px) <= MOST_MARKED:
            parts += [
                Markup(
                    '<circle class="dot s{}" cx="{}" cy="{}" r="5"><title>{}</title></circle>'
                ).format(
                    number, f"{across(a):.1f}", f"{up(b):.1f}", f"{name}, {x} {a:g}: {said(b)}"
                )
                for a, b in zip(px, py, strict=True)
            ]
    names = list(series)
    every = sorted(set(places.tolist()))
    found = [dict(zip(px.tolist(), py.tolist(), strict=True)) for px, py in finite.values()]
    rows = [[f"{at:g}", *(said(of[at]) if at in of else "" for of in found)] for at in every]
    return Chart(_svg(title, HEIGHT, parts, names), [x, *names], rows)


def bars(
    title: str, of: str, rows: Sequence[Bar], low: float = 0.0, high: float | None = None
) -> Chart:
    """Draw a bar a row, from left to right, with its name and its value.

    Args:
        title: what a screen reader calls it.
        of: what the values are.
        rows: from above.
        low, high: the ends of the axis; by default 0 and the largest value.
    """
    high = max([bar.value for bar in rows] + [low + 1e-9]) if high is None else high
    across = _Scale(low, high, NAMES, WIDTH - 70)
    parts, table = [], []
    for number, bar in enumerate(rows):
        top = number * ROW
        end = across(min(max(bar.value, low), high))
        text = said(bar.value) + (f" ± {said(bar.error)}" if bar.error else "")
        tip = f"{bar.name}: {text}" + ("" if bar.mark is None else f"; marked: {said(bar.mark)}")
        parts.append(
            Markup(
                '<g><title>{}</title><text class="name" x="{}" y="{}">{}</text>'
                '<rect class="bar" x="{}" y="{}" width="{}" height="{}"/>'
            ).format(
                tip, NAMES - 8, top + 17, bar.name, NAMES, top + 4, f"{end - NAMES:.1f}", ROW - 8
            )
        )
        if bar.mark is not None:
            at = f"{across(min(max(bar.mark, low), high)):.1f}"
            parts.append(
                Markup('<line class="mark" x1="{}" x2="{}" y1="{}" y2="{}"/>').format(
                    at, at, top + 1, top + ROW - 1
                )
            )
        parts.append(
            Markup('<text class="value" x="{}" y="{}">{}</text></g>').format(
                f"{max(end, across(bar.mark or low)) + 6:.1f}", top + 17, said(bar.value)
            )
        )
        table.append([bar.name, text, *([] if bar.mark is None else [said(bar.mark)])])
    marked = any(bar.mark is not None for bar in rows)
    return Chart(
        _svg(title, ROW * len(rows) + 4, parts, []),
        ["", of, *(["marked"] if marked else [])],
        table,
    )


def histogram(
    title: str, x: str, values: Mapping[str, np.ndarray], line: float | None = None
) -> Chart:
    """Draw how values are spread, as shares of each group; few values get few bins.

    Args:
        title: what a screen reader calls it.
        x: what the values are.
        values: by name, `(count,)`.
        line: where to draw a line across, such as a threshold.
    """
    together = np.concatenate([*values.values(), *([] if line is None else [[line]])])
    bins = int(np.clip(math.sqrt(min(map(len, values.values()))) + 1, 5, MOST_BINS))
    edges = np.histogram_bin_edges(together, bins=bins)
    shares = {name: np.histogram(of, edges)[0] / len(of) for name, of in values.items()}
    across = _Scale(float(edges[0]), float(edges[-1]), LEFT, WIDTH - RIGHT)
    up = _Scale(0, max(float(share.max()) for share in shares.values()), HEIGHT - BOTTOM, TOP)
    parts = [_axes(across, up, x, "share")]
    for number, (name, share) in enumerate(shares.items()):
        corners = [f"{across(edges[0]):.1f},{up(0):.1f}"]
        for left, right, height in zip(edges[:-1], edges[1:], share, strict=True):
            corners += [
                f"{across(left):.1f},{up(height):.1f}",
                f"{across(right):.1f},{up(height):.1f}",
            ]
            tip = f"{name}, {said(left)} to {said(right)}: {height:.1%}"
            parts.append(
                Markup(
                    '<rect class="hover" x="{}" y="{}" width="{}" height="{}">'
                    "<title>{}</title></rect>"
                ).format(
                    f"{across(left):.1f}",
                    f"{up(height):.1f}",
                    f"{across(right) - across(left):.1f}",
                    f"{max(0, up(0) - up(height)):.1f}",
                    tip,
                )
            )
        corners.append(f"{across(edges[-1]):.1f},{up(0):.1f}")
        parts.append(
            Markup('<polyline class="line s{}" points="{}"/>').format(number, " ".join(corners))
        )
    if line is not None:
        at = f"{across(line):.1f}"
        parts.append(
            Markup(
                '<line class="mark" x1="{}" x2="{}" y1="{}" y2="{}">'
                "<title>threshold: {}</title></line>"
            ).format(at, at, TOP, HEIGHT - BOTTOM, said(line))
        )
    rows = [
        [f"{said(left)} to {said(right)}", *(f"{share[number]:.1%}" for share in shares.values())]
        for number, (left, right) in enumerate(itertools.pairwise(edges.tolist()))
    ]
    return Chart(_svg(title, HEIGHT, parts, list(values)), [x, *values], rows)


class _Scale(NamedTuple):
    """Where on the drawing a number is."""

    low: float
    high: float
    start: float
    end: float

    @classmethod
    def of(cls, values: np.ndarray, start: float, end: float) -> _Scale:
        low, high = float(values.min()), float(values.max())
        return cls(low, high if high > low else low + 1, start, end)

    def __call__(self, value: float) -> float:
        share = (value - self.low) / ((self.high - self.low) or 1)
        return self.start + share * (self.end - self.start)

    def ticks(self) -> list[float]:
        """Return round numbers, some five."""
        step = 10 ** math.floor(math.log10((self.high - self.low) or 1))
        fitting = [
            step * factor
            for factor in (0.1, 0.2, 0.5, 1, 2)
            if (self.high - self.low) / (step * factor) <= 6
        ]
        step = fitting[0]
        first = math.ceil(self.low / step - 1e-9)
        last = math.floor(self.high / step + 1e-9)
        return [number * step for number in range(first, last + 1)]


def _axes(across: _Scale, up: _Scale, x: str, y: str) -> Markup:
    parts = []
    for value in up.ticks():
        at = f"{up(value):.1f}"
        parts.append(
            Markup(
                '<line class="grid" x1="{}" x2="{}" y1="{}" y2="{}"/>'
                '<text class="name" x="{}" y="{}" dy="4">{}</text>'
            ).format(LEFT, WIDTH - RIGHT, at, at, LEFT - 6, at, f"{value:,.6g}")
        )
    for value in across.ticks():
        parts.append(
            Markup('<text class="tick" x="{}" y="{}">{}</text>').format(
                f"{across(value):.1f}", HEIGHT - BOTTOM + 16, f"{value:,.6g}"
            )
        )
    parts.append(
        Markup(
            '<text class="tick" x="{}" y="{}">{}</text>'
            '<text class="tick" transform="translate(12 {}) rotate(-90)">{}</text>'
        ).format((LEFT + WIDTH) / 2, HEIGHT - 6, x, (HEIGHT - BOTTOM) / 2, y)
    )
    return Markup("").join(parts)


def _svg(title: str, height: float, parts: Sequence[Markup], names: Sequence[str]) -> Markup:
    legend = Markup("").join(
        Markup('<span class="key s{}">{}</span>').format(number, name)
        for number, name in enumerate(names)
    )
    return Markup(
        '<div class="legend">{}</div><svg viewBox="0 0 {} {}" role="img" aria-label="{}">{}</svg>'
    ).format(legend, WIDTH, height, escape(title), Markup("").join(parts))


def said(value: float) -> str:
    """Write a number with as many digits as are worth reading."""
    return f"{value:,.4g}" if abs(value) < 1_000 else f"{value:,.1f}"
