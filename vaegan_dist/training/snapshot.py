"""A copy of the run on the CPU, from which a checkpoint is written while training goes on."""

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

import vaegan_dist
from vaegan_dist.config_source import dump_yaml
from vaegan_dist.training.state import TrainState

MEMORY = "memory/"


@dataclass(frozen=True)
class Interval:
    """What every rank has summed up since the last log record, so that a resumed run logs the same means."""

    names: tuple[str, ...]
    steps: int
    sums: list[list[float]]  # one row per rank
    skipped_in_a_row: float

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> "Interval":
        """Back from a checkpoint."""
        return cls(tuple(data["names"]), data["steps"], data["sums"], data["skipped_in_a_row"])


@dataclass(frozen=True)
class Snapshot:
    """All that a checkpoint holds. Valid until `Snapshots.take` is called again."""

    images_seen: int
    files: dict[str, dict[str, Tensor]]  # tensors by name, by file name
    config: str
    summary: dict[str, Any]


class Snapshots:
    """Takes snapshots into buffers that it keeps: the step is blocked for the copy and for nothing else."""

    def __init__(self) -> None:
        self._buffers: dict[tuple[str, str], Tensor] = {}

    def take(
        self,
        state: TrainState,
        *,
        data: dict[str, Any],
        interval: Interval,
        watch: dict[str, Any],
        best: dict[str, Any] | None = None,
    ) -> Snapshot:
        """Copy the state; the snapshot before this one must be written by now, since its memory is used again.

        Args:
            data: what identifies the data set and the order; compared on resume.
            interval, watch: the log interval under way and the state of the divergence watch.
            best: the best evaluation so far.
        """
        files = {
            "model.safetensors": self._copy("model", state.networks.state_dict()),
            "ema.safetensors": self._copy("ema", state.ema.state_dict()),
            "optimizer.safetensors": self._copy("optimizer", optimizer_tensors(state)),
        }
        if state.device.type == "cuda":
            torch.cuda.synchronize(state.device)
        done = [phase.name for phase in state.config.phases[: state.progress.phase + state.phase_done]]
        summary = {
            "progress": state.progress.to_json(),
            "image": vars(state.image),
            "data": data,
            "phases_done": done,
            "keep": state.phase_done,
            "interval": asdict(interval),
            "watch": watch,
            "best": best,
            "versions": {"vaegan_dist": vaegan_dist.__version__, "torch": torch.__version__},
        }
        return Snapshot(state.progress.images_seen, files, dump_yaml(state.config), summary)

    def _copy(self, group: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        copies = {}
        for name, tensor in tensors.items():
            buffer = self._buffers.get((group, name))
            if buffer is None or buffer.shape != tensor.shape or buffer.dtype != tensor.dtype:
                pinned = tensor.device.type == "cuda"
                # Contiguous, as the file wants it, whatever the memory format of the weights.
                buffer = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=pinned)
                self._buffers[group, name] = buffer
            copies[name] = buffer.copy_(tensor.detach(), non_blocking=True)
        return copies


def optimizer_tensors(state: TrainState) -> dict[str, Tensor]:
    """Adam's moments and steps by `<network>.<parameter>/<moment>`, the objectives' memory by `memory/<name>`."""
    tensors = {MEMORY + name: tensor for name, tensor in state.memory.items()}
    for network, optimizer in state.optimizers.items():
        for name, parameter in state.networks[network].named_parameters():
            for key, value in optimizer.state.get(parameter, {}).items():
                tensors[f"{network}.{name}/{key}"] = value
    return tensors
