"""`vaegan-dist submit --render`: a RayJob that the API server and the operator take, from any overlay with one."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.k8s.rendering import K8S, REPOSITORY, Manifest
from tests.k8s.rules import operator_refuses, violations
from tests.k8s.test_manifests import check
from tests.needs import needed


def rendered(*arguments: str) -> "subprocess.CompletedProcess[str]":
    needed("kubectl")
    command = [sys.executable, "-m", "vaegan_dist.cli", "submit", "--render", *arguments]
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=120)


def rayjob(*arguments: str) -> Manifest:
    done = rendered(*arguments)
    assert done.returncode == 0, done.stderr
    return next(each for each in yaml.safe_load_all(done.stdout) if each["kind"] == "RayJob")


@pytest.mark.parametrize("overlay", ["train", "dev"])
def test_the_rendered_run_is_accepted(shared: Path, tmp_path: Path, overlay: str) -> None:
    words = ("--", "train", "--preset", "larsen-64", "--workers=4", "--name", "faces", "phases.vaegan.images=1000")
    done = rendered(f"--overlay={K8S / 'overlays' / overlay}", "--job-id=faces", *words)
    assert done.returncode == 0, done.stderr
    documents = list(yaml.safe_load_all(done.stdout))
    assert {each["kind"] for each in documents} == {"RayJob", "ConfigMap"}
    assert all(check(shared, documents, tmp_path))
    job = next(each for each in documents if each["kind"] == "RayJob")
    assert not [*operator_refuses(job), *violations(job)]
    assert job["metadata"]["name"] == "faces"
    assert job["spec"]["entrypoint"].startswith("python jobs/train.py --preset ")
    assert job["spec"]["entrypoint"].endswith(" ".join(words[2:]))
    group = job["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]
    assert group["replicas"] == group["minReplicas"] == 4 <= group["maxReplicas"]


def test_a_program_of_ones_own_keeps_its_words() -> None:
    assert rayjob("--", "python", "-c", "print(1)")["spec"]["entrypoint"] == "python -c 'print(1)'"


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("--", "evaluate", "RUN"), "jobs/evaluate.py"),
        (("--overlay=k8s/overlays/cluster", "--", "train"), "no RayJob"),
        (("--overlay=nowhere", "--", "train"), "nowhere"),
        (("--job-id=My_Run", "--", "train"), "My_Run"),
        (("--", "train", "--workers", "none"), "--workers=none"),
        ((), "--"),
    ],
)
def test_a_mistake_is_one_line(arguments: tuple[str, ...], named: str) -> None:
    done = rendered(*arguments)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert named in done.stderr
