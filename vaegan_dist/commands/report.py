"""Commands that look at a run: status, report."""

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vaegan_dist.commands.common import Subparsers, local
from vaegan_dist.errors import ConfigError, InputError, VaeganError

FAILED, ENDED = 1, ("done", "stopped", "failed")


def _add_run(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=local, metavar="RUN", help="a run's folder, or its name below --storage")
    parser.add_argument("--storage", default="runs", help="folder that holds the runs (default: runs)")
    parser.set_defaults(takes_overrides=False)


def _folder(options: argparse.Namespace) -> Path:
    given = Path(options.folder).expanduser()
    below = Path(options.storage).expanduser() / options.folder
    return below if not given.exists() and below.exists() else given


def add_status(subparsers: Subparsers) -> None:
    parser = subparsers.add_parser(
        "status",
        help="say how a run does",
        description="Say how a run does, from any machine that sees its folder. Exit code 1 if it failed or is stale.",
    )
    _add_run(parser)
    parser.add_argument("--json", action="store_true", help="as one JSON object")
    parser.add_argument("--follow", type=float, metavar="SECONDS", help="again so often, until the run has ended")
    parser.set_defaults(run=status_command)


def status_command(options: argparse.Namespace, overrides: Sequence[str]) -> int:
    """Print a run's status."""
    from vaegan_dist.reporting.status import describe_status, read_status

    if options.follow is not None and options.follow <= 0:
        raise ConfigError(f"--follow={options.follow:g}: give a number of seconds above 0")
    while True:
        status = read_status(_folder(options))
        print(status.to_json() if options.json else describe_status(status), flush=True)
        if options.follow is None or status.state in ENDED:
            return FAILED if status.state in ("failed", "stale") else 0
        time.sleep(options.follow)
        print(flush=True)


def add_report(subparsers: Subparsers) -> None:
    parser = subparsers.add_parser(
        "report",
        help="write a run's report, one HTML page",
        description="Write a run's report: one HTML page that needs no network.",
    )
    _add_run(parser)
    parser.add_argument("--output", type=local, help="file to write (default: report.html in the run's folder)")
    parser.set_defaults(run=report_command)


def report_command(options: argparse.Namespace, overrides: Sequence[str]) -> int:
    """Write a run's page."""
    from vaegan_dist.files import write_whole
    from vaegan_dist.reporting.report import run_report

    folder = _folder(options)
    output = Path(options.output).expanduser() if options.output else folder / "report.html"
    content = run_report(folder, _dataset(folder))
    try:
        write_whole(output, content.encode())
    except OSError as error:
        raise InputError(f"{output}: cannot be written ({error.strerror}); choose another --output") from None
    print(output)
    return 0


def _dataset(folder: Path) -> dict[str, Any] | None:
    """What the run's dataset.json says; None where it cannot be read from here."""
    import yaml

    from vaegan_dist.data.manifest import find_manifest, read_manifest
    from vaegan_dist.data.urls import is_remote, local_path

    try:
        path = yaml.safe_load((folder / "config.yaml").read_text())["data"]["path"]
        if is_remote(path):
            return None
        return read_manifest(find_manifest(local_path(path))).model_dump(mode="json")
    except (OSError, yaml.YAMLError, KeyError, TypeError, VaeganError):
        return None
