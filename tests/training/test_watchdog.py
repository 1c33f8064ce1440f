"""A rank that hangs ends, whoever listens."""

import os
import subprocess
import sys

HANGS = """
import sys, threading
from vaegan_dist.training.runtime import SingleProcess
from vaegan_dist.training.watchdog import Watchdog
watchdog = Watchdog(1.0, 3, SingleProcess().abandon)
watchdog.beat("training", 640)
threading.Event().wait()
"""
SECONDS = 120


def test_a_hanging_rank_ends_and_says_where() -> None:
    done = subprocess.run([sys.executable, "-c", HANGS], capture_output=True, text=True, timeout=SECONDS)
    assert done.returncode == 1
    assert "rank 3 on " in done.stderr and "after 640 images, while training, in wait (" in done.stderr
    assert "stacks of all threads" in done.stderr and "most recent call first" in done.stderr


def test_a_hanging_rank_ends_though_nobody_reads_its_log() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    process = subprocess.Popen([sys.executable, "-c", HANGS], stderr=writer, stdout=writer)
    os.close(writer)
    try:
        assert process.wait(SECONDS) == 1
    finally:
        process.kill()
        process.wait()
