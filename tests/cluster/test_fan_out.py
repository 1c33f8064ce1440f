"""The same work on a Ray cluster as in plain processes, and a rank's explained failure as one line."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from vaegan_dist.cluster.fan_out import fan_out_local
from vaegan_dist.errors import InputError, VaeganError
from vaegan_dist.evaluation.ranks import Ranks

TIMEOUT = 500


def shares(arguments: dict, ranks: Ranks, tell) -> dict:  # type: ignore[no-untyped-def, type-arg]
    """Sum and order of what the ranks hold."""
    import torch

    mine = torch.cat([torch.tensor(list(part)) for part in ranks.steps(arguments["total"], 4)]).double()
    tell(len(mine))
    first = ranks.from_first(lambda: f"rank {ranks.rank}")
    return {"sum": float(ranks.sum(mine.sum())), "order": ranks.gather(mine).tolist(), "first": first}


def fails(arguments: dict, ranks: Ranks, tell) -> None:  # type: ignore[no-untyped-def, type-arg]
    if ranks.rank == 1:
        raise InputError("no such thing; choose another")
    ranks.from_first(lambda: 1)


def dies(arguments: dict, ranks: Ranks, tell) -> None:  # type: ignore[no-untyped-def, type-arg]
    if ranks.rank == 1:
        os.kill(os.getpid(), 9)
    ranks.from_first(lambda: 1)


@pytest.mark.multiprocess
@pytest.mark.parametrize("workers", [1, 3])
def test_every_number_once_and_in_order(workers: int) -> None:
    told: list[int] = []
    found = fan_out_local(shares, {"total": 11}, workers=workers, gpus=False, tell=told.append)
    assert found == {"sum": 55.0, "order": [float(number) for number in range(11)], "first": "rank 0"}
    assert sum(told) == 11 and len(told) == workers


@pytest.mark.multiprocess
def test_a_rank_that_fails_is_named_and_leaves_no_process() -> None:
    with pytest.raises(InputError, match=r"rank 1 on .*no such thing; choose another"):
        fan_out_local(fails, {}, workers=2, gpus=False, tell=lambda count: None)
    with pytest.raises(VaeganError, match=r"rank 1 .*SIGKILL"):
        fan_out_local(dies, {}, workers=2, gpus=False, tell=lambda count: None)


@pytest.fixture
def environment() -> Iterator[dict[str, str]]:
    """Variables for a driver whose Ray keeps its files, sockets and token to itself."""
    with tempfile.TemporaryDirectory(prefix="vg", dir="/tmp") as folder:
        kept = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
        yield {**kept, "RAY_TMPDIR": folder, "HOME": folder, "OMP_NUM_THREADS": "1"}


@pytest.mark.ray
@pytest.mark.chaos
@pytest.mark.timeout(600)
def test_ray_evaluates_as_plain_processes_do(environment: dict[str, str], digits: Path, tmp_path: Path) -> None:
    from tests.training.runs import config_of
    from vaegan_dist.cli import main
    from vaegan_dist.training.loop import train
    from vaegan_dist.training.runtime import SingleProcess

    train(config_of(digits, tmp_path, "phases=[{name: vae, objective: vae, images: 640}]"), SingleProcess())
    words = [str(tmp_path / "smoke"), "--features", "none", "--samples", "200"]
    job = Path(__file__).resolve().parents[2] / "jobs" / "evaluate.py"
    ray = [sys.executable, str(job), *words, "--workers", "2", "--address", "local", "--output", str(tmp_path / "ray")]
    driver = subprocess.run(ray, env=environment, capture_output=True, text=True, timeout=TIMEOUT, check=False)
    assert driver.returncode == 0, driver.stderr
    assert main(["evaluate", *words, "--output", str(tmp_path / "plain")]) == 0
    reports = [json.loads((tmp_path / kind / "evaluation.json").read_text()) for kind in ("ray", "plain")]
    for section in ("reconstruction", "likelihood"):
        numbers = [{k: v for k, v in report[section].items() if isinstance(v, float)} for report in reports]
        assert numbers[0] == pytest.approx(numbers[1], rel=1e-6)
    assert not (tmp_path / "ray" / ".ray").exists()
