"""Counters that only grow, whatever dies; bounded labels; the text that Prometheus' own checker takes."""

import dataclasses
import json
import math
import subprocess
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.monitoring.servers import free_port, get
from tests.needs import needed
from vaegan_dist.config import Config
from vaegan_dist.config_source import load_config
from vaegan_dist.reporting.endpoint import STATE_FILE
from vaegan_dist.reporting.metrics import METRICS, MOST_SHARDS, RunIdentity, RunMetrics, metric_of
from vaegan_dist.reporting.prometheus import Exporter
from vaegan_dist.reporting.records import Record
from vaegan_dist.reporting.snapshot import PARTS, RankSnapshot, StepTimes
from vaegan_dist.reporting.status import read_status


def snapshot(rank: int, life: str, steps: int, **more: Any) -> RankSnapshot:
    times = StepTimes()
    for _ in range(steps):
        times.add(0.1, 0.02, 0.01)
    given = {"rank": rank, "world_size": 2, "life": life, "steps": steps, "images": 64 * steps, "parts": times.parts()}
    return RankSnapshot(**{**given, **more})


def values(metrics: RunMetrics) -> dict[tuple[str, ...], float]:
    """Counters and gauges by name and label values; of a histogram the count and the sum."""
    found: dict[tuple[str, ...], float] = {}
    for metric, labels, value in metrics.samples():
        if isinstance(value, float):
            found[(metric.name, *labels)] = value
        else:
            found[(metric.name, "count", *labels)] = sum(value.counts)
            found[(metric.name, "sum", *labels)] = value.total
    return found


