"""The best checkpoint by a metric of the evaluations: which one it is, and the pointer `best.json` to it."""

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from vaegan_dist.config import CheckpointSection
from vaegan_dist.errors import ConfigError
from vaegan_dist.files import write_whole

POINTER = "best.json"


@dataclass(frozen=True)
class Best:
    """The best evaluation so far. Part of every checkpoint, so that a resumed run knows it."""

    metric: str
    value: float
    images_seen: int

    @classmethod
    def from_json(cls, data: dict[str, Any] | None) -> "Best | None":
        """Back from a checkpoint."""
        return None if data is None else cls(**data)

    def to_json(self) -> dict[str, Any]:
        """Plain data for a checkpoint."""
        return asdict(self)


def better(
    best: Best | None, settings: CheckpointSection, images_seen: int, metrics: dict[str, float | None]
) -> Best | None:
    """The evaluation as the new best, or None when it is none. A value that is not finite never is.

    Raises:
        ConfigError: the evaluation lacks `checkpoint.best_metric`.
    """
    name = settings.best_metric
    if name is None:
        return None
    if name not in metrics:
        known = ", ".join(sorted(metrics)) or "none"
        raise ConfigError(f"checkpoint.best_metric={name}: the evaluation has no such metric; it has {known}")
    value = metrics[name]
    if value is None or not math.isfinite(value):
        return None
    if best is not None and best.metric == name:
        gained = best.value - value if settings.best_mode == "min" else value - best.value
        if gained <= 0:
            return None
    return Best(name, float(value), images_seen)


def point_to(folder: Path, best: dict[str, Any] | None, checkpoint: str) -> None:
    """Make `best.json` name the best checkpoint; without one, remove it.

    Args:
        checkpoint: name of the best checkpoint's folder; ignored without a best.
    """
    pointer = folder / POINTER
    if best is None:
        pointer.unlink(missing_ok=True)
        return
    content = json.dumps({**best, "checkpoint": checkpoint}, indent=1).encode()
    if not pointer.exists() or pointer.read_bytes() != content:
        write_whole(pointer, content)


def best_checkpoint(folder: Path) -> Path | None:
    """The folder of a run's best checkpoint; None where the run has none (yet)."""
    try:
        name = json.loads((folder / POINTER).read_bytes())["checkpoint"]
    except (OSError, ValueError, KeyError):
        return None
    path = folder / Path(str(name)).name
    return path if path.is_dir() else None
