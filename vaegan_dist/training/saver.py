"""Checkpoints written off the training thread, one at a time, with a few attempts each."""

import threading
import time
from collections import deque
from enum import IntEnum
from pathlib import Path
from typing import Any

from vaegan_dist.config import CheckpointSection
from vaegan_dist.errors import VaeganError
from vaegan_dist.training.best import point_to
from vaegan_dist.training.checkpoint import folder_name
from vaegan_dist.training.commit import prune, write_checkpoint
from vaegan_dist.training.remote import RemoteRun, SupersededError
from vaegan_dist.training.snapshot import Snapshot
from vaegan_dist.training.storage import storage_trouble


class Verdict(IntEnum):
    """How the write under way stands; travels through an all-reduce in which every other rank says 0."""

    PENDING = 0
    STANDS = 1
    FAILED = 2


class Saver:
    """The thread of rank 0 that writes checkpoints and removes old ones.

    A write that fails is tried again from the same snapshot, `checkpoint.write_attempts` times in all, while training
    goes on: each failure is a warning, the last one is the run's end.
    """

    def __init__(self, folder: Path, settings: CheckpointSection, remote: RemoteRun | None = None) -> None:
        self.folder, self.settings, self.remote = folder, settings, remote
        self.error = ""
        self.kind: type[VaeganError] = VaeganError
        """of the error that ends the run: callers tell a run that was taken over from one that failed"""
        self._warnings: deque[str] = deque()
        self._verdict = Verdict.PENDING
        self._begun = 0.0
        self._thread: threading.Thread | None = None
        self._hurry = threading.Event()

    def begin(self, snapshot: Snapshot) -> None:
        """Start writing. The write before must have been waited for: the snapshot may share its memory."""
        assert self._thread is None or not self._thread.is_alive()
        self._verdict = Verdict.PENDING
        self._begun = time.monotonic()
        # A daemon, so that a storage that hangs cannot keep the process; `close` waits for a healthy one.
        self._thread = threading.Thread(target=self._run, args=(snapshot,), name="checkpoint-writer", daemon=True)
        self._thread.start()

    def verdict(self) -> Verdict:
        """How the write stands, without waiting; a storage that does not answer for too long has failed."""
        if self._verdict is Verdict.PENDING and time.monotonic() - self._begun > self.settings.write_timeout_seconds:
            self.error = (
                f"the checkpoint below {self.folder} has been under way for {self.settings.write_timeout_seconds} s "
                f"(checkpoint.write_timeout_seconds); look whether the storage answers"
            )
            self._verdict = Verdict.FAILED
        return self._verdict

    def wait(self, seconds: float) -> None:
        """Wait for the end of the write, at most so long."""
        if self._thread is not None:
            self._thread.join(seconds)

    def warnings(self) -> list[str]:
        """One line for each attempt that failed since the last call."""
        lines = []
        while self._warnings:
            lines.append(self._warnings.popleft())
        return lines

    def close(self) -> None:
        """Let the write under way end, but begin no further attempt, and do not wait for a storage that hangs."""
        self._hurry.set()
        if self._verdict is Verdict.PENDING:
            self.wait(self.settings.write_timeout_seconds)

    def _run(self, snapshot: Snapshot) -> None:
        for attempt in range(1, self.settings.write_attempts + 1):
            try:
                written = write_checkpoint(snapshot, self.folder)
                self._tidy(snapshot)
                if self.remote is not None:
                    self.remote.push(written)
            except SupersededError as error:
                self.error, self.kind = str(error), SupersededError
                self._verdict = Verdict.FAILED
                return
            except Exception as error:
                # Whatever it is, it must reach the training thread: a run without checkpoints is no run.
                line = f"{self._explain(error)} (attempt {attempt} of {self.settings.write_attempts})"
                pause = attempt * self.settings.retry_seconds
                if attempt == self.settings.write_attempts or self._hurry.wait(pause):
                    self.error = line
                    self._verdict = Verdict.FAILED
                    return
                self._warnings.append(f"{line}; trying again in {pause:g} s")
            else:
                self._verdict = Verdict.STANDS
                return

    def _tidy(self, snapshot: Snapshot) -> None:
        """With the new checkpoint in place: name the best one, and remove what is not kept."""
        best: dict[str, Any] | None = snapshot.summary["best"]
        name = folder_name(best["images_seen"]) if best else ""
        point_to(self.folder, best, name)
        kept = self.folder / name if best else None
        prune(self.folder, self.settings.keep_last, self.settings.keep_every_images, kept)

    def _explain(self, error: Exception) -> str:
        cause = storage_trouble(error, self.folder) or " ".join(f"{type(error).__name__}: {error}".split())[:200]
        place = self.remote.url if self.remote else self.folder
        return f"no checkpoint could be written below {place}: {cause}"
