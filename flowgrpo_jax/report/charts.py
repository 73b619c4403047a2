"""Line charts as inline SVG: no scripts, colours from the page's style sheet."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import SupportsFloat

from markupsafe import Markup

from flowgrpo_jax.report.templating import render

_TOP = 10  # pixels above the highest tick
_DIGIT = 6.5  # width of a character of an axis
_MOST_POINTS = 240


@dataclass(frozen=True)
class Series:
    """One line of a chart.

    Attributes:
      name: for the legend and the tooltips.
      points: (x, y), x rising; y that is not finite is left out.
      colour: 1 to 8, of the colours of the style sheet.
      noisy: draw a running mean and the raw values faintly behind it.
    """

    name: str
    points: Sequence[tuple[SupportsFloat, SupportsFloat]] = field(repr=False)
    colour: int = 1
    noisy: bool = False


def chart(
    title: str,
    series: Sequence[Series],
    x_label: str = "iteration",
    percent: bool = False,
    note: str = "",
) -> Markup:
    """A figure of HTML: title, first and last value, legend, SVG; "" without points."""
    shown = [line for line in map(_Line.of, series) if line.xs]
    if not shown:
        return Markup("")
    x_range = _x_range(shown)
    ticks = _ticks(*_y_range(shown, percent))
    step = ticks[1] - ticks[0]
    labels = [_label(tick, step, percent) for tick in ticks]
    left = 14 + _DIGIT * max(len(label) for label in labels)
    frame = _Frame(left, x_range, (ticks[0], ticks[-1]))
    return render(
        "chart.html.j2",
        title=title,
        note=note,
        x_label=x_label,
        frame=frame,
        x_ticks=[
            (frame.x(tick), f"{tick:g}")
            for tick in _ticks(*x_range)
            if x_range[0] <= tick <= x_range[1]
            if x_label != "iteration" or tick.is_integer()
        ],
        y_ticks=[
            (frame.y(tick), label) for tick, label in zip(ticks, labels, strict=True)
        ],
        lines=[_drawn(one, frame, step / 10, percent) for one in shown],
    )


def number(value: float, percent: bool = False) -> str:
    """The value with three significant digits, or as a percentage with one decimal."""
    if not math.isfinite(value):
        return str(value)
    if percent:
        return f"{100 * value:.1f}%"
    if value == 0 or 1e-3 <= abs(value) < 1e5:
        return f"{value:.3g}" if abs(value) < 100 else f"{value:,.0f}"
    return _exponent(value)


def _exponent(value: float) -> str:
    mantissa, exponent = f"{value:.1e}".split("e")
    return f"{float(mantissa):g}e{int(exponent)}"


def _label(value: float, step: float, percent: bool) -> str:
    """A value with as many decimals as multiples of `step` need."""
    if percent:
        return f"{100 * value:.{_decimals(100 * step)}f}%"
    if value == 0:
        return "0"
    if _decimals(step) > 3 and abs(value) < 0.1 or abs(value) >= 1e5:
        return _exponent(value)
    return f"{value:.{_decimals(step)}f}"


def _decimals(step: float) -> int:
    """How many decimals tell multiples of `step` apart: 1 for 0.5, 2 for 0.25."""
    text = f"{step:.1e}"
    return max(0, -int(text[4:]) + (text[2] != "0"))


@dataclass(frozen=True)
class _Line:
    """A series as floats, without points that are not finite."""

    name: str
    css: str
    noisy: bool
    xs: list[float]
    ys: list[float]

    @classmethod
    def of(cls, series: Series) -> "_Line":
        pairs = [(float(x), float(y)) for x, y in series.points]
        finite = [(x, y) for x, y in pairs if math.isfinite(y)]
        xs, ys = [x for x, _ in finite], [y for _, y in finite]
        return cls(series.name, f"c{series.colour}", series.noisy, xs, ys)


def _ends(line: _Line, step: float, percent: bool) -> str:
    """The first and the last value, of the running mean where the series is noisy."""
    values = _smooth(line.ys) if line.noisy else line.ys
    if percent:
        first, last = number(values[0], percent), number(values[-1], percent)
    else:
        first, last = _label(values[0], step, False), _label(values[-1], step, False)
    return first if len(values) == 1 else f"{first} → {last}"


def _x_range(lines: Sequence[_Line]) -> tuple[float, float]:
    xs = [x for line in lines for x in line.xs]
    return (min(xs), max(xs)) if max(xs) > min(xs) else (min(xs), min(xs) + 1)


def _y_range(lines: Sequence[_Line], percent: bool) -> tuple[float, float]:
    ys = [y for line in lines for y in line.ys]
    low, high = min(ys), max(ys)
    # A pad below 1e-9 would be lost when ticks are rounded.
    pad = max(0.05 * (high - low), 1e-9)
    if high == low:
        pad = max(abs(high) * 0.1, 1e-3)
    # The pad does not extend the axis below zero or above 100% if no value is there.
    bottom = max(low - pad, 0.0) if low >= 0 else low - pad
    top = min(high + pad, 1.0) if percent and high <= 1 else high + pad
    return bottom, top


def _ticks(low: float, high: float) -> list[float]:
    """About five round numbers; the first is at or below `low`, the last above."""
    raw = (high - low) / 4
    size = 10.0 ** math.floor(math.log10(raw))
    step = next(m * size for m in (1, 2, 2.5, 5, 10) if m * size >= raw * 0.999)
    first, last = math.floor(low / step + 1e-6), math.ceil(high / step - 1e-6)
    return [round(index * step, 12) for index in range(first, last + 1)]


@dataclass(frozen=True)
class _Frame:
    """Maps values to pixels; `left` is the x of the vertical axis."""

    left: float
    x_range: tuple[float, float]
    y_range: tuple[float, float]
    width: int = 440
    height: int = 220

    @property
    def right(self) -> int:
        return self.width - 12

    @property
    def bottom(self) -> int:
        return self.height - 34

    def x(self, value: float) -> float:
        low, high = self.x_range
        width = self.right - self.left
        return round(self.left + (value - low) / (high - low) * width, 1)

    def y(self, value: float) -> float:
        low, high = self.y_range
        height = self.bottom - _TOP
        return round(_TOP + (high - value) / (high - low) * height, 1)

    def path(self, css: str, xs: Sequence[float], ys: Sequence[float]) -> "_Path":
        return _Path(css, list(zip(map(self.x, xs), map(self.y, ys), strict=True)))


@dataclass(frozen=True)
class _Path:
    """A line through pixels (x, y); `css` says whether it is the raw one."""

    css: str
    points: list[tuple[float, float]]


@dataclass(frozen=True)
class _Drawn:
    """A series as the template wants it: legend, paths, and (x, y, text) of its dots."""

    name: str
    css: str
    ends: str
    paths: list[_Path]
    dots: list[tuple[float, float, str]]


def _drawn(line: _Line, frame: _Frame, step: float, percent: bool) -> _Drawn:
    xs, ys = line.xs, line.ys
    if line.noisy:
        raw = frame.path("raw", *_thin(xs, ys))
        smooth = frame.path("line", *_thin(xs, _smooth(ys)))
        paths, dots = [raw, smooth], []
    else:
        paths = [frame.path("line", xs, ys)]
        dots = [
            (frame.x(x), frame.y(y), f"at {x:g}: {number(y, percent)}")
            for x, y in zip(xs, ys, strict=True)
        ]
    return _Drawn(line.name, line.css, _ends(line, step, percent), paths, dots)


def _smooth(values: Sequence[float]) -> list[float]:
    """Mean over a centred window of about a fifteenth of the run."""
    half = len(values) // 30
    sums = [0.0]
    for value in values:
        sums.append(sums[-1] + value)
    means = []
    for index in range(len(values)):
        low, high = max(0, index - half), min(len(values), index + half + 1)
        means.append((sums[high] - sums[low]) / (high - low))
    return means


def _thin(xs: Sequence[float], ys: Sequence[float]) -> tuple[list[float], list[float]]:
    """Means of neighbouring points, so that the page of a long run is small too."""
    size = -(-len(xs) // _MOST_POINTS)
    starts = range(0, len(xs), size)

    def mean(values: Sequence[float]) -> float:
        return sum(values) / len(values)

    return (
        [mean(xs[start : start + size]) for start in starts],
        [mean(ys[start : start + size]) for start in starts],
    )
