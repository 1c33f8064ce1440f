"""Charts as inline SVG, for pages that need no network: lines over images seen or anything else, and shares of a whole.

Colours, fonts and the reading of values under the pointer come from the page (`templates/style.css`, `script.js`).
"""

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

from vaegan_dist.reporting.progress import short

WIDTH, HEIGHT = 440, 240
LEFT, RIGHT, TOP, BOTTOM = 48, 10, 10, 30
POINTS = 400
COLORS = 8


@dataclass(frozen=True)
class Series:
    """A named line; a value that is not finite is a gap."""

    name: str
    xs: Sequence[float]
    ys: Sequence[float]


@dataclass(frozen=True)
class Span:
    """A named part of the x axis."""

    name: str
    start: float
    end: float


@dataclass(frozen=True)
class LineChart:
    """Lines on common axes."""

    title: str
    unit: str
    series: Sequence[Series]
    x_label: str = "images seen"
    spans: Sequence[Span] = ()
    log: bool = False
    from_zero: bool = False
    limits: tuple[float, float] | None = None
    marks: Sequence[float] = ()
    """places on the x axis where something was not a finite number"""

    def svg(self) -> Markup:
        """The picture; its width is that of the place it stands in."""
        lines = [thinned(line) for line in _merged(self.series)]
        x_low, x_high = _range([x for line in lines for x in line.xs], spans=self.spans)
        scale = self._scale([y for line in lines for y in line.ys if math.isfinite(y)])
        place = _Plot(x_low, x_high, scale)
        parts = [
            *(_span(place, span, index) for index, span in enumerate(self.spans)),
            *_y_axis(place),
            *_x_axis(place),
            *(_line(place, line, index) for index, line in enumerate(lines)),
            *(_mark(place, x) for x in self.marks),
        ]
        body = Markup("").join(parts)
        label = f"{self.title}: {', '.join(line.name for line in lines)} over {self.x_label}"
        data = {"x": [x_low, x_high], "left": LEFT, "right": RIGHT, "width": WIDTH, "lines": list(map(_data, lines))}
        return Markup(
            '<svg class="chart" viewBox="0 0 {w} {h}" role="img" aria-label="{label}" data-chart="{data}">{body}'
            '<line class="cursor" y1="{top}" y2="{bottom}" visibility="hidden"></line></svg>'
        ).format(
            w=WIDTH, h=HEIGHT, label=label, data=json.dumps(data), body=body, top=TOP, bottom=HEIGHT - BOTTOM
        )  # fmt: skip

    def legend(self) -> list[tuple[int, str, str]]:
        """Colour number, name and last value of each line."""
        return [(index % COLORS, line.name, _last(line)) for index, line in enumerate(_merged(self.series))]

    def _scale(self, values: Sequence[float]) -> "_Scale":
        if self.limits:
            return _Scale(*self.limits, log=False)
        if not values:
            return _Scale(0.0, 1.0, log=False)
        low, high = min(values), max(values)
        if self.log and low > 0 and high > 10 * low:
            return _Scale(low, high, log=True)
        if self.from_zero and low >= 0:
            low = 0.0
        margin = 0.05 * (high - low) or 0.05 * abs(high) or 1.0
        return _Scale(low if low == 0.0 and self.from_zero else low - margin, high + margin, log=False)


@dataclass(frozen=True)
class _Scale:
    low: float
    high: float
    log: bool

    def share(self, value: float) -> float:
        """Where a value lies between the ends, 0 to 1."""
        if self.log:
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)

    def ticks(self) -> list[float]:
        """Round values between the ends."""
        if not self.log:
            return nice_ticks(self.low, self.high)
        exponents = range(math.ceil(math.log10(self.low) - 1e-9), math.floor(math.log10(self.high) + 1e-9) + 1)
        decades = [10.0**exponent for exponent in exponents]
        every = max(1, math.ceil(len(decades) / 5))
        return decades[::every] if len(decades) > 1 else [*decades, self.low, self.high]


@dataclass(frozen=True)
class _Plot:
    x_low: float
    x_high: float
    scale: _Scale

    def x(self, value: float) -> float:
        """A value's place on the picture."""
        share = (value - self.x_low) / ((self.x_high - self.x_low) or 1.0)
        return round(LEFT + min(max(share, 0.0), 1.0) * (WIDTH - LEFT - RIGHT), 1)

    def y(self, value: float) -> float:
        """A value's place on the picture, which counts downwards; a little outside where it exceeds fixed limits."""
        share = min(max(self.scale.share(value), -0.02), 1.02)
        return round(HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM), 1)


def nice_ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Some round numbers (1, 2 or 5 times a power of ten apart) in [low, high]."""
    if not high > low:
        return [low]
    rough = (high - low) / about
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [(first + n) * step for n in range(int((high - first * step) / step + 1e-9) + 1)]


def thinned(line: Series, points: int = POINTS) -> Series:
    """A line of at most about so many points that keeps the smallest and the largest of each stretch."""
    count = len(line.xs)
    if count <= points:
        return line
    size, kept = math.ceil(2 * count / points), set[int]()
    for start in range(0, count, size):
        stretch = range(start, min(start + size, count))
        finite = [index for index in stretch if math.isfinite(line.ys[index])]
        kept |= {min(finite, key=line.ys.__getitem__), max(finite, key=line.ys.__getitem__)} if finite else {start}
    kept |= {0, count - 1}
    chosen = sorted(kept)
    return Series(line.name, [line.xs[index] for index in chosen], [line.ys[index] for index in chosen])


def count_label(value: float) -> str:
    """A count in few characters: 1.5M, 200k, 60."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.4g}{letter}"
    return f"{value:.4g}"


