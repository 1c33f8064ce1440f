"""Writes what is made of other files here: `python k8s/monitoring/build.py`. A test keeps all of it up to date.

- prometheus-rule.yaml: vaegan.rules.yaml as the object that the Prometheus operator takes;
- dashboards/*.json: Grafana's dashboards of a run and of a sweep, from the lists of panels below.
"""

import json
from pathlib import Path
from typing import Any

import yaml

HERE = Path(__file__).resolve().parent
SOURCE = {"type": "prometheus", "uid": "${source}"}
RUN = 'run="$run"'
SWEEP = 'sweep="$sweep"'

# Title, unit, (query, legend) pairs. Rows of panels, three a row.
Panel = tuple[str, str, list[tuple[str, str]]]
RUN_STATS: list[Panel] = [
    ("State", "none", [(f"vaegan_run_state{{{RUN}}} == 1", "{{state}}")]),
    ("Images seen", "short", [(f"vaegan_images_seen{{{RUN}}}", "")]),
    ("Time left", "s", [(f"vaegan:seconds_left{{{RUN}}}", "")]),
    ("Last step", "s", [(f"vaegan_progress_age_seconds{{{RUN}}}", "")]),
    ("Last checkpoint", "s", [(f"vaegan_checkpoint_age_seconds{{{RUN}}}", "")]),
    ("Restarts", "none", [(f"sum(vaegan_restarts_total{{{RUN}}})", "")]),
]
RUN_PANELS: list[Panel] = [
    (
        "Throughput (images/s)",
        "short",
        [
            (f"vaegan_images_per_second{{{RUN}}}", "last log interval"),
            (f"vaegan:images_per_second:rate5m{{{RUN}}}", "5 minutes"),
        ],
    ),
    ("Where the time of a step goes", "percentunit", [(f"vaegan:step_seconds:share5m{{{RUN}}}", "{{part}}")]),
    (
        "Step time",
        "s",
        [
            (f"vaegan:step_seconds:p95_5m{{{RUN}}}", "95%"),
            (f'vaegan_step_mean_seconds{{{RUN}, part="total"}}', "mean"),
        ],
    ),
    ("Slowest worker over the median one", "none", [(f"vaegan_rank_skew_ratio{{{RUN}}}", "skew")]),
    ("Losses (nats per image)", "none", [(f"vaegan_loss{{{RUN}}}", "{{term}}")]),
    ("Discriminator accuracy", "percentunit", [(f"vaegan_discriminator_accuracy_ratio{{{RUN}}}", "{{judged}}")]),
    ("Discriminator output", "none", [(f"vaegan_discriminator_logit{{{RUN}}}", "{{judged}}")]),
    ("Penalties", "none", [(f"vaegan_penalty{{{RUN}}}", "{{term}}")]),
    ("Gradient norms", "none", [(f"vaegan_gradient_norm{{{RUN}}}", "{{network}}")]),
    ("Learning rates", "none", [(f"vaegan_learning_rate{{{RUN}}}", "{{network}}")]),
    (
        "KL: active units and weight",
        "none",
        [(f"vaegan_kl_active_units{{{RUN}}}", "active units"), (f"vaegan_beta{{{RUN}}}", "beta")],
    ),
    ("Half-life of the average", "short", [(f"vaegan_ema_half_life_images{{{RUN}}}", "images")]),
    ("Evaluations", "none", [(f"vaegan_evaluation_result{{{RUN}}}", "{{metric}}")]),
    (
        "Checkpoints: training stood still",
        "s",
        [(f"vaegan_checkpoint_seconds{{{RUN}}}", "seconds")],
    ),
    ("Checkpoint size", "bytes", [(f"vaegan_checkpoint_bytes{{{RUN}}}", "bytes")]),
    (
        "Trouble in the last hour",
        "none",
        [
            (f"increase(vaegan_restarts_total{{{RUN}}}[1h])", "restart: {{cause}}"),
            (f"increase(vaegan_preemptions_total{{{RUN}}}[1h])", "preemptions"),
            (f"increase(vaegan_rollbacks_total{{{RUN}}}[1h])", "rollbacks"),
            (f"increase(vaegan_skipped_steps_total{{{RUN}}}[1h])", "skipped steps"),
            (f"increase(vaegan_nonfinite_records_total{{{RUN}}}[1h])", "records not finite"),
            (f"increase(vaegan_warnings_total{{{RUN}}}[1h])", "warnings"),
        ],
    ),
    ("Bad samples", "none", [(f"vaegan_bad_samples_total{{{RUN}}}", "{{shard}}")]),
    (
        "Shard cache",
        "none",
        [
            (f"rate(vaegan_cache_hits_total{{{RUN}}}[5m])", "hits/s"),
            (f"rate(vaegan_cache_misses_total{{{RUN}}}[5m])", "fetched/s"),
        ],
    ),
    ("Shards fetched", "Bps", [(f"rate(vaegan_cache_fetched_bytes_total{{{RUN}}}[5m])", "bytes/s")]),
    ("GPU memory of tensors", "bytes", [(f"vaegan_gpu_memory_bytes{{{RUN}}}", "rank {{rank}}")]),
    ("GPU busy", "percentunit", [(f"vaegan_gpu_utilization_ratio{{{RUN}}}", "rank {{rank}}")]),
    ("Ray: CPU of the nodes", "percent", [("ray_node_cpu_utilization", "{{instance}}")]),
    ("Ray: memory of the nodes", "bytes", [("ray_node_mem_used", "{{instance}}")]),
    ("Ray: GPU of the nodes", "percent", [("ray_node_gpus_utilization", "{{instance}}")]),
    (
        "Ray: network of the nodes",
        "Bps",
        [("ray_node_network_receive_speed", "in {{instance}}"), ("ray_node_network_send_speed", "out {{instance}}")],
    ),
]
SWEEP_STATS: list[Panel] = [
    ("Trials ended", "percentunit", [(f"vaegan:sweep_trials:ended_share{{{SWEEP}}}", "")]),
    ("Trials under way", "none", [(f'vaegan_sweep_trials{{{SWEEP}, state="running"}}', "")]),
    ("Trials failed", "none", [(f"vaegan_sweep_trial_failures_total{{{SWEEP}}}", "")]),
    ("Best trial", "none", [(f"vaegan_sweep_best_trial{{{SWEEP}}}", "")]),
    ("Time left", "s", [(f"vaegan_sweep_remaining_seconds{{{SWEEP}}}", "")]),
    ("Last news", "s", [(f"vaegan_sweep_progress_age_seconds{{{SWEEP}}}", "")]),
]
SWEEP_PANELS: list[Panel] = [
    ("Best value so far", "none", [(f"vaegan_sweep_best_value{{{SWEEP}}}", "{{metric}} ({{mode}})")]),
    ("Trials under way: last value", "none", [(f"vaegan_sweep_trial_value{{{SWEEP}}}", "{{trial}} {{metric}}")]),
    ("Trials by state", "none", [(f"vaegan_sweep_trials{{{SWEEP}}}", "{{state}}")]),
    ("Values of the best trial", "none", [(f"vaegan_sweep_best_parameter{{{SWEEP}}}", "{{key}}")]),
    ("Trials under way: images seen", "short", [(f"vaegan_sweep_trial_images_seen{{{SWEEP}}}", "{{trial}}")]),
    (
        "Images of all trials",
        "short",
        [
            (f"vaegan_sweep_images_seen{{{SWEEP}}}", "seen"),
            (f"vaegan_sweep_target_images{{{SWEEP}}}", "if none were stopped early"),
        ],
    ),
    (
        "Throughput of all trials (images/s)",
        "short",
        [
            (f"vaegan_sweep_images_per_second{{{SWEEP}}}", "last log intervals"),
            (f"vaegan:sweep_images_per_second:rate15m{{{SWEEP}}}", "15 minutes"),
        ],
    ),
    (
        "Trials under way: throughput (images/s)",
        "short",
        [(f"vaegan_sweep_trial_images_per_second{{{SWEEP}}}", "{{trial}}")],
    ),
    ("Failures in the last hour", "none", [(f"increase(vaegan_sweep_trial_failures_total{{{SWEEP}}}[1h])", "failed")]),
    ("Ray: GPU of the nodes", "percent", [("ray_node_gpus_utilization", "{{instance}}")]),
    ("Ray: CPU of the nodes", "percent", [("ray_node_cpu_utilization", "{{instance}}")]),
    ("Ray: memory of the nodes", "bytes", [("ray_node_mem_used", "{{instance}}")]),
]