TRAIN: Record = {"event": "train", "phase": "joint", "images_seen": 640, "total_images": 6400, "loss_rec": 90.5}


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.one_of(
            st.tuples(st.just("step"), st.integers(0, 1)),
            st.sampled_from([("tell", 0), ("tell", 1), ("late", 0), ("late", 1), ("die", 0), ("hub", 0)]),
        ),
        max_size=60,
    )
)
def test_counters_are_what_the_ranks_did(events: list[tuple[str, int]]) -> None:
    """Ranks step, die and start again, snapshots are late or lost, the hub dies: no counter falls or counts twice."""
    metrics, lives = RunMetrics(RunIdentity("r")), 0
    steps, told = [0, 0], [0, 0]
    lost = [0, 0]  # steps of dead processes that nobody was told of
    sent: list[RankSnapshot] = []
    done, before = [0, 0], 0.0
    for what, rank in events:
        if what == "step":
            steps[rank], done[rank] = steps[rank] + 1, done[rank] + 1
        elif what == "tell":
            sent.append(snapshot(rank, f"{lives}-{rank}", steps[rank]))
            metrics.observe(sent[-1])
            told[rank] = steps[rank]
        elif what == "late" and sent:
            metrics.observe(sent[len(sent) // 2])
        elif what == "die":
            lost = [lost[0] + steps[0] - told[0], lost[1] + steps[1] - told[1]]
            lives, steps, told = lives + 1, [0, 0], [0, 0]
        elif what == "hub":
            kept = json.loads(json.dumps(metrics.to_json()))
            metrics = RunMetrics(RunIdentity("r"))
            metrics.restore(kept)
        now = values(metrics)[("vaegan_steps_total",)]
        assert now >= before
        before = now
    for rank in (0, 1):
        metrics.observe(snapshot(rank, f"{lives}-{rank}", steps[rank]))
    found = values(metrics)
    assert found[("vaegan_steps_total",)] == done[0] - lost[0]
    assert found[("vaegan_images_total",)] == 64 * (done[0] - lost[0])
    for part in PARTS:
        count = found.get(("vaegan_step_seconds", "count", part), 0)
        assert count == sum(done) - sum(lost)
        seconds = {"total": 0.1, "data_wait": 0.02, "communication": 0.01, "compute": 0.07}[part]
        assert found.get(("vaegan_step_seconds", "sum", part), 0.0) == pytest.approx(seconds * count)


def test_restarts_are_counted_by_cause() -> None:
    metrics = RunMetrics(RunIdentity("r"))
    metrics.observe(snapshot(0, "a", 3))
    metrics.record(TRAIN)
    metrics.record({"event": "attempt", "name": "preemption"})
    metrics.observe(snapshot(0, "b", 0))
    metrics.record({"event": "attempt", "name": "worker"})
    metrics.observe(snapshot(0, "c", 0))
    again = RunMetrics(RunIdentity("r"))
    again.restore(json.loads(json.dumps(metrics.to_json())))
    again.observe(snapshot(0, "d", 0))
    found = {key[1]: value for key, value in values(again).items() if key[0] == "vaegan_restarts_total"}
    assert found == {"worker": 1, "start": 0, "preemption": 1, "resize": 0, "command": 1}
    assert values(again)[("vaegan_preemptions_total",)] == 1


def test_another_phase_leaves_no_old_terms() -> None:
    metrics = RunMetrics(RunIdentity("r"))
    metrics.record({**TRAIN, "accuracy_real": 0.5})
    metrics.record({**TRAIN, "phase": "vae", "loss_kl": math.nan})
    found = values(metrics)
    assert ("vaegan_discriminator_accuracy_ratio", "real") not in found
    assert math.isnan(found["vaegan_loss", "kl"]) and found["vaegan_loss", "rec"] == 90.5
    assert found[("vaegan_nonfinite_records_total",)] == 1
    assert ("vaegan_phase_info", "vae") in found and ("vaegan_phase_info", "joint") not in found
    metrics.record({"event": "checkpoint", "images_seen": 64, "phase": "old", "checkpoint_seconds": 0.5})
    assert values(metrics)[("vaegan_images_seen",)] == 640, "a checkpoint's record tells of an earlier place"


def test_shards_are_few_labels() -> None:
    metrics = RunMetrics(RunIdentity("r"))
    bad = {f"shard-{number:06d}.tar": 1 for number in range(500)}
    metrics.observe(snapshot(0, "a", 1, bad_samples=bad))
    metrics.observe(snapshot(1, "b", 1, bad_samples=bad))
    metrics.observe(snapshot(0, "a", 2, bad_samples=bad))
    shards = {key[1]: value for key, value in values(metrics).items() if key[0] == "vaegan_bad_samples_total"}
    assert len(shards) == MOST_SHARDS + 1
    assert sum(shards.values()) == 500, "counted once, though every rank and snapshot says it"


def test_every_key_becomes_a_metric_of_the_table() -> None:
    names = {metric.name: metric for metric in METRICS}
    for key in ("loss_rec", "accuracy_gen", "lr_encoder", "kl_per_dim_max", "anything", "step_seconds", "active_units"):
        name, labels = metric_of(key)
        assert len(labels) == len(names[name].labels), key


def config_with(**reporting: Any) -> Config:
    config = load_config("smoke")
    return config.model_copy(update={"reporting": config.reporting.model_copy(update=reporting)})


def test_promtool_takes_what_is_served(tmp_path: Path) -> None:
    promtool = needed("promtool")
    with Exporter(config_with(metrics_port=free_port()), tmp_path) as exporter:
        exporter.record({"event": "phase", "phase": "joint", "images_seen": 0, "total_images": 10})
        exporter.record({**TRAIN, "images_per_second": 10.0, "beta": 1.0, "accuracy_real": 1.0, "odd": 3.0})
        exporter.record({"event": "evaluation", "fid": 3.0, "images_seen": 640})
        exporter.record({"event": "checkpoint", "checkpoint_seconds": 1.0, "checkpoint_bytes": 5})
        for rank in (0, 1):
            exporter.observe(
                snapshot(rank, f"{rank}", 5, bad_samples={"a.tar": 1}, gpu_memory_bytes=1, gpu_utilization=1)
            )
        page = get(f"http://{exporter.address}/metrics")
    done = subprocess.run([promtool, "check", "metrics"], input=page, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and not done.stdout + done.stderr, done.stdout + done.stderr
    served = {line.split()[2] for line in page.splitlines() if line.startswith("# HELP")}
    absent = {metric.name for metric in METRICS} - served
    assert absent <= {metric_of(key)[0] for key in ("rank_skew_ratio", "slowest_rank", "data_wait_ratio")} | {
        metric_of(key)[0] for key in ("penalty_r1", "logits_real", "grad_norm_x", "lr_x", "active_units", "psnr")
    } | {"vaegan_ema_half_life_images", "vaegan_step_mean_seconds", "vaegan_epoch"}


def test_the_address_stays_and_counters_go_on_in_the_next_process(tmp_path: Path) -> None:
    port = free_port()
    config = config_with(metrics_port=port)
    with Exporter(config, tmp_path) as other, Exporter(config, tmp_path / "none") as second:
        other.observe(snapshot(0, "a", 7))
        assert other.address == f"127.0.0.1:{port}"
        # Another run on the same machine: the next port.
        assert second.address == f"127.0.0.1:{port + 1}"
    with Exporter(config_with(metrics_port=port - 3), tmp_path) as again:
        assert again.address == f"127.0.0.1:{port}", "the port that this run had before"
        assert "vaegan_steps_total" not in get(f"http://{again.address}/metrics"), "old news, before any new"
        again.observe(snapshot(0, "a", 9))
        assert 'vaegan_steps_total{run="smoke"} 9.0' in get(f"http://{again.address}/metrics")


def test_no_port_is_a_warning_and_not_an_end(tmp_path: Path) -> None:
    warnings: list[str] = []
    with Exporter(config_with(metrics_address="192.0.2.1", metrics_port=free_port()), tmp_path, warnings.append) as it:
        it.record(TRAIN)
    assert len(warnings) == 1 and "reporting.metrics_port" in warnings[0]
    (tmp_path / STATE_FILE).write_text("{torn")
    with Exporter(config_with(metrics_port=0), tmp_path, warnings.append) as it:
        assert it.address == ""
    assert len(warnings) == 2 and "begin at zero" in warnings[1]


def test_status_of_runs_in_every_state(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("{}")
    history = tmp_path / "history.jsonl"

    def write(*records: Record) -> None:
        history.write_text("".join(json.dumps(record) + "\n" for record in records))

    now = tmp_path.stat().st_mtime
    begin: Record = {"event": "phase", "phase": "a", "images_seen": 0, "total_images": 6400, "seconds": 0.0}
    rows = [{**TRAIN, "seconds": float(s), "images_seen": 64 * s, "images_per_second": 64.0} for s in range(1, 11)]
    assert read_status(tmp_path, now).state == "stale"
    write(begin)
    assert read_status(tmp_path, now + 1).state == "starting"
    write(begin, *rows)
    status = read_status(tmp_path, history.stat().st_mtime + 5)
    assert (status.state, status.images_seen, status.images_per_second) == ("running", 640, 64.0)
    assert status.seconds_left == pytest.approx((6400 - 640) / 64)
    assert read_status(tmp_path, history.stat().st_mtime + 100).state == "stale"
    warning: Record = {"event": "warning", "message": "a bad sample", "images_seen": 640}
    for reason, state in (("done", "done"), ("stopped", "stopped"), ("failed", "failed")):
        write(begin, *rows, {"event": "end", "reason": reason, "message": "why", "images_seen": 640}, warning)
        status = read_status(tmp_path, now)
        assert (status.state, status.warnings, status.last_warnings) == (state, 1, ("a bad sample",))
    write(begin, *rows, {"event": "end", "reason": "stopped"}, {"event": "resume", "restarts": 1, "images_seen": 640})
    assert read_status(tmp_path, history.stat().st_mtime).state == "running"
    assert dataclasses.asdict(read_status(tmp_path))["restarts"] == 1
