"""The training loop: restore → each phase → each batch → step → log → pictures → checkpoint → stop?

It runs unchanged under Ray, torchrun and in one process; a `Runtime` stands for the surroundings.
"""

import time
from collections.abc import Iterator
from contextlib import closing, suppress
from dataclasses import dataclass
from enum import Enum, auto
from functools import partial
from pathlib import Path
from typing import Any

import torch

from vaegan_dist.config import Config, Phase
from vaegan_dist.data.augment import Augmentation
from vaegan_dist.data.bad_samples import BadSamples
from vaegan_dist.data.configured import open_configured
from vaegan_dist.data.dataset import ShardDataset
from vaegan_dist.data.loader import train_batches
from vaegan_dist.data.urls import is_remote
from vaegan_dist.errors import VaeganError
from vaegan_dist.reporting.records import Record
from vaegan_dist.training.checkpoint import Checkpoint
from vaegan_dist.training.evaluating import Evaluations, EvaluationStoppedError
from vaegan_dist.training.guard import Watch, worst_skips
from vaegan_dist.training.keeper import Keeper
from vaegan_dist.training.memory import advice, is_out_of_memory
from vaegan_dist.training.meter import Agreement, Meter, from_all_ranks
from vaegan_dist.training.observer import Observer
from vaegan_dist.training.pictures import image_of
from vaegan_dist.training.presence import RunLock, take_folder
from vaegan_dist.training.resume import refuse_changes, refuse_other_data, run_folder
from vaegan_dist.training.runtime import Runtime
from vaegan_dist.training.snapshot import Interval
from vaegan_dist.training.state import TrainState, create_state
from vaegan_dist.training.step import Step
from vaegan_dist.training.storage import storage_trouble
from vaegan_dist.training.watchdog import Watchdog
from vaegan_dist.training.writer import COMPARED, Writer

FETCH_SECONDS = 1.0


@dataclass(frozen=True)
class Outcome:
    """How a call of `train` ended."""

    reason: str  # "done", "stopped" (a checkpoint stands) or "already done"
    images_seen: int
    checkpoint: Path | None


class PhaseEnd(Enum):
    """Why a phase is left."""

    DONE = auto()
    STOPPED = auto()
    DIVERGED = auto()


