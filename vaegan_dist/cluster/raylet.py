"""A driver whose own raylet is gone: Ray ends such a process without a word, so it is said and ended here first."""

import os
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import ray

from vaegan_dist.cluster.background import background
from vaegan_dist.errors import VaeganError

POLL_SECONDS = 0.5
HEAD_LOOKS = 4  # polls between two looks at the head; two in a row without an answer are said
SOCKETS = Path("/proc/net/unix")


@contextmanager
def raylet_watched(block: Callable[[], str]) -> Iterator[None]:
    """Within the block, the end of this node's raylet ends the process with an error line and `block`, exit code 1.

    Nothing of Ray is asked: the first call that needs the raylet would end the process.
    """
    path = ray._private.worker.global_worker.node.raylet_socket_name
    head = ray.get_runtime_context().gcs_address
    silent = looks = 0

    def watch() -> None:
        nonlocal silent, looks
        if not _listens(path):
            _end(block)
        looks += 1
        if looks % HEAD_LOOKS == 0:
            silent = 0 if _answers(head) else silent + 1
            if silent == 2:
                _warn_of_head(head, block)

    with background("raylet-watch", watch, POLL_SECONDS):
        yield


def _listens(path: str) -> bool:
    """Whether a process still has the socket, by the kernel's list: a connection would be one more client to Ray."""
    try:
        return path in SOCKETS.read_text()
    except OSError:
        return True  # not Linux, or no handle left: not for us to judge


def _answers(address: str) -> bool:
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=POLL_SECONDS * HEAD_LOOKS).close()
    except OSError:
        return False
    return True


def _warn_of_head(address: str, block: Callable[[], str]) -> None:
    """Ray ends this process itself when the head stays away, so what then counts is said now."""
    line = (
        f"the head of the cluster ({address}) does not answer; unless it comes back, Ray ends this command "
        f"within a minute: then start Ray again, and run the same command again to continue"
    )
    print(f"error: {line}", _aftermath(block), sep="\n", file=sys.stderr, flush=True)


def _aftermath(block: Callable[[], str]) -> str:
    try:
        return block()
    except (VaeganError, OSError) as error:
        return f"  checkpoint   unknown: {error}"


def _end(block: Callable[[], str]) -> None:
    line = (
        f"Ray on this node ({socket.gethostname()}) has ended (its raylet was killed, or lost the cluster's head); "
        f"start Ray again where it does not come back by itself, and run the same command again to continue"
    )
    print(f"error: {line}", _aftermath(block), sep="\n", file=sys.stderr, flush=True)
    os._exit(VaeganError.exit_code)
