"""Checkpoints beside training: the step goes on, failures are said and tried again, retention keeps what it should."""

import errno
import threading
from pathlib import Path

import pytest

from tests.training.runs import config_of, rows_of, tensors_in, tensors_of
from vaegan_dist.errors import VaeganError
from vaegan_dist.training import saver
from vaegan_dist.training.checkpoint import checkpoints, folder_name, images_of, newest_whole
from vaegan_dist.training.commit import prune, write_checkpoint
from vaegan_dist.training.loop import train
from vaegan_dist.training.meter import Agreement
from vaegan_dist.training.resume import run_folder
from vaegan_dist.training.runtime import SingleProcess
from vaegan_dist.training.snapshot import Snapshot
from vaegan_dist.training.step import Step

TIMEOUT = 120


def counts(folder: Path) -> list[int]:
    return [images_of(path) for path in checkpoints(folder)]


def failing(times: int, error: Exception) -> object:
    """`write_checkpoint` that fails the first `times` times."""
    left = [times]

    def write(snapshot: Snapshot, folder: Path) -> Path:
        if left[0] > 0:
            left[0] -= 1
            raise error
        return write_checkpoint(snapshot, folder)

    return write


def test_training_goes_on_while_a_checkpoint_is_written(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The write waits for a step that comes after it: with a write in the step's way this would never end."""
    later = threading.Event()
    original = Step.__call__

    def call(step: Step, images: object) -> None:
        original(step, images)  # type: ignore[arg-type]
        if step.state.progress.images_seen >= 64 * 14:
            later.set()

    def write(snapshot: Snapshot, folder: Path) -> Path:
        assert later.wait(TIMEOUT)
        return write_checkpoint(snapshot, folder)

    monkeypatch.setattr(Step, "__call__", call)
    monkeypatch.setattr(saver, "write_checkpoint", write)
    config = config_of(digits, tmp_path, "checkpoint.images=640", "checkpoint.keep_last=9")
    assert train(config, SingleProcess()).reason == "done"
    # What was written late is what stood at its image: the same as from a run that wrote at once.
    monkeypatch.undo()
    at_once = config_of(digits, tmp_path, "checkpoint.images=640", "checkpoint.keep_last=9", "run.name=at-once")
    assert train(at_once, SingleProcess()).reason == "done"
    one, other = run_folder(config), run_folder(at_once)
    assert counts(one) == counts(other) == [2560, 1920, 1536, 1280, 1024, 640]
    for path in checkpoints(one):
        assert tensors_in(path) == tensors_in(other / path.name), path
    assert rows_of(one) == rows_of(other)


def test_a_write_that_fails_once_is_said_and_tried_again(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Agreement, "INTERVAL_SECONDS", 0.0)
    monkeypatch.setattr(saver, "write_checkpoint", failing(1, OSError(errno.EIO, "Input/output error")))
    runtime = SingleProcess()
    config = config_of(digits, tmp_path, "checkpoint.retry_seconds=0")
    assert train(config, runtime).reason == "done"
    (warning,) = [str(r["message"]) for r in runtime.records if r["event"] == "warning"]
    assert "Input/output error" in warning and "attempt 1 of 5" in warning and "trying again" in warning
    assert 1024 in counts(run_folder(config))


def test_a_write_that_keeps_failing_ends_the_run_with_what_to_do(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(saver, "write_checkpoint", failing(5, OSError(errno.ENOSPC, "No space left on device")))
    config = config_of(digits, tmp_path, "checkpoint.retry_seconds=0")
    with pytest.raises(VaeganError) as caught:
        train(config, SingleProcess())
    line = str(caught.value)
    for part in ("No space left on device", "MiB free", "make room", "attempt 5 of 5", str(run_folder(config))):
        assert part in line
    assert "\n" not in line and not counts(run_folder(config))
    monkeypatch.undo()
    assert train(config, SingleProcess()).reason == "done"


def test_a_storage_that_does_not_answer_fails_after_its_time(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    release = threading.Event()
    monkeypatch.setattr(saver, "write_checkpoint", lambda snapshot, folder: release.wait(TIMEOUT))
    config = config_of(digits, tmp_path, "checkpoint.write_timeout_seconds=1")
    with pytest.raises(VaeganError, match=r"under way for 1 s .*checkpoint\.write_timeout_seconds"):
        train(config, SingleProcess())
    release.set()


def test_retention_keeps_the_last_the_milestones_and_the_ends_of_phases(digits: Path, tmp_path: Path) -> None:
    config = config_of(digits, tmp_path, "checkpoint.images=192", "checkpoint.keep_every_images=1000")
    assert train(config, SingleProcess()).reason == "done"
    # ends of phases 1024, 1536, 2560; first at or after 1000 and 2000: 1024, 2112; the last two: 2496, 2560
    assert counts(run_folder(config)) == [2560, 2496, 2112, 1536, 1024]


def test_a_damaged_checkpoint_is_not_kept_in_place_of_whole_ones(digits: Path, tmp_path: Path) -> None:
    config = config_of(digits, tmp_path, "checkpoint.images=640", "checkpoint.keep_last=1")
    assert train(config, SingleProcess()).reason == "done"
    folder = run_folder(config)
    newest = checkpoints(folder)[0]
    (newest / "state.json").write_text("{")
    whole = tensors_of(folder)
    # Shorter intervals: the checkpoints that follow have smaller numbers than the damaged one.
    assert train(config_of(digits, tmp_path, "checkpoint.images=64", "checkpoint.keep_last=1"), SingleProcess())
    assert (folder / f"damaged-{newest.name}").is_dir()
    found, complaints = newest_whole(folder)
    assert found is not None and found.path == newest and not complaints
    assert tensors_of(folder) == whole


def test_what_an_interrupted_write_left_is_removed_at_the_next_start(digits: Path, tmp_path: Path) -> None:
    config = config_of(digits, tmp_path)
    left = run_folder(config) / ".checkpoint-000000000640.partial"
    left.mkdir(parents=True)
    (left / "model.safetensors").write_bytes(b"half")
    assert train(config, SingleProcess()).reason == "done"
    assert not left.exists()


def test_prune_removes_the_seal_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for images in (1, 2, 3):
        folder = tmp_path / folder_name(images)
        folder.mkdir()
        for name in ("model.safetensors", "state.json", "checkpoint.json"):
            (folder / name).write_text("{}")
    monkeypatch.setattr("shutil.rmtree", lambda *_, **__: None)  # the process dies right after the seal
    prune(tmp_path, keep_last=1)
    assert [(path / "checkpoint.json").exists() for path in checkpoints(tmp_path)] == [True, False, False]
