"""Random faults, one after the other: at the end the run is the one that nothing happened to, bit for bit."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.chaos.supervisor import INTERVAL
from tests.training.runs import rows_of, tensors_of
from vaegan_dist.reporting.records import Record


def command(digits: Path, storage: Path, name: str, images: int, *more: str) -> list[str]:
    phases = (
        f"phases=[{{name: vae, objective: vae, images: {images // 2}}}, "
        f"{{name: joint, objective: vaegan, images: {images // 2}}}]"
    )
    settings = (
        f"data.path={digits}",
        f"run.storage={storage}",
        f"run.name={name}",
        "cluster.workers=2",
        "training.torch_threads=1",
        "data.loader_workers=1",
        "reporting.tensorboard=false",
        # Neither divides the other: checkpoints fall inside of log intervals.
        "reporting.log_images=192",
        f"checkpoint.images={INTERVAL}",
        "reporting.sample_images=1000000",
        "reporting.samples=4",
    )
    return ["train", "--preset", "smoke", "--runtime", "local", phases, *settings, *more]


def supervise(faults: int, seed: int, images: int, arguments: list[str], timeout: float) -> list[dict[str, object]]:
    process = subprocess.run(
        [sys.executable, "-m", "tests.chaos.supervisor", str(faults), str(seed), str(images), *arguments],
        cwd=Path(__file__).parents[2],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    assert process.returncode == 0, process.stdout[-2000:] + process.stderr[-2000:]
    return [json.loads(line) for line in process.stdout.splitlines()]


def comparable(folder: Path, images: int) -> list[Record]:
    """History rows but for what only faults bring: stop checkpoints, and warnings of damaged ones."""
    ends = (images // 2, images)
    return [
        row
        for row in rows_of(folder)
        if row["event"] != "warning"
        and (row["event"] != "checkpoint" or int(row["images_seen"] or 0) % INTERVAL == 0 or row["images_seen"] in ends)
    ]


def soak(digits: Path, folder: Path, faults: int, seed: int, images: int, timeout: float) -> dict[str, object]:
    calm = supervise(0, 0, images, command(digits, folder, "calm", images), timeout)
    assert calm[-1]["attempts"] == 1
    rows = supervise(faults, seed, images, command(digits, folder, "storm", images), timeout)
    end = rows[-1]
    print(json.dumps(end))
    assert end["faults"] == faults, "the run ended before every fault had happened"
    assert tensors_of(folder / "storm") == tensors_of(folder / "calm")
    assert comparable(folder / "storm", images) == comparable(folder / "calm", images)
    assert not list((folder / "storm").glob(".checkpoint-*")) and not list((folder / "storm").glob(".probe-*"))
    return end


@pytest.mark.multiprocess
def test_a_handful_of_random_faults_leaves_no_trace(digits: Path, tmp_path: Path) -> None:
    soak(digits, tmp_path, faults=5, seed=1, images=19_200, timeout=280)


@pytest.mark.chaos
@pytest.mark.multiprocess
@pytest.mark.timeout(5400)
def test_two_hundred_random_faults_leave_no_trace(digits: Path, tmp_path: Path) -> None:
    end = soak(digits, tmp_path, faults=200, seed=2, images=224_000, timeout=5000)
    kinds = end["kinds"]
    assert isinstance(kinds, dict) and len(kinds) == 9
