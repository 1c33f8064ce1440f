"""A run on a cluster that changes: attempts with a fixed number of workers each, and what decides about the next one.

Ray Train runs one attempt and retries nothing. Here a failure is counted against a budget that each checkpoint renews,
the next attempt begins where there is room, and a run that must move (a node whose end is announced, room for more
workers) stops with a checkpoint first, so that a move loses no step.
"""

import threading
import time
from collections.abc import Callable
from enum import Enum
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import ray
import ray.train

from vaegan_dist.cluster.hub import Failure, ask
from vaegan_dist.cluster.placement import Reservation, draining_nodes, larger_sizes, names_of
from vaegan_dist.cluster.runtime import OnRecord
from vaegan_dist.config import ClusterSection, Config
from vaegan_dist.errors import VaeganError
from vaegan_dist.reporting.records import Record, integer
from vaegan_dist.training.loop import Outcome

WATCH_SECONDS = 2.0
POLL_SECONDS = 0.5
COLLECTIVES = ("gloo", "NCCL", "ProcessGroup")


class Kind(Enum):
    """What a failed attempt is counted as, with the key of its budget."""

    WORKER = "max_failures"
    START = "max_start_failures"
    PREEMPTION = "max_preemptions"


def kind_of(error: BaseException, announced: bool) -> Kind:
    """Which budget pays for a failure.

    Args:
        announced: a node of this attempt's workers was draining.
    """
    failures = getattr(error, "worker_failures", None) or {}
    if announced or any(getattr(failure, "preempted", False) for failure in failures.values()):
        return Kind.PREEMPTION
    return Kind.START if isinstance(error, ray.train.ControllerError) else Kind.WORKER


class Budget:
    """Failures that may come in a row; a checkpoint further on than any before ends the row."""

    def __init__(self, cluster: ClusterSection) -> None:
        self.limits = {kind: int(getattr(cluster, kind.value)) for kind in Kind}
        self.spent = dict.fromkeys(Kind, 0)
        self.furthest = -1

    def note(self, record: Record) -> None:
        """A record of the run."""
        if record.get("event") == "checkpoint" and (integer(record, "images_seen") or 0) > self.furthest:
            # The first one seen may be what an earlier start left.
            if self.furthest >= 0:
                self.spent = dict.fromkeys(Kind, 0)
            self.furthest = integer(record, "images_seen") or 0

    def spend(self, kind: Kind, line: str) -> str:
        """Count a failure; the line that says what comes now.

        Raises:
            VaeganError: it was one too many.
        """
        self.spent[kind] += 1
        spent, limit = self.spent[kind], self.limits[kind]
        if spent > limit:
            raise VaeganError(
                f"{line}; given up after {spent} in a row without a new checkpoint (cluster.{kind.value}={limit}); "
                f"run the same command again to continue from the last checkpoint"
            )
        return f"{line}; starting again from the last checkpoint ({spent} of {limit}, cluster.{kind.value})"


class Steward:
    """Watches the cluster during an attempt and asks the run to move when it should."""

    def __init__(self, config: Config, hub: Any, workers: int, say: Callable[[str], None]) -> None:
        self.config, self.hub, self.workers, self.say = config, hub, workers, say
        self.announced, self.moving = False, False
        self._wanted: Reservation | None = None
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._run, name="steward", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ending.set()
        self._thread.join()
        if self._wanted is not None:
            self._wanted.close()

    def _run(self) -> None:
        began = time.monotonic()
        while not self._ending.wait(WATCH_SECONDS):
            try:
                self._look(time.monotonic() - began)
            except (ray.exceptions.RayError, ConnectionError, RuntimeError):
                # The cluster does not answer; what ends the attempt says why.
                continue

    def _look(self, age: float) -> None:
        if self.moving:
            return
        places: dict[int, str] = ray.get(self.hub.places.remote(), timeout=10)
        draining = [node for node in draining_nodes() if node in places.values()]
        if draining:
            self.announced = True
            ranks = ", ".join(str(rank) for rank, node in sorted(places.items()) if node in draining)
            self._move(f"{names_of(draining)} is about to end (ranks {ranks}): checkpoint, then on elsewhere")
        elif len(places) == self.workers and self._room_for_more() and age > self.config.cluster.resize_seconds:
            self._move(f"there is room for more than {self.workers} workers: checkpoint, then on with them")

    def _room_for_more(self) -> bool:
        """Whether the next larger number of workers fits. Asked only once the present ones have their room."""
        larger = larger_sizes(self.config, self.workers)
        if larger and self._wanted is None:
            # It waits for room for those that are missing, and tells an autoscaler of them.
            self._wanted = Reservation(self.config.cluster, larger[0] - self.workers)
        return self._wanted is not None and self._wanted.granted()

    def _move(self, why: str) -> None:
        self.moving = True
        self.say(why)
        ray.get(self.hub.request_move.remote(), timeout=10)


