"""Short runs and what is compared of them, for the tests of restarts and faults."""

import json
from pathlib import Path

from safetensors.torch import load_file

from vaegan_dist.config import Config
from vaegan_dist.config_source import load_config
from vaegan_dist.reporting.records import Record
from vaegan_dist.training.checkpoint import checkpoints

TIMES = {"seconds", "images_per_second", "data_wait_ratio", "checkpoint_seconds", "checkpoint_bytes", "path"}
TIMES |= {"step_seconds", "data_wait_seconds", "communication_seconds", "compute_seconds", "rank_skew_ratio"}
TIMES |= {"slowest_rank"}
# What only a run that was interrupted says.
INTERRUPTED = ("resume", "end")
FILES = ("model.safetensors", "ema.safetensors", "optimizer.safetensors")


def config_of(digits: Path, storage: Path, *overrides: str) -> Config:
    """The preset `smoke`, 40 steps of 64 images, without TensorBoard."""
    settings = [f"data.path={digits}", f"run.storage={storage}", "training.torch_threads=1", "cluster.workers=1"]
    return load_config("smoke", overrides=[*settings, "reporting.tensorboard=false", *overrides])


def tensors_of(folder: Path) -> dict[str, bytes]:
    """Every tensor of a run's newest checkpoint."""
    return tensors_in(checkpoints(folder)[0])


def tensors_in(checkpoint: Path) -> dict[str, bytes]:
    """Every tensor of a checkpoint; the files themselves may order their metadata differently."""
    return {f"{file}:{k}": v.numpy().tobytes() for file in FILES for k, v in load_file(checkpoint / file).items()}


def rows_of(folder: Path, event: str | None = None) -> list[Record]:
    """Rows of the history but for times. A checkpoint's row comes when it stands, so rows are put in order by place."""
    rows = [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]
    wanted = [row for row in rows if (row["event"] == event if event else row["event"] not in INTERRUPTED)]
    rows = [{k: v for k, v in row.items() if k not in TIMES} for row in wanted]
    return sorted(rows, key=lambda row: (row["images_seen"], row["event"] == "phase", row["event"]))
