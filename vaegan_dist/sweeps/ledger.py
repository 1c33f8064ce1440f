"""The ledger of a sweep: what was proposed, measured and ended, a line for each, synced before anything follows of it.

It alone decides what a sweep that was killed goes on with: trials that ended stay ended, begun ones keep their number,
values and folder.
"""

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from vaegan_dist.config import Config
from vaegan_dist.config_source import dump_yaml
from vaegan_dist.errors import ConfigError, InputError, VaeganError
from vaegan_dist.files import write_whole
from vaegan_dist.sweeps.journal import FILE, OPENED, FileJournal, Journal, journal_of
from vaegan_dist.sweeps.settings import MAY_CHANGE, SweepSettings
from vaegan_dist.training.remote import SMALL_BYTES, RemoteRun, remote_run
from vaegan_dist.training.resume import MAY_CHANGE as RUN_MAY_CHANGE
from vaegan_dist.training.resume import differences, run_folder
from vaegan_dist.training.storage import storage_trouble

HEAD = "sweep.yaml"

# running: begun, or about to be; done: spent its budget; early: the scheduler stopped it; failed: it crashed for good
State = Literal["running", "done", "early", "failed"]
Row = dict[str, float | None]


@dataclass
class Trial:
    """One configuration and what became of it."""

    number: int
    params: dict[str, Any]
    state: State = "running"
    rows: list[Row] = field(default_factory=list)
    """values of its metrics, each at `images_seen`"""
    message: str = ""
    seconds: float = 0.0
    changes: list[dict[str, Any]] = field(default_factory=list)
    """pbt: whom it was copied from, at which image, with which values"""
    place: int = 0
    """images that its weights have seen, as far as the ledger knows"""
    images_trained: int = 0
    """images spent on it up to its last value, those before a copy of another trial's weights included: only grows"""

    @property
    def name(self) -> str:
        """Name of its folder."""
        return trial_name(self.number)

    @property
    def images_seen(self) -> int:
        """Images at its last value of the metric."""
        return int(self.rows[-1]["images_seen"] or 0) if self.rows else 0

    @property
    def seconds_spent(self) -> float:
        """Seconds of training at its last value of the metric."""
        return (self.rows[-1].get("seconds") or 0.0) if self.rows else 0.0

    @property
    def ended(self) -> bool:
        """Whether it is over."""
        return self.state != "running"

    def last(self, metric: str) -> float | None:
        """Its last value of a metric; None for a trial that failed, or whose value is no number."""
        value = self.rows[-1].get(metric) if self.rows and self.state != "failed" else None
        return value if value is not None and math.isfinite(value) else None


def trial_name(number: int) -> str:
    """Name of a trial's run."""
    return f"{number:04d}"


