"""Rules and dashboards: valid, up to date, and about metrics that the exporter really has."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.needs import needed
from vaegan_dist.reporting.metrics import JOB_METRICS, METRICS
from vaegan_dist.reporting.sweep_metrics import SWEEP_METRICS

MONITORING = Path(__file__).resolve().parents[2] / "k8s" / "monitoring"
DOCS = Path(__file__).resolve().parents[2] / "docs" / "monitoring.md"
RULES = MONITORING / "vaegan.rules.yaml"
# Of Ray 2.60 (dashboard/modules/metrics) and of kube-state-metrics.
FOREIGN = {
    "ray_node_cpu_utilization",
    "ray_node_mem_used",
    "ray_node_gpus_utilization",
    "ray_node_network_receive_speed",
    "ray_node_network_send_speed",
    "kube_job_status_failed",
    "kube_cronjob_status_last_successful_time",
}
WORD = re.compile(r"[a-zA-Z_:][a-zA-Z0-9_:]*")
# Of PromQL, as far as it is used here.
SYNTAX = {
    "sum",
    "min",
    "max",
    "by",
    "on",
    "rate",
    "increase",
    "delta",
    "topk",
    "quantile_over_time",
    "histogram_quantile",
    "group_left",
    "time",
    "and",
    "or",
    "unless",
}


def exported() -> dict[str, set[str]]:
    """Series that the exporters have, each with its labels."""
    found: dict[str, set[str]] = {}
    for metric in METRICS:
        labels = {"run", *metric.labels}
        if metric.kind == "histogram":
            found |= {metric.name + suffix: labels for suffix in ("_sum", "_count")}
            found[metric.name + "_bucket"] = {*labels, "le"}
        else:
            found[metric.name] = labels
    found |= {metric.name: {"sweep", *metric.labels} for metric in SWEEP_METRICS}
    return found | {metric.name: {"job_name"} for metric in JOB_METRICS}


def recorded() -> set[str]:
    groups = yaml.safe_load(RULES.read_text())["groups"]
    return {rule["record"] for group in groups for rule in group["rules"] if "record" in rule}


def unknown_names(query: str) -> set[str]:
    """Metrics that a query names and nobody exports, and `metric{label}` pairs that no series has."""
    bare = re.sub(r'"[^"]*"|\[[^\]]*\]', "", query)
    series = exported()
    wrong = set()
    for name, selector in re.findall(r"([a-zA-Z_:][a-zA-Z0-9_:]*)\s*\{([^}]*)\}", bare):
        labels = set(re.findall(r"([a-z_]+)\s*(?:=~|!~|!=|=)", selector))
        if name in series and not labels <= series[name]:
            wrong.add(f"{name}{sorted(labels - series[name])}")
    bare = re.sub(r"\{[^}]*\}", "", bare)
    grouped = set(re.findall(r"(?:by|on|group_left)\s*\(([^)]*)\)", bare))
    bare = re.sub(r"(?:by|on|group_left)\s*\([^)]*\)", "", bare)
    every_label = {label for labels in series.values() for label in labels}
    wrong |= {label for group in grouped for label in WORD.findall(group) if label not in every_label}
    names = {word for word in WORD.findall(bare) if word not in SYNTAX and not word.isdigit()}
    return wrong | {name for name in names if name not in series and name not in recorded() and name not in FOREIGN}


def queries() -> list[str]:
    """Every query of the rules and of the dashboards."""
    groups = yaml.safe_load(RULES.read_text())["groups"]
    found = [rule["expr"] for group in groups for rule in group["rules"]]
    for path in sorted((MONITORING / "dashboards").glob("*.json")):
        tree = json.loads(path.read_text())
        found += [target["expr"] for panel in tree["panels"] for target in panel["targets"]]
        choices = [each["query"]["query"] for each in tree["templating"]["list"] if each["type"] == "query"]
        for choice in choices:
            asked = re.fullmatch(r"label_values\((\w+), (\w+)\)", choice)
            assert asked is not None, choice
            found.append(f'{asked[1]}{{{asked[2]}="any"}}')
    return found


def test_every_query_names_what_is_exported() -> None:
    found = queries()
    assert len(found) > 60
    assert {query: names for query in found if (names := unknown_names(query))} == {}


@pytest.mark.parametrize(
    "query",
    [
        "rate(vaegan_image_total[5m])",
        'vaegan_loss{network="x"}',
        "sum by (ran) (vaegan_loss)",
        "vaegan:nothing",
        'vaegan_sweep_trials{run="x"}',
        'vaegan_sweep_best_value{trial="0003"}',
    ],
)
def test_a_wrong_name_is_noticed(query: str) -> None:
    assert unknown_names(query)


def test_what_is_made_is_up_to_date() -> None:
    sys.path.insert(0, str(MONITORING))
    try:
        import build
    finally:
        sys.path.remove(str(MONITORING))
    for path, content in build.outputs().items():
        assert path.read_text() == content, f"{path}: run python k8s/monitoring/build.py"


def test_dashboards_are_whole() -> None:
    for path in sorted((MONITORING / "dashboards").glob("*.json")):
        tree: dict[str, Any] = json.loads(path.read_text())
        ids = [panel["id"] for panel in tree["panels"]]
        assert len(ids) == len(set(ids)) >= 12
        places = [tuple(panel["gridPos"].values()) for panel in tree["panels"]]
        assert len(set(places)) == len(places) and all(x + w <= 24 for x, _, w, _ in places)
        variables = {each["name"] for each in tree["templating"]["list"]}
        used = set(re.findall(r"\$\{?([a-z]+)\}?", path.read_text()))
        assert used == variables


def test_promtool_takes_the_rules_and_each_alert_fires_when_it_should() -> None:
    promtool = needed("promtool")
    for command in (["check", "rules", str(RULES)], ["test", "rules", str(MONITORING / "vaegan.rules.test.yaml")]):
        done = subprocess.run([promtool, *command], capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stdout + done.stderr


def test_every_alert_has_both_scenarios_and_a_runbook() -> None:
    rules = [rule for group in yaml.safe_load(RULES.read_text())["groups"] for rule in group["rules"]]
    alerts = {rule["alert"]: rule for rule in rules if "alert" in rule}
    cases = [
        case
        for test in yaml.safe_load((MONITORING / "vaegan.rules.test.yaml").read_text())["tests"]
        for case in test.get("alert_rule_test", [])
    ]
    fires = {case["alertname"] for case in cases if case.get("exp_alerts")}
    quiet = {case["alertname"] for case in cases if not case.get("exp_alerts")}
    assert set(alerts) == fires == quiet
    headings = {line.removeprefix("### ").strip() for line in DOCS.read_text().splitlines() if line.startswith("### ")}
    for name, rule in alerts.items():
        assert rule["annotations"]["runbook_url"] == f"docs/monitoring.md#{name.lower()}"
        assert name in headings, f"docs/monitoring.md has no runbook for {name}"


def test_the_documented_metrics_are_the_exported_ones() -> None:
    rows = re.findall(r"^\| `(vaegan_[a-z_]+)` \| (\w+) \| ([^|]*) \| (.*) \|$", DOCS.read_text(), re.MULTILINE)
    wanted = [
        (metric.name, metric.kind, ", ".join(f"`{label}`" for label in metric.labels), metric.help)
        for metric in (*METRICS, *SWEEP_METRICS, *JOB_METRICS)
    ]
    assert rows == wanted
