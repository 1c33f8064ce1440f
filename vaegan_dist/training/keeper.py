"""Checkpoints as the loop sees them: taken at a step, standing some steps later, on every rank alike."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from vaegan_dist.config import Config
from vaegan_dist.errors import VaeganError
from vaegan_dist.reporting.records import Record
from vaegan_dist.training.best import Best, better
from vaegan_dist.training.checkpoint import Checkpoint, folder_name, newest_whole, restore
from vaegan_dist.training.commit import clean
from vaegan_dist.training.meter import from_rank_0
from vaegan_dist.training.mirror import Mirror
from vaegan_dist.training.remote import remote_run
from vaegan_dist.training.runtime import Runtime
from vaegan_dist.training.saver import Saver, Verdict
from vaegan_dist.training.snapshot import Interval, Snapshots
from vaegan_dist.training.state import TrainState

WAIT_SECONDS = 0.5


class Keeper:
    """One rank's share in checkpoints. Rank 0 writes and decides; every call happens on all ranks at the same step."""

    def __init__(self, config: Config, folder: Path, runtime: Runtime) -> None:
        self.folder, self.runtime = folder, runtime
        self.settings = config.checkpoint
        self.newest_path: Path | None = None
        self.best: Best | None = None
        self.remote = remote_run(config)
        self.mirror: Mirror | None = None
        self.saver = Saver(folder, config.checkpoint, self.remote)
        self.snapshots = Snapshots()
        self._row: Record | None = None

    @property
    def writing(self) -> bool:
        """Whether a checkpoint is under way whose end the ranks have not agreed on yet."""
        return self._row is not None

    def newest(self) -> tuple[Checkpoint | None, list[str]]:
        """The newest whole checkpoint, and one line for each newer one, which is set aside.

        Storage may show one rank what it does not show another yet, so rank 0's finding counts.

        Raises:
            VaeganError: on every rank, when the folder cannot be put in order.
        """
        found, lines, problem = self._look() if self.runtime.rank == 0 else (None, [], None)
        found, lines, problem = from_rank_0(self.runtime, (found, lines, problem))
        if problem is not None:
            raise problem
        if found is not None and self.remote is not None and self.runtime.rank:
            found = replace(found, path=self.remote.fetch(found.path.name))
        self.newest_path = found.path if found else None
        self.best = found.best if found else None
        return found, lines

    def _look(self) -> tuple[Checkpoint | None, list[str], VaeganError | None]:
        """Put the folder in order and find the newest whole checkpoint."""
        lines: list[str] = []
        try:
            if self.remote is not None and self.mirror is None:
                self.remote.take_over()
                lines = self.remote.pull()
                self.mirror = Mirror(self.remote)
            found, broken = newest_whole(self.folder)
            clean(self.folder, list(broken))
        except OSError as error:
            problem = f"{self.folder}: what an earlier start left cannot be put in order: {error}; make it writable"
            return None, [], VaeganError(problem)
        except VaeganError as error:
            return None, [], error
        return found, [*lines, *broken.values()], None

    def restore(self, state: TrainState, found: Checkpoint) -> None:
        """Put a checkpoint into a fresh state."""
        restore(state, found)

    def note_metric(self, images_seen: int, metrics: dict[str, float | None]) -> bool:
        """Hear of an evaluation of the weights as they are now, on every rank with the same values.

        Returns:
            Whether it is the best so far: the loop then takes a checkpoint at this very step.

        Raises:
            ConfigError: the evaluation lacks `checkpoint.best_metric`.
        """
        found = better(self.best, self.settings, images_seen, metrics)
        self.best = found or self.best
        return found is not None

    def begin(
        self, state: TrainState, row: Record, *, data: dict[str, Any], interval: Interval, watch: dict[str, Any]
    ) -> None:
        """Copy the state and start writing it.

        Args:
            row: the record that is due once the checkpoint stands; its path is filled in.
        """
        assert not self.writing
        row["path"] = str(self.folder / folder_name(state.progress.images_seen))
        self._row = row
        if self.runtime.rank == 0:
            best = self.best.to_json() if self.best else None
            self.saver.begin(self.snapshots.take(state, data=data, interval=interval, watch=watch, best=best))

    def verdict(self) -> Verdict:
        """How the write stands as far as this rank knows."""
        return self.saver.verdict() if self.writing else Verdict.PENDING

    def settle(self, verdict: int) -> Record | None:
        """Take note of what rank 0 said; the record of a checkpoint that now stands.

        Raises:
            SupersededError: on every rank, when another process has taken the run over.
            VaeganError: on every rank, when the checkpoint could not be written.
        """
        if self._row is None or verdict == Verdict.PENDING:
            return None
        row, self._row = self._row, None
        if verdict == Verdict.FAILED:
            before = f"from {self.newest_path}" if self.newest_path else "from the start, since no checkpoint stands"
            kind, line = from_rank_0(self.runtime, (self.saver.kind, self.saver.error))
            raise kind(f"{line}; the same command then continues {before}")
        self.newest_path = Path(str(row["path"]))
        if self.runtime.rank == 0:
            row["checkpoint_bytes"] = sum(path.stat().st_size for path in self.newest_path.glob("*"))
        self.runtime.checkpointed({"images_seen": float(row["images_seen"] or 0)}, self.newest_path)
        return row

    def warnings(self) -> list[str]:
        """One line for each attempt to write that failed since the last call."""
        return [*self.saver.warnings(), *(self.mirror.warnings() if self.mirror else [])]

    def wait_a_little(self) -> None:
        """Let the write go on; at most half a second."""
        if self.runtime.rank == 0:
            self.saver.wait(WAIT_SECONDS)

    def close(self) -> None:
        """Let a write under way end, whatever ends the run, and upload what is left."""
        self.saver.close()
        trouble = self.mirror.close() if self.mirror else ""
        if trouble:
            self.runtime.publish({"event": "warning", "message": trouble})