class Ledger:
    """Trials by number, and the journal that keeps them. One process writes it.

    Args:
        folder: of the sweep.
        journal: its lines (default: a file of the folder).

    Raises:
        InputError: a line is none of a ledger; names it.
    """

    def __init__(self, folder: Path, journal: Journal | None = None) -> None:
        self.folder = folder
        self.trials: dict[int, Trial] = {}
        self.trouble: VaeganError | None = None
        """why a line could not be written; nothing is written any more then, and so nothing may happen any more"""
        self.journal = journal or FileJournal(folder / FILE)
        self._count = 0
        self._take(self.journal.read())

    def __getstate__(self) -> dict[str, Any]:
        """Without the journal: Tune pickles what it is given, for a restore that a sweep never asks of it."""
        return {key: value for key, value in self.__dict__.items() if key != "journal"}

    def begin(self) -> None:
        """Write from now on."""
        self._take(self.journal.begin())

    def _take(self, lines: Sequence[bytes]) -> None:
        for number, line in enumerate(lines, self._count):
            try:
                self._apply(json.loads(line))
            except (ValueError, KeyError, TypeError) as error:
                raise InputError(
                    f"{self.journal.name(number)} is not of a ledger ({type(error).__name__}: {error}); restore it, or "
                    f"choose another --name"
                ) from None
        self._count += len(lines)

    def _apply(self, event: dict[str, Any]) -> None:
        if event["event"] == OPENED:
            return
        number = event["trial"]
        if event["event"] == "created":
            self.trials[number] = Trial(number, event["params"])
            return
        trial = self.trials[number]
        match event["event"]:
            case "row":
                row = {key: None if value is None else float(value) for key, value in event["row"].items()}
                # A copy of another trial's weights goes back to where that one stood.
                earlier = [old for old in trial.rows if (old["images_seen"] or 0) < (row["images_seen"] or 0)]
                # At once: other threads read it.
                trial.rows = [*earlier, row]
                place = int(row["images_seen"] or 0)
                trial.images_trained += max(place - trial.place, 0)
                trial.place = place
            case "changed":
                trial.params = event["params"]
                trial.changes.append({key: event[key] for key in ("params", "source", "images_seen")})
                trial.place = event["images_seen"]
            case "ended":
                trial.state, trial.message = event["state"], event["message"]
                trial.seconds = event["seconds"]

    def _write(self, event: dict[str, Any]) -> None:
        """Append, and only then know."""
        line = json.dumps({**event, "time": round(time.time(), 3)}, allow_nan=False).encode()
        self._or_trouble(lambda: self.journal.append(line))
        self._apply(event)

    def check_owner(self) -> None:
        """Raises SupersededError when another command has taken the sweep over."""
        self._or_trouble(self.journal.check_owner)

    def _or_trouble(self, action: Callable[[], None]) -> None:
        if self.trouble is not None:
            raise self.trouble
        try:
            action()
        except VaeganError as error:
            self.trouble = error
            raise
        except OSError as error:
            cause = storage_trouble(error, self.folder) or str(error)
            self.trouble = VaeganError(f"{self.folder}: the sweep's ledger cannot be written: {cause}")
            raise self.trouble from None

    def create(self, params: dict[str, Any]) -> Trial:
        """A new trial, before it starts."""
        number = len(self.trials)
        self._write({"event": "created", "trial": number, "params": params})
        return self.trials[number]

    def row(self, number: int, row: Mapping[str, float | None]) -> None:
        """Values of a trial's metrics."""
        clean = {k: v if v is not None and math.isfinite(v) else None for k, v in row.items()}
        self._write({"event": "row", "trial": number, "row": clean})

    def change(self, number: int, params: dict[str, Any], source: int, images_seen: int) -> None:
        """A trial goes on with a copy of another one's weights and with other values."""
        event = {"event": "changed", "trial": number, "params": params, "source": source, "images_seen": images_seen}
        self._write(event)

    def end(self, number: int, state: State, message: str = "", seconds: float = 0.0) -> None:
        """A trial is over."""
        event = {"event": "ended", "trial": number, "state": state, "message": message, "seconds": round(seconds, 3)}
        self._write(event)

    def close(self) -> None:
        """Let go of the journal's files."""
        self.journal.close()


def read_ledger(config: Config) -> Ledger:
    """The ledger of a sweep, as it is now, to look at."""
    folder = run_folder(config)
    return Ledger(folder, journal_of(folder, remote_run(config)))


def open_ledger(folder: Path, settings: SweepSettings, config: Config) -> Ledger:
    """The ledger of a sweep, new or continued, to write.

    Raises:
        ConfigError: the sweep was begun with other settings or another configuration; names the first difference.
        InputError, DataError: `run.storage` is a store that does not do what a ledger needs, or does not answer.
    """
    import yaml

    remote = remote_run(config)
    said = {"sweep": settings.model_dump(mode="json"), "config": config.model_dump(mode="json")}
    head = yaml.safe_dump(said, sort_keys=False, allow_unicode=True, width=100).encode()
    before = _head_of(folder, remote)
    if before is None and remote is not None and not remote.objects.create(HEAD, head):
        before = _head_of(folder, remote)  # another command has just begun it
    if before is not None:
        _refuse_changes(remote.url if remote else str(folder), yaml.safe_load(before), said)
    ledger = Ledger(folder, journal_of(folder, remote))
    ledger.begin()
    for name, content in ((HEAD, head), ("config.yaml", dump_yaml(config).encode())):
        write_whole(folder / name, content)
        if remote is not None:
            remote.objects.write(name, content)
    return ledger


def _head_of(folder: Path, remote: RemoteRun | None) -> bytes | None:
    if remote is not None:
        return remote.objects.small(HEAD, SMALL_BYTES)
    return (folder / HEAD).read_bytes() if (folder / HEAD).exists() else None


def _refuse_changes(place: str, before: dict[str, Any], said: dict[str, Any]) -> None:
    allowed = {"sweep": MAY_CHANGE, "config": RUN_MAY_CHANGE}
    for part, may in allowed.items():
        for key, was, now in differences(before[part], said[part]):
            if not any(key == name or key.startswith(name + ".") for name in may):
                raise ConfigError(
                    f"{key}={now}: the sweep in {place} was begun with {was}; restore it, or choose another "
                    f"--name for a new sweep"
                )
