"""Weights of network `kl` in the layout of diffusers' AutoencoderKL, and back, key by key and without loss."""

from typing import Any

from torch import Tensor

from vaegan_dist.config import KlModel
from vaegan_dist.models.networks import ImageShape

Weights = dict[str, Tensor]

# The two 1x1 convolutions around z belong to the autoencoder there, to encoder and decoder here.
MOVED = {"encoder.quant_conv.": "quant_conv.", "decoder.post_quant_conv.": "post_quant_conv."}


def to_diffusers(weights: Weights) -> Weights:
    """`encoder.*` and `decoder.*` under diffusers' names; the discriminator, which it does not know, stays behind."""
    kept = {key: value for key, value in weights.items() if key.startswith(("encoder.", "decoder."))}
    return {_renamed(key, MOVED): value for key, value in kept.items()}


def from_diffusers(weights: Weights) -> Weights:
    """diffusers' weights under our names: what `networks.load_state_dict` takes for encoder and decoder."""
    return {_renamed(key, {there: here for here, there in MOVED.items()}): value for key, value in weights.items()}


def diffusers_config(model: KlModel, image: ImageShape, *, scaling_factor: float = 1.0) -> dict[str, Any]:
    """Arguments of AutoencoderKL for the same networks.

    Args:
        scaling_factor: 1 / standard deviation of z over a data set, which a diffusion model multiplies z with.
    """
    blocks = len(model.channels)
    return {
        "in_channels": image.channels,
        "out_channels": image.channels,
        "down_block_types": ["DownEncoderBlock2D"] * blocks,
        "up_block_types": ["UpDecoderBlock2D"] * blocks,
        "block_out_channels": list(model.channels),
        "layers_per_block": model.layers_per_block,
        "act_fn": "silu",
        "latent_channels": model.latent_channels,
        "norm_num_groups": model.norm_groups,
        "sample_size": image.height,
        "scaling_factor": scaling_factor,
        "mid_block_add_attention": True,
    }


def _renamed(key: str, prefixes: dict[str, str]) -> str:
    for before, after in prefixes.items():
        if key.startswith(before):
            return after + key.removeprefix(before)
    return key
