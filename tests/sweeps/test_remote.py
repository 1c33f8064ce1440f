"""A sweep on an S3 server: no line is lost or doubled, and a machine with nothing goes on; without Ray."""

import csv
import io
import json
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import obstore
import pytest
from obstore.exceptions import GenericError

from tests.data.s3_server import Bucket
from tests.training.runs import TIMES, config_of, rows_of, tensors_in
from vaegan_dist.cli import main
from vaegan_dist.cluster import ray_tune, sweep_trial
from vaegan_dist.cluster.hub import Failure
from vaegan_dist.cluster.ray_tune import run_sweep
from vaegan_dist.cluster.sweep_trial import Shared, run_trial
from vaegan_dist.config import Config, RunSection
from vaegan_dist.config_source import load_config
from vaegan_dist.data import transfer
from vaegan_dist.errors import ConfigError, DataError, InputError, VaeganError
from vaegan_dist.sweeps.journal import FILE
from vaegan_dist.sweeps.ledger import Ledger, Trial, open_ledger, read_ledger
from vaegan_dist.sweeps.plan import Plan, make_plan
from vaegan_dist.sweeps.remote import gather, publish
from vaegan_dist.sweeps.report import write_report
from vaegan_dist.sweeps.result import best_trial, write_result
from vaegan_dist.sweeps.settings import SweepSettings
from vaegan_dist.sweeps.trial import TRIALS, trial_config
from vaegan_dist.training.checkpoint import checkpoints, folder_name, open_checkpoint
from vaegan_dist.training.loop import train
from vaegan_dist.training.remote import SupersededError, fetch_checkpoint, remote_run
from vaegan_dist.training.resume import run_folder
from vaegan_dist.training.runtime import SingleProcess