class Watcher:
    """Reads the hub in a thread and hands every record on; keeps the outcome."""

    def __init__(self, hub: Any, on_record: OnRecord, budget: Budget) -> None:
        self.hub, self.on_record, self.budget = hub, on_record, budget
        self.next = 0
        self.last: Record | None = None
        self._reading = threading.Lock()
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="hub-watcher", daemon=True)
        self._thread.start()

    def _follow(self) -> None:
        while not self._ending.wait(POLL_SECONDS):
            self._take()

    def _take(self) -> None:
        with self._reading:
            try:
                records, self.next = ray.get(self.hub.take.remote(self.next), timeout=10)
            except (ray.exceptions.RayError, ray.exceptions.GetTimeoutError):
                return
            for record in records:
                self.budget.note(record)
                if record.get("event") == "outcome":
                    self.last = record
                else:
                    self.on_record(record)

    def warn(self, message: str) -> None:
        """Something that the person who watches should know."""
        self.on_record({"event": "warning", "message": message})

    def stopped(self) -> bool:
        """Whether somebody asked the run to stop."""
        try:
            return bool(ask(self.hub.stopped_for_good.remote, 10))
        except ray.exceptions.RayError:
            return False

    def explained(self) -> VaeganError | None:
        """The failure that a worker explained, if one did: a retry cannot mend it."""
        self._take()
        try:
            failure: Failure | None = ask(self.hub.why_failed.remote)
        except ray.exceptions.RayError:
            return None
        return failure.error() if failure is not None else None

    def outcome(self) -> Outcome:
        """How rank 0 ended the attempt that is over."""
        self._take()
        last, self.last = self.last, None
        if last is None:
            raise VaeganError("training ended, but rank 0 did not say how; see the log above")
        path = last.get("path")
        return Outcome(str(last["reason"]), integer(last, "images_seen") or 0, Path(str(path)) if path else None)

    def close(self) -> None:
        """Read what is left."""
        self._ending.set()
        self._thread.join()
        self._take()


def describe_failure(error: BaseException, workers: int) -> str:
    """The root cause in one line: a rank that died, else the first failing rank and its last line."""
    failures: dict[int, BaseException] = getattr(error, "worker_failures", None) or {}
    if not failures:
        what = (
            "Ray Train's controller ended" if isinstance(error, ray.exceptions.RayActorError) else "no workers started"
        )
        return f"{what}: {_first_sentence(error)}"
    # Those that lost a rank fail as well; the one that died is the cause.
    died = {rank: cause for rank, cause in failures.items() if isinstance(cause, ray.exceptions.RayActorError)}
    rank, cause = sorted((died or failures).items())[0]
    if died:
        return f"rank {rank} of {workers} died: {_last_line(cause)}"
    if any(word in str(cause) for word in COLLECTIVES):
        return f"rank {rank} of {workers} lost another rank, which died or was cut off: {_last_line(cause)}"
    return f"rank {rank} of {workers} failed: {_last_line(cause)}"


def _first_sentence(error: BaseException) -> str:
    return str(error).strip().partition(". ")[0].partition("\n")[0] or type(error).__name__


def _last_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    # Gloo adds advice of its own.
    return lines[-1].partition(". This is typically")[0].strip() if lines else type(error).__name__
