"""Distance of pictures in a fixed network's features (Zhang et al. 2018, arXiv 1801.03924, without learned weights).

The network is the user's: none is downloaded. Gradients pass through it to the reconstruction; its weights stay.
"""

import importlib
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from vaegan_dist.config import ObjectiveSection
from vaegan_dist.errors import ConfigError
from vaegan_dist.models.precision import wide

KEY = "objective.perceptual_network"


class Perceptual(nn.Module):
    """Feature distance per image, in the units of the pixel term: a mean per pixel, times the pixels' number."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.network = load_network(source).eval()
        for parameter in self.network.parameters():  # a TorchScript module has no requires_grad_ of its own
            parameter.requires_grad = False

    def train(self, mode: bool = True) -> "Perceptual":
        """The network measures: it stays in evaluation mode."""
        return super().train(False)

    def forward(self, x_rec: Tensor, x: Tensor) -> Tensor:
        """`[B]`: sum over layers of the mean over positions of |f(x_rec) - f(x)|^2, f of unit length per position."""
        with torch.no_grad():
            real = self._features(x)
        distance = wide(x_rec).new_zeros(len(x))
        for one, other in zip(self._features(x_rec), real, strict=True):
            distance = distance + (one - other).square().sum(1).flatten(1).mean(1)
        return x[0].numel() * distance

    def _features(self, x: Tensor) -> list[Tensor]:
        """Each layer's features `[B, channels, positions...]`, of unit length per position."""
        found = self.network(x.expand(-1, 3, -1, -1) if x.shape[1] == 1 else x)
        layers: Sequence[Tensor] = [found] if isinstance(found, Tensor) else list(found)
        return [wide(layer) / (wide(layer).square().sum(1, keepdim=True) + 1e-10).sqrt() for layer in layers]


def build_perceptual(settings: ObjectiveSection, like: Tensor) -> Perceptual | None:
    """The perceptual term on the device and in the precision of `like`, or None where it has no weight."""
    if not settings.perceptual_weight:
        return None
    if not settings.perceptual_network:
        raise ConfigError(
            f"objective.perceptual_weight={settings.perceptual_weight:g} needs {KEY}: a TorchScript file or "
            f"module:function that gives a feature network; or set objective.perceptual_weight=0"
        )
    return Perceptual(settings.perceptual_network).to(device=like.device, dtype=like.dtype)


def load_network(source: str) -> nn.Module:
    """The module in a TorchScript file, or what `module:function` returns.

    Raises:
        ConfigError: it is absent, or not a network.
    """
    if ":" in source and not Path(source).exists():
        module, _, function = source.partition(":")
        try:
            network = getattr(importlib.import_module(module), function)()
        except (ImportError, AttributeError) as error:
            raise ConfigError(f"{KEY}={source}: {error}; name an importable module and a function in it") from None
    else:
        if not Path(source).is_file():
            raise ConfigError(f"{KEY}={source}: no such file; give a TorchScript file or module:function")
        try:
            network = torch.jit.load(source, map_location="cpu")  # type: ignore[no-untyped-call]
        except RuntimeError:
            raise ConfigError(f"{KEY}={source}: not a TorchScript file; save it with torch.jit.save") from None
    if not isinstance(network, nn.Module):
        raise ConfigError(f"{KEY}={source}: gives a {type(network).__name__}; it must give a torch.nn.Module")
    return network
