"""Random faults of Ray itself, and a supervisor that gives the command again: the end is that of a calm plain run."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.chaos.test_soak import command, comparable, supervise
from tests.training.runs import tensors_of

IMAGES = 128_000


@pytest.mark.chaos
@pytest.mark.ray
@pytest.mark.timeout(5400)
def test_twenty_random_faults_of_ray_leave_no_trace(digits: Path, tmp_path: Path) -> None:
    calm = supervise(0, 0, IMAGES, command(digits, tmp_path, "calm", IMAGES), 1200)
    assert calm[-1]["attempts"] == 1
    # The same run as the plain one but for what runs it.
    storm = [word for word in command(digits, tmp_path, "storm", IMAGES) if word not in ("--runtime", "local")]
    done = subprocess.run(
        [sys.executable, "-m", "tests.chaos.ray_supervisor", "20", "3", str(IMAGES), *storm, "cluster.max_failures=5"],
        cwd=Path(__file__).parents[2],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        text=True,
        timeout=5000,
    )
    print(done.stdout)
    log = (tmp_path / "ray.log").read_text()
    assert done.returncode == 0, done.stdout[-2000:] + log[-4000:]
    end = json.loads(done.stdout.splitlines()[-1])
    assert end["faults"] == 20 and len(end["kinds"]) >= 5
    assert tensors_of(tmp_path / "storm") == tensors_of(tmp_path / "calm")
    assert comparable(tmp_path / "storm", IMAGES) == comparable(tmp_path / "calm", IMAGES)
    assert not list((tmp_path / "storm").glob(".checkpoint-*"))
