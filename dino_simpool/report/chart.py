"""Line charts as SVG text: no plotting library, sharp at any size, colors from the style sheet.

A chart shows a few series over the steps, horizontal lines for comparison, and the value of a point
when the mouse is over it. Long series are shortened to the means of neighboring points.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

from dino_simpool.report.page import escape

Point = tuple[float, float]
Place = Callable[[float, float], Point]
"""(step, value) -> (x, y) in the SVG."""

WIDTH, HEIGHT = 360, 220
LEFT, RIGHT, TOP, BOTTOM = 44, 74, 12, 30
"""Margins around the plot; names and last values are on the right."""
MAX_POINTS = 120
"""Most points of a line."""


def line_chart(series: Mapping[str, Sequence[Point]], *, references: Mapping[str, float] | None = None) -> str:
    """An <svg> of the series, name -> (step, value) points; at least one series must have a point.

    references: name -> value of a horizontal dashed line.
    """
    lines = {name: shorten(points) for name, points in series.items() if points}
    references = references or {}
    values = [y for points in lines.values() for _, y in points] + list(references.values())
    last = max(x for points in lines.values() for x, _ in points) or 1
    y_ticks = nice_ticks(min(values), max(values))
    low, high = y_ticks[0], y_ticks[-1]

    def place(x: float, y: float) -> Point:
        return LEFT + (WIDTH - LEFT - RIGHT) * x / last, TOP + (HEIGHT - TOP - BOTTOM) * (high - y) / (high - low)

    x_ticks = [tick for tick in nice_ticks(0, last, count=4) if tick <= last]
    parts, ends = [_grid(x_ticks, y_ticks, place)], []
    for name, value in references.items():
        x, y = place(last, value)
        parts.append(f'<line class="reference" x1="{LEFT}" x2="{x:.1f}" y1="{y:.1f}" y2="{y:.1f}"/>')
        ends.append((y, name, value, ""))
    for number, (name, points) in enumerate(lines.items(), 1):
        parts.append(_line(name, points, place, f"s{number}"))
        ends.append((place(*points[-1])[1], name, points[-1][1], f"s{number}"))
    parts.append(_end_labels(ends))
    label = escape("; ".join(f"{name}: last {short(points[-1][1])}" for name, points in lines.items()))
    return f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}">{"".join(parts)}</svg>'


def shorten(points: Sequence[Point]) -> list[Point]:
    """At most MAX_POINTS points: means over runs of equal length, and the last point itself."""
    run = math.ceil((len(points) - 1) / (MAX_POINTS - 1)) if len(points) > MAX_POINTS else 1
    if run == 1:
        return list(points)
    means = []
    for start in range(0, len(points) - 1, run):
        part = points[start : min(start + run, len(points) - 1)]
        means.append((sum(x for x, _ in part) / len(part), sum(y for _, y in part) / len(part)))
    return [*means, points[-1]]


def nice_ticks(low: float, high: float, *, count: int = 5) -> list[float]:
    """About `count` (at least two) multiples of 1, 2 or 5 times a power of ten, low to high."""
    if high - low <= 1e-9 * max(abs(low), abs(high)):  # a single value: leave room on both sides
        room = abs(high) * 0.1 or 1.0
        low, high = low - room, high + room
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw * (1 - 1e-9))
    return [number * step for number in range(math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9) + 1)]


def short(value: float) -> str:
    """A number for display: 12000 as 12k, 0.00005 as 5e-5, others with three significant digits."""
    if value and abs(value) < 1e-2:
        digits, exponent = f"{value:.1e}".split("e")
        return f"{digits.removesuffix('.0')}e{int(exponent)}"
    if abs(value) >= 1e4:
        return f"{value / 1e6:.3g}M" if abs(value) >= 1e6 else f"{value / 1e3:.3g}k"
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _grid(x_ticks: Sequence[float], y_ticks: Sequence[float], place: Place) -> str:
    parts = []
    for tick in y_ticks:
        y = place(0, tick)[1]
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{short(tick)}</text>')
    for tick in x_ticks:
        x = place(tick, y_ticks[0])[0]
        parts.append(f'<text x="{x:.1f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{short(tick)}</text>')
    parts.append(f'<text x="{WIDTH - RIGHT + 8}" y="{HEIGHT - BOTTOM + 16}">steps</text>')
    return "".join(parts)


def _line(name: str, points: Sequence[Point], place: Place, style: str) -> str:
    """The line, a dot at its end, and on each point an invisible disc with its value as tooltip."""
    placed = [place(*point) for point in points]
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in placed)
    parts = [f'<polyline class="line {style}" points="{path}"/>']
    parts.append(f'<circle class="end {style}" cx="{placed[-1][0]:.1f}" cy="{placed[-1][1]:.1f}" r="3"/>')
    for (x, y), (step, value) in zip(placed, points, strict=True):
        said = escape(f"{name}, step {step:.0f}: {short(value)}")
        parts.append(f'<circle class="hit" cx="{x:.1f}" cy="{y:.1f}" r="5"><title>{said}</title></circle>')
    return "".join(parts)


def _end_labels(ends: Sequence[tuple[float, str, float, str]]) -> str:
    """Name and last value at the end of each line (y, name, value, style), without overlap."""
    x, space, lowest = WIDTH - RIGHT + 8, 24, HEIGHT - BOTTOM - 14
    ordered = sorted(ends)
    heights: list[float] = []
    for y, *_ in ordered:
        heights.append(max(y, heights[-1] + space if heights else TOP + 6))
    for i in reversed(range(len(heights))):  # move up again if the last ones are below the plot
        heights[i] = min(heights[i], lowest - space * (len(heights) - 1 - i))
    parts = []
    for y, (_, name, value, style) in zip(heights, ordered, strict=True):
        parts.append(f'<text class="strong {style}" x="{x}" y="{y:.1f}">{short(value)}</text>')
        parts.append(f'<text x="{x}" y="{y + 11:.1f}">{escape(name)}</text>')
    return "".join(parts)
