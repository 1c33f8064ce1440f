"""Commands for clusters: submit, check-cluster."""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from vaegan_dist.commands.common import Subparsers
from vaegan_dist.errors import ConfigError, VaeganError

if TYPE_CHECKING:  # Ray takes seconds to import
    from vaegan_dist.cluster.check_cluster import NodeReport, Report

OVERLAY = "k8s/overlays/train"
STOP_SECONDS = 60
# Commands of this program that make sense as a job; any other first word is a program of the cluster's nodes.
JOBS = ("prepare", "train", "sweep", "evaluate", "encode")


def add_submit(subparsers: Subparsers) -> None:
    """`vaegan-dist submit -- train --preset …`."""
    parser = subparsers.add_parser(
        "submit",
        help="run a command on a Ray cluster as a job, or render it as a RayJob",
        usage="%(prog)s [options] -- COMMAND [ARGUMENT ...]",
        description="Run a command on a Ray cluster as a job, show its log and end as it ends. COMMAND is one of this "
        f"program ({', '.join(JOBS)}) or any program on the cluster. Ctrl-C stops the job, with time for a checkpoint.",
        epilog="Token and headers come from the environment, as for Ray's own commands: RAY_AUTH_MODE and "
        "RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH; RAY_JOB_HEADERS (a JSON object).",
    )
    parser.add_argument(
        "--address",
        default=os.environ.get("RAY_API_SERVER_ADDRESS") or os.environ.get("RAY_ADDRESS", ""),
        help="http://HEAD:8265 (default: $RAY_API_SERVER_ADDRESS or $RAY_ADDRESS)",
    )
    parser.add_argument(
        "--job-id",
        default=os.environ.get("JOB_NAME"),
        help="the job's id, or the RayJob's name (default: $JOB_NAME, or new)",
    )
    parser.add_argument(
        "--working-dir", metavar="DIR", help="folder to send along and to run in (default: what the image holds)"
    )
    parser.add_argument(
        "--stop-seconds",
        type=int,
        default=STOP_SECONDS,
        help=f"time for a checkpoint when the job is stopped (default: {STOP_SECONDS})",
    )
    parser.add_argument("--detach", action="store_true", help="do not wait for the end")
    other = parser.add_mutually_exclusive_group()
    other.add_argument("--follow", metavar="JOB", help="submit nothing; show this job's log and end as it ends")
    other.add_argument("--stop", metavar="JOB", help="submit nothing; end this job, with time for a checkpoint")
    other.add_argument(
        "--render",
        action="store_true",
        help="print the RayJob that would do this on Kubernetes, for kubectl apply -f -",
    )
    parser.add_argument(
        "--overlay", default=OVERLAY, help=f"kustomize overlay that --render starts from (default: {OVERLAY})"
    )
    parser.add_argument("job", nargs="*", metavar="COMMAND", help="what to run, after --")
    parser.set_defaults(run=submit_command, takes_overrides=False)


def submit_command(options: argparse.Namespace, overrides: Sequence[str]) -> int:
    """Submit, follow or stop a job, or print its manifest."""
    if bool(options.job) == bool(options.follow or options.stop):
        raise ConfigError("submit: name what to run after --, or a job with --follow or --stop; see --help")
    if options.render:
        from vaegan_dist.cluster.render import render

        print(render(Path(options.overlay), options.job, ours=options.job[0] in JOBS, name=options.job_id), end="")
        return 0
    from vaegan_dist.cluster import submit

    client = submit.connect(options.address)
    try:
        if options.stop:
            return submit.stop(client, options.stop)
        if options.follow:
            return submit.follow(client, options.follow)
        command = _command(options.job)
        return submit.submit(client, command, options.job_id, options.stop_seconds, options.detach, options.working_dir)
    except (ConnectionError, RuntimeError, ValueError) as error:
        # Between the first answer and the job's start; later the wait itself bears with a silent cluster.
        raise VaeganError(f"{options.address}: {submit.first_line(error)}") from None


def _command(words: Sequence[str]) -> list[str]:
    """A command of this program as the cluster's Python runs it; any other as it is."""
    if words[0] in JOBS:
        return ["python", "-m", "vaegan_dist.cli", *words]
    return list(words)


def add_check_cluster(subparsers: Subparsers) -> None:
    """`vaegan-dist check-cluster`."""
    parser = subparsers.add_parser(
        "check-cluster",
        help="ask every node of a Ray cluster what it has and how fast it is",
        description="Ask every node of a Ray cluster for its GPUs, driver, packages, clock, storage and network, and "
        "say what would make a run fail or slow. Exit code 1 when something would make it fail.",
    )
    parser.add_argument("--address", default="auto", help="Ray cluster: auto (default) or an address")
    parser.add_argument("--storage", default="runs", help="folder that runs will be written to (default: runs)")
    parser.add_argument(
        "--size", type=int, default=256, metavar="MIB", help="what is written, read and reduced (default: 256 MiB)"
    )
    parser.add_argument(
        "--timeout", type=float, default=120.0, metavar="SECONDS", help="for each answer of a node (default: 120)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    parser.set_defaults(run=check_cluster_command, takes_overrides=False)


def check_cluster_command(options: argparse.Namespace, overrides: Sequence[str]) -> int:
    """Ask all nodes, and print a table and what is wrong."""
    for name in ("size", "timeout"):
        if getattr(options, name) <= 0:
            raise ConfigError(f"--{name}={getattr(options, name)}: give a number above 0")
    from vaegan_dist.cluster.check_cluster import check_cluster
    from vaegan_dist.cluster.ray_train import absolute_path, connect
    from vaegan_dist.config import Config

    connect(Config(), options.address)
    report = check_cluster(
        absolute_path(options.storage), options.size * 2**20, options.timeout, lambda line: print(line, file=sys.stderr)
    )
    if options.json:
        print(json.dumps(report.to_json()))
    else:
        _print_report(report)
    return 1 if report.problems else 0


def _print_report(report: "Report") -> None:
    table = Table(box=None, pad_edge=False)
    for title in ("node", "GPUs", "driver"):
        table.add_column(title)
    for title in ("CPUs", "memory", "/dev/shm", "clock", "write", "read", "to next", "all-reduce"):
        table.add_column(title, justify="right")
    for node in report.nodes:
        table.add_row(*_row(node))
    # A pipe has no width of its own, and a cut table is of no use.
    Console(width=None if sys.stdout.isatty() else 160).print(table)
    for kind, lines in (("warning", report.warnings), ("error", report.problems)):
        for line in lines:
            print(f"{kind}: {line}")
    count = len(report.problems)
    print(f"{len(report.nodes)} nodes: {'fit to train' if not count else f'{count} to mend'}")


def _row(node: "NodeReport") -> list[str]:
    facts, gib = node.facts, 2**30
    return [
        f"{facts.address} ({facts.host})" + ("" if node.trains else ", head only"),
        f"{len(facts.gpus)} x {facts.gpus[0]}" if facts.gpus else "none",
        facts.driver or "-",
        str(facts.cpus),
        f"{facts.memory / gib:.0f} GiB",
        f"{facts.shm / gib:.1f} GiB",
        f"{node.clock_seconds * 1000:+.0f} ms",
        f"{node.storage.write / 1e6:.0f} MB/s" if node.storage else "-",
        f"{node.storage.read / 1e6:.0f} MB/s" if node.storage else "-",
        f"{node.link.next_node / 1e6:.0f} MB/s" if node.link else "-",
        f"{node.link.all_reduce / 1e6:.0f} MB/s" if node.link else "-",
    ]
