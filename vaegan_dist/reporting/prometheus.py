"""A run's metrics over HTTP for Prometheus, and pushed to a Pushgateway for jobs too short to be scraped.

The only module besides the trackers that knows a metrics library. One `Exporter` serves one run: the hub actor has it
under Ray, the parent process without. Nothing here may end a run: trouble becomes one warning.
"""

import http.client
import json
import logging
import os
import platform
import socket
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from importlib.metadata import version
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from urllib.request import urlopen

from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.core import Metric as Family
from prometheus_client.exposition import basic_auth_handler, default_handler, delete_from_gateway, pushadd_to_gateway
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.utils import floatToGoString

import vaegan_dist
from vaegan_dist.config import Config, ReportingSection
from vaegan_dist.files import write_whole
from vaegan_dist.reporting.metrics import JOB_METRICS, Histogram, Metric, RunIdentity, RunMetrics, Sample
from vaegan_dist.reporting.records import Record, text
from vaegan_dist.reporting.snapshot import BUCKETS, RankSnapshot

logger = logging.getLogger(__name__)

STATE_FILE = ".metrics.json"
JOB = "vaegan_dist"
SAVE_SECONDS, PUSH_SECONDS, PUSH_TIMEOUT_SECONDS = 5.0, 15.0, 10.0
# Between two writes of the counters; and how long a new process waits for news of the ranks before it shows old ones.
PAUSE_SECONDS, NEWS_SECONDS = 0.5, 10.0
SCRAPED_BYTES = 4 * 2**20
# Runs that share a machine take the next free port.
PORTS_TRIED = 20


class Collector:
    """What prometheus_client asks for the metrics at each scrape."""

    def __init__(self, run: str, samples: Callable[[], list[Sample]]) -> None:
        self._run, self._samples = run, samples

    def collect(self) -> Iterator[Family]:
        """Families in the order of the table, each with its samples."""
        families: dict[str, Any] = {}
        for metric, labels, value in self._samples():
            family = families.setdefault(metric.name, _family(metric))
            if isinstance(value, Histogram):
                family.add_metric([self._run, *labels], buckets=_buckets(value), sum_value=value.total)
            else:
                family.add_metric([self._run, *labels], value)
        yield from families.values()


def _family(metric: Metric) -> Any:
    kinds = {"counter": CounterMetricFamily, "gauge": GaugeMetricFamily, "histogram": HistogramMetricFamily}
    return kinds[metric.kind](metric.name, metric.help, labels=["run", *metric.labels])


def _buckets(histogram: Histogram) -> list[tuple[str, int]]:
    """Upper ends with cumulated counts, as the format wants them."""
    rows, seen = [], 0
    for end, count in zip((*BUCKETS, float("inf")), histogram.counts, strict=True):
        seen += count
        rows.append((str(floatToGoString(end)), seen))  # type: ignore[no-untyped-call]
    return rows


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


def default_address() -> str:
    """Where metrics are served unless set: to this machine only, in a pod to whom its network policy lets in."""
    return "0.0.0.0" if "KUBERNETES_SERVICE_HOST" in os.environ else "127.0.0.1"


