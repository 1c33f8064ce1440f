"""Forks processes that write one checkpoint each, for a tracer to break at a chosen system call.

Reads one line per attempt from standard input: the folder. Answers with the child's process id, waits for a second
line (the tracer is attached), lets the child write, and answers with its exit code. Exit code 3: the write failed
with an error of the system, and said so.
"""

import os
import sys
from pathlib import Path

import torch

from vaegan_dist.config_source import dump_yaml, load_config
from vaegan_dist.data.loader import Position
from vaegan_dist.models import ImageShape
from vaegan_dist.training.commit import prune, write_checkpoint
from vaegan_dist.training.snapshot import Interval, Snapshot, Snapshots
from vaegan_dist.training.state import create_state

FAILED = 3


def snapshot_at(images: int) -> Snapshot:
    """A small run's state."""
    config = load_config("smoke", overrides=["model.hidden=[8]", "model.discriminator_hidden=[8]"])
    assert dump_yaml(config)
    state = create_state(config, ImageShape(channels=1, height=8, width=8), torch.device("cpu"), torch.float32)
    state.advance(images, Position(0, images))
    interval = Interval(("loss_rec",), 1, [[0.5]], 0.0)
    return Snapshots().take(state, data={"samples": [1280], "streams": 64}, interval=interval, watch={})


def child(folder: Path, snapshot: Snapshot, ready: int) -> None:
    """Write when told to; does not return."""
    code = 1
    try:
        os.read(ready, 1)
        write_checkpoint(snapshot, folder)
        prune(folder, keep_last=1)
        code = 0
    except Exception:
        code = FAILED
    finally:
        os._exit(code)


def main() -> None:
    """Serve attempts until standard input ends."""
    first, second = snapshot_at(64), snapshot_at(128)
    while line := sys.stdin.readline():
        folder = Path(line.strip())
        write_checkpoint(first, folder)
        ready, go = os.pipe()
        pid = os.fork()
        if pid == 0:
            child(folder, second, ready)
        print(pid, flush=True)
        sys.stdin.readline()
        os.write(go, b"x")
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
        os.close(ready)
        os.close(go)


if __name__ == "__main__":
    main()
