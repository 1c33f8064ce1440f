"""A run's metrics for Prometheus.

One `Exporter` serves one run: the hub actor has it under Ray, the parent process without. Nothing here may end a run:
trouble becomes one warning.
"""

import http.client
import json
import logging
import platform
import socket
import threading
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from types import TracebackType
from typing import Self
from urllib.request import urlopen

from prometheus_client.parser import text_string_to_metric_families

import vaegan_dist
from vaegan_dist.config import Config
from vaegan_dist.files import write_whole
from vaegan_dist.reporting.endpoint import STATE_FILE, Collector, Endpoint
from vaegan_dist.reporting.metrics import RunIdentity, RunMetrics, Sample
from vaegan_dist.reporting.records import Record, text
from vaegan_dist.reporting.snapshot import RankSnapshot

logger = logging.getLogger(__name__)

SAVE_SECONDS = 5.0
# Between two writes of the counters; and how long a new process waits for news of the ranks before it shows old ones.
PAUSE_SECONDS, NEWS_SECONDS = 0.5, 10.0
SCRAPED_BYTES = 4 * 2**20


def identity_of(config: Config) -> RunIdentity:
    """What a run's metrics say of it."""
    versions = {"version": vaegan_dist.__version__, "torch": version("torch"), "python": platform.python_version()}
    return RunIdentity(
        run=config.run.name,
        preset=config.preset or "",
        network=config.model.network,
        seed=config.run.seed,
        max_bad_samples=config.data.max_bad_samples,
        versions=versions,
    )


class Exporter:
    """Serves one run's metrics from `__init__` to `close`; safe for threads.

    Args:
        folder: the run's folder; counters are kept in it, so that they go on growing in the next process.
        warn: takes one line for each kind of trouble.
    """

    def __init__(self, config: Config, folder: Path, warn: Callable[[str], None] = logger.warning) -> None:
        self.metrics = RunMetrics(identity_of(config))
        self.endpoint = Endpoint(config, Collector("run", config.run.name, self._samples), warn=warn)
        self._folder, self._reason = folder, ""
        self._lock, self._changed = threading.Lock(), False
        self._wake, self._stale_until = threading.Event(), 0.0
        self.endpoint.open(self._restore())
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._work, name="metrics", daemon=True)
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(failed=kind is not None)

    @property
    def address(self) -> str:
        """host:port of the metrics; empty where they are not served."""
        return self.endpoint.address

    def record(self, record: Record) -> None:
        """Take a record of the run."""
        with self._lock:
            self.metrics.record(record)
            self._changed = True
            self._wake.set()
            if record.get("event") == "end":
                self._reason = text(record, "reason")

    def observe(self, snapshot: RankSnapshot) -> None:
        """Take what a rank says of itself."""
        with self._lock:
            self.metrics.observe(snapshot)
            self._changed, self._stale_until = True, 0.0

    def close(self, failed: bool = False) -> None:
        """Serve no longer; keep the counters, and push the end. May be called twice."""
        if self._ending.is_set():
            return
        self._ending.set()
        self._wake.set()
        self._thread.join(2 * SAVE_SECONDS)
        if failed:
            self.record({"event": "end", "reason": "failed"})
        self._save()
        self.endpoint.close(self._reason)

    def _samples(self) -> list[Sample]:
        with self._lock:
            # What was kept may be some seconds old; a counter must not be seen to fall.
            return [] if time.monotonic() < self._stale_until else list(self.metrics.samples())

    def _work(self) -> None:
        while not self._ending.wait(PAUSE_SECONDS):
            self._wake.wait(SAVE_SECONDS)
            self._wake.clear()
            if self._changed:
                self._save()

    def _restore(self) -> int:
        """Go on with the counters of the process before; the port that it served, or 0."""
        path = self._folder / STATE_FILE
        try:
            kept = json.loads(path.read_bytes())
            self.metrics.restore(kept["metrics"])
            self._stale_until = time.monotonic() + NEWS_SECONDS
            return int(str(kept["address"]).rpartition(":")[2] or 0)
        except FileNotFoundError:
            return 0
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            cause = f"{type(error).__name__}: {error}"
            self.endpoint.trouble("restore", f"{path}: {cause}; the metrics' counters begin at zero")
            return 0

    def _save(self) -> None:
        with self._lock:
            # A start that failed before its first step leaves nothing behind.
            if not self._changed or not self.metrics.begun or not self._folder.is_dir():
                return
            self._changed = False
            state = {
                "address": self.address,
                "host": socket.gethostname(),
                "run": self.metrics.identity.run,
                "metrics": self.metrics.to_json(),
            }
        content = json.dumps(state).encode()
        self.endpoint.guard("metrics state", lambda: write_whole(self._folder / STATE_FILE, content))


def scrape(address: str, timeout: float) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    """Samples that an exporter at `host:port` serves, by name and labels; empty if none answers."""
    try:
        with urlopen(f"http://{address}/metrics", timeout=timeout) as answer:
            content = answer.read(SCRAPED_BYTES).decode()
        families = list(text_string_to_metric_families(content))
    except (OSError, ValueError, http.client.HTTPException):
        return {}
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in families
        for sample in family.samples
    }