class Exporter:
    """Serves one run's metrics from `__init__` to `close`; safe for threads.

    Args:
        folder: the run's folder; counters are kept in it, so that they go on growing in the next process.
        warn: takes one line for each kind of trouble.
    """

    def __init__(self, config: Config, folder: Path, warn: Callable[[str], None] = logger.warning) -> None:
        self.settings: ReportingSection = config.reporting
        self.metrics = RunMetrics(identity_of(config))
        self.address = ""
        self._folder, self._warn = folder, warn
        self._lock, self._changed = threading.Lock(), False
        self._wake, self._stale_until = threading.Event(), 0.0
        self._troubles: set[str] = set()
        self._began = time.time()
        self._gateway = _Gateway(config) if self.settings.pushgateway else None
        self._registry = CollectorRegistry(auto_describe=False)
        self._registry.register(Collector(config.run.name, self._samples))
        self._server: Any = None
        self._serve(self._restore())
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._work, name="metrics", daemon=True)
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(failed=kind is not None)

    def record(self, record: Record) -> None:
        """Take a record of the run."""
        with self._lock:
            self.metrics.record(record)
            self._changed = True
            self._wake.set()
            if record.get("event") == "end" and self._gateway is not None:
                self._gateway.reason = text(record, "reason")

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
        self._thread.join(PUSH_TIMEOUT_SECONDS + SAVE_SECONDS)
        if failed:
            self.record({"event": "end", "reason": "failed"})
        self._save()
        if self._gateway is not None:
            self._guard("Pushgateway", partial(self._gateway.finish, self._registry, self._began))
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()

    def _samples(self) -> list[Sample]:
        with self._lock:
            # What was kept may be some seconds old; a counter must not be seen to fall.
            return [] if time.monotonic() < self._stale_until else list(self.metrics.samples())

    def _serve(self, before: int) -> None:
        first, address = self.settings.metrics_port, self.settings.metrics_address or default_address()
        if not first:
            return
        # Scraped at one address through its whole life: a new process asks for the port that the last one had.
        ports = [*([before] if first <= before < first + PORTS_TRIED else []), *range(first, first + PORTS_TRIED)]
        problem: OSError | None = None
        for port in ports:
            try:
                self._server, _ = start_http_server(port, address, self._registry)
            except OSError as error:
                problem = error
                continue
            self.address = f"{address}:{port}"
            return
        self._trouble(
            "server",
            f"metrics are not served: {address}, ports {first} to {first + PORTS_TRIED - 1}: "
            f"{problem.strerror if problem else ''}; set reporting.metrics_address and reporting.metrics_port",
        )

    def _work(self) -> None:
        pushed = time.monotonic()
        while not self._ending.wait(PAUSE_SECONDS):
            self._wake.wait(SAVE_SECONDS)
            self._wake.clear()
            if self._changed:
                self._save()
            if self._gateway is not None and time.monotonic() - pushed >= PUSH_SECONDS:
                pushed = time.monotonic()
                self._guard("Pushgateway", partial(self._gateway.push, self._registry))

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
            self._trouble("restore", f"{path}: {type(error).__name__}: {error}; the metrics' counters begin at zero")
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
        self._guard("metrics state", lambda: write_whole(self._folder / STATE_FILE, json.dumps(state).encode()))

    def _guard(self, what: str, action: Callable[[], object]) -> None:
        try:
            action()
        except (OSError, ValueError, http.client.HTTPException) as error:
            cause = getattr(error, "reason", None) or getattr(error, "strerror", None) or error
            self._trouble(what, f"{what} failed ({type(error).__name__}: {cause}); training goes on without it")

    def _trouble(self, kind: str, line: str) -> None:
        if kind not in self._troubles:
            self._troubles.add(kind)
            self._warn(line)


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


class _Gateway:
    """The group of one job at a Pushgateway."""

    def __init__(self, config: Config) -> None:
        settings = config.reporting
        self.url, self.keep = settings.pushgateway or "", settings.pushgateway_keep
        self.key = {"job_name": settings.pushgateway_job or config.run.name}
        self.reason = ""
        self._user, self._password = (os.environ.get(f"PUSHGATEWAY_{part}") for part in ("USERNAME", "PASSWORD"))

    def push(self, registry: CollectorRegistry) -> None:
        """Replace the metrics of these names; others of the group stay, so a failed run keeps the last success."""
        pushadd_to_gateway(
            self.url, JOB, registry, grouping_key=self.key, timeout=PUSH_TIMEOUT_SECONDS, handler=self._handler
        )

    def finish(self, registry: CollectorRegistry, began: float) -> None:
        """Push the end, or delete the group."""
        if not self.keep:
            delete_from_gateway(self.url, JOB, self.key, timeout=PUSH_TIMEOUT_SECONDS, handler=self._handler)
            return
        now = time.time()
        values = {"vaegan_job_last_end_timestamp_seconds": now, "vaegan_job_duration_seconds": now - began}
        if self.reason in ("done", "already done"):
            values |= {"vaegan_job_success": 1.0, "vaegan_job_last_success_timestamp_seconds": now}
        elif self.reason != "stopped":  # a stopped run has neither failed nor succeeded: it is to be continued
            values["vaegan_job_success"] = 0.0
        registry.register(_Values(values))
        self.push(registry)

    def _handler(
        self, url: str, method: str, timeout: float | None, headers: list[tuple[str, str]], data: bytes
    ) -> Callable[[], None]:
        if self._user or self._password:
            return basic_auth_handler(url, method, timeout, headers, data, self._user, self._password)
        return default_handler(url, method, timeout, headers, data)


class _Values:
    """The job's own metrics, which the group itself labels."""

    def __init__(self, values: dict[str, float]) -> None:
        self._values = values

    def collect(self) -> Iterator[Family]:
        for metric in JOB_METRICS:
            if metric.name in self._values:
                yield GaugeMetricFamily(metric.name, metric.help, value=self._values[metric.name])
