"""What the commands of the command line share."""

import argparse
import sys
import time
from typing import TypeAlias

from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

from vaegan_dist.errors import ConfigError

PLAIN_SECONDS = 10.0


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, like every other error of this program."""

    def error(self, message: str) -> None:  # type: ignore[override]
        raise ConfigError(f"{message} (see {self.prog} --help)")


Subparsers: TypeAlias = "argparse._SubParsersAction[Parser]"


class Counter:
    """Progress of a countable job: a bar on a terminal, a line every ten seconds elsewhere."""

    def __init__(self, title: str) -> None:
        self.title, self.interactive = title, sys.stderr.isatty()
        self.spoken = time.monotonic()
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self.bar = RichProgress(*columns, transient=True) if self.interactive else None
        if self.bar is not None:
            self.bar.start()
            self.task = self.bar.add_task(title, total=None)

    def __call__(self, done: int, total: int | None) -> None:
        """`done` of `total` (None: not known yet)."""
        if self.bar is not None:
            self.bar.update(self.task, completed=done, total=total)
        elif time.monotonic() - self.spoken > PLAIN_SECONDS:
            self.spoken = time.monotonic()
            print(f"{self.title}: {done}{f' of {total}' if total else ''} pictures", file=sys.stderr, flush=True)

    def close(self) -> None:
        """Remove the bar."""
        if self.bar is not None:
            self.bar.stop()
