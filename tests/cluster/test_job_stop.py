"""`ray job stop` on a real training job: Ray's own command, and a checkpoint at the image where it stopped."""

import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from tests.cluster.nodes import rows_of
from tests.cluster.test_submit import Head, started
from vaegan_dist.training.checkpoint import checkpoints, images_of

TIMEOUT = 400


def job(head: Head, *words: str) -> "subprocess.CompletedProcess[str]":
    ray = Path(sys.executable).parent / "ray"
    command = [str(ray), "job", words[0], "--address", head.address, *words[1:]]
    return subprocess.run(command, env=head.env, cwd="/", capture_output=True, text=True, timeout=TIMEOUT)


@pytest.mark.chaos
@pytest.mark.ray
@pytest.mark.timeout(1200)
def test_ray_job_stop_ends_a_training_job_with_a_checkpoint(digits: Path, tmp_path: Path) -> None:
    train = (sys.executable, "-m", "vaegan_dist.cli", "train", "--preset", "smoke", "--data", str(digits))
    settings = ("--storage", str(tmp_path), "checkpoint.images=640", "phases.vae.images=100_000_000")
    wait = '{"env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": "120"}}'
    with tempfile.TemporaryDirectory(prefix="vg", dir="/tmp") as home, started(Path(home)) as head:
        options = ("--no-wait", "--submission-id", "stopped", "--runtime-env-json", wait)
        submitted = job(head, "submit", *options, "--", *train, *settings)
        assert submitted.returncode == 0, submitted.stdout + submitted.stderr
        until = time.monotonic() + TIMEOUT
        while not any(row["event"] == "checkpoint" for row in rows_of(tmp_path / "smoke")):
            assert time.monotonic() < until, job(head, "logs", "stopped").stdout
            time.sleep(0.2)
        stopped = job(head, "stop", "stopped")
        assert "was stopped" in stopped.stdout + stopped.stderr, stopped.stdout + stopped.stderr
        log = job(head, "logs", "stopped").stdout
    last = rows_of(tmp_path / "smoke")[-1]
    assert last["event"] == "end" and last["reason"] == "stopped", log
    assert images_of(checkpoints(tmp_path / "smoke")[0]) == last["images_seen"]
    assert "SIGTERM received: stopping at the next step with a checkpoint" in log
