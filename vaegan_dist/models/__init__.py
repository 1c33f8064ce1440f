"""The networks: encoder, decoder and discriminator of each kind, built from the `model` section."""

import torch
from torch import nn

from vaegan_dist.config import KlModel, MlpModel, ModelSection
from vaegan_dist.models.conv import ConvDecoder, ConvDiscriminator, ConvEncoder, check_attention
from vaegan_dist.models.discriminators import PatchDiscriminator, residual_for_conv, residual_for_kl
from vaegan_dist.models.kl import KlDecoder, KlEncoder, latent_size
from vaegan_dist.models.layers import draw_weights
from vaegan_dist.models.mlp import MlpDecoder, MlpDiscriminator, MlpEncoder
from vaegan_dist.models.networks import Decoder, Discriminator, Encoder, ImageShape, Posterior
from vaegan_dist.seeding import derive_seed

__all__ = [
    "Decoder",
    "Discriminator",
    "Encoder",
    "ImageShape",
    "Posterior",
    "build_networks",
    "latent_shape",
    "outline_networks",
]


def build_networks(model: ModelSection, image: ImageShape, *, seed: int) -> nn.ModuleDict:
    """Encoder, decoder and discriminator in float32 on the CPU.

    Each network's weights are a function of (seed, the network's name) alone.

    Raises:
        ConfigError: the pictures do not fit the network.
    """
    networks = outline_networks(model, image)
    for name, network in networks.items():
        network.to_empty(device="cpu")
        draw_weights(network, torch.Generator().manual_seed(derive_seed(seed, "weights", name)))
    return networks


def outline_networks(model: ModelSection, image: ImageShape) -> nn.ModuleDict:
    """The same networks on the device `meta`: shapes without numbers.

    Raises:
        ConfigError: the pictures do not fit the network.
    """
    networks: dict[str, nn.Module] = {}
    with torch.device("meta"):  # torch's own initialisation would draw from the global generator
        if isinstance(model, MlpModel):
            networks["encoder"] = MlpEncoder(model, image)
            networks["decoder"] = MlpDecoder(model, image)
            networks["discriminator"] = MlpDiscriminator(model, image)
        elif isinstance(model, KlModel):
            networks["encoder"] = KlEncoder(model, image)
            networks["decoder"] = KlDecoder(model, image)
            residual = model.discriminator == "residual"
            networks["discriminator"] = (residual_for_kl if residual else PatchDiscriminator)(model, image)
        else:
            check_attention(model, image)
            networks["encoder"] = ConvEncoder(model, image)
            networks["decoder"] = ConvDecoder(model, image)
            residual = model.discriminator == "residual"
            networks["discriminator"] = (residual_for_conv if residual else ConvDiscriminator)(model, image)
    return nn.ModuleDict(networks)


def latent_shape(model: ModelSection, image: ImageShape) -> tuple[int, ...]:
    """Shape of one z."""
    if isinstance(model, KlModel):
        return latent_size(model, image)
    return (model.latent_dim,)
