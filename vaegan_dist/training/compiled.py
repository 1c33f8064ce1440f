"""torch.compile for the networks of a phase, and CUDA graphs where its mode captures them.

What is compiled are the networks' own passes. The objectives around them cut and walk the graph in ways that torch
would compile into pieces anyhow, and they cost little.
"""

from dataclasses import dataclass

import torch
import torch._functorch.config
from torch import nn

from vaegan_dist.config import NetworkName
from vaegan_dist.errors import ConfigError
from vaegan_dist.models.networks import PASSES
from vaegan_dist.objectives import Objective
from vaegan_dist.training.state import TrainState

GRAPH_MODES = ("reduce-overhead", "max-autotune")


@dataclass(frozen=True)
class Compiled:
    """What was compiled, and whether it replays CUDA graphs."""

    networks: tuple[NetworkName, ...] = ()
    graphs: bool = False

    def begin_step(self) -> None:
        """Tell CUDA graphs that the last step's outputs may be overwritten."""
        if self.graphs:
            torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]


def compile_networks(state: TrainState, objective: Objective) -> Compiled:
    """Compile the passes of the networks that a phase uses, as `training.compile` says; undo an earlier phase's.

    Raises:
        ConfigError: a mode that captures CUDA graphs, without a GPU.
    """
    mode = state.config.training.compile
    for name, network in state.networks.items():
        for method in PASSES[name]:  # type: ignore[index]
            network.__dict__.pop(method, None)
    if mode == "no":
        return Compiled()
    if mode in GRAPH_MODES and state.device.type != "cuda":
        raise ConfigError(
            f"training.compile={mode} captures CUDA graphs, and this worker has no GPU; use training.compile=default, "
            f"or cluster.gpus_per_worker=1"
        )
    # A graph is walked more than once here: to a picture for one player and to the weights for the other.
    torch._functorch.config.donated_buffer = False
    chosen = tuple(name for name in PASSES if name in objective.networks)
    for name in chosen:
        _compile(state.networks[name], PASSES[name], mode)
    return Compiled(chosen, mode in GRAPH_MODES)


def _compile(network: nn.Module, methods: tuple[str, ...], mode: str) -> None:
    for method in methods:
        plain = getattr(type(network), method)
        setattr(network, method, torch.compile(plain.__get__(network), mode=mode))
