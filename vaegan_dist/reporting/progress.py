"""What a person sees of a run: a bar that redraws itself on a terminal, plain timed lines everywhere else."""

import datetime
import math
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TextIO

import numpy as np
import numpy.typing as npt
from PIL import Image
from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from vaegan_dist.reporting.records import Record, family, integer, measurements, number, text

PLAIN_INTERVAL_SECONDS = 10.0
SMOOTHING_SECONDS = 30.0
SILENCE_SECONDS = 60.0
TERM_FAMILIES = ("reconstruction", "divergence", "adversarial", "accuracy", "other")


class Rate:
    """Images per second, smoothed over about `horizon` seconds of training and not over log intervals.

    A new phase has its own speed: after `restart` the old estimate stands only until the new one has a value.
    """

    def __init__(self, horizon: float = SMOOTHING_SECONDS) -> None:
        self._horizon = horizon
        self._images = self._seconds = 0.0
        self._place: tuple[float, float] | None = None
        self._estimate: float | None = None

    @property
    def value(self) -> float | None:
        """The smoothed rate; None before the first two places."""
        return self._images / self._seconds if self._seconds > 0 else self._estimate

    def restart(self) -> None:
        """Begin a new estimate."""
        self._estimate, self._images, self._seconds = self.value, 0.0, 0.0

    def observe(self, images_seen: float, seconds: float, reported: float | None) -> None:
        """Take a place in the run; `reported` is the rate that stands in before there are two places."""
        if self._place is not None:
            images, elapsed = images_seen - self._place[0], seconds - self._place[1]
            if images >= 0 and elapsed > 0:
                decay = math.exp(-elapsed / self._horizon)
                self._images, self._seconds = self._images * decay + images, self._seconds * decay + elapsed
        elif reported:
            self._estimate = reported
        self._place = (images_seen, seconds)


