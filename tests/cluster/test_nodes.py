"""Real Ray nodes that end announced or unannounced, come back or not: the run goes on where there is room."""

import time
from pathlib import Path

import pytest

from tests.cluster.nodes import Nodes, rows_of, running_nodes, wait_until
from vaegan_dist.cluster.attempts import Budget, Kind, kind_of
from vaegan_dist.config import ClusterSection
from vaegan_dist.config_source import load_config
from vaegan_dist.errors import ConfigError, VaeganError

pytestmark = pytest.mark.timeout(600)
ENDLESS = "phases=[{name: vae, objective: vae, images: 100_000_000}]"
SETTINGS = ("training.torch_threads=1", "reporting.tensorboard=false", "checkpoint.images=640", ENDLESS)


def arguments(digits: Path, storage: Path, *more: str) -> list[str]:
    shared = ["train", "--preset", "smoke", "--data", str(digits), "--storage", str(storage)]
    return [*shared, *SETTINGS, "reporting.log_images=640", *more]


class Run:
    """A command on the cluster, and what its history says."""

    def __init__(self, nodes: Nodes, digits: Path, storage: Path, *more: str) -> None:
        self.nodes, self.folder, self.log = nodes, storage / "smoke", storage / "log"
        storage.mkdir(exist_ok=True)
        self.driver = nodes.start(*arguments(digits, storage, *more), log=self.log)
        self.wait("trains", lambda: self.places("checkpoint"))

    def places(self, event: str) -> list[int]:
        return [row["images_seen"] for row in rows_of(self.folder) if row["event"] == event]

    def wait(self, what: str, seen: object) -> None:
        assert callable(seen)
        wait_until(what, seen, self.driver, self.log)

    def goes_on(self, starts: int) -> int:
        """Wait for a step after that many restarts; the image count it began at."""
        self.wait(f"restart {starts}", lambda: len(self.places("resume")) == starts)
        begun = self.places("resume")[-1]
        self.wait("a step after it", lambda: self.places("train")[-1] > begun)
        return begun

    def check_history(self) -> None:
        """Every row once, none missing, and each restart at the last checkpoint or stop."""
        places = self.places("train")
        assert places == list(range(640, places[-1] + 1, 640))

    def end(self) -> None:
        self.driver.kill()
        self.driver.wait()


@pytest.mark.ray
@pytest.mark.chaos
def test_a_node_whose_end_is_announced_is_left_with_a_checkpoint(digits: Path, tmp_path: Path) -> None:
    with running_nodes(3) as nodes:
        run = Run(nodes, digits, tmp_path / "runs", "--workers", "2")
        try:
            leaving = nodes.busy()[0]
            nodes.drain(leaving, 120)
            begun = run.goes_on(1)
            # Stopped where it was: nothing is done again.
            assert run.places("end")[-1] == begun and begun in run.places("checkpoint")
            assert leaving not in nodes.busy() and len(nodes.busy()) == 2
            assert "is about to end" in run.log.read_text()
            run.driver.terminate()
            assert run.driver.wait(120) == 75, run.log.read_text()
        finally:
            run.end()
        run.check_history()


@pytest.mark.ray
@pytest.mark.chaos
@pytest.mark.timeout(900)
def test_a_lost_node_is_replaced_and_without_one_the_run_ends_in_time(digits: Path, tmp_path: Path) -> None:
    with running_nodes(2) as nodes:
        run = Run(nodes, digits, tmp_path / "runs", "--workers", "2", "cluster.start_timeout_seconds=90")
        try:
            nodes.remove(nodes.busy()[0])
            nodes.add()
            run.goes_on(1)
            run.check_history()
            nodes.remove(nodes.busy()[0])
            lost = time.monotonic()
            assert run.driver.wait(400) == 1
            assert 60 < time.monotonic() - lost < 300
        finally:
            run.end()
        error = next(line for line in run.log.read_text().splitlines() if line.startswith("error: "))
        assert "no room for 2 workers within 90 s (cluster.start_timeout_seconds)" in error
        assert "2 workers need 2 CPU" in error and "have 1" in error


@pytest.mark.ray
@pytest.mark.chaos
@pytest.mark.timeout(900)
def test_a_range_of_workers_follows_the_nodes(digits: Path, tmp_path: Path) -> None:
    """1 to 4 workers on 64 streams: 3 nodes hold 2, since 3 does not divide them."""
    settings = ("cluster.workers={min: 1, max: 4}", "cluster.resize_seconds=5")
    with running_nodes(2) as nodes:
        run = Run(nodes, digits, tmp_path / "runs", *settings)
        try:
            assert len(nodes.busy()) == 2
            nodes.add()
            nodes.add()
            begun = run.goes_on(1)
            assert run.places("end")[-1] == begun and len(nodes.busy()) == 4
            nodes.remove(nodes.busy()[0])
            run.goes_on(2)
            assert len(nodes.busy()) == 2
            run.driver.terminate()
            assert run.driver.wait(120) == 75, run.log.read_text()
        finally:
            run.end()
        run.check_history()


def test_a_range_is_checked_by_key_and_only_fitting_numbers_are_used() -> None:
    config = load_config("smoke", overrides=["cluster.workers={min: 2, max: 16}"])
    assert config.world_sizes == (2, 4, 8, 16)
    for given, named in {
        "{min: 3, max: 8}": r"cluster\.workers\.min=3 does not divide the 64 streams",
        "{min: 2, max: 6}": r"cluster\.workers\.max=6 does not divide",
        "{min: 4, max: 2}": r"cluster\.workers: min=4 is more than max=2",
        "{max: 0}": r"cluster\.workers\.max=0: ",
        "{most: 4}": r"cluster\.workers\.most=4: unknown key",
        "no": r"cluster\.workers=(no|False): ",
    }.items():
        with pytest.raises(ConfigError, match=named):
            load_config("smoke", overrides=[f"cluster.workers={given}"])


def test_failures_in_a_row_are_counted_by_kind_and_a_new_checkpoint_ends_the_row() -> None:
    budget = Budget(ClusterSection(max_failures=1, max_start_failures=0))
    checkpoint = {"event": "checkpoint", "images_seen": 640}
    budget.note(dict(checkpoint))
    assert "starting again" in budget.spend(Kind.WORKER, "rank 1 died")
    budget.note(dict(checkpoint))  # the one that stood already
    with pytest.raises(VaeganError, match=r"rank 1 died; given up after 2 in a row .*cluster\.max_failures=1"):
        budget.spend(Kind.WORKER, "rank 1 died")
    budget.note({**checkpoint, "images_seen": 1280})
    assert "1 of 1" in budget.spend(Kind.WORKER, "rank 1 died")
    with pytest.raises(VaeganError, match=r"cluster\.max_start_failures=0"):
        budget.spend(Kind.START, "no workers")
    assert kind_of(RuntimeError("lost"), announced=True) is Kind.PREEMPTION
    assert kind_of(RuntimeError("lost"), announced=False) is Kind.WORKER
