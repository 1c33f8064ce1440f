"""The command line without Ray: what it makes, what it says, and how it ends when a rank dies."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import torch
from PIL import Image

import vaegan_dist
from vaegan_dist.cli import main

TIMEOUT = 240


def command(digits: Path, storage: Path, *more: str) -> list[str]:
    return ["train", "--preset", "smoke", "--data", str(digits), "--storage", str(storage), "--runtime", "local", *more]


@pytest.mark.multiprocess
def test_a_run_makes_what_it_says(digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(command(digits, tmp_path, "--workers", "2")) == 0
    said = capsys.readouterr().out
    folder = tmp_path / "smoke"
    made = ("samples.png", "reconstructions.png", "curves.png", "history.jsonl", "checkpoint-000000002560")
    for name in made:
        assert str(folder / name) in said and (folder / name).exists()
    assert "python jobs/train.py --preset smoke" in said
    for name in ("samples.png", "reconstructions.png"):
        assert Image.open(folder / name).width > 100
    assert len(list((folder / "pictures").glob("samples-*-vae.png"))) == 1
    rows = [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]
    assert [row["event"] for row in rows if row["event"] in ("phase", "end")] == ["phase"] * 3 + ["end"]
    joint = [row for row in rows if row["event"] == "train" and row["phase"] == "joint"][-1]
    assert {"loss_rec", "loss_kl", "loss_adv", "loss_disc", "images_per_second", "lr_discriminator"} <= joint.keys()

    assert main(command(digits, tmp_path, "--workers", "2")) == 0
    assert "was finished before" in capsys.readouterr().out
    assert main(command(digits, tmp_path, "--fresh")) == 2
    assert "choose another run.name" in capsys.readouterr().err

    for action in ("sample", "reconstruct"):
        picture = tmp_path / f"{action}.png"
        assert main([action, str(folder), "--output", str(picture), "--count", "4"]) == 0
        assert Image.open(picture).width > 50
    assert main(["sample", str(tmp_path / "nothing"), "--output", str(tmp_path / "x.png")]) == 2


def test_a_sample_does_not_depend_on_how_many_are_asked_for(digits: Path, tmp_path: Path) -> None:
    assert main(command(digits, tmp_path)) == 0
    model = vaegan_dist.load(tmp_path / "smoke")
    few, many = (model.sample(count, seed=3) for count in (3, 9))
    torch.testing.assert_close(few, many[:3], atol=1e-5, rtol=0)  # a matrix product may round by the number of rows
    assert (model.sample(3, seed=4) != few).any()


WRONG_INPUTS = {
    "no data": (["--data", "/nowhere/at/all"], "/nowhere/at/all"),
    "no GPU": (["cluster.gpus_per_worker=1"], "cluster.gpus_per_worker"),
    "more images per step than there are": (["training.batch_size=100000", "data.streams=1"], "batch_size"),
    "no such file": (["--config", "/nowhere.yaml"], "/nowhere.yaml"),
    "no such preset": (["--preset", "seed-mpl"], "seed-mlp"),
}


@pytest.mark.parametrize("wrong", WRONG_INPUTS)
def test_a_wrong_input_is_one_line_and_exit_code_2(
    wrong: str, digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options, named = WRONG_INPUTS[wrong]
    assert main([*command(digits, tmp_path), *options]) == 2
    error = capsys.readouterr().err
    assert named in error and error.startswith("error: ") and error.count("\n") == 1


def test_dry_run_plans_and_trains_nothing(digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(command(digits, tmp_path, "--dry-run", "--workers", "4")) == 0
    plan = capsys.readouterr().out
    assert "64 streams, 16 for each of 4 workers; 20 steps of 64 per epoch" in plan
    assert (
        "1280 pictures of 28x28x1" in plan
        and "GFLOP per image" in plan
        and re.search(rf"encoder +{784 * 32 + 32 + 2 * (32 * 8 + 8):,} ", plan)
    )
    assert not list(tmp_path.iterdir())


@pytest.mark.multiprocess
@pytest.mark.parametrize("victim", ["rank 1", "the driver"])
def test_a_killed_process_leaves_none_behind_and_the_run_continues(victim: str, digits: Path, tmp_path: Path) -> None:
    arguments = command(digits, tmp_path, "--workers", "2", "phases.vae.images=1_000_000")
    driver = subprocess.Popen(
        [sys.executable, "-m", "vaegan_dist.cli", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    try:
        assert driver.stdout is not None
        for line in driver.stdout:
            if "checkpoint" in line:
                break
        ranks = [p for p in psutil.Process(driver.pid).children() if "spawn_main" in " ".join(p.cmdline())]
        assert len(ranks) == 2
        (ranks[1] if victim == "rank 1" else driver).send_signal(signal.SIGKILL)
        _, error = driver.communicate(timeout=TIMEOUT)
        assert not psutil.wait_procs(ranks, timeout=TIMEOUT)[1], "a rank outlived the run"
    finally:
        driver.kill()
    if victim == "rank 1":
        assert driver.returncode == 1
        assert "killed by SIGKILL" in error and "run the same command again" in error
    assert main([*arguments[:-1], "phases.vae.images=1_000_000", "--dry-run"]) == 0
    newest = max(path.name for path in (tmp_path / "smoke").glob("checkpoint-*"))
    assert int(newest.removeprefix("checkpoint-")) >= 1024