class Progress:
    """The run's progress on a stream; takes the run's records.

    On a terminal one bar, made at the first record and gone at `close`, with lines printed above it; elsewhere a line
    at most every ten seconds, and one at each change of phase and at the end. `interactive` forces either.
    A reader that goes away (`| head`) ends the output and not the run.
    """

    def __init__(
        self,
        stream: TextIO,
        *,
        total_images: int,
        run: str,
        interactive: bool | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._stream, self._run, self._total, self._clock = stream, run, total_images, clock
        terminal = stream.isatty() and os.environ.get("TERM") != "dumb"
        self._interactive = terminal if interactive is None else interactive
        self._console = Console(file=stream, highlight=False, soft_wrap=True, force_terminal=self._interactive or None)
        self._live: Live | None = None
        self._view = View(run, total_images, clock)
        self._printed_at = -math.inf
        self._unprinted = self._gone = self._closed = False

    def update(self, record: Record) -> None:
        """Show a record."""
        event = record.get("event")
        if event == "train":
            self._view.train(record)
            self._unprinted = True
            if self._interactive and not self._closed:
                self._draw()
            elif self._clock() - self._printed_at >= PLAIN_INTERVAL_SECONDS:
                self._print_place()
            return
        if event in ("phase", "end"):
            self._flush_place()
        if event == "phase":
            self._view.begin_phase(record)
        message = describe(record, self._total)
        if message:
            self.line(message)
        if event == "end":
            self._stop_bar()

    def line(self, text: str) -> None:
        """Print a line, above the bar if there is one."""
        if self._interactive:
            style = "yellow" if text.startswith("warning") else ""
            self._guard(lambda: self._console.print(Text(text, style)))
        else:
            stamp = datetime.datetime.now().strftime("%Y-%m-%d %H:%M:%S")
            self._guard(lambda: print(f"{stamp} {self._run}: {text}", file=self._stream, flush=True))

    def close(self) -> None:
        """Show what has not been shown and take the bar away. May be called twice."""
        if not self._closed:
            self._closed = True
            self._flush_place()
            self._stop_bar()

    # Progress is a sink as well, so that a driver can fan records out to it.
    log = update

    def pictures(self, name: str, image: Image.Image, images_seen: int) -> None:
        """Pictures are not shown here."""

    def histogram(self, name: str, values: npt.NDArray[np.float32], images_seen: int) -> None:
        """Distributions are not shown here."""

    def _flush_place(self) -> None:
        """The last numbers of a phase stay readable: as a line, above the bar too."""
        if self._unprinted:
            self._print_place()

    def _print_place(self) -> None:
        self._printed_at, self._unprinted = self._clock(), False
        parts = self._view.summary()
        if self._interactive:
            self._guard(
                lambda: self._console.print(*_wrapped(parts, self._console.width - 1, most=len(parts)), sep="\n")
            )
        else:
            self.line("  ".join(parts))

    def _draw(self) -> None:
        def draw() -> None:
            if self._live is None:
                self._live = Live(
                    self._view,
                    console=self._console,
                    refresh_per_second=2,
                    transient=True,
                    # What goes to a file or a pipe stays there; only what would break the bar is drawn above it.
                    redirect_stdout=sys.stdout.isatty(),
                    redirect_stderr=sys.stderr.isatty(),
                )
                self._live.start()
            else:
                self._live.refresh()

        self._guard(draw)

    def _stop_bar(self) -> None:
        live, self._live = self._live, None
        if live is not None:
            self._guard(live.stop)

    def _guard(self, write: Callable[[], object]) -> None:
        if self._gone:
            return
        try:
            write()
        except BrokenPipeError:
            self._gone = True


class View:
    """The state behind bar and lines, and how the bar is drawn at any width."""

    def __init__(self, run: str, total_images: int, clock: Callable[[], float]) -> None:
        self._run, self._total, self._clock = run, total_images, clock
        self._record: Record = {}
        self._phase = ""
        self._rate = Rate()
        self._heard = clock()

    def begin_phase(self, record: Record) -> None:
        """Another phase runs from here on."""
        self._phase = text(record, "phase") or self._phase
        self._rate.restart()

    def train(self, record: Record) -> None:
        """Take the newest numbers."""
        phase = text(record, "phase")
        if phase and phase != self._phase:
            if self._phase:
                self._rate.restart()
            self._phase = phase
        self._record, self._heard = record, self._clock()
        self._total = integer(record, "total_images") or self._total
        seconds = number(record, "seconds")
        place = self._heard if seconds is None else seconds
        self._rate.observe(self._seen, place, number(record, "images_per_second"))

    @property
    def _seen(self) -> int:
        return integer(self._record, "images_seen") or 0

    def _time_left(self) -> str:
        rate = self._rate.value
        silent = self._clock() - self._heard
        if silent > SILENCE_SECONDS:
            return f"no news for {duration(silent)}"
        if not rate or self._seen >= self._total:
            return ""
        return f"{duration(max(0.0, (self._total - self._seen) / rate - silent))} left"

    def _counts(self) -> list[str]:
        counts = [f"{self._seen:,}/{self._total:,} images"]
        speed = number(self._record, "images_per_second") or self._rate.value
        if speed:
            counts.append(f"{speed:,.0f} images/s" if speed >= 10 else f"{speed:.2g} images/s")
        epoch = integer(self._record, "epoch")
        if epoch is not None:
            counts.append(f"epoch {epoch}")
        return counts

    def _terms(self) -> list[str]:
        terms = [
            (key, value)
            for key, value in measurements(self._record).items()
            if family(key) in TERM_FAMILIES or (key == "skipped_steps" and value)
        ]
        return [f"{key} {short(value)}" for key, value in terms]

    def summary(self) -> list[str]:
        """The parts of a plain line: where the run is, how fast, what the terms are."""
        share = _percent(self._seen, self._total)
        return [part for part in (self._phase, share, *self._counts(), self._time_left(), *self._terms()) if part]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        width = max(1, options.max_width - 1)
        title, share, left = f"{self._run} {self._phase}".strip(), _percent(self._seen, self._total), self._time_left()
        room = width - sum(len(part) + 2 for part in (title, share, left) if part)
        if room >= 10:
            row = Table.grid(padding=(0, 2, 0, 0))
            bar = ProgressBar(total=self._total or 1, completed=self._seen, width=min(40, room))
            row.add_row(Text(title, "bold"), bar, share, Text(left, "cyan"))
            yield row
        else:
            yield _fitted([self._phase or self._run, share, left], width, "bold")
        yield _fitted(self._counts(), width, "")
        yield from _wrapped(self._terms(), width, "dim")


def _percent(part: int, whole: int) -> str:
    # Rounded down: 100% is said only at the end.
    return f"{100 * part // whole}%" if whole else ""


def _fitted(parts: Iterable[str], width: int, style: str) -> Text:
    """As many whole parts as fit on one line."""
    return next(iter(_wrapped([part for part in parts if part], width, style)), Text())


def _wrapped(parts: Sequence[str], width: int, style: str = "", most: int = 4) -> Iterator[Text]:
    """Parts over at most `most` lines, the rest left out; no part is broken, but one wider than a line is cut."""
    lines: list[str] = []
    for part in parts:
        if lines and len(lines[-1]) + 2 + len(part) <= width:
            lines[-1] += f"  {part}"
        else:
            lines.append(part[:width])
    for line in lines[:most]:
        yield Text(line, style, no_wrap=True, overflow="crop")


def short(value: float) -> str:
    """A number in four digits, without an exponent where people expect none."""
    if not math.isfinite(value):
        return str(value)
    if value != 0 and (abs(value) < 1e-3 or abs(value) >= 1e6):
        return f"{value:.2e}"
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def duration(seconds: float) -> str:
    """Seconds as `0:07`, `12:34`, `1:02:03` or `3d 4h`."""
    whole = round(seconds)
    minutes, rest = divmod(whole, 60)
    hours, minutes = divmod(minutes, 60)
    if hours >= 48:
        return f"{hours // 24}d {hours % 24}h"
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def describe(record: Record, total_images: int) -> str:
    """The line that a record is worth, other than `train` rows; empty for what a person need not see."""
    seen = f"{integer(record, 'images_seen') or 0:,} images"
    match record.get("event"):
        case "phase":
            trains, budget = text(record, "trains").replace(",", ", "), integer(record, "phase_images")
            parts = (f"{budget:,} images" if budget else "", f"training {trains}" if trains else "")
            about = ", ".join(filter(None, parts))
            verb = "goes on" if integer(record, "phase_images_seen") else "begins"
            return f"phase {text(record, 'phase')} {verb}" + (f" ({about})" if about else "")
        case "checkpoint":
            took = number(record, "checkpoint_seconds")
            return f"checkpoint {text(record, 'path')} at {seen}" + (f", {took:.1f} s" if took is not None else "")
        case "resume":
            restarts = integer(record, "restarts")
            return f"resumed at {seen} of {total_images:,}" + (f", restart {restarts}" if restarts else "")
        case "warning" | "rollback":
            return f"warning: {text(record, 'message')}"
        case "end":
            took = number(record, "seconds")
            spent = f" in {duration(took)} of training" if took is not None else ""
            return f"{text(record, 'reason') or 'ended'} at {seen} of {total_images:,}{spent}"
    return ""
