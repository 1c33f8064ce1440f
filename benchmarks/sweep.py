"""What a trial costs beyond its training, against the plain loop; whether a long sweep grows; what ASHA would save.

    python benchmarks/sweep.py overhead DATA [--quick]   # trials with one worker, 1 and 2 at a time, and with two
    python benchmarks/sweep.py growth DATA [--quick]     # many trials: memory and open files of their processes
    python benchmarks/sweep.py replay GRID [--quick]     # ASHA over a finished sweep that stopped nothing

The overhead of a trial is the time from its proposal (made when a slot is free) to its end, less the seconds that the
plain loop takes for the same run in a warm process. The first trial of each slot pays for imports and is left out.
A trial has the same values whether it is stopped or not, so the rows of a whole grid say what ASHA would have made of
it: the sweep's own scheduler is asked about each row, one trial at a time, with the trials in many random orders.
The last line of output is one JSON object.
"""

import argparse
import contextlib
import io
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import yaml

from vaegan_dist.cluster.sweep_schedulers import CLOCK, SCORE, make_scheduler
from vaegan_dist.config import Config
from vaegan_dist.config_source import load_config
from vaegan_dist.sweeps.ledger import HEAD, Ledger, Trial
from vaegan_dist.sweeps.plan import Plan, make_plan
from vaegan_dist.sweeps.settings import SweepSettings
from vaegan_dist.training.loop import train
from vaegan_dist.training.runtime import SingleProcess

Event = dict[str, Any]
SPACE = {"objective.beta": {"loguniform": [0.1, 10]}}
RUN = ["reporting.tensorboard=false", "reporting.curves=false", "training.torch_threads=1", "reporting.metrics_port=0"]


def plain_seconds(data: str, repeats: int) -> list[float]:
    """Seconds of whole runs of the preset, one after the other in this process; the first, cold one is left out."""
    taken = []
    with tempfile.TemporaryDirectory() as folder:
        for number in range(repeats + 1):
            settings = [f"data.path={data}", f"run.storage={folder}", f"run.name=plain-{number}", *RUN]
            config = load_config("smoke", overrides=[*settings, "checkpoint.images=512"])
            began = time.perf_counter()
            train(config, SingleProcess())
            taken.append(time.perf_counter() - began)
    return taken[1:]


