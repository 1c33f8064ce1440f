"""Debian's Prometheus and Pushgateway on loopback, for as long as a test needs them."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tests.needs import needed

PATIENCE = 300.0


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def get(url: str, timeout: float = 10.0) -> str:
    with urllib.request.urlopen(url, timeout=timeout) as answer:
        return str(answer.read().decode())


def wait_until(condition: Callable[[], Any], what: str, patience: float = PATIENCE) -> Any:
    """The first true value of the condition; while it raises OSError, nobody answers yet."""
    deadline = time.monotonic() + patience
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError):
            if value := condition():
                return value
        time.sleep(0.2)
    raise AssertionError(f"waited in vain for {what}")


@contextlib.contextmanager
def running(*command: str) -> Iterator[None]:
    """A server that ends with the block, and with it what it started."""
    silent = subprocess.DEVNULL
    with subprocess.Popen(command, stdout=silent, stderr=silent, start_new_session=True) as server:
        try:
            yield
        finally:
            os.killpg(server.pid, signal.SIGKILL)


class Prometheus:
    """What a real Prometheus answers."""

    def __init__(self, port: int) -> None:
        self.url = f"http://127.0.0.1:{port}"

    def query(self, expression: str, at: float | None = None) -> dict[tuple[tuple[str, str], ...], float]:
        """Values by labels (without the name)."""
        asked = {"query": expression} | ({"time": str(at)} if at else {})
        answer = json.loads(get(f"{self.url}/api/v1/query?{urllib.parse.urlencode(asked)}"))
        rows = answer["data"]["result"]
        return {
            tuple(
                sorted((k, v) for k, v in row["metric"].items() if k not in ("__name__", "instance", "job", "run"))
            ): (float(row["value"][1]))
            for row in rows
        }

    def value(self, expression: str, at: float | None = None) -> float | None:
        """The only value."""
        found = self.query(expression, at)
        assert len(found) <= 1, found
        return next(iter(found.values()), None)


@contextlib.contextmanager
def prometheus(
    folder: Path, target: int, rules: Path | None = None, honor_labels: bool = False
) -> Iterator[Prometheus]:
    """A Prometheus that scrapes one port each second."""
    port = free_port()
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "global": {"scrape_interval": "1s", "scrape_timeout": "1s", "evaluation_interval": "1s"},
        "rule_files": [str(rules)] if rules else [],
        "scrape_configs": [
            {"job_name": "t", "honor_labels": honor_labels, "static_configs": [{"targets": [f"127.0.0.1:{target}"]}]}
        ],
    }
    (folder / "prometheus.yml").write_text(json.dumps(config))
    command = [
        needed("prometheus"),
        f"--config.file={folder / 'prometheus.yml'}",
        f"--storage.tsdb.path={folder / 'data'}",
        f"--web.listen-address=127.0.0.1:{port}",
    ]
    with running(*command):
        server = Prometheus(port)
        wait_until(lambda: get(f"{server.url}/-/ready"), "Prometheus")
        yield server
