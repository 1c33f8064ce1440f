"""What the training loop may ask of its surroundings, whether Ray, torchrun or one process provides them."""

import os
import sys
from pathlib import Path
from typing import Protocol

import torch

from vaegan_dist.reporting.records import Record
from vaegan_dist.reporting.snapshot import RankSnapshot


class Runtime(Protocol):
    """The surroundings of one rank."""

    rank: int
    world_size: int
    device: torch.device

    def publish(self, record: Record) -> None:
        """Hand a record to whoever watches the run. Called on rank 0 only; never blocks, never fails the run."""

    def observe(self, snapshot: RankSnapshot) -> None:
        """Hand this rank's own measurements to whoever watches. Never blocks, never fails the run."""

    def checkpointed(self, metrics: dict[str, float], checkpoint: Path) -> None:
        """Tell that a whole checkpoint stands. Every rank calls it, equally often."""

    def stop_requested(self) -> bool:
        """Whether somebody asked this rank to stop; the ranks agree on it by a collective of the loop."""

    def abandon(self, message: str) -> None:
        """Tell why, and end this process at once: its training thread hangs. Called from another thread."""


class SingleProcess:
    """The smallest runtime: one rank, on one device, watched by nobody."""

    def __init__(self, device: torch.device | None = None) -> None:
        self.rank, self.world_size = 0, 1
        self.device = device or torch.device("cpu")
        self.records: list[Record] = []
        self.stop = False

    def publish(self, record: Record) -> None:
        """Keep the record, for whoever owns this runtime."""
        self.records.append(record)

    def observe(self, snapshot: RankSnapshot) -> None:
        """Nobody watches."""

    def checkpointed(self, metrics: dict[str, float], checkpoint: Path) -> None:
        """Nobody to tell."""

    def stop_requested(self) -> bool:
        """Whether `stop` was set."""
        return self.stop

    def abandon(self, message: str) -> None:
        """Say it on standard error, and end."""
        print(f"error: {message}", file=sys.stderr, flush=True)
        os._exit(1)
