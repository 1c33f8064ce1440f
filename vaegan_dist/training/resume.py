"""Whether a run starts, continues or is over, and which changes of its configuration it may continue with."""

from pathlib import Path
from typing import Any, Protocol

from vaegan_dist.config import Config
from vaegan_dist.data.cache import cache_folder, content_key
from vaegan_dist.data.urls import is_remote, local_path
from vaegan_dist.errors import ConfigError
from vaegan_dist.training.checkpoint import Checkpoint
from vaegan_dist.training.state import Progress

LOCK = ".lock"
# What may differ from the checkpoint: where and how often, never what is computed.
MAY_CHANGE = (
    "preset",
    "run.name",
    "run.storage",
    "data.path",
    "data.loader_workers",
    "data.prefetch",
    "data.in_memory",
    "data.max_bad_samples",
    "data.cache_dir",
    "data.cache_bytes",
    "training.torch_threads",
    "training.cuda_graphs",
    "training.fused_norms",
    "training.max_skipped_steps",
    "training.gradient_accumulation_steps",
    "training.max_rollbacks",
    "training.rollback_rate_factor",
    "reporting",
    "evaluation",
    "checkpoint",
    "cluster",
)


class Standing(Protocol):
    """A checkpoint that stands, as far as the policy looks at it."""

    @property
    def config(self) -> Config:
        """What it was trained with."""

    @property
    def progress(self) -> Progress:
        """How far."""


def run_folder(config: Config) -> Path:
    """The folder of a run on this machine: history, pictures and checkpoints; a copy, where the storage is a URL."""
    storage = config.run.storage
    if is_remote(storage):
        cache = cache_folder("runs")
        if cache is None:
            raise ConfigError(f"run.storage={storage}: no folder for a copy can be made here; set VAEGAN_CACHE to one")
        return cache / content_key(storage.rstrip("/")) / config.run.name
    return Path(local_path(storage)).expanduser() / config.run.name


def refuse_existing(folder: Path) -> None:
    """For `--fresh`: a run of that name must not stand yet."""
    # A start that failed before its first step leaves nothing but the lock's file.
    if folder.exists() and any(path.name != LOCK for path in folder.iterdir()):
        raise ConfigError(
            f"run.name={folder.name}: a run of that name stands in {folder.parent}; choose another run.name, "
            f"or leave out --fresh to continue it"
        )


def refuse_changes(config: Config, standing: Standing) -> None:
    """A run continues only with the configuration that it computes from.

    Budgets may grow, and phases that have not begun may change.

    Raises:
        ConfigError: names the first key that differs, with both values.
    """
    old, new = standing.config.model_dump(), config.model_dump()
    under_way = standing.progress.phase
    started = [dict(phase) for phase in old.pop("phases")[: under_way + 1]]
    phases = [dict(phase) for phase in new.pop("phases")[: under_way + 1]]
    _same_phases(started, phases, standing.progress)
    for key, was, now in differences(old, new):
        if not any(key == allowed or key.startswith(allowed + ".") for allowed in MAY_CHANGE):
            raise ConfigError(
                f"{key}={now}: the run '{config.run.name}' was started with {was}; restore it, or choose another "
                f"run.name for a new run"
            )


def refuse_other_data(identity: dict[str, Any], checkpoint: Checkpoint) -> None:
    """The place in the order means nothing on other samples, whatever path they lie at.

    Raises:
        ConfigError: names what differs.
    """
    before, now = checkpoint.data["samples"], identity["samples"]
    if before != now:
        raise ConfigError(
            f"data.path: the run has trained on {sum(before):,} samples in {len(before)} shards, the data set now "
            f"holds {sum(now):,} in {len(now)}; restore it, or choose another run.name for a new run"
        )


def _same_phases(started: list[dict[str, Any]], phases: list[dict[str, Any]], progress: Progress) -> None:
    if len(phases) < len(started):
        raise ConfigError(f"phases: the run has begun phase '{started[-1]['name']}', which the configuration lacks")
    for number, (before, after) in enumerate(zip(started, phases, strict=False)):
        open_ended = number == progress.phase
        if open_ended and after["images"] >= progress.phase_images:
            before = {**before, "images": after["images"]}
        for key, was, now in differences(before, after):
            raise ConfigError(
                f"phases.{before['name']}.{key}={now}: the run has trained on this phase with {was}; restore it, "
                f"or choose another run.name for a new run"
            )


def differences(old: Any, new: Any, prefix: str = "") -> list[tuple[str, Any, Any]]:
    if isinstance(old, dict) and isinstance(new, dict):
        keys = list(dict.fromkeys([*old, *new]))
        return [
            row
            for key in keys
            for row in differences(old.get(key), new.get(key), f"{prefix}.{key}" if prefix else str(key))
        ]
    return [] if old == new else [(prefix, old, new)]
