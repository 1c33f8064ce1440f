"""Runs the Dockerfile's RUN steps in a scratch folder, for machines without a container engine.

`python -m tests.k8s.dockerfile FOLDER` runs them as they are written, downloads included; the test lets the packages
of its own environment stand for the downloads. COPY, WORKDIR, ARG and ENV are done as the builder does them, and the
image's /opt, /src and the mounts of the build lie below the folder.
"""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from tests.k8s.rendering import REPOSITORY

DOCKERFILE = REPOSITORY / "Dockerfile"
BELOW = re.compile(r"(?<![\w./])/(opt|src)(?=/|\s|$|\")")


def instructions(text: str) -> Iterator[tuple[str, str]]:
    """(instruction, rest) of a Dockerfile, continued lines joined and comments left out."""
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    for line in re.sub(r"\\\n", "", "\n".join(lines)).splitlines():
        if line.strip():
            name, _, rest = line.strip().partition(" ")
            yield name.upper(), rest.strip()


class Build:
    """One stage after another, in a folder that stands for the image's root."""

    def __init__(self, root: Path, installed: Path | None = None) -> None:
        """`installed` is a site-packages folder whose packages count as installed in each new environment."""
        self.root, self.installed = root, installed
        self.workdir = root
        self.global_arguments: dict[str, str] = {}
        self.environment: dict[str, str] = {}
        self.stages = 0
        self.ran: list[str] = []

    def run(self, text: str) -> None:
        """Do every instruction; `subprocess.CalledProcessError` with its output where one fails."""
        for name, rest in instructions(text):
            getattr(self, f"_{name.lower()}", self._nothing)(rest)

    def place(self, path: str) -> Path:
        return self.root / path.lstrip("/") if path.startswith("/") else self.workdir / path

    def _nothing(self, rest: str) -> None:
        """FROM's image, USER, LABEL: nothing to execute."""

    def _from(self, rest: str) -> None:
        self.stages += 1
        self.workdir, self.environment = self.root, {}

    def _arg(self, rest: str) -> None:
        key, given, value = rest.partition("=")
        if not self.stages:
            self.global_arguments[key] = value
        self.environment[key] = value if given else self.global_arguments[key]

    def _env(self, rest: str) -> None:
        for word in rest.split():
            key, _, value = word.partition("=")
            # The image's PATH must not shadow this machine's programs with the scratch environment's.
            if key != "PATH":
                self.environment[key] = value

    def _workdir(self, rest: str) -> None:
        self.workdir = self.place(rest)
        self.workdir.mkdir(parents=True, exist_ok=True)

    def _copy(self, rest: str) -> None:
        if rest.startswith("--from="):
            # The stages share one root, so what is copied must be there already.
            source, target = rest.split()[1:]
            assert source == target
            assert self.place(source).exists(), source
            return
        *sources, target = rest.split()
        for source in sources:
            goal = self.place(target)
            if (REPOSITORY / source).is_dir():
                shutil.copytree(REPOSITORY / source, goal, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(REPOSITORY / source, goal)

    def _run(self, rest: str) -> None:
        command = BELOW.sub(rf"{self.root}/\1", re.sub(r"--mount=\S+\s+", "", rest))
        if self.installed is not None:
            # It would judge the stand-ins, among them packages for tests alone.
            command = command.replace("-m pip check", "-m pip --version")
        kept = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "VIRTUAL_ENV")}
        arguments = {key: value for key, value in self.environment.items() if value or key not in kept}
        path = f"{Path(sys.executable).parent}:{kept['PATH']}"
        done = subprocess.run(
            ["/bin/sh", "-ec", command],
            cwd=self.workdir,
            env=kept | arguments | {"PATH": path},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        if done.returncode:
            raise subprocess.CalledProcessError(done.returncode, command, done.stdout)
        self.ran.append(done.stdout)
        environment = self.root / "opt" / "vaegan"
        if self.installed is not None and "-m venv" in command:
            (site,) = environment.glob("lib/python3*/site-packages")
            (site / "stand-in.pth").write_text(f"{self.installed}\n")


def main(folder: str) -> None:
    """Every step for real."""
    build = Build(Path(folder).resolve())
    try:
        build.run(DOCKERFILE.read_text())
    except subprocess.CalledProcessError as error:
        sys.exit(f"{error.cmd}\n{error.output[-4000:]}\nexit code {error.returncode}")
    print(*(output.strip()[-300:] for output in build.ran), sep="\n")


if __name__ == "__main__":
    main(sys.argv[1])
