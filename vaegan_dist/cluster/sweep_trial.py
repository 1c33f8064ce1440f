"""One trial of a sweep, in Ray Tune's process: the plain loop right there, or a group of workers that it starts.

The process is used again for the next trial, so what is imported and mapped stays. A trial that fails says so and
returns: only a process that dies is started again, and goes on from the trial's last checkpoint.
"""

import gc
import os
import queue
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray
import torch
from ray import tune

from vaegan_dist.cluster.ray_train import train_group
from vaegan_dist.cluster.runtime import pick_device
from vaegan_dist.cluster.sweep_hub import StopQuestion
from vaegan_dist.config import Config
from vaegan_dist.config_source import validate
from vaegan_dist.errors import ConfigError, VaeganError
from vaegan_dist.reporting.records import Record, integer, number
from vaegan_dist.reporting.snapshot import RankSnapshot
from vaegan_dist.sweeps.journal import PATIENCE
from vaegan_dist.sweeps.ledger import Row
from vaegan_dist.sweeps.trial import Judged, Reporter, trial_config
from vaegan_dist.training.checkpoint import newest_whole, open_checkpoint
from vaegan_dist.training.finished import outcome_of_finished
from vaegan_dist.training.graft import graft
from vaegan_dist.training.loop import Outcome, train
from vaegan_dist.training.remote import RemoteRun, SupersededError, remote_run
from vaegan_dist.training.resume import refuse_changes, run_folder

POLL_SECONDS = 0.2
TELL_SECONDS = 1.0


@dataclass(frozen=True)
class Shared:
    """What all trials of a sweep have in common."""

    folder: Path
    config: dict[str, Any]
    judged: Judged
    hub: Any
    session: str
    checkpoints: bool
    """hand checkpoints to Tune, which copies them to other trials"""


class TrialRuntime:
    """The process of a one-worker trial as the loop sees it."""

    def __init__(self, config: Config, shared: Shared, trial: int, reporter: Reporter) -> None:
        self.rank, self.world_size = 0, 1
        self.device: torch.device = pick_device(config, 0)
        self.stop_requested = StopQuestion(shared.hub)
        self.hub, self.trial, self.reporter = shared.hub, trial, reporter

    def publish(self, record: Record) -> None:
        """Tell the driver how far the trial is, and Tune what it measured."""
        tell_progress(self.hub, self.trial, record)
        self.reporter.note(record)

    def observe(self, snapshot: RankSnapshot) -> None:
        """The sweep has no metrics server for each trial."""

    def checkpointed(self, metrics: dict[str, float], checkpoint: Path) -> None:
        """The record that follows says it."""

    def abandon(self, message: str) -> None:
        """End this process; Tune starts the trial again, because a hang may not come back."""
        print(f"error: trial {self.trial}: {message}", file=sys.stderr, flush=True)
        time.sleep(TELL_SECONDS)
        os._exit(1)


def tell_progress(hub: Any, trial: int, record: Record) -> None:
    """Send a place on its way to the driver; nobody waits for it."""
    if record.get("event") == "train":
        hub.note.remote(trial, integer(record, "images_seen") or 0, number(record, "images_per_second") or 0.0)


def run_trial(config: dict[str, Any], shared: Shared) -> None:
    """Body of a trial: Tune calls it with a proposal, in a process that may have run others before.

    Args:
        config: the `proposal`: `trial` (its number), `params` (its values), `known` (images of its last row in the
            ledger).
    """
    # How long Tune waits, before it uses the process again, for a trial that it has stopped to end its writes.
    os.environ["TUNE_FUNCTION_THREAD_TIMEOUT_S"] = "600"
    proposal = config["proposal"]
    trial = proposal["trial"]
    ending = _Ending(shared.judged)
    try:
        settled = trial_config(validate(shared.config), shared.folder, trial, proposal["params"], shared.judged)
        remote = _arrive(settled)
        reporter = Reporter(settled, shared.judged, _sender(shared, remote), shared.session, proposal["known"])
        ending.reporter = reporter
        if ray.get(shared.hub.stop_requested.remote()):
            ending.state = "stopped"  # it was paused, or waited, when somebody asked to stop
        else:
            if shared.checkpoints:
                _take_over(settled, reporter, remote)
            outcome = _train(settled, shared, trial, reporter)
            ending.state = "stopped" if outcome.reason == "stopped" else "done"
    except SupersededError as error:
        # Of two commands on one sweep the earlier one may have begun a trial again before it is refused.
        ending.give_up(error)
        print(f"warning: trial {trial}: {ending.message}", file=sys.stderr, flush=True)
    except VaeganError as error:
        ending.state, ending.message = "failed", " ".join(str(error).split())
    except Exception as error:
        # Whatever a configuration breaks, it must not take the sweep with it.
        ending.state, ending.message = "failed", f"{type(error).__name__}: {' '.join(str(error).split())}"
        ending.keep_traceback(shared, trial)
    finally:
        _release()
    tune.report(ending.result())


def _arrive(config: Config) -> RemoteRun | None:
    """A trial in a store may come from another machine: take it over, and put the copy here in the store's state."""
    remote = remote_run(config, PATIENCE)
    if remote is not None:
        remote.take_over()
        for complaint in remote.pull():
            print(f"warning: trial {config.run.name}: {complaint}", file=sys.stderr, flush=True)
    return remote


def _release() -> None:
    """Give back what this trial held: the process goes on, and others may share its GPU."""
    gc.collect()
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.empty_cache()