URL = "s3://shards/runs"
SPACE = {"objective.beta": {"loguniform": [0.1, 10]}}
SETTINGS = SweepSettings.model_validate({"metric": "loss_rec", "trials": 3, "space": SPACE, "interval_images": 128})
QUICK = (
    "phases=[{name: joint, objective: vaegan, images: 512}]",
    "reporting.sample_images=512",
    "run.name=sweep",
    "reporting.curves=false",
)


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where this machine keeps its copies; removing it makes it another machine."""
    folder = tmp_path / "machine"
    monkeypatch.setenv("VAEGAN_CACHE", str(folder))
    monkeypatch.setattr(transfer, "FIRST_PAUSE", 0.001)
    monkeypatch.setattr(transfer, "LONGEST_PAUSE", 0.01)
    return folder


@pytest.fixture
def remote_config(digits: Path) -> Config:
    return config_of(digits, Path("unused"), f"run.storage={URL}", *QUICK)


def begun(config: Config) -> Ledger:
    return open_ledger(run_folder(config), SETTINGS, config)


def names_in(bucket: Bucket) -> list[str]:
    return [e["path"].removeprefix("runs/sweep/") for c in obstore.list(bucket.store, "runs/sweep") for e in c]


# The ledger


def test_a_machine_with_nothing_reads_what_another_one_wrote(
    bucket: Bucket, machine: Path, remote_config: Config
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(obstore, "put", _losing_every_answer(obstore.put))
        ledger = begun(remote_config)
        for number in range(3):
            ledger.create({"objective.beta": number / 7})
            ledger.row(number, {"images_seen": 64, "fid": 3.5 + number})
        ledger.end(0, "early", seconds=1.5)
    assert names_in(bucket).count("ledger/00000007.json") == 1 and "ledger/00000008.json" not in names_in(bucket)
    shutil.rmtree(machine)
    assert read_ledger(remote_config).trials == ledger.trials and len(ledger.trials) == 3
    again = begun(remote_config)
    assert again.trials == ledger.trials
    other = SETTINGS.model_copy(update={"scheduler": "asha"})
    with pytest.raises(ConfigError, match=r"scheduler=asha: the sweep in s3://shards/runs/sweep was begun with none"):
        open_ledger(run_folder(remote_config), other, remote_config)


def _losing_every_answer(put: Callable[..., Any]) -> Callable[..., Any]:
    """Each request is carried out, and the first answer to it is lost."""
    asked: set[str] = set()

    def lossy(store: Any, name: str, *args: Any, **kwargs: Any) -> Any:
        answer = put(store, name, *args, **kwargs)
        if name not in asked:
            asked.add(name)
            raise GenericError("connection closed before message completed")
        return answer

    return lossy


def test_of_two_commands_the_later_one_goes_on_and_the_earlier_one_ends(
    bucket: Bucket, machine: Path, remote_config: Config
) -> None:
    first = begun(remote_config)
    first.create({"objective.beta": 1.0})
    second = read_ledger(remote_config)
    first.row(0, {"images_seen": 64, "fid": 2.0})  # after the other one has read, and before it begins
    second.begin()
    assert second.trials == first.trials and second.trials[0].images_seen == 64
    before = names_in(bucket)
    for _ in range(2):
        with pytest.raises(SupersededError, match=r"s3://shards/runs/sweep: another command has taken this sweep over"):
            first.end(0, "failed", "it was replaced")
    assert not first.trials[0].ended and names_in(bucket) == before, "nothing follows from a line that does not stand"
    second.end(0, "done")
    shutil.rmtree(machine)
    assert read_ledger(remote_config).trials[0].state == "done"


def test_a_store_that_is_gone_is_one_line_and_nothing_is_known(
    bucket: Bucket, machine: Path, remote_config: Config
) -> None:
    ledger = begun(remote_config)
    bucket.kill()
    for _ in range(2):
        with pytest.raises(DataError, match=r"ledger/00000001.json: cannot be written to s3://.* after 16 ") as caught:
            ledger.create({})
        assert "\n" not in str(caught.value)
    assert not ledger.trials and ledger.trouble is not None


def test_a_store_that_ignores_conditions_is_refused(
    bucket: Bucket, machine: Path, remote_config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    put = obstore.put
    monkeypatch.setattr(obstore, "put", lambda store, name, content, mode="overwrite": put(store, name, content))
    with pytest.raises(InputError, match=r"run.storage: s3://shards/runs/sweep overwrites an object") as caught:
        begun(remote_config)
    assert "\n" not in str(caught.value)


def test_a_line_that_is_missing_or_none_is_named(bucket: Bucket, machine: Path, remote_config: Config) -> None:
    ledger = begun(remote_config)
    ledger.create({})
    ledger.create({})
    obstore.put(bucket.store, "runs/sweep/ledger/00000002.json", b"{}")
    with pytest.raises(InputError, match=r"s3://shards/runs/sweep/ledger/00000002.json is not of a ledger \(KeyError"):
        read_ledger(remote_config)
    obstore.delete(bucket.store, "runs/sweep/ledger/00000001.json")
    with pytest.raises(InputError, match=r"s3://shards/runs/sweep/ledger/00000001.json is missing; restore it"):
        read_ledger(remote_config)


def test_what_cannot_work_is_refused_at_once(bucket: Bucket, machine: Path, remote_config: Config) -> None:
    settings = SETTINGS.model_copy(update={"scheduler": "pbt"})
    config = load_config("smoke", overrides=["run.storage=abfs://box@account.dfs.core.windows.net/runs"])
    with pytest.raises(ConfigError, match=r"scheduler=pbt: weights cannot be copied by way of abfs://; use one of s3"):
        make_plan(settings, config)
    assert main(["describe", "--config", f"{URL}/none.yaml"]) == 2


# Whole sweeps, in this process: the trial's own code, with a few lines in place of Ray Tune.


class KilledError(BaseException):
    """Driver and trial die here."""


class TuneStandIn:
    """What a trial asks of Ray Tune; writes the ledger as the driver does, and dies at a chosen report.

    Args:
        die: called with each report's number, before and after the ledger has it; may raise KilledError.
    """

    def __init__(self, ledger: Ledger, die: Callable[[int, str], None]) -> None:
        self.ledger, self.die = ledger, die
        self.number, self.reports = 0, 0
        self.handed: Path | None = None
        self.stop_at: int | None = None
        self.result: dict[str, Any] = {}
        self.Checkpoint = HandedOver

    def report(self, result: dict[str, Any], checkpoint: "HandedOver | None" = None) -> None:
        self.reports += 1
        self.die(self.reports, "before")
        row, trial = result["row"], self.ledger.trials[self.number]
        if len(row) > 1 and row["images_seen"] > trial.images_seen:
            self.ledger.row(self.number, row)
        self.die(self.reports, "after")
        if result.get("done"):
            self.result = result
            if result["state"] != "stopped":
                assert result["state"] == "done", result
                self.ledger.end(self.number, "done", seconds=1.0)
        elif row["images_seen"] == self.stop_at:
            raise SystemExit

    def get_checkpoint(self) -> "HandedOver | None":
        return HandedOver(self.handed) if self.handed else None


class HandedOver:
    """A checkpoint as Tune hands it over."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    def from_directory(cls, path: Path) -> "HandedOver":
        return cls(path)

    def as_directory(self) -> "HandedOver":
        return self

    def __enter__(self) -> Path:
        return self.path

    def __exit__(self, *args: object) -> None:
        """Nothing to let go of."""


