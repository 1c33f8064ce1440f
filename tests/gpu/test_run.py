"""Whole runs on a GPU: the loop, checkpoints, restarts, and what a user does with the model."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.training.runs import config_of, rows_of, tensors_of
from vaegan_dist.config import Config
from vaegan_dist.errors import VaeganError
from vaegan_dist.training.loop import train
from vaegan_dist.training.resume import run_folder
from vaegan_dist.training.runtime import SingleProcess

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
CUDA = torch.device("cuda", 0)
LONGER = (
    "phases=[{name: vae, objective: vae, images: 1280}, {name: joint, objective: vaegan, images: 2560}]",
    "checkpoint.images=1280",
)


class AskedToStop(SingleProcess):
    """Asks to stop at the first occasion."""

    def stop_requested(self) -> bool:
        return True


def ended(config: Config, runtime: SingleProcess | None = None) -> str:
    return train(config, runtime or SingleProcess(CUDA)).reason


def test_a_stopped_run_goes_on_where_it_was(digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    calm, stopped = (config_of(digits, tmp_path, *LONGER, f"run.name={name}") for name in ("calm", "stopped"))
    assert ended(calm) == "done"
    for _ in range(3):
        assert ended(stopped, AskedToStop(CUDA)) == "stopped"
    assert ended(stopped) == "done"
    one, other = tensors_of(run_folder(calm)), tensors_of(run_folder(stopped))
    assert one.keys() == other.keys()
    for name, value in one.items():
        a, b = (torch.frombuffer(bytearray(bits), dtype=torch.float32) for bits in (value, other[name]))
        torch.testing.assert_close(b, a, rtol=1e-3, atol=1e-5, msg=lambda text, at=name: f"{at}: {text}")
    assert [row["images_seen"] for row in rows_of(run_folder(calm), "train")] == [
        row["images_seen"] for row in rows_of(run_folder(stopped), "train")
    ]


def test_memory_that_runs_out_is_one_line_with_a_remedy(digits: Path, tmp_path: Path) -> None:
    config = config_of(digits, tmp_path, *LONGER, "model.hidden=[4096, 4096]")
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(0.0005)
    try:
        with pytest.raises(VaeganError, match=r"memory.*gradient_accumulation_steps"):
            ended(config)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def test_from_pictures_to_an_export(digits: Path, tmp_path: Path) -> None:
    """The commands of the README, with a GPU."""

    def run(*arguments: str) -> str:
        command = [sys.executable, "-m", "vaegan_dist.cli", *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=280)
        assert done.returncode == 0, done.stderr[-2000:]
        return done.stdout

    settings = (f"--storage={tmp_path}", f"--data={digits}", "cluster.gpus_per_worker=1", "reporting.metrics_port=0")
    often = ("evaluation.images=2560", "evaluation.samples=256", "evaluation.features=none")
    run("train", "--preset", "smoke", "--runtime", "local", *settings, *often)
    rows = [json.loads(line) for line in (tmp_path / "smoke/history.jsonl").read_text().splitlines()]
    assert rows[-1]["event"] == "end" and rows[-1]["reason"] == "done"
    assert any(row["event"] == "evaluation" for row in rows)
    run("evaluate", str(tmp_path / "smoke"), "--samples", "256", "--features", "none", "--gpus")
    run("sample", str(tmp_path / "smoke"), "--count", "16", "--output", str(tmp_path / "samples.png"))
    run("encode", str(tmp_path / "smoke"), str(tmp_path / "latents"), "--gpus")
    run("export", str(tmp_path / "smoke"), str(tmp_path / "exported"), "--format", "safetensors")
    assert (tmp_path / "exported" / "model.safetensors").is_file()
