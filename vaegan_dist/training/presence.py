"""Before a run touches its folder: one process at a time may train it, and every rank must see it."""

import errno
import fcntl
import json
import os
import secrets
import socket
import time
from pathlib import Path
from types import TracebackType
from typing import IO, Self

import torch.distributed as dist

from vaegan_dist.errors import ConfigError
from vaegan_dist.files import write_whole
from vaegan_dist.training.meter import from_rank_0
from vaegan_dist.training.resume import LOCK
from vaegan_dist.training.runtime import Runtime

NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS)
LOCK_PATIENCE_SECONDS = 15.0
SIGHT_PATIENCE_SECONDS = 10.0


class RunLock:
    """Held by rank 0 while it trains. The kernel lets go of it when the process ends, however it ends.

    A record lock of POSIX: reader processes do not inherit it, and network file systems pass it on.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / LOCK
        self._file: IO[str] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def acquire(self) -> str:
        """Take the lock; empty, or why it cannot be had. Waits a little for a process that is just ending.

        Raises:
            OSError: the folder cannot be written.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        file = self.path.open("a+")
        deadline = time.monotonic() + LOCK_PATIENCE_SECONDS
        while True:
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno in NO_LOCKS:
                    break  # a file system without locks: the run goes on without this protection
                if error.errno not in (errno.EACCES, errno.EAGAIN):
                    raise
                if time.monotonic() > deadline:
                    return self._who(file)
                time.sleep(0.1)
            else:
                break
        file.truncate(0)
        file.write(json.dumps({"host": socket.gethostname(), "process": os.getpid()}))
        file.flush()
        self._file = file
        return ""

    def _who(self, file: IO[str]) -> str:
        file.seek(0)
        try:
            owner = json.loads(file.read())
            who = f"process {owner['process']} on {owner['host']}"
        except (ValueError, KeyError, TypeError):
            who = "another process"
        file.close()
        return f"{who} trains this run already; wait until it has ended, stop it, or choose another run.name"


def take_folder(folder: Path, lock: RunLock, runtime: Runtime, shared: bool = True) -> None:
    """Lock the run's folder and make sure that every rank sees what rank 0 writes there, if it is `shared`.

    Raises:
        ConfigError: on every rank alike; names the key, the rank and its host.
    """
    token, problem = secrets.token_hex(8), ""
    probe = folder / f".probe-{token}"
    if runtime.rank == 0:
        try:
            held = lock.acquire()
            problem = f"run.name={folder.name}: {held}" if held else ""
            if not problem and shared and runtime.world_size > 1:
                write_whole(probe, token.encode())
        except OSError as error:
            problem = (
                f"run.storage={folder.parent}: rank 0 on {socket.gethostname()} cannot write in {folder} "
                f"({error.strerror}); make it writable, or choose another folder"
            )
    host, probe, problem = from_rank_0(runtime, (socket.gethostname(), probe, problem))
    if problem:
        raise ConfigError(problem)
    if shared and runtime.world_size > 1:
        _compare_sights(probe, host, runtime)


def _compare_sights(probe: Path, host: str, runtime: Runtime) -> None:
    mine = _sees(probe)
    blind: list[str | None] = [None] * runtime.world_size
    dist.all_gather_object(blind, None if mine else socket.gethostname())
    if runtime.rank == 0:
        probe.unlink(missing_ok=True)
    for rank, where in enumerate(blind):
        if where is not None:
            raise ConfigError(
                f"run.storage={probe.parent.parent}: rank {rank} on {where} does not see what rank 0 on {host} wrote "
                f"in {probe.parent}; choose a folder that all nodes share"
            )


def _sees(probe: Path) -> bool:
    """Whether rank 0's file is here, with a little patience for a network file system's memory."""
    deadline = time.monotonic() + SIGHT_PATIENCE_SECONDS
    while True:
        try:
            return probe.read_text() == probe.name.removeprefix(".probe-")
        except OSError:
            if time.monotonic() > deadline:
                return False
            time.sleep(0.1)
