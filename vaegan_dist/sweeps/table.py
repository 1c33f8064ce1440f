"""The sweep while it runs: a table that redraws itself on a terminal, plain timed lines everywhere else."""

import datetime
import os
import sys
import threading
import time
from collections.abc import Mapping
from typing import TextIO

import yaml
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from vaegan_dist.reporting.progress import duration, short
from vaegan_dist.sweeps.ledger import Trial
from vaegan_dist.sweeps.plan import Plan
from vaegan_dist.sweeps.result import best_trial, ranking

LINE_SECONDS = 15.0
ROWS = 12
MARKS = {"running": "running", "done": "done", "early": "stopped early", "failed": "failed"}


def params_text(params: Mapping[str, object]) -> str:
    """Values of a trial on one line, keys by their last part."""
    parts = []
    for key, value in params.items():
        word = (
            short(value) if isinstance(value, float) else yaml.safe_dump(value, default_flow_style=True).split("\n")[0]
        )
        parts.append(f"{key.rsplit('.', 1)[-1]}={word}")
    return " ".join(parts)


class View:
    """Shows a plan's ledger and where its trials are."""

    def __init__(self, plan: Plan, stream: TextIO) -> None:
        self.plan, self.stream = plan, stream
        self.interactive = stream.isatty() and os.environ.get("TERM") != "dumb"
        self.console = Console(file=stream, highlight=False, force_terminal=self.interactive or None)
        self.live: Live | None = None
        self.began, self.spoken = time.monotonic(), 0.0
        self.places: Mapping[int, tuple[int, float]] = {}
        self.told = {number for number, trial in plan.ledger.trials.items() if trial.ended}
        self.start_images = sum(trial.images_seen for trial in plan.ledger.trials.values())
        self._lock = threading.Lock()

    def update(self, places: Mapping[int, tuple[int, float]]) -> None:
        """Where the running trials are, about once a second."""
        with self._lock:
            self.places = places
            self._tell_ended()
            if self.interactive:
                self._draw()
            elif time.monotonic() - self.spoken > LINE_SECONDS:
                self.spoken = time.monotonic()
                self._line(self.summary())

    def close(self) -> None:
        """Say what has not been said and leave the last table standing."""
        with self._lock:
            self._tell_ended()
            if self.live is not None:
                self.live.update(self._table())
                self.live.stop()
                self.live = None
            else:
                self._line(self.summary())

    def _tell_ended(self) -> None:
        """One line for each trial that has ended since the last call."""
        for number, trial in sorted(self.plan.ledger.trials.items()):
            if trial.ended and number not in self.told:
                self.told.add(number)
                if not self.interactive or trial.state == "failed":
                    self._line(self._ended(trial))

    def _ended(self, trial: Trial) -> str:
        values = " ".join(f"{m} {_value(trial.last(m))}" for m in self.plan.judged.metrics)
        what = trial.message if trial.state == "failed" else f"{values} at {trial.images_seen:,} images"
        return f"trial {trial.name} {MARKS[trial.state]}: {what}  ({params_text(trial.params)})"

    def summary(self) -> str:
        """Counts, best, rate and time left on one line."""
        return "  ".join(part for part in (self._counts(), self._speed(), self._best()) if part)

    def _counts(self) -> str:
        trials = list(self.plan.ledger.trials.values())
        counts = {state: sum(trial.state == state for trial in trials) for state in MARKS}
        waiting = self.plan.proposals.total - len(trials)
        parts = [f"{count} {MARKS[state]}" for state, count in counts.items() if count]
        return f"{self.plan.proposals.total} trials: " + ", ".join(
            [*parts, *([f"{waiting} waiting"] if waiting else [])]
        )

    def _speed(self) -> str:
        running = [n for n, trial in list(self.plan.ledger.trials.items()) if not trial.ended]
        rate = sum(self.places[number][1] for number in running if number in self.places)
        parts = [f"{rate:,.0f} images/s in total"] if rate else []
        left = self._seconds_left()
        return "  ".join([*parts, *([f"about {duration(left)} left"] if left is not None else [])])

    def _seconds_left(self) -> float | None:
        """From the images that trials of this start have spent, and those that ended ones spent on average."""
        trials = list(self.plan.ledger.trials.values())
        ended = [trial for trial in trials if trial.ended]
        spent = sum(self._seen(trial) for trial in trials) - self.start_images
        elapsed = time.monotonic() - self.began
        if spent <= 0 or elapsed < 1:
            return None
        total = self.plan.config.total_images
        typical = sum(trial.images_seen for trial in ended) / len(ended) if ended else total
        running = sum(max(typical - self._seen(trial), 0.0) for trial in trials if not trial.ended)
        waiting = (self.plan.proposals.total - len(trials)) * typical
        return (running + waiting) / (spent / elapsed)

    def _seen(self, trial: Trial) -> int:
        place = self.places.get(trial.number, (0, 0.0))[0] if not trial.ended else 0
        return max(trial.images_seen, place)

    def _best(self) -> str:
        best = best_trial(self.plan)
        if best is None:
            return ""
        values = ", ".join(f"{metric} {_value(best.last(metric))}" for metric in self.plan.judged.metrics)
        return f"best {values} in {best.name} ({params_text(best.params)})"

    def _draw(self) -> None:
        if self.live is None:
            self.live = Live(console=self.console, refresh_per_second=2, redirect_stdout=False, redirect_stderr=False)
            self.live.start()
        self.live.update(self._table())

    def _table(self) -> Group:
        table = Table(box=None, padding=(0, 2, 0, 0))
        for name in ("trial", "state", "images", *self.plan.judged.metrics, "values"):
            table.add_column(name, no_wrap=True, overflow="ellipsis")
        trials = self._shown()
        for trial in trials:
            style = {"running": "cyan", "failed": "red", "early": "dim"}.get(trial.state, "")
            values = (_value(trial.last(metric)) for metric in self.plan.judged.metrics)
            cells = (trial.name, MARKS[trial.state], f"{self._seen(trial):,}", *values, params_text(trial.params))
            table.add_row(*cells, style=style)
        more = len(self.plan.ledger.trials) - len(trials)
        lines = [Text(line) for line in (self._counts(), self._speed(), self._best()) if line]
        return Group(*lines, table, *([Text(f"and {more} more", "dim")] if more > 0 else []))

    def _shown(self) -> list[Trial]:
        """The running ones and the best."""
        trials = [trial for trial in list(self.plan.ledger.trials.values()) if not trial.ended]
        return [*trials[:ROWS], *ranking(self.plan)[: max(ROWS - len(trials), 3)]]

    def _line(self, text: str) -> None:
        if self.interactive:
            self.console.print(Text(text))
        else:
            stamp = datetime.datetime.now().strftime("%Y-%m-%d %H:%M:%S")
            print(f"{stamp} {text}", file=self.stream, flush=True)


def _value(value: float | None) -> str:
    return "-" if value is None else short(value)


def view(plan: Plan) -> View:
    """The view on standard output."""
    return View(plan, sys.stdout)
