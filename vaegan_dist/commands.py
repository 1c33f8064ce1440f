"""What each command of the command line does, once its options are read."""

import argparse
import sys
import time
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

from pydantic import ValidationError
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

from vaegan_dist.config import Config
from vaegan_dist.config_source import dump_yaml, load_config, type_name
from vaegan_dist.data.manifest import read_manifest
from vaegan_dist.data.prepare import PrepareOptions, prepare
from vaegan_dist.errors import ConfigError
from vaegan_dist.reporting.progress import Progress
from vaegan_dist.training.describe import Plan, describe
from vaegan_dist.training.failure import Aftermath
from vaegan_dist.training.resume import refuse_existing, run_folder

PLAIN_SECONDS = 10.0
STOPPED = 75  # EX_TEMPFAIL: a checkpoint stands, and the same command continues


def add_prepare_options(parser: argparse.ArgumentParser) -> None:
    """One option per field of `PrepareOptions`, with its type, default and description."""
    for name, field in PrepareOptions.model_fields.items():
        default = "required" if field.is_required() else f"default: {field.get_default(call_default_factory=True)}"
        text = f"{' '.join((field.description or '').split())} ({type_name(field)}; {default})".replace("%", "%%")
        flag = f"--{name.replace('_', '-')}"
        if field.annotation is bool:
            parser.add_argument(flag, action="store_true", default=argparse.SUPPRESS, help=text)
        elif name in ("source", "output"):
            parser.add_argument(name, help=text)
        else:
            parser.add_argument(flag, default=argparse.SUPPRESS, metavar=type_name(field), help=text)


def prepare_command(options: argparse.Namespace, overrides: Sequence[str]) -> int:
    """Make a data set and say what it is."""
    given = {name: getattr(options, name) for name in PrepareOptions.model_fields if hasattr(options, name)}
    try:
        settings = PrepareOptions.model_validate(given)
    except ValidationError as error:
        first = error.errors()[0]
        key = str(first["loc"][0]).replace("_", "-") if first["loc"] else "options"
        raise ConfigError(f"--{key}={first.get('input')}: {first['msg']}") from None
    with closing(_Counter("prepare")) as counter:
        made = prepare(settings, counter)
    for picture in made.broken:
        print(f"left out: {picture.name}: {picture.cause}", file=sys.stderr)
    for split, path in made.manifests.items():
        manifest = read_manifest(path)
        print(
            f"{split}: {manifest.samples} pictures of {manifest.width}x{manifest.height}x{manifest.channels} in "
            f"{len(manifest.shards)} shards, {'there already' if made.reused else 'made'}: {path.parent}"
        )
    return 0


def index_command(options: argparse.Namespace, overrides: Sequence[str]) -> int:
    """Write a dataset.json for existing shards."""
    from vaegan_dist.data.existing import index_existing

    path = index_existing(
        options.shards,
        folder=options.folder,
        split=options.split,
        layout=options.layout,
        overwrite=options.overwrite,
    )
    manifest = read_manifest(path)
    print(f"{path}: {manifest.samples} pictures in {len(manifest.shards)} shards")
    return 0


def verify_command(options: argparse.Namespace, overrides: Sequence[str]) -> int:
    """Check a data set; one line for each problem."""
    from vaegan_dist.data.verify import verify

    with closing(_Counter("verify")) as counter:
        problems = verify(options.dataset, full=options.full, progress=counter)
    for problem in problems:
        print(problem)
    found = {0: "no problem found", 1: "1 problem"}.get(len(problems), f"{len(problems)} problems")
    print(f"{options.dataset}: {found}")
    return 1 if problems else 0


