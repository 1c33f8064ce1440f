"""The command that sweeps."""

import argparse
import sys
import time
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

from vaegan_dist.commands.common import Subparsers, add_run_options, config_files, short_forms
from vaegan_dist.config import Config
from vaegan_dist.config_source import load_config
from vaegan_dist.errors import STOPPED, ConfigError, VaeganError
from vaegan_dist.reporting.progress import duration, short
from vaegan_dist.sweeps.settings import PREFIX, SweepSettings, read_settings

if TYPE_CHECKING:
    from vaegan_dist.reporting.sweep_metrics import Ending
    from vaegan_dist.sweeps.ledger import Trial
    from vaegan_dist.sweeps.plan import Plan


def add_sweep(subparsers: Subparsers) -> None:
    parser = subparsers.add_parser(
        "sweep",
        help="search a space of configurations, or continue a search",
        description="Search a space of configurations around a preset; what is tried follows from the seed. The same "
        "command again continues the sweep of that name (default: the file's).",
        epilog=_settings_help(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("space", metavar="SPACE.yaml", help="the sweep: metric, trials, scheduler, space (see below)")
    add_run_options(parser)
    parser.add_argument("--trials", help="short for sweep.trials")
    parser.add_argument("--concurrent", help="short for sweep.concurrent")
    parser.add_argument("--rate", type=float, help="images/s of one trial, for the cost (default: measured here)")
    parser.add_argument("--dry-run", action="store_true", help="check everything, say what it would cost, and exit")
    parser.set_defaults(run=sweep_command, takes_overrides=True)


def _settings_help() -> str:
    lines = ["keys of SPACE.yaml, also as sweep.KEY=VALUE; any other KEY=VALUE changes the configuration:", ""]
    for key, field in SweepSettings.model_fields.items():
        default = "required" if field.is_required() else f"default {field.default}"
        lines += [f"  {key} ({default})", f"      {' '.join((field.description or '').split())}"]
    return "\n".join(lines)


def sweep_command(options: argparse.Namespace, overrides: Sequence[str]) -> int:
    """Run a sweep, and say what won and where it is."""
    settings, config = _read(options, overrides)
    # Torch, Ray and Optuna take seconds to import; only this command pays for that.
    from vaegan_dist.cluster.ray_train import with_absolute_paths
    from vaegan_dist.sweeps.ledger import open_ledger
    from vaegan_dist.sweeps.plan import make_plan
    from vaegan_dist.training.presence import RunLock

    plan = make_plan(settings, with_absolute_paths(config))
    if options.dry_run:
        print(_dry_run(plan, options))
        return 0
    with RunLock(plan.folder) as lock:
        problem = lock.acquire()
        if problem:
            raise ConfigError(f"run.name={plan.config.run.name}: {problem}")
        with closing(open_ledger(plan.folder, settings, plan.config)) as ledger:
            return _run(make_plan(settings, plan.config, ledger), options)


def _read(options: argparse.Namespace, overrides: Sequence[str]) -> tuple[SweepSettings, Config]:
    own = [item for item in overrides if item.startswith(PREFIX)]
    own += [f"{PREFIX}{name}={getattr(options, name)}" for name in ("trials", "concurrent") if getattr(options, name)]
    settings = read_settings(Path(options.space), own)
    others = [item for item in overrides if not item.startswith(PREFIX)]
    name = f"run.name={Path(options.space).stem}"
    return settings, load_config(options.preset, config_files(options.config), [name, *short_forms(options), *others])


def _run(plan: "Plan", options: argparse.Namespace) -> int:
    from vaegan_dist.cluster.ray_tune import run_sweep
    from vaegan_dist.reporting.sweep_metrics import SweepExporter
    from vaegan_dist.sweeps.remote import gather, publish
    from vaegan_dist.sweeps.report import write_report
    from vaegan_dist.sweeps.result import write_result
    from vaegan_dist.sweeps.standing import Standing, identity_of
    from vaegan_dist.sweeps.table import View

    began, finished = time.monotonic(), not plan.left
    standing = Standing(plan)
    view = View(standing, sys.stdout)
    with SweepExporter(plan.config, identity_of(plan), plan.folder, standing.snapshot, view.warn) as exporter:
        if exporter.address and not finished:
            view.say(f"metrics at http://{exporter.address}/metrics")
        with closing(view):
            ending = run_sweep(plan, view.update, options.address, options.worker_logs)
        gather(plan)
        best = write_result(plan)
        write_report(plan)
        publish(plan)
        head: Ending = "already done" if finished else ending
        print(_summary(plan, head, best, time.monotonic() - began))
        if ending == "done" and best is None:
            first = next(trial for trial in plan.ledger.trials.values())
            why = first.message or f"no finite {plan.judged.metrics[0]}"
            raise VaeganError(f"not one of {len(plan.ledger.trials)} trials has a value; trial {first.name}: {why}")
        exporter.ended(head)
    return STOPPED if ending == "stopped" else 0


def _dry_run(plan: "Plan", options: argparse.Namespace) -> str:
    """What would happen, for people."""
    from vaegan_dist.cluster.ray_tune import concurrency_at
    from vaegan_dist.sweeps.cost import cost_of, measure_rate

    settings, judged, config = plan.settings, plan.judged, plan.config
    concurrent, where = concurrency_at(plan, options.address)
    cost, workers = cost_of(plan), config.cluster.most_workers
    rate = options.rate or measure_rate(config) * workers
    source = "given by --rate" if options.rate else f"training steps measured on this CPU, times {workers} workers"
    most, about = (cost.hours(images, rate, concurrent) for images in (cost.most_images, cost.expected_images))
    ended = plan.proposals.total - plan.left
    way = "in one process that later trials use again" if workers == 1 else f"on {workers} workers of its own"
    rows = [
        ("sweep", f"{config.run.name}, in {plan.place}"),
        (
            "metric",
            f"{', '.join(f'{m} ({d})' for m, d in zip(judged.metrics, judged.modes, strict=True))}, "
            f"from {judged.event} records, every {judged.interval:,} images",
        ),
        (
            "trials",
            f"{plan.proposals.total} by {settings.searcher} search" + (f", {ended} ended before" if ended else ""),
        ),
        ("scheduler", settings.scheduler),
        *(
            ("space" if not number else "", f"{key}: {text}")
            for number, (key, text) in enumerate(settings.space.items())
        ),
        ("a trial", f"{way}; {config.total_images:,} images"),
        ("at a time", f"{min(concurrent, max(plan.left, 1))} trials ({where})"),
        (
            "cost",
            f"{cost.trials} trials x {cost.images_per_trial:,} images: at most {cost.most_images:,} images"
            + (f", about {cost.expected_images:,.0f} with {settings.scheduler}" if about < most else ""),
        ),
        (
            "time",
            f"at most {_hours(most)}"
            + (f", about {_hours(about)}" if about < most else "")
            + f", at {rate:,.0f} images/s for a trial ({source}); start-up, evaluations and pictures come on top",
        ),
    ]
    return "\n".join(f"{name:10} {text}" for name, text in rows)


def _hours(hours: float) -> str:
    return f"{hours:.1f} hours" if hours >= 1 else f"{max(60 * hours, 0.1):.1f} minutes"


def _summary(plan: "Plan", ending: str, best: "Trial | None", seconds: float) -> str:
    from vaegan_dist.sweeps.report import FILE
    from vaegan_dist.sweeps.result import images_spent
    from vaegan_dist.sweeps.table import params_text

    spent, full = images_spent(plan), plan.proposals.total * plan.config.total_images
    head = {
        "done": f"Done: {plan.proposals.total} trials, {spent:,} images ({100 * spent / full:.0f}% of the full budget) "
        f"in {duration(seconds)}.",
        "stopped": f"Stopped with checkpoints, {plan.left} trials left; run the same command again to continue.",
        "already done": f"Sweep '{plan.config.run.name}' was finished before; nothing was trained.",
    }[ending]
    lines = [head]
    if best is not None:
        values = ", ".join(f"{metric} {short(best.last(metric) or 0.0)}" for metric in plan.judged.metrics)
        lines += [f"  best       trial {best.name}: {values}  ({params_text(best.params)})"]
        lines += [f"  again      vaegan-dist train --config {plan.place}/best/config.yaml"]
    rows = [("report", FILE), ("table", "sweep.csv"), ("trials", "trials")]
    lines += [f"  {name:10} {plan.place}/{path}" for name, path in rows]
    if plan.place != str(plan.folder):
        lines.append(f"  copies     {plan.folder}")
    return "\n".join(lines)
