"""Real Ray Train on loopback: the same run as without Ray, through killed workers and requests to stop."""

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from safetensors.torch import load_file

from vaegan_dist.cli import main
from vaegan_dist.training.checkpoint import checkpoints

pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]
TIMEOUT = 500


@pytest.fixture
def environment() -> Iterator[dict[str, str]]:
    """Variables for a driver whose Ray keeps its files, sockets and token to itself."""
    # Unix sockets have short paths, so not below pytest's own folder.
    with tempfile.TemporaryDirectory(prefix="vg", dir="/tmp") as folder:
        kept = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
        yield {**kept, "RAY_TMPDIR": folder, "HOME": folder, "OMP_NUM_THREADS": "1"}


def start(environment: dict[str, str], *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "vaegan_dist.cli", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
    )


def arguments_of(digits: Path, storage: Path, *more: str) -> list[str]:
    shared = ["train", "--preset", "smoke", "--data", str(digits), "--storage", str(storage), "--workers", "2"]
    return [*shared, "training.torch_threads=1", *more]


def wait_for(process: subprocess.Popen[str], word: str) -> str:
    """What the process has said when `word` appears."""
    said = ""
    assert process.stdout is not None
    for line in process.stdout:
        said += line
        if word in line:
            return said
    raise AssertionError(f"'{word}' never appeared in:\n{said}")


def rows_of(folder: Path) -> list[dict]:  # type: ignore[type-arg]
    return [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]


def weights_of(folder: Path) -> dict[str, bytes]:
    return {k: v.numpy().tobytes() for k, v in load_file(checkpoints(folder)[0] / "model.safetensors").items()}


def test_ray_trains_the_same_bytes_as_plain_processes(
    environment: dict[str, str], digits: Path, tmp_path: Path
) -> None:
    driver = start(environment, *arguments_of(digits, tmp_path / "ray", "--address", "local"))
    try:
        output, _ = driver.communicate(timeout=TIMEOUT)
    finally:
        driver.kill()
    assert driver.returncode == 0, output
    assert "Done: 2,560 images" in output and "Traceback" not in output
    assert "(RayTrainWorker" not in output, "the workers' own prints are not for people"
    assert main(arguments_of(digits, tmp_path / "plain", "--runtime", "local")) == 0
    assert weights_of(tmp_path / "ray" / "smoke") == weights_of(tmp_path / "plain" / "smoke")
    # Where a checkpoint's row stands among the others depends on when it was written.
    terms = [
        [row.get("loss_rec") for row in rows_of(tmp_path / kind / "smoke") if row["event"] == "train"]
        for kind in ("ray", "plain")
    ]
    assert terms[0] == terms[1] and len(terms[0]) == 5


def test_a_killed_worker_is_replaced_and_a_signal_stops_with_a_checkpoint(
    environment: dict[str, str], digits: Path, tmp_path: Path
) -> None:
    arguments = arguments_of(digits, tmp_path, "--address", "local", "phases.joint.images=100_000_000")
    driver = start(environment, *arguments)
    family = psutil.Process(driver.pid)
    try:
        said = wait_for(driver, "phase joint begins")
        workers = [p for p in psutil.process_iter(["cmdline", "environ"]) if _is_worker_of(p, environment)]
        assert len(workers) == 2, said
        workers[-1].kill()
        said = wait_for(driver, "resume")
        driver.send_signal(signal.SIGTERM)
        rest, _ = driver.communicate(timeout=TIMEOUT)
    finally:
        for process in [*family.children(recursive=True), family] if family.is_running() else []:
            process.kill()
        driver.wait(TIMEOUT)
    assert driver.returncode == 75, rest
    assert "Stopped at" in rest and "run the same command again" in rest
    rows = rows_of(tmp_path / "smoke")
    resumed = [row["images_seen"] for row in rows if row["event"] == "resume"]
    assert len(resumed) == 1 and resumed[0] >= 1024
    assert rows[-1]["event"] == "end" and rows[-1]["reason"] == "stopped"
    places = [row["images_seen"] for row in rows if row["event"] == "train"]
    assert places == sorted(set(places)), "a row is doubled"
    newest = checkpoints(tmp_path / "smoke")[0]
    assert newest.name == f"checkpoint-{rows[-1]['images_seen']:012d}"


def _is_worker_of(process: psutil.Process, environment: dict[str, str]) -> bool:
    """Whether a process is a training worker of this test's own Ray."""
    title = " ".join(process.info["cmdline"] or [])
    return "RayTrainWorker" in title and (process.info["environ"] or {}).get("RAY_TMPDIR") == environment["RAY_TMPDIR"]


def test_a_mistake_never_starts_ray(environment: dict[str, str], digits: Path, tmp_path: Path) -> None:
    driver = start(environment, *arguments_of(digits, tmp_path, "objective.bta=3"))
    output, _ = driver.communicate(timeout=TIMEOUT)
    assert driver.returncode == 2
    assert output.startswith("error: objective.bta=3: unknown key") and output.count("\n") == 1
    assert not list(Path(environment["RAY_TMPDIR"]).glob("ray*"))
