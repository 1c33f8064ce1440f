"""What a layer remembers from step to step besides its weights."""

from torch import Tensor, nn


class Stateful(nn.Module):
    """A layer whose buffers move once per optimiser step, and not while it computes.

    A forward pass leaves them alone, so that every pass of a step (real, reconstructed and generated pictures, each
    micro-batch, each rank) sees the same layer, and a step that is skipped leaves no trace.
    """

    def advance(self, skip: Tensor) -> None:
        """Move the buffers on after an optimiser step of the layer's network; leave them where `skip` is 1."""
        raise NotImplementedError


def stateful_layers(network: nn.Module) -> list[Stateful]:
    """All such layers of a network."""
    return [module for module in network.modules() if isinstance(module, Stateful)]
