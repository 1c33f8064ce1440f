"""The whole evaluation: the same numbers from one, two and three ranks, with the files that it promises."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from vaegan_dist.cli import main
from vaegan_dist.cluster.fan_out import fan_out_local
from vaegan_dist.use.assess import Task, assess_task, complete

SHEETS = ("samples", "reconstructions", "interpolations", "traversals", "neighbours", "rate_distortion")


def numbers(report: Any, prefix: str = "") -> dict[str, float]:
    if isinstance(report, dict):
        return {name: value for key, part in report.items() for name, value in numbers(part, f"{prefix}.{key}").items()}
    if isinstance(report, list):
        return {name: value for i, part in enumerate(report) for name, value in numbers(part, f"{prefix}.{i}").items()}
    return {prefix: float(report)} if isinstance(report, int | float) else {}


@pytest.mark.multiprocess
def test_one_two_and_three_ranks_find_the_same(
    run: Path, digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vaegan_dist.evaluation.classifier.IMAGES", 6000)
    task = Task(model=str(run), data=str(digits), samples=250, batch_size=64, output=str(tmp_path / "1"))
    reports = {}
    for workers in (1, 2, 3):  # the first one keeps the classifier for the others
        arguments = replace(task, output=str(tmp_path / str(workers))).to_json()
        report = fan_out_local(assess_task, arguments, workers=workers, gpus=False, tell=lambda count: None)
        assert report is not None
        reports[workers] = numbers(report)
        assert json.loads((tmp_path / str(workers) / "evaluation.json").read_text()) == report
    assert len(reports[1]) > 60 and {".generation.fid", ".features.fid_floor", ".latent.mig"} <= set(reports[1])
    assert reports[2] == pytest.approx(reports[1], rel=1e-5, abs=1e-7)
    assert reports[3] == pytest.approx(reports[1], rel=1e-5, abs=1e-7)
    for name in SHEETS:
        assert (tmp_path / "1" / f"{name}.png").stat().st_size > 1000
    samples = [(tmp_path / str(workers) / "samples.png").read_bytes() for workers in (1, 2, 3)]
    assert samples[0] == samples[1] == samples[2]


def test_the_command_writes_beside_the_run_and_shows_what_fid_is_of(
    run: Path, digits: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vaegan_dist.evaluation.classifier.IMAGES", 6000)
    assert main(["evaluate", str(run), "--samples", "100"]) == 0
    said = capsys.readouterr().out
    assert "FID by classifier" in said and "real against" in said and "100 samples" in said
    folder = Path(complete(Task(model=str(run))).output)
    assert folder == run / "evaluations" / "000000002560-ema"
    report = json.loads((folder / "evaluation.json").read_text())
    assert report["features"]["network"] == "classifier" and len(report["features"]["hash"]) == 16
    assert report["features"]["fid_floor"] > 0 and report["generation"]["samples"] == 100
    assert "active units" in (folder / "evaluation.txt").read_text()


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--features", "inceptoin"], "no such network"),
        (["--samples", "0"], "--samples=0"),
        (["--split", "nonsense"], "nonsense"),
        (["--data", "absent"], "absent"),
        (["--lpips", "absent.pth"], "--lpips"),
    ],
)
def test_mistakes_are_one_line(run: Path, words: list[str], named: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", str(run), *words]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and named in error and error.count("\n") == 1


def test_without_a_feature_network_the_rest_is_measured(run: Path, tmp_path: Path) -> None:
    words = ["evaluate", str(run), "--features", "none", "--samples", "64", "--output", str(tmp_path)]
    assert main(words) == 0
    report = json.loads((tmp_path / "evaluation.json").read_text())
    assert "features" not in report and "fid" not in report["generation"]
    assert report["reconstruction"]["psnr"] > 5 and report["likelihood"]["importance_bound"] is not None
    assert "features=none" in report["missing"]["fid"]