def panel(number: int, kind: str, content: Panel, place: dict[str, int]) -> dict[str, Any]:
    """One panel at a place of Grafana's grid, 24 wide."""
    title, unit, queries = content
    targets = [
        {"refId": chr(ord("A") + index), "datasource": SOURCE, "expr": query, "legendFormat": legend or "__auto"}
        for index, (query, legend) in enumerate(queries)
    ]
    options: dict[str, Any] = {"legend": {"displayMode": "list", "placement": "bottom", "showLegend": True}}
    if kind == "stat":
        options = {"reduceOptions": {"calcs": ["lastNotNull"]}, "textMode": "name" if title == "State" else "value"}
    return {
        "id": number,
        "type": kind,
        "title": title,
        "datasource": SOURCE,
        "gridPos": place,
        "targets": targets,
        "fieldConfig": {"defaults": {"unit": unit}, "overrides": []},
        "options": options,
    }


def dashboard(uid: str, title: str, variable: dict[str, Any], stats: list[Panel], panels: list[Panel]) -> str:
    """A dashboard as Grafana imports it."""
    made = [
        panel(index + 1, "stat", content, {"x": 4 * index, "y": 0, "w": 4, "h": 4})
        for index, content in enumerate(stats)
    ]
    made += [
        panel(
            len(stats) + index + 1,
            "timeseries",
            content,
            {"x": 8 * (index % 3), "y": 4 + 8 * (index // 3), "w": 8, "h": 8},
        )
        for index, content in enumerate(panels)
    ]
    source = {"name": "source", "label": "Prometheus", "type": "datasource", "query": "prometheus"}
    tree = {
        "uid": uid,
        "title": title,
        "tags": ["vaegan_dist"],
        "schemaVersion": 39,
        "version": 1,
        "editable": True,
        "refresh": "30s",
        "time": {"from": "now-6h", "to": "now"},
        "templating": {"list": [source, variable]},
        "panels": made,
    }
    return json.dumps(tree, indent=1) + "\n"


def variable(name: str, label: str, metric: str) -> dict[str, Any]:
    """The choice of a run or a sweep: values of the label `name` of a metric that each of them has."""
    return {
        "name": name,
        "label": label,
        "type": "query",
        "datasource": SOURCE,
        "query": {"query": f"label_values({metric}, {name})", "refId": f"{name}s"},
        "refresh": 2,
        "sort": 1,
        "multi": False,
        "includeAll": False,
    }


def outputs() -> dict[Path, str]:
    """Every file that is made here, with its content."""
    groups = yaml.safe_load((HERE / "vaegan.rules.yaml").read_text())["groups"]
    rule = {
        "apiVersion": "monitoring.coreos.com/v1",
        "kind": "PrometheusRule",
        "metadata": {"name": "vaegan", "labels": {"release": "prometheus"}},
        "spec": {"groups": groups},
    }
    head = "# Made by build.py of vaegan.rules.yaml.\n"
    return {
        HERE / "prometheus-rule.yaml": head + yaml.safe_dump(rule, sort_keys=False, width=4000),
        HERE / "dashboards" / "run.json": dashboard(
            "vaegan-run", "vaegan_dist: a run", variable("run", "Run", "vaegan_run_info"), RUN_STATS, RUN_PANELS
        ),
        HERE / "dashboards" / "sweep.json": dashboard(
            "vaegan-sweep",
            "vaegan_dist: a sweep",
            variable("sweep", "Sweep", "vaegan_sweep_info"),
            SWEEP_STATS,
            SWEEP_PANELS,
        ),
    }


if __name__ == "__main__":
    for path, content in outputs().items():
        path.parent.mkdir(exist_ok=True)
        path.write_text(content)
