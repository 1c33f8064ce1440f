"""The command that trains."""

import argparse
import sys
import time
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

from vaegan_dist.commands.common import Subparsers, add_run_options, config_files, short_forms
from vaegan_dist.commands.describe import model_text
from vaegan_dist.config import Config
from vaegan_dist.config_source import dump_yaml, load_config, reference
from vaegan_dist.errors import STOPPED
from vaegan_dist.reporting.progress import Progress

if TYPE_CHECKING:  # torch takes seconds to import; only the commands that use it pay for that
    from vaegan_dist.training.describe import Plan

SHORT = {"workers": "cluster.workers", "profile": "reporting.profile_steps"}


def add_train(subparsers: Subparsers) -> None:
    parser = subparsers.add_parser(
        "train",
        help="train a model, or continue a run",
        description="Train a model. The same command again continues the run of that name.",
        epilog=_configuration_help(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_run_options(parser)
    parser.add_argument("--workers", help="short for cluster.workers")
    parser.add_argument("--profile", metavar="STEPS", help="short for reporting.profile_steps")
    parser.add_argument("--runtime", choices=["ray", "local"], default="ray", help="default: ray")
    parser.add_argument("--fresh", action="store_true", help="a new run; an error where one of that name stands")
    parser.add_argument("--dry-run", action="store_true", help="print the resolved configuration and plan, and exit")
    parser.set_defaults(run=train_command, takes_overrides=True)


def _configuration_help() -> str:
    """Every configuration key with type, default and meaning."""
    lines = ["configuration keys, as KEY=VALUE or --KEY VALUE (defaults of no preset):", ""]
    for key, kind, default, description in reference(Config()):
        lines += [f"  {key} ({kind}, default {default})", f"      {description}"]
    return "\n".join(lines)


def train_command(options: argparse.Namespace, overrides: Sequence[str]) -> int:
    """Train, and say what was made and where."""
    from vaegan_dist.training.failure import Aftermath
    from vaegan_dist.training.remote import refuse_standing

    config = load_config(options.preset, config_files(options.config), [*short_forms(options, SHORT), *overrides])
    if options.runtime == "ray":
        # Ray takes seconds to import; only the commands that use it pay for that.
        from vaegan_dist.cluster.ray_train import train_on_ray, with_absolute_paths

        config = with_absolute_paths(config)
    if options.dry_run:
        from vaegan_dist.training.describe import describe

        print(dump_yaml(config))
        print(_plan_text(config, describe(config)))
        return 0
    if options.fresh:
        refuse_standing(config)
    started = time.monotonic()
    progress = Progress(sys.stdout, total_images=config.total_images, run=config.run.name)
    with closing(progress), Aftermath(config, progress.update) as aftermath:
        if options.runtime == "ray":
            outcome = train_on_ray(config, aftermath.note, options.address, options.worker_logs)
        else:
            from vaegan_dist.cluster.runtime import train_local

            outcome = train_local(config, aftermath.note)
    print(_summary(config, outcome.reason, outcome.images_seen, outcome.checkpoint, time.monotonic() - started))
    return STOPPED if outcome.reason == "stopped" else 0


def _plan_text(config: Config, plan: "Plan") -> str:
    """The plan of a run, for people."""
    image = plan.model.image
    lines = [
        f"data         {plan.samples} pictures of {image.width}x{image.height}x{image.channels} "
        f"in {plan.shards} shards",
        f"order        {plan.streams} streams, {_shares(config)} workers; {plan.steps_per_epoch} steps of "
        f"{config.training.batch_size} per epoch",
        model_text(plan.model),
    ]
    return "\n".join(lines)


def _shares(config: Config) -> str:
    """How the streams are shared out, for each number of workers that the run may have."""
    return " or ".join(f"{config.streams // workers} for each of {workers}" for workers in config.world_sizes)


def _summary(config: Config, reason: str, images: int, checkpoint: Path | None, seconds: float) -> str:
    from vaegan_dist.training.resume import run_folder

    folder = run_folder(config)
    head = {
        "done": f"Done: {images:,} images in {_duration(seconds)}.",
        "already done": f"Run '{config.run.name}' was finished before, at {images:,} images; nothing was trained. "
        f"For more, raise phases.{config.phases[-1].name}.images; for another run, choose another --name.",
        "stopped": f"Stopped at {images:,} images, with a checkpoint; run the same command again to continue.",
    }[reason]
    rows = [
        ("checkpoint", checkpoint),
        ("samples", folder / "samples.png"),
        ("reconstructions", folder / "reconstructions.png"),
        ("curves", folder / "curves.png"),
        ("history", folder / "history.jsonl"),
    ]
    lines = [head, *(f"  {name:16} {path}" for name, path in rows if path is not None and Path(path).exists())]
    if reason != "stopped":
        lines += ["The same on a cluster:", f"  {_cluster_command(config, folder)}"]
    return "\n".join(lines)


def _cluster_command(config: Config, folder: Path) -> str:
    data = f"/SHARED/{Path(config.data.path).name}"
    source = f"--preset {config.preset}" if config.preset else f"--config {folder / 'config.yaml'}"
    return (
        f"ray job submit --address http://HEAD:8265 --working-dir . -- python jobs/train.py {source} "
        f"--workers {max(config.cluster.most_workers, 2)} --storage /SHARED/runs --data {data}"
    )


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
