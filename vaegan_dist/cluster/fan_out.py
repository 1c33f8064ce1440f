"""One function on every rank, without Ray: in this process, or in processes of its own on this machine."""

import multiprocessing as mp
import os
import queue
import signal
import socket
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import wait
from typing import Any, TypeAlias

import torch
import torch.distributed as dist

from vaegan_dist.cluster.runtime import _die_with_parent, _free_port, _how_it_ended
from vaegan_dist.errors import ConfigError, VaeganError
from vaegan_dist.evaluation.ranks import Ranks

TIMEOUT_SECONDS = 1800  # of a collective: a rank may train a classifier while the others wait
Tell = Callable[[int], None]
Work: TypeAlias = Callable[[dict[str, Any], Ranks, Tell], dict[str, Any] | None]
"""(arguments, this rank, who to tell how many pictures are done) -> plain data; must be importable by its name"""


def fan_out_local(
    work: Work, arguments: dict[str, Any], *, workers: int, gpus: bool, tell: Tell
) -> dict[str, Any] | None:
    """Run `work` on `workers` ranks of this machine; what rank 0 returns.

    Args:
        gpus: each rank takes a GPU.
        tell: told on this side, for every rank.

    Raises:
        VaeganError: a rank failed; names it and why.
    """
    if workers == 1:
        return work(arguments, Ranks(0, 1, device_of(gpus, 0)), tell)
    context = mp.get_context("spawn")
    messages: Any = context.Queue()
    address = f"tcp://127.0.0.1:{_free_port()}"
    ranks = [
        context.Process(target=_rank_main, args=(work, arguments, rank, workers, gpus, address, messages))
        for rank in range(workers)
    ]
    for process in ranks:
        process.start()
    try:
        return _watch(ranks, messages, tell)
    finally:
        for process in ranks:
            if process.is_alive():
                process.kill()
            process.join()


def device_of(gpus: bool, local_rank: int) -> torch.device:
    """The GPU of a rank, or the CPU."""
    if not gpus:
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ConfigError(f"--gpus: torch {torch.__version__} sees no GPU on {socket.gethostname()}; leave it out")
    device = torch.device("cuda", local_rank % torch.cuda.device_count())
    torch.cuda.set_device(device)
    return device


def _watch(ranks: list[Any], messages: Any, tell: Tell) -> dict[str, Any] | None:
    """Pass on what ranks tell until all have ended; the first failure ends the wait."""
    result: dict[str, Any] | None = None
    failure: VaeganError | None = None

    def read() -> None:
        nonlocal result, failure
        while True:
            try:
                kind, content = messages.get(timeout=0.05)
            except queue.Empty:
                return
            if kind == "done":
                tell(content)
            elif kind == "result":
                result = content
            else:
                failure = failure or content

    while any(process.is_alive() for process in ranks):
        wait([process.sentinel for process in ranks if process.is_alive()], timeout=0.2)
        read()
        died = [process for process in ranks if process.exitcode not in (None, 0)]
        if died:
            read()
            # Ranks that lost another one only say that they did.
            killed = [process for process in ranks if (process.exitcode or 0) < 0]
            if failure is not None and not killed:
                raise failure
            first = (killed or died)[0]
            raise VaeganError(f"rank {ranks.index(first)} {_how_it_ended(first.exitcode)}; run the same command again")
    read()
    return result


def _rank_main(
    work: Work, arguments: dict[str, Any], rank: int, workers: int, gpus: bool, address: str, messages: Any
) -> None:
    """Body of a rank's process."""
    _die_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides what a Ctrl-C means
    torch.set_num_threads(max(1, torch.get_num_threads() // workers))
    try:
        device = device_of(gpus, rank)
        backend = "nccl" if gpus else "gloo"
        dist.init_process_group(
            backend, address, rank=rank, world_size=workers, timeout=timedelta(seconds=TIMEOUT_SECONDS)
        )
        result = work(arguments, Ranks(rank, workers, device), lambda count: messages.put(("done", count)))
        if rank == 0:
            messages.put(("result", result))
        dist.destroy_process_group()
    except VaeganError as error:
        _leave(messages, type(error)(f"rank {rank} on {socket.gethostname()}: {error}"))
    except Exception as error:
        traceback.print_exc()
        _leave(messages, VaeganError(f"rank {rank} on {socket.gethostname()}: {type(error).__name__}: {error}"))


def _leave(messages: Any, failure: VaeganError) -> None:
    """End now: the other ranks may wait in a collective that this one will never join."""
    messages.put(("failure", failure))
    messages.close()
    messages.join_thread()
    os._exit(failure.exit_code)
