"""TensorBoard read back by its own reader; trackers that fail without harm."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from vaegan_dist.reporting.records import Record
from vaegan_dist.reporting.sinks import Fanout, Guarded, TensorBoard


class Recorder:
    """A sink that remembers, and fails when told to."""

    def __init__(self) -> None:
        self.seen: list[object] = []
        self.broken = False
        self.calls = 0

    def log(self, record: Record) -> None:
        self._take(record)

    def pictures(self, name: str, image: Image.Image, images_seen: int) -> None:
        self._take((name, images_seen))

    def histogram(self, name: str, values: Any, images_seen: int) -> None:
        self._take((name, images_seen))

    def close(self) -> None:
        self._take("closed")

    def _take(self, what: object) -> None:
        self.calls += 1
        if self.broken:
            raise ConnectionError("tracker.example refused\nsecond line")
        self.seen.append(what)


def read_back(folder: Path) -> Any:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return EventAccumulator(str(folder), size_guidance={"images": 0, "scalars": 0, "tensors": 0}).Reload()


def test_tensorboard_has_the_same_values_on_the_same_axis_after_a_restart(tmp_path: Path) -> None:
    image = Image.fromarray(np.arange(48, dtype=np.uint8).reshape(4, 4, 3))
    first = TensorBoard(tmp_path)
    for images in (100, 200, 300, 400):
        first.log(
            {"event": "train", "phase": "a", "images_seen": images, "total_images": 900, "loss_rec": float(images)}
        )
        first.pictures("samples", image, images)
    # Not closed: the process was killed after the checkpoint at 200.
    second = TensorBoard(tmp_path, resume_at=200)
    for images in (300, 500):
        row: Record = {
            "event": "train",
            "images_seen": images,
            "loss_rec": images + 0.5,
            "lr_encoder": 1e-3,
            "loss_adv": None,
        }
        second.log(row)
        second.pictures("samples", image, images)
    second.log({"event": "train", "images_seen": 600, "loss_rec": math.nan})
    second.log({"event": "checkpoint", "images_seen": 600, "path": "p", "seconds": 1.0})
    second.log({"event": "warning", "images_seen": 600, "message": "look"})
    second.close()
    first.close()

    events = read_back(tmp_path)
    points = [(event.step, event.value) for event in events.Scalars("reconstruction/loss_rec")]
    assert points[:-1] == [(100, 100.0), (200, 200.0), (300, 300.5), (500, 500.5)]
    assert points[-1][0] == 600 and math.isnan(points[-1][1])
    assert set(events.Tags()["scalars"]) == {"reconstruction/loss_rec", "learning_rate/lr_encoder"}
    pictures = events.Images("samples")
    assert [event.step for event in pictures] == [100, 200, 300, 500]
    import io

    assert np.array_equal(np.asarray(Image.open(io.BytesIO(pictures[-1].encoded_image_string))), np.asarray(image))
    assert any("warning" in tag for tag in events.Tags()["tensors"])


def test_tensorboard_of_a_new_run_hides_the_one_before(tmp_path: Path) -> None:
    for value in (1.0, 2.0):
        sink = TensorBoard(tmp_path)
        sink.log({"event": "train", "images_seen": 10, "loss_rec": value})
        sink.close()
    assert [event.value for event in read_back(tmp_path).Scalars("reconstruction/loss_rec")] == [2.0]


def test_a_failing_tracker_warns_once_and_is_switched_off() -> None:
    tracker, lines = Recorder(), []
    guarded = Guarded(tracker, name="MLflow", failures=3, warn=lines.append)
    guarded.log({"images_seen": 1})
    tracker.broken = True
    for images in (2, 3):
        guarded.log({"images_seen": images})
    tracker.broken = False
    guarded.log({"images_seen": 4})
    assert len(lines) == 1
    assert lines[0].startswith("MLflow failed (ConnectionError: tracker.example refused)") and "\n" not in lines[0]
    assert tracker.seen == [{"images_seen": 1}, {"images_seen": 4}]

    tracker.broken = True
    image = Image.new("L", (1, 1))
    for _ in range(10):
        guarded.pictures("samples", image, 5)
    guarded.close()
    assert tracker.calls == 4 + 3, "a sink that is switched off is called no more"
    assert not guarded.active
    assert len(lines) == 2 and "switched off after 3 failures" in lines[1]


def test_a_guard_lets_an_interrupt_through() -> None:
    class Interrupted(Recorder):
        def log(self, record: Record) -> None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Guarded(Interrupted()).log({})


def test_fanout_reaches_every_sink_and_does_not_hide_an_error() -> None:
    sinks = [Recorder(), Recorder(), Recorder()]
    sinks[0].broken = True
    with pytest.raises(ConnectionError), Fanout(sinks) as fanout:
        with pytest.raises(ConnectionError):
            fanout.log({"images_seen": 1})
        with pytest.raises(ConnectionError):
            fanout.pictures("samples", Image.new("L", (1, 1)), 1)
    for sink in sinks[1:]:
        assert sink.seen == [{"images_seen": 1}, ("samples", 1), "closed"]
