"""The curves of a run as a still picture, from its history."""

import io
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter

from vaegan_dist.files import write_whole
from vaegan_dist.reporting.records import NONFINITE, Family, Record, family, integer, measurements, text
from vaegan_dist.reporting.sinks import read_history

__all__ = ["plot_curves", "read_history"]

Curve = tuple[list[int], list[float]]

WIDTH_INCHES, DPI = 12.0, 100
COLORS = ("#2f6fb5", "#d1603d", "#3d9a5f", "#8a5fb0", "#b8912a", "#4aa3b8", "#c2548a", "#6b7280")
# As many characters of a phase's name fit over the width of a panel.
NAME_CHARACTERS = 120
SHADES = ("#eef2f8", "#ffffff")


@dataclass(frozen=True)
class Panel:
    """One family's axes; `right` names a second family, or a key, that has its own scale on the right."""

    title: str
    unit: str
    families: tuple[Family, ...]
    right: Callable[[str], bool] = lambda key: False
    right_unit: str = ""
    limits: tuple[float, float] | None = None
    log: bool = False
    from_zero: bool = False
    right_from_zero: bool = True


PANELS = (
    Panel(
        "Reconstruction",
        "nats per image",
        ("reconstruction",),
        lambda key: key.startswith("psnr"),
        "PSNR in dB",
        right_from_zero=False,
    ),
    Panel(
        "KL divergence",
        "nats per image",
        ("divergence",),
        lambda key: not key.startswith(("loss", "kl")),
        "weight β, active units",
    ),
    Panel("Adversarial", "loss", ("adversarial",), lambda key: key.startswith("penalty"), "penalty"),
    Panel("Discriminator logits", "logit", ("logits",)),
    Panel("Discriminator accuracy", "share judged right", ("accuracy",), limits=(-0.02, 1.02)),
    Panel("Learning rates", "learning rate", ("learning_rate",), log=True),
    Panel(
        "Throughput",
        "images per second",
        ("throughput",),
        lambda key: key.startswith("data_wait"),
        "share of time",
        from_zero=True,
    ),
    Panel("Step time", "seconds", ("time",), from_zero=True),
    Panel("Gradients", "norm", ("gradient",), lambda key: key == "skipped_steps", "skipped steps", log=True),
    Panel("Workers", "slowest over median", ("workers",), lambda key: key == "slowest_rank", "rank of the slowest"),
    Panel(
        "Average", "images", ("average",), lambda key: key == "ema_distance", "distance of the average", from_zero=True
    ),
    Panel("Other terms", "value", ("other",)),
)


def plot_curves(history: Path, output: Path) -> None:
    """Draw every measured quantity of a history over images seen, one panel per family, phases shaded and named.

    Nulls and absent terms are gaps. Raises InputError if the history is missing or broken.
    """
    # A canvas of its own: pyplot's global state belongs to nobody here.
    canvas = FigureCanvasAgg(make_figure(read_history(history)))
    buffer = io.BytesIO()
    canvas.print_figure(buffer, format="png", dpi=DPI)
    write_whole(output, buffer.getvalue())


def make_figure(records: Sequence[Record]) -> Figure:
    """The figure that `plot_curves` draws."""
    curves = collect(records)
    present = [panel for panel in PANELS if any(family(key) in panel.families for key in curves)]
    figure = Figure(figsize=(WIDTH_INCHES, 0.9 + 2.1 * max(1, len(present))), dpi=DPI, layout="constrained")
    axes: list[Axes] = list(figure.subplots(max(1, len(present)), 1, sharex=True, squeeze=False)[:, 0])
    spans, warnings = phase_spans(records), nonfinite_places(records)
    for ax in axes:
        _shade(ax, spans, named=ax is axes[0])
    for ax, panel in zip(axes, present, strict=False):
        _draw_panel(ax, panel, {key: curve for key, curve in curves.items() if family(key) in panel.families}, warnings)
    if not present:
        axes[0].text(0.5, 0.5, "no measurements yet", ha="center", va="center", transform=axes[0].transAxes)
    axes[-1].set_xlabel("images seen")
    axes[-1].xaxis.set_major_formatter(EngFormatter(sep=""))
    return figure


def collect(records: Sequence[Record]) -> dict[str, Curve]:
    """Each measured quantity of the `train` rows as (images seen, values); NaN where a row lacks it or it was null."""
    rows = [
        (place, record)
        for record in records
        if record.get("event") == "train" and (place := integer(record, "images_seen"))
    ]
    keys = dict.fromkeys(key for _, record in rows for key in measurements(record))
    places = [place for place, _ in rows]
    values = [measurements(record) for _, record in rows]
    return {key: (places, [row.get(key, math.nan) for row in values]) for key in keys}


