"""A checkpoint's commit, killed and failed at every one of its system calls: a whole newest one always stands."""

import os
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.chaos.commit_target import FAILED, snapshot_at
from vaegan_dist.training.checkpoint import checkpoints, newest_whole
from vaegan_dist.training.commit import clean, write_checkpoint

CALLS = "mkdir,openat,write,pwrite64,ftruncate,fallocate,fsync,fdatasync,rename,unlink,unlinkat,rmdir,newfstatat,close"
# Those whose failure has a meaning.
FAILING = "mkdir,openat,write,pwrite64,ftruncate,fallocate,fsync,fdatasync,rename,unlink,unlinkat,rmdir"
CI_STRIDE = 5


@pytest.fixture(scope="module")
def strace() -> str:
    found = shutil.which("strace")
    if found is None:
        message = "strace is not installed (apt-get install strace)"
        if os.environ.get("CI"):
            pytest.fail(message)
        pytest.skip(message)
    return found


class Target:
    """The process that forks writers, and a tracer for each."""

    def __init__(self, strace: str, folder: Path) -> None:
        self.strace, self.folder = strace, folder
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.chaos.commit_target"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parents[2],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )

    def attempt(self, name: str, *options: str) -> tuple[int, Path, str]:
        """Exit code of a traced write, its folder, and the trace."""
        folder = self.folder / name
        folder.mkdir()
        log = self.folder / f"{name}.log"
        pid = self._ask(str(folder))
        tracer = subprocess.Popen([self.strace, "-o", str(log), *options, "-p", pid], stderr=subprocess.PIPE, text=True)
        assert tracer.stderr is not None
        told = tracer.stderr.readline()  # "attached": from here on calls are counted
        if "attached" not in told:
            self._ask("go")
            pytest.skip(f"strace cannot attach here: {told.strip()}")
        code = int(self._ask("go"))
        tracer.communicate(timeout=60)
        return code, folder, log.read_text()

    def _ask(self, line: str) -> str:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()
        return self.process.stdout.readline().strip()

    def close(self) -> None:
        self.process.communicate(timeout=60)


@pytest.fixture(scope="module")
def target(strace: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Target]:
    started = Target(strace, tmp_path_factory.mktemp("commit"))
    yield started
    started.close()


@pytest.fixture(scope="module")
def calls(target: Target) -> Counter[str]:
    """How often a commit makes each system call."""
    code, _, trace = target.attempt("calm", "-e", f"trace={CALLS}")
    assert code == 0
    made = Counter(line.split("(")[0] for line in trace.splitlines() if "(" in line)
    assert made["rename"] == 1 and made["fsync"] >= 7
    return made


def check(folder: Path) -> int:
    """A whole checkpoint stands, the next start puts the folder in order, and the next write succeeds."""
    found, broken = newest_whole(folder)
    assert found is not None, "no whole checkpoint is left"
    images = found.progress.images_seen
    assert images in (64, 128) and (images == 128 or not broken)
    clean(folder, list(broken))
    assert write_checkpoint(snapshot_at(192), folder) == checkpoints(folder)[0]
    assert not list(folder.glob(".checkpoint-*"))
    again, complaints = newest_whole(folder)
    assert again is not None and again.progress.images_seen == 192 and not complaints
    return images


def stride(every: bool) -> int:
    return 1 if every else CI_STRIDE


@pytest.mark.parametrize("every", [False, pytest.param(True, marks=pytest.mark.chaos)], ids=["some", "every"])
@pytest.mark.timeout(1800)
def test_a_kill_at_any_call_leaves_a_whole_checkpoint(every: bool, target: Target, calls: Counter[str]) -> None:
    ends, tried = Counter[int](), 0
    for call, times in calls.items():
        for k in range(1, times + 1, stride(every)):
            name = f"kill-{every}-{call}-{k}"
            options = ("-e", f"trace={CALLS}", "-e", f"inject={call}:signal=SIGKILL:when={k}")
            code, folder, _ = target.attempt(name, *options)
            assert code == -9, f"{name} ended with {code}"
            ends[check(folder)] += 1
            tried += 1
            shutil.rmtree(folder)
    print(f"killed at {tried} calls: {dict(ends)}")
    assert ends[64] and ends[128], "the kills did not straddle the commit"


@pytest.mark.parametrize("every", [False, pytest.param(True, marks=pytest.mark.chaos)], ids=["some", "every"])
@pytest.mark.parametrize("error", ["ENOSPC", "EIO"])
@pytest.mark.timeout(1800)
def test_an_error_at_any_call_is_raised_and_leaves_a_whole_checkpoint(
    error: str, every: bool, target: Target, calls: Counter[str]
) -> None:
    ends, tried, silent = Counter[int](), 0, []
    for call, times in calls.items():
        if call not in FAILING.split(","):
            continue
        for k in range(1, times + 1, stride(every)):
            name = f"{error}-{every}-{call}-{k}"
            options = ("-e", f"trace={CALLS}", "-e", f"inject={call}:error={error}:when={k}")
            code, folder, trace = target.attempt(name, *options)
            assert code in (0, FAILED), f"{name} ended with {code}"
            if check(folder) == 64 and code == 0:
                silent.append(name + next(line for line in trace.splitlines() if "INJECTED" in line))
            ends[code] += 1
            tried += 1
            shutil.rmtree(folder)
    print(f"{error} at {tried} calls: {dict(ends)}")
    assert not silent, "a write that failed passed for one that succeeded"
    assert ends[FAILED]