class Training:
    """One rank's run from restore to end."""

    def __init__(self, config: Config, runtime: Runtime, lock: RunLock, dtype: torch.dtype) -> None:
        self.config, self.runtime, self.dtype = config, runtime, dtype
        self.folder = run_folder(config)
        self.dataset: ShardDataset = open_configured(config.data, counted_elsewhere=True)
        manifest = self.dataset.manifest
        self.image = image_of(manifest)
        self.augment = Augmentation(config.run.seed, config.data.flip, config.data.random_crop, runtime.device)
        self.identity: dict[str, Any] = {"samples": list(self.dataset.shard_samples), "streams": config.streams}
        take_folder(self.folder, lock, runtime, shared=not is_remote(config.run.storage))
        self.keeper = Keeper(config, self.folder, runtime)
        self.agreement = Agreement(runtime)
        found, self.complaints = self.keeper.newest()
        if found is not None:
            refuse_changes(config, found)
            refuse_other_data(self.identity, found)
        self._load(found)
        self.resumed_at = found.progress.images_seen if found else None
        self.state.progress.restarts += found is not None
        self.observer = Observer(config, runtime, self.dataset, lambda: self.bad_samples.by_shard())
        self.originals = self.dataset.read(range(min(COMPARED, len(self.dataset)))).images
        self.evaluations = Evaluations(config, self.image, runtime)
        self.clock = time.perf_counter() - self.state.progress.seconds

    def _load(self, found: Checkpoint | None) -> None:
        """The state of a checkpoint, or that of a run before its first step."""
        self.state: TrainState = create_state(self.config, self.image, self.runtime.device, self.dtype)
        self.interval: Interval | None = None
        self.watch = Watch()
        account = found.data.get("bad_samples") if found else None
        self.bad_samples = BadSamples(self.dataset, self.config.data.max_bad_samples, account)
        if found is not None:
            self.keeper.restore(self.state, found)
            self.interval, self.watch = found.interval, Watch.from_json(found.watch)

    def run(self) -> Outcome:
        """Train until every phase has spent its budget or somebody asks to stop."""
        if self.state.finished:
            self.runtime.publish({"event": "end", "reason": "already done", **self._place()})
            return Outcome("already done", self.state.progress.images_seen, self.keeper.newest_path)
        self.evaluations.open()
        timeout = self.config.cluster.step_timeout_seconds
        with (
            closing(Watchdog(timeout, self.runtime.rank, self.runtime.abandon)) as self.watchdog,
            closing(Writer(self.config, self.folder, self.runtime, self.resumed_at)) as self.writer,
            closing(self.keeper),
        ):
            self._announce_start()
            try:
                return self._run_phases()
            except VaeganError as error:
                with suppress(OSError):  # the storage may be what failed
                    self.writer.log({"event": "end", "reason": "failed", "message": str(error), **self._place()})
                raise

    def _run_phases(self) -> Outcome:
        if self._evaluate()[1]:  # one that was due when the run was stopped
            return self._end("stopped")
        for phase in self._phases():
            end = self._run_phase(phase)
            if end is PhaseEnd.DIVERGED:
                self._roll_back()
            if end is PhaseEnd.STOPPED:
                return self._end("stopped")
        return self._end("done")

    def _phases(self) -> Iterator[Phase]:
        """The phase under way and those after it, whichever state a rollback puts in place."""
        while not self.state.finished:
            yield next(self.state.remaining_phases())

    def _run_phase(self, phase: Phase) -> PhaseEnd:
        """Train the phase under way to its end, to a stop (a checkpoint stands then), or until its numbers break."""
        config, state, runtime = self.config, self.state, self.runtime
        step = Step(state, phase, runtime.rank, runtime.world_size)
        if not state.progress.phase_images:
            self.writer.log({"event": "phase", "trains": ",".join(step.trained), **self._place()})
        meter = Meter.begin(step, self.interval)
        self.observer.begin(step)
        self.interval = None
        batches = train_batches(
            self.dataset,
            seed=config.run.seed,
            streams=config.streams,
            batch_size=config.training.batch_size,
            block_shards=config.data.block_shards,
            position=state.progress.position,
            rank=runtime.rank,
            world_size=runtime.world_size,
            loader_workers=config.data.loader_workers,
            prefetch=config.data.prefetch,
            pin_memory=runtime.device.type == "cuda",
            remainder=config.data.remainder,
        )
        stopping = False
        with closing(batches):
            self._await_shards()
            while not state.phase_done:
                self._doing("reading data")
                waiting = time.perf_counter()
                epoch = state.progress.position.epoch
                position, batch = next(batches)
                meter.waited += time.perf_counter() - waiting
                self._doing("training")
                self.bad_samples.consume(batch.ids)
                step(self.augment(batch, epoch))
                self.observer.after_step(step, meter, waiting)
                state.advance(config.training.batch_size, position)
                meter.images += config.training.batch_size
                log = self._due(config.reporting.log_images) or state.phase_done
                stopping = self._meet() if self.agreement.due() else False
                save = self._due(config.checkpoint.images) or state.phase_done or stopping
                if (log or save) and worst_skips(step) > config.training.max_skipped_steps:
                    return PhaseEnd.DIVERGED
                if log:
                    self._log(step, meter)
                if self._due(config.reporting.sample_images) or state.phase_done:
                    self._doing("drawing pictures")
                    self.writer.pictures(state, self.originals)
                best, stopped = self._evaluate()
                stopping = stopping or stopped
                if save or best or stopped:
                    self._checkpoint(meter)
                if stopping:
                    break
        return PhaseEnd.STOPPED if stopping and not state.finished else PhaseEnd.DONE

    def _await_shards(self) -> None:
        """Have what the first batches need on every node, with a sign of life: it may take longer than a step may."""
        while self.dataset.remote and self.agreement.any(self.dataset.fetching(FETCH_SECONDS)):
            self._doing("fetching shards")

    def _due(self, interval: int) -> bool:
        """Whether the last step passed a multiple of `interval` images."""
        seen, batch = self.state.progress.images_seen, self.config.training.batch_size
        return seen // interval > (seen - batch) // interval

    def _doing(self, what: str) -> None:
        self.watchdog.beat(what, self.state.progress.images_seen)

    def _log(self, step: Step, meter: Meter) -> None:
        self._doing("logging")
        means: Record = {**meter.take(), **self.observer.measurements(self.state.progress.images_seen)}
        self.state.progress.skipped_steps += round(float(means["skipped_steps"] or 0))
        self.writer.log({"event": "train", **self._place(), **means, **step.rates()})
        self.bad_samples.agree(partial(from_all_ranks, self.runtime))
        for message in [*self.bad_samples.news(), *self.watch.look(step.phase.name, means)]:
            self._warn(message)
        self.bad_samples.check()

    def _evaluate(self) -> tuple[bool, bool]:
        """Evaluate if it is due; whether these weights are the best so far, and whether somebody asked to stop."""
        if not self.evaluations.due(self.state):
            return False, False
        try:
            found = self.evaluations.run(self.state, self._doing)
        except EvaluationStoppedError:
            if self.state.finished:
                self._warn("the last evaluation was left out to stop at once; run `vaegan-dist evaluate` for it")
            return False, True
        self.writer.log({"event": "evaluation", **self._place(), **found})
        numbers = {key: value for key, value in found.items() if not isinstance(value, str)}
        return self.keeper.note_metric(self.state.progress.images_seen, numbers), False

    def _meet(self) -> bool:
        """Whether to stop; and every rank learns whether the checkpoint under way stands."""
        stopping, verdict = self.agreement.meet(self.keeper.verdict())
        self._settle(verdict)
        return stopping

    def _settle(self, verdict: int) -> None:
        for message in self.keeper.warnings():
            self._warn(message)
        standing = self.keeper.settle(verdict)
        if standing is not None:
            self.writer.log(standing)

    def _await_checkpoint(self) -> None:
        """Wait for the checkpoint under way, on every rank, with a sign of life."""
        while self.keeper.writing:
            self._doing("waiting for a checkpoint")
            self.keeper.wait_a_little()
            self._settle(self.agreement.share(self.keeper.verdict()))

    def _checkpoint(self, meter: Meter) -> None:
        """Copy the state; rank 0 writes the copy while training goes on."""
        started = time.perf_counter()
        self._await_checkpoint()
        self._doing("copying for a checkpoint")
        self.state.progress.seconds = started - self.clock
        interval, watch = meter.interval(), self.watch.to_json()
        self.bad_samples.agree(partial(from_all_ranks, self.runtime))
        data = {**self.identity, "bad_samples": self.bad_samples.to_json()}
        row = {"event": "checkpoint", **self._place()}
        self.keeper.begin(self.state, row, data=data, interval=interval, watch=watch)
        row["checkpoint_seconds"] = time.perf_counter() - started

    def _roll_back(self) -> None:
        """Continue from the newest whole checkpoint with other noise, as long as the budget of rollbacks lasts."""
        self._await_checkpoint()
        failed, rollbacks, limit = self._place(), self.state.progress.rollbacks + 1, self.config.training.max_rollbacks
        what = (
            f"phase {failed['phase']}: more than {self.config.training.max_skipped_steps} steps in a row had a "
            f"gradient that is not finite, before {failed['images_seen']} images"
        )
        if rollbacks > limit:
            raise VaeganError(
                f"{what}, after {limit} rollbacks; continue from the last checkpoint with a larger "
                f"training.max_rollbacks and training.rollback_rate_factor=0.5, or start a new run with a lower "
                f"optimizer.learning_rate or with optimizer.max_grad_norm"
            )
        found, complaints = self.keeper.newest()
        restarts = self.state.progress.restarts
        self._load(found)
        progress = self.state.progress
        progress.rollbacks, progress.restarts = rollbacks, restarts
        self.writer.rewind(progress.images_seen)
        for complaint in complaints:
            self._warn(complaint)
        message = f"{what}: back to {progress.images_seen} images with other noise, rollback {rollbacks} of {limit}"
        self.writer.log({"event": "rollback", "name": str(rollbacks), "message": message, **self._place()})

    def _warn(self, message: str) -> None:
        self.writer.log({"event": "warning", "message": message, **self._place()})

    def _place(self) -> Record:
        """Where the run stands, as every record says it."""
        state, config = self.state, self.config
        return {
            "phase": state.phase.name,
            "images_seen": state.progress.images_seen,
            "total_images": config.total_images,
            "phase_images_seen": state.progress.phase_images,
            "phase_images": config.phase_images(state.phase),
            "epoch": state.progress.position.epoch,
            "seconds": time.perf_counter() - self.clock,
        }

    def _announce_start(self) -> None:
        for complaint in self.complaints:
            self._warn(complaint)
        if self.keeper.newest_path is not None:
            # Said again because the process before may have died between the checkpoint and its row.
            self.writer.log({"event": "checkpoint", "path": str(self.keeper.newest_path), **self._place()})
            self.writer.log({"event": "resume", "restarts": self.state.progress.restarts, **self._place()})

    def _end(self, reason: str) -> Outcome:
        self._await_checkpoint()
        self._doing("ending")
        for message in self.bad_samples.summary() if reason == "done" else []:
            self._warn(message)
        self.observer.close()
        self.writer.log({"event": "end", "reason": reason, **self._place()})
        self.writer.draw_curves()
        return Outcome(reason, self.state.progress.images_seen, self.keeper.newest_path)


def train(config: Config, runtime: Runtime, dtype: torch.dtype = torch.float32) -> Outcome:
    """Train on this rank; every rank of the run calls it with the same configuration.

    Raises:
        VaeganError: with one line that says what failed and what to do.
    """
    with RunLock(run_folder(config)) as lock:
        try:
            return Training(config, runtime, lock, dtype).run()
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            raise advice(config, runtime.world_size, runtime.device) from error
        except OSError as error:
            trouble = storage_trouble(error, run_folder(config))
            if not trouble:
                raise
            raise VaeganError(f"{error.filename or run_folder(config)}: {trouble}") from error