def _merged(series: Iterable[Series]) -> list[Series]:
    """Equal lines would hide each other: one under all their names."""
    names: dict[tuple[tuple[float, ...], tuple[str, ...]], list[str]] = {}
    for line in series:
        names.setdefault((tuple(line.xs), tuple(map(str, line.ys))), []).append(line.name)
    kept = {line.name: line for line in series}
    return [Series(", ".join(each), kept[each[0]].xs, kept[each[0]].ys) for each in names.values()]


def _range(xs: Sequence[float], spans: Sequence[Span]) -> tuple[float, float]:
    ends = [*xs, *(span.start for span in spans), *(span.end for span in spans)]
    return (min(ends), max(ends)) if ends else (0.0, 1.0)


def _span(place: _Plot, span: Span, index: int) -> Markup:
    left, right = place.x(span.start), place.x(span.end)
    return Markup(
        '<rect class="span s{n}" x="{x}" y="{y}" width="{w}" height="{h}"><title>{name}</title></rect>'
    ).format(n=index % 2, x=left, y=TOP, w=round(max(right - left, 0.5), 1), h=HEIGHT - TOP - BOTTOM, name=span.name)


def _y_axis(place: _Plot) -> Iterable[Markup]:
    for value in place.scale.ticks():
        y = place.y(value)
        yield Markup('<line class="grid" x1="{a}" x2="{b}" y1="{y}" y2="{y}"></line>').format(
            a=LEFT, b=WIDTH - RIGHT, y=y
        )
        yield Markup('<text class="tick" x="{x}" y="{y}" text-anchor="end">{t}</text>').format(
            x=LEFT - 6, y=y + 4, t=short(0.0 if abs(value) < 1e-12 else value)
        )


def _x_axis(place: _Plot) -> Iterable[Markup]:
    base = HEIGHT - BOTTOM
    yield Markup('<line class="axis" x1="{a}" x2="{b}" y1="{y}" y2="{y}"></line>').format(
        a=LEFT, b=WIDTH - RIGHT, y=base
    )
    for value in nice_ticks(place.x_low, place.x_high, 4):
        x = place.x(value)
        anchor = "end" if x > WIDTH - RIGHT - 12 else "middle"
        yield Markup('<text class="tick" x="{x}" y="{y}" text-anchor="{anchor}">{t}</text>').format(
            x=x, y=base + 18, anchor=anchor, t=count_label(value)
        )


def _line(place: _Plot, line: Series, index: int) -> Markup:
    runs: list[list[tuple[float, float]]] = [[]]
    for x, y in zip(line.xs, line.ys, strict=True):
        if not math.isfinite(y) or (place.scale.log and y <= 0):
            runs.append([])
        else:
            runs[-1].append((place.x(x), place.y(y)))
    color = f"line c{index % COLORS}"
    path = " ".join("M" + " L".join(f"{x},{y}" for x, y in run) for run in runs if len(run) > 1)
    dots = Markup("").join(
        Markup('<circle class="{c}" cx="{x}" cy="{y}" r="2.5"></circle>').format(c=color, x=run[0][0], y=run[0][1])
        for run in runs
        if len(run) == 1
    )
    return Markup('<path class="{c}" d="{d}"></path>').format(c=color, d=path) + dots if path else dots


def _mark(place: _Plot, x: float) -> Markup:
    return Markup('<text class="bad" x="{x}" y="{y}" text-anchor="middle">×</text>').format(
        x=place.x(x), y=HEIGHT - BOTTOM - 2
    )


def _data(line: Series) -> dict[str, object]:
    """What the page shows under the pointer."""
    values = [float(f"{y:.4g}") if math.isfinite(y) else None for y in line.ys]
    return {"name": line.name, "x": list(line.xs), "y": values}


def _last(line: Series) -> str:
    finite = [y for y in line.ys if math.isfinite(y)]
    return short(finite[-1]) if finite else "–"


@dataclass(frozen=True)
class Shares:
    """Parts of a whole as one bar."""

    parts: Sequence[tuple[str, float]]

    def rows(self) -> list[tuple[int, str, float]]:
        """Colour number, name and percent of each part that is more than nothing."""
        whole = sum(value for _, value in self.parts) or 1.0
        return [
            (index % COLORS, name, 100 * value / whole)
            for index, (name, value) in enumerate(self.parts)
            if value > 0.0005 * whole
        ]

    def svg(self) -> Markup:
        """The bar."""
        x, bars = 0.0, []
        for index, name, percent in self.rows():
            bars.append(
                Markup('<rect class="c{n}" x="{x}" y="0" width="{w}" height="6"><title>{t}</title></rect>').format(
                    n=index, x=round(x, 2), w=round(percent, 2), t=f"{name}: {percent:.1f}%"
                )
            )
            x += percent
        label = escape(", ".join(f"{name} {percent:.0f}%" for _, name, percent in self.rows()))
        return Markup(
            '<svg class="shares" viewBox="0 0 100 6" preserveAspectRatio="none" role="img" aria-label="{l}">{b}</svg>'
        ).format(l=label, b=Markup("").join(bars))
