"""Geometry of the charts: where each line, mark and label stands.  The template turns it into SVG.

Coordinates are those of a viewBox `WIDTH` wide, which the browser scales to the column.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

__all__ = ["Bars", "Lines", "Series", "bars", "lines", "thin", "ticks"]

WIDTH, HEIGHT = 480, 240
LEFT, RIGHT, TOP, BOTTOM = 56, 12, 12, 34
MAX_POINTS = 400  # of a line: more than the column has pixels to tell apart
ROW = 24
BAR_LEFT = 92
COLOURS = 12  # those of page.css
TINY = 1e-100
Z95 = 1.96  # standard errors on either side of a mean that hold 95 % of a normal distribution


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Series:
    """A named line of (x, y, standard error or None)."""

    name: str
    points: Sequence[tuple[float, float, float | None]]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Mark:
    """A point with the ends of its interval (equal to y without one) and what a pointer shows there."""

    x: float
    y: float
    low: float
    high: float
    title: str


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    name: str
    colour: int
    path: str
    marks: tuple[Mark, ...]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Tick:
    place: float
    text: str


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Lines:
    """A line chart."""

    title: str
    height: int
    lines: tuple[Line, ...]
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    x: float
    width: float
    colour: int
    title: str


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Bar:
    y: float
    label: str
    pieces: tuple[Piece, ...]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Bars:
    """Horizontal stacked bars; `legend` is (name, colour), `line` the x of a measured value."""

    title: str
    height: int
    rows: tuple[Bar, ...]
    legend: tuple[tuple[str, int], ...]
    x_ticks: tuple[Tick, ...]
    line: float | None


def thin(points: Sequence[tuple[int, float]], limit: int = MAX_POINTS) -> list[tuple[float, float]]:
    """At most `limit` points: of equal runs of neighbours the last step and the mean value."""
    size = math.ceil(len(points) / limit)
    if size <= 1:
        return [(float(step), value) for step, value in points]
    groups = [points[begin : begin + size] for begin in range(0, len(points), size)]
    return [(float(group[-1][0]), sum(value for _, value in group) / len(group)) for group in groups]


def ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round numbers (1, 2 or 5 times a power of ten apart) from at most `low` to at least `high`."""
    span = high - low
    if span <= abs(high) * 1e-9 or span < TINY:  # flat, as far as it can be drawn
        span = abs(high) if abs(high) > TINY else 1.0
        low, high = low - span / 2, high + span / 2
    raw = span / about
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= raw * 0.999)
    first, last = math.floor(low / step), math.ceil(high / step)
    return [float(f"{place * step:.12g}") for place in range(first, last + 1)]


def lines(title: str, series: Sequence[Series], *, share: bool = False) -> Lines:
    """A line chart over steps; `share`: values from 0 to 1, shown in per cent."""
    points = [point for one in series for point in one.points]
    lows, highs = zip(*(interval(value, error, share) for _, value, error in points), strict=True)
    y_values = ticks(0, 1) if share else ticks(min(lows), max(highs))
    x_low, x_high = min(p[0] for p in points), max(p[0] for p in points)
    x_values = [place for place in ticks(x_low, x_high) if x_low <= place <= x_high and place == int(place)]
    x_values = x_values or [x_low]

    def x(step: float) -> float:
        return round(LEFT + (WIDTH - LEFT - RIGHT) * (0.5 if x_high == x_low else (step - x_low) / (x_high - x_low)), 1)

    def y(value: float) -> float:
        return round(TOP + (HEIGHT - TOP - BOTTOM) * (y_values[-1] - value) / (y_values[-1] - y_values[0]), 1)

    drawn = []
    for colour, one in enumerate(series):
        marks = []
        for step, value, error in one.points:
            low, high = interval(value, error, share)
            marks.append(
                Mark(
                    x=x(step),
                    y=y(value),
                    low=y(low),
                    high=y(high),
                    title=f"{one.name}, step {step:,.0f}: {shown(value, share)}"
                    + (f" ± {shown(error, share)}" if error else ""),
                )
            )
        path = " ".join(f"{mark.x},{mark.y}" for mark in marks)
        drawn.append(Line(name=one.name, colour=colour % COLOURS, path=path, marks=tuple(marks)))
    return Lines(
        title=title,
        height=HEIGHT,
        lines=tuple(drawn),
        x_ticks=tuple(Tick(place=x(step), text=f"{step:,.0f}") for step in x_values),
        y_ticks=tuple(Tick(place=y(value), text=shown(value, share, tick=True)) for value in y_values),
    )


def interval(value: float, error: float | None, share: bool) -> tuple[float, float]:
    """The 95 % interval of a mean, mean ± 1.96 standard errors; of a share within 0 to 1."""
    reach = Z95 * (error or 0.0)
    low, high = value - reach, value + reach
    return (max(0.0, low), min(1.0, high)) if share else (low, high)


def shown(value: float, share: bool, *, tick: bool = False) -> str:
    if share:
        return f"{value:.0%}" if tick else f"{value:.1%}"
    return f"{value:,.6g}" if tick else f"{value:,.4g}"


def bars(
    title: str, rows: Mapping[str, Mapping[str, float]], unit: str, *, line: float | None = None
) -> Bars:  # fmt: skip
    """Stacked horizontal bars, one a row; `line`: a value to draw across them."""
    names = list(dict.fromkeys(name for parts in rows.values() for name in parts))
    colours = {name: place % COLOURS for place, name in enumerate(names)}
    longest = max([sum(parts.values()) for parts in rows.values()] + [line or 0.0]) or 1.0
    scale = (WIDTH - BAR_LEFT - RIGHT) / longest
    drawn = []
    for place, (label, parts) in enumerate(rows.items()):
        x, pieces = float(BAR_LEFT), []
        for name, size in parts.items():
            width = max(0.0, size * scale)
            text = f"{label}: {name} {size:,.4g} {unit}"
            pieces.append(Piece(x=round(x, 1), width=round(width, 1), colour=colours[name], title=text))
            x += width
        drawn.append(Bar(y=TOP + place * ROW, label=label, pieces=tuple(pieces)))
    x_ticks = [value for value in ticks(0, longest, 4) if value <= longest]
    return Bars(
        title=title,
        height=TOP + ROW * len(rows) + BOTTOM,
        rows=tuple(drawn),
        legend=tuple(colours.items()),
        x_ticks=tuple(Tick(place=round(BAR_LEFT + v * scale, 1), text=f"{v:,.6g} {unit}") for v in x_ticks),
        line=None if line is None else round(BAR_LEFT + line * scale, 1),
    )
