"""What reporting costs at steps of 100 ms: on and off in turns within one run.

On means all of it: the observer at every step, a snapshot every 2 s, log records (four times as many as by default) to
the history, TensorBoard and the metrics, whose counters are kept every 5 s and which a client scrapes every second. A
step burns 100 ms of one core's time, and what happens by the clock happens here by the number of steps: so the ratio
of CPU times (of the whole process, all its threads and the client's) does not depend on what else the machine does. The
last line of output is one JSON object.
"""

import argparse
import json
import statistics
import tempfile
import threading
import time
import urllib.request
from pathlib import Path

import torch

from vaegan_dist.cluster.runtime import Listener, LocalRuntime
from vaegan_dist.config import Config
from vaegan_dist.config_source import load_config
from vaegan_dist.data.dataset import open_dataset
from vaegan_dist.data.prepare import PrepareOptions, prepare
from vaegan_dist.models import ImageShape
from vaegan_dist.reporting import prometheus
from vaegan_dist.reporting.prometheus import Exporter
from vaegan_dist.training import observer
from vaegan_dist.training.meter import Meter
from vaegan_dist.training.observer import Observer
from vaegan_dist.training.state import create_state
from vaegan_dist.training.step import Step
from vaegan_dist.training.writer import Writer

STEP_SECONDS = 0.1
NEVER = 1e9


class Bench:
    """A run whose steps only burn time, with and without its reporting."""

    def __init__(self, config: Config, folder: Path, exporter: Exporter) -> None:
        runtime = LocalRuntime(
            0, 1, torch.device("cpu"), Listener(exporter.record, exporter.observe), threading.Event()
        )
        dataset = open_dataset(config.data.path)
        self.state = create_state(config, ImageShape(1, 28, 28), torch.device("cpu"), torch.float32)
        self.step = Step(self.state, config.phases[-1], 0, 1)
        self.step(dataset.read(range(config.training.batch_size)).images)
        self.meter = Meter.begin(self.step, None)
        self.observer = Observer(config, runtime, dataset, dict)
        self.writer = Writer(config, folder, runtime, None)
        self.matrix = torch.randn(256, 256)
        self.seen = 0
        self.exporter, self.steps, self.waited = exporter, 0, 0.0

    def burn(self) -> None:
        """A step's work."""
        began = time.thread_time()
        while time.thread_time() - began < STEP_SECONDS:
            self.matrix @ self.matrix

    def block(self, steps: int, reporting: bool) -> float:
        """CPU seconds of the process for so many steps and, with reporting, one log record."""
        began = time.process_time()
        for _ in range(steps):
            since = time.perf_counter()
            self.burn()
            if reporting:
                before = time.thread_time()
                self.observer.after_step(self.step, self.meter, since)
                self.waited += time.thread_time() - before
                self._by_the_clock()
        if reporting:
            before = time.thread_time()
            self.seen += steps * 128
            self.meter.images += steps * self.step.batch_size
            self.step.steps += steps
            means = {**self.meter.take(), **self.observer.measurements(self.seen), **self.step.rates()}
            self.writer.log({"event": "train", "phase": "joint", "images_seen": self.seen, **means})
            self.waited += time.thread_time() - before
        return time.process_time() - began

    def _by_the_clock(self) -> None:
        """What happens once in a while, at steps of 100 ms."""
        self.steps += 1
        for seconds, act in ((1, self._scrape), (2, self.observer.tell), (5, self.exporter._save)):
            if self.steps % round(seconds / STEP_SECONDS) == 0:
                act()

    def _scrape(self) -> None:
        with urllib.request.urlopen(f"http://{self.exporter.address}/metrics") as answer:
            answer.read()


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5, help="rounds, each a block with and one without (5)")
    parser.add_argument("--quick", action="store_true", help="two rounds")
    parser.add_argument("--steps", type=int, default=20, help="steps of a block; one log record each (20)")
    options = parser.parse_args()
    rounds = min(options.rounds, 2) if options.quick else options.rounds
    torch.set_num_threads(1)
    observer.SNAPSHOT_SECONDS = prometheus.SAVE_SECONDS = NEVER
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        prepare(PrepareOptions(source="digits", output=str(folder / "data"), limit=256))
        config = load_config("smoke", overrides=[f"data.path={folder / 'data'}", f"run.storage={folder}"])
        run = folder / config.run.name
        run.mkdir()
        ratios = []
        with Exporter(config, run) as exporter:
            bench = Bench(config, run, exporter)
            bench.block(options.steps, reporting=True)  # what is imported and opened once
            bench.waited = 0.0
            for number in range(rounds):
                off = bench.block(options.steps, reporting=False)
                ratios.append(bench.block(options.steps, reporting=True) / off)
                print(f"round {number + 1}: on/off {ratios[-1]:.4f}", flush=True)
            bench.writer.close()
    waited = bench.waited / (rounds * options.steps)
    result = {
        "benchmark": "reporting",
        "step_seconds": STEP_SECONDS,
        "steps": rounds * options.steps,
        "cpu_ratio_on_off": round(statistics.median(ratios), 5),
        "cpu_ratio_worst": round(max(ratios), 5),
        "training_thread_cpu_ratio": round(waited / STEP_SECONDS, 5),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