def never(report: int, moment: str) -> None:
    """Nobody dies."""


def run_one(plan: Plan, tune: TuneStandIn, trial: Trial, session: str, checkpoints: bool = False) -> None:
    shared = Shared(plan.folder, plan.config.model_dump(mode="json"), plan.judged, _Hub(), session, checkpoints)
    tune.number = trial.number
    proposal = {"trial": trial.number, "params": trial.params, "known": trial.images_seen}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sweep_trial, "tune", tune)
        patch.setattr(sweep_trial.ray, "get", lambda answer: answer)
        patch.setattr(sweep_trial, "StopQuestion", lambda hub: lambda: False)
        patch.setattr(sweep_trial, "_release", lambda: None)  # it would look through all of pytest's memory
        run_trial({"proposal": proposal}, shared)


class _Hub:
    """A hub that nobody listens to."""

    def __getattr__(self, name: str) -> Any:
        return self

    def remote(self, *args: object) -> bool:
        return False


def sweep(config: Config, die: Callable[[int, str], None] = never, session: str = "one") -> Plan:
    """What the command does, one trial after the other."""
    ledger = open_ledger(run_folder(config), SETTINGS, config)
    plan = make_plan(SETTINGS, config, ledger)
    tune = TuneStandIn(ledger, die)
    waiting = [trial for trial in ledger.trials.values() if not trial.ended]
    while trial := waiting.pop(0) if waiting else plan.proposals.next():
        run_one(plan, tune, trial, session)
    gather(plan)
    write_result(plan)
    write_report(plan)
    publish(plan)
    ledger.close()
    return plan


def facts(trials: dict[int, Trial]) -> list[Any]:
    return [
        (n, t.params, t.state, [{k: v for k, v in r.items() if k not in TIMES} for r in t.rows])
        for n, t in trials.items()
    ]


