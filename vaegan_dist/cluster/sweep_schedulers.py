"""Ray Tune's schedulers with what a sweep that goes on needs: they are told what the ledger holds before they decide.

Tune does not save a scheduler's state with an experiment: after a restart its ASHA would judge the next trial at each
rung against nobody. PBT draws from this sweep's own generator instead of the global one, and stays in the space.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ray.tune.experiment import Trial as TuneTrial
from ray.tune.schedulers import (
    ASHAScheduler,
    FIFOScheduler,
    HyperBandScheduler,
    MedianStoppingRule,
    PopulationBasedTraining,
    TrialScheduler,
)

from vaegan_dist.seeding import derive_seed
from vaegan_dist.sweeps.plan import Plan

CLOCK = "images_seen"
SCORE = "value"
INTERVALS = "intervals"


def number_of(trial: Any) -> int:
    """Our number of a trial of Tune's."""
    return int(trial.config["proposal"]["trial"])


@dataclass(frozen=True, eq=False)
class _StandIn:
    """A trial of an earlier start, as schedulers look at one."""

    trial_id: str
    config: dict[str, Any]


class _Remembering:
    """Feeds a scheduler with rows of the ledger; its decisions on them were made before and are not asked again."""

    sweep: Plan
    fed: set[int]

    def recall(self, sweep: Plan) -> None:
        """Tell of the trials that ended in an earlier start."""
        self.sweep, self.fed = sweep, set()
        for trial in sweep.ledger.trials.values():
            if trial.ended:
                self.on_trial_add(None, _StandIn(f"ended-{trial.number}", {"proposal": {"trial": trial.number}}))

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        """Also called when Tune starts a trial again after its process died."""
        super().on_trial_add(tune_controller, trial)  # type: ignore[misc]
        number = number_of(trial)
        if number in self.fed:
            return
        self.fed.add(number)
        for row in self.sweep.ledger.trials[number].rows:
            result = {CLOCK: row["images_seen"], SCORE: self.sweep.judged.score(row)}
            self.feed(trial, result)

    def feed(self, trial: Any, result: dict[str, Any]) -> None:
        """Take note of a row without judging by it."""
        super().on_trial_result(None, trial, result)  # type: ignore[misc]

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        """A trial that has spent its budget ends by itself: it is done, not stopped."""
        action: str = super().on_trial_result(tune_controller, trial, result)  # type: ignore[misc]
        over = result.get(CLOCK, 0) >= self.sweep.config.total_images
        return str(TrialScheduler.CONTINUE) if over else action


class _Bounded:
    """Lets at most so many trials run at a time, where Tune must know all of them from the start."""

    concurrent: int

    def choose_trial_to_run(self, tune_controller: Any) -> TuneTrial | None:
        """The next one, or None as long as enough run."""
        running = sum(trial.status == TuneTrial.RUNNING for trial in tune_controller.get_trials())
        if running >= self.concurrent:
            return None
        chosen: TuneTrial | None = super().choose_trial_to_run(tune_controller)  # type: ignore[misc]
        return chosen


class Asha(_Remembering, ASHAScheduler):  # type: ignore[misc]
    """Asynchronous successive halving. What is fed is noted at its rung whatever would be decided."""


class Median(_Remembering, MedianStoppingRule):  # type: ignore[misc]
    """Stops what is worse than the median of the others' running means."""

    def feed(self, trial: Any, result: dict[str, Any]) -> None:
        """Only kept: in another order than it came, a row might seem to have stopped a trial that went on."""
        self._results[trial].append(result)


class HyperBand(_Bounded, HyperBandScheduler):  # type: ignore[misc]
    """Synchronous successive halving in several brackets; a bracket begins anew with a sweep that is continued."""


class Pbt(_Bounded, PopulationBasedTraining):  # type: ignore[misc]
    """Population-based training; a copy's values are neighbours of the original's inside of the space."""

    def __init__(self, sweep: Plan) -> None:
        settings = sweep.settings
        super().__init__(
            time_attr=CLOCK,
            metric=SCORE,
            mode=sweep.judged.modes[0],
            perturbation_interval=settings.perturb_images or sweep.judged.interval,
            quantile_fraction=settings.quantile,
            custom_explore_fn=lambda config: config,
            log_config=False,
            require_attrs=False,
        )
        self.sweep = sweep
        self.exploits = sum(len(trial.changes) for trial in sweep.ledger.trials.values())

    def _get_new_config(self, trial: TuneTrial, trial_to_clone: TuneTrial) -> tuple[dict[str, Any], dict[str, str]]:
        number, source = number_of(trial), number_of(trial_to_clone)
        self.exploits += 1
        rng = random.Random(derive_seed(self.sweep.config.run.seed, "pbt", number, self.exploits))
        params = self.sweep.space.perturb(
            trial_to_clone.config["proposal"]["params"], rng, self.sweep.settings.resample
        )
        images_seen = int(self._trial_state[trial_to_clone].last_train_time)
        self.sweep.ledger.change(number, params, source, images_seen)
        return {"proposal": {"trial": number, "params": params, "known": images_seen}}, {}

    def _summarize_hyperparam_changes(self, *args: Any, **kwargs: Any) -> str:
        return ""  # the ledger has them


def make_scheduler(sweep: Plan, concurrent: int) -> TrialScheduler:
    """The scheduler that the settings name."""
    settings, judged = sweep.settings, sweep.judged
    total, mode = sweep.config.total_images, judged.modes[0]
    common = {"time_attr": CLOCK, "metric": SCORE, "mode": mode}
    grace = sweep.grace
    makers: dict[str, Callable[[], TrialScheduler]] = {
        "none": FIFOScheduler,
        # Past the budget a trial ends by itself, so that it ends as done and not as stopped.
        "asha": lambda: Asha(
            **common,
            max_t=max(total, grace),
            grace_period=grace,
            reduction_factor=settings.reduction_factor,
            stop_last_trials=False,
        ),
        # Its brackets follow from the number of its time units: single images would make a dozen of them.
        "hyperband": lambda: HyperBand(
            time_attr=INTERVALS,
            metric=SCORE,
            mode=mode,
            max_t=-(-total // judged.interval),
            reduction_factor=settings.reduction_factor,
            stop_last_trials=False,
        ),
        # An infinite slice: a trial never makes room for others while there is nothing to compare it with.
        "median": lambda: Median(**common, grace_period=grace, min_time_slice=float("inf")),
        "pbt": lambda: Pbt(sweep),
    }
    scheduler = makers[settings.scheduler]()
    if isinstance(scheduler, _Bounded):
        scheduler.concurrent = concurrent
    if isinstance(scheduler, _Remembering):
        scheduler.recall(sweep)
    return scheduler
