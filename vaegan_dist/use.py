"""A trained model in use: pictures generated and reconstructed from a run or a checkpoint."""

from pathlib import Path

import torch
from torch import Tensor

from vaegan_dist.data.dataset import open_dataset
from vaegan_dist.errors import InputError
from vaegan_dist.evaluation.pictures import to_float, to_uint8
from vaegan_dist.models import latent_shape
from vaegan_dist.seeding import standard_normal
from vaegan_dist.training.checkpoint import load_networks


@torch.no_grad()
def generate(model: Path, weights: str, count: int, seed: int) -> Tensor:
    """Pictures decoded from N(0, I): uint8 `[count, C, H, W]`, the same for the same seed anywhere."""
    checkpoint, networks = load_networks(model, weights)
    shape = latent_shape(checkpoint.config.model, checkpoint.image)
    # One draw per picture, so that picture i does not depend on how many are asked for.
    z_prior = torch.stack([standard_normal(shape, seed, "samples", number) for number in range(count)])
    return to_uint8(networks["decoder"](z_prior))


@torch.no_grad()
def reconstruct(model: Path, weights: str, data: str | None, split: str, count: int) -> tuple[Tensor, Tensor]:
    """The first pictures of a data set and their reconstructions from the posterior's mean, uint8 `[n, C, H, W]`."""
    checkpoint, networks = load_networks(model, weights)
    dataset = open_dataset(data or checkpoint.config.data.path, split, in_memory=False)
    manifest, image = dataset.manifest, checkpoint.image
    if (manifest.channels, manifest.height, manifest.width) != (image.channels, image.height, image.width):
        raise InputError(
            f"data set '{data}' has pictures of {manifest.width}x{manifest.height}x{manifest.channels}, the model "
            f"takes {image.width}x{image.height}x{image.channels}; prepare it with --resolution {image.height}"
        )
    originals = dataset.read(range(min(count, len(dataset)))).images
    decoded = networks["decoder"](networks["encoder"](to_float(originals, torch.float32)).mu)
    return originals, to_uint8(decoded)
