"""The sweep while it runs: a table that redraws itself on a terminal, plain timed lines everywhere else."""

import datetime
import os
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
from vaegan_dist.sweeps.result import ranking
from vaegan_dist.sweeps.standing import Places, Standing

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
    """Shows where a sweep stands."""

    def __init__(self, standing: Standing, stream: TextIO) -> None:
        self.standing, self.plan, self.stream = standing, standing.plan, stream
        self.interactive = stream.isatty() and os.environ.get("TERM") != "dumb"
        self.console = Console(file=stream, highlight=False, force_terminal=self.interactive or None)
        self.live: Live | None = None
        self.spoken = 0.0
        self.told = {number for number, trial in self.plan.ledger.trials.items() if trial.ended}
        self._lock = threading.Lock()

    def update(self, places: Places) -> None:
        """Where the trials under way are, about once a second."""
        self.standing.update(places)
        with self._lock:
            self._tell_ended()
            if self.interactive:
                self._draw()
            elif time.monotonic() - self.spoken > LINE_SECONDS:
                self.spoken = time.monotonic()
                self._line(self.summary())

    def close(self) -> None:
        """Say what has not been said and leave the last table standing; nothing is under way any more."""
        self.standing.update({})
        with self._lock:
            self._tell_ended()
            if self.live is not None:
                self.live.update(self._table())
                self.live.stop()
                self.live = None
            else:
                self._line(self.summary())

    def say(self, text: str) -> None:
        """A line of its own."""
        with self._lock:
            self._line(text)

    def warn(self, text: str) -> None:
        """A warning on a line of its own."""
        self.say(f"warning: {text}")

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
        counts = self.standing.counts()
        parts = [f"{counts[state]} {mark}" for state, mark in (*MARKS.items(), ("waiting", "waiting")) if counts[state]]
        return f"{self.plan.proposals.total} trials: {', '.join(parts)}"

    def _speed(self) -> str:
        rate, left = self.standing.rate(), self.standing.seconds_left()
        parts = [f"{rate:,.0f} images/s in total"] if rate else []
        return "  ".join([*parts, *([f"about {duration(left)} left"] if left is not None else [])])

    def _best(self) -> str:
        best = self.standing.best()
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
            cells = (
                trial.name,
                MARKS[trial.state],
                f"{self.standing.seen(trial):,}",
                *values,
                params_text(trial.params),
            )
            table.add_row(*cells, style=style)
        more = len(self.plan.ledger.trials) - len(trials)
        lines = [Text(line) for line in (self._counts(), self._speed(), self._best()) if line]
        return Group(*lines, table, *([Text(f"and {more} more", "dim")] if more > 0 else []))

    def _shown(self) -> list[Trial]:
        """Those under way and the best."""
        trials = self.standing.under_way()
        return [*trials[:ROWS], *ranking(self.plan)[: max(ROWS - len(trials), 3)]]

    def _line(self, text: str) -> None:
        if self.interactive:
            self.console.print(Text(text))
        else:
            stamp = datetime.datetime.now().strftime("%Y-%m-%d %H:%M:%S")
            print(f"{stamp} {text}", file=self.stream, flush=True)


def _value(value: float | None) -> str:
    return "-" if value is None else short(value)
