"""Whole sweeps on a real Ray Tune on loopback: killed and continued, copied weights, mistakes."""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import obstore
import psutil
import pytest
import yaml

from tests.data.s3_server import Bucket
from tests.monitoring.servers import free_port
from tests.training.runs import rows_of, tensors_in
from vaegan_dist.cli import main
from vaegan_dist.config_source import load_config
from vaegan_dist.reporting.prometheus import scrape
from vaegan_dist.sweeps.ledger import Ledger, Trial, read_ledger
from vaegan_dist.sweeps.search import Proposals
from vaegan_dist.sweeps.settings import SweepSettings
from vaegan_dist.sweeps.space import read_space
from vaegan_dist.training.checkpoint import checkpoints, open_checkpoint
from vaegan_dist.training.remote import fetch_checkpoint

pytestmark = [pytest.mark.ray, pytest.mark.timeout(900)]
TIMEOUT = 800
SPACE = {
    "objective.beta": {"loguniform": [0.1, 10]},
    "optimizer.learning_rate": {"loguniform": [1e-4, 1e-2]},
}
# One phase and few pictures: what is tested is the sweep.
QUICK = [
    "phases=[{name: joint, objective: vaegan, images: 1024}]",
    "reporting.log_images=256",
    "reporting.tensorboard=false",
    "reporting.sample_images=1024",
]


@pytest.fixture
def environment() -> Iterator[dict[str, str]]:
    """Variables for a driver whose Ray keeps its files, sockets and token to itself."""
    # Unix sockets have short paths, so not below pytest's own folder.
    with tempfile.TemporaryDirectory(prefix="vg", dir="/tmp", ignore_cleanup_errors=True) as folder:
        kept = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
        yield {**kept, "RAY_TMPDIR": folder, "HOME": folder, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}


def sweep_file(folder: Path, **settings: object) -> Path:
    path = folder / "space.yaml"
    path.write_text(yaml.safe_dump({"metric": "loss_rec", "space": SPACE, **settings}))
    return path


def arguments(space: Path, digits: Path, storage: Path, *more: str) -> list[str]:
    shared = ["sweep", str(space), "--preset", "smoke", "--data", str(digits), "--storage", str(storage)]
    return [*shared, "--address", "local", *QUICK, *more]


