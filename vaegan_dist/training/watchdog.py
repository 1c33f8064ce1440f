"""A rank that makes no step any more shows where it stands, and ends instead of hanging for ever."""

import faulthandler
import os
import socket
import sys
import threading
import traceback
from collections.abc import Callable
from contextlib import suppress
from types import FrameType

TICK_SECONDS = 1.0
GRACE_SECONDS = 10.0


class Watchdog:
    """Ends this process when `beat` has not been called for a while.

    Time is counted in the watchdog's own ticks and not by a clock: a process that was stopped (SIGSTOP, a suspended
    machine) has not been idle meanwhile. Where a call holds the interpreter so that no thread can run, a timer below
    it shows the stacks a little later; it cannot tell that from a stopped process, so it leaves the ending to the
    other ranks, whose collective times out.

    Args:
        seconds: time without a beat after which the process ends.
        abandon: takes the line that says so, and ends the process.
    """

    def __init__(self, seconds: float, rank: int, abandon: Callable[[str], None]) -> None:
        self.seconds, self.rank, self.abandon = seconds, rank, abandon
        self.doing, self.images_seen = "starting", 0
        self._watched = threading.get_ident()
        self._idle = 0.0
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)
        self._thread.start()

    def beat(self, doing: str, images_seen: int) -> None:
        """The training thread begins something."""
        self.doing, self.images_seen, self._idle = doing, images_seen, 0.0

    def close(self) -> None:
        """Stop watching."""
        self._ending.set()
        self._thread.join()
        faulthandler.cancel_dump_traceback_later()

    def _run(self) -> None:
        tick = min(TICK_SECONDS, self.seconds / 4)
        while not self._ending.wait(tick):
            self._idle += tick
            if self._idle >= self.seconds:
                self._end()
                return
            faulthandler.dump_traceback_later(self.seconds + GRACE_SECONDS, file=_stderr())

    def _end(self) -> None:
        line = (
            f"rank {self.rank} on {socket.gethostname()} has made no step for {self.seconds:g} s "
            f"(cluster.step_timeout_seconds) after {self.images_seen} images, while {self.doing}, {self._where()}; "
            f"the stacks of its threads are in its log; run the same command again to continue from the last checkpoint"
        )
        # Neither a hang inside of the way out may keep the process, nor an error because nobody reads its log any more.
        faulthandler.dump_traceback_later(GRACE_SECONDS, exit=True, file=_stderr())
        with suppress(OSError):
            print(f"rank {self.rank}, process {os.getpid()}: stacks of all threads", file=sys.stderr, flush=True)
        faulthandler.dump_traceback(file=_stderr(), all_threads=True)
        self.abandon(line)

    def _where(self) -> str:
        frame: FrameType | None = sys._current_frames().get(self._watched)
        if frame is None:
            return "and its training thread has ended"
        innermost = traceback.extract_stack(frame)[-1]
        return f"in {innermost.name} ({innermost.filename}:{innermost.lineno})"


def _stderr() -> int:
    """The descriptor itself: `sys.stderr` may have been replaced by something without one."""
    return 2
