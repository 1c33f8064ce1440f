"""Tune's schedulers decide after a restart as they would have; winners; room for trials. No Ray runs."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from vaegan_dist.cluster.ray_tune import slots
from vaegan_dist.cluster.sweep_schedulers import make_scheduler
from vaegan_dist.config_source import load_config
from vaegan_dist.sweeps.ledger import Ledger
from vaegan_dist.sweeps.plan import Plan
from vaegan_dist.sweeps.result import best_trial, pareto_front, ranking
from vaegan_dist.sweeps.search import Proposals
from vaegan_dist.sweeps.settings import SweepSettings
from vaegan_dist.sweeps.space import read_space
from vaegan_dist.sweeps.trial import Judged

SPACE = {"objective.beta": {"uniform": [0, 1]}}


def plan_of(
    folder: Path, metrics: tuple[str, ...] = ("m",), modes: tuple[str, ...] = ("min",), **settings: Any
) -> Plan:
    checked = SweepSettings.model_validate({"space": SPACE, "metric": "m", "trials": 30, **settings})
    config, space, ledger = load_config("smoke"), read_space(SPACE), Ledger(folder)
    judged = Judged(metrics, modes, "train", 256)
    return Plan(checked, space, config, judged, ledger, Proposals(checked, space, config, ledger, metrics))


class _TuneTrial(SimpleNamespace):
    """As much of Tune's trial as the schedulers look at."""

    __hash__ = object.__hash__


class Sweep:
    """A scheduler that is fed by hand, with everything written to the ledger as in a real sweep."""

    def __init__(self, plan: Plan) -> None:
        self.plan, self.scheduler = plan, make_scheduler(plan, 2)
        self.live: dict[int, Any] = {}

    def start(self, number: int) -> None:
        if number not in self.plan.ledger.trials:
            assert self.plan.proposals.next() is not None
        trial = _TuneTrial(trial_id=f"{id(self)}-{number}", config={"proposal": {"trial": number}}, status="RUNNING")
        self.live[number] = trial
        self.scheduler.on_trial_add(SimpleNamespace(get_live_trials=list), trial)

    def tell(self, number: int, images: int, value: float) -> str:
        row = {"images_seen": images, "m": value}
        result = {"images_seen": images, "value": self.plan.judged.score(row)}
        action: str = self.scheduler.on_trial_result(SimpleNamespace(get_live_trials=list), self.live[number], result)
        self.plan.ledger.row(number, row)
        if action == "STOP":
            self.plan.ledger.end(number, "early")
        return action


@pytest.mark.parametrize("name", ["asha", "median"])
def test_a_restarted_scheduler_decides_as_an_uninterrupted_one(tmp_path: Path, name: str) -> None:
    """Twelve trials, the sweep killed after any of its rows: the same trials are stopped at the same images."""
    curves = {n: [10 * (1 + (5 * n) % 12) / rung for rung in (1, 2, 3, 4)] for n in range(12)}
    order = [(n, rung) for start in (0, 4, 8) for rung in range(4) for n in range(start, start + 4)]

    def run(folder: Path, cut: int) -> list[tuple[int, int, str]]:
        sweep = Sweep(plan_of(folder, scheduler=name))
        decided = []
        for index, (number, rung) in enumerate(order):
            if index == cut:
                running = [n for n, t in sweep.plan.ledger.trials.items() if not t.ended]
                sweep.plan.ledger.close()
                sweep = Sweep(plan_of(folder, scheduler=name))
                for n in running:
                    sweep.start(n)
            if number in sweep.plan.ledger.trials and sweep.plan.ledger.trials[number].ended:
                continue
            if number not in sweep.live:
                sweep.start(number)
            decided.append((number, rung, sweep.tell(number, 256 * (rung + 1), curves[number][rung])))
        return decided

    whole = run(tmp_path / "whole", -1)
    assert {action for _, _, action in whole} == {"CONTINUE", "STOP"}
    for cut in range(1, len(order), 5):
        assert run(tmp_path / str(cut), cut) == whole


def test_a_trial_that_has_spent_its_budget_is_not_stopped(tmp_path: Path) -> None:
    sweep = Sweep(plan_of(tmp_path, scheduler="asha"))
    actions = []
    for number, value in enumerate((1.0, 2.0, 3.0)):
        sweep.start(number)
        actions.append(sweep.tell(number, sweep.plan.config.total_images, value))
    assert actions == ["CONTINUE"] * 3


@pytest.mark.parametrize(
    ("scheduler", "images", "first"), [("asha", None, 427), ("asha", 512, 512), ("median", None, 256)]
)
def test_asha_judges_first_after_a_sixth_of_the_run(
    tmp_path: Path, scheduler: str, images: int | None, first: int
) -> None:
    plan = plan_of(tmp_path, scheduler=scheduler, grace_images=images)
    assert plan.config.total_images == 2560 and plan.grace == first


def test_a_value_that_is_no_number_is_stopped_by_asha(tmp_path: Path) -> None:
    sweep = Sweep(plan_of(tmp_path, scheduler="asha"))
    for number, value in enumerate((1.0, 2.0, float("nan"))):
        sweep.start(number)
        action = sweep.tell(number, 512, value)
    assert action == "STOP"


def test_the_winner_came_furthest_and_failures_come_last(tmp_path: Path) -> None:
    plan = plan_of(tmp_path)
    ends = [("early", 256, 0.1), ("done", 2560, 5.0), ("done", 2560, 4.0), ("failed", 2560, 0.0), ("done", 2560, None)]
    for state, images, value in ends:
        trial = plan.proposals.next()
        assert trial is not None
        plan.ledger.row(trial.number, {"images_seen": images, "m": value})
        plan.ledger.end(trial.number, state)  # type: ignore[arg-type]
    best = best_trial(plan)
    assert best is not None and best.number == 2
    assert [trial.number for trial in ranking(plan)][:3] == [2, 1, 0]


def test_the_front_of_two_metrics(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, metrics=("a", "b"), modes=("min", "max"), metric=["a", "b"], mode=["min", "max"])
    for a, b in ((1, 1), (2, 5), (3, 4), (4, 9), (10, 9.1)):
        trial = plan.proposals.next()
        assert trial is not None
        plan.ledger.row(trial.number, {"images_seen": 2560, "a": a, "b": b})
        plan.ledger.end(trial.number, "done")
    assert sorted(trial.number for trial in pareto_front(plan)) == [0, 1, 3, 4]
    best = best_trial(plan)
    assert best is not None and best.number == 3


@pytest.mark.parametrize(
    ("nodes", "overrides", "room"),
    [
        ([{"CPU": 2}], [], 2),
        ([{"CPU": 4}, {"CPU": 3}], ["cluster.cpus_per_worker=2"], 3),
        ([{"CPU": 8, "GPU": 1}], ["cluster.gpus_per_worker=0.25"], 4),
        ([{"CPU": 8, "GPU": 1}], ["cluster.gpus_per_worker=0.3333"], 3),
        ([{"CPU": 8}, {"CPU": 8, "GPU": 2}], ["cluster.gpus_per_worker=1"], 2),
        ([{"CPU": 3}, {"CPU": 3}], ["cluster.workers=2"], 3),
        ([{"CPU": 1}], ["cluster.workers=2"], 0),
    ],
)
def test_as_many_trials_at_a_time_as_nodes_hold(nodes: list[dict[str, float]], overrides: list[str], room: int) -> None:
    assert slots(nodes, load_config("smoke", overrides=overrides)) == room
