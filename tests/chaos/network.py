"""Nodes with addresses of their own on one machine: network namespaces on a bridge, each with its Ray as a pod has it.

Needs root and the kernel's namespaces; `available` says whether they are there.
"""

import contextlib
import os
import secrets
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

NET = "10.177.0"
GATEWAY = f"{NET}.254"


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True, timeout=30)


def available() -> str:
    """Empty, or what is missing."""
    if os.geteuid() or shutil.which("ip") is None:
        return "root and iproute2"
    name = f"vg{secrets.token_hex(3)}"
    try:
        ip("netns", "add", name)
        ip("netns", "del", name)
        ip("link", "add", name, "type", "bridge")
        ip("link", "del", name)
    except subprocess.CalledProcessError as error:
        return f"the right to make network namespaces ({error.stderr.strip()})"
    return ""


@dataclass
class Node:
    """One namespace: an address, a folder, and a Ray that is started again when it ends, as a kubelet does."""

    name: str
    address: str
    folder: Path
    environment: dict[str, str]
    link: str
    processes: list["subprocess.Popen[bytes]"] = field(default_factory=list)
    starts: int = 0
    closing: threading.Event = field(default_factory=threading.Event)

    def command(self, words: Sequence[str]) -> list[str]:
        return ["ip", "netns", "exec", self.name, *words]

    def run(self, words: Sequence[str], timeout: float) -> "subprocess.CompletedProcess[str]":
        """A command in the node, to its end."""
        return subprocess.run(
            self.command(words), env=self.environment, cwd=self.folder, capture_output=True, text=True, timeout=timeout
        )

    def keep_running(self, words: Sequence[str]) -> None:
        """Start a command, and start it again whenever it ends, until the node is closed."""

        def supervise() -> None:
            while not self.closing.is_set():
                with (self.folder / f"{self.starts}.log").open("wb") as log:
                    process = subprocess.Popen(
                        self.command(words), env=self.environment, cwd=Path(__file__).parents[2],
                        stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
                    )  # fmt: skip
                    self.processes.append(process)
                    self.starts += 1
                    process.wait()
                self._end_what_is_left()
                self.closing.wait(1)

        threading.Thread(target=supervise, daemon=True).start()

    def _end_what_is_left(self) -> None:
        """A container takes all of its processes along."""
        done = subprocess.run(["ip", "netns", "pids", self.name], capture_output=True, text=True, timeout=30)
        for pid in done.stdout.split():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)

    def cut_off(self) -> None:
        """No packet comes in or goes out any more, and nobody is told."""
        ip("link", "set", self.link, "down")

    def reconnect(self) -> None:
        ip("link", "set", self.link, "up")

    def close(self) -> None:
        self.closing.set()
        self._end_what_is_left()
        for process in self.processes:
            process.wait(60)


@contextlib.contextmanager
def nodes(names: Sequence[str], folder: Path, environment: dict[str, str]) -> Iterator[list[Node]]:
    """Namespaces with addresses 10.177.0.1, .2, …; hosts files that know all of them; taken away at the end."""
    mark = secrets.token_hex(2)
    bridge, made, hosts = f"vgb{mark}", [], []
    try:
        ip("link", "add", bridge, "type", "bridge")
        ip("addr", "add", f"{GATEWAY}/24", "dev", bridge)
        ip("link", "set", bridge, "up")
        for number, name in enumerate(names, 1):
            space, link, inside, address = (
                f"vg{mark}-{name}",
                f"vgh{mark}{number}",
                f"vgn{mark}{number}",
                f"{NET}.{number}",
            )
            etc = Path("/etc/netns") / space
            etc.mkdir(parents=True)
            hosts.append(etc)
            lines = [f"127.0.0.1 localhost\n{address} {os.uname().nodename}\n"]
            lines += [f"{NET}.{other} {peer}\n" for other, peer in enumerate(names, 1)]
            (etc / "hosts").write_text("".join(lines))
            ip("netns", "add", space)
            own = folder / name
            own.mkdir(parents=True)
            made.append(Node(space, address, own, _environment(environment, own), link))
            ip("link", "add", link, "type", "veth", "peer", "name", inside)
            ip("link", "set", link, "master", bridge, "up")
            ip("link", "set", inside, "netns", space)
            ip("-n", space, "addr", "add", f"{address}/24", "dev", inside)
            ip("-n", space, "link", "set", inside, "up")
            ip("-n", space, "link", "set", "lo", "up")
            ip("-n", space, "route", "add", "default", "via", GATEWAY)
        yield made
    finally:
        for node in made:
            node.close()
            subprocess.run(["ip", "netns", "del", node.name], capture_output=True, timeout=30)
        subprocess.run(["ip", "link", "del", bridge], capture_output=True, timeout=30)
        for etc in hosts:
            shutil.rmtree(etc, ignore_errors=True)


def _environment(given: dict[str, str], folder: Path) -> dict[str, str]:
    own = {"HOME": str(folder), "RAY_TMPDIR": str(folder), "VAEGAN_CACHE": str(folder / "cache")}
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "VAEGAN_"))}
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return kept | given | own | {"PATH": path, "OMP_NUM_THREADS": "1", "RAY_USAGE_STATS_ENABLED": "0"}


def ray_start(group: dict[str, Any], cpus: int, head: str | None) -> list[str]:
    """The command that the operator makes of a group's `rayStartParams` (KubeRay v1.6.2).

    Args:
        cpus: the container's limit, unless the group sets num-cpus.
        head: the head's address for a worker; None for the head itself.
    """
    settings = {
        "metrics-export-port": "8080",
        "dashboard-agent-listen-port": "52365",
        "num-cpus": str(cpus),
        **group.get("rayStartParams", {}),
    }
    first = ["--head", "--dashboard-host=0.0.0.0"] if head is None else [f"--address={head}:6379"]
    return ["ray", "start", *first, "--block", *(f"--{name}={value}" for name, value in settings.items())]
