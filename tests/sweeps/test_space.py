"""The space and the settings: what is refused, in which words, and what proposals are made of."""

import random
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from vaegan_dist.config_source import load_config
from vaegan_dist.errors import ConfigError
from vaegan_dist.sweeps.ledger import Ledger
from vaegan_dist.sweeps.search import Proposals, make_study
from vaegan_dist.sweeps.settings import SweepSettings, read_settings
from vaegan_dist.sweeps.space import Space, check_space, read_space

CONFIG = load_config("smoke")


def settings_of(tmp_path: Path, **tree: Any) -> SweepSettings:
    path = tmp_path / "space.yaml"
    path.write_text(yaml.safe_dump(tree))
    return read_settings(path)


SPACE = {"objective.beta": {"loguniform": [0.01, 10]}}


@pytest.mark.parametrize(
    ("tree", "said"),
    [
        ({"space": SPACE, "trails": 3}, "trails: unknown key (did you mean 'trials'?)"),
        ({"trials": 3}, "space: is required"),
        ({"space": SPACE, "trials": 0}, "trials=0: input should be greater than 0"),
        ({"space": SPACE, "metric": ["a", "b"], "scheduler": "asha"}, "scheduler=asha compares trials by one metric"),
        ({"space": SPACE, "metric": ["a", "b"], "mode": ["min"]}, "mode lists 1 directions for 2 metrics"),
        ({"space": SPACE, "scheduler": "pbt", "searcher": "tpe"}, "scheduler=pbt changes values itself"),
        ({"space": SPACE, "autoscaling": True}, "autoscaling=true: how many trials at a time is then a choice"),
        ({"space": {"objective.bta": {"uniform": [0, 1]}}}, "objective.bta=0: unknown key (did you mean 'beta'?)"),
        (
            {"space": {"objective.beta": {"uniform": [-1, 1]}}},
            "objective.beta=-1: input should be greater than or equal",
        ),
        ({"space": {"objective.beta": {"uniform": [1, 1]}}}, "space.objective.beta.uniform=[1, 1]: the first must be"),
        ({"space": {"objective.beta": {"loguniform": [0, 1]}}}, "the lower bound must be above 0"),
        ({"space": {"objective.beta": {"uniform": [1]}}}, "give two numbers"),
        ({"space": {"objective.beta": {"normal": [0, 1]}}}, "is none of uniform, loguniform, randint, choice, grid"),
        ({"space": {"objective.beta": {"choice": []}}}, "give a list"),
        ({"space": {"objective.beta": {"choice": [1, 1]}}}, "a value stands there twice"),
        ({"space": {"training.batch_size": {"randint": [1.5, 3]}}}, "give whole numbers"),
        ({"space": {"training.batch_size": {"choice": [64, 66]}}}, "minibatch_std=4 does not divide the 66"),
        ({"space": {"run.name": {"choice": ["a", "b"]}}}, "space.run.name: the sweep decides it"),
        ({"space": {"objective.r1": {"uniform": [0, 1], "when": {"objective.fakes": "prior"}}}}, "is not in the space"),
        ({"space": SPACE, "initial": [{"objective.beta": 11}]}, "initial.0.objective.beta=11: outside of the space"),
        ({"space": SPACE, "initial": [{"objective.r1": 1}]}, "initial.0.objective.r1: not in the space"),
        ({"space": SPACE, "searcher": "grid"}, "searcher=grid: space.objective.beta is loguniform, which has no end"),
    ],
)
def test_a_bad_file_is_one_line_that_names_key_and_remedy(tmp_path: Path, tree: dict[str, Any], said: str) -> None:
    from vaegan_dist.sweeps.plan import _refuse_infinite

    with pytest.raises(ConfigError) as caught:
        settings = settings_of(tmp_path, **tree)
        space = read_space(settings.space)
        if settings.searcher == "grid":
            _refuse_infinite(space)
        check_space(space, CONFIG, settings.initial)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


CONDITIONAL = {
    "objective.adversarial": {"choice": ["hinge", "non_saturating"]},
    "objective.r1": [
        {"loguniform": [0.01, 1], "when": {"objective.adversarial": "non_saturating"}},
        {"choice": [0.0], "when": {"objective.adversarial": ["hinge"]}},
    ],
    "objective.penalty_interval": {"randint": [1, 4], "when": {"objective.adversarial": "non_saturating"}},
    "model.hidden": {"choice": [[32], [32, 16]]},
    "objective.gamma": 0.3,
}


def proposals_of(folder: Path, space: dict[str, Any], seed: int = 0, **settings: Any) -> Proposals:
    checked = SweepSettings.model_validate({"space": space, "metric": "m", **settings})
    config = load_config("smoke", overrides=[f"run.seed={seed}"])
    return Proposals(checked, read_space(space), config, Ledger(folder), ("m",))


def values_of(proposals: Proposals) -> list[dict[str, Any]]:
    made = []
    while (trial := proposals.next()) is not None:
        made.append(trial.params)
        proposals.ledger.row(trial.number, {"images_seen": 1, "m": float(trial.number % 3)})
        proposals.ledger.end(trial.number, "done")
    return made


