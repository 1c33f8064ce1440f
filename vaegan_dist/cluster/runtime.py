"""The loop without Ray: in this process, under torchrun, or in processes of its own on this machine (gloo or NCCL)."""

import ctypes
import multiprocessing as mp
import os
import queue
import signal
import socket
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from multiprocessing.connection import wait
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any, TypeAlias

import torch
import torch.distributed as dist

from vaegan_dist.cluster.signals import stop_signals
from vaegan_dist.config import Config
from vaegan_dist.errors import ConfigError, VaeganError
from vaegan_dist.reporting.prometheus import Exporter
from vaegan_dist.reporting.records import Record
from vaegan_dist.reporting.snapshot import RankSnapshot
from vaegan_dist.training.loop import Outcome, train
from vaegan_dist.training.resume import run_folder

OnRecord = Callable[[Record], None]
Messages: TypeAlias = "mp.Queue[Record | RankSnapshot | Outcome | VaeganError]"


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
    if not torch.cuda.is_available():
        raise ConfigError(
            f"cluster.gpus_per_worker={config.cluster.gpus_per_worker}: torch {torch.__version__} sees no GPU on "
            f"{socket.gethostname()}; set it to 0 to train on the CPU"
        )
    device = torch.device("cuda", local_rank % torch.cuda.device_count())
    torch.cuda.set_device(device)
    return device


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
    _join_group(config, runtime.device, "env://", rank, world_size)
    try:
        with stop_signals(stop.set, quiet=rank != 0):
            return train(config, runtime)
    finally:
        dist.destroy_process_group()


def _join_group(config: Config, device: torch.device, where: str, rank: int, world_size: int) -> None:
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        init_method=where,
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=config.cluster.collective_timeout_seconds),
    )


def _train_processes(config: Config, listener: Listener) -> Outcome:
    """Start one process per rank, pass on what rank 0 publishes, and end all when one fails."""
    context = mp.get_context("spawn")
    messages: Messages = context.Queue()
    stop = context.Event()
    address = f"tcp://127.0.0.1:{_free_port()}"
    ranks = [
        context.Process(target=_rank_main, args=(config, rank, address, messages, stop), name=f"rank-{rank}")
        for rank in range(config.cluster.most_workers)
    ]
    for process in ranks:
        process.start()
    try:
        with stop_signals(stop.set):
            return _watch(ranks, _Mailbox(messages, listener))
    finally:
        for process in ranks:
            if process.is_alive():
                process.kill()
            process.join()


@dataclass
class _Mailbox:
    """What the ranks' processes say: records, rank 0's outcome, the first failure."""

    messages: Messages
    listener: Listener
    outcome: Outcome | None = None
    failure: VaeganError | None = None

    def empty(self) -> None:
        """Handle everything that has arrived."""
        while True:
            try:
                content = self.messages.get(timeout=0.05)
            except queue.Empty:
                return
            if isinstance(content, Outcome):
                self.outcome = content
            elif isinstance(content, VaeganError):
                self.failure = self.failure or content
            elif isinstance(content, RankSnapshot):
                self.listener.on_snapshot(content)
            else:
                self.listener.on_record(content)


def _watch(ranks: list[Any], mailbox: _Mailbox) -> Outcome:
    """Relay messages until every rank has ended; the first failure ends the wait."""
    while any(process.is_alive() for process in ranks):
        wait([process.sentinel for process in ranks if process.is_alive()], timeout=0.1)
        mailbox.empty()
        died = [process for process in ranks if process.exitcode not in (None, 0)]
        if died:
            mailbox.empty()
            # A rank that was killed is the cause; what the others say then is only that they lost it.
            killed = [process for process in ranks if (process.exitcode or 0) < 0]
            if mailbox.failure is not None and not killed:
                raise mailbox.failure
            first = (killed or died)[0]
            raise VaeganError(
                f"{first.name} {_how_it_ended(first.exitcode)}; run the same command again to continue from the "
                f"last checkpoint"
            )
    mailbox.empty()
    if mailbox.outcome is None:
        raise VaeganError("every rank ended, but rank 0 did not say how; see the log above")
    return mailbox.outcome


def _how_it_ended(code: int) -> str:
    if code >= 0:
        return f"on {socket.gethostname()} exited with code {code}"
    hint = " (the system does that when memory runs out)" if -code == signal.SIGKILL else ""
    return f"on {socket.gethostname()} was killed by {signal.Signals(-code).name}{hint}"


def _rank_main(config: Config, rank: int, address: str, messages: Messages, stop: Event) -> None:
    """Body of a rank's process."""
    _die_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides what a Ctrl-C means
    world_size = config.cluster.most_workers
    try:
        runtime = _prepare_rank(config, rank, world_size, rank, Listener(messages.put, messages.put), stop)
        runtime.leave = partial(_tell_and_leave, messages)
        _join_group(config, runtime.device, address, rank, world_size)
        outcome = train(config, runtime)
        if rank == 0:
            messages.put(outcome)
        dist.destroy_process_group()
    except VaeganError as error:
        _tell_and_leave(messages, type(error)(f"rank {rank} on {socket.gethostname()}: {error}"))
    except Exception as error:
        traceback.print_exc()
        cause = f"{type(error).__name__}: {error}"
        _tell_and_leave(messages, VaeganError(f"rank {rank} on {socket.gethostname()}: {cause}"))


def _tell_and_leave(messages: Messages, failure: VaeganError) -> None:
    """End now: the other ranks may wait in a collective that this one will never join."""
    messages.put(failure)
    messages.close()
    messages.join_thread()
    sys.stderr.flush()
    os._exit(failure.exit_code)


def _die_with_parent() -> None:
    """Ask the kernel to end this process with its parent, so that a killed driver leaves no rank behind."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
