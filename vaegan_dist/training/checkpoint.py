"""Checkpoints as they are read: verified, never executing code.

A checkpoint is a folder `checkpoint-<images>` of safetensors and JSON. `commit.py` writes it beside its place, synced,
and renames it; `checkpoint.json`, written last, holds the size and sha256 of every other file.
"""

import copy
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from vaegan_dist.config import Config
from vaegan_dist.config_source import validate
from vaegan_dist.errors import InputError
from vaegan_dist.files import file_sha256
from vaegan_dist.models import ImageShape, build_networks
from vaegan_dist.training.best import Best
from vaegan_dist.training.snapshot import MEMORY, Interval
from vaegan_dist.training.state import Progress, TrainState

FORMAT_VERSION = 1
PREFIX = "checkpoint-"
SEAL = "checkpoint.json"


class BrokenCheckpointError(InputError):
    """A checkpoint that is not whole: names the file and what is wrong with it."""


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint on disk, read back but for its tensors."""

    path: Path
    config: Config
    image: ImageShape
    progress: Progress
    data: dict[str, Any]
    phases_done: tuple[str, ...]
    interval: Interval | None
    watch: dict[str, Any]
    best: Best | None = None


def folder_name(images_seen: int) -> str:
    """Name of the checkpoint at an image count; names sort by it."""
    return f"{PREFIX}{images_seen:012d}"


def images_of(path: Path) -> int:
    """The image count in a checkpoint's name; 0 for a name that holds none."""
    digits = path.name.removeprefix(PREFIX)
    return int(digits) if digits.isdecimal() else 0


def checkpoints(folder: Path) -> list[Path]:
    """Folders that carry a checkpoint's name, newest first, whole or not."""
    if not folder.is_dir():
        return []
    found = [path for path in folder.iterdir() if path.name.startswith(PREFIX) and path.is_dir()]
    return sorted(found, key=lambda path: path.name, reverse=True)


