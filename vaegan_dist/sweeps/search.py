"""Where configurations come from: an Optuna study that is rebuilt from the ledger, asked anew for each trial.

Each proposal is a function of (seed, number, what the ledger held), so that a sweep that was killed proposes what it
would have proposed. The study is Optuna's own, with its sampler; only its memory is ours.
"""

import logging
import math
import random
import warnings
from collections.abc import Sequence
from typing import Any

import optuna
import yaml
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.samplers import BaseSampler, RandomSampler, TPESampler
from optuna.study import StudyDirection
from optuna.trial import TrialState, create_trial

from vaegan_dist.config import Config
from vaegan_dist.seeding import derive_seed
from vaegan_dist.sweeps.ledger import Ledger, Trial
from vaegan_dist.sweeps.settings import SweepSettings
from vaegan_dist.sweeps.space import Domain, Params, Space

optuna.logging.set_verbosity(logging.ERROR)
WORST = 1e30


class Proposals:
    """What to try next."""

    def __init__(
        self, settings: SweepSettings, space: Space, config: Config, ledger: Ledger, metrics: Sequence[str]
    ) -> None:
        self.settings, self.space, self.ledger, self.metrics = settings, space, ledger, tuple(metrics)
        self.modes = settings.modes(len(self.metrics))
        self.seed = config.run.seed
        self.points = space.grid(("grid", "choice") if settings.searcher == "grid" else ("grid",))
        if settings.scheduler != "none":
            # Trials are judged against those before them: in the order of a grid the first ones would all look good.
            random.Random(derive_seed(self.seed, "grid")).shuffle(self.points)

    @property
    def total(self) -> int:
        """Trials of the whole sweep."""
        if self.settings.searcher == "grid" or self.space.only_grid:
            return len(self.points)
        return self.settings.trials * len(self.points)

    def next(self) -> Trial | None:
        """A new trial, in the ledger already; None when there are enough."""
        number = len(self.ledger.trials)
        return self.ledger.create(self._propose(number)) if number < self.total else None

    def _propose(self, number: int) -> Params:
        fixed = dict(self.points[number % len(self.points)])
        if number < len(self.settings.initial):
            fixed |= self.settings.initial[number]
        study = make_study(self.space, self.ledger, self.metrics, self.modes, self._sampler(number))
        study.enqueue_trial({_name(self.space, key, value, fixed): _encode(value) for key, value in fixed.items()})
        with warnings.catch_warnings():
            # Optuna says so when a fixed value lies outside of a domain; `check_space` has refused that already.
            warnings.simplefilter("ignore")
            trial = study.ask()
            params = self.space.walk(lambda key, branch, domain: suggest(trial, self.space, key, branch, domain))
        return {**params, **{key: value for key, value in fixed.items() if key in params}}

    def _sampler(self, number: int) -> BaseSampler:
        seed = derive_seed(self.seed, "sweep", number) % 2**32
        if self.settings.searcher == "tpe":
            return TPESampler(seed=seed, n_startup_trials=self.settings.startup_trials, constant_liar=True)
        return RandomSampler(seed=seed)


def make_study(
    space: Space,
    ledger: Ledger,
    metrics: Sequence[str],
    modes: Sequence[str],
    sampler: BaseSampler | None = None,
    running: bool = True,
) -> optuna.Study:
    """The ledger as Optuna sees it. A trial without a value, or with none that is a number, counts as the worst."""
    directions = [StudyDirection.MINIMIZE if mode == "min" else StudyDirection.MAXIMIZE for mode in modes]
    study = optuna.create_study(directions=directions, sampler=sampler)
    worst = [_worst(ledger, metric, mode) for metric, mode in zip(metrics, modes, strict=True)]
    for trial in ledger.trials.values():
        if not trial.ended and not running:
            continue
        params, distributions = _as_optuna(space, trial.params)
        values = [value if (value := trial.last(m)) is not None else w for m, w in zip(metrics, worst, strict=True)]
        study.add_trial(
            create_trial(
                state=TrialState.COMPLETE if trial.ended else TrialState.RUNNING,
                values=values if trial.ended else None,
                params=params,
                distributions=distributions,
            )
        )
    return study


def _worst(ledger: Ledger, metric: str, mode: str) -> float:
    """The worst value that any trial has had: bad enough, and it does not drown the others."""
    values = [value for trial in ledger.trials.values() if (value := trial.last(metric)) is not None]
    if not values:
        return WORST if mode == "min" else -WORST
    return max(values) if mode == "min" else min(values)


def _as_optuna(space: Space, params: Params) -> tuple[dict[str, Any], dict[str, BaseDistribution]]:
    encoded: dict[str, Any] = {}
    distributions: dict[str, BaseDistribution] = {}
    for key, branches in space.domains.items():
        for number, domain in enumerate(branches):
            if key in params and domain.holds({**space.fixed, **params}):
                name = parameter_name(space, key, number)
                distributions[name] = _distribution(domain)
                encoded[name] = _encode(domain.tidy(params[key]))
                break
    return encoded, distributions


def parameter_name(space: Space, key: str, branch: int) -> str:
    """Optuna wants one distribution for a name; a key with several conditions has one for each."""
    return key if len(space.domains[key]) == 1 else f"{key} ({branch + 1})"


def _name(space: Space, key: str, value: Any, params: Params) -> str:
    branches = space.domains[key]
    numbers = [n for n, domain in enumerate(branches) if domain.holds({**space.fixed, **params})] or [0]
    return parameter_name(space, key, numbers[0])


def suggest(trial: optuna.Trial, space: Space, key: str, branch: int, domain: Domain) -> Any:
    """Ask Optuna for the value of one key."""
    name, distribution = parameter_name(space, key, branch), _distribution(domain)
    if isinstance(distribution, CategoricalDistribution):
        chosen = trial.suggest_categorical(name, distribution.choices)
        return domain.values[distribution.choices.index(chosen)]
    if isinstance(distribution, IntDistribution):
        return trial.suggest_int(name, distribution.low, distribution.high)
    assert isinstance(distribution, FloatDistribution)
    return domain.tidy(trial.suggest_float(name, distribution.low, distribution.high, log=distribution.log))


def _distribution(domain: Domain) -> BaseDistribution:
    if domain.finite:
        return CategoricalDistribution([_encode(value) for value in domain.values])
    low, high = domain.values
    if domain.kind == "randint":
        return IntDistribution(low, high)
    return FloatDistribution(float(low), float(high), log=domain.kind == "loguniform")


def _encode(value: Any) -> Any:
    """Optuna's categories are plain values; a list or a mapping goes as its YAML."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    return yaml.safe_dump(value, default_flow_style=True, width=10_000).strip()


def importances(space: Space, ledger: Ledger, metric: str, mode: str) -> dict[str, float]:
    """Share of the metric's variance that each key explains (Hutter et al. 2014, fANOVA); empty below four trials.

    Only trials that had a value, and that every key applies to, count; keys that never varied have none.
    """
    measured = Ledger.__new__(Ledger)
    measured.trials = {n: t for n, t in ledger.trials.items() if t.ended and t.last(metric) is not None}
    values = [t.last(metric) for t in measured.trials.values()]
    if len(values) < 4 or len(set(values)) < 2 or not all(math.isfinite(v or 0.0) for v in values):
        return {}
    study = make_study(space, measured, (metric,), (mode,), running=False)
    evaluator = optuna.importance.FanovaImportanceEvaluator(seed=0)
    try:
        return dict(optuna.importance.get_param_importances(study, evaluator=evaluator))
    except (ValueError, RuntimeError):
        return {}  # too few trials for these keys
