"""`vaegan-dist check-cluster` on three local nodes, one of which imports another version of a package."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import ray
from ray.cluster_utils import Cluster

from vaegan_dist.cluster import node_probe
from vaegan_dist.cluster.check_cluster import NodeReport, Report, _compare

pytestmark = pytest.mark.ray


@pytest.fixture
def cluster(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    """A head without CPUs and two nodes; the second finds an older simplejpeg first."""
    odd = tmp_path_factory.mktemp("odd") / "simplejpeg-0.0.1.dist-info"
    odd.mkdir()
    (odd / "METADATA").write_text("Metadata-Version: 2.1\nName: simplejpeg\nVersion: 0.0.1\n")
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    try:
        made.add_node(num_cpus=1)
        made.add_node(num_cpus=1, env_vars={"PYTHONPATH": str(odd.parent)})
        made.wait_for_nodes(120)
        yield made
    finally:
        made.shutdown()
        ray.shutdown()


def test_a_node_without_a_compiler_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Only where it has GPUs; the probe looks where Triton does."""
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    facts = replace(node_probe.node_facts("10.0.0.1"), gpus=("NVIDIA H100",))
    assert "a C compiler (gcc or clang)" in facts.missing
    for gpus, expected in ((facts.gpus, 1), ((), 0)):
        report = Report([NodeReport(replace(facts, gpus=gpus), True, 0.0)])
        _compare(report)
        assert sum("node 10.0.0.1: Triton does not find a C compiler" in line for line in report.warnings) == expected
    (tmp_path / "gcc").touch(0o755)
    assert "a C compiler (gcc or clang)" not in node_probe.node_facts("10.0.0.1").missing


def asked(cluster: Cluster, *arguments: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "vaegan_dist.cli", "check-cluster", f"--address={cluster.address}", *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280)


def test_three_nodes_and_an_odd_package(cluster: Cluster, tmp_path: Path) -> None:
    done = asked(cluster, f"--storage={tmp_path / 'runs'}", "--size=4", "--json")
    assert done.returncode == 1, done.stderr
    report = json.loads(done.stdout)
    assert len(report["nodes"]) == 3
    assert sum(node["trains"] for node in report["nodes"]) == 2
    assert len(report["problems"]) == 1
    assert report["problems"][0].startswith("simplejpeg: 0.0.1 on ")
    for node in report["nodes"]:
        assert node["facts"]["packages"]["torch"] == report["nodes"][0]["facts"]["packages"]["torch"]
        assert abs(node["clock_seconds"]) < 1
        assert node["storage"]["write"] > 0 < node["storage"]["read"]
        assert (node["link"] is not None) == node["trains"]
        if node["link"]:
            assert node["link"]["all_reduce"] > 0 < node["link"]["next_node"]
    assert list((tmp_path / "runs").iterdir()) == [], "the probe leaves nothing behind"

    (tmp_path / "file").write_text("")
    table = asked(cluster, f"--storage={tmp_path / 'file'}", "--size=1")
    assert table.returncode == 1
    assert "must be a folder that every node can write" in table.stdout
    assert "to mend" in table.stdout