def open_checkpoint(path: Path) -> Checkpoint:
    """Verify a checkpoint and read everything but its tensors.

    Raises:
        BrokenCheckpointError: names the file that is missing, cut, changed or of another format.
    """
    try:
        seal = json.loads((path / SEAL).read_text())
        if seal["format_version"] != FORMAT_VERSION:
            raise BrokenCheckpointError(
                f"checkpoint {path} has format {seal['format_version']}, this program reads {FORMAT_VERSION}: "
                f"use the version that wrote it"
            )
        for name, expected in seal["files"].items():
            _check_file(path, name, expected)
        summary = json.loads((path / "state.json").read_text())
        return Checkpoint(
            path=path,
            config=_read_config(path),
            image=ImageShape(**summary["image"]),
            progress=Progress.from_json(summary["progress"]),
            data=summary["data"],
            phases_done=tuple(summary["phases_done"]),
            interval=Interval.from_json(summary["interval"]) if "interval" in summary else None,
            watch=summary.get("watch", {}),
            best=Best.from_json(summary.get("best")),
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BrokenCheckpointError(f"checkpoint {path} is not whole: {error}; use an earlier one") from None


def _check_file(folder: Path, name: str, expected: dict[str, Any]) -> None:
    if Path(name).name != name:
        raise BrokenCheckpointError(f"checkpoint {folder}: '{name}' in {SEAL} is not a plain file name")
    file = folder / name
    if not file.is_file():
        raise BrokenCheckpointError(f"checkpoint {folder}: {name} is missing")
    if file.stat().st_size != expected["bytes"]:
        raise BrokenCheckpointError(
            f"checkpoint {folder}: {name} has {file.stat().st_size} bytes instead of {expected['bytes']}"
        )
    if file_sha256(file) != expected["sha256"]:
        raise BrokenCheckpointError(f"checkpoint {folder}: {name} has been changed (sha256 differs)")


def _read_config(path: Path) -> Config:
    import yaml

    return validate(yaml.safe_load((path / "config.yaml").read_text()))


def newest_whole(folder: Path) -> tuple[Checkpoint | None, dict[Path, str]]:
    """The newest checkpoint that is whole, and one line for each newer one that is not."""
    complaints: dict[Path, str] = {}
    for path in checkpoints(folder):
        try:
            return open_checkpoint(path), complaints
        except BrokenCheckpointError as error:
            complaints[path] = str(error)
    return None, complaints


def restore(state: TrainState, checkpoint: Checkpoint) -> None:
    """Put a checkpoint's weights, average, optimiser moments and place into a fresh state.

    Raises:
        BrokenCheckpointError: when tensors are missing, left over or of another shape; names the first.
    """
    device = next(state.networks.parameters()).device
    _load_module(state.networks, checkpoint.path / "model.safetensors", device)
    _load_module(state.ema, checkpoint.path / "ema.safetensors", device)
    _load_optimizers(state, checkpoint.path / "optimizer.safetensors", device)
    state.progress = copy.copy(checkpoint.progress)


def _load_module(module: nn.Module, path: Path, device: torch.device) -> None:
    try:
        module.load_state_dict(load_file(path, device=str(device)))
    except (RuntimeError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:300]
        raise BrokenCheckpointError(f"{path} does not fit the networks of this configuration: {reason}") from None


def _load_optimizers(state: TrainState, path: Path, device: torch.device) -> None:
    tensors = load_file(path, device=str(device))
    state.memory = {key.removeprefix(MEMORY): value for key, value in tensors.items() if key.startswith(MEMORY)}
    for network, optimizer in state.optimizers.items():
        for name, parameter in state.networks[network].named_parameters():
            prefix = f"{network}.{name}/"
            moments = dict(_with_prefix(tensors, prefix))
            if not moments:
                continue
            if moments["exp_avg"].shape != parameter.shape:
                raise BrokenCheckpointError(f"{path}: {prefix}exp_avg has shape {tuple(moments['exp_avg'].shape)}")
            optimizer.state[parameter] = {
                key: value if key == "step" else value.to(memory_format=_format(parameter))
                for key, value in moments.items()
            }


def _with_prefix(tensors: dict[str, Tensor], prefix: str) -> Iterator[tuple[str, Tensor]]:
    for key in ("step", "exp_avg", "exp_avg_sq"):
        if prefix + key in tensors:
            yield key, tensors[prefix + key]


def _format(parameter: Tensor) -> torch.memory_format:
    """Moments share their weight's memory format, as Adam made them: a fused step needs equal strides."""
    if parameter.ndim == 4 and parameter.is_contiguous(memory_format=torch.channels_last):
        return torch.channels_last
    return torch.contiguous_format


def load_networks(path: Path, weights: str = "ema") -> tuple[Checkpoint, nn.ModuleDict]:
    """Networks of a checkpoint (or of a run's newest whole one), ready for use on the CPU.

    Args:
        path: a checkpoint folder or a run folder.
        weights: "ema" takes encoder and decoder from the moving average, "raw" as they were trained.
    """
    if (path / SEAL).exists():
        found = open_checkpoint(path)
    else:
        newest, complaints = newest_whole(path)
        if newest is None:
            why = next(iter(complaints.values())) if complaints else "no folder named checkpoint-<images> in it"
            raise InputError(f"no checkpoint to load at '{path}': {why}; give a run's folder or a checkpoint")
        found = newest
    networks = build_networks(found.config.model, found.image, seed=found.config.run.seed)
    _load_module(networks, found.path / "model.safetensors", torch.device("cpu"))
    if weights == "ema":
        for name, tensors in _by_network(load_file(found.path / "ema.safetensors")).items():
            networks[name].load_state_dict(tensors)
    return found, networks.requires_grad_(False).eval()


def _by_network(tensors: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    parts: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        network, _, name = key.partition(".")
        parts.setdefault(network, {})[name] = tensor
    return parts
