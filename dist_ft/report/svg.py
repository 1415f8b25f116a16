"""Plots as SVG: lines, bars and a grid of coloured cells, all with labelled axes and units.

Colours are those of Okabe and Ito (2008), told apart by all common kinds of colour blindness;
lines differ in their dashes too. Shades of a value follow cividis (Nunez et al. 2018).
"""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

WIDTH, LEFT, RIGHT, TOP, BOTTOM = 760, 76, 20, 16, 46
LINE_HEIGHT = 18
_LARGEST = 1e300
_DASHES = ("", "7 3", "2 3", "9 3 2 3", "4 4", "12 4")
COLORS = 6  # classes c0 .. c5 of the style below
SHADES = ("#00224e", "#123570", "#3b496c", "#575d6d", "#707173",
          "#8a8678", "#a59c74", "#c3b369", "#e1cc55", "#fee838")  # fmt: skip
STYLE = """
.c0{--c:#0072b2}.c1{--c:#d55e00}.c2{--c:#009e73}.c3{--c:#cc79a7}.c4{--c:#b8860b}.c5{--c:#56b4e9}
svg{--ink:#222;--faint:#8884;--frozen:#8882;font:12px system-ui,sans-serif}
@media (prefers-color-scheme:dark){svg{--ink:#ddd}
.c0{--c:#4aa8e0}.c1{--c:#f0863a}.c2{--c:#2fc79b}.c3{--c:#e3a0c8}.c4{--c:#e6b84a}.c5{--c:#8fd0f5}}
svg text{fill:var(--ink)}.axis{stroke:var(--ink)}.grid{stroke:var(--faint)}
.mark{stroke:var(--ink);stroke-dasharray:2 4;opacity:.6}
.line{fill:none;stroke:var(--c);stroke-width:2}.thin .line{stroke-width:1}
.dot{fill:var(--c)}.bar{fill:var(--c)}.frozen{fill:var(--frozen)}.on{fill:var(--c)}
@media print{svg{--ink:#000}}
"""


