"""The training loop: restore → each phase → each batch → step → log → pictures → checkpoint → stop?

It runs unchanged under Ray, torchrun and in one process; a `Runtime` stands for the surroundings.
"""

import time
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from vaegan_dist.config import Config, Phase
from vaegan_dist.data.dataset import ShardDataset, open_dataset
from vaegan_dist.data.loader import train_batches
from vaegan_dist.models import ImageShape
from vaegan_dist.reporting.records import Record
from vaegan_dist.training.checkpoint import Checkpoint, newest_whole, prune, restore, save_checkpoint
from vaegan_dist.training.meter import Agreement, Meter, check_health
from vaegan_dist.training.resume import refuse_changes, run_folder
from vaegan_dist.training.runtime import Runtime
from vaegan_dist.training.state import TrainState, create_state
from vaegan_dist.training.step import Step
from vaegan_dist.training.writer import COMPARED, Writer


@dataclass(frozen=True)
class Outcome:
    """How a call of `train` ended."""

    reason: str  # "done", "stopped" (a checkpoint stands) or "already done"
    images_seen: int
    checkpoint: Path | None


class Training:
    """One rank's run from restore to end."""

    def __init__(self, config: Config, runtime: Runtime, dtype: torch.dtype = torch.float32) -> None:
        self.config, self.runtime = config, runtime
        self.folder = run_folder(config)
        self.dataset: ShardDataset = open_dataset(
            config.data.path, in_memory=config.data.in_memory, max_bad_samples=config.data.max_bad_samples
        )
        manifest = self.dataset.manifest
        image = ImageShape(channels=manifest.channels, height=manifest.height, width=manifest.width)
        self.identity: dict[str, Any] = {"samples": list(self.dataset.shard_samples), "streams": config.streams}
        self.state: TrainState = create_state(config, image, runtime.device, dtype)
        self.last_checkpoint: Path | None = None
        self.resumed_at = self._restore()
        self.agreement = Agreement(runtime)
        self.originals = self.dataset.read(range(min(COMPARED, len(self.dataset)))).images
        self.clock = time.perf_counter() - self.state.progress.seconds

    def _restore(self) -> int | None:
        """Continue from the newest whole checkpoint, the same one on every rank; images seen, or None for a start."""
        found, complaints = newest_whole(self.folder)
        self.complaints = complaints
        if self.runtime.world_size > 1:
            # Storage may show one rank what it does not show another yet: rank 0's finding counts.
            chosen: list[Checkpoint | None] = [found]
            dist.broadcast_object_list(chosen, src=0)
            found = chosen[0]
        if found is None:
            return None
        refuse_changes(self.config, found)
        restore(self.state, found)
        self.state.progress.restarts += 1
        self.last_checkpoint = found.path
        return found.progress.images_seen

    def run(self) -> Outcome:
        """Train until every phase has spent its budget or somebody asks to stop."""
        if self.state.finished:
            self.runtime.publish({"event": "end", "reason": "already done", **self._place()})
            return Outcome("already done", self.state.progress.images_seen, self.last_checkpoint)
        self.writer = Writer(self.config, self.folder, self.runtime, self.resumed_at)
        self._announce_start()
        try:
            for phase in self.state.remaining_phases():
                if not self._run_phase(phase):
                    return self._end("stopped")
            return self._end("done")
        finally:
            self.writer.close()

    def _run_phase(self, phase: Phase) -> bool:
        """Train the phase under way to its end; False when asked to stop (a checkpoint stands then)."""
        config, state, runtime = self.config, self.state, self.runtime
        step = Step(state, phase, runtime.rank, runtime.world_size)
        if not state.progress.phase_images:
            self.writer.log({"event": "phase", "trains": ",".join(step.trained), **self._place()})
        meter = Meter.begin(step, runtime.world_size)
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
        )
        with closing(batches):
            while not state.phase_done:
                waiting = time.perf_counter()
                position, batch = next(batches)
                meter.waited += time.perf_counter() - waiting
                step(batch.images)
                state.advance(config.training.batch_size, position)
                meter.images += config.training.batch_size
                if self._due(config.reporting.log_images) or state.phase_done:
                    self._log(step, meter)
                if self._due(config.reporting.sample_images) or state.phase_done:
                    self.writer.pictures(state, self.originals)
                stopping = self.agreement.stop()
                if self._due(config.checkpoint.images) or state.phase_done or stopping:
                    self._checkpoint(step)
                if stopping and not state.phase_done:
                    return False
        return not stopping or state.finished

    def _due(self, interval: int) -> bool:
        """Whether the last step passed a multiple of `interval` images."""
        seen, batch = self.state.progress.images_seen, self.config.training.batch_size
        return seen // interval > (seen - batch) // interval

    def _log(self, step: Step, meter: Meter) -> None:
        check_health(step, self.config.training.max_skipped_steps)
        means = meter.take()
        self.writer.log({"event": "train", **self._place(), **means, **step.rates()})

    def _checkpoint(self, step: Step) -> None:
        """Rank 0 writes; the others go on only when it stands, so that all of them report the same one."""
        check_health(step, self.config.training.max_skipped_steps)
        started = time.perf_counter()
        progress = self.state.progress
        progress.seconds = started - self.clock
        path = self.folder / f"checkpoint-{progress.images_seen:012d}"
        if self.runtime.rank == 0:
            save_checkpoint(self.state, self.folder, data=self.identity, keep=self.state.phase_done)
            prune(self.folder, self.config.checkpoint.keep_last)
        if self.runtime.world_size > 1:
            dist.barrier()
        self.last_checkpoint = path
        taken = time.perf_counter() - started
        self.writer.log({"event": "checkpoint", "path": str(path), "checkpoint_seconds": taken, **self._place()})
        self.runtime.checkpointed({"images_seen": float(progress.images_seen)}, path)

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
            self.writer.log({"event": "warning", "message": complaint, **self._place()})
        if self.last_checkpoint is not None:
            self.writer.log({"event": "resume", "restarts": self.state.progress.restarts, **self._place()})

    def _end(self, reason: str) -> Outcome:
        self.writer.log({"event": "end", "reason": reason, **self._place()})
        self.writer.draw_curves()
        return Outcome(reason, self.state.progress.images_seen, self.last_checkpoint)


def train(config: Config, runtime: Runtime, dtype: torch.dtype = torch.float32) -> Outcome:
    """Train on this rank; every rank of the run calls it with the same configuration.

    Raises:
        VaeganError: with one line that says what failed and what to do.
    """
    return Training(config, runtime, dtype).run()
