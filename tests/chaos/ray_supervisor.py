"""Runs the command on a Ray of its own again and again, and kills parts of it at random, until it ends by itself.

    python -m tests.chaos.ray_supervisor FAULTS SEED IMAGES [ARGUMENT …]

IMAGES is the run's budget, the arguments are those of `vaegan-dist`. Prints one JSON line per fault, with the seconds
until the next step, and one for the end.
"""

import contextlib
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field

import psutil

from tests.chaos.supervisor import Supervisor, given

HANG_SECONDS = 900
TITLES = {
    "kill a worker": ("RayTrainWorker",),
    "kill the raylet": ("raylet/raylet",),
    "kill the GCS": ("gcs/gcs_server",),
    "kill the controller": ("TrainController",),
    "kill the driver": (),
    "kill at the start": (),
    "kill all of Ray": ("raylet/raylet", "gcs/gcs_server", "ray::"),
}
# Workers die more often than anything else.
WEIGHTS = (4, 2, 1, 1, 2, 1, 1)


@dataclass
class RaySupervisor(Supervisor):
    """One run with its faults, on Ray."""

    session: str = ""
    recovered: dict[str, list[float]] = field(default_factory=dict)
    struck: tuple[str, float, int] | None = None

    def run(self) -> None:
        """Commands until one ends by itself after every fault has happened."""
        attempts = 0
        while True:
            attempts += 1
            with tempfile.TemporaryDirectory(prefix="vg", dir="/tmp", ignore_cleanup_errors=True) as folder:
                self.session = folder
                faults_before = self.done
                driver = self.command(attempts)
                try:
                    code = self.torment(driver)
                finally:
                    driver.kill()
                    self.sweep()
            if code == 0 and self.done >= self.faults:
                break
            if code == 0 or self.done == faults_before:
                raise SystemExit(f"command {attempts} ended with {code} after {self.done} faults; see its log")
        medians = {kind: round(statistics.median(seconds), 1) for kind, seconds in self.recovered.items()}
        end = {"end": "done", "commands": attempts, "faults": self.done, "kinds": self.kinds}
        print(json.dumps({**end, "images_redone": self.redone, "median_seconds": medians}), flush=True)

    def command(self, attempt: int) -> "subprocess.Popen[bytes]":
        """Start the command."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        # A GCS that is gone is waited for; here not for long.
        own = {"RAY_TMPDIR": self.session, "HOME": self.session, "RAY_gcs_rpc_server_reconnect_timeout_s": "5"}
        with (self.folder.parent / "ray.log").open("ab") as log:
            log.write(f"command {attempt}\n".encode())
            log.flush()
            arguments = [sys.executable, "-m", "vaegan_dist.cli", *self.arguments, "--address", "local"]
            return subprocess.Popen(arguments, stdout=log, stderr=log, env={**kept, **own})

    def torment(self, driver: "subprocess.Popen[bytes]") -> int:
        """Strike until the command has ended; its exit code."""
        while self.done < self.faults:
            fault = self.random.choices(list(TITLES), WEIGHTS)[0]
            if fault == "kill at the start":
                time.sleep(self.random.uniform(0, 12))
            elif not self.comes(driver, self.newest() + self.random.randrange(0, self.reach())):
                break
            if driver.poll() is not None:
                break
            self.hit(driver, fault)
        deadline = time.monotonic() + HANG_SECONDS
        while driver.poll() is None and time.monotonic() < deadline:
            self.clock()
            time.sleep(0.1)
        if driver.returncode is None:
            raise SystemExit(f"the command hangs after {self.struck}")
        return driver.returncode

    def comes(self, driver: "subprocess.Popen[bytes]", images: int) -> bool:
        """Wait for recovery and an image count; False when the command ended first."""
        deadline = time.monotonic() + HANG_SECONDS
        while self.struck is not None or self.place() < images:
            self.clock()
            if driver.poll() is not None:
                return False
            if time.monotonic() > deadline:
                raise SystemExit(f"the command hangs after {self.struck}")
            time.sleep(0.05)
        return True

    def hit(self, driver: "subprocess.Popen[bytes]", fault: str) -> None:
        """Do it."""
        reached, stands, rows = self.place(), self.newest(), self.resumes()
        victims = [process for title in TITLES[fault] for process in self.processes(title)]
        if fault in ("kill the driver", "kill at the start"):
            driver.kill()
        elif fault == "kill all of Ray":
            for process in victims:
                kill(process)
        elif victims:
            kill(self.random.choice(victims))
        else:
            return
        self.done += 1
        self.kinds[fault] = self.kinds.get(fault, 0) + 1
        self.redone += max(reached - stands, 0)
        if self.struck is None:
            self.struck = (fault, time.monotonic(), rows)
        print(json.dumps({"fault": fault, "reached": reached, "checkpoint": stands}), flush=True)

    def clock(self) -> None:
        """Note the time from the fault to the first row after a resume."""
        if self.struck is not None and self.resumes() > self.struck[2]:
            fault, since, _ = self.struck
            seconds = time.monotonic() - since
            self.recovered.setdefault(fault, []).append(seconds)
            print(json.dumps({"after": fault, "next_step_seconds": round(seconds, 1)}), flush=True)
            self.struck = None

    def resumes(self) -> int:
        """Starts that have made a step: `resume` rows with a `train` row after them."""
        with contextlib.suppress(FileNotFoundError):
            before, _, after = (self.folder / "history.jsonl").read_text().rpartition('"event": "resume"')
            return before.count('"event": "resume"') + (1 if '"event": "train"' in after and before else 0)
        return 0

    def processes(self, title: str) -> list[psutil.Process]:
        """Processes of this Ray by a word in their command line."""
        found = []
        for process in psutil.process_iter(["cmdline", "environ"]):
            ours = (process.info["environ"] or {}).get("RAY_TMPDIR") == self.session
            if ours and title in " ".join(process.info["cmdline"] or []):
                found.append(process)
        return found

    def sweep(self) -> None:
        """End what the command left of its Ray."""
        left = [process for process in self.processes("") if process.pid != os.getpid()]
        for process in left:
            kill(process)
        psutil.wait_procs(left, timeout=30)


def kill(process: psutil.Process) -> None:
    with contextlib.suppress(psutil.NoSuchProcess):
        process.kill()


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    given(RaySupervisor, sys.argv[1:]).run()
