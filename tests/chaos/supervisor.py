"""Runs the command of two ranks again and again, and breaks it at random, until it ends by itself.

    python -m tests.chaos.supervisor FAULTS SEED IMAGES [ARGUMENT …]

IMAGES is the run's budget, the arguments are those of `vaegan-dist`. Each attempt forks the ranks from this process,
which has the libraries loaded already but runs no thread, and calls the command line in them as torchrun would. Prints
one JSON line per fault and one for the end.
"""

import contextlib
import json
import os
import random
import signal
import socket
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from vaegan_dist.cli import main
from vaegan_dist.cluster import runtime as preloaded  # noqa: F401  # loaded before the fork, with torch
from vaegan_dist.training.checkpoint import SEAL, checkpoints

WORLD_SIZE = 2
HANG_SECONDS = 240
# Images between checkpoints in the tests.
INTERVAL = 640
KINDS = (
    "kill rank 0",
    "kill rank 1",
    "kill both",
    "kill a data worker",
    "kill during a checkpoint",
    "kill at the start",
    "stop and go on",
    "terminate",
    "damage the newest checkpoint",
)


@dataclass
class Supervisor:
    """One run with its faults."""

    faults: int
    random: random.Random
    images: int
    arguments: list[str]
    folder: Path
    done: int = 0
    kinds: dict[str, int] = field(default_factory=dict)
    redone: int = 0

    def run(self) -> None:
        """Attempts until one ends by itself after every fault has happened."""
        attempts = 0
        while True:
            attempts += 1
            before = self.place()
            ranks = self.start(attempts)
            fault = self.random.choice(KINDS) if self.done < self.faults else ""
            struck = self.strike(ranks, fault) if fault else False
            codes = self.wait(ranks)
            if struck:
                self.done += 1
                self.kinds[fault] = self.kinds.get(fault, 0) + 1
                reached, stands = self.place(), self.newest()
                self.redone += max(reached - stands, 0)
                row = {"fault": fault, "from": before, "reached": reached, "checkpoint": stands, "codes": codes}
                print(json.dumps(row), flush=True)
            elif codes == [0] * WORLD_SIZE:
                end = {"attempts": attempts, "faults": self.done, "kinds": self.kinds, "images_redone": self.redone}
                print(json.dumps({"end": "done", **end}), flush=True)
                return
            else:
                raise SystemExit(f"attempt {attempts} ended with {codes} though nothing was done to it")

    def start(self, attempt: int) -> list[psutil.Process]:
        """Fork the ranks."""
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        ranks = []
        for rank in range(WORLD_SIZE):
            pid = os.fork()
            if pid == 0:
                self.become_rank(rank, port, attempt)
            ranks.append(psutil.Process(pid))
        return ranks

    def become_rank(self, rank: int, port: int, attempt: int) -> None:
        """Body of a forked rank; does not return."""
        os.environ |= {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(WORLD_SIZE),
            "LOCAL_WORLD_SIZE": str(WORLD_SIZE),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
        log = os.open(self.folder.parent / f"rank-{rank}.log", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        print(f"attempt {attempt}", flush=True)
        code = 1
        try:
            code = main(self.arguments)
        finally:
            sys.stdout.flush()
            os._exit(code)

    def strike(self, ranks: list[psutil.Process], fault: str) -> bool:
        """Wait for the moment and do it; False when the ranks had ended before."""
        target = self.newest() + self.random.randrange(0, self.reach())
        if fault == "kill at the start":
            time.sleep(self.random.uniform(0, 1.5))
        elif fault == "kill during a checkpoint":
            # The moment is short and may be missed: then the fault comes at its place all the same.
            def moment() -> bool:
                return bool(list(self.folder.glob(".checkpoint-*.partial"))) or self.place() >= target + INTERVAL

            if not self.wait_for(ranks, moment):
                return False
        elif not self.wait_for(ranks, lambda: self.place() >= target):
            return False
        if not all(process.is_running() and process.status() != psutil.STATUS_ZOMBIE for process in ranks):
            return False
        if fault == "kill a data worker":
            if not self.wait_for(ranks, lambda: bool(readers_of(ranks))):
                return False
            self.random.choice(readers_of(ranks)).kill()
        elif fault == "stop and go on":
            ranks[1].suspend()
            time.sleep(0.3)
            ranks[1].resume()
            ranks[0].kill()
        elif fault == "terminate":
            for process in ranks:
                process.terminate()
        elif fault == "damage the newest checkpoint":
            for process in ranks:
                process.kill()
            self.damage()
        elif fault == "kill rank 1":
            ranks[1].kill()
        else:
            for process in ranks[: 2 if fault == "kill both" else 1]:
                process.kill()
        return True

    def reach(self) -> int:
        """Images within which the next fault comes, so that there is room for those after it."""
        room = (self.images - self.newest()) // (self.faults - self.done + 1)
        return max(min(1500, room - INTERVAL // 2), 1)

    def damage(self) -> None:
        """Cut, flip or remove a file of the newest checkpoint, if one before it stands."""
        found = [path for path in checkpoints(self.folder) if (path / SEAL).exists()]
        if len(found) < 2:
            return
        file = found[0] / self.random.choice(("model.safetensors", "optimizer.safetensors", "state.json", SEAL))
        content = bytearray(file.read_bytes())
        match self.random.randrange(3):
            case 0:
                file.write_bytes(content[: len(content) // 2])
            case 1:
                content[len(content) // 3] ^= 0x80
                file.write_bytes(content)
            case _:
                file.unlink()

    def wait_for(self, ranks: list[psutil.Process], moment: object) -> bool:
        """Poll until the moment has come; False when a rank ended first."""
        assert callable(moment)
        deadline = time.monotonic() + HANG_SECONDS
        while not moment():
            if any(process.status() == psutil.STATUS_ZOMBIE for process in ranks):
                return False
            if time.monotonic() > deadline:
                raise SystemExit("the ranks hang")
            time.sleep(0.002)
        return True

    def wait(self, ranks: list[psutil.Process]) -> list[int]:
        """Exit codes. As torchrun would, end the other rank when one has failed."""
        codes: dict[int, int] = {}
        deadline = time.monotonic() + HANG_SECONDS
        while len(codes) < len(ranks):
            for process in ranks:
                if process.pid not in codes:
                    pid, status = os.waitpid(process.pid, os.WNOHANG)
                    if pid:
                        codes[pid] = os.waitstatus_to_exitcode(status)
            if any(code not in (0, 75) for code in codes.values()) or time.monotonic() > deadline:
                for process in ranks:
                    if process.pid not in codes:
                        with contextlib.suppress(psutil.NoSuchProcess):
                            process.kill()
            time.sleep(0.005)
        return [codes[process.pid] for process in ranks]

    def place(self) -> int:
        """Images seen by the last whole row of the history."""
        try:
            with (self.folder / "history.jsonl").open("rb") as file:
                size = file.seek(0, os.SEEK_END)
                file.seek(max(size - 4000, 0))
                lines = file.read().split(b"\n")[:-1]
            return int(json.loads(lines[-1])["images_seen"]) if lines else 0
        except (FileNotFoundError, ValueError):
            return 0

    def newest(self) -> int:
        """Images of the newest sealed checkpoint."""
        found = [path for path in checkpoints(self.folder) if (path / SEAL).exists()]
        return int(found[0].name.rpartition("-")[2]) if found else 0


def readers_of(ranks: list[psutil.Process]) -> list[psutil.Process]:
    """The reader processes of the ranks."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return [child for process in ranks for child in process.children()]
    return []


def given(supervisor: type[Supervisor], words: list[str]) -> Supervisor:
    """What the command line asks for."""
    faults, seed, images, *arguments = words
    storage, name = (
        next(a.split("=", 1)[1] for a in arguments if a.startswith(k)) for k in ("run.storage=", "run.name=")
    )
    Path(storage).mkdir(parents=True, exist_ok=True)
    return supervisor(int(faults), random.Random(int(seed)), int(images), arguments, Path(storage) / name)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    given(Supervisor, sys.argv[1:]).run()
