"""A storage that fills up or turns read-only: said in one line, nothing lost, and the same command goes on."""

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.training.runs import rows_of, tensors_of
from vaegan_dist.reporting.records import Record

SETTINGS = (
    "reporting.tensorboard=false",
    "training.torch_threads=1",
    "checkpoint.images=256",
    "checkpoint.keep_last=9",
)
TIMEOUT = 200


def trained(folder: Path) -> list[Record]:
    return [row for row in rows_of(folder) if row["event"] != "warning"]


def command(digits: Path, storage: Path, *more: str) -> list[str]:
    head = [sys.executable, "-m", "vaegan_dist.cli", "train", "--preset", "smoke", "--runtime", "local"]
    return [*head, f"data.path={digits}", f"run.storage={storage}", *SETTINGS, "checkpoint.retry_seconds=0.1", *more]


def in_own_mount(script: str) -> subprocess.CompletedProcess[str]:
    """Run a script that may mount file systems which nobody else sees and which end with it."""
    if subprocess.run(["unshare", "--mount", "--map-root-user", "true"], capture_output=True).returncode:
        if os.environ.get("CI"):
            pytest.fail("unshare --mount is not possible here")
        pytest.skip("unshare --mount is not possible here")
    return subprocess.run(
        ["unshare", "--mount", "--map-root-user", "bash", "-c", script],
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


@pytest.fixture(scope="module")
def calm(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    storage = tmp_path_factory.mktemp("calm")
    subprocess.run(command(digits, storage), check=True, timeout=TIMEOUT, capture_output=True)
    return storage / "smoke"


@pytest.mark.parametrize("kibibytes", [1000, pytest.param(2600, marks=pytest.mark.chaos)])
def test_a_full_disk_ends_in_one_line_and_room_continues_the_run(
    kibibytes: int, calm: Path, digits: Path, tmp_path: Path
) -> None:
    storage, saved = tmp_path / "small", tmp_path / "saved"
    storage.mkdir()
    run = shlex.join(command(digits, storage))
    script = f"""
        mount -t tmpfs -o size={kibibytes}k none {storage} || exit 99
        {run} >&2; echo "first $?"
        ls -a {storage}/smoke
        mount -o remount,size=200m {storage}
        {run} >&2; echo "second $?"
        cp -r {storage}/smoke {saved}
    """
    done = in_own_mount(script)
    assert "first 1" in done.stdout and "second 0" in done.stdout, done.stdout + done.stderr
    assert ".partial" not in done.stdout
    error = next(line for line in done.stderr.splitlines() if line.startswith("error: "))
    assert "No space left on device" in error and "MiB free; make room" in error
    assert "Traceback" not in done.stderr
    block = done.stderr[done.stderr.index(error) :].splitlines()[1:6]
    assert [line.split()[0] for line in block[:3]] == ["run", "reached", "checkpoint"], block
    assert tensors_of(saved) == tensors_of(calm) and trained(saved) == trained(calm)


def test_a_storage_that_is_read_only_at_a_restart_is_named(calm: Path, digits: Path, tmp_path: Path) -> None:
    storage, saved = tmp_path / "frozen", tmp_path / "saved"
    storage.mkdir()
    run = shlex.join(command(digits, storage))
    half = tmp_path / "half"
    shutil.copytree(calm, half)
    for path in half.glob("checkpoint-*"):
        if int(path.name.rpartition("-")[2]) > 1500:
            shutil.rmtree(path)
    script = f"""
        mount -t tmpfs -o size=200m none {storage} || exit 99
        cp -r {half} {storage}/smoke
        mount -o remount,ro {storage}
        {run} >&2; echo "first $?"
        mount -o remount,rw {storage}
        {run} >&2; echo "second $?"
        cp -r {storage}/smoke {saved}
    """
    done = in_own_mount(script)
    assert "first 2" in done.stdout and "second 0" in done.stdout, done.stdout + done.stderr
    error = next(line for line in done.stderr.splitlines() if line.startswith("error: "))
    assert f"run.storage={storage}" in error and "Read-only file system" in error and "make it writable" in error
    assert tensors_of(saved) == tensors_of(calm) and trained(saved) == trained(calm)


def test_a_storage_that_vanishes_is_named_and_back_in_place_the_run_continues(
    calm: Path, digits: Path, tmp_path: Path
) -> None:
    """A bind mount is taken away while the process is stopped in the middle of its run."""
    storage, real, saved = tmp_path / "mounted", tmp_path / "real", tmp_path / "saved"
    storage.mkdir()
    real.mkdir()
    run = shlex.join(command(digits, storage))
    script = f"""
        mount --bind {real} {storage} || exit 99
        {run} >&2 & driver=$!
        while [ ! -e {storage}/smoke/checkpoint-000000000256/checkpoint.json ]; do
            kill -0 $driver || exit 98; sleep 0.01
        done
        kill -STOP $driver; umount -l {storage}; kill -CONT $driver
        wait $driver; echo "first $?"
        ls -a {storage} | wc -l
        mount --bind {real} {storage}
        {run} >&2; echo "second $?"
        cp -r {storage}/smoke {saved}
    """
    done = in_own_mount(script)
    # Nothing was written beside the place: only . and .. are there.
    assert done.stdout.split() == ["first", "1", "2", "second", "0"], done.stdout + done.stderr
    error = next(line for line in done.stderr.splitlines() if line.startswith("error: "))
    assert str(storage) in error and "the folder is gone: removed, or its storage unmounted" in error
    assert tensors_of(saved) == tensors_of(calm) and trained(saved) == trained(calm)
