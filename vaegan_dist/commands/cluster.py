"""Commands for clusters: submit."""

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from vaegan_dist.commands.common import Subparsers
from vaegan_dist.errors import ConfigError, VaeganError

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
