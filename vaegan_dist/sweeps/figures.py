"""The sweep's pictures: the metric over images, against each key, the rate-distortion plane, what mattered."""

import io
import math
from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, NullFormatter, ScalarFormatter

from vaegan_dist.sweeps.ledger import Trial
from vaegan_dist.sweeps.plan import Plan
from vaegan_dist.sweeps.result import best_trial, pareto_front
from vaegan_dist.sweeps.search import importances
from vaegan_dist.sweeps.space import Domain

WIDTH, DPI, COLUMNS = 11.0, 110, 3
GREY, BLUE, RED, GREEN = "#8a93a3", "#2f6fb5", "#c0392b", "#2e8b57"
WIDE = 20.0  # ratio of the largest to the smallest value from which an axis is logarithmic


def png(figure: Figure) -> bytes:
    """A figure as a picture file."""
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_figure(buffer, format="png", dpi=DPI)
    return buffer.getvalue()


def metric_over_images(plan: Plan, metric: str) -> Figure:
    """A line for each trial, coloured by the first numeric key; the best one is thick."""
    figure = Figure(figsize=(WIDTH, 4.2), layout="constrained")
    ax = _axes(figure)
    key = next((key for key in plan.space.domains if _is_numeric(plan, key)), None)
    scale = _color_scale(plan, key) if key else None
    best = best_trial(plan)
    for trial in plan.ledger.trials.values():
        rows = [(row["images_seen"], row[metric]) for row in trial.rows if row.get(metric) is not None]
        if not rows:
            continue
        value = trial.params.get(key) if key else None
        color: Any = scale.to_rgba(np.array([value]))[0] if scale is not None and value is not None else GREY
        won = best is not None and trial.number == best.number
        places, values = zip(*rows, strict=True)
        ax.plot(places, values, color=color, linewidth=3.0 if won else 1.2, zorder=3 if won else 2)
        ax.plot(places[-1:], values[-1:], _marker(trial), color=color, markersize=6, zorder=4)
    _positive_log(ax, [row.get(metric) for trial in plan.ledger.trials.values() for row in trial.rows])
    ax.set(xlabel="images seen", ylabel=metric)
    ax.xaxis.set_major_formatter(EngFormatter(sep=""))
    if scale is not None:
        figure.colorbar(scale, ax=ax, label=key)
    return figure


def metric_by_key(plan: Plan, metric: str) -> Figure:
    """A panel for each key: its value against the trial's last value of the metric."""
    keys = list(plan.space.domains)
    columns = min(COLUMNS, len(keys))
    rows = math.ceil(len(keys) / columns)
    figure = Figure(figsize=(WIDTH if columns > 1 else 6.5, 3.3 * rows), layout="constrained")
    for index, key in enumerate(keys):
        ax = _axes(figure, rows, columns, index + 1)
        trials = [trial for trial in plan.ledger.trials.values() if key in trial.params and trial.ended]
        _scatter(ax, plan, key, trials, metric)
        ax.set(xlabel=key, ylabel=metric if index % columns == 0 else "")
    return figure


def _scatter(ax: Axes, plan: Plan, key: str, trials: Sequence[Trial], metric: str) -> None:
    numeric = _is_numeric(plan, key)
    labels = list(dict.fromkeys(str(trial.params[key]) for trial in trials))
    best = best_trial(plan)
    for trial in trials:
        value = trial.last(metric)
        if value is None:
            continue
        x = float(trial.params[key]) if numeric else labels.index(str(trial.params[key]))
        face = BLUE if trial.state == "done" else "none"
        ax.scatter([x], [value], s=34, facecolors=face, edgecolors=BLUE, zorder=3)
        if best is not None and trial.number == best.number:
            ax.scatter([x], [value], s=150, facecolors="none", edgecolors=RED, linewidths=1.6, zorder=4)
    if numeric:
        _maybe_log_x(ax, plan, key)
    else:
        ax.set_xticks(range(len(labels)), [label[:18] for label in labels])
    _positive_log(ax, [trial.last(metric) for trial in trials])