@dataclass(frozen=True)
class Line:
    """A named curve; `color` by default its place; thin beside a thick one of that colour."""

    name: str
    points: Sequence[tuple[float, float]]
    color: int | None = None
    thin: bool = False

    def look(self, index: int) -> tuple[str, str]:
        """Return the classes and the dashes of the line at a place; no two places look alike."""
        number = index if self.color is None else self.color
        dashes = _DASHES[(number + number // COLORS) % len(_DASHES)]
        return f"c{number % COLORS}{' thin' if self.thin else ''}", dashes


@dataclass(frozen=True)
class Plot:
    """A finished picture.

    Attributes:
        slug: File name without its ending.
        title: What it shows.
        body: The SVG element.
    """

    slug: str
    title: str
    body: str

    def standalone(self) -> str:
        """Return the SVG as a file of its own."""
        return self.body.replace(">", f"><style>{STYLE}</style>", 1)


@dataclass(frozen=True)
class Axes:
    """What is written beside a plot.

    Attributes:
        x: Label of the horizontal axis, with its unit.
        y: Label of the vertical axis, with its unit.
        marks: Positions of vertical lines and what they mean.
        from_zero: Whether the vertical axis begins at 0.
        log: Whether the vertical axis is logarithmic.
    """

    x: str
    y: str
    marks: Sequence[tuple[float, str]] = field(default=())
    from_zero: bool = False
    log: bool = False

    def label(self, low: float, high: float) -> str:
        """Return the horizontal axis' label, with what the vertical lines between two ends are."""
        seen = any(low < place <= high for place, _ in self.marks)
        return f"{self.x} (dotted lines: phase changes)" if seen else self.x


@dataclass(frozen=True)
class _Scale:
    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        span = self.high - self.low or 1.0
        return self.start + (value - self.low) / span * (self.end - self.start)


def line_plot(slug: str, title: str, lines: Sequence[Line], axes: Axes) -> Plot | None:
    """Return a plot of curves, or None if there is no point."""
    finite = [replace(line, points=[p for p in line.points if drawable(*p)]) for line in lines]
    drawn = [line for line in finite if line.points]
    if not drawn:
        return None
    title = left_out(title, sum(map(_size, lines)) - sum(map(_size, drawn)))
    xs = [x for line in drawn for x, _ in line.points]
    log = axes.log and all(y > 0 for line in drawn for _, y in line.points)
    legend = _legend_rows(drawn)
    height = 230 + TOP + BOTTOM + LINE_HEIGHT * legend
    top = TOP + LINE_HEIGHT * legend
    ys = [_log(y, log=log) for line in drawn for _, y in line.points]
    low, high = (min(0.0, *ys) if axes.from_zero else min(ys)), max(ys)
    if low == high:
        low, high = low - (abs(low) * 0.1 or 0.5), high + (abs(high) * 0.1 or 0.5)
    left_x, right_x = min(0.0, *xs), max(*xs, 1.0)
    x = _Scale(left_x, right_x, LEFT, WIDTH - RIGHT)
    y = _Scale(low, high, height - BOTTOM, top)
    parts = _frame(x, y, axes=axes, height=height, log=log)
    for index, line in enumerate(drawn):
        look, dash = line.look(index)
        path = " ".join(f"{x(a):.1f},{y(_log(b, log=log)):.1f}" for a, b in line.points)
        parts.append(
            f"<g class='{look}'><polyline class='line' stroke-dasharray='{dash}' points='{path}'/>"
        )
        if len(line.points) <= 40 and not line.thin:
            parts += [
                f"<circle class='dot' cx='{x(a):.1f}' cy='{y(_log(b, log=log)):.1f}' r='3'>"
                f"<title>{html.escape(line.name)}: {tick(b)} at {tick(a)}</title></circle>"
                for a, b in line.points
            ]
        parts.append("</g>")
    parts += _legend(drawn)
    return Plot(slug, title, _svg(title, parts, height=height))


def _size(line: Line) -> int:
    return len(line.points)


def bar_plot(
    slug: str, title: str, rows: Sequence[tuple[str, Sequence[float]]], *, names: Sequence[str],
    axes: Axes,
) -> Plot | None:  # fmt: skip
    """Return groups of vertical bars: for each row its label and one value for each name."""
    drawn = [v for _, values in rows for v in values if drawable(v)]
    if not any(drawn):
        return None
    title = left_out(title, sum(len(values) for _, values in rows) - len(drawn))
    lines = [Line(name, [(0, 0)]) for name in names]
    legend = _legend_rows(lines)
    height = 210 + TOP + BOTTOM + LINE_HEIGHT * legend
    top = max(drawn)
    y = _Scale(0.0, top or 1.0, height - BOTTOM, TOP + LINE_HEIGHT * legend)
    parts = _vertical(y, axes=axes, height=height, log=False)
    slot = (WIDTH - LEFT - RIGHT) / len(rows)
    width = min(60.0, 0.8 * slot / len(names))
    for index, (label, values) in enumerate(rows):
        begin = LEFT + slot * index + (slot - width * len(names)) / 2
        for number, value in enumerate(values):
            if not drawable(value):
                continue
            parts.append(
                f"<rect class='bar c{number % COLORS}' x='{begin + number * width:.1f}' "
                f"y='{y(value):.1f}' width='{width - 1:.1f}' height='{y(0) - y(value):.1f}'>"
                f"<title>{html.escape(names[number])}, {html.escape(label)}: {tick(value)}</title>"
                "</rect>"
            )
        if len(rows) <= 24 or index % (len(rows) // 12) == 0:
            middle = LEFT + slot * (index + 0.5)
            parts.append(_text(middle, height - BOTTOM + 16, label, anchor="middle"))
    parts.append(_text((LEFT + WIDTH - RIGHT) / 2, height - 8, axes.x, anchor="middle"))
    parts += _legend(lines)
    return Plot(slug, title, _svg(title, parts, height=height))


@dataclass(frozen=True)
class Cell:
    """A stretch of a row: from, to, its class or fill, and what it says."""

    start: float
    end: float
    paint: str
    says: str


def grid_plot(
    slug: str, title: str, rows: Sequence[tuple[str, Sequence[Cell]]], *, axes: Axes,
    key: Sequence[tuple[str, str]],
) -> Plot | None:  # fmt: skip
    """Return rows of coloured stretches, the first row at the bottom.

    Args:
        slug: File name.
        title: What it shows.
        rows: Label and stretches.
        axes: Labels.
        key: Paint and meaning of the legend's entries.
    """
    if not rows or not any(cells for _, cells in rows):
        return None
    step = 20.0 if len(rows) <= 20 else max(7.0, 420.0 / len(rows))
    left = LEFT + 24
    height = int(TOP + LINE_HEIGHT * 1.5 + step * len(rows) + BOTTOM)
    bottom = height - BOTTOM
    last = max(c.end for _, cells in rows for c in cells) or 1.0
    x = _Scale(0.0, last, left, WIDTH - RIGHT)
    parts: list[str] = []
    every = 1 if step >= 12 else math.ceil(12 / step)
    for index, (label, cells) in enumerate(rows):
        y = bottom - step * (index + 1)
        if index % every == 0:
            parts.append(_text(left - 6, y + step / 2 + 4, label, anchor="end"))
        for cell in cells:
            paint = f"fill='{cell.paint}'" if cell.paint[0] == "#" else f"class='{cell.paint}'"
            wide = max(0.6, x(cell.end) - x(cell.start))
            parts.append(
                f"<rect {paint} x='{x(cell.start):.1f}' y='{y + 0.5:.1f}' width='{wide:.1f}' "
                f"height='{step - 1:.1f}'><title>{html.escape(label)}: {html.escape(cell.says)}"
                "</title></rect>"
            )
    parts += [_text(x(v), bottom + 16, tick(v), anchor="middle") for v in ticks(0.0, last)]
    parts += [_mark(x(place), TOP + LINE_HEIGHT, bottom, says) for place, says in axes.marks]
    says = axes.label(0.0, last)
    parts.append(_text((left + WIDTH - RIGHT) / 2, height - 8, says, anchor="middle"))
    at = left
    for paint, meaning in key:
        look = f"fill='{paint}'" if paint[0] == "#" else f"class='{paint}'"
        parts.append(f"<rect {look} x='{at}' y='6' width='14' height='12'/>")
        if meaning:
            parts.append(_text(at + 18, 16, meaning))
        at += 18 + (7 * len(meaning) if meaning else -4)
    return Plot(slug, title, _svg(title, parts, height=height))


def drawable(*values: float) -> bool:
    """Return whether values have a place on an axis; the span of two must be finite, too."""
    return all(abs(value) < _LARGEST for value in values)


def left_out(title: str, count: int) -> str:
    """Return the title with how many points are not drawn, if any."""
    return f"{title} (not finite and left out: {count})" if count else title


def shade(value: float, *, low: float, high: float) -> str:
    """Return the colour of a value between two others, by their logarithms."""
    if value <= 0 or high <= 0 or low <= 0:
        return SHADES[0]
    span = math.log(high / low) or 1.0
    place = math.log(max(value, low) / low) / span
    return SHADES[min(len(SHADES) - 1, max(0, int(place * len(SHADES))))]


def ticks(low: float, high: float, *, count: int = 5) -> list[float]:
    """Return round values between two others."""
    span = (high - low) or 1.0
    raw = span / count
    unit = 10 ** math.floor(math.log10(raw))
    step = next(m * unit for m in (1, 2, 2.5, 5, 10) if m * unit >= raw)
    first = math.ceil(low / step - 1e-9)
    return [i * step for i in range(first, math.floor(high / step + 1e-9) + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    """Return the logarithms of 1, 2 and 5 times powers of ten, fewer where there are many."""
    powers = range(math.floor(low), math.ceil(high) + 1)
    digits = (1, 2, 5) if high - low < 2 else (1, 3) if high - low < 4 else (1,)
    found = [power + math.log10(digit) for power in powers for digit in digits]
    return [value for value in found if low <= value <= high]


def tick(value: float) -> str:
    """Return a number as short as it can be read."""
    if value == 0:
        return "0"
    size = abs(value)
    if size >= 1e6 or size < 1e-3:
        return f"{value:.3g}"
    return f"{value:,.0f}" if size >= 1000 and value == int(value) else f"{value:,.4g}"


def _log(value: float, *, log: bool) -> float:
    return math.log10(value) if log else value


def _frame(x: _Scale, y: _Scale, *, axes: Axes, height: int, log: bool) -> list[str]:
    parts = _vertical(y, axes=axes, height=height, log=log)
    bottom = height - BOTTOM
    for value in ticks(x.low, x.high, count=7):
        parts.append(_text(x(value), bottom + 16, tick(value), anchor="middle"))
    says = axes.label(x.low, x.high)
    parts.append(_text((LEFT + WIDTH - RIGHT) / 2, height - 8, says, anchor="middle"))
    parts += [
        _mark(x(place), y.end, bottom, meaning)
        for place, meaning in axes.marks
        if x.low < place <= x.high
    ]
    return parts


def _vertical(y: _Scale, *, axes: Axes, height: int, log: bool) -> list[str]:
    bottom = height - BOTTOM
    parts = []
    for value in _log_ticks(y.low, y.high) if log else ticks(y.low, y.high):
        shown = tick(float(f"{10**value:.1g}") if log else value)
        parts.append(
            f"<line class='grid' x1='{LEFT}' x2='{WIDTH - RIGHT}' y1='{y(value):.1f}' "
            f"y2='{y(value):.1f}'/>"
        )
        parts.append(_text(LEFT - 6, y(value) + 4, shown, anchor="end"))
    parts.append(
        f"<line class='axis' x1='{LEFT}' x2='{WIDTH - RIGHT}' y1='{bottom}' y2='{bottom}'/>"
    )
    middle = (y.end + bottom) / 2
    parts.append(
        f"<text transform='translate(14 {middle:.0f}) rotate(-90)' text-anchor='middle'>"
        f"{html.escape(axes.y)}</text>"
    )
    return parts


def _mark(x: float, top: float, bottom: float, meaning: str) -> str:
    return (
        f"<line class='mark' x1='{x:.1f}' x2='{x:.1f}' y1='{top:.1f}' y2='{bottom:.1f}'>"
        f"<title>{html.escape(meaning)}</title></line>"
    )


def _legend_places(lines: Sequence[Line]) -> list[tuple[float, int]]:
    places, at, row = [], float(LEFT), 0
    for line in lines:
        wide = 46 + 7.2 * len(line.name)
        if at + wide > WIDTH and at > LEFT:
            at, row = float(LEFT), row + 1
        places.append((at, row))
        at += wide
    return places


def _legend_rows(lines: Sequence[Line]) -> int:
    return _legend_places(lines)[-1][1] + 1


def _legend(lines: Sequence[Line]) -> list[str]:
    parts = []
    for index, (line, (x, row)) in enumerate(zip(lines, _legend_places(lines), strict=True)):
        look, dash = line.look(index)
        y = 12 + LINE_HEIGHT * row
        parts.append(
            f"<g class='{look}'><line class='line' stroke-dasharray='{dash}' x1='{x:.0f}' "
            f"x2='{x + 26:.0f}' y1='{y}' y2='{y}'/></g>"
        )
        parts.append(_text(x + 31, y + 4, line.name))
    return parts


def _text(x: float, y: float, text: str, *, anchor: str = "start") -> str:
    return f"<text x='{x:.1f}' y='{y:.1f}' text-anchor='{anchor}'>{html.escape(text)}</text>"


def _svg(title: str, parts: Sequence[str], *, height: int) -> str:
    return (
        f"<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 {WIDTH} {height}' role='img' "
        f"aria-label='{html.escape(title, quote=True)}'>{''.join(parts)}</svg>"
    )
