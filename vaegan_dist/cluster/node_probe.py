"""What a node is asked before a run: what it has, how fast its storage is, and how fast it reaches the next node.

Runs on the nodes; `check_cluster.py` calls it and compares the answers.
"""

import os
import platform
import secrets
import shutil
import socket
import subprocess
import sysconfig
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import torch
import torch.distributed as dist

from vaegan_dist.cluster.processes import join_group

MIB = 2**20
REPEATS = 5


@dataclass(frozen=True)
class NodeFacts:
    """What a node has.

    Attributes:
        memory, shm: bytes.
        missing: what Triton needs to compile kernels for a GPU, and does not find.
        packages: each installed distribution and its version.
    """

    host: str
    address: str
    cpus: int
    memory: int
    shm: int
    gpus: tuple[str, ...]
    driver: str
    missing: tuple[str, ...]
    packages: dict[str, str]


@dataclass(frozen=True)
class StorageRate:
    """Bytes per second of a sequential write that ends in fsync, and of reading it back past the page cache."""

    write: float
    read: float


@dataclass(frozen=True)
class LinkRate:
    """Bytes per second: of the all-reduce (bus bandwidth, 2 (N - 1) / N * size / time) and to the next node."""

    all_reduce: float
    next_node: float


def node_facts(address: str) -> NodeFacts:
    """Ask this node."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    gpus = tuple(torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count()))
    return NodeFacts(
        host=socket.gethostname(),
        address=address,
        cpus=len(os.sched_getaffinity(0)),
        memory=_memory_limit() or memory,
        shm=shutil.disk_usage("/dev/shm").total if Path("/dev/shm").is_dir() else 0,
        gpus=gpus,
        driver=_driver() if gpus else "",
        missing=_missing_for_kernels(),
        packages=_packages(),
    )


def _memory_limit() -> int | None:
    """The container's limit, where it has one."""
    with suppress(OSError, ValueError):  # "max", or no cgroup v2
        return int(Path("/sys/fs/cgroup/memory.max").read_text())
    return None


def _driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return done.stdout.split("\n", 1)[0].strip()


def _missing_for_kernels() -> tuple[str, ...]:
    missing = []
    if not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
        missing.append("a C compiler (gcc or clang)")
    if not Path(sysconfig.get_path("include"), "Python.h").is_file():
        missing.append("Python's headers (Python.h)")
    return tuple(missing)


def _packages() -> dict[str, str]:
    found = {"python": platform.python_version(), "cuda": str(torch.version.cuda)}
    for distribution in metadata.distributions():
        name = (distribution.metadata["Name"] or "").lower().replace("_", "-")
        # The first on the path is the one that is imported.
        found.setdefault(name, distribution.version)
    return found


def storage_rate(folder: Path, size: int) -> StorageRate:
    """Write and read `size` bytes in the folder, which is made when missing; the file is removed.

    Raises:
        OSError: the folder cannot be written or read.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f".check-{socket.gethostname()}-{secrets.token_hex(4)}"
    block = secrets.token_bytes(MIB)
    blocks = max(size // MIB, 1)
    try:
        started = time.perf_counter()
        with path.open("wb", buffering=0) as file:
            for _ in range(blocks):
                file.write(block)
            os.fsync(file.fileno())
        written = time.perf_counter() - started
        with path.open("rb", buffering=0) as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            started = time.perf_counter()
            while file.read(MIB):
                pass
            read = time.perf_counter() - started
    finally:
        path.unlink(missing_ok=True)
    return StorageRate(blocks * MIB / written, blocks * MIB / read)


def leave_mark(folder: Path, name: str) -> None:
    """Write a small file that the other nodes look for."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / name).open("x") as file:
        os.fsync(file.fileno())


def link_rate(rank: int, world_size: int, master: str, port: int, size: int, seconds: float) -> LinkRate:
    """Join the other nodes and measure; NCCL where this node has a GPU, else Gloo.

    Args:
        size: bytes of the tensor.
        seconds: time that the nodes wait for each other.
    """
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    where = f"tcp://{f'[{master}]' if ':' in master else master}:{port}"
    join_group(device, where, rank, world_size, seconds)
    try:
        data = torch.ones(size // 4, device=device)
        reduce_seconds = _fastest(lambda: dist.all_reduce(data), device)
        next_seconds = 0.0
        for sender in range(world_size):
            took = _fastest(lambda sender=sender: _pass_on(data, rank, sender, world_size), device)  # type: ignore[misc]
            if sender == rank:
                next_seconds = took
    finally:
        dist.destroy_process_group()
    return LinkRate(2 * (world_size - 1) / world_size * size / reduce_seconds, size / next_seconds)


def _pass_on(data: torch.Tensor, rank: int, sender: int, world_size: int) -> None:
    """One node sends to the next, and the rest wait."""
    receiver = (sender + 1) % world_size
    if rank == sender:
        dist.send(data, receiver)
    elif rank == receiver:
        dist.recv(data, sender)


def _fastest(work: Callable[[], object], device: torch.device) -> float:
    """Seconds of the fastest of some repetitions, after one that does not count."""
    taken = []
    for _ in range(REPEATS + 1):
        dist.barrier()
        started = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        taken.append(time.perf_counter() - started)
    return min(taken[1:])
