"""Runs one command on a Ray cluster as a job and ends as it ended: `vaegan-dist submit -- COMMAND`.

What `ray job submit` does, with three differences: the exit code is the command's own; a signal stops the job with time
for its checkpoint; a job id that is known already is followed while that job runs, and tried again (<id>-2) when it
failed, so that a restarted pod finds its job and a retried one continues its run. Address and token come from the
environment as for Ray's own commands: RAY_API_SERVER_ADDRESS or RAY_ADDRESS; RAY_AUTH_MODE and RAY_AUTH_TOKEN or
RAY_AUTH_TOKEN_PATH.
"""

import asyncio
import json
import os
import shlex
import sys
import time
import uuid
from collections.abc import Mapping, Sequence
from typing import Any

import aiohttp
from ray.exceptions import AuthenticationError
from ray.job_submission import JobDetails, JobStatus, JobSubmissionClient

from vaegan_dist.cluster.signals import stop_signals
from vaegan_dist.errors import STOPPED, ConfigError, InputError, VaeganError

STOP_SECONDS = 60
POLL_SECONDS = 1.0
SILENCE_SECONDS = 300.0


def submit(
    client: JobSubmissionClient,
    command: Sequence[str],
    job_id: str | None,
    stop_seconds: int,
    detach: bool = False,
    working_dir: str | None = None,
) -> int:
    """Submit the command, or find the job of that id; print its log until it ends and return its exit code.

    Args:
        command: program and arguments; nothing of it is read by a shell.
        stop_seconds: time between SIGTERM and SIGKILL when the job is stopped.
        detach: return 0 as soon as the job is submitted.
        working_dir: folder that is sent along and that the command runs in, less what its .gitignore names.
    """
    job_id = job_id or f"vaegan-{uuid.uuid4().hex[:12]}"
    job_id, earlier = _next_id(job_id, {job.submission_id: job.status for job in client.list_jobs()})
    if earlier:
        print(f"job {job_id}: found, from an earlier try", flush=True)
    else:
        environment: dict[str, Any] = {"env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": str(stop_seconds)}}
        if working_dir is not None:
            environment["working_dir"] = working_dir
        client.submit_job(entrypoint=shlex.join(command), submission_id=job_id, runtime_env=environment)
        print(f"job {job_id}: submitted", flush=True)
    if detach:
        print(f"  vaegan-dist submit --follow {job_id}    its log, until it ends", flush=True)
        print(f"  vaegan-dist submit --stop {job_id}      ends it with a checkpoint", flush=True)
        return 0
    return follow(client, job_id)


def follow(client: JobSubmissionClient, job_id: str) -> int:
    """Print a job's log until it ends and return its exit code; a signal stops the job."""
    _known(client, job_id)
    with stop_signals(lambda: _stop(client, job_id)):
        details = asyncio.run(_follow(client, job_id))
    return _ending(job_id, details)


def stop(client: JobSubmissionClient, job_id: str) -> int:
    """Ask a job to end, print its last words and return 0 once it has ended, however it did."""
    if _known(client, job_id).is_terminal():
        print(f"job {job_id}: had ended before: {client.get_job_status(job_id)}", flush=True)
        return 0
    client.stop_job(job_id)
    details = asyncio.run(_follow(client, job_id))
    print(f"job {job_id}: {details.status}", flush=True)
    return 0


def _known(client: JobSubmissionClient, job_id: str) -> JobStatus:
    try:
        return client.get_job_status(job_id)
    except RuntimeError as error:
        raise InputError(f"job {job_id}: {first_line(error)}; `ray job list` names the jobs") from None


def _next_id(job_id: str, known: Mapping[str | None, JobStatus]) -> tuple[str, bool]:
    """The id to use, and whether that job is to be followed rather than submitted.

    A job that failed or was stopped is tried again as <id>-2, <id>-3, …; Ray takes an id only once.
    """
    tried, number = job_id, 1
    while tried in known:
        if not known[tried].is_terminal() or known[tried] == JobStatus.SUCCEEDED:
            return tried, True
        number += 1
        tried = f"{job_id}-{number}"
    return tried, False


async def _follow(client: JobSubmissionClient, job_id: str) -> JobDetails:
    """The job's log on our output, then how it ended. After a lost connection the log goes on where it stopped."""
    shown, heard = 0, time.monotonic()
    while True:
        try:
            position = 0
            async for part in client.tail_job_logs(job_id):
                # Every connection begins with the log's beginning.
                print(part[max(0, shown - position) :], end="", flush=True)
                position += len(part)
                shown, heard = max(shown, position), time.monotonic()
            details = client.get_job_info(job_id)
            heard = time.monotonic()
            if details.status.is_terminal():
                return details
        except (OSError, RuntimeError, aiohttp.ClientError) as error:
            if time.monotonic() - heard > SILENCE_SECONDS:
                raise VaeganError(
                    f"job {job_id}: the cluster has not answered for {SILENCE_SECONDS:g} s: {first_line(error)}"
                ) from None
        await asyncio.sleep(POLL_SECONDS)


def _ending(job_id: str, details: JobDetails) -> int:
    """The command's exit code; 75 for a job that somebody stopped, because the same command continues it."""
    if details.status == JobStatus.SUCCEEDED:
        return 0
    message = first_line(details.message or details.status)
    print(f"job {job_id}: {details.status}: {message}", file=sys.stderr, flush=True)
    if details.status == JobStatus.STOPPED:
        return STOPPED
    # None: the command never ran, or nobody was left to see its end.
    return details.driver_exit_code or 1


def _stop(client: JobSubmissionClient, job_id: str) -> None:
    try:
        client.stop_job(job_id)
    except (ConnectionError, RuntimeError) as error:
        # The wait for the job's end goes on and says so when the cluster stays silent.
        print(f"job {job_id}: could not be told to stop: {first_line(error)}", file=sys.stderr, flush=True)


def connect(address: str) -> JobSubmissionClient:
    """A client of the cluster's job API.

    Raises:
        ConfigError: no address.
        VaeganError: nobody answers there, or the token is refused.
    """
    if not address:
        raise ConfigError("--address: no cluster named; give http://HEAD:8265, or set RAY_API_SERVER_ADDRESS")
    try:
        return JobSubmissionClient(address, headers=_headers())
    except AuthenticationError as error:
        raise VaeganError(
            f"{address}: {first_line(error)}; give this cluster's token in RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH, and "
            f"set RAY_AUTH_MODE=token"
        ) from None
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise VaeganError(f"{address}: {first_line(error)}") from None


def _headers() -> dict[str, str] | None:
    """What a proxy before the cluster asks for, as for Ray's own commands: a JSON object in RAY_JOB_HEADERS."""
    given = os.environ.get("RAY_JOB_HEADERS")
    if not given:
        return None
    try:
        headers = json.loads(given)
    except ValueError:
        headers = None
    if not isinstance(headers, dict):
        # The value may hold a secret, so it is not shown.
        raise ConfigError('RAY_JOB_HEADERS: not a JSON object; give {"Name": "value"}')
    return {str(name): str(value) for name, value in headers.items()}


def first_line(thing: object) -> str:
    """What an error says first."""
    lines = str(thing).strip().splitlines()
    return lines[0] if lines else type(thing).__name__
