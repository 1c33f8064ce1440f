"""Evaluation while training: it changes no weight, is made up for after a stop, and finds the best checkpoint."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.training.runs import config_of, rows_of, tensors_of
from vaegan_dist.config import DataSection, EvaluationSection, ObjectiveSection
from vaegan_dist.evaluation.ranks import Ranks
from vaegan_dist.models import Decoder, Encoder, ImageShape
from vaegan_dist.training import evaluating
from vaegan_dist.training.evaluating import Evaluations, EvaluationStoppedError
from vaegan_dist.training.loop import train
from vaegan_dist.training.measure import Evaluator
from vaegan_dist.training.runtime import SingleProcess
from vaegan_dist.training.state import create_state

EVERY = ("evaluation.images=640", "evaluation.samples=64")


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(1)
    monkeypatch.setattr("vaegan_dist.evaluation.classifier.IMAGES", 3000)


def evaluations(folder: Path) -> list[dict[str, object]]:
    return [{k: v for k, v in row.items() if k != "evaluation_seconds"} for row in rows_of(folder, "evaluation")]


def test_the_weights_are_the_same_with_and_without(digits: Path, tmp_path: Path) -> None:
    train(config_of(digits, tmp_path / "with", *EVERY, "checkpoint.best_metric=fid"), SingleProcess())
    train(config_of(digits, tmp_path / "without"), SingleProcess())
    assert tensors_of(tmp_path / "with" / "smoke") == tensors_of(tmp_path / "without" / "smoke")
    rows = evaluations(tmp_path / "with" / "smoke")
    assert [row["images_seen"] for row in rows] == [640, 1024, 1280, 1536, 1920, 2560]
    wanted = {"fid", "kid", "precision", "psnr", "elbo", "active_units", "features", "features_hash", "fid_floor"}
    assert all(wanted <= set(row) for row in rows)
    terms = [list(rows_of(tmp_path / kind / "smoke", "train")) for kind in ("with", "without")]
    assert terms[0] == terms[1]
    best = json.loads((tmp_path / "with" / "smoke" / "best.json").read_text())
    lowest = min(rows, key=lambda row: float(str(row["fid"])))
    assert best["images_seen"] == lowest["images_seen"]
    assert (tmp_path / "with" / "smoke" / best["checkpoint"]).is_dir()


def test_a_stop_within_an_evaluation_is_quick_and_the_evaluation_is_made_up_for(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(config_of(digits, tmp_path / "straight", *EVERY), SingleProcess())
    runtime, run = SingleProcess(), Evaluations.run

    def stopped(self: Evaluations, state: object, alive: object) -> object:
        if state.progress.images_seen == 1024:  # type: ignore[attr-defined]
            runtime.stop = True
            monkeypatch.setattr(evaluating.Agreement, "INTERVAL_SECONDS", 0.0)  # the ranks meet at each pulse
        return run(self, state, alive)  # type: ignore[arg-type]

    monkeypatch.setattr(Evaluations, "run", stopped)
    config = config_of(digits, tmp_path / "stopped", *EVERY)
    outcome = train(config, runtime)
    assert outcome.reason == "stopped" and outcome.images_seen == 1024
    assert [row["images_seen"] for row in evaluations(tmp_path / "stopped" / "smoke")] == [640]
    monkeypatch.setattr(Evaluations, "run", run)
    assert train(config, SingleProcess()).reason == "done"
    assert evaluations(tmp_path / "stopped" / "smoke") == evaluations(tmp_path / "straight" / "smoke")
    assert tensors_of(tmp_path / "stopped" / "smoke") == tensors_of(tmp_path / "straight" / "smoke")


def test_the_watchdog_hears_of_it_and_every_pulse_may_stop(digits: Path, tmp_path: Path) -> None:
    config = config_of(digits, tmp_path, *EVERY)
    image = ImageShape(1, 28, 28)
    state = create_state(config, image, torch.device("cpu"), torch.float32)
    state.progress.images_seen = state.progress.phase_images = 640
    runtime = SingleProcess()
    evaluations = Evaluations(config, image, runtime)
    evaluations.open()
    heard: list[str] = []
    assert evaluations.due(state)
    row = evaluations.run(state, heard.append)
    assert len(heard) >= 4 and not evaluations.due(state)
    assert row["evaluation_samples"] == 64
    state.progress.evaluated = 0
    runtime.stop = True
    with pytest.raises(EvaluationStoppedError):
        evaluations.run(state, heard.append)
    assert evaluations.due(state)


class Same(Encoder):
    """z is the picture."""

    def moments(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x, torch.full_like(x, -30.0)


class SamePicture(Decoder):
    """The picture is z."""

    bounded = False

    def __init__(self, image: ImageShape) -> None:
        super().__init__((image.channels, image.height, image.width), image)
        self.weight = torch.nn.Parameter(torch.ones(()))

    def pre_image(self, z: Tensor) -> Tensor:
        return self.weight * z


def test_the_identity_reconstructs_with_an_rfid_of_zero(digits: Path) -> None:
    image = ImageShape(1, 28, 28)
    settings = EvaluationSection(samples=200)
    evaluator = Evaluator(
        DataSection(), str(digits), settings, image, batch_size=64, seed=0, ranks=Ranks(), alive=lambda: None
    )
    objective = ObjectiveSection(reconstruction="l2")
    report = evaluator.measure(Same((1, 28, 28)), SamePicture(image), objective, thorough=False, pulse=lambda: None)
    assert abs(report["reconstruction"]["rfid"]) < 1e-4 < report["features"]["fid_floor"]
    assert report["reconstruction"]["mse"] == 0 and report["reconstruction"]["psnr"] is None
    assert report["reconstruction"]["ssim"] == pytest.approx(1.0, abs=1e-5)
    assert report["generation"]["fid"] > 10 * report["features"]["fid_floor"], "noise is no digit"
