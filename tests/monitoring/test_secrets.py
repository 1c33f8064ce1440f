"""A canary in every credential variable and in storage URLs appears nowhere.

Not in logs, history, checkpoints, reports, metrics, trackers, nor in the list of processes."""

import contextlib
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.monitoring.servers import free_port, get
from vaegan_dist.cli import main

CANARY = "CANARY7f3a9secret"
VARIABLES = [
    "AWS_ACCESS_KEY_ID",
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
    "GOOGLE_SERVICE_ACCOUNT_KEY",
    "AZURE_STORAGE_ACCOUNT_KEY",
    "AZURE_STORAGE_SAS_KEY",
    "HF_TOKEN",
    "WANDB_API_KEY",
    "MLFLOW_TRACKING_PASSWORD",
    "MLFLOW_TRACKING_TOKEN",
    "RAY_AUTH_TOKEN",
    "PUSHGATEWAY_USERNAME",
    "PUSHGATEWAY_PASSWORD",
    "RAY_JOB_HEADERS",
]


def files_with_canary(folder: Path) -> list[str]:
    return [str(path) for path in sorted(folder.rglob("*")) if path.is_file() and CANARY.encode() in path.read_bytes()]


def command_lines() -> Iterator[str]:
    """Of every process; a process may end meanwhile."""
    for process in psutil.process_iter(["cmdline"]):
        yield " ".join(process.info["cmdline"] or [])


@pytest.fixture
def ray_folder() -> Iterator[Path]:
    """Ray's own files; unix sockets have short paths, so not below pytest's folder."""
    with tempfile.TemporaryDirectory(prefix="vg", dir="/tmp", ignore_cleanup_errors=True) as folder:
        yield Path(folder)


@pytest.mark.parametrize(
    "runtime",
    [
        ["--runtime", "local"],
        pytest.param(["--runtime", "ray", "--address", "local"], marks=[pytest.mark.ray, pytest.mark.chaos]),
    ],
    ids=["local", "ray"],
)
def test_a_secret_in_the_environment_stays_there(
    runtime: list[str], digits: Path, tmp_path: Path, ray_folder: Path
) -> None:
    port = free_port()
    arguments = ["train", "--preset", "smoke", "--data", str(digits), "--storage", str(tmp_path), *runtime]
    settings = ["--workers", "2", f"reporting.metrics_port={port}", "reporting.log_images=256", "--profile", "1"]
    # Nobody listens there: the errors of the trackers must not tell secrets either.
    settings += [
        "reporting.mlflow=true",
        "phases.joint.images=20_000",
        f"reporting.pushgateway=http://127.0.0.1:{port - 1}",
    ]
    environment = {**os.environ, **dict.fromkeys(VARIABLES, CANARY), "MLFLOW_TRACKING_URI": "http://127.0.0.1:9"}
    environment |= {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0", "MLFLOW_TRACKING_USERNAME": CANARY, "OMP_NUM_THREADS": "1"}
    environment |= {"RAY_TMPDIR": str(ray_folder), "RAY_USAGE_STATS_ENABLED": "0"}
    run = subprocess.Popen(
        [sys.executable, "-m", "vaegan_dist.cli", *arguments, *settings],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
    )
    said: list[str] = []
    reader = threading.Thread(target=lambda: said.extend(run.stdout or []), daemon=True)
    reader.start()
    served, lines = "", list[str]()
    try:
        while run.poll() is None:
            lines += command_lines()
            with contextlib.suppress(OSError):
                served += get(f"http://127.0.0.1:{port}/metrics")
            time.sleep(1.0)
    finally:
        run.kill()
    reader.join(30)
    output = "".join(said)
    assert run.returncode == 0, output
    assert "MLflow" in output, "the tracker's failure was not told, so nothing was tried"
    assert "vaegan_images_total" in served and lines
    assert main(["report", str(tmp_path / "smoke")]) == 0
    assert CANARY not in output and CANARY not in served and not [line for line in lines if CANARY in line]
    assert files_with_canary(tmp_path) == [] and files_with_canary(ray_folder) == []
    assert ("ray" in runtime) == bool(list(ray_folder.iterdir())), "looked for Ray's files in the wrong place"
    assert (tmp_path / "smoke" / "report.html").exists() and (tmp_path / "smoke" / "profile").exists()


@pytest.mark.parametrize("key", ["data.path", "run.storage", "reporting.pushgateway"])
@pytest.mark.parametrize("url", [f"s3://key:{CANARY}@bucket/x", f"https://host/x?signature={CANARY}"])
def test_a_secret_in_a_url_is_refused_unseen(
    key: str, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["train", "--preset", "smoke", "--runtime", "local", f"{key}={url}"]) == 2
    said = capsys.readouterr()
    assert CANARY not in said.out + said.err and key in said.err and said.err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