def phase_spans(records: Sequence[Record]) -> list[tuple[str, int, int]]:
    """Phases in order as (name, first image, last image)."""
    spans: list[tuple[str, int, int]] = []
    end = 0
    for record in records:
        name, place = text(record, "phase"), integer(record, "images_seen")
        if not name or place is None:
            continue
        if not spans or spans[-1][0] != name:
            # A train row looks back on its interval; a phase row stands at its beginning.
            spans.append((name, place if record.get("event") == "phase" else end, place))
        end = max(end, place)
        spans[-1] = (name, spans[-1][1], end)
    return [span for span in spans if span[2] > span[1]]


def nonfinite_places(records: Sequence[Record]) -> dict[str, list[int]]:
    """Where a quantity was measured and was not a finite number, by its name."""
    places: dict[str, list[int]] = {}
    for record in records:
        place = integer(record, "images_seen")
        for key in record:
            if key.endswith(NONFINITE) and place is not None:
                places.setdefault(key.removesuffix(NONFINITE), []).append(place)
    return places


def _draw_panel(ax: Axes, panel: Panel, curves: dict[str, Curve], nonfinite: dict[str, list[int]]) -> None:
    left = {key: curve for key, curve in curves.items() if not panel.right(key)}
    right = {key: curve for key, curve in curves.items() if key not in left}
    ax.set_title(panel.title, loc="left", fontsize=11, fontweight="bold")
    colors = itertools.cycle(COLORS)
    handles: list[Line2D] = []
    if left:
        handles += _draw_lines(ax, left, colors, "-", panel.unit)
        if panel.log and _spans_decades(left):
            ax.set_yscale("log")
        elif panel.limits:
            ax.set_ylim(*panel.limits)
        elif panel.from_zero:
            _start_at_zero(ax, left)
    if right:
        # A second scale only where the first is taken.
        own = ax.twinx() if left else ax
        own.spines["top"].set_visible(False)
        handles += _draw_lines(own, right, colors, "--" if left else "-", panel.right_unit)
        if panel.right_from_zero:
            _start_at_zero(own, right)
    bad = sorted({place for key in curves for place in nonfinite.get(key, [])})
    if bad:
        # A gap in a curve is easily missed, and it is what a sick run is recognised by.
        edge = ax.get_xaxis_transform()
        label = "not finite"
        handles += ax.plot(bad, [0.04] * len(bad), "x", color="#c1121f", label=label, transform=edge, clip_on=False)
    ax.legend(handles=handles, loc="upper left", bbox_to_anchor=(1.08, 1.0), frameon=False, fontsize=9)


def _finite(curves: dict[str, Curve]) -> list[float]:
    return [value for _, values in curves.values() for value in values if math.isfinite(value)]


def _spans_decades(curves: dict[str, Curve]) -> bool:
    values = _finite(curves)
    return bool(values) and min(values) > 0 and max(values) > 10 * min(values)


def _start_at_zero(ax: Axes, curves: dict[str, Curve]) -> None:
    """Makes heights comparable; a curve that is zero throughout lies on the floor."""
    values = _finite(curves)
    if values and min(values) >= 0:
        ax.set_ylim(0, 1.08 * max(values) or 1.0)


def _draw_lines(ax: Axes, curves: dict[str, Curve], colors: Iterator[str], style: str, unit: str) -> list[Line2D]:
    ax.set_ylabel(unit)
    # A single point has no line to be seen by.
    marker = "o" if max(sum(map(math.isfinite, values)) for _, values in curves.values()) == 1 else ""
    # Equal curves (two networks with one learning rate) would hide each other: one line under both names.
    names: dict[tuple[str, ...], list[str]] = {}
    for key, (_, values) in curves.items():
        names.setdefault(tuple(map(str, values)), []).append(key)
    return [
        ax.plot(
            *curves[keys[0]], color=next(colors), linestyle=style, marker=marker, label="\n".join(keys), linewidth=1.5
        )[0]
        for keys in names.values()
    ]


def _shade(ax: Axes, spans: Sequence[tuple[str, int, int]], *, named: bool) -> None:
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(axis="y", color="#d9dde4", linewidth=0.6)
    ax.set_axisbelow(True)
    whole = spans[-1][2] - spans[0][1] if spans else 0
    for index, (name, start, end) in enumerate(spans):
        ax.axvspan(start, end, color=SHADES[index % 2], zorder=-2, linewidth=0)
        if named:
            # A name wider than its phase stands a line higher, clear of its neighbours'.
            narrow = (end - start) / whole * NAME_CHARACTERS < len(name) + 1
            ax.annotate(
                name,
                ((start + end) / 2, 1.0),
                xycoords=("data", "axes fraction"),
                xytext=(0, 36 if narrow else 22),
                textcoords="offset points",
                ha="center",
                va="bottom",
                color="#4b5563",
            )
    if spans:
        ax.set_xlim(spans[0][1], spans[-1][2])
