"""The loop without Ray: in this process, under torchrun, or in processes of its own on this machine (gloo or NCCL)."""

import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.synchronize import Event
from pathlib import Path

import torch
import torch.distributed as dist

from vaegan_dist.cluster.processes import Seat, join_group, new_event, pick_gpu, run_ranks
from vaegan_dist.cluster.signals import stop_signals
from vaegan_dist.config import Config
from vaegan_dist.errors import ConfigError, VaeganError
from vaegan_dist.reporting.prometheus import Exporter
from vaegan_dist.reporting.records import Record
from vaegan_dist.reporting.snapshot import RankSnapshot
from vaegan_dist.training.loop import Outcome, train
from vaegan_dist.training.resume import run_folder

OnRecord = Callable[[Record], None]


def _ignore(snapshot: RankSnapshot) -> None:
    """Nobody watches."""


@dataclass(frozen=True)
class Listener:
    """Who hears what the ranks of this machine say."""

    on_record: OnRecord
    on_snapshot: Callable[[RankSnapshot], None] = _ignore


@dataclass
class LocalRuntime:
    """One rank on this machine."""

    rank: int
    world_size: int
    device: torch.device
    listener: Listener
    stop: threading.Event | Event
    leave: Callable[[VaeganError], None] | None = None

    def publish(self, record: Record) -> None:
        """Hand the record to the watcher."""
        self.listener.on_record(record)

    def observe(self, snapshot: RankSnapshot) -> None:
        """Hand the snapshot to the watcher."""
        self.listener.on_snapshot(snapshot)

    def checkpointed(self, metrics: dict[str, float], checkpoint: Path) -> None:
        """The history already tells it."""

    def stop_requested(self) -> bool:
        """Whether a signal came."""
        return self.stop.is_set()

    def abandon(self, message: str) -> None:
        """Tell the parent, or standard error, and end this process at once."""
        if self.leave is not None:
            self.leave(VaeganError(message))
        print(f"error: {message}", file=sys.stderr, flush=True)
        os._exit(1)


def train_local(config: Config, on_record: OnRecord) -> Outcome:
    """Train without Ray and return how it ended.

    Under torchrun this process is one rank of its group; else `cluster.workers` (the most of a range) decides between
    this process and that many processes on loopback.
    """
    if "WORLD_SIZE" in os.environ and "RANK" in os.environ:
        if int(os.environ["RANK"]):
            return _train_rank_of_torchrun(config, Listener(on_record))
        with _exported(config, on_record) as listener:
            return _train_rank_of_torchrun(config, listener)
    with _exported(config, on_record) as listener:
        if config.cluster.most_workers == 1:
            stop = threading.Event()
            with stop_signals(stop.set):
                return train(config, _prepare_rank(config, 0, 1, 0, listener, stop))
        return _train_processes(config, listener)


@contextmanager
def _exported(config: Config, on_record: OnRecord) -> Iterator["Listener"]:
    """A listener that also keeps the run's metrics, which are served meanwhile."""

    def warn(message: str) -> None:
        on_record({"event": "warning", "message": message})

    with Exporter(config, run_folder(config), warn) as exporter:

        def listen(record: Record) -> None:
            exporter.record(record)
            on_record(record)

        yield Listener(listen, exporter.observe)


def pick_device(config: Config, local_rank: int) -> torch.device:
    """The device of a rank: its GPU when `cluster.gpus_per_worker` asks for one, else the CPU."""
    if not config.cluster.gpus_per_worker:
        return torch.device("cpu")
    asked = f"cluster.gpus_per_worker={config.cluster.gpus_per_worker}"
    return pick_gpu(local_rank, asked, "set it to 0 to train on the CPU")


def _prepare_rank(
    config: Config, rank: int, world_size: int, local_rank: int, listener: Listener, stop: threading.Event | Event
) -> LocalRuntime:
    local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", world_size))
    threads = config.training.torch_threads or max(1, len(os.sched_getaffinity(0)) // local_ranks)
    torch.set_num_threads(threads)
    return LocalRuntime(rank, world_size, pick_device(config, local_rank), listener, stop)


def _train_rank_of_torchrun(config: Config, listener: Listener) -> Outcome:
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if world_size not in config.world_sizes:
        raise ConfigError(
            f"cluster.workers={config.cluster.workers}: torchrun started {world_size} processes; "
            f"set cluster.workers={world_size}"
        )
    stop = threading.Event()
    runtime = _prepare_rank(config, rank, world_size, int(os.environ["LOCAL_RANK"]), listener, stop)
    join_group(runtime.device, "env://", rank, world_size, config.cluster.collective_timeout_seconds)
    try:
        with stop_signals(stop.set, quiet=rank != 0):
            return train(config, runtime)
    finally:
        dist.destroy_process_group()


def _train_processes(config: Config, listener: Listener) -> Outcome:
    """Train in one process for each rank."""
    stop = new_event()

    def hear(content: Record | RankSnapshot) -> None:
        if isinstance(content, RankSnapshot):
            listener.on_snapshot(content)
        else:
            listener.on_record(content)

    with stop_signals(stop.set):
        outcome: Outcome = run_ranks(
            _train_rank,
            (config, stop),
            config.cluster.most_workers,
            hear,
            "run the same command again to continue from the last checkpoint",
        )
    return outcome


def _train_rank(seat: Seat, config: Config, stop: Event) -> Outcome:
    """Body of a rank's process."""
    runtime = _prepare_rank(config, seat.rank, seat.world_size, seat.rank, Listener(seat.say, seat.say), stop)
    runtime.leave = seat.leave
    seconds = config.cluster.collective_timeout_seconds
    join_group(runtime.device, seat.address, seat.rank, seat.world_size, seconds)
    return train(config, runtime)
