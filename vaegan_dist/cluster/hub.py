"""The hub: one small actor between the training workers and whoever watches or stops the run.

Rank 0 tells it what happens, the driver reads it, and a request to stop travels the other way. Train workers get no
signals of their own, and their output is not for people; so both go through here.
"""

from collections import deque
from dataclasses import dataclass
from typing import Any

import ray

from vaegan_dist.reporting.records import Record

KEPT_RECORDS = 10_000


@dataclass(frozen=True)
class Failure:
    """The first failure of a run that a retry cannot mend."""

    message: str
    exit_code: int


class Hub:
    """State of a run as its watchers see it. Use through `start_hub`."""

    def __init__(self) -> None:
        self.records: deque[Record] = deque(maxlen=KEPT_RECORDS)
        self.published = 0
        self.stop = False
        self.failure: Failure | None = None

    def publish(self, record: Record) -> None:
        """Rank 0 says what happened."""
        self.records.append(record)
        self.published += 1

    def take(self, start: int) -> tuple[list[Record], int]:
        """Records from number `start` on (those still kept), and the number of the next one."""
        first_kept = self.published - len(self.records)
        skip = max(start - first_kept, 0)
        return list(self.records)[skip:], self.published

    def request_stop(self) -> None:
        """Ask the run to stop with a checkpoint."""
        self.stop = True

    def stop_requested(self) -> bool:
        """Whether somebody asked."""
        return self.stop

    def fail(self, failure: Failure) -> None:
        """A worker says why no retry can help; the first one counts."""
        self.failure = self.failure or failure

    def why_failed(self) -> Failure | None:
        """The failure that ended the run, if one did."""
        return self.failure


def start_hub() -> Any:
    """Start the actor; it ends with the driver that started it."""
    return ray.remote(Hub).options(num_cpus=0, max_restarts=-1, max_task_retries=3).remote()
