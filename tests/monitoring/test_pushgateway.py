"""A real Pushgateway: what a short job leaves behind, deletes, or protects from a later failure."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.monitoring.servers import free_port, get, prometheus, running, wait_until
from tests.needs import needed
from vaegan_dist.config import Config
from vaegan_dist.config_source import load_config
from vaegan_dist.errors import VaeganError
from vaegan_dist.reporting.prometheus import Exporter
from vaegan_dist.reporting.sweep_metrics import SweepExporter, SweepIdentity, SweepSnapshot, TrialSnapshot


@pytest.fixture(scope="module")
def gateway() -> Iterator[int]:
    port = free_port()
    with running(needed("prometheus-pushgateway"), f"--web.listen-address=127.0.0.1:{port}"):
        wait_until(lambda: get(f"http://127.0.0.1:{port}/-/ready"), "the Pushgateway")
        yield port


def config_for(gateway: int, job: str, *more: str) -> Config:
    pushed = [f"reporting.pushgateway=http://127.0.0.1:{gateway}", f"reporting.pushgateway_job={job}"]
    return load_config("smoke", overrides=["reporting.metrics_port=0", *pushed, *more])


def lines_of(gateway: int, job: str) -> dict[str, float]:
    """What the gateway shows of a job, by the metric's name."""
    page = get(f"http://127.0.0.1:{gateway}/metrics").splitlines()
    own = [line for line in page if f'job_name="{job}"' in line and "_bucket" not in line]
    return {line.split("{")[0]: float(line.rsplit(" ", 1)[1]) for line in own}


def test_a_short_job_is_seen_by_prometheus_after_its_end(gateway: int, digits: Path, tmp_path: Path) -> None:
    settings = ["reporting.metrics_port=0", "reporting.tensorboard=false", "reporting.pushgateway_job=short"]
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "vaegan_dist.cli",
            "train",
            "--preset",
            "smoke",
            "--data",
            str(digits),
            *settings,
            "--storage",
            str(tmp_path),
            "--runtime",
            "local",
            f"reporting.pushgateway=http://127.0.0.1:{gateway}",
        ],
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    with prometheus(tmp_path / "prometheus", gateway, honor_labels=True) as server:
        success = 'vaegan_job_success{job_name="short", job="vaegan_dist"}'
        assert wait_until(lambda: server.value(success), "the job's end in Prometheus") == 1
        assert server.value('vaegan_images_seen{job_name="short"}') == 2560
        assert (server.value('vaegan_job_duration_seconds{job_name="short"}') or 0) > 0
        assert (server.value('time() - vaegan_job_last_success_timestamp_seconds{job_name="short"}') or 999) < 300
        assert server.value('vaegan_loss{job_name="short", term="rec"}') is not None


def test_a_failure_keeps_the_last_success(gateway: int, tmp_path: Path) -> None:
    with Exporter(config_for(gateway, "nightly"), tmp_path) as exporter:
        exporter.record({"event": "end", "reason": "done", "images_seen": 5})
    good = lines_of(gateway, "nightly")
    with pytest.raises(RuntimeError), Exporter(config_for(gateway, "nightly"), tmp_path):
        raise RuntimeError("the run fails")
    bad = lines_of(gateway, "nightly")
    assert (good["vaegan_job_success"], bad["vaegan_job_success"]) == (1, 0)
    assert bad["vaegan_job_last_success_timestamp_seconds"] == good["vaegan_job_last_success_timestamp_seconds"]
    assert bad["vaegan_job_last_end_timestamp_seconds"] > good["vaegan_job_last_end_timestamp_seconds"]


def test_a_sweep_pushes_its_end_without_its_trials(gateway: int, tmp_path: Path) -> None:
    about = SweepIdentity("s", {"fid": "min"}, trials=2, total_images=200)
    trial = TrialSnapshot(1, "0001", 50, {"fid": 3.0})
    now = SweepSnapshot({"running": 1, "done": 1}, 150, 150, 0.0, None, TrialSnapshot(0, "0000", 100, {}), (trial,))
    with SweepExporter(config_for(gateway, "sweep"), about, tmp_path, lambda: now) as exporter:
        exporter.endpoint.push()
        assert "vaegan_job_success" not in lines_of(gateway, "sweep"), "it has not ended"
        exporter.ended("done")
    found = lines_of(gateway, "sweep")
    assert (found["vaegan_job_success"], found["vaegan_sweep_images_total"], found["vaegan_sweep_best_trial"]) == (
        1, 150, 0,
    )  # fmt: skip
    # What nobody replaces would stay at the gateway for good.
    assert not {"vaegan_sweep_trial_images_seen", "vaegan_sweep_trial_value"} & set(found)
    with pytest.raises(VaeganError), SweepExporter(config_for(gateway, "sweep"), about, tmp_path, lambda: now):
        raise VaeganError("not one of 2 trials has a value")
    assert lines_of(gateway, "sweep")["vaegan_job_success"] == 0


def test_a_group_can_be_deleted_at_the_end(gateway: int, tmp_path: Path) -> None:
    config = config_for(gateway, "gone", "reporting.pushgateway_keep=false")
    with Exporter(config, tmp_path) as exporter:
        exporter.endpoint.push()
        assert lines_of(gateway, "gone")
    # The gateway answers before it has done it.
    wait_until(lambda: not lines_of(gateway, "gone"), "the group to be gone")


def test_a_gateway_that_is_away_is_one_warning(tmp_path: Path) -> None:
    warnings: list[str] = []
    with Exporter(config_for(free_port(), "away"), tmp_path, warnings.append) as exporter:
        exporter.record({"event": "end", "reason": "done"})
    assert len(warnings) == 1 and "Pushgateway" in warnings[0] and "refused" in warnings[0]