class _Counter:
    """Progress of a countable job: a bar on a terminal, a line every ten seconds elsewhere."""

    def __init__(self, title: str) -> None:
        self.title, self.interactive = title, sys.stderr.isatty()
        self.spoken = time.monotonic()
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self.bar = RichProgress(*columns, transient=True) if self.interactive else None
        if self.bar is not None:
            self.bar.start()
            self.task = self.bar.add_task(title, total=None)

    def __call__(self, done: int, total: int | None) -> None:
        """`done` of `total` (None: not known yet)."""
        if self.bar is not None:
            self.bar.update(self.task, completed=done, total=total)
        elif time.monotonic() - self.spoken > PLAIN_SECONDS:
            self.spoken = time.monotonic()
            print(f"{self.title}: {done}{f' of {total}' if total else ''} pictures", file=sys.stderr, flush=True)

    def close(self) -> None:
        """Remove the bar."""
        if self.bar is not None:
            self.bar.stop()


def train_command(options: argparse.Namespace, overrides: Sequence[str]) -> int:
    """Train, and say what was made and where."""
    config = load_config(options.preset, options.config, [*_short_forms(options), *overrides])
    if options.runtime == "ray":
        # Ray takes seconds to import; only the commands that use it pay for that.
        from vaegan_dist.cluster.ray_train import train_on_ray, with_absolute_paths

        config = with_absolute_paths(config)
    if options.dry_run:
        print(dump_yaml(config))
        print(_plan_text(config, describe(config)))
        return 0
    if options.fresh:
        refuse_existing(run_folder(config))
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


def _short_forms(options: argparse.Namespace) -> list[str]:
    keys = {
        "name": "run.name",
        "storage": "run.storage",
        "data": "data.path",
        "workers": "cluster.workers",
        "seed": "run.seed",
    }
    return [f"{key}={getattr(options, name)}" for name, key in keys.items() if getattr(options, name) is not None]


def _plan_text(config: Config, plan: Plan) -> str:
    """The plan of a run, for people."""
    image = plan.image
    lines = [
        f"data         {plan.samples} pictures of {image.width}x{image.height}x{image.channels} "
        f"in {plan.shards} shards",
        f"order        {plan.streams} streams, {plan.streams // config.cluster.workers} for each of "
        f"{config.cluster.workers} workers; {plan.steps_per_epoch} steps of {config.training.batch_size} per epoch",
        "parameters   " + ", ".join(f"{name} {count:,}" for name, count in plan.parameters.items()),
    ]
    lines += [
        f"phase        {phase.name}: {phase.images:,} images in {phase.steps:,} steps, trains "
        f"{', '.join(phase.trains)}, {phase.flops_per_image / 1e9:.4g} GFLOP per image"
        for phase in plan.phases
    ]
    return "\n".join(lines)


def _summary(config: Config, reason: str, images: int, checkpoint: Path | None, seconds: float) -> str:
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
        lines += ["The same on a cluster:", f"  {_cluster_command(config)}"]
    return "\n".join(lines)


def _cluster_command(config: Config) -> str:
    data = f"/SHARED/{Path(config.data.path).name}"
    source = f"--preset {config.preset}" if config.preset else f"--config {run_folder(config) / 'config.yaml'}"
    return (
        f"ray job submit --address http://HEAD:8265 --working-dir . -- python jobs/train.py {source} "
        f"--workers {max(config.cluster.workers, 2)} --storage /SHARED/runs --data {data}"
    )


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def sample_command(options: argparse.Namespace, overrides: Sequence[str]) -> int:
    """Write a sheet of generated pictures."""
    from vaegan_dist.evaluation.pictures import grid, save_png
    from vaegan_dist.use import generate

    if options.count < 1:
        raise ConfigError(f"--count={options.count}: give a number above 0")
    save_png(grid(generate(Path(options.model), options.weights, options.count, options.seed)), Path(options.output))
    print(options.output)
    return 0


def reconstruct_command(options: argparse.Namespace, overrides: Sequence[str]) -> int:
    """Write a sheet of pictures above their reconstructions."""
    from vaegan_dist.evaluation.pictures import comparison, save_png
    from vaegan_dist.use import reconstruct

    if options.count < 1:
        raise ConfigError(f"--count={options.count}: give a number above 0")
    pairs = reconstruct(Path(options.model), options.weights, options.data, options.split, options.count)
    save_png(comparison(*pairs), Path(options.output))
    print(options.output)
    return 0
