"""Ctrl-C once and twice, and SIGTERM, on the real command: a checkpoint and 75, or an end at once and 130."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from vaegan_dist.training.checkpoint import checkpoints, images_of

TIMEOUT = 200
# Slow steps, so that the second signal comes before the first one's stop.
SLOW = """
import sys, time
from vaegan_dist.training.meter import Agreement
Agreement.INTERVAL_SECONDS = 3600.0
from vaegan_dist.cli import main
sys.exit(main(sys.argv[1:]))
"""


def start(digits: Path, storage: Path, program: list[str]) -> "subprocess.Popen[str]":
    settings = [f"data.path={digits}", f"run.storage={storage}", "reporting.tensorboard=false"]
    endless = ["phases=[{name: vae, objective: vae, images: 100_000_000}]", "checkpoint.images=640"]
    process = subprocess.Popen(
        [sys.executable, *program, "train", "--preset", "smoke", "--runtime", "local", *settings, *endless],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert process.stdout is not None
    assert any("checkpoint" in line for line in process.stdout)
    return process


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_one_request_to_stop_ends_in_a_checkpoint(number: signal.Signals, digits: Path, tmp_path: Path) -> None:
    process = start(digits, tmp_path, ["-m", "vaegan_dist.cli"])
    try:
        process.send_signal(number)
        out, error = process.communicate(timeout=TIMEOUT)
    finally:
        process.kill()
    assert process.returncode == 75 and "Traceback" not in error
    assert f"{number.name} received: stopping at the next step with a checkpoint" in error
    last = json.loads((tmp_path / "smoke" / "history.jsonl").read_text().splitlines()[-1])
    assert last["event"] == "end" and last["reason"] == "stopped"
    assert images_of(checkpoints(tmp_path / "smoke")[0]) == last["images_seen"]
    assert "run the same command again to continue" in out


def test_a_second_ctrl_c_ends_at_once(digits: Path, tmp_path: Path) -> None:
    process = start(digits, tmp_path, ["-c", SLOW])
    try:
        process.send_signal(signal.SIGINT)
        assert process.stderr is not None and "Ctrl-C again stops at once" in process.stderr.readline()
        process.send_signal(signal.SIGINT)
        _, error = process.communicate(timeout=TIMEOUT)
    finally:
        process.kill()
    assert process.returncode == 130 and error.splitlines()[-1] == "interrupted"
