"""Runs that stop and continue, on another number of workers too, end as if nothing had happened."""

import pickle
import shutil
from pathlib import Path

import pytest

from tests.training.runs import config_of, rows_of, tensors_of
from vaegan_dist.cluster.runtime import train_local
from vaegan_dist.errors import ConfigError
from vaegan_dist.reporting.records import Record
from vaegan_dist.training.checkpoint import BrokenCheckpointError, checkpoints, load_networks, open_checkpoint
from vaegan_dist.training.loop import Outcome, train
from vaegan_dist.training.meter import Agreement
from vaegan_dist.training.resume import refuse_existing, run_folder
from vaegan_dist.training.runtime import SingleProcess


class StopsAfter(SingleProcess):
    """Asks to stop at the n-th question; with a patience of zero seconds there is one question a step."""

    def __init__(self, steps: int) -> None:
        super().__init__()
        self.steps = steps

    def stop_requested(self) -> bool:
        self.steps -= 1
        return self.steps < 0


@pytest.fixture(autouse=True)
def ask_at_every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Agreement, "INTERVAL_SECONDS", 0.0)


@pytest.fixture(scope="module")
def whole(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that nothing interrupted."""
    config = config_of(digits, tmp_path_factory.mktemp("whole"))
    assert train(config, SingleProcess()).reason == "done"
    return run_folder(config)


@pytest.mark.parametrize("steps", [5, 16, 23, 33])
def test_a_stopped_run_continues_to_the_same_bytes(steps: int, whole: Path, digits: Path, tmp_path: Path) -> None:
    config = config_of(digits, tmp_path)
    stopped = train(config, StopsAfter(steps))
    assert stopped.reason == "stopped" and stopped.images_seen == 64 * (steps + 1)
    assert train(config, SingleProcess()).reason == "done"
    assert tensors_of(run_folder(config)) == tensors_of(whole)
    assert rows_of(run_folder(config), "train") == rows_of(whole, "train")
    stop = [row for row in rows_of(run_folder(config)) if row not in rows_of(whole)]
    assert [(row["event"], row["images_seen"]) for row in stop] in ([], [("checkpoint", stopped.images_seen)])
    assert open_checkpoint(checkpoints(run_folder(config))[0]).progress.restarts == 1


@pytest.mark.multiprocess
def test_a_run_continues_on_another_number_of_workers(whole: Path, digits: Path, tmp_path: Path) -> None:
    assert train(config_of(digits, tmp_path), StopsAfter(9)).reason == "stopped"
    records: list[Record] = []
    two = config_of(digits, tmp_path, "cluster.workers=2")
    assert train_local(two, records.append).reason == "done"
    assert [r["images_seen"] for r in records if r["event"] == "resume"] == [640]
    rows, before = rows_of(run_folder(two), "train"), rows_of(whole, "train")
    # The interval that one worker began and two ended: the same sums, but for float32 rounding of its last steps.
    for one, both in list(zip(before, rows, strict=True))[:2]:
        assert both["loss_rec"] == pytest.approx(one["loss_rec"], rel=1e-4)
    losses = [row["loss_rec"] for row in rows if "loss_rec" in row]
    alone = [row["loss_rec"] for row in rows_of(whole, "train") if "loss_rec" in row]
    # float32 sums in another order: the same run up to rounding, which training makes grow
    assert losses[-1] == pytest.approx(alone[-1], rel=2e-2)


def test_a_finished_run_trains_nothing_and_a_larger_budget_continues_it(
    whole: Path, digits: Path, tmp_path: Path
) -> None:
    shutil.copytree(whole, tmp_path / "smoke")
    before = (tmp_path / "smoke" / "history.jsonl").read_bytes()
    again = train(config_of(digits, tmp_path), SingleProcess())
    assert (again.reason, again.images_seen) == ("already done", 2560)
    assert (tmp_path / "smoke" / "history.jsonl").read_bytes() == before
    longer = train(config_of(digits, tmp_path, "phases.joint.images=1280"), SingleProcess())
    assert (longer.reason, longer.images_seen) == ("done", 2816)


CHANGES = {
    "run.seed=1": "run.seed",
    "model.latent_dim=9": "model.latent_dim",
    "training.batch_size=128": "training.batch_size",
    "objective.beta=2": "objective.beta",
    "phases.vae.images=2048": "phases.vae.images",
    "phases.joint.images=64": "phases.joint.images",
    "optimizer.learning_rate=1": "optimizer.learning_rate",
    "data.streams=32": "data.streams",
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_configuration_is_refused_by_key(change: str, whole: Path, digits: Path, tmp_path: Path) -> None:
    shutil.copytree(whole, tmp_path / "smoke")
    with pytest.raises(ConfigError, match=CHANGES[change].replace(".", r"\.")):
        train(config_of(digits, tmp_path, change), SingleProcess())


def test_fresh_is_refused_where_a_run_stands(whole: Path) -> None:
    with pytest.raises(ConfigError, match=r"run\.name=smoke.*choose another"):
        refuse_existing(whole)
    refuse_existing(whole.parent / "another")


class Bomb:
    """Unpickling it leaves a file behind."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[Path]]:
        return Path.touch, (self.path,)


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def replace_by_pickle(file: Path) -> None:
    file.write_bytes(pickle.dumps(Bomb(file.parent / "exploded")))


DAMAGES = {"truncated": truncate, "bit flipped": flip, "removed": Path.unlink, "a pickle": replace_by_pickle}


FILES = ("model.safetensors", "optimizer.safetensors", "state.json", "checkpoint.json")
# A flipped bit of the seal itself may fall into white space, which changes nothing.
DAMAGED = [(damage, name) for damage in DAMAGES for name in FILES if (damage, name) != ("bit flipped", FILES[-1])]


@pytest.mark.parametrize(("damage", "name"), DAMAGED)
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(
    damage: str, name: str, whole: Path, digits: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "smoke"
    shutil.copytree(whole, folder)
    newest, before = checkpoints(folder)[:2]
    DAMAGES[damage](newest / name)
    with pytest.raises(BrokenCheckpointError, match=newest.name):
        open_checkpoint(newest)
    runtime = SingleProcess()
    outcome = train(config_of(digits, tmp_path), runtime)
    warnings = [str(r["message"]) for r in runtime.records if r["event"] == "warning"]
    assert outcome.reason == "done" and len(warnings) == 1 and newest.name in warnings[0]
    assert not list(folder.rglob("exploded"))
    assert tensors_of(folder) == tensors_of(whole)
    assert open_checkpoint(before).path == before


def test_networks_load_from_a_run_and_from_a_checkpoint(whole: Path) -> None:
    _, averaged = load_networks(whole)
    _, raw = load_networks(checkpoints(whole)[0], "raw")
    assert averaged["decoder"].state_dict().keys() == raw["decoder"].state_dict().keys()
    pairs = zip(averaged["decoder"].parameters(), raw["decoder"].parameters(), strict=True)
    assert any((a != b).any() for a, b in pairs)


def test_outcome_names_the_newest_checkpoint(whole: Path, digits: Path, tmp_path: Path) -> None:
    outcome: Outcome = train(config_of(digits, tmp_path), SingleProcess())
    assert outcome.checkpoint == checkpoints(run_folder(config_of(digits, tmp_path)))[0]
