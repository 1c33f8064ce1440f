"""The hub: one small actor between the training workers and whoever watches or stops the run.

Rank 0 tells it what happens, the driver reads it, and a request to stop travels the other way. Train workers get no
signals of their own, and their output is not for people; so both go through here.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from vaegan_dist.config import Config
from vaegan_dist.config_source import validate
from vaegan_dist.errors import ConfigError, VaeganError
from vaegan_dist.reporting.prometheus import Exporter
from vaegan_dist.reporting.records import Record
from vaegan_dist.reporting.snapshot import RankSnapshot
from vaegan_dist.training.remote import SupersededError
from vaegan_dist.training.resume import run_folder

KEPT_RECORDS = 10_000
CLOSE_SECONDS = 30
# A node counts as lost after half a minute without a sign of life.
ANSWER_SECONDS = 120.0


@dataclass(frozen=True)
class Failure:
    """The first failure of a run that a retry cannot mend."""

    message: str
    exit_code: int
    superseded: bool
    """another process has taken the run over"""

    @classmethod
    def of(cls, error: VaeganError, where: str) -> "Failure":
        """What a worker raised, and which worker."""
        return cls(f"{where}: {error}", error.exit_code, isinstance(error, SupersededError))

    def error(self) -> VaeganError:
        """The same on the driver, of the kinds that callers tell apart."""
        if self.superseded:
            return SupersededError(self.message)
        return (ConfigError if self.exit_code == ConfigError.exit_code else VaeganError)(self.message)


class Hub:
    """State of a run as its watchers see it. Use through `start_hub`."""

    def __init__(self, config: dict[str, Any]) -> None:
        self.records: deque[Record] = deque(maxlen=KEPT_RECORDS)
        self.published = 0
        self._keeping = threading.Lock()
        self.stop, self.move = False, False
        self.nodes: dict[int, str] = {}
        self.groups: set[str] = set()
        self.failure: Failure | None = None
        # This process may replace one that died: the exporter goes on with the counters that the other kept.
        self.exporter = open_exporter(config, self.warn)

    def publish(self, record: Record) -> None:
        """Rank 0 says what happened."""
        self.exporter.record(record)
        self._keep(record)

    def observe(self, snapshot: RankSnapshot) -> None:
        """A rank says how it does."""
        self.exporter.observe(snapshot)

    def warn(self, message: str) -> None:
        """Trouble of the metrics, for whoever watches. Called from the exporter's thread as well."""
        self._keep({"event": "warning", "message": message})

    def _keep(self, record: Record) -> None:
        with self._keeping:
            self.records.append(record)
            self.published += 1

    def close(self, failed: bool) -> None:
        """The run is over: keep and push its metrics."""
        self.exporter.close(failed)

    def take(self, start: int) -> tuple[list[Record], int]:
        """Records from number `start` on (those still kept), and the number of the next one."""
        start = start if start <= self.published else 0  # another hub than the one that was asked before
        first_kept = self.published - len(self.records)
        skip = max(start - first_kept, 0)
        return list(self.records)[skip:], self.published

    def request_stop(self) -> None:
        """Ask the run to stop with a checkpoint."""
        self.stop = True

    def stop_requested(self) -> bool:
        """Whether somebody asked, or the workers must move."""
        return self.stop or self.move

    def stopped_for_good(self) -> bool:
        """Whether somebody asked the run to stop, rather than to go on elsewhere."""
        return self.stop

    def begin_attempt(self, cause: str) -> None:
        """New workers are about to start, and what ended those before (empty: there were none)."""
        self.move, self.nodes = False, {}
        if cause:
            self.exporter.record({"event": "attempt", "name": cause})

    def request_move(self) -> None:
        """Ask the workers of this attempt to stop with a checkpoint, because they must go on elsewhere."""
        self.move = True

    def arrived(self, rank: int, node: str, group: str) -> None:
        """A worker says on which node and in which placement group it is."""
        self.nodes[rank] = node
        self.groups.add(group)

    def take_groups(self) -> set[str]:
        """Placement groups of the workers so far; said once."""
        taken, self.groups = self.groups, set()
        return taken

    def places(self) -> dict[int, str]:
        """Nodes of this attempt's workers, by rank."""
        return self.nodes

    def fail(self, failure: Failure) -> None:
        """A worker says why no retry can help; the first one counts."""
        self.failure = self.failure or failure

    def why_failed(self) -> Failure | None:
        """The failure that ended the run, if one did."""
        return self.failure


def open_exporter(config: dict[str, Any], warn: Callable[[str], None]) -> Exporter:
    """The metrics of a run, served from this process."""
    checked = validate(config)
    return Exporter(checked, run_folder(checked), warn)


def ask(question: Callable[[], Any], seconds: float = ANSWER_SECONDS) -> Any:
    """The hub's answer. When its node is lost, Ray takes a while to notice, and to start it on another.

    Raises:
        RayError: there is none within `seconds`, or none will ever come.
    """
    deadline = time.monotonic() + seconds
    while True:
        try:
            return ray.get(question(), timeout=max(deadline - time.monotonic(), 1.0))
        except ray.exceptions.ActorUnavailableError:
            if time.monotonic() > deadline:
                raise
            time.sleep(1.0)


@contextmanager
def end_of(hub: Any) -> Iterator[None]:
    """Around what a driver does with a run: the hub hears how it ended."""
    failed = True
    try:
        yield
        failed = False
    finally:
        with suppress(ray.exceptions.RayError):
            ray.get(hub.close.remote(failed), timeout=CLOSE_SECONDS)


def start_hub(config: Config) -> Any:
    """Start the actor, on the driver's node; it ends with the driver that started it."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
    options = {"num_cpus": 0, "max_restarts": -1, "max_task_retries": 3, "scheduling_strategy": here}
    return ray.remote(Hub).options(**options).remote(config.model_dump(mode="json"))