@dataclass
class _Ending:
    """How a trial ended, as Tune and the ledger hear it."""

    judged: Judged
    state: str = ""
    message: str = ""
    reporter: Reporter | None = None
    row: Row = field(default_factory=dict)

    def result(self) -> dict[str, Any]:
        """The trial's last result."""
        row: Row = self.reporter.last() if self.reporter is not None else {"images_seen": 0.0}
        score = self.judged.worst if self.state == "failed" else self.judged.score(row)
        place = {**place_of(row, self.judged), "value": score, "row": row}
        return {**place, "state": self.state, "message": self.message[:500], "done": True}

    def give_up(self, error: SupersededError) -> None:
        """Leave the trial unfinished to whoever has it."""
        self.state, self.message = "stopped", " ".join(str(error).split())
        if self.reporter is not None:
            self.reporter.forget()

    def keep_traceback(self, shared: Shared, trial: int) -> None:
        """For whoever looks for the cause."""
        path = (self.reporter.folder if self.reporter is not None else shared.folder) / f"error-{trial}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(traceback.format_exc())
        if self.reporter is not None and self.reporter.remote is not None:
            try:
                self.reporter.remote.objects.upload(path.name, path)
            except VaeganError as error:
                self.message += f"; {error}"


def place_of(row: Row, judged: Judged) -> dict[str, Any]:
    """A row's place on the clocks of the schedulers."""
    images_seen = int(row["images_seen"] or 0)
    return {"images_seen": images_seen, "intervals": images_seen / judged.interval}


def _sender(shared: Shared, remote: RemoteRun | None) -> Callable[[Row, Path | None], None]:
    def send(row: Row, checkpoint: Path | None) -> None:
        result = {**place_of(row, shared.judged), "value": shared.judged.score(row), "row": row}
        handed = tune.Checkpoint.from_directory(here(checkpoint)) if shared.checkpoints and checkpoint else None
        tune.report(result, checkpoint=handed)

    def here(checkpoint: Path) -> Path:
        # A worker of a group may have written it on another machine.
        return remote.fetch(checkpoint.name) if remote is not None else checkpoint

    return send


def _take_over(config: Config, reporter: Reporter, remote: RemoteRun | None) -> None:
    """Population-based training: go on from what Tune hands over, or with other values than before."""
    handed = tune.get_checkpoint()
    own, _ = newest_whole(run_folder(config))
    if handed is not None:
        with handed.as_directory() as path:
            if open_checkpoint(Path(path)).config != config:
                reporter.restart(_graft(Path(path), config, remote))
        return  # its own checkpoint: the trial was paused, and its folder is as new
    if own is None:
        return
    try:
        refuse_changes(config, own)
    except ConfigError:
        # The values were exchanged, and the sweep was killed before the weights were.
        _graft(own.path, config, remote)


def _graft(source: Path, config: Config, remote: RemoteRun | None) -> int:
    """Put a checkpoint into the trial's folder, and into the store behind it; its image count."""
    found = graft(source, config)
    if remote is not None:
        remote.replace(found.path)
    return found.progress.images_seen


def _train(config: Config, shared: Shared, trial: int, reporter: Reporter) -> Outcome:
    reporter.replay()
    finished = outcome_of_finished(config)
    if finished is not None:
        return finished
    if config.cluster.most_workers > 1:
        return _train_group(config, shared, trial, reporter)
    torch.set_num_threads(config.training.torch_threads or max(1, int(config.cluster.cpus_per_worker)))
    return train(config, TrialRuntime(config, shared, trial, reporter))


def _train_group(config: Config, shared: Shared, trial: int, reporter: Reporter) -> Outcome:
    """Workers of the trial's own under Ray Train; their records come back to this thread, which alone may report."""
    records: queue.Queue[Record] = queue.Queue()
    group = _Group(config, records)
    stop = StopQuestion(shared.hub)
    try:
        while group.running or not records.empty():
            try:
                record = records.get(timeout=POLL_SECONDS)
            except queue.Empty:
                if stop():
                    group.stop()
                continue
            tell_progress(shared.hub, trial, record)
            reporter.note(record)
    finally:
        group.close()
    return group.outcome()


class _Group:
    """An inner run of Ray Train, in a thread of its own."""

    def __init__(self, config: Config, records: "queue.Queue[Record]") -> None:
        self.config, self.records = config, records
        self._outcome: Outcome | None = None
        self._error: BaseException | None = None
        self._hubs: queue.Queue[Any] = queue.Queue()
        self._hub: Any = None
        self._thread = threading.Thread(target=self._run, name="inner-train", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._outcome = train_group(self.config, self.records.put, self._hubs.put)
        except BaseException as error:
            self._error = error

    @property
    def running(self) -> bool:
        """Whether it goes on."""
        return self._thread.is_alive()

    def stop(self) -> None:
        """Ask for a checkpoint and the end."""
        while not self._hubs.empty():
            self._hub = self._hubs.get()
        if self._hub is not None:
            self._hub.request_stop.remote()

    def close(self) -> None:
        """Wait until no worker of it is left, asking it to end."""
        while self.running:
            self.stop()
            self._thread.join(POLL_SECONDS)
        if self._hub is not None:
            ray.kill(self._hub)

    def outcome(self) -> Outcome:
        """How it ended."""
        if self._error is not None:
            raise self._error
        assert self._outcome is not None
        return self._outcome
