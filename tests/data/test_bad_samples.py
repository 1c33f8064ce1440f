"""Bad samples that are replaced: the same account on every rank, counted once, through restarts, up to the budget."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from reader_shards import describe, encoded, pack, picture

from tests.training.runs import config_of, rows_of, tensors_of
from tests.training.test_resume import StopsAfter
from vaegan_dist.cluster.runtime import train_local
from vaegan_dist.config import Config
from vaegan_dist.errors import DataError, VaeganError
from vaegan_dist.training.loop import train
from vaegan_dist.training.meter import Agreement
from vaegan_dist.training.resume import run_folder
from vaegan_dist.training.runtime import SingleProcess

SHARDS, EACH = 4, 80
BAD = (5, 6, 83, 161, 162, 319)


@pytest.fixture(scope="module")
def broken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """320 pictures in four shards; six of them are cut in half."""
    folder = tmp_path_factory.mktemp("broken")
    shards = []
    for shard in range(SHARDS):
        members = []
        for number in range(shard * EACH, (shard + 1) * EACH):
            data = encoded(picture(number % 7))
            members.append((f"{number:03d}.jpg", data[: len(data) // 2] if number in BAD else data))
        shards.append((pack(folder / f"{shard}.tar", members), EACH))
    return describe(folder, shards, classes=None)


@pytest.fixture(autouse=True)
def ask_at_every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Agreement, "INTERVAL_SECONDS", 0.0)


def config(broken: Path, storage: Path, *more: str) -> Config:
    """The preset smoke on the broken set, two epochs and a half, from the shards as they come."""
    phases = "phases=[{name: vae, objective: vae, images: 800}]"
    often = ("training.batch_size=32", "reporting.log_images=96", "checkpoint.images=160", "model.minibatch_std=0")
    return config_of(broken, storage, phases, *often, "data.in_memory=false", "data.max_bad_samples=6", *more)


def warnings(folder: Path) -> list[tuple[int, str]]:
    return [(row["images_seen"], row["message"]) for row in rows_of(folder, "warning")]  # type: ignore[misc]


@pytest.fixture(scope="module")
def whole(broken: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of one worker that nothing interrupted."""
    made = config(broken, tmp_path_factory.mktemp("whole"))
    assert train(made, SingleProcess()).reason == "done"
    return run_folder(made)


def test_each_is_listed_once_when_it_was_used_and_again_at_the_end(whole: Path) -> None:
    told = warnings(whole)
    listed, at_the_end = told[: len(BAD)], told[len(BAD) :]
    names = [re.search(r"member '(\d+)\.jpg' at byte \d+: not a whole JPEG", line) for _, line in listed]
    assert sorted(int(name[1]) for name in names if name) == sorted(BAD)
    assert [line.split(" allowed")[0] for _, line in listed] == [f"bad sample {n} of 6" for n in range(1, 7)]
    # Where it was used in the first epoch, 10 batches of 32: at the log after it, not when it was read ahead.
    assert all(seen in (96, 192, 288, 384) for seen, _ in listed) and len({seen for seen, _ in listed}) > 1
    counts = {line.split(":")[0]: line for _, line in at_the_end}
    assert sorted(counts) == ["shard 0.tar", "shard 1.tar", "shard 2.tar", "shard 3.tar"]
    assert "2 of its samples were replaced: member '005.jpg'" in counts["shard 0.tar"]
    assert {seen for seen, _ in at_the_end} == {800}


@pytest.mark.multiprocess
@pytest.mark.parametrize("more", [(), ("data.loader_workers=1", "data.in_memory=true")])
def test_two_ranks_keep_the_same_account(broken: Path, whole: Path, tmp_path: Path, more: tuple[str, ...]) -> None:
    two = config(broken, tmp_path, "cluster.workers=2", *more)
    assert train_local(two, lambda _: None).reason == "done"
    assert warnings(run_folder(two)) == warnings(whole)


@pytest.mark.parametrize("steps", [2, 4, 8])
def test_a_restart_neither_loses_nor_doubles_them(broken: Path, whole: Path, tmp_path: Path, steps: int) -> None:
    """Stopped between two logs, with bad samples used and not listed yet among them."""
    stopped = config(broken, tmp_path)
    assert train(stopped, StopsAfter(steps)).images_seen == 32 * (steps + 1)
    account = json.loads(next(run_folder(stopped).glob("checkpoint-*/state.json")).read_text())["data"]["bad_samples"]
    assert set(account["found"]) <= set(map(str, BAD)) and account["listed"] <= len(account["found"])
    assert train(stopped, SingleProcess()).reason == "done"
    assert warnings(run_folder(stopped)) == warnings(whole)
    assert tensors_of(run_folder(stopped)) == tensors_of(whole)


def over(caught: pytest.ExceptionInfo[Any]) -> None:
    line = str(caught.value)
    assert re.search(r"member '\d+\.jpg' at byte \d+: not a whole JPEG", line) and "\n" not in line
    assert re.search(r"has met \d+ bad samples, more than data\.max_bad_samples=2 allows; restore the shards", line)


@pytest.mark.multiprocess
def test_over_the_budget_of_all_ranks_together_the_run_fails(broken: Path, tmp_path: Path) -> None:
    """With one line, on all ranks at the same image, as one worker does: the account is that of all ranks together."""
    two = config(broken, tmp_path, "cluster.workers=2", "data.max_bad_samples=2")
    with pytest.raises(VaeganError) as caught:
        train_local(two, lambda _: None)
    over(caught)
    rows = [json.loads(line) for line in (run_folder(two) / "history.jsonl").read_text().splitlines()]
    assert rows[-1]["event"] == "end" and rows[-1]["reason"] == "failed"
    assert str(caught.value).endswith(rows[-1]["message"])
    one = config(broken, tmp_path / "one", "data.max_bad_samples=2")
    with pytest.raises(DataError) as alone:
        train(one, SingleProcess())
    over(alone)
    assert warnings(run_folder(two)) == warnings(run_folder(one))
    with pytest.raises(DataError) as again:  # a restart does not begin the count anew
        train(one, SingleProcess())
    over(again)


def test_none_is_allowed_unless_it_is_said(broken: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"not a whole JPEG.*; restore the shard, or set data\.max_bad_samples"):
        train(config(broken, tmp_path, "data.max_bad_samples=0"), SingleProcess())
