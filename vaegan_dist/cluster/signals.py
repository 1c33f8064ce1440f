"""Requests to stop: SIGTERM or one Ctrl-C end in a checkpoint, a second Ctrl-C ends at once."""

import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def stop_signals(on_stop: Callable[[], object], quiet: bool = False) -> Iterator[None]:
    """Within the block, the first SIGINT or SIGTERM says so and calls `on_stop`; a second SIGINT ends at once.

    Must be entered after `ray.init`, which installs a handler of its own.
    """
    asked = False

    def handle(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        if asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        asked = True
        if not quiet:
            _say_stopping(signal.Signals(number).name)
        on_stop()

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _say_stopping(name: str) -> None:
    """Tell the person who pressed Ctrl-C, or the log, what happens next."""
    more = "; Ctrl-C again stops at once" if name == "SIGINT" else ""
    print(f"{name} received: stopping at the next step with a checkpoint{more}", file=sys.stderr, flush=True)
