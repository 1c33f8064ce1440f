"""What layers and objectives remember from step to step passes through a checkpoint, to the bit."""

from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.training.runs import config_of, rows_of, tensors_of
from tests.training.test_resume import StopsAfter
from vaegan_dist.training.checkpoint import checkpoints
from vaegan_dist.training.loop import train
from vaegan_dist.training.meter import Agreement
from vaegan_dist.training.resume import run_folder
from vaegan_dist.training.runtime import SingleProcess

SETTINGS = (
    "phases=[{name: joint, objective: vaegan, images: 1024}]",
    "model.discriminator_norm=spectral",
    "objective.lecam=0.3",
    "objective.equilibrium=0.68",
    "objective.equilibrium_margin=0.1",
    "objective.diff_augment=[translation]",
)


def test_a_stopped_run_remembers(digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Agreement, "INTERVAL_SECONDS", 0.0)
    whole, stopped = (config_of(digits, tmp_path / name, *SETTINGS) for name in ("whole", "stopped"))
    assert train(whole, SingleProcess()).reason == "done"
    assert train(stopped, StopsAfter(6)).reason == "stopped"
    held = load_file(checkpoints(run_folder(stopped))[0] / "optimizer.safetensors")["memory/lecam"]
    assert float(held[2]) == pytest.approx(1 - 0.99**7), "seven steps are behind it"
    assert train(stopped, SingleProcess()).reason == "done"
    assert tensors_of(run_folder(stopped)) == tensors_of(run_folder(whole))
    assert rows_of(run_folder(stopped), "train") == rows_of(run_folder(whole), "train")
