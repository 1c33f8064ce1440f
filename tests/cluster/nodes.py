"""A Ray cluster of several nodes on loopback, and a command that trains on it, for the tests beside it."""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest

WAIT_SECONDS = 240


@dataclass
class Nodes:
    """The cluster: a head without CPUs and worker nodes with one each. Used from the main thread only."""

    cluster: Any
    environment: dict[str, str]
    workers: list[Any] = field(default_factory=list)

    def add(self) -> Any:
        node = self.cluster.add_node(num_cpus=1, include_dashboard=False)
        self.workers.append(node)
        return node

    def remove(self, node: Any) -> None:
        """The node is gone at once, with all that ran on it."""
        self.workers.remove(node)
        self.cluster.remove_node(node, allow_graceful=False)

    def drain(self, node: Any, seconds: int) -> None:
        """Announce the node's end, as an autoscaler or a spot notice does."""
        command = [*RAY, "drain-node", "--address", self.cluster.address, "--node-id", node.node_id]
        reason = ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "test"]
        subprocess.run(
            [*command, *reason, "--deadline-remaining-seconds", str(seconds)], check=True, env=self.environment
        )

    def busy(self) -> list[Any]:
        """Nodes that a training worker is on."""
        hosts = []
        for process in psutil.process_iter(["cmdline", "environ"]):
            if "RayTrainWorker" in " ".join(process.info["cmdline"] or []):
                raylet = (process.info["environ"] or {}).get("RAY_RAYLET_PID")
                hosts += [n for n in self.workers if raylet and str(raylet_of(n)) == raylet]
        return hosts

    def start(self, *arguments: str, log: Path) -> subprocess.Popen[bytes]:
        """The command, as a driver of this cluster."""
        with log.open("ab") as output:
            return subprocess.Popen(
                [sys.executable, "-m", "vaegan_dist.cli", *arguments, "--address", self.cluster.address],
                stdout=output,
                stderr=subprocess.STDOUT,
                env=self.environment,
            )


RAY = [sys.executable, "-m", "ray.scripts.scripts"]


def raylet_of(node: Any) -> int:
    """Process id of a node's raylet."""
    return int(node.all_processes["raylet"][0].process.pid)


@contextmanager
def running_nodes(count: int) -> Iterator[Nodes]:
    """A cluster that ends with the context, with its files, ports and token to itself."""
    from ray.cluster_utils import Cluster

    # Unix sockets have short paths, so not below pytest's own folder.
    with tempfile.TemporaryDirectory(prefix="vg", dir="/tmp") as folder, pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("RAY_")]:
            patch.delenv(name)
        for name in ("RAY_TMPDIR", "HOME"):
            patch.setenv(name, folder)
        patch.setenv("OMP_NUM_THREADS", "1")
        cluster = Cluster(
            initialize_head=True,
            head_node_args={"num_cpus": 0, "include_dashboard": False},
        )
        nodes = Nodes(cluster, dict(os.environ))
        try:
            for _ in range(count):
                nodes.add()
            yield nodes
        finally:
            cluster.shutdown()


def rows_of(folder: Path) -> list[dict[str, Any]]:
    """Whole rows of a history; none where there is none yet."""
    path = folder / "history.jsonl"
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_bytes().split(b"\n")[:-1]]


def wait_until(what: str, seen: Callable[[], Any], driver: subprocess.Popen[bytes], log: Path) -> Any:
    """Poll until something is so, while the driver runs."""
    deadline = time.monotonic() + WAIT_SECONDS
    while not (found := seen()):
        assert driver.poll() is None, f"the driver ended before: {what}\n{log.read_text()}"
        assert time.monotonic() < deadline, f"never: {what}\n{log.read_text()}"
        time.sleep(0.1)
    return found