@pytest.mark.parametrize("searcher", ["random", "tpe"])
def test_conditions_decide_which_keys_a_proposal_has(tmp_path: Path, searcher: str) -> None:
    made = values_of(proposals_of(tmp_path, CONDITIONAL, searcher=searcher, trials=24, startup_trials=8))
    assert {params["objective.adversarial"] for params in made} == {"hinge", "non_saturating"}
    for params in made:
        hinge = params["objective.adversarial"] == "hinge"
        assert ("objective.penalty_interval" in params) == (not hinge)
        assert params["objective.r1"] == 0 if hinge else 0.01 <= params["objective.r1"] <= 1
        assert params["model.hidden"] in ([32], [32, 16])
    soft = [str(params) for params in made if "objective.penalty_interval" in params]
    assert len(soft) > 3 and len(set(soft)) == len(soft)


@pytest.mark.parametrize("searcher", ["random", "tpe"])
def test_an_interrupted_search_proposes_what_it_would_have_proposed(tmp_path: Path, searcher: str) -> None:
    whole = values_of(proposals_of(tmp_path / "whole", CONDITIONAL, searcher=searcher, trials=14, startup_trials=5))
    for stop in (1, 6, 9):
        folder = tmp_path / f"cut-{stop}"
        values_of(proposals_of(folder, CONDITIONAL, searcher=searcher, trials=stop, startup_trials=5))
        again = proposals_of(folder, CONDITIONAL, searcher=searcher, trials=14, startup_trials=5)
        assert len(again.ledger.trials) == stop
        values_of(again)
        assert [trial.params for trial in again.ledger.trials.values()] == whole
    assert values_of(proposals_of(tmp_path / "other", CONDITIONAL, seed=1, searcher=searcher, trials=14)) != whole


def test_tpe_comes_closer_than_chance(tmp_path: Path) -> None:
    """On a bowl in two dimensions, the later proposals are nearer to its bottom than random ones."""
    space = {"a": {"uniform": [-1, 1]}, "b": {"loguniform": [0.01, 100]}}

    def run(searcher: str) -> float:
        proposals = proposals_of(tmp_path / searcher, space, searcher=searcher, trials=40)
        found = []
        while (trial := proposals.next()) is not None:
            import math

            value = (trial.params["a"] - 0.3) ** 2 + (math.log10(trial.params["b"]) - 1) ** 2 / 4
            proposals.ledger.row(trial.number, {"images_seen": 1, "m": value})
            proposals.ledger.end(trial.number, "done")
            found.append(value)
        return sum(found[20:]) / 20

    assert run("tpe") < run("random") / 2


def test_a_grid_crosses_its_values_and_initial_points_come_first(tmp_path: Path) -> None:
    space = {"a": {"grid": [1, 2, 3]}, "b": {"choice": ["x", "y"]}, "c": {"uniform": [0, 1], "when": {"b": "x"}}}
    crossed = values_of(proposals_of(tmp_path / "1", {k: space[k] for k in "ab"}, searcher="grid"))
    assert [tuple(p.values()) for p in crossed] == [(a, b) for a in (1, 2, 3) for b in "xy"]
    mixed = values_of(proposals_of(tmp_path / "2", space, trials=2, initial=[{"a": 3, "b": "x", "c": 0.25}]))
    assert mixed[0] == {"a": 3, "b": "x", "c": 0.25}
    assert [p["a"] for p in mixed[1:]] == [2, 3, 1, 2, 3]


def test_failed_trials_count_as_the_worst(tmp_path: Path) -> None:
    proposals = proposals_of(tmp_path, {"a": {"uniform": [0, 1]}}, trials=3)
    for value in (1.0, float("nan"), 5.0):
        trial = proposals.next()
        assert trial is not None
        proposals.ledger.row(trial.number, {"images_seen": 1, "m": value})
        proposals.ledger.end(trial.number, "done")
    study = make_study(proposals.space, proposals.ledger, ("m",), ("min",))
    assert [trial.value for trial in study.trials] == [1.0, 5.0, 5.0]


@given(st.integers(0, 2**32), st.sampled_from(["uniform", "loguniform", "randint"]), st.floats(0, 1))
def test_neighbours_stay_in_the_space_and_move(seed: int, kind: str, resample: float) -> None:
    space: Space = read_space({"a": {kind: [1, 9]}, "b": {"choice": ["x", "y", "z"]}, "c": {"grid": [1, 2]}})
    rng = random.Random(seed)
    params = {"a": 4 if kind == "randint" else 4.0, "b": "y", "c": 2}
    for _ in range(5):
        near = space.perturb(params, rng, resample)
        assert 1 <= near["a"] <= 9 and near["c"] == 2
        moved = [round(x, 3) for x in (params["a"] * 0.8, params["a"] * 1.25, 1, 9)]
        assert resample > 0 or kind == "randint" or round(near["a"], 3) in moved
        params = near