def start(environment: dict[str, str], command: list[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "vaegan_dist.cli", *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
    )


def events_of(folder: Path) -> list[dict]:  # type: ignore[type-arg]
    path = folder / "trials.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def wait_for(events: Callable[[], list[dict]], driver: subprocess.Popen[str], event: str, count: int) -> None:  # type: ignore[type-arg]
    """Wait until a ledger holds so many events of a kind."""
    deadline = time.monotonic() + TIMEOUT
    while sum(row["event"] == event for row in events()) < count:
        assert driver.poll() is None and time.monotonic() < deadline, driver.communicate()[0]
        time.sleep(0.1)


def trial_processes(environment: dict[str, str]) -> list[psutil.Process]:
    """Processes of this test's own Ray in which trials run."""
    found = []
    for process in psutil.process_iter(["cmdline", "environ"]):
        mine = (process.info["environ"] or {}).get("RAY_TMPDIR") == environment["RAY_TMPDIR"]
        if mine and " ".join(process.info["cmdline"] or []).startswith("ray::ImplicitFunc"):
            found.append(process)
    return found


Page = dict[str, dict[tuple[str, ...], float]]
"""values by name, then by label values"""


class Scraper:
    """Looks at the metrics of a sweep all the time, over every death of its driver, and compares them with the ledger.

    The ledger is read from its file, which hears of everything a moment before the driver's memory does.
    """

    def __init__(self, port: int, folder: Path, trials: int) -> None:
        self.port, self.folder, self.trials = port, folder, trials
        self.pages: list[Page] = []
        self.equal: list[Page] = []
        """those that say what the ledger said before and after"""
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    def _work(self) -> None:
        while not self._ending.wait(0.05):
            before = events_of(self.folder)
            found = scrape(f"127.0.0.1:{self.port}", 10)
            if not found:
                continue
            page: Page = {}
            for (name, labels), value in found.items():
                page.setdefault(name, {})[tuple(v for k, v in labels if k != "sweep")] = value
            self.pages.append(page)
            if before == events_of(self.folder) and self.says(page, before):
                self.equal.append(page)

    def says(self, page: Page, events: list[dict]) -> bool:  # type: ignore[type-arg]
        """Whether a page is about what these lines of the ledger say."""
        rows = {event["trial"]: event["row"] for event in events if event["event"] == "row"}
        done = {event["trial"] for event in events if event["event"] == "ended" and event["state"] == "done"}
        states = {labels[0]: value for labels, value in page["vaegan_sweep_trials"].items()}
        wanted = {"done": len(done), "early": 0, "failed": 0}
        best = {n: rows[n]["loss_rec"] for n in done}
        winner = min(best, key=lambda n: (best[n], n)) if best else None
        values = {int(trial): value for (_, trial), value in page.get("vaegan_sweep_trial_value", {}).items()}
        return (
            page["vaegan_sweep_images_total"][()] == sum(row["images_seen"] for row in rows.values())
            and page["vaegan_sweep_trial_failures_total"][()] == 0
            and page["vaegan_sweep_trials_target"][()] == self.trials == sum(states.values())
            and {state: states[state] for state in wanted} == wanted
            and page.get("vaegan_sweep_best_trial", {}).get(()) == winner
            and page.get("vaegan_sweep_best_value", {}).get(("loss_rec", "min")) == best.get(winner)
            and all(value == rows[n]["loss_rec"] and n not in done for n, value in values.items())
        )

    def close(self) -> None:
        """Look no more."""
        self._ending.set()
        self._thread.join(TIMEOUT)


@pytest.mark.chaos
def test_a_sweep_survives_the_death_of_a_trial_and_of_its_driver(
    environment: dict[str, str], digits: Path, tmp_path: Path
) -> None:
    port, folder = free_port(), tmp_path / "killed"
    served = ["--name", "killed", f"reporting.metrics_port={port}"]
    command = arguments(sweep_file(tmp_path, trials=5), digits, tmp_path, *served)
    scraper = Scraper(port, folder, 5)
    driver = start(environment, command)
    try:
        wait_for(partial(events_of, folder), driver, "row", 1)
        trial_processes(environment)[0].kill()
        wait_for(partial(events_of, folder), driver, "ended", 2)
    finally:
        driver.kill()
        driver.communicate(timeout=TIMEOUT)
    before, seen = Ledger(folder).trials, len(scraper.pages)
    driver = start(environment, command)
    said, _ = driver.communicate(timeout=TIMEOUT)
    scraper.close()
    assert driver.returncode == 0, said
    assert "5 done" in said and "Done: 5 trials" in said and "Traceback" not in said

    trials = Ledger(folder).trials
    settings = SweepSettings.model_validate({"trials": 5, "metric": "loss_rec", "space": SPACE})
    expected = Proposals(settings, read_space(SPACE), load_config("smoke"), Ledger(tmp_path / "x"), ("loss_rec",))
    assert [trials[n].params for n in range(5)] == [made.params for _ in range(5) if (made := expected.next())]
    for trial in trials.values():
        assert trial.state == "done" and [row["images_seen"] for row in trial.rows] == [256, 512, 768, 1024]
    assert all(trials[n] == trial for n, trial in before.items() if trial.ended), "an ended trial was touched"
    assert (folder / "report.html").stat().st_size > 10_000

    assert 0 < seen < len(scraper.pages), "served in both lives"
    assert any("vaegan_sweep_trial_value" in page for page in scraper.equal), "no trial was seen under way"
    assert scraper.equal[-1]["vaegan_sweep_images_total"][()] == 5 * 1024, "the end was not seen"
    spent = [page["vaegan_sweep_images_total"][()] for page in scraper.pages]
    assert spent == sorted(spent) and spent[seen] > 0, "a counter fell, or began again"

    best = json.loads((folder / "sweep.json").read_text())["best"]
    assert main(["train", "--config", str(folder / "best" / "config.yaml"), "--runtime", "local"]) == 0
    again = [row["loss_rec"] for row in rows_of(tmp_path / "killed-best", "train")]
    assert again == [row["loss_rec"] for row in trials[best].rows], "the winner does not come out again"


@pytest.mark.chaos
@pytest.mark.parametrize("scheduler", ["hyperband", "median"])
def test_each_scheduler_brings_every_trial_to_an_end(
    scheduler: str, environment: dict[str, str], digits: Path, tmp_path: Path
) -> None:
    space = sweep_file(tmp_path, trials=5, scheduler=scheduler)
    driver = start(environment, arguments(space, digits, tmp_path, "--name", scheduler))
    said, _ = driver.communicate(timeout=TIMEOUT)
    assert driver.returncode == 0, said
    trials = Ledger(tmp_path / scheduler).trials
    assert len(trials) == 5 and {trial.state for trial in trials.values()} <= {"done", "early"}, said
    assert any(trial.state == "done" and trial.images_seen == 1024 for trial in trials.values())


@pytest.mark.chaos
def test_pbt_copies_weights_and_changes_values(environment: dict[str, str], digits: Path, tmp_path: Path) -> None:
    space = sweep_file(tmp_path, trials=4, scheduler="pbt")
    command = arguments(space, digits, tmp_path, "--name", "pbt", "checkpoint.keep_last=99")
    driver = start(environment, command)
    said, _ = driver.communicate(timeout=TIMEOUT)
    assert driver.returncode == 0, said
    folder = tmp_path / "pbt"
    changes = [event for event in events_of(folder) if event["event"] == "changed"]
    assert changes, said
    started = {event["trial"]: event["params"] for event in events_of(folder) if event["event"] == "created"}
    for change in changes:
        assert change["params"] != started[change["trial"]]
        place = f"checkpoint-{change['images_seen']:012d}"
        copy, source = (folder / "trials" / f"{number:04d}" / place for number in (change["trial"], change["source"]))
        later = [c for c in changes if c["time"] > change["time"] and c["trial"] in (change["trial"], change["source"])]
        if any(c["images_seen"] <= change["images_seen"] for c in later):
            continue  # one of both went back behind this place since
        assert tensors_in(copy) == tensors_in(source), "weights were not copied"
        assert open_checkpoint(copy).config.objective.beta == change["params"]["objective.beta"]
    trials = Ledger(folder).trials
    for trial in trials.values():
        assert trial.state == "done" and trial.images_seen == 1024
        last = rows_of(folder / "trials" / trial.name, "train")[-1]
        assert last["beta"] == pytest.approx(trial.params["objective.beta"])
        assert last["lr_decoder"] == pytest.approx(trial.params["optimizer.learning_rate"])


def remote_ledger(bucket: Bucket, sweep: str) -> list[dict]:  # type: ignore[type-arg]
    names = sorted(e["path"] for chunk in obstore.list(bucket.store, f"runs/{sweep}/ledger") for e in chunk)
    return [json.loads(bytes(obstore.get(bucket.store, name).bytes())) for name in names]


@pytest.mark.chaos
def test_pbt_copies_weights_by_way_of_a_store(
    bucket: Bucket, environment: dict[str, str], digits: Path, tmp_path: Path
) -> None:
    """No folder is shared: ledger, trials, Tune's copies and results are in the store."""
    environment |= {name: value for name, value in os.environ.items() if name.startswith("AWS_")}
    space = sweep_file(tmp_path, trials=2, scheduler="pbt", quantile=0.5)
    short = [QUICK[0].replace("1024", "2048"), "reporting.curves=false", "run.storage=s3://shards/runs"]
    command = arguments(space, digits, Path("unused"), "--name", "pbt", *short)
    driver = start({**environment, "VAEGAN_CACHE": str(tmp_path / "machine")}, command)
    said, _ = driver.communicate(timeout=TIMEOUT)
    assert driver.returncode == 0, said
    events = remote_ledger(bucket, "pbt")
    changes = [event for event in events if event["event"] == "changed"]
    assert changes and sorted(e["trial"] for e in events if e["event"] == "ended") == [0, 1], said
    for trial in (0, 1):
        last = fetch_checkpoint(f"s3://shards/runs/pbt/trials/{trial:04d}")
        params = [e["params"] for e in events if e.get("trial") == trial and "params" in e][-1]
        assert last.name == "checkpoint-000000002048"
        assert open_checkpoint(last).config.objective.beta == params["objective.beta"]
    assert fetch_checkpoint("s3://shards/runs/pbt/best").name == "checkpoint-000000002048"
    assert not any(obstore.list(bucket.store, "runs/pbt/ray")), "Tune's copies are gone"


def measured(trials: dict[int, Trial]) -> list[object]:
    return [(t.params, t.state, [(row["images_seen"], row["loss_rec"]) for row in t.rows]) for t in trials.values()]


@pytest.mark.chaos
def test_a_sweep_in_a_store_goes_on_on_another_machine(
    bucket: Bucket, environment: dict[str, str], digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Trial and driver killed and everything on the machine removed, against the same sweep in a folder."""
    monkeypatch.setenv("VAEGAN_CACHE", str(tmp_path / "machine"))
    environment |= {name: value for name, value in os.environ.items() if name.startswith(("AWS_", "VAEGAN_CACHE"))}
    space = sweep_file(tmp_path, trials=5, scheduler="asha", concurrent=1)
    calm = start(environment, arguments(space, digits, tmp_path, "--name", "calm"))
    said, _ = calm.communicate(timeout=TIMEOUT)
    assert calm.returncode == 0, said
    command = arguments(space, digits, Path("unused"), "--name", "moved", "run.storage=s3://shards/runs")

    events = partial(remote_ledger, bucket, "moved")
    for event, count in (("row", 1), ("ended", 2)):
        driver = start(environment, command)
        try:
            wait_for(events, driver, event, count)
            trial_processes(environment)[0].kill()
            wait_for(events, driver, "row", count + 2)
        finally:
            driver.kill()
            driver.communicate(timeout=TIMEOUT)
        shutil.rmtree(tmp_path / "machine")
    driver = start(environment, command)
    said, _ = driver.communicate(timeout=TIMEOUT)
    assert driver.returncode == 0 and "Traceback" not in said, said
    shutil.rmtree(tmp_path / "machine")

    moved = read_ledger(load_config("smoke", overrides=["run.storage=s3://shards/runs", "run.name=moved"])).trials
    assert measured(moved) == measured(Ledger(tmp_path / "calm").trials)
    ended = [event["trial"] for event in events() if event["event"] == "ended"]
    assert sorted(ended) == [0, 1, 2, 3, 4], "a trial was lost, or ended twice"
    best = fetch_checkpoint("s3://shards/runs/moved/best")
    assert tensors_in(best) == tensors_in(checkpoints(tmp_path / "calm" / "best")[0])


@pytest.mark.chaos
def test_a_signal_ends_in_checkpoints_and_the_sweep_goes_on(
    environment: dict[str, str], digits: Path, tmp_path: Path
) -> None:
    command = arguments(sweep_file(tmp_path, trials=3), digits, tmp_path, "--name", "stopped")
    long = [item.replace("images: 1024", "images: 100_000_000") for item in command]
    driver = start(environment, long)
    folder = tmp_path / "stopped"
    try:
        wait_for(partial(events_of, folder), driver, "row", 2)
        driver.send_signal(signal.SIGTERM)
        said, _ = driver.communicate(timeout=TIMEOUT)
    finally:
        driver.kill()
    assert driver.returncode == 75, said
    assert "Stopped with checkpoints, 3 trials left" in said
    for number in Ledger(folder).trials:
        rows = rows_of(folder / "trials" / f"{number:04d}", "end")
        assert rows[-1]["reason"] == "stopped"
    assert not trial_processes(environment)


@pytest.mark.parametrize(
    ("settings", "more", "said"),
    [
        ({}, ["objective.bta=3"], "error: objective.bta=3: unknown key"),
        ({"metric": "fidd"}, [], "error: metric=fidd: no record of this run would hold it (did you mean 'fid'?)"),
        ({"space": {"objective.beta": {"uniform": [-1, 1]}}}, [], "error: space: objective.beta=-1: input should be"),
        ({"concurrent": 99}, ["--dry-run"], "error: concurrent=99: the cluster has"),
        ({"scheduler": "asha", "interval_images": 9000}, [], "error: scheduler=asha: its first look at a trial"),
    ],
)
def test_a_mistake_is_one_line_and_starts_nothing(
    digits: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    settings: dict[str, object],
    more: list[str],
    said: str,
) -> None:
    assert main(arguments(sweep_file(tmp_path, **settings), digits, tmp_path, *more)) == 2
    printed = capsys.readouterr().err
    assert printed.startswith(said) and printed.count("\n") == 1
    assert not (tmp_path / "space").exists()
