"""Where metrics are had: served over HTTP for Prometheus, pushed to a Pushgateway for jobs too short to be scraped.

A run's exporter and a sweep's are both made of this. Nothing here may end what they tell of: trouble becomes one
warning.
"""

import http.client
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.core import Metric as Family
from prometheus_client.exposition import basic_auth_handler, default_handler, delete_from_gateway, pushadd_to_gateway
from prometheus_client.utils import floatToGoString

from vaegan_dist.config import Config
from vaegan_dist.reporting.metrics import JOB_METRICS, Histogram, Metric, Sample
from vaegan_dist.reporting.snapshot import BUCKETS

logger = logging.getLogger(__name__)

# Where the metrics of a run or sweep are served stands in its folder.
STATE_FILE = ".metrics.json"
JOB = "vaegan_dist"
PUSH_SECONDS, PUSH_TIMEOUT_SECONDS = 15.0, 10.0
# What shares a machine takes the next free port.
PORTS_TRIED = 20


class Collector:
    """What prometheus_client asks for the metrics at each scrape; each has one label that says whose they are."""

    def __init__(self, label: str, owner: str, samples: Callable[[], list[Sample]]) -> None:
        self._label, self._owner, self._samples = label, owner, samples

    def collect(self) -> Iterator[Family]:
        """Families in the order of their samples."""
        families: dict[str, Any] = {}
        for metric, labels, value in self._samples():
            if metric.name not in families:
                families[metric.name] = _family(metric, self._label)
            family = families[metric.name]
            if isinstance(value, Histogram):
                family.add_metric([self._owner, *labels], buckets=_buckets(value), sum_value=value.total)
            else:
                family.add_metric([self._owner, *labels], value)
        yield from families.values()


def _family(metric: Metric, label: str) -> Any:
    kinds = {"counter": CounterMetricFamily, "gauge": GaugeMetricFamily, "histogram": HistogramMetricFamily}
    return kinds[metric.kind](metric.name, metric.help, labels=[label, *metric.labels])


def _buckets(histogram: Histogram) -> list[tuple[str, int]]:
    """Upper ends with cumulated counts, as the format wants them."""
    rows, seen = [], 0
    for end, count in zip((*BUCKETS, float("inf")), histogram.counts, strict=True):
        seen += count
        rows.append((str(floatToGoString(end)), seen))  # type: ignore[no-untyped-call]
    return rows


def _registry(collector: Collector) -> CollectorRegistry:
    registry = CollectorRegistry(auto_describe=False)
    registry.register(collector)
    return registry


def default_address() -> str:
    """Where metrics are served unless set: to this machine only, in a pod to whom its network policy lets in."""
    return "0.0.0.0" if "KUBERNETES_SERVICE_HOST" in os.environ else "127.0.0.1"


class Endpoint:
    """Serves metrics from `open` to `close`, and pushes them where the settings name a Pushgateway.

    Args:
        pushed: what goes to the Pushgateway, where that is not all that is served.
        what: what goes on when there is trouble, for the warning.
        warn: takes one line for each kind of trouble.
    """

    def __init__(
        self,
        config: Config,
        served: Collector,
        pushed: Collector | None = None,
        what: str = "training",
        warn: Callable[[str], None] = logger.warning,
    ) -> None:
        self.address = ""
        """host:port; empty while nothing is served"""
        self._settings, self._what, self._warn = config.reporting, what, warn
        self._served, self._pushed = _registry(served), _registry(pushed or served)
        self._gateway = _Gateway(config) if self._settings.pushgateway else None
        self._server: Any = None
        self._troubles: set[str] = set()
        self._began, self._ending = time.time(), threading.Event()
        self._pusher = threading.Thread(target=self._push_on, name="metrics-push", daemon=True)

    def open(self, before: int = 0) -> None:
        """Serve, and begin to push.

        Args:
            before: the port that an earlier process served the same metrics at, or 0.
        """
        self._serve(before)
        if self._gateway is not None:
            self._pusher.start()

    def push(self) -> None:
        """Push what there is now."""
        if self._gateway is not None:
            self.guard("Pushgateway", partial(self._gateway.push, self._pushed))

    def close(self, reason: str) -> None:
        """Push the end and serve no longer.

        Args:
            reason: `done`, `already done`, `stopped` or `failed`.
        """
        self._ending.set()
        if self._gateway is not None:
            self._pusher.join(2 * PUSH_TIMEOUT_SECONDS)
            self.guard("Pushgateway", partial(self._gateway.finish, self._pushed, self._began, reason))
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
            self._server = None

    def guard(self, what: str, action: Callable[[], object]) -> None:
        """Do it; where the disk or the network refuses, say so and go on."""
        try:
            action()
        except (OSError, ValueError, http.client.HTTPException) as error:
            cause = getattr(error, "reason", None) or getattr(error, "strerror", None) or error
            self.trouble(what, f"{what} failed ({type(error).__name__}: {cause}); {self._what} goes on without it")

    def trouble(self, kind: str, line: str) -> None:
        """Warn, the first time that it is of this kind."""
        if kind not in self._troubles:
            self._troubles.add(kind)
            self._warn(line)

    def _serve(self, before: int) -> None:
        first, address = self._settings.metrics_port, self._settings.metrics_address or default_address()
        if not first:
            return
        # Scraped at one address through its whole life: a new process asks for the port that the last one had.
        ports = [*([before] if first <= before < first + PORTS_TRIED else []), *range(first, first + PORTS_TRIED)]
        problem: OSError | None = None
        for port in ports:
            try:
                self._server, _ = start_http_server(port, address, self._served)
            except OSError as error:
                problem = error
                continue
            self.address = f"{address}:{port}"
            return
        self.trouble(
            "server",
            f"metrics are not served: {address}, ports {first} to {first + PORTS_TRIED - 1}: "
            f"{problem.strerror if problem else ''}; set reporting.metrics_address and reporting.metrics_port",
        )

    def _push_on(self) -> None:
        while not self._ending.wait(PUSH_SECONDS):
            self.push()


class _Gateway:
    """The group of one job at a Pushgateway."""

    def __init__(self, config: Config) -> None:
        settings = config.reporting
        self.url, self.keep = settings.pushgateway or "", settings.pushgateway_keep
        self.key = {"job_name": settings.pushgateway_job or config.run.name}
        self._user, self._password = (os.environ.get(f"PUSHGATEWAY_{part}") for part in ("USERNAME", "PASSWORD"))

    def push(self, registry: CollectorRegistry) -> None:
        """Replace the metrics of these names; others of the group stay, so a failed run keeps the last success."""
        pushadd_to_gateway(
            self.url, JOB, registry, grouping_key=self.key, timeout=PUSH_TIMEOUT_SECONDS, handler=self._handler
        )

    def finish(self, registry: CollectorRegistry, began: float, reason: str) -> None:
        """Push the end, or delete the group."""
        if not self.keep:
            delete_from_gateway(self.url, JOB, self.key, timeout=PUSH_TIMEOUT_SECONDS, handler=self._handler)
            return
        now = time.time()
        values = {"vaegan_job_last_end_timestamp_seconds": now, "vaegan_job_duration_seconds": now - began}
        if reason in ("done", "already done"):
            values |= {"vaegan_job_success": 1.0, "vaegan_job_last_success_timestamp_seconds": now}
        elif reason != "stopped":  # a stopped run has neither failed nor succeeded: it is to be continued
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
