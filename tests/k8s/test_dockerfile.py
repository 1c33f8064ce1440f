"""The Dockerfile's steps run, and .dockerignore lets in what they copy and nothing else."""

import fnmatch
import re
import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest

from tests.k8s.dockerfile import DOCKERFILE, Build, instructions
from tests.k8s.rendering import REPOSITORY
from tests.needs import missing

OFFLINE = re.compile("No matching distribution found for hatchling|Could not find a version that satisfies .*hatchling")


@pytest.mark.timeout(300)
def test_every_run_step_works(tmp_path: Path) -> None:
    """With this environment's packages in place of the downloads: the lines, the constraints and the paths are real."""
    build = Build(tmp_path, installed=Path(sysconfig.get_paths()["purelib"]))
    try:
        build.run(DOCKERFILE.read_text())
    except subprocess.CalledProcessError as error:
        if OFFLINE.search(error.output):
            missing("a package index (for the build backend)")
        pytest.fail(f"{error.cmd}\n{error.output[-3000:]}")
    environment = tmp_path / "opt" / "vaegan"
    assert sum(name == "RUN" for name, _ in instructions(DOCKERFILE.read_text())) == len(build.ran) > 3
    assert not list(environment.glob("bin/pip*")), "build tools are left"
    (site,) = environment.glob("lib/python3*/site-packages")
    assert (site / "vaegan_dist" / "presets" / "smoke.yaml").exists()
    assert (environment / "app" / "jobs" / "train.py").exists()


@pytest.mark.parametrize("step", ["RUN python -m pip instal x", "RUN false && true", "COPY absent .", "WORKDIR"])
def test_a_typo_in_a_step_is_noticed(tmp_path: Path, step: str) -> None:
    with pytest.raises((subprocess.CalledProcessError, OSError)):
        Build(tmp_path).run(f"FROM image\n{step}\nRUN test -d work\n")


def test_what_is_copied_is_not_ignored() -> None:
    ignore = [line for line in (REPOSITORY / ".dockerignore").read_text().splitlines() if line[:1] not in ("", "#")]
    allowed = [line[1:] for line in ignore if line.startswith("!")]
    copied = {
        source
        for name, rest in instructions(DOCKERFILE.read_text())
        if name == "COPY" and not rest.startswith("--from")
        for source in rest.split()[:-1]
    }
    assert ignore[0] == "*"
    assert copied == set(allowed)
    for secret in (".git", ".env", "data", "runs", "k8s"):
        assert not any(fnmatch.fnmatch(secret, pattern) for pattern in allowed)


def test_the_pinned_ray_is_the_constraints() -> None:
    pinned = re.search(r"^ray==(\S+)$", (REPOSITORY / "constraints.txt").read_text(), re.M)
    assert pinned is not None
    assert f"ARG RAY_VERSION={pinned[1]}\n" in DOCKERFILE.read_text()
    manifest = (REPOSITORY / "k8s" / "workloads" / "raycluster" / "raycluster.yaml").read_text()
    assert f"rayVersion: {pinned[1]}\n" in manifest


def test_hadolint_is_content() -> None:
    hadolint = shutil.which("hadolint", path=sysconfig.get_paths()["scripts"]) or shutil.which("hadolint")
    done = subprocess.run([hadolint or missing("hadolint"), str(DOCKERFILE)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
