"""One process for each rank on this machine: started together, listened to, and ended together when one fails."""

import ctypes
import multiprocessing as mp
import os
import queue
import signal
import socket
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import wait
from multiprocessing.synchronize import Event
from typing import Any

import torch
import torch.distributed as dist

from vaegan_dist.errors import ConfigError, VaeganError

Hear = Callable[[Any], None]
CONTEXT = mp.get_context("spawn")


@dataclass(frozen=True)
class _Result:
    """What rank 0 returned."""

    value: Any


@dataclass(frozen=True)
class Seat:
    """A rank's process as its body sees it."""

    rank: int
    world_size: int
    address: str
    messages: Any

    def say(self, content: object) -> None:
        """Tell the parent; nobody waits for it."""
        self.messages.put(content)

    def leave(self, failure: VaeganError) -> None:
        """End now: the other ranks may wait in a collective that this one will never join."""
        self.messages.put(failure)
        self.messages.close()
        self.messages.join_thread()
        sys.stderr.flush()
        os._exit(failure.exit_code)


def run_ranks(body: Callable[..., Any], arguments: tuple[Any, ...], workers: int, hear: Hear, remedy: str) -> Any:
    """Run `body(seat, *arguments)` in a process for each rank and return what rank 0 returned.

    Args:
        body: must be importable by its name; joins the group itself (`join_group`).
        hear: given what any rank says, on this side.
        remedy: what to do after a rank died without a word.

    Raises:
        VaeganError: a rank failed; names it and why. The others are ended.
    """
    messages = CONTEXT.Queue()
    address = f"tcp://127.0.0.1:{free_port()}"
    ranks = [
        CONTEXT.Process(target=_rank_main, args=(body, arguments, Seat(rank, workers, address, messages)))
        for rank in range(workers)
    ]
    for process in ranks:
        process.start()
    try:
        return _watch(ranks, _Mailbox(messages, hear), remedy)
    finally:
        for process in ranks:
            if process.is_alive():
                process.kill()
            process.join()


def new_event() -> Event:
    """A flag that the parent sets and the ranks' bodies see, as one of their arguments."""
    return CONTEXT.Event()


def join_group(device: torch.device, where: str, rank: int, world_size: int, seconds: float) -> None:
    """Join the ranks' process group: NCCL on GPUs, else Gloo; a collective may take so long."""
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        init_method=where,
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=seconds),
    )


def pick_gpu(local_rank: int, asked: str, remedy: str) -> torch.device:
    """The GPU of a rank of this machine.

    Raises:
        ConfigError: torch sees none, or fewer than ranks, which NCCL does not let share one; names who asked for it and
            what to do.
    """
    if not torch.cuda.is_available():
        raise ConfigError(f"{asked}: torch {torch.__version__} sees no GPU on {socket.gethostname()}; {remedy}")
    count = torch.cuda.device_count()
    # A launcher that shows each rank its own GPU and no other has set this variable.
    if local_rank >= count and not (count == 1 and "CUDA_VISIBLE_DEVICES" in os.environ):
        raise ConfigError(
            f"{asked}: {socket.gethostname()} has {count} GPU{'s' * (count > 1)}, and {local_rank + 1} ranks or more "
            f"want one each; start at most {count} there, or {remedy}"
        )
    device = torch.device("cuda", local_rank % count)
    torch.cuda.set_device(device)
    return device


def free_port(address: str = "127.0.0.1") -> int:
    """A port of this address that nobody listens on."""
    with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET) as probe:
        probe.bind((address, 0))
        return int(probe.getsockname()[1])


@dataclass
class _Mailbox:
    """What the ranks' processes say; keeps rank 0's result and the first failure."""

    messages: Any
    hear: Hear
    result: _Result | None = None
    failure: VaeganError | None = None

    def empty(self) -> None:
        """Handle everything that has arrived."""
        while True:
            try:
                content = self.messages.get(timeout=0.05)
            except queue.Empty:
                return
            if isinstance(content, _Result):
                self.result = content
            elif isinstance(content, VaeganError):
                self.failure = self.failure or content
            else:
                self.hear(content)


def _watch(ranks: list[Any], mailbox: _Mailbox, remedy: str) -> Any:
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
            raise VaeganError(f"rank {ranks.index(first)} {_how_it_ended(first.exitcode)}; {remedy}")
    mailbox.empty()
    if mailbox.result is None:
        raise VaeganError("every rank ended, but rank 0 did not say how; see the log above")
    return mailbox.result.value


def _how_it_ended(code: int) -> str:
    if code >= 0:
        return f"on {socket.gethostname()} exited with code {code}"
    hint = " (the system does that when memory runs out)" if -code == signal.SIGKILL else ""
    return f"on {socket.gethostname()} was killed by {signal.Signals(-code).name}{hint}"


def _rank_main(body: Callable[..., Any], arguments: tuple[Any, ...], seat: Seat) -> None:
    """Body of a rank's process."""
    _die_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides what a Ctrl-C means
    where = f"rank {seat.rank} on {socket.gethostname()}"
    try:
        result = body(seat, *arguments)
        if seat.rank == 0:
            seat.say(_Result(result))
        dist.destroy_process_group()
    except VaeganError as error:
        seat.leave(type(error)(f"{where}: {error}"))
    except Exception as error:
        traceback.print_exc()
        seat.leave(VaeganError(f"{where}: {type(error).__name__}: {error}"))


def _die_with_parent() -> None:
    """Ask the kernel to end this process with its parent, so that a killed driver leaves no rank behind."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