def sweep(data: str, folder: str, trials: int, concurrent: int, workers: int, watch: bool = False) -> list[Event]:
    """Run a sweep of the same runs; the ledger's events, with samples of memory and files where `watch`."""
    file = Path(folder) / "space.yaml"
    settings = {"metric": "loss_rec", "trials": trials, "space": SPACE, "workers_per_trial": workers}
    file.write_text(yaml.safe_dump({**settings, "concurrent": concurrent}))
    name = f"sweep-{concurrent}-{workers}"
    command = [sys.executable, "-m", "vaegan_dist.cli", "sweep", str(file), "--preset", "smoke", "--data", data]
    command += ["--storage", folder, "--name", name, "--address", "local", *RUN]
    driver = subprocess.Popen(command, stdout=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"})
    ledger = Path(folder) / name / "trials.jsonl"
    ended = 0
    while driver.poll() is None:
        time.sleep(0.5)
        lines = ledger.read_text().splitlines() if ledger.exists() else []
        now = sum('"ended"' in line for line in lines)
        if watch and now >= ended + 10:
            ended = now
            print(f"{now:4d} trials  " + "  ".join(_sizes(driver.pid)), flush=True)
    assert driver.returncode == 0, f"the sweep failed with code {driver.returncode}"
    return [json.loads(line) for line in ledger.read_text().splitlines()]


def _sizes(driver: int) -> list[str]:
    """Memory of its own and open files of the driver and of each process that runs trials."""
    parts = []
    for process in [psutil.Process(driver), *psutil.Process(driver).children(recursive=True)]:
        with contextlib.suppress(psutil.Error):
            title = " ".join(process.cmdline())
            name = "driver" if process.pid == driver else "trial" if title.startswith("ray::ImplicitFunc") else ""
            if name:
                memory = process.memory_full_info().uss / 2**20
                parts.append(f"{name} {memory:.0f} MiB {process.num_fds()} files {process.num_threads()} threads")
    return parts


def from_proposal_to_end(events: list[Event], concurrent: int) -> list[float]:
    """Seconds from a trial's proposal, which waits for a free slot, to its end in the ledger."""
    begun = {event["trial"]: event["time"] for event in events if event["event"] == "created"}
    ended = {event["trial"]: event["time"] for event in events if event["event"] == "ended"}
    return [ended[trial] - begun[trial] for trial in sorted(ended) if trial >= concurrent]


def overhead(data: str, trials: int) -> dict[str, float]:
    """Print the overhead of each way to run a trial; seconds by way."""
    alone = statistics.median(plain_seconds(data, 5))
    print(f"plain loop                      {alone:6.2f} s for a run (median of 5)", flush=True)
    found = {"plain_run_seconds": alone}
    for concurrent, workers, count in ((1, 1, trials), (2, 1, 2 * trials), (1, 2, max(trials // 2, 2))):
        with tempfile.TemporaryDirectory() as folder:
            gaps = from_proposal_to_end(sweep(data, folder, count, concurrent, workers), concurrent)
        middle = statistics.median(gaps)
        about = f"{middle:6.2f} s from proposal to end (median of {len(gaps)}), {middle - alone:+.2f} s against it"
        print(f"{concurrent} at a time, {workers} workers each   {about}", flush=True)
        found[f"overhead_seconds_{concurrent}_at_a_time_{workers}_workers"] = middle - alone
    return found


def growth(data: str, trials: int) -> dict[str, float]:
    """Print sizes every ten trials; how many trials ended."""
    with tempfile.TemporaryDirectory() as folder:
        events = sweep(data, folder, trials, 2, 1, watch=True)
    return {"trials_ended": sum(event["event"] == "ended" for event in events)}


def replay(folder: Path, orders: int) -> dict[str, float]:
    """Print images and winners of ASHA over a finished grid by first rung and factor; the medians."""
    head = yaml.safe_load((folder / HEAD).read_text())
    settings = SweepSettings.model_validate({**head["sweep"], "scheduler": "asha"})
    plan = make_plan(settings, Config.model_validate(head["config"]), Ledger(folder))
    whole = [trial for trial in plan.ledger.trials.values() if trial.state == "done"]
    best = min(_final(plan, trial) for trial in whole)
    rng, found = random.Random(0), dict[str, float]()
    shuffles = [rng.sample(whole, len(whole)) for _ in range(orders)]
    for part in (12, 6, 4):
        for factor in (2, 3, 5):
            changes = {"grace_images": plan.config.total_images // part, "reduction_factor": factor}
            asked = replace(plan, settings=settings.model_copy(update=changes))
            ends = [_asha(asked, order) for order in shuffles]
            shares, gaps = (sorted(column) for column in zip(*ends, strict=True))
            gaps = [100 * (gap - best) / abs(best) for gap in gaps]
            low, middle, high = (shares[int(orders * at)] for at in (0.05, 0.5, 0.95))
            print(
                f"first rung 1/{part}, factor {factor}: {middle:.0%} ({low:.0%} to {high:.0%} in 90%), "
                f"winner behind by {statistics.median(gaps):.1f}% in the median, at most 1% in "
                f"{sum(gap <= 1 for gap in gaps) / orders:.1%}, {gaps[-1]:.1f}% at the worst",
                flush=True,
            )
            found[f"share_of_images_rung_{part}_factor_{factor}"] = middle
    return found


def _asha(plan: Plan, order: list[Trial]) -> tuple[float, float]:
    """Share of the grid's images that ASHA spends on trials in this order, and the best score of those it lets end."""
    ledger = Ledger(Path(tempfile.gettempdir()) / "none")
    ledger.trials = {number: Trial(number, trial.params) for number, trial in enumerate(order)}
    scheduler = make_scheduler(replace(plan, ledger=ledger), 1)
    spent, ended = 0.0, list[float]()
    for number, trial in enumerate(order):
        asked: Any = SimpleNamespace(trial_id=str(number), config={"proposal": {"trial": number}})
        scheduler.on_trial_add(None, asked)
        for row in trial.rows:
            result = {CLOCK: row["images_seen"], SCORE: plan.judged.score(row)}
            if scheduler.on_trial_result(None, asked, result) == "STOP":
                break
        else:
            ended.append(_final(plan, trial))
        spent += row["images_seen"] or 0
    return spent / (plan.config.total_images * len(order)), min(ended)


def _final(plan: Plan, trial: Trial) -> float:
    """A trial's last score; the smaller, the better."""
    return plan.judged.score(trial.rows[-1]) * (1 if plan.judged.modes[0] == "min" else -1)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["overhead", "growth", "replay"])
    parser.add_argument("data", help="prepared data set; for replay the folder of a finished sweep")
    parser.add_argument("--trials", type=int, help="trials (default: 8 for overhead, 200 for growth); orders (1,000)")
    parser.add_argument("--quick", action="store_true", help="a few: overhead of 3, growth of 20; 20 orders")
    options = parser.parse_args()
    ways: dict[str, tuple[Any, int, int]] = {
        "overhead": (overhead, 8, 3),
        "growth": (growth, 200, 20),
        "replay": (lambda folder, orders: replay(Path(folder), orders), 1000, 20),
    }
    measure, usual, few = ways[options.what]
    with contextlib.redirect_stderr(io.StringIO()):
        found = measure(options.data, options.trials or (few if options.quick else usual))
    print(json.dumps({name: round(value, 3) for name, value in found.items()}))


if __name__ == "__main__":
    main()
