"""What a sweep leaves: sweep.json, sweep.csv, and best/ with the winner's checkpoint and configuration."""

import csv
import io
import json
import math
import shutil
from pathlib import Path
from typing import Any

from vaegan_dist.config import Config
from vaegan_dist.config_source import dump_yaml, with_changes
from vaegan_dist.files import write_whole
from vaegan_dist.sweeps.ledger import Trial
from vaegan_dist.sweeps.plan import Plan
from vaegan_dist.sweeps.trial import TRIALS, trial_config
from vaegan_dist.training.checkpoint import newest_whole

BEST = "best"


def ranking(plan: Plan) -> list[Trial]:
    """Ended trials, the best first: those that came furthest before those that stopped earlier, failed ones last."""
    metric, mode = plan.judged.metrics[0], plan.judged.modes[0]

    def place(trial: Trial) -> tuple[Any, ...]:
        value = trial.last(metric)
        signed = math.inf if value is None else value if mode == "min" else -value
        return (value is None, -_rung(plan, trial), signed, trial.number)

    return sorted((trial for trial in list(plan.ledger.trials.values()) if trial.ended), key=place)


def _rung(plan: Plan, trial: Trial) -> int:
    """Values of the metric are compared at equal budgets; a trial that is done has all of it."""
    return plan.config.total_images if trial.state == "done" else trial.images_seen


def best_trial(plan: Plan) -> Trial | None:
    """The winner: by one metric the best of those that came furthest; by several the one nearest to the ideal."""
    ranked = [trial for trial in ranking(plan) if trial.last(plan.judged.metrics[0]) is not None]
    if not ranked or len(plan.judged.metrics) == 1:
        return ranked[0] if ranked else None
    front = pareto_front(plan)
    return min(front, key=lambda trial: _distance(plan, front, trial)) if front else None


def pareto_front(plan: Plan) -> list[Trial]:
    """Done trials that no other one beats in every metric."""
    done = [t for t in ranking(plan) if t.state == "done" and all(t.last(m) is not None for m in plan.judged.metrics)]
    losses = {trial.number: _losses(plan, trial) for trial in done}

    def beaten(trial: Trial) -> bool:
        own = losses[trial.number]
        return any(all(a <= b for a, b in zip(other, own, strict=True)) and other != own for other in losses.values())

    return [trial for trial in done if not beaten(trial)]


def _losses(plan: Plan, trial: Trial) -> tuple[float, ...]:
    pairs = zip(plan.judged.metrics, plan.judged.modes, strict=True)
    return tuple((trial.last(metric) or 0.0) * (1 if mode == "min" else -1) for metric, mode in pairs)


def _distance(plan: Plan, front: list[Trial], trial: Trial) -> float:
    """From the ideal point, each metric in units of its range on the front."""
    columns = list(zip(*(_losses(plan, other) for other in front), strict=True))
    parts = zip(_losses(plan, trial), columns, strict=True)
    return math.hypot(*((x - min(column)) / ((max(column) - min(column)) or 1.0) for x, column in parts))


def write_result(plan: Plan) -> Trial | None:
    """Write sweep.json, sweep.csv and best/; returns the winner, None when no trial has a value."""
    best = best_trial(plan)
    write_whole(plan.folder / "sweep.json", json.dumps(_as_json(plan, best), indent=1, allow_nan=False).encode())
    write_whole(plan.folder / "sweep.csv", _as_csv(plan).encode())
    if best is not None:
        _keep_best(plan, best)
    return best


def images_spent(plan: Plan) -> int:
    """Images of all trials together."""
    return sum(trial.images_seen for trial in plan.ledger.trials.values())


def _as_json(plan: Plan, best: Trial | None) -> dict[str, Any]:
    metrics = [{"name": m, "mode": mode} for m, mode in zip(plan.judged.metrics, plan.judged.modes, strict=True)]
    return {
        "sweep": plan.config.run.name,
        "metrics": metrics,
        "best": best.number if best else None,
        "images_spent": images_spent(plan),
        "images_of_full_grid": plan.proposals.total * plan.config.total_images,
        "settings": plan.settings.model_dump(mode="json"),
        "trials": [_trial_json(plan, trial) for trial in plan.ledger.trials.values()],
    }


def _trial_json(plan: Plan, trial: Trial) -> dict[str, Any]:
    return {
        "trial": trial.number,
        "state": trial.state,
        "params": trial.params,
        "images_seen": trial.images_seen,
        **{metric: trial.last(metric) for metric in plan.judged.metrics},
        "seconds": trial.seconds,
        "folder": f"{TRIALS}/{trial.name}",
        **({"message": trial.message} if trial.message else {}),
        **({"changes": trial.changes} if trial.changes else {}),
        "rows": trial.rows,
    }


def _as_csv(plan: Plan) -> str:
    """One line for each trial: its values, its state, and every measurement of its last row."""
    trials = list(plan.ledger.trials.values())
    keys = list(dict.fromkeys(key for trial in trials for key in trial.params))
    measured = list(dict.fromkeys(key for trial in trials for row in trial.rows[-1:] for key in row))
    measured = [*plan.judged.metrics, *(key for key in measured if key not in (*plan.judged.metrics, "images_seen"))]
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(["trial", "state", "images_seen", "seconds", *keys, *measured, "message"])
    for trial in trials:
        last = trial.rows[-1] if trial.rows else {}
        values = [trial.params.get(key, "") for key in keys]
        numbers = [last.get(key) if last.get(key) is not None else "" for key in measured]
        writer.writerow([trial.name, trial.state, trial.images_seen, trial.seconds, *values, *numbers, trial.message])
    return buffer.getvalue()


def best_config(plan: Plan, trial: Trial) -> Config:
    """The configuration that trains the winner again, as a run of its own beside the sweep."""
    trained = trial_config(plan.config, plan.folder, trial.number, trial.params, plan.judged)
    again = {"run.name": f"{plan.config.run.name}-best", "run.storage": plan.config.run.storage}
    reporting = plan.config.reporting
    own = {f"reporting.{key}": getattr(reporting, key) for key in ("metrics_port", "pushgateway", "curves")}
    return with_changes(trained, {**again, **own})


def _keep_best(plan: Plan, trial: Trial) -> None:
    """Copy the newest checkpoint and pictures; the folder is new or replaced as a whole."""
    source = Path(plan.folder) / TRIALS / trial.name
    final, temporary = plan.folder / BEST, plan.folder / f".{BEST}.partial"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    found, _ = newest_whole(source)
    if found is not None:
        shutil.copytree(found.path, temporary / found.path.name)
    for name in ("samples.png", "reconstructions.png", "curves.png", "history.jsonl"):
        if (source / name).exists():
            shutil.copyfile(source / name, temporary / name)
    write_whole(temporary / "config.yaml", dump_yaml(best_config(plan, trial)).encode())
    shutil.rmtree(final, ignore_errors=True)
    temporary.rename(final)