def rate_distortion(plan: Plan) -> Figure | None:
    """Rate against distortion at each trial's last evaluation, coloured by β; None where they were not measured."""
    trials = [t for t in plan.ledger.trials.values() if t.last("rate") is not None and t.last("distortion") is not None]
    done = [trial for trial in trials if trial.state == "done"]
    if len(trials) < 2:
        return None
    figure = Figure(figsize=(WIDTH * 0.75, 4.6), layout="constrained")
    ax = _axes(figure)
    key = next((key for key in plan.space.domains if key.endswith("beta")), None)
    scale = _color_scale(plan, key) if key and _is_numeric(plan, key) else None
    for trial in trials:
        rate, distortion = trial.last("rate") or 0.0, trial.last("distortion") or 0.0
        beta = trial.params.get(key) if key else None
        color: Any = scale.to_rgba(np.array([beta]))[0] if scale is not None and beta is not None else BLUE
        size, alpha = (60, 1.0) if trial.state == "done" else (26, 0.6)
        ax.scatter([rate], [distortion], s=size, color=[color], alpha=alpha, zorder=3)
        if beta is not None and trial.state == "done":
            ax.annotate(f"β {beta:.3g}", (rate, distortion), xytext=(6, 5), textcoords="offset points", fontsize=8)
    front = _front([(t.last("rate") or 0.0, t.last("distortion") or 0.0) for t in done])
    if len(front) > 1:
        ax.plot(*zip(*front, strict=True), color=GREY, linewidth=1, zorder=1)
    ax.set(xlabel="rate: KL(q(z|x) ‖ N(0, I)), nats per image", ylabel="distortion: −log p(x|z), nats per image")
    if scale is not None:
        figure.colorbar(scale, ax=ax, label=key)
    return figure


def front_of_metrics(plan: Plan) -> Figure | None:
    """The first two metrics of a sweep by several, with the trials that no other one beats."""
    if len(plan.judged.metrics) < 2:
        return None
    first, second = plan.judged.metrics[:2]
    figure = Figure(figsize=(WIDTH * 0.6, 4.2), layout="constrained")
    ax = _axes(figure)
    front = pareto_front(plan)
    for trial in plan.ledger.trials.values():
        x, y = trial.last(first), trial.last(second)
        if x is not None and y is not None and trial.ended:
            ax.scatter([x], [y], s=46 if trial in front else 24, color=RED if trial in front else GREY)
    ax.set(xlabel=first, ylabel=second)
    return figure


def importance(plan: Plan, metric: str, mode: str) -> Figure | None:
    """Share of the metric's variance that each key explains; None for too few trials."""
    shares = importances(plan.space, plan.ledger, metric, mode)
    if not shares:
        return None
    figure = Figure(figsize=(WIDTH * 0.6, 0.9 + 0.42 * len(shares)), layout="constrained")
    ax = _axes(figure)
    names = list(reversed(shares))
    bars = ax.barh(names, [shares[name] for name in names], color=BLUE)
    ax.bar_label(bars, fmt="%.2f", padding=3)
    ax.set(xlim=(0, 1.1), xlabel=f"share of the variance of {metric} (fANOVA)")
    return figure


def _front(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points that no other one beats in both, from left to right."""
    kept: list[tuple[float, float]] = []
    for point in sorted(points):
        if not kept or point[1] < kept[-1][1]:
            kept.append(point)
    return kept


def _axes(figure: Figure, rows: int = 1, columns: int = 1, index: int = 1) -> Axes:
    ax: Axes = figure.add_subplot(rows, columns, index)
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(color="#e3e7ed", linewidth=0.6)
    ax.set_axisbelow(True)
    return ax


def _marker(trial: Trial) -> str:
    return {"done": "o", "early": "|", "failed": "x"}.get(trial.state, ".")


def _numbers(plan: Plan, key: str) -> list[float]:
    values = [trial.params.get(key) for trial in plan.ledger.trials.values()]
    return [float(v) for v in values if isinstance(v, int | float) and not isinstance(v, bool)]


def _is_numeric(plan: Plan, key: str) -> bool:
    return len(_numbers(plan, key)) == sum(key in trial.params for trial in plan.ledger.trials.values()) > 0


def _is_log(plan: Plan, key: str) -> bool:
    domains: tuple[Domain, ...] = plan.space.domains[key]
    values = _numbers(plan, key)
    wide = min(values) > 0 and max(values) / min(values) > WIDE
    return wide and all(domain.kind in ("loguniform", "grid", "choice") for domain in domains)


def _color_scale(plan: Plan, key: str) -> ScalarMappable:
    values = _numbers(plan, key)
    norm = (LogNorm if _is_log(plan, key) else Normalize)(min(values), max(values))
    return ScalarMappable(norm, matplotlib.colormaps["viridis"])


def _maybe_log_x(ax: Axes, plan: Plan, key: str) -> None:
    if _is_log(plan, key):
        ax.set_xscale("log")


def _positive_log(ax: Axes, values: Sequence[float | None]) -> None:
    """A logarithmic axis where values span much more than one could tell apart on a plain one."""
    known = [value for value in values if value is not None]
    if known and min(known) > 0 and max(known) > WIDE / 2 * min(known):
        ax.set_yscale("log")
        if max(known) < 100 * min(known):
            ax.yaxis.set_major_formatter(ScalarFormatter())
            ax.yaxis.set_minor_formatter(ScalarFormatter() if max(known) < 12 * min(known) else NullFormatter())
