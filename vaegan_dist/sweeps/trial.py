"""What a trial tells the sweep while it trains: the values of the metric, each once its checkpoint stands."""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vaegan_dist.config import Config
from vaegan_dist.config_source import with_changes
from vaegan_dist.files import write_whole
from vaegan_dist.reporting.records import Record, integer, measurements, number, text
from vaegan_dist.reporting.sinks import read_history
from vaegan_dist.sweeps.journal import PATIENCE
from vaegan_dist.sweeps.ledger import Row, trial_name
from vaegan_dist.training.checkpoint import newest_whole
from vaegan_dist.training.remote import SMALL_BYTES, remote_run, run_url
from vaegan_dist.training.resume import run_folder

REPORTED = ".reported.json"
TRIALS = "trials"
WORST = 1e30


@dataclass(frozen=True)
class Judged:
    """By what trials are judged, as every part of a sweep sees it."""

    metrics: tuple[str, ...]
    modes: tuple[str, ...]
    event: str
    """kind of the record that holds them: `evaluation` or `train`"""
    interval: int
    """images between two of their values, and between two checkpoints"""

    def row(self, record: Record) -> Row | None:
        """The measurements of a record that holds every metric, with its place; else None."""
        if record.get("event") != self.event or any(metric not in record for metric in self.metrics):
            return None
        values: Row = {"seconds": number(record, "seconds"), **measurements(record)}
        return {"images_seen": integer(record, "images_seen") or 0, **dict.fromkeys(self.metrics), **values}

    def score(self, row: Row) -> float:
        """The first metric as a number that can be compared: what is none, or not finite, is the worst."""
        value = row.get(self.metrics[0])
        if value is None or not math.isfinite(value):
            return WORST if self.modes[0] == "min" else -WORST
        return value

    @property
    def worst(self) -> float:
        """The score of a trial that crashed."""
        return self.score({})


def trial_config(config: Config, folder: Path, number: int, params: dict[str, Any], judged: Judged) -> Config:
    """The configuration that a trial trains with: the sweep's own with the trial's values on top.

    Raises:
        ConfigError: the values do not go together.
    """
    url = run_url(config)
    own = {
        "run.name": trial_name(number),
        "run.storage": f"{url}/{TRIALS}" if url else str(folder / TRIALS),
        "checkpoint.images": judged.interval,
        ("evaluation.images" if judged.event == "evaluation" else "reporting.log_images"): judged.interval,
        # One server of metrics for each of many small runs would be a crowd of ports.
        "reporting.metrics_port": 0,
        "reporting.pushgateway": None,
        # The sweep draws its own; for a short trial a picture of its history would cost more than its training.
        "reporting.curves": False,
    }
    return with_changes(config, {**params, **own})


@dataclass
class Reporter:
    """Collects the rows of one trial and hands each on when the checkpoint of that image stands.

    The sweep then decides at an image to which the trial can go back: it may be stopped, paused, or copied there.
    """

    config: Config
    judged: Judged
    send: Callable[[Row, Path | None], None]
    """may raise SystemExit: the trial is over, or goes on later"""
    session: str
    """names the driver; a new one has heard nothing but what its ledger holds"""
    known: int
    """image count of the last row in its ledger"""
    waiting: list[Row] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.folder, self.remote = run_folder(self.config), remote_run(self.config, PATIENCE)
        self._ends = _phase_ends(self.config)
        self._last: Row | None = None
        self.sent = self._recall()

    def _recall(self) -> int:
        """Image count of the last row that this driver has heard."""
        try:
            said = json.loads(self._said())
        except (OSError, ValueError):
            return self.known
        return int(said["images_seen"]) if said.get("session") == self.session else self.known

    def _said(self) -> bytes:
        # In a store it must not depend on this machine: the trial may go on on another one.
        if self.remote is not None:
            return self.remote.objects.small(REPORTED, SMALL_BYTES) or b""
        return (self.folder / REPORTED).read_bytes()

    def restart(self, images_seen: int) -> None:
        """The trial goes on from here, wherever it was: a copy of another one."""
        self.sent = images_seen
        self._remember()

    def replay(self) -> None:
        """Send what an earlier process measured and could not tell."""
        history, (newest, _) = self.folder / "history.jsonl", newest_whole(self.folder)
        if newest is None or not history.exists():
            return
        for record in read_history(history):
            row = self.judged.row(record)
            if row is not None and (row["images_seen"] or 0) <= newest.progress.images_seen:
                self._last = row
                self._send(row, newest.path)

    def note(self, record: Record) -> None:
        """A record of the trial's run."""
        if record.get("event") == "checkpoint":
            self._release(integer(record, "images_seen") or 0, Path(text(record, "path")))
            return
        row = self.judged.row(record)
        if row is None:
            return
        self._last = row
        if self._has_checkpoint(int(row["images_seen"] or 0)):
            self.waiting.append(row)
        else:
            self._send(row, None)

    def last(self) -> Row:
        """The last row that the trial has measured; one without values where there is none."""
        return self._last or {"images_seen": self.sent}

    def forget(self) -> None:
        """What has been measured and not sent has no checkpoint, and never will have one."""
        self._last, self.waiting = None, []

    def _release(self, images_seen: int, checkpoint: Path) -> None:
        ready = [row for row in self.waiting if (row["images_seen"] or 0) <= images_seen]
        self.waiting = [row for row in self.waiting if row not in ready]
        for row in ready:
            self._send(row, checkpoint)

    def _send(self, row: Row, checkpoint: Path | None) -> None:
        images_seen = int(row["images_seen"] or 0)
        if images_seen > self.sent:
            # Before and not after: `send` may be the last thing that this thread does.
            self.sent = images_seen
            self._remember()
            self.send(row, checkpoint)

    def _remember(self) -> None:
        said = json.dumps({"session": self.session, "images_seen": self.sent}).encode()
        if self.remote is not None:
            self.remote.objects.write(REPORTED, said)
        else:
            write_whole(self.folder / REPORTED, said)

    def _has_checkpoint(self, images_seen: int) -> bool:
        """Whether the loop saves after the step that reached this image count."""
        interval, batch = self.config.checkpoint.images, self.config.training.batch_size
        return images_seen in self._ends or images_seen // interval > (images_seen - batch) // interval


def _phase_ends(config: Config) -> Sequence[int]:
    ends, total = [], 0
    for phase in config.phases:
        total += config.phase_images(phase)
        ends.append(total)
    return ends