@pytest.fixture(scope="module")
def calm(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Plan:
    """The same sweep in a folder, uninterrupted."""
    return sweep(config_of(digits, tmp_path_factory.mktemp("calm"), *QUICK))


def test_killed_at_several_moments_it_goes_on_on_machines_with_nothing(
    bucket: Bucket, machine: Path, calm: Plan, remote_config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    deaths = [(1, "before"), (1, "after"), (3, "before"), (4, "after")]
    for life, death in enumerate(deaths):

        def die(report: int, moment: str, death: tuple[int, str] = death) -> None:
            if (report, moment) == death:
                raise KilledError

        with pytest.raises(KilledError):
            sweep(remote_config, die, f"life {life}")
        shutil.rmtree(machine)
    plan = sweep(remote_config, session="last")

    assert facts(plan.ledger.trials) == facts(calm.ledger.trials)
    shutil.rmtree(machine)
    assert facts(read_ledger(remote_config).trials) == facts(calm.ledger.trials)
    events = [json.loads(bytes(obstore.get(bucket.store, f"runs/sweep/{n}").bytes())) for n in _lines(bucket)]
    created, ended = ([e["trial"] for e in events if e["event"] == kind] for kind in ("created", "ended"))
    assert created == ended == [0, 1, 2] and sum(e["event"] == "opened" for e in events) == 5

    # What a folder would hold is in the store.
    found = set(names_in(bucket))
    wanted = {p.relative_to(calm.folder).as_posix() for p in calm.folder.rglob("*") if _of_the_result(p, calm.folder)}
    assert wanted - found == set()
    copy = b"".join(bytes(obstore.get(bucket.store, f"runs/sweep/{name}").bytes()) for name in _lines(bucket))
    assert bytes(obstore.get(bucket.store, f"runs/sweep/{FILE}").bytes()) == copy
    table = bytes(obstore.get(bucket.store, "runs/sweep/sweep.csv").bytes()).decode()
    assert _without_times(table) == _without_times((calm.folder / "sweep.csv").read_text())
    assert fetch_checkpoint(f"{URL}/sweep/best").name == folder_name(512)
    assert tensors_in(fetch_checkpoint(f"{URL}/sweep/best")) == tensors_in(checkpoints(calm.folder / "best")[0])
    # The winner comes out again, from the URL.
    again = f"{URL}/sweep/best/config.yaml"
    assert main(["train", "--config", again, "--runtime", "local", f"run.storage={machine / 'again'}"]) == 0
    assert tensors_in(checkpoints(machine / "again" / "sweep-best")[0]) == tensors_in(
        checkpoints(calm.folder / "best")[0]
    )


def _lines(bucket: Bucket) -> list[str]:
    return sorted(name for name in names_in(bucket) if name.startswith("ledger/"))


def _of_the_result(path: Path, folder: Path) -> bool:
    name = path.relative_to(folder).as_posix()
    hidden = any(part.startswith(".") for part in Path(name).parts)
    return path.is_file() and not hidden and path.suffix != ".lock"


def _without_times(table: str) -> list[dict[str, str]]:
    return [{k: v for k, v in row.items() if k not in TIMES} for row in csv.DictReader(io.StringIO(table))]


def test_a_copy_of_weights_stands_in_the_store_before_the_trial_goes_on(
    bucket: Bucket, machine: Path, remote_config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Population-based training: trial 1 has gone further than its donor, and is moved to another machine then."""
    plan = make_plan(SETTINGS, remote_config, begun(remote_config))
    tune = TuneStandIn(plan.ledger, never)
    plan.propose_all()
    donor, poor = (trial_config(plan.config, plan.folder, n, plan.ledger.trials[n].params, plan.judged) for n in (0, 1))
    for number, stop_at in ((0, 128), (1, 256)):
        tune.stop_at = stop_at
        with pytest.raises(SystemExit):
            run_one(plan, tune, plan.ledger.trials[number], "a", checkpoints=True)
    tune.handed = machine.parent / "handed"
    source = fetch_checkpoint(f"{donor.run.storage}/0000")
    shutil.copytree(source, tune.handed)
    shutil.rmtree(machine)

    params = {"objective.beta": 7.0}
    plan.ledger.change(1, params, source=0, images_seen=128)
    changed = trial_config(plan.config, plan.folder, 1, params, plan.judged)
    remote = remote_run(poor)
    assert remote is not None and remote.sealed() == [folder_name(256), folder_name(128)]
    with monkeypatch.context() as patch:
        # Killed once the copy stands, and before its first step.
        patch.setattr(sweep_trial, "_train", lambda *args: (_ for _ in ()).throw(KilledError()))
        with pytest.raises(KilledError):
            run_one(plan, tune, plan.ledger.trials[1], "a", checkpoints=True)
    shutil.rmtree(machine)
    assert remote.sealed() == [folder_name(128)], "its own newer ones are gone"
    copy = fetch_checkpoint(remote.url)
    assert tensors_in(copy) == tensors_in(tune.handed) and open_checkpoint(copy).config == changed

    tune.handed, tune.stop_at = None, None
    run_one(plan, tune, plan.ledger.trials[1], "b", checkpoints=True)
    assert plan.ledger.trials[1].state == "done"
    assert [row["images_seen"] for row in plan.ledger.trials[1].rows] == [128, 256, 384, 512]
    assert rows_of(run_folder(changed), "train")[-1]["beta"] == 7.0


def test_what_an_earlier_start_gathered_is_not_taken_for_the_winner(
    bucket: Bucket, machine: Path, remote_config: Config
) -> None:
    """The trial has gone on from a copy of other weights since, to an image count that it had reached before."""
    plan = sweep(remote_config)
    best = best_trial(plan)
    assert best is not None
    gathered = plan.folder / TRIALS / best.name
    (right,) = checkpoints(gathered)
    wanted = tensors_in(right)
    other = remote_config.model_copy(update={"run": RunSection(name="other", storage=str(machine), seed=9)})
    train(other, SingleProcess())
    for images in (512, 640):
        shutil.rmtree(gathered / folder_name(images), ignore_errors=True)
        shutil.copytree(checkpoints(run_folder(other))[0], gathered / folder_name(images))
    gather(plan)
    assert [path.name for path in checkpoints(gathered)] == [folder_name(512)]
    assert tensors_in(gathered / folder_name(512)) == wanted


# Two commands at a time


def taken_over(plan: Plan) -> dict[str, Any]:
    """The last result of a trial of the plan that another command begins as well, once its first value stands."""
    trial = plan.ledger.trials[0]
    other = remote_run(trial_config(plan.config, plan.folder, 0, trial.params, plan.judged))
    assert other is not None

    def take_over(report: int, moment: str) -> None:
        if (report, moment) == (1, "after"):
            other.take_over()

    tune = TuneStandIn(plan.ledger, take_over)
    run_one(plan, tune, trial, "later")
    return tune.result


@pytest.fixture
def quick_end(monkeypatch: pytest.MonkeyPatch) -> Callable[[dict[str, Any]], None]:
    """In place of Ray and Tune: trial 0 ends with a result, and no other one begins."""

    def patch(result: dict[str, Any]) -> None:
        ended = ray_tune._Book.ended
        for name, value in {
            "connect": lambda *args: None,
            "concurrency": lambda plan: 1,
            "start_sweep_hub": _Hub,
            "_followed": lambda *args: nullcontext(),
            "_tuner": lambda plan, hub, book, concurrent: SimpleNamespace(fit=lambda: ended(book, 0, result)),
        }.items():
            monkeypatch.setattr(ray_tune, name, value)

    return patch


def test_a_trial_that_another_command_begins_again_is_no_failure(
    bucket: Bucket, machine: Path, calm: Plan, remote_config: Config, quick_end: Callable[[dict[str, Any]], None]
) -> None:
    earlier = make_plan(SETTINGS, remote_config, begun(remote_config))
    earlier.propose_all()
    later = make_plan(SETTINGS, remote_config, begun(remote_config))
    result = taken_over(later)
    assert result["state"] == "stopped" and "\n" not in result["message"], result
    assert "s3://shards/runs/sweep/trials/0000: another process has taken this run over" in result["message"]
    assert [row["images_seen"] for row in later.ledger.trials[0].rows] == [128], "later ones had no checkpoint"
    before = names_in(bucket)
    quick_end(result)
    with pytest.raises(VaeganError, match=r"with 3 trials left \(taken over by another command: 0000\); run the same"):
        run_sweep(later, lambda progress: None)
    with pytest.raises(SupersededError, match="another command has taken this sweep over; this one ends"):
        run_sweep(earlier, lambda progress: None)
    assert names_in(bucket) == before and later.ledger.trouble is None, "neither of them has written a line"

    plan = sweep(remote_config, session="again")
    assert facts(plan.ledger.trials) == facts(calm.ledger.trials)


@pytest.mark.parametrize("kind", [SupersededError, ConfigError, VaeganError])
def test_the_driver_of_a_group_tells_a_trial_that_was_taken_over_from_one_that_failed(kind: type[VaeganError]) -> None:
    error = Failure.of(kind("why"), "rank 1 on node").error()
    assert type(error) is kind and str(error) == "rank 1 on node: why"
