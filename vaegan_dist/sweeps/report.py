"""The sweep as one self-contained HTML page, made of the same parts as a run's report."""

import base64
from collections.abc import Sequence
from pathlib import Path

import yaml
from markupsafe import Markup
from matplotlib.figure import Figure

from vaegan_dist.files import write_whole
from vaegan_dist.reporting.progress import duration, short
from vaegan_dist.reporting.report import embedded, page
from vaegan_dist.sweeps import figures
from vaegan_dist.sweeps.ledger import Trial
from vaegan_dist.sweeps.plan import Plan
from vaegan_dist.sweeps.result import best_trial, images_spent, ranking
from vaegan_dist.sweeps.table import MARKS, params_text
from vaegan_dist.sweeps.trial import TRIALS

FILE = "report.html"
SHEETS = 6
LINKS = (
    ("folder", ""),
    ("samples", "samples.png"),
    ("reconstructions", "reconstructions.png"),
    ("curves", "curves.png"),
)
MEASURED = ("fid", "rfid", "psnr", "distortion", "rate", "elbo")


def write_report(plan: Plan) -> Path:
    """Write report.html, and each of its pictures below `pictures/`; returns the page."""
    path = plan.folder / FILE
    write_whole(path, render(plan).encode())
    return path


def render(plan: Plan) -> str:
    """The page."""
    metric, mode = plan.judged.metrics[0], plan.judged.modes[0]
    best = best_trial(plan)
    pictures = [
        (f"{metric} over images", "over", figures.metric_over_images(plan, metric), _about_lines()),
        *(
            (f"{name} against each key", f"keys-{name}", figures.metric_by_key(plan, name), _about_dots())
            for name in plan.judged.metrics
        ),
        ("Rate and distortion", "rate-distortion", figures.rate_distortion(plan), _about_front()),
        ("The front", "front", figures.front_of_metrics(plan), "Red: no other trial is better in both."),
        ("What mattered", "importance", figures.importance(plan, metric, mode), _about_importance()),
    ]
    return page(
        "sweep.html",
        f"Sweep {plan.config.run.name}",
        name=plan.config.run.name,
        tiles=_tiles(plan, best),
        pictures=[
            (title, _kept(plan, name, figure), about) for title, name, figure, about in pictures if figure is not None
        ],
        missing=[title for title, _, figure, _ in pictures if figure is None and title == "What mattered"],
        sheets=_sheets(plan),
        sheets_by=_beta(plan) or f"{metric}, the best first",
        columns=_columns(plan),
        rows=[_row(plan, trial) for trial in _sorted(plan)],
        settings=yaml.safe_dump(plan.settings.model_dump(mode="json"), sort_keys=False, allow_unicode=True),
        command=f"vaegan-dist train --config {plan.place}/best/config.yaml" if best else "",
    )


def _tiles(plan: Plan, best: Trial | None) -> list[tuple[str, str]]:
    trials, spent = plan.ledger.trials.values(), images_spent(plan)
    states = [
        f"{sum(t.state == s for t in trials)} {mark}" for s, mark in MARKS.items() if any(t.state == s for t in trials)
    ]
    full = plan.proposals.total * plan.config.total_images
    rows = [("trials: " + ", ".join(states), f"{len(trials)} of {plan.proposals.total}")]
    if best is not None:
        rows += [(f"best {m}, trial {best.name}", _cell(best.last(m))) for m in plan.judged.metrics]
        rows += [(key, _text(value)) for key, value in best.params.items()]
    rows += [("images of all trials", f"{spent:,}"), ("of the full budget", f"{100 * spent / full:.0f}%")]
    rows += [("training time of all trials", duration(sum(trial.seconds_spent for trial in trials)))]
    return rows


def _kept(plan: Plan, name: str, figure: Figure) -> Markup:
    content = figures.png(figure)
    write_whole(plan.folder / "pictures" / f"{name}.png", content)
    return Markup("data:image/png;base64,") + Markup(base64.b64encode(content).decode())


def _about_lines() -> str:
    return "One line for each trial. Dot: spent its budget; bar: stopped early; cross: failed. Thick: the best."


def _about_dots() -> str:
    return "Filled: spent its budget; hollow: stopped early, so at fewer images. Red ring: the best."


def _about_front() -> str:
    return (
        "Of the average networks on the evaluated pictures. A larger β buys a lower rate with a higher distortion. "
        "Small and pale: stopped early."
    )


def _about_importance() -> str:
    return (
        "How much of the metric's variance each key explains alone, by a random forest over the trials (fANOVA). "
        "With few trials, or trials of unequal length, it is a hint and no more."
    )


def _sheets(plan: Plan) -> list[tuple[str, Markup]]:
    """Samples of some trials that spent their budget, spread over β (or over the ranking)."""
    done = [trial for trial in ranking(plan) if trial.state == "done" and _samples(plan, trial).exists()]
    key = _beta(plan)
    if key and all(isinstance(trial.params.get(key), int | float) for trial in done):
        done.sort(key=lambda trial: float(trial.params[key]))
    chosen = _spread(done, SHEETS)
    return [(_caption(plan, trial), embedded(_samples(plan, trial))) for trial in chosen]


def _beta(plan: Plan) -> str:
    """The key of the space that is a β; empty where there is none."""
    return next((key for key in plan.space.domains if key.endswith("beta")), "")


def _caption(plan: Plan, trial: Trial) -> str:
    metric = plan.judged.metrics[0]
    return f"{trial.name}: {params_text(trial.params)}, {metric} {_cell(trial.last(metric))}"


def _samples(plan: Plan, trial: Trial) -> Path:
    return plan.folder / TRIALS / trial.name / "samples.png"


def _spread(trials: Sequence[Trial], most: int) -> list[Trial]:
    if len(trials) <= most:
        return list(trials)
    return [trials[round(index * (len(trials) - 1) / (most - 1))] for index in range(most)]


def _sorted(plan: Plan) -> list[Trial]:
    return [*ranking(plan), *(trial for trial in plan.ledger.trials.values() if not trial.ended)]


def _columns(plan: Plan) -> list[str]:
    """Measurements of the table: the metrics, and what is usual where it was measured."""
    has = [name for name in MEASURED if any(trial.last(name) is not None for trial in plan.ledger.trials.values())]
    return list(dict.fromkeys([*plan.judged.metrics, *has]))


def _row(plan: Plan, trial: Trial) -> dict[str, object]:
    return {
        "name": trial.name,
        "state": MARKS[trial.state],
        "failed": trial.state == "failed",
        "images": f"{trial.images_seen:,}",
        "values": [_cell(trial.last(name)) for name in _columns(plan)],
        "params": params_text(trial.params),
        "message": trial.message,
        "copies": ", ".join(f"{change['source']:04d} at {change['images_seen']:,}" for change in trial.changes),
        "links": [(name, f"{TRIALS}/{trial.name}/{file}") for name, file in LINKS if _has(plan, trial, file)],
    }


LINKS = (
    ("folder", ""),
    ("samples", "samples.png"),
    ("reconstructions", "reconstructions.png"),
    ("curves", "curves.png"),
)


def _has(plan: Plan, trial: Trial, file: str) -> bool:
    return (plan.folder / TRIALS / trial.name / file).exists()


def _cell(value: float | None) -> str:
    return "–" if value is None else short(value)


def _text(value: object) -> str:
    return short(value) if isinstance(value, float) else str(value)
