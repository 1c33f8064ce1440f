"""A real Prometheus beside a live run of two workers on Ray: right values, through a killed worker and a killed hub."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.monitoring.servers import Prometheus, free_port, prometheus, wait_until
from tests.needs import needed
from vaegan_dist.reporting.status import read_status

pytestmark = [pytest.mark.ray, pytest.mark.chaos, pytest.mark.timeout(1200)]
RULES = Path(__file__).resolve().parents[2] / "k8s/monitoring/vaegan.rules.yaml"


@pytest.fixture
def environment() -> Iterator[dict[str, str]]:
    """Variables for a driver whose Ray keeps its files, sockets and token to itself."""
    with tempfile.TemporaryDirectory(prefix="vg", dir="/tmp") as folder:
        kept = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
        yield {**kept, "RAY_TMPDIR": folder, "HOME": folder, "OMP_NUM_THREADS": "1"}


def actors(title: str, environment: dict[str, str]) -> list[psutil.Process]:
    """Processes of this test's own Ray by their title."""
    return [
        process
        for process in psutil.process_iter(["cmdline", "environ"])
        if title in " ".join(process.info["cmdline"] or [])
        and (process.info["environ"] or {}).get("RAY_TMPDIR") == environment["RAY_TMPDIR"]
    ]


def test_prometheus_reads_a_live_run(environment: dict[str, str], digits: Path, tmp_path: Path) -> None:
    needed("prometheus")
    port = free_port()
    driver = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "vaegan_dist.cli",
            "train",
            "--preset",
            "smoke",
            "--data",
            str(digits),
            "--storage",
            str(tmp_path / "runs"),
            "--workers",
            "2",
            "--address",
            "local",
            "training.torch_threads=1",
            "phases.joint.images=100_000_000",
            "reporting.log_images=6400",
            "checkpoint.images=20_000",
            "reporting.tensorboard=false",
            f"reporting.metrics_port={port}",
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
    )
    said: list[str] = []
    reader = threading.Thread(target=lambda: said.extend(driver.stdout or []), daemon=True)
    reader.start()
    family = psutil.Process(driver.pid)
    folder = tmp_path / "runs" / "smoke"
    try:
        with prometheus(tmp_path / "prometheus", port, RULES) as server:
            _values_are_those_of_the_history(server, folder)
            before = wait_until(lambda: server.value("vaegan_checkpoints_total"), "a checkpoint") and server.value(
                "vaegan_images_total"
            )
            actors("RayTrainWorker", environment)[-1].kill()
            wait_until(lambda: server.value('vaegan_restarts_total{cause="worker"}') == 1, "the restart to be counted")
            wait_until(lambda: (server.value("vaegan_images_total") or 0) > (before or 0) + 6400, "images after it")
            hub = actors("ray::Hub", environment)[0]
            hub.kill()
            at_kill = server.value("vaegan_images_total") or 0
            wait_until(lambda: actors("ray::Hub", environment) and (server.value("up") == 1), "the hub to come back")
            wait_until(lambda: (server.value("vaegan_images_total") or 0) > at_kill + 6400, "images after the hub")
            assert server.value("resets(vaegan_images_total[10m])") == 0, "a counter fell"
            assert server.value("resets(vaegan_checkpoints_total[10m])") == 0, "a counter fell"
            assert server.value("sum(vaegan_restarts_total)") == 1, "training did not go on without its hub"
            status = read_status(folder)
            assert status.state == "running" and status.metrics == f"127.0.0.1:{port}"
        driver.send_signal(signal.SIGTERM)
        driver.wait(200)
    finally:
        for process in [*family.children(recursive=True), family] if family.is_running() else []:
            process.kill()
        driver.wait(60)
        reader.join(10)
        print("".join(said))
    assert driver.returncode == 75, "".join(said)
    assert read_status(folder).state == "stopped"


def _values_are_those_of_the_history(server: Prometheus, folder: Path) -> None:
    """Throughput, losses, times and skew of one scrape are one row of the history."""

    def now_with_a_row() -> float | None:
        return server.value("vaegan_rank_skew_ratio and vaegan_steps_total > 0") and time.time()

    at = wait_until(now_with_a_row, "a log record in Prometheus")
    rows = [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]
    rate = server.value("vaegan_images_per_second", at)
    row = next(row for row in rows if row.get("images_per_second") == rate)
    loss = server.query("vaegan_loss", at)
    assert loss == {(("term", key[5:]),): value for key, value in row.items() if key.startswith("loss_")} and loss
    assert server.value("vaegan_rank_skew_ratio", at) == row["rank_skew_ratio"] >= 1
    assert server.value("vaegan_data_wait_ratio", at) == row["data_wait_ratio"]
    assert server.value('vaegan_step_mean_seconds{part="total"}', at) == row["step_seconds"]
    assert server.value("vaegan_images_seen", at) == row["images_seen"]
    assert server.value("vaegan_workers", at) == 2
    # Two workers' steps, up to the last snapshot: a histogram that agrees with the counter.
    steps = server.value("vaegan_steps_total", at) or 0
    count = server.value('vaegan_step_seconds_count{part="total"}', at) or 0
    assert 0 < steps <= count <= 2.5 * steps + 1000
