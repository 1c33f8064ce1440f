"""Two processes cannot train one run, every rank must see the folder, and a hung or starved rank says what it is."""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.training.runs import config_of
from vaegan_dist.cluster.runtime import train_local
from vaegan_dist.errors import ConfigError, VaeganError
from vaegan_dist.training import presence
from vaegan_dist.training.loop import train
from vaegan_dist.training.presence import RunLock
from vaegan_dist.training.resume import refuse_existing, run_folder
from vaegan_dist.training.runtime import SingleProcess
from vaegan_dist.training.step import Step

HOLDER = """
import sys, time
from pathlib import Path
from vaegan_dist.training.presence import RunLock
lock = RunLock(Path(sys.argv[1]))
assert not lock.acquire()
print("held", flush=True)
time.sleep(600)
"""


def test_a_second_process_is_refused_and_a_killed_one_is_not_waited_for(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of(digits, tmp_path, "phases=[{name: vae, objective: vae, images: 64}]")
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(run_folder(config))], stdout=subprocess.PIPE, text=True
    )
    try:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        with monkeypatch.context() as patch:
            patch.setattr(presence, "LOCK_PATIENCE_SECONDS", 0.2)
            with pytest.raises(ConfigError, match=rf"run\.name=smoke: process {holder.pid} on .* trains this run"):
                train(config, SingleProcess())
        refuse_existing(run_folder(config))  # a refused start leaves nothing that --fresh would stumble over
        holder.send_signal(signal.SIGKILL)
        assert train(config, SingleProcess()).reason == "done"
    finally:
        holder.kill()
        holder.wait()


def test_the_lock_is_let_go_of_at_the_end_and_on_a_file_system_without_locks_not_missed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none(*_: object) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr("fcntl.lockf", none)
    with RunLock(tmp_path) as lock:
        assert lock.acquire() == ""


@pytest.mark.multiprocess
def test_a_folder_that_one_rank_does_not_share_is_named_with_the_rank(digits: Path, tmp_path: Path) -> None:
    """Rank 1 has another folder under the same name: a mount of its own, where the machine allows one."""
    storage = tmp_path / "runs"
    storage.mkdir()
    arguments = [f"data.path={digits}", f"run.storage={storage}", "cluster.workers=2", "reporting.tensorboard=false"]
    with_own_mount = ["unshare", "--mount", "--map-root-user", "bash", "-c"]
    if subprocess.run([*with_own_mount, f"mount -t tmpfs none {storage}"], capture_output=True).returncode:
        if os.environ.get("CI"):
            pytest.fail("unshare --mount is not possible here")
        pytest.skip("unshare --mount is not possible here")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    ranks = []
    for rank in range(2):
        train_it = [sys.executable, "-m", "vaegan_dist.cli", "train", "--preset", "smoke", "--runtime", "local"]
        command = [*train_it, *arguments]
        if rank == 1:
            command = [*with_own_mount, f"mount -t tmpfs none {storage} && exec {' '.join(command)}"]
        group = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
        env = {**os.environ, **group, "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
        ranks.append(subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, env=env))
    for process in ranks:
        _, error = process.communicate(timeout=120)
        assert process.returncode == 2
        line = next(line for line in error.splitlines() if line.startswith("error: "))
        assert f"run.storage={storage}: rank 1 on {socket.gethostname()} does not see" in line
        assert "choose a folder that all nodes share" in line
    assert not list((storage / "smoke").glob(".probe-*"))


def test_a_read_only_storage_is_named_by_its_key(digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def read_only(*_: object, **__: object) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(Path, "mkdir", read_only)
    with pytest.raises(ConfigError, match=r"run\.storage=.*: rank 0 on .* cannot write .*Read-only file system"):
        train(config_of(digits, tmp_path / "runs"), SingleProcess())


HANG = """
import sys, time
import vaegan_dist.training.step as step
original = step.Step.__call__
def hang(self, images):
    original(self, images)
    if self.state.progress.images_seen >= 640:
        {how}
step.Step.__call__ = hang
from vaegan_dist.cli import main
sys.exit(main(sys.argv[1:]))
"""


def test_a_hung_rank_shows_its_stacks_and_ends(digits: Path, tmp_path: Path) -> None:
    arguments = [f"data.path={digits}", f"run.storage={tmp_path}", "reporting.tensorboard=false"]
    program = [sys.executable, "-c", HANG.format(how="time.sleep(600)")]
    done = subprocess.run(
        [*program, "train", "--preset", "smoke", "--runtime", "local", "cluster.step_timeout_seconds=8", *arguments],
        capture_output=True,
        text=True,
        timeout=200,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 1
    line = next(line for line in done.stderr.splitlines() if line.startswith("error: "))
    assert "rank 0 on" in line and "no step for 8 s" in line and "after 640 images, while training, in hang" in line
    assert 'File "<string>", line 8 in hang' in done.stderr and "checkpoint-writer" not in line


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), MemoryError()])
def test_out_of_memory_names_the_setting_that_helps(
    error: Exception, digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def burst(*_: object) -> None:
        raise error

    monkeypatch.setattr(Step, "__call__", burst)
    with pytest.raises(VaeganError, match=r"out of memory on cpu with 64 .*gradient_accumulation_steps=2: 32 at once"):
        train(config_of(digits, tmp_path), SingleProcess())
    monkeypatch.undo()
    # The advice can be followed: the setting may change on resume.
    assert train_local(config_of(digits, tmp_path, "training.gradient_accumulation_steps=2"), lambda _: None)
