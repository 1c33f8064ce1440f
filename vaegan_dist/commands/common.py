"""What the commands of the command line share."""

import argparse
import sys
import time
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import TypeAlias

from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

from vaegan_dist.config_source import preset_names
from vaegan_dist.data.urls import is_remote
from vaegan_dist.errors import ConfigError, InputError
from vaegan_dist.files import write_whole

CONFIG_BYTES = 2**20
PLAIN_SECONDS = 10.0


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, like every other error of this program."""

    def error(self, message: str) -> None:  # type: ignore[override]
        raise ConfigError(f"{message} (see {self.prog} --help)")


Subparsers: TypeAlias = "argparse._SubParsersAction[Parser]"


def local(text: str) -> str:
    """Type of an argument that is a path: a URL would quietly become a folder called `s3:`."""
    if is_remote(text):
        raise argparse.ArgumentTypeError(f"{text} is a URL; give a path of this machine, and copy from or to the store")
    return text


# Options of every command that begins a run, and the configuration keys that they are short for.
SHORT_FORMS = {"name": "run.name", "storage": "run.storage", "data": "data.path", "seed": "run.seed"}


def add_run_options(parser: argparse.ArgumentParser) -> None:
    """What a run is made from and where it is carried out."""
    parser.add_argument("--preset", help=f"start from a preset: {', '.join(preset_names())}")
    add_config_option(parser)
    parser.add_argument(
        "--address", default="auto", help="Ray cluster: auto (default), local (start one here), or an address"
    )
    parser.add_argument("--worker-logs", action="store_true", help="also show what Ray's workers print")
    for name, key in SHORT_FORMS.items():
        parser.add_argument(f"--{name}", help=f"short for {key}")


def add_config_option(parser: argparse.ArgumentParser) -> None:
    """Files of a configuration; those behind a URL are fetched when the configuration is read."""
    parser.add_argument(
        "--config", action="append", default=[], metavar="FILE", help="YAML laid over the preset; a URL will do"
    )


def config_files(given: Sequence[str]) -> list[str]:
    """Files of a configuration on this machine.

    Raises:
        InputError: one behind a URL is not there, or no access.
    """
    return [_fetched(file) if is_remote(file) else file for file in given]


def _fetched(url: str) -> str:
    """A copy of a small file behind a URL."""
    from vaegan_dist.data.cache import cache_folder, content_key
    from vaegan_dist.data.transfer import Transfer

    folder, _, name = url.rpartition("/")
    content, cache = Transfer(folder).small(name, CONFIG_BYTES), cache_folder("configs")
    if content is None:
        raise InputError(f"--config {url}: is not there (404); check the URL")
    if cache is None:
        raise InputError(f"--config {url}: no folder for a copy can be made here; set VAEGAN_CACHE to one")
    path = cache / f"{content_key(url)}.yaml"
    write_whole(path, content)
    return str(path)


def short_forms(options: argparse.Namespace, more: Mapping[str, str] = MappingProxyType({})) -> list[str]:
    """The short options that were given, as KEY=VALUE.

    Args:
        more: short forms of this command alone, name to key.
    """
    keys = {**SHORT_FORMS, **more}
    return [f"{key}={getattr(options, name)}" for name, key in keys.items() if getattr(options, name) is not None]


def add_model_options(parser: argparse.ArgumentParser, *, exported: bool = False) -> None:
    """Which model, and which of its weights.

    Args:
        exported: whether a folder of `export` will do.
    """
    kinds = (
        "a run's folder, one of its checkpoints, or an exported folder"
        if exported
        else "a run's folder, or one of its checkpoints"
    )
    parser.add_argument("model", metavar="RUN", help=kinds)
    parser.add_argument("--weights", choices=["ema", "raw"], default="ema", help="averaged or last weights (ema)")


def add_data_options(parser: argparse.ArgumentParser, split: str = "train") -> None:
    """Which pictures a trained model is given."""
    parser.add_argument("--data", help="prepared data set (default: the run's own)")
    parser.add_argument("--split", default=split, help=f"its split (default: {split})")


def require_at_least(options: argparse.Namespace, least: int, *names: str) -> None:
    """Raise ConfigError for an option below `least`."""
    for name in names:
        if getattr(options, name) < least:
            raise ConfigError(f"--{name.replace('_', '-')}={getattr(options, name)}: give a number of at least {least}")


class Counter:
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
