"""A sweep's metrics over HTTP: what is served is what was looked at; trouble never ends the sweep."""

import subprocess
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.monitoring.servers import free_port, get
from tests.needs import needed
from vaegan_dist.config import Config
from vaegan_dist.config_source import load_config
from vaegan_dist.errors import VaeganError
from vaegan_dist.reporting.prometheus import Exporter
from vaegan_dist.reporting.sweep_metrics import (
    SWEEP_METRICS,
    SweepExporter,
    SweepIdentity,
    SweepSnapshot,
    TrialSnapshot,
)

ABOUT = SweepIdentity("s", {"fid": "min", "psnr": "max"}, 9, 9000, "smoke", "mlp", "tpe", "asha")
UNDER_WAY = (
    TrialSnapshot(7, "0007", 256, {"fid": 9.5, "psnr": 12.0}, 100.5),
    TrialSnapshot(8, "0008", 64, {}, 50.0),
)
PARAMS = {"objective.beta": 0.25, "model.latent": 16, "objective.adversarial": "hinge", "x": None, "list": [1, 2]}
BEST = TrialSnapshot(3, "0003", 1000, {"fid": 4.25, "psnr": 20.0}, params=PARAMS)
NOW = SweepSnapshot(
    trials={"waiting": 1, "running": 2, "done": 3, "early": 2, "failed": 1},
    images_trained=4000,
    images_seen=4320,
    silent_seconds=1.5,
    remaining_seconds=60.0,
    best=BEST,
    under_way=UNDER_WAY,
)


def config_with(**reporting: Any) -> Config:
    config = load_config("smoke")
    return config.model_copy(update={"reporting": config.reporting.model_copy(update=reporting)})


def exporter_of(
    folder: Path, warnings: list[str] | None = None, now: SweepSnapshot = NOW, **given: Any
) -> SweepExporter:
    settings = {"metrics_port": free_port(), **given}
    said: list[str] = [] if warnings is None else warnings
    return SweepExporter(config_with(**settings), ABOUT, folder, lambda: now, said.append)


def samples_in(page: str) -> dict[tuple[str, tuple[str, ...]], float]:
    """Values by name and label values, the sweep's own left out."""
    found = {}
    for family in text_string_to_metric_families(page):
        for sample in family.samples:
            labels = dict(sample.labels)
            assert labels.pop("sweep") == "s"
            found[sample.name, tuple(labels[key] for key in sorted(labels))] = sample.value
    return found


def test_promtool_takes_what_is_served_and_it_is_what_was_looked_at(tmp_path: Path) -> None:
    promtool = needed("promtool")
    with exporter_of(tmp_path) as exporter:
        page = get(f"http://{exporter.address}/metrics")
        exporter.ended("done")
    done = subprocess.run([promtool, "check", "metrics"], input=page, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and not done.stdout + done.stderr, done.stdout + done.stderr
    found = samples_in(page)
    assert {name for name, _ in found} == {metric.name for metric in SWEEP_METRICS}
    for state, count in NOW.trials.items():
        assert found["vaegan_sweep_trials", (state,)] == count
    assert {labels[0]: value for (name, labels), value in found.items() if name == "vaegan_sweep_state"} == {
        "running": 1, "done": 0, "stopped": 0, "failed": 0,
    }  # fmt: skip
    wanted = {
        ("vaegan_sweep_trials_target", ()): 9,
        ("vaegan_sweep_trial_failures_total", ()): 1,
        ("vaegan_sweep_images_total", ()): 4000,
        ("vaegan_sweep_images_seen", ()): 4320,
        ("vaegan_sweep_images_per_second", ()): 150.5,
        ("vaegan_sweep_progress_age_seconds", ()): 1.5,
        ("vaegan_sweep_best_trial", ()): 3,
        ("vaegan_sweep_best_value", ("psnr", "max")): 20,
        ("vaegan_sweep_trial_value", ("fid", "0007")): 9.5,
        ("vaegan_sweep_trial_images_per_second", ("0008",)): 50,
    }
    assert {key: found[key] for key in wanted} == wanted
    numbers = {labels[0]: value for (name, labels), value in found.items() if name == "vaegan_sweep_best_parameter"}
    assert numbers == {"objective.beta": 0.25, "model.latent": 16}, "only what is a number"
    with pytest.raises(OSError):
        get(f"http://{exporter.address}/metrics", timeout=5)


def test_a_sweep_without_a_best_trial_has_no_series_of_one(tmp_path: Path) -> None:
    fresh = SweepSnapshot({"waiting": 9}, 0, 0, 0.0, None, None, ())
    with exporter_of(tmp_path, now=fresh) as exporter:
        found = samples_in(get(f"http://{exporter.address}/metrics"))
    assert found["vaegan_sweep_trial_failures_total", ()] == 0, "a counter that appears with its first event is none"
    assert not [name for name, _ in found if "best" in name or "remaining" in name or "_trial_images" in name]


def test_ports_are_shared_out_as_among_runs_and_the_address_stays(tmp_path: Path) -> None:
    port = free_port()
    config = config_with(metrics_port=port)
    with Exporter(config, tmp_path / "run") as run, exporter_of(tmp_path, metrics_port=port) as sweep:
        assert (run.address, sweep.address) == (f"127.0.0.1:{port}", f"127.0.0.1:{port + 1}")
    with exporter_of(tmp_path, metrics_port=port) as again:
        assert again.address == f"127.0.0.1:{port + 1}", "the port that this sweep had before"


def test_no_port_is_one_warning_and_not_an_end(tmp_path: Path) -> None:
    warnings: list[str] = []
    with exporter_of(tmp_path, warnings, metrics_address="192.0.2.1") as exporter:
        exporter.ended("done")
    assert len(warnings) == 1 and "reporting.metrics_port" in warnings[0] and not exporter.address
    with exporter_of(tmp_path, warnings, metrics_port=0) as exporter:
        assert not exporter.address
    assert len(warnings) == 1, "not to serve was asked for"


@pytest.mark.parametrize("raised", [VaeganError("no"), KeyboardInterrupt()])
def test_an_error_goes_through(tmp_path: Path, raised: BaseException) -> None:
    with pytest.raises(type(raised)), exporter_of(tmp_path) as exporter:
        exporter.ended("done")
        raise raised
    assert {labels[0]: value for metric, labels, value in exporter._samples() if metric.name.endswith("_state")} == {
        "running": 0, "done": 0, "stopped": 0, "failed": 1,
    }  # fmt: skip
