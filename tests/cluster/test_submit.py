"""The nightly submission of k8s/overlays/cron-submit, against a real head with token authentication on loopback."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from tests.k8s.rendering import REPOSITORY

TOKEN = "0123456789abcdef" * 4
SUBMIT = [sys.executable, "-m", "vaegan_dist.cli", "submit"]

pytestmark = pytest.mark.ray


@dataclass(frozen=True)
class Head:
    address: str
    env: dict[str, str]

    def submit(self, *command: str, timeout: float = 240, **env: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*SUBMIT, f"--address={self.address}", *command],
            env=self.env | env, cwd="/", capture_output=True, text=True, timeout=timeout,
        )  # fmt: skip


def free_ports(count: int) -> list[str]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [str(each.getsockname()[1]) for each in sockets]


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    """A head as the manifests start one (`ray start --block`, started in the folder that holds jobs/)."""
    # Unix sockets have short paths, so not below pytest's own folder.
    with tempfile.TemporaryDirectory(prefix="vg", dir="/tmp") as folder, started(Path(folder)) as head:
        yield head


@contextlib.contextmanager
def started(home: Path) -> Iterator[Head]:
    port, dashboard, agent, metrics, client = free_ports(5)
    environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")} | {
        "HOME": str(home),
        "RAY_TMPDIR": str(home),
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": TOKEN,
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "OMP_NUM_THREADS": "1",
    }
    command = [
        str(Path(sys.executable).parent / "ray"), "start", "--head", "--block", "--node-ip-address=127.0.0.1",
        f"--port={port}", "--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}", "--num-cpus=2",
        f"--dashboard-agent-listen-port={agent}", f"--metrics-export-port={metrics}",
        f"--ray-client-server-port={client}",
        "--object-store-memory=200000000",
    ]  # fmt: skip
    log = (home / "ray.log").open("w")
    process = subprocess.Popen(
        command, env=environment, cwd=REPOSITORY, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
    )
    address = f"http://127.0.0.1:{dashboard}"
    try:
        _wait_for(f"{address}/api/version", process, home / "ray.log")
        yield Head(address, environment)
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(60)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            log.close()


def _wait_for(url: str, process: "subprocess.Popen[bytes]", log: Path) -> None:
    request = urllib.request.Request(url, headers={"Authorization": f"Bearer {TOKEN}"})
    until = time.monotonic() + 180
    while time.monotonic() < until and process.poll() is None:
        with contextlib.suppress(urllib.error.URLError, ConnectionError), urllib.request.urlopen(request, timeout=10):
            return
        time.sleep(0.5)
    pytest.fail(f"the head did not start: {log.read_text()[-2000:]}")


def manifest_command(address: str, folder: Path) -> list[str]:
    """The command of the overlay's CronJob: another address and folders, the small preset, one CPU worker."""
    overlay = REPOSITORY / "k8s" / "overlays" / "cron-submit" / "submit.yaml"
    pod = yaml.safe_load(overlay.read_text())["spec"]["jobTemplate"]["spec"]["template"]["spec"]
    words = pod["containers"][0]["command"]
    assert words[:2] == ["vaegan-dist", "submit"]
    changes = {
        "http://vaegan-head-svc:8265": address,
        "/shared": str(folder),
        "/etc/vaegan": str(folder),
        "digits-conv": "smoke",
    }
    for old, new in changes.items():
        words = [word.replace(old, new) for word in words]
    return [*SUBMIT, *words[2:]]


def test_the_manifests_command_trains(head: Head, digits: Path, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("{}\n")
    (tmp_path / "data.yaml").write_text(f"data: {{path: {digits}}}\n")
    (tmp_path / "cluster.yaml").write_text((REPOSITORY / "k8s/overlays/dev/cluster.yaml").read_text())
    command = manifest_command(head.address, tmp_path)
    environment = head.env | {"JOB_NAME": "vaegan-nightly-submit-1"}
    done = subprocess.run(command, env=environment, cwd="/", capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    assert "job vaegan-nightly-submit-1: submitted" in done.stdout
    assert "Done: 2,560 images" in done.stdout
    assert (tmp_path / "runs" / "nightly" / "history.jsonl").exists()
    again = subprocess.run(command, env=environment, cwd="/", capture_output=True, text=True, timeout=120)
    assert again.returncode == 0
    assert "found, from an earlier try" in again.stdout


def test_the_jobs_own_exit_code_is_passed_on_and_a_retry_is_a_new_try(head: Head) -> None:
    command = ("--job-id=fails", "--", "sh", "-c", "echo said; exit 7")
    first, second = head.submit(*command), head.submit(*command)
    assert (first.returncode, second.returncode) == (7, 7), first.stdout + first.stderr
    assert "said" in first.stdout
    assert "job fails-2: submitted" in second.stdout


def test_a_wrong_token_is_one_clear_line(head: Head) -> None:
    done = head.submit("--", "true", RAY_AUTH_TOKEN="f" * 64)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1, done.stderr
    assert head.address in done.stderr
    assert "token" in done.stderr.lower()


def test_asked_to_end_it_gives_the_job_time(head: Head) -> None:
    """SIGTERM, as to an evicted pod: the job has longer than Ray's 3 seconds and says its last word."""
    script = "trap 'sleep 5; echo saved; exit 75' TERM; echo ready; while :; do sleep 0.2; done"
    process = subprocess.Popen(
        [*SUBMIT, f"--address={head.address}", "--job-id=stopped", "--", "bash", "-c", script],
        env=head.env, cwd="/", stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    said = []
    for line in process.stdout:
        said.append(line)
        if line.strip() == "ready":
            process.send_signal(signal.SIGTERM)
    assert process.wait(120) == 75, said
    assert "saved\n" in said


def test_a_job_is_left_alone_found_again_and_stopped(head: Head) -> None:
    script = "trap 'echo saved; exit 75' TERM; echo ready; while :; do sleep 0.2; done"
    left = head.submit("--job-id=long", "--detach", "--", "bash", "-c", script)
    assert left.returncode == 0, left.stderr
    assert "--follow long" in left.stdout
    stopped = head.submit("--stop=long")
    assert stopped.returncode == 0, stopped.stderr
    assert "job long: STOPPED" in stopped.stdout
    followed = head.submit("--follow=long")
    assert followed.returncode == 75
    unknown = head.submit("--stop=nobody")
    assert (unknown.returncode, unknown.stderr.count("\n")) == (2, 1), unknown.stderr


def test_headers_must_be_json_and_are_not_shown(head: Head) -> None:
    done = head.submit("--", "true", RAY_JOB_HEADERS="secret")
    assert done.returncode == 2
    assert "RAY_JOB_HEADERS" in done.stderr
    assert "secret" not in done.stderr
