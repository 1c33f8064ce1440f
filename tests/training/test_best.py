"""The best checkpoint: kept, named, known after a restart, and none where a number is no number."""

import json
import math
from pathlib import Path

import pytest
import torch

from tests.training.runs import config_of
from vaegan_dist.data.loader import Position
from vaegan_dist.errors import ConfigError
from vaegan_dist.models import ImageShape
from vaegan_dist.training.best import POINTER, best_checkpoint
from vaegan_dist.training.checkpoint import checkpoints, images_of
from vaegan_dist.training.keeper import Keeper
from vaegan_dist.training.runtime import SingleProcess
from vaegan_dist.training.saver import Verdict
from vaegan_dist.training.snapshot import Interval
from vaegan_dist.training.state import TrainState, create_state

SMALL = ("model.hidden=[8]", "model.discriminator_hidden=[8]", "checkpoint.keep_last=2")


def state_and_keeper(digits: Path, folder: Path, *overrides: str) -> tuple[TrainState, Keeper]:
    folder.mkdir(exist_ok=True)
    config = config_of(digits, folder.parent, *SMALL, *overrides)
    state = create_state(config, ImageShape(channels=1, height=8, width=8), torch.device("cpu"), torch.float32)
    return state, Keeper(config, folder, SingleProcess())


def save(state: TrainState, keeper: Keeper, images: int) -> None:
    """A checkpoint at an image count, waited for."""
    state.advance(images - state.progress.images_seen, Position(0, images))
    row = {"event": "checkpoint", "images_seen": images}
    keeper.begin(state, row, data={}, interval=Interval((), 0, [[]], 0.0), watch={})
    keeper.saver.wait(60)
    assert keeper.verdict() is Verdict.STANDS
    keeper.settle(Verdict.STANDS)


@pytest.mark.parametrize(("mode", "best"), [("min", 128), ("max", 192)])
def test_the_best_is_kept_and_known_after_a_restart(mode: str, best: int, digits: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    settings = ("checkpoint.best_metric=fid", f"checkpoint.best_mode={mode}")
    state, keeper = state_and_keeper(digits, folder, *settings)
    values = {64: 5.0, 128: 3.0, 192: 7.0, 256: math.nan, 320: None, 384: 3.0, 448: 7.0}
    news = []
    for images, value in values.items():
        news.append(keeper.note_metric(images, {"fid": value, "psnr": 1.0}))
        save(state, keeper, images)
    assert news == ([True, True, False] if mode == "min" else [True, False, True]) + [False] * 4  # a tie is no news
    assert [images_of(path) for path in checkpoints(folder)] == [448, 384, best]
    named = json.loads((folder / POINTER).read_text())
    assert named == {
        "metric": "fid",
        "value": values[best],
        "images_seen": best,
        "checkpoint": f"checkpoint-{best:012d}",
    }
    assert best_checkpoint(folder) == folder / named["checkpoint"]

    state, keeper = state_and_keeper(digits, folder, *settings)
    found, _ = keeper.newest()
    assert found is not None and found.progress.images_seen == 448
    keeper.restore(state, found)
    assert not keeper.note_metric(512, {"fid": 5.0})
    save(state, keeper, 512)
    assert best_checkpoint(folder) == folder / f"checkpoint-{best:012d}"
    assert keeper.note_metric(576, {"fid": -1.0 if mode == "min" else 99.0})


def test_another_metric_begins_anew_and_none_keeps_none(digits: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    state, keeper = state_and_keeper(digits, folder, "checkpoint.best_metric=fid")
    assert keeper.note_metric(64, {"fid": 1.0})
    save(state, keeper, 64)
    state, keeper = state_and_keeper(digits, folder, "checkpoint.best_metric=mse")
    keeper.newest()
    with pytest.raises(ConfigError, match=r"checkpoint\.best_metric=mse: the evaluation has no such metric; .* fid"):
        keeper.note_metric(128, {"fid": 2.0})
    assert keeper.note_metric(128, {"mse": 2.0})
    _, keeper = state_and_keeper(digits, folder)
    assert not keeper.note_metric(128, {"mse": 1.0})
