"""What a run says about itself: flat records, one per line of `history.jsonl`.

The key `event` names the kind of a record. `images_seen` is its place in the run, and `seconds` the training
wall-clock up to there, carried over restarts. Further keys by kind:

| event | keys |
|---|---|
| `train` | `phase`, `phase_images_seen`, `phase_images`, `total_images`, `epoch`, `images_per_second`, terms by name |
| `phase` | `phase`, `phase_images`, `trains` (networks): a phase begins, or goes on if `phase_images_seen` is not 0 |
| `checkpoint` | `path`, `checkpoint_seconds` (training stood still), `checkpoint_bytes`; later rows may come before |
| `pictures` | `phase`: sheets were written |
| `evaluation` | `phase`, metrics of the averaged networks, `features`, `features_hash`, `evaluation_seconds` |
| `resume` | `restarts`: the run goes on from the checkpoint at `images_seen` |
| `warning` | `message` |
| `rollback` | `message`, `name`: the run goes on from the checkpoint at `images_seen`, with other noise |
| `end` | `reason`: `done`, `stopped` or `failed` |

A row of the file is strict JSON. A number that JSON cannot hold becomes null, and `<key>_nonfinite` beside it says
which it was: `nan`, `inf` or `-inf`.
"""

import json
import math
from collections.abc import Mapping
from typing import Literal

Record = dict[str, float | int | str | None]

Family = Literal[
    "reconstruction",
    "divergence",
    "adversarial",
    "logits",
    "accuracy",
    "learning_rate",
    "throughput",
    "time",
    "gradient",
    "workers",
    "average",
    "other",
]

NONFINITE = "_nonfinite"
# Where a record stands, not what was measured: neither plotted nor sent to a tracker as a curve.
PLACE_KEYS = frozenset(
    {
        "images_seen",
        "total_images",
        "phase_images_seen",
        "phase_images",
        "epoch",
        "restarts",
        "seconds",
    }
)

# The first family that knows a key, by how the key begins, wins.
_FAMILIES: tuple[tuple[Family, tuple[str, ...]], ...] = (
    ("reconstruction", ("loss_rec", "loss_sim", "loss_perceptual", "psnr", "mse")),
    ("divergence", ("loss_kl", "kl", "beta", "active_units")),
    ("accuracy", ("accuracy",)),
    ("adversarial", ("loss_adv", "loss_gan", "loss_disc", "loss_gen", "penalty", "adaptive_weight")),
    ("logits", ("logits",)),
    ("learning_rate", ("lr_", "learning_rate")),
    ("time", ("step_seconds", "data_wait_seconds", "communication_seconds", "compute_seconds", "seconds_", "time_")),
    ("throughput", ("images_per_second", "data_wait")),
    ("workers", ("rank_skew", "slowest_rank")),
    ("average", ("ema_",)),
    ("gradient", ("grad_norm", "skipped_steps")),
)


def family(key: str) -> Family:
    """What a measured quantity is about, by its name."""
    return next((name for name, prefixes in _FAMILIES if key.startswith(prefixes)), "other")


def measurements(record: Record) -> dict[str, float]:
    """The measured numbers of a record by name, in its order; non-finite ones included, nulls and places left out."""
    return {
        key: float(value)
        for key, value in record.items()
        if isinstance(value, int | float) and not isinstance(value, bool) and key not in PLACE_KEYS
    }


def integer(record: Record, key: str) -> int | None:
    """An integer field such as `images_seen`; None where it is absent or null."""
    value = record.get(key)
    return int(value) if isinstance(value, int | float) and math.isfinite(value) else None


def number(record: Record, key: str) -> float | None:
    """A finite number; None where it is absent, null or not finite."""
    value = record.get(key)
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def text(record: Record, key: str) -> str:
    """A text field; empty where it is absent."""
    value = record.get(key)
    return value if isinstance(value, str) else ""


def encode(record: Mapping[str, object]) -> bytes:
    """A record as one line of strict JSON, ASCII, ended by a newline.

    Raises TypeError naming the key whose value is not a number, a text or None.
    """
    row: dict[str, object] = {}
    for key, value in record.items():
        if value is not None and not isinstance(value, float | int | str):
            raise TypeError(f"record key {key!r} holds a {type(value).__name__}; records hold numbers, texts and None")
        row[key] = value
        if isinstance(value, float) and not math.isfinite(value):
            row[key], row[key + NONFINITE] = None, str(float(value))
    return json.dumps(row, allow_nan=False).encode("ascii") + b"\n"


def decode(line: bytes) -> Record:
    """The record in one line; raises ValueError if the line is not a whole row."""
    row = json.loads(line)
    if not isinstance(row, dict) or not line.endswith(b"\n"):
        raise ValueError("not a whole JSON object")
    return row
