"""What a trial reports and when, and copies of weights between trials; without Ray."""

from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from tests.training.runs import FILES, config_of, rows_of, tensors_in
from vaegan_dist.config import Config
from vaegan_dist.config_source import with_changes
from vaegan_dist.reporting.records import Record
from vaegan_dist.sweeps.ledger import Row
from vaegan_dist.sweeps.trial import WORST, Judged, Reporter, trial_config
from vaegan_dist.training.checkpoint import checkpoints, open_checkpoint
from vaegan_dist.training.graft import graft
from vaegan_dist.training.loop import train
from vaegan_dist.training.resume import run_folder
from vaegan_dist.training.runtime import SingleProcess

ROWS = [256, 512, 768, 1024]
JUDGED = Judged(("loss_rec",), ("min",), "train", 256)
QUICK = ("phases=[{name: joint, objective: vaegan, images: 1024}]", "reporting.sample_images=1024")


class Reporting(SingleProcess):
    """A runtime whose records go to a reporter, as in a trial."""

    def __init__(self, reporter: Reporter) -> None:
        super().__init__()
        self.reporter = reporter

    def publish(self, record: Record) -> None:
        super().publish(record)
        self.reporter.note(record)


class Driver:
    """Hears the rows; ends the trial at one of them."""

    def __init__(self, stop_at: int | None = None) -> None:
        self.heard: list[int] = []
        self.stood: list[bool] = []
        self.stop_at = stop_at

    def __call__(self, row: Row, checkpoint: Path | None) -> None:
        self.heard.append(int(row["images_seen"] or 0))
        self.stood.append(checkpoint is not None and open_checkpoint(checkpoint).progress.images_seen == self.heard[-1])
        if self.stop_at == self.heard[-1]:
            raise SystemExit


def trial_of(digits: Path, folder: Path, number: int, **params: Any) -> Config:
    return trial_config(config_of(digits, folder, *QUICK), folder, number, params, JUDGED)


def run(config: Config, driver: Driver, session: str = "a", known: int = 0) -> Reporter:
    reporter = Reporter(config, JUDGED, driver, session, known)
    reporter.replay()
    try:
        train(config, Reporting(reporter))
    except SystemExit:
        assert driver.stop_at is not None
    return reporter


def test_each_row_comes_once_its_checkpoint_stands(digits: Path, tmp_path: Path) -> None:
    config = trial_of(digits, tmp_path, 3)
    assert run_folder(config) == tmp_path / "trials" / "0003"
    driver = Driver()
    reporter = run(config, driver)
    assert driver.heard == ROWS and all(driver.stood)
    assert reporter.last()["images_seen"] == 1024
    history = [row for row in rows_of(run_folder(config), "train") if row["images_seen"] == 1024]
    assert reporter.last()["loss_rec"] == history[-1]["loss_rec"]


def test_a_stopped_trial_goes_on_where_it_was_and_tells_nothing_twice(digits: Path, tmp_path: Path) -> None:
    whole = trial_of(digits, tmp_path / "whole", 0)
    run(whole, Driver())
    config = trial_of(digits, tmp_path / "cut", 0)
    run(config, Driver(stop_at=512))
    again = Driver()
    run(config, again)
    assert again.heard == [768, 1024]
    assert tensors_in(checkpoints(run_folder(config))[0]) == tensors_in(checkpoints(run_folder(whole))[0])
    new = Driver()
    Reporter(config, JUDGED, new, "another driver", known=512).replay()
    assert new.heard == [768, 1024], "what the ledger of a driver that was killed lacks"


@pytest.mark.parametrize("mode", ["min", "max"])
def test_what_is_no_number_is_the_worst(mode: str) -> None:
    judged = Judged(("fid",), (mode,), "evaluation", 10)
    worst = WORST if mode == "min" else -WORST
    for value in (float("nan"), float("inf"), None):
        row = judged.row({"event": "evaluation", "images_seen": 5, "fid": value})
        assert row is not None and judged.score(row) == worst == judged.worst
    assert judged.row({"event": "train", "images_seen": 5, "fid": 1.0}) is None
    assert judged.row({"event": "evaluation", "images_seen": 5}) is None


def test_a_graft_has_the_donors_weights_and_its_own_values(digits: Path, tmp_path: Path) -> None:
    donor = trial_of(digits, tmp_path, 0)
    poor = trial_of(digits, tmp_path, 1, **{"run.seed": 7})
    run(donor, Driver(stop_at=512))
    run(poor, Driver(stop_at=768))
    source = checkpoints(run_folder(donor))[0]
    assert source.name == "checkpoint-000000000512"
    changed = with_changes(poor, {"run.seed": 0, "objective.beta": 7.0, "optimizer.learning_rate": 3e-4})
    grafted = graft(source, changed)
    assert checkpoints(run_folder(poor))[0] == grafted.path, "its own newer ones are gone"
    assert tensors_in(grafted.path) == tensors_in(source)
    assert grafted.config == changed and grafted.progress.images_seen == 512
    driver = Driver()
    reporter = Reporter(changed, JUDGED, driver, "a", 0)
    reporter.restart(512)
    train(changed, Reporting(reporter))
    assert driver.heard == [768, 1024]
    last = rows_of(run_folder(changed), "train")[-1]
    assert last["lr_decoder"] == pytest.approx(3e-4) and last["beta"] == 7.0
    assert {file: load_file(source / file).keys() for file in FILES}
