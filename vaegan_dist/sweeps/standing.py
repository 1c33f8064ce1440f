"""Where a sweep stands while it runs: its ledger and how far its trials are, for the table and for the metrics."""

import threading
import time
from collections.abc import Callable, Mapping

from vaegan_dist.reporting.sweep_metrics import SweepIdentity, SweepSnapshot, TrialSnapshot
from vaegan_dist.sweeps.ledger import Trial
from vaegan_dist.sweeps.plan import Plan
from vaegan_dist.sweeps.result import best_trial

Places = Mapping[int, tuple[int, float]]
"""images seen and images per second of the trials under way, by number"""


def identity_of(plan: Plan) -> SweepIdentity:
    """What a sweep's metrics say of it."""
    return SweepIdentity(
        sweep=plan.config.run.name,
        modes=dict(zip(plan.judged.metrics, plan.judged.modes, strict=True)),
        trials=plan.proposals.total,
        total_images=plan.proposals.total * plan.config.total_images,
        preset=plan.config.preset or "",
        network=plan.config.model.network,
        searcher=plan.settings.searcher,
        scheduler=plan.settings.scheduler,
    )


class Standing:
    """A plan's ledger, and where its trials are between two values of the metric. Safe for threads."""

    def __init__(self, plan: Plan, clock: Callable[[], float] = time.monotonic) -> None:
        self.plan, self._clock = plan, clock
        self.places: Places = {}
        self._began = self._progressed = clock()
        self._start_images = sum(trial.images_seen for trial in self._trials())
        self._lock = threading.Lock()
        self._mark: object = self._news()
        self._best: tuple[int, Trial | None] = (0, None)

    def update(self, places: Places) -> None:
        """Where the trials under way are, about once a second."""
        self.places = places
        self._look_for_news()

    def under_way(self) -> list[Trial]:
        """Trials that have a process; one that is paused, or has yet to begin, has none."""
        places = self.places
        return [trial for trial in self._trials() if trial.number in places and not trial.ended]

    def counts(self) -> dict[str, int]:
        """Trials by state; together they are all of the sweep."""
        trials = self._trials()
        ended = {state: sum(trial.state == state for trial in trials) for state in ("done", "early", "failed")}
        running = len(self.under_way())
        return {"waiting": self.plan.proposals.total - running - sum(ended.values()), "running": running, **ended}

    def seen(self, trial: Trial) -> int:
        """Images that a trial has seen, by its last record or its last value."""
        place, _ = self.places.get(trial.number, (0, 0.0))
        return trial.images_seen if trial.ended else max(trial.images_seen, place)

    def rate(self) -> float:
        """Images per second of all trials under way."""
        places = self.places
        return sum(places[trial.number][1] for trial in self.under_way() if trial.number in places)

    def seconds_left(self) -> float | None:
        """From the images that trials of this start have spent, and those that ended ones spent on average."""
        trials = self._trials()
        ended = [trial for trial in trials if trial.ended]
        spent = sum(self.seen(trial) for trial in trials) - self._start_images
        elapsed = self._clock() - self._began
        if spent <= 0 or elapsed < 1:
            return None
        total = self.plan.config.total_images
        typical = sum(trial.images_seen for trial in ended) / len(ended) if ended else total
        running = sum(max(typical - self.seen(trial), 0.0) for trial in trials if not trial.ended)
        waiting = (self.plan.proposals.total - len(trials)) * typical
        return (running + waiting) / (spent / elapsed)

    def best(self) -> Trial | None:
        """The winner so far; it is sought again only when a trial has ended, since by several metrics that is long."""
        ended = sum(trial.ended for trial in self._trials())
        with self._lock:
            if self._best[0] != ended:
                self._best = (ended, best_trial(self.plan))
            return self._best[1]

    def snapshot(self) -> SweepSnapshot:
        """All of it, for the metrics."""
        self._look_for_news()
        trials, best = self._trials(), self.best()
        return SweepSnapshot(
            trials=self.counts(),
            images_trained=sum(trial.images_trained for trial in trials),
            images_seen=sum(self.seen(trial) for trial in trials),
            silent_seconds=max(self._clock() - self._progressed, 0.0),
            remaining_seconds=self.seconds_left(),
            best=self._of(best) if best is not None else None,
            under_way=tuple(self._of(trial) for trial in self.under_way()),
        )

    def _trials(self) -> list[Trial]:
        """At once: the driver's main thread adds to them."""
        return list(self.plan.ledger.trials.values())

    def _of(self, trial: Trial) -> TrialSnapshot:
        values = {metric: trial.last(metric) for metric in self.plan.judged.metrics}
        return TrialSnapshot(
            number=trial.number,
            name=trial.name,
            images_seen=self.seen(trial),
            values={metric: value for metric, value in values.items() if value is not None},
            images_per_second=self.places.get(trial.number, (0, 0.0))[1],
            params=trial.params,
        )

    def _news(self) -> object:
        trials = self._trials()
        ended = sum(trial.ended for trial in trials)
        return dict(self.places), len(trials), ended, sum(trial.images_trained for trial in trials)

    def _look_for_news(self) -> None:
        mark = self._news()
        with self._lock:
            if mark != self._mark:
                self._mark, self._progressed = mark, self._clock()
